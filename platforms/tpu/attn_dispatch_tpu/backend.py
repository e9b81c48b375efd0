"""`tpu/pallas`: JAX's ragged paged attention, a Pallas kernel for TPUs.

On a TPU (found by its device files) the kernel is compiled for it. Anywhere else the backend is in no platform's list,
so that nobody gets it unasked; named, it runs in the simulator and says so in its verdict.
"""

from __future__ import annotations

import importlib.metadata
import os
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

import attn_dispatch as ad
from attn_dispatch.backend import Availability, Backend, Call, Capabilities, Plan, Verdict
from attn_dispatch.contract import Array, AttentionMetadata, AttentionSpec, CacheLayout, KVCache, LayerParameters
from attn_dispatch.contract.arrays import library_of
from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.errors import ArrayError, BackendRefusedError, CacheError, MissingPackageError

from . import simulator
from .cache import FunctionalCache
from .kernels import Kernel, choose_kernel
from .layouts import PAGES
from .options import StepOptions, step_options
from .planning import pack

__all__ = ["PallasBackend", "PallasPlan"]

Ids = npt.NDArray[np.int64]

_OLD_GENERATIONS = ("v2", "v3", "v2 or v3")
_TOKEN_FLOOR = 16
# A program takes seconds to compile for the simulator and next to nothing to run: few sizes.
_SIMULATED_TOKEN_FLOOR = 256


@dataclass(slots=True, eq=False, kw_only=True)
class PallasPlan(Plan):
    """A step as the kernel wants it.

    Attributes:
        options: what the step's program is compiled for; None for a step without tokens.
        batch: i32 on the device, `BatchShape.parts`.
        on_torch: the same as a torch tensor, made when pages of torch's are first run with.
    """

    options: StepOptions | None
    batch: Array
    on_torch: Array = None


class PallasBackend(Backend):
    """Ragged paged attention on TPUs."""

    capabilities: ClassVar[Capabilities] = Capabilities(libraries=("jax", "numpy", "torch"), nan_safe=True)

    def probe(self) -> Availability:
        """Look for JAX's metadata and for a TPU's device files; an installed libtpu is no evidence of a TPU."""
        try:
            version = importlib.metadata.version("jax")
        except importlib.metadata.PackageNotFoundError:
            return Availability(False, "jax is not installed", "pip install attn-dispatch-tpu")
        if not self.simulated:
            generations = {device.name for device in ad.platform.devices if device.kind == "tpu"}
            if generations & set(_OLD_GENERATIONS):
                reason = f"TPU {', '.join(sorted(generations))}: the kernels are compiled for v4 and later"
                return Availability(False, reason, "Use a TPU v4 or later", version)
            return Availability(True, ad.platform.description, version=version)
        numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())
        if not simulator.KNOWN_JAX[0] <= numbers < simulator.KNOWN_JAX[1]:
            low, high = (".".join(map(str, bound)) for bound in simulator.KNOWN_JAX)
            reason = f"no TPU here, and the simulator is for jax >={low},<{high}, not {version}"
            return Availability(False, reason, f"pip install 'jax>={low},<{high}'", version)
        reason = "no TPU here (no device files of one): named, it runs in the simulator, on the CPU"
        return Availability(True, reason, version=version, evidence="simulated on CPU")

    @property
    def simulated(self) -> bool:
        """Whether kernels are interpreted: no TPU here, or JAX was told to use the CPU."""
        told = os.environ.get("JAX_PLATFORMS", "").partition(",")[0]
        return told == "cpu" or not any(device.kind == "tpu" for device in ad.platform.devices)

    @property
    def _runs_fused(self) -> bool:
        """Fused kernels move a number of rows that is not known beforehand: plain interpretation cannot."""
        return not self.simulated or simulator.moves_memory()

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """Hold the spec against what the kernel is compiled for."""
        kernel, found = choose_kernel(spec, self._runs_fused)
        if kernel is None:
            return self.refuse(*found)
        return self.accept("runs in the simulator, on the CPU: for checking, not for speed" if self.simulated else "")

    def layout(self, spec: AttentionSpec) -> CacheLayout:
        """Joint pages, padded to the tiles of the kernel that runs the spec."""
        return self._kernel(spec).layout(spec)

    def _kernel(self, spec: AttentionSpec) -> Kernel:
        kernel, found = choose_kernel(spec, self._runs_fused)
        if kernel is None:
            raise BackendRefusedError(f"{self.name} was asked for {spec}, which it refuses: {self.refuse(*found)}")
        return kernel

    def zeros(self, shape: tuple[int, ...], dtype: str, device: str | None) -> Array:
        """Return a zeroed JAX array. Devices are named as JAX does: "tpu:0", "cpu"; torch's see `torch_routes`."""
        import jax.numpy as jnp

        if device is not None and device.startswith("torch:"):
            from . import torch_routes

            return torch_routes.zeros(shape, dtype, device.removeprefix("torch:"))

        return jnp.zeros(shape, numpy_dtype(dtype), device=self._device(device))

    def _device(self, name: str | None) -> Any:
        import jax

        if name is None:
            if self.simulated:
                return jax.devices("cpu")[0]
            if jax.default_backend() != "tpu":
                raise MissingPackageError(
                    f"this machine has a TPU ({ad.platform.description}), but JAX runs on {jax.default_backend()}: its "
                    "libtpu is missing or another process holds the TPU. pip install 'jax[tpu]'"
                )
            return jax.devices()[0]
        kind, _, index = name.partition(":")
        try:
            return jax.devices(kind)[int(index or 0)]
        except (RuntimeError, IndexError, ValueError) as error:
            found = ", ".join(f"{d.platform}:{d.id}" for d in jax.devices())
            raise CacheError(f"device={name!r}: JAX has {found} ({error})") from error

    def allocate(self, spec: AttentionSpec, num_blocks: int, device: str | None = None) -> KVCache:
        """Return a zeroed cache for one layer."""
        layout, geometry = self.layout(spec), spec.geometry
        arrays = {n: self.zeros(s, geometry.dtype, device) for n, s in layout.shapes(geometry, num_blocks).items()}
        if device is not None and device.startswith("torch:"):
            return KVCache(self, geometry, layout, num_blocks, arrays, device)
        where = next(iter(next(iter(arrays.values())).devices()))
        name = "cpu" if where.platform == "cpu" else f"{where.platform}:{where.id}"
        return FunctionalCache(self, geometry, layout, num_blocks, arrays, name)

    def plan(self, spec: AttentionSpec, metadata: AttentionMetadata) -> PallasPlan:
        """Pack the batch into one vector on the device, and settle what the step's program is compiled for.

        Raises:
            PlanError: the page table does not fit the scalar memory of a core.
        """
        import jax.numpy as jnp

        view, simulated = metadata.view(spec.kind), self.simulated
        if not view.num_tokens:
            return PallasPlan(spec=spec, view=view, options=None, batch=None)
        kernel = self._kernel(spec)
        floor = _SIMULATED_TOKEN_FLOOR if simulated else _TOKEN_FLOOR
        batch = pack(spec, view, fused=kernel.fused, token_floor=floor)
        options = step_options(kernel, spec, batch.shape, str(simulator.mode()) if simulated else "")
        return PallasPlan(spec=spec, view=view, options=options, batch=jnp.asarray(batch.integers))

    def run(self, call: Call) -> Array:
        """Write and attend in one computation, which is given the cache's pages and returns their next version.

        Raises:
            ArrayError: `out` is a JAX array; q is being traced by `jax.jit` (see `step`).
            CacheError: the cache is not one of JAX's, or its pages are gone.
        """
        plan, q, k, v = call.plan, call.q, call.k, call.v
        cache, layer, out = call.cache, call.layer, call.out
        from . import exchange

        assert isinstance(plan, PallasPlan)
        exchange.check_out(out)
        if isinstance(cache, KVCache) and cache.owner is self and cache.device.startswith("torch:"):
            return self._run_torch(plan, q, k, v, cache, layer, out)
        if not isinstance(cache, FunctionalCache):
            raise CacheError(f"{cache!r} holds no arrays of JAX: allocate the cache with {self.name}")
        pages, library = cache.live(PAGES), library_of(q)
        if exchange.is_traced(q):
            raise ArrayError(
                "run() keeps the cache's live pages itself, which a traced call cannot: inside jax.jit use "
                "backend.step(plan, q, k, v, pages, layer), which returns (out, pages)"
            )
        keys = None if k is None else exchange.to_jax("k", k)
        values = None if v is None else exchange.to_jax("v", v)
        result, after = self.step(plan, exchange.to_jax("q", q), keys, values, pages, layer)
        cache.replace(PAGES, after)
        return exchange.to_library(result, library, out)

    def _run_torch(
        self,
        plan: PallasPlan,
        q: Array,
        k: Array | None,
        v: Array | None,
        cache: KVCache,
        layer: LayerParameters,
        out: Array | None,
    ) -> Array:
        """Run on pages that are torch's, on a TPU."""
        from . import exchange, torch_routes

        pages, options = cache.arrays[PAGES], plan.options
        for name, array in (("q", q), ("k", k), ("v", v)):
            if array is not None and (library_of(array) != "torch" or array.device.type != pages.device.type):
                raise ArrayError(f"{name} must be a torch tensor on {pages.device}, where the cache's pages are")
        if options is None:
            return q.new_zeros((0, plan.spec.num_heads, plan.spec.value_head_size)) if out is None else out
        size = options.batch.tokens
        q = exchange.with_rows(q, size)
        if not plan.view.side.num_written or k is None or v is None:
            k = v = None
        else:
            k, v = exchange.with_rows(k, size), exchange.with_rows(v, size)
        if plan.on_torch is None:  # once per step, for all layers
            import torch

            plan.on_torch = torch.from_numpy(np.asarray(plan.batch)).to(pages.device)
        numbers = _numbers(layer, plan.spec.num_heads)
        result, after = torch_routes.run(pages, q, k, v, plan.on_torch, numbers, options, layer.scaled)
        cache.arrays[PAGES] = after
        result = result[: plan.num_tokens]
        return result if out is None else out.copy_(result)

    def step(
        self, plan: PallasPlan, q: Array, k: Array | None, v: Array | None, pages: Array, layer: LayerParameters
    ) -> tuple[Array, Array]:
        """Write and attend as a pure function, for use inside `jax.jit`: nothing is checked, nothing is kept.

        Args:
            plan: from `plan`.
            q: [T, H, D], of JAX; k [T, K, D] and v [T, K, Dv], or None when nothing is written.
            k: see q.
            v: see q.
            pages: the live pages, `cache.arrays["pages"]`; given up unless nothing is written.
            layer: scales.

        Returns:
            The output [T, H, Dv] and the next version of the pages.
        """
        import jax.numpy as jnp

        from . import exchange, step

        spec, options, rows = plan.spec, plan.options, plan.num_tokens
        if options is None:
            return jnp.zeros((0, spec.num_heads, spec.value_head_size), q.dtype), pages
        numbers = layer.memoize((self.name, "numbers"), lambda: _numbers(layer, spec.num_heads))
        size = options.batch.tokens
        padded = [None if x is None else exchange.with_rows(x, size) for x in (q, k, v)]
        how = {"options": options, "scaled": layer.scaled}
        with simulator.running() if options.simulated else nullcontext():
            if k is None:
                out = step.attend(pages, padded[0], plan.batch, numbers, **how)
            else:
                out, pages = step.attend_and_write(pages, *padded, plan.batch, numbers, **how)
        return (out if rows == size else out[:rows]), pages

    # Moving blocks: as the base class does it, but each makes new arrays of what it was given.

    def copy_blocks(self, cache: KVCache, src: Ids, dst: Ids) -> None:
        """Copy blocks within a cache; ids have been checked."""
        from .moves import copied

        if not isinstance(cache, FunctionalCache):  # torch's pages, which can be written to
            super().copy_blocks(cache, src, dst)
            return
        for name in cache.arrays:
            axes = (cache.layout.block_axis(name),)
            cache.replace(name, copied(cache.live(name), axes, (src,), (dst,)))

    def copy_slots(self, cache: KVCache, src: Ids, dst: Ids) -> None:
        """Copy tokens within a cache; slots have been checked."""
        from .moves import copied

        if not isinstance(cache, FunctionalCache):
            super().copy_slots(cache, src, dst)
            return
        size = cache.geometry.block_size
        for name in cache.arrays:
            axes = cache.layout.slot_axes(name)
            cache.replace(name, copied(cache.live(name), axes, np.divmod(src, size), np.divmod(dst, size)))

    def swap_blocks(self, cache: KVCache, other: KVCache, src: Ids, dst: Ids) -> None:
        """Copy blocks from `cache` into `other`, which may lie on another device."""
        import jax

        from .moves import received

        if not isinstance(cache, FunctionalCache) and not isinstance(other, FunctionalCache):
            super().swap_blocks(cache, other, src, dst)
            return
        if not isinstance(cache, FunctionalCache) or not isinstance(other, FunctionalCache):
            raise CacheError(f"blocks move between caches of one library's arrays, not from {cache!r} to {other!r}")
        for name in cache.arrays:
            axis = cache.layout.block_axis(name)
            rows = cache.live(name)[(slice(None),) * axis + (src,)]
            target = other.live(name)
            rows = jax.device_put(rows, next(iter(target.devices())))
            other.replace(name, received(target, (axis,), (dst,), rows))

    def to_layout(self, cache: KVCache, layout: CacheLayout) -> KVCache:
        """Return a copy of a cache in another layout, by way of the host."""
        import jax

        if not isinstance(cache, FunctionalCache):
            raise CacheError(f"{cache!r}: pages of torch's on a TPU are not converted; gather() copies blocks out")
        shapes = layout.shapes(cache.geometry, cache.num_blocks)
        host = {name: np.asarray(array) for name, array in cache.arrays.items()}
        made = {name: np.zeros(shape, numpy_dtype(cache.geometry.dtype)) for name, shape in shapes.items()}
        layout.put_logical(made, *cache.layout.to_logical(host))
        device = self._device(None if cache.device == "cpu" and self.simulated else cache.device)
        arrays = {name: jax.device_put(array, device) for name, array in made.items()}
        return FunctionalCache(self, cache.geometry, layout, cache.num_blocks, arrays, cache.device)


def _numbers(layer: LayerParameters, heads: int) -> npt.NDArray[np.float32]:
    """Return what a layer owns as one vector: k_scale, v_scale, sinks."""
    sinks = np.zeros(heads, np.float32) if layer.sinks is None else layer.sinks
    return np.concatenate([np.array([layer.k_scale, layer.v_scale], np.float32), sinks])
