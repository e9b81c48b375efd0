"""`tpu/pallas`: ragged paged attention by Pallas kernels for TPUs: probe, verdict, layout. Imports no vendor.

On a TPU (found by its device files) the kernels are compiled for it. Anywhere else the backend is in no platform's
list, so that nobody gets it unasked; named, it runs in JAX's interpreter and says so in its verdict.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

import attn_dispatch as ad
from attn_dispatch.adapters.environment import Packages
from attn_dispatch.backend import Availability, Backend, Call, Capabilities, Verdict
from attn_dispatch.contract import Array, AttentionMetadata, AttentionSpec, CacheLayout, KVCache, LayerParameters
from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.errors import BackendRefusedError

from . import simulator
from .cache import FunctionalCache
from .kernels import Kernel, choose_kernel

if TYPE_CHECKING:
    from .pallas_call import PallasPlan

__all__ = ["PallasBackend"]

Ids = npt.NDArray[np.int64]

_OLD_GENERATIONS = ("v2", "v3", "v2 or v3")


class PallasBackend(Backend):
    """Ragged paged attention on TPUs."""

    capabilities: ClassVar[Capabilities] = Capabilities(libraries=("jax", "numpy", "torch"), nan_safe=True)

    def probe(self) -> Availability:
        """Look for JAX's metadata and for a TPU's device files; an installed libtpu is no evidence of a TPU."""
        version = Packages().version("jax")
        if not version:
            return Availability(False, "jax is not installed", "pip install attn-dispatch-tpu")
        if not self.simulated:
            generations = {device.name for device in ad.platform.devices if device.kind == "tpu"}
            if generations & set(_OLD_GENERATIONS):
                reason = f"TPU {', '.join(sorted(generations))}: the kernels are compiled for v4 and later"
                return Availability(False, reason, "Use a TPU v4 or later", version)
            return Availability(True, ad.platform.description, version=version)
        if not simulator.knows(version):
            low, high = simulator.known_versions()
            reason = f"no TPU here, and the simulator is for jax >={low},<{high}, not {version}"
            return Availability(False, reason, f"pip install 'jax>={low},<{high}'", version)
        reason = f"no TPU here (no device files of one): named, it runs on the CPU, in {simulator.PATCHED}"
        return Availability(True, reason, version=version, evidence="simulated on CPU")

    @property
    def simulated(self) -> bool:
        """Whether kernels are interpreted: no TPU here, or JAX was told to use the CPU."""
        platform = os.environ.get("JAX_PLATFORMS", "").partition(",")[0]
        return platform == "cpu" or not any(device.kind == "tpu" for device in ad.platform.devices)

    @property
    def _runs_fused(self) -> bool:
        """Fused kernels move a number of rows that is not known beforehand: plain interpretation cannot."""
        return not self.simulated or simulator.moves_memory()

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """Compare the spec with what the kernels are compiled for."""
        kernel, refusals = choose_kernel(spec, self._runs_fused)
        if kernel is None:
            return self.refuse(*refusals)
        return self.accept("runs in JAX's interpreter, on the CPU: for checking, not for speed" * self.simulated)

    def layout(self, spec: AttentionSpec) -> CacheLayout:
        """Joint pages, padded to the tiles of the kernel that runs the spec."""
        return self._kernel(spec).layout(spec)

    def _kernel(self, spec: AttentionSpec) -> Kernel:
        kernel, refusals = choose_kernel(spec, self._runs_fused)
        if kernel is None:
            raise BackendRefusedError(f"{self.name} was asked for {spec}, which it refuses: {self.refuse(*refusals)}")
        return kernel

    def zeros(self, shape: tuple[int, ...], dtype: str, device: str | None) -> Array:
        """Return a zeroed JAX array. Devices are named as JAX does: "tpu:0", "cpu"."""
        import jax.numpy as jnp

        from .exchange import device_named

        return jnp.zeros(shape, numpy_dtype(dtype), device=device_named(device, self.simulated))

    def allocate(self, spec: AttentionSpec, num_blocks: int, device: str | None = None) -> KVCache:
        """Return a zeroed cache for one layer."""
        from .exchange import device_named, name_of

        device_named(device, self.simulated)
        cache = super().allocate(spec, num_blocks, device)
        name = name_of(next(iter(cache.arrays.values())))
        return FunctionalCache(self, cache.geometry, cache.layout, num_blocks, dict(cache.arrays), name)

    def plan(self, spec: AttentionSpec, metadata: AttentionMetadata) -> PallasPlan:
        """Pack the batch into one vector on the device, and settle what the step's program is compiled for.

        Raises:
            PlanError: the block table does not fit the scalar memory of a core.
        """
        from .pallas_call import make_plan

        return make_plan(self._kernel(spec), spec, metadata.view(spec.kind), self.simulated)

    def run(self, call: Call) -> Array:
        """Write and attend in one computation, which is given the cache's pages and returns their next version.

        Raises:
            ArrayError: `out` is a JAX array; q is being traced by `jax.jit` (see `step`).
            CacheError: the cache is not one of JAX's, or its pages are gone.
        """
        from .pallas_call import run

        return run(call, self.name)

    def step(
        self, plan: PallasPlan, q: Array, k: Array | None, v: Array | None, pages: Array, layer: LayerParameters
    ) -> tuple[Array, Array]:
        """Write and attend as a pure function, for use inside `jax.jit`: nothing is checked, nothing is kept.

        Args:
            plan: from `plan`.
            q: [T, H, D], of JAX.
            k: [T, K, D], or None when nothing is written.
            v: [T, K, Dv], likewise.
            pages: the live pages, `cache.arrays["pages"]`; given up unless nothing is written.
            layer: sinks and scales.

        Returns:
            The output [T, H, Dv] and the next version of the pages.
        """
        from .pallas_call import step

        return step(plan, q, k, v, pages, layer)

    # Moving blocks: as the base class does it, but each move makes new arrays.

    def gather(self, cache: KVCache, blocks: Ids) -> tuple[Array, Array]:
        """Return a copy of blocks in logical order; on a CPU nothing is compiled for it."""
        from .moves import gather

        return gather(cache, blocks) if cache.device == "cpu" else super().gather(cache, blocks)

    def copy_blocks(self, cache: KVCache, src: Ids, dst: Ids) -> None:
        """Copy blocks within a cache; ids have been checked."""
        from .moves import copy_blocks

        copy_blocks(cache, src, dst)

    def copy_slots(self, cache: KVCache, src: Ids, dst: Ids) -> None:
        """Copy tokens within a cache; slots have been checked."""
        from .moves import copy_slots

        copy_slots(cache, src, dst)

    def swap_blocks(self, cache: KVCache, other: KVCache, src: Ids, dst: Ids) -> None:
        """Copy blocks from `cache` into `other`, which may lie on another device."""
        from .moves import swap_blocks

        swap_blocks(cache, other, src, dst)

    def to_layout(self, cache: KVCache, layout: CacheLayout) -> KVCache:
        """Return a copy of a cache in another layout, by way of the host."""
        from .moves import to_layout

        return to_layout(cache, layout)
