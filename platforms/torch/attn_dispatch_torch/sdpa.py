"""`torch/sdpa`: scaled-dot-product attention over gathered pages, on whatever device torch has."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar

from attn_dispatch import (
    AttentionMetadata,
    AttentionSpec,
    Availability,
    Backend,
    Capabilities,
    KVCache,
    LayerParameters,
    Plan,
    Refusal,
    Verdict,
    platform,
)

if TYPE_CHECKING:
    import torch

__all__ = ["SdpaBackend"]


class SdpaBackend(Backend):
    """The portable fallback: correct everywhere, and as fast as torch's fused kernels over a gathered copy are."""

    capabilities: ClassVar[Capabilities] = Capabilities(libraries=("torch",), nan_safe=True)

    def probe(self) -> Availability:
        """torch is installed; whether it can use this machine's device is said beside."""
        if find_spec("torch") is None:
            return Availability(False, "torch is not installed", "pip install torch")
        try:
            found = version("torch")
        except PackageNotFoundError:  # a build from source need not have metadata
            found = str(platform.facts.get("torch_flavor") or "")
        return Availability(True, "scaled-dot-product attention over a gathered copy of the pages", version=found)

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """Everything but the vendors' packed cache types."""
        if spec.kv_cache_dtype in ("uint8", "uint4"):
            accepts = "asymmetric integers have no layout here, only in a vendor's cache"
            return self.refuse(Refusal("kv_cache_dtype", spec.kv_cache_dtype, accepts, "Ask for int8 or fp8"))
        return self.accept()

    def zeros(self, shape: tuple[int, ...], dtype: str, device: str | None) -> torch.Tensor:
        """Return a zeroed tensor."""
        import torch

        return torch.zeros(shape, dtype=getattr(torch, dtype), device=device)

    def allocate(self, spec: AttentionSpec, num_blocks: int, device: str | None = None) -> KVCache:
        """Return a zeroed cache on a device (None: torch's default device)."""
        cache = super().allocate(spec, num_blocks, device)
        cache.device = str(cache.key.device)
        return cache

    def bits(self, array: torch.Tensor) -> torch.Tensor:
        """Return fp8 as its bytes: indexing fp8 is not implemented on every device."""
        import torch

        return array.view(torch.uint8) if array.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else array

    def plan(self, spec: AttentionSpec, metadata: AttentionMetadata) -> Plan:
        """Sort the sequences into groups that one call each can attend for."""
        from .grouping import make_plan

        return make_plan(spec, metadata.view(spec.kind))

    def run(
        self,
        plan: Plan,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        cache: KVCache | None,
        layer: LayerParameters,
        out: torch.Tensor | None = None,
        *,
        return_lse: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Write, gather and attend; see `attend.run`."""
        from .attend import run

        pages = None if cache is None else cache.arrays_as("torch")
        return run(plan, q, k, v, pages, layer, out, return_lse)
