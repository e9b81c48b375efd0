"""What the two XPU backends have in common: an NHD cache on an Intel GPU, and one ragged op for every sequence.

IPEX has a decode op for XPU too, but over another layout ([N, K, D, B]) and without windows: its ragged op takes
decodes as sequences of one query, so that one cache serves both. vllm-xpu-kernels tells them apart itself.

A backend adds how its vendor writes and attends. Nothing here has run on an Intel GPU.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from attn_dispatch.backend import Backend, Call, Plan, Refusal
from attn_dispatch.contract import (
    NHD,
    Array,
    AttentionMetadata,
    AttentionSpec,
    CacheLayout,
    LayerParameters,
)
from attn_dispatch.errors import CacheError
from attn_dispatch_ipex import vendor
from attn_dispatch_ipex.steps import Route, Steps, VarlenStep, cut

__all__ = ["OnDevice", "VarlenXpuBackend", "XpuPlan", "intel_gpus", "shared_refusals"]


def intel_gpus() -> list[str]:
    """Return the Intel GPUs of this machine, described; no device is opened."""
    import attn_dispatch  # the door: it may be what is importing this module

    return [str(device) for device in attn_dispatch.platform.devices if device.kind == "intel-gpu"]


def shared_refusals(spec: AttentionSpec) -> list[Refusal]:
    """Refuse what neither vendor's op has."""
    no: list[Refusal] = []
    if spec.dtype not in ("float16", "bfloat16"):
        no.append(Refusal("dtype", spec.dtype, "the op computes in float16 and bfloat16", "Ask for bfloat16"))
    if spec.kv_cache_dtype != spec.dtype:
        accepts = f"only caches of the layer's own type, {spec.dtype}, have been compared with the vendor's sources"
        no.append(Refusal("kv_cache_dtype", spec.kv_cache_dtype, accepts, f"Ask for {spec.dtype}"))
    if spec.value_head_size != spec.head_size:
        accepts = f"the op takes values to be as wide as keys, {spec.head_size}"
        no.append(Refusal("value_head_size", spec.value_head_size, accepts))
    if spec.kind == "encoder":
        no.append(Refusal("kind", "encoder", "the op reads pages; an encoder may have none", "Use torch/sdpa"))
    if spec.returns_lse:
        no.append(Refusal("returns_lse", True, "the op gives no LSE for paged keys", "Use torch/sdpa"))
    return no


@dataclass(frozen=True, eq=False)
class OnDevice:
    """A batch as tensors of one device.

    Attributes:
        rows: i64, rows of q that attend to something (None: all).
        idle: i64, those that do not.
        query_start: i32[s + 1].
        kv_start: i32[s + 1], sums of the lengths.
        lens: i32[s].
        tables: i32[s, M].
        written: i64, rows of k and v that are written (None: all).
        slots: i64.
    """

    rows: Any
    idle: Any
    query_start: Any
    kv_start: Any
    lens: Any
    tables: Any
    written: Any
    slots: Any


@dataclass(slots=True, eq=False, kw_only=True)
class XpuPlan(Plan):
    """A step on the host; `on` gives it on a device, moved there once for all layers."""

    steps: Steps = field(init=False)
    _moved: dict[str, OnDevice] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        Plan.__post_init__(self)
        side = self.view.side
        self.steps = cut(self.spec, self.view, side.table, side.block_size, Route(False, True))

    @property
    def varlen(self) -> VarlenStep | None:
        """The sequences that attend to something."""
        return self.steps.varlen

    def on(self, device: Any) -> OnDevice:
        """Return the batch on a torch device."""
        found = self._moved.get(str(device))
        if found is None:
            found = self._moved[str(device)] = self._move(device)
        return found

    def _move(self, device: Any) -> OnDevice:
        torch = vendor.load("torch", "")
        side, step = self.view.side, self.steps.varlen
        written = np.flatnonzero(side.slots >= 0)

        def moved(array: npt.NDArray[Any] | None) -> Any:
            return None if array is None else torch.from_numpy(array).to(device)

        def rows(which: slice | npt.NDArray[Any] | None) -> npt.NDArray[Any] | None:
            return np.arange(which.start, which.stop) if isinstance(which, slice) else which

        return OnDevice(
            rows=moved(rows(step.rows) if step is not None and self.steps.idle is not None else None),
            idle=moved(rows(self.steps.idle)),
            query_start=moved(step.query_start if step else None),
            kv_start=moved(step.kv_start if step else None),
            lens=moved(step.lens if step else None),
            tables=moved(step.tables if step else None),
            written=None if side.writes_all else moved(written),
            slots=moved(side.slots[written]),
        )


class VarlenXpuBackend(Backend):
    """An NHD cache, and one ragged call for decodes and prefills alike."""

    module: str
    remedy: str

    @abstractmethod
    def write(self, k: Array, v: Array, key: Array, value: Array, slots: Array) -> None:
        """Store rows [n, K, D] in slots i64[n] of key and value [N, B, K, D]."""

    @abstractmethod
    def attend(
        self, plan: XpuPlan, at: OnDevice, q: Array, key: Array, value: Array, layer: LayerParameters, out: Array
    ) -> None:
        """Attend with q [n, H, D] over key and value [N, B, K, D], into out [n, H, D]. All are contiguous."""

    def layout(self, spec: AttentionSpec) -> CacheLayout:
        """A token's heads lie together."""
        return NHD

    def zeros(self, shape: tuple[int, ...], dtype: str, device: str | None) -> Array:
        """Return a zeroed torch tensor on the current XPU."""
        torch = vendor.load("torch", self.remedy)
        if device is not None and torch.device(device).type != "xpu":
            raise CacheError(f"device={device!r}: {self.name} computes on an XPU, and so do its caches")
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=device or "xpu")

    def plan(self, spec: AttentionSpec, metadata: AttentionMetadata) -> Plan:
        """Leave out sequences that attend to nothing."""
        return XpuPlan(spec=spec, view=metadata.view(spec.kind))

    def run(self, call: Call) -> Array | tuple[Array, Array]:
        """Write the new keys and values, then attend."""
        plan, q, k, v = call.plan, call.q, call.k, call.v
        cache, layer, out = call.cache, call.layer, call.out
        assert isinstance(plan, XpuPlan)
        assert cache is not None
        vendor.load(self.module, self.remedy)
        at = plan.on(q.device)
        arrays = cache.arrays_as("torch")
        key, value = arrays["key"], arrays["value"]
        if k is not None and v is not None and len(at.slots):
            if at.written is not None:
                k, v = k.index_select(0, at.written), v.index_select(0, at.written)
            self.write(k.contiguous(), v.contiguous(), key, value, at.slots)
        if out is None:
            out = q.new_empty((plan.num_tokens, plan.spec.num_heads, plan.spec.value_head_size))
        if at.idle is not None:
            out[at.idle] = 0
        if plan.varlen is None:
            return out
        picked = (q if at.rows is None else q.index_select(0, at.rows)).contiguous()
        whole = at.rows is None and out.is_contiguous()
        target = out if whole else q.new_empty((len(picked), *out.shape[1:]))
        self.attend(plan, at, picked, key, value, layer, target)
        if at.rows is not None:
            out.index_copy_(0, at.rows, target)
        elif not whole:
            out.copy_(target)
        return out
