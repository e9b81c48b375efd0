"""The backend: OpenVINO's paged attention op, one compiled model per kind of layer, bound to each layer's cache."""

from __future__ import annotations

import platform as python_platform
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from attn_dispatch import (
    HND,
    AttentionMetadata,
    AttentionSpec,
    Availability,
    Backend,
    CacheLayout,
    Call,
    Capabilities,
    KVCache,
    Plan,
    Verdict,
)
from attn_dispatch.contract import Array
from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.errors import BackendRefusedError, CacheError, PlanError

from .device import device_name
from .layouts import GPU, PackedLayout, layout_for
from .releases import Release, installed_version, known_releases, release_of
from .steps import Step, paged_step, tree_bias
from .verdicts import NOTES, cpu_flags, refusals

if TYPE_CHECKING:
    from .execution import Executor, Work

__all__ = ["PagedBackend", "PagedPlan"]


@dataclass(slots=True, eq=False, kw_only=True)
class PagedPlan(Plan):
    """A step for the op.

    Attributes:
        step: what the op is given; None: no row attends to anything.
        op_writes: the op writes the step's keys and values itself; else NumPy does, before.
        tree: the op's (mask, where each sequence's begins) among new tokens, if the step has one.
        work: what the executor looks up once; made by the first run.
        own_work: likewise over pages of the backend's own, and how many, for an encoder layer without a cache.
    """

    step: Step | None
    op_writes: bool
    tree: tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]] | None = None
    work: Work | None = None
    own_work: tuple[Work | None, int] | None = None


class PagedBackend(Backend):
    """Attention by OpenVINO's native op, on the CPU unless ATTN_DISPATCH_OPENVINO_DEVICE says otherwise."""

    # Unused slots may hold NaN. Scales of the packed caches are the op's own: a layer's cannot be given.
    capabilities: ClassVar[Capabilities] = Capabilities(
        libraries=("numpy", "torch"), nan_safe=True, applies_scales=False
    )

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._lock = threading.Lock()
        self._executor: Executor | None = None

    def probe(self) -> Availability:
        """Look for OpenVINO of a release that was measured, and for the device."""
        found = installed_version()
        if found is None:
            return Availability(False, "OpenVINO is not installed", "pip install 'openvino>=2025.4,<2026.5'")
        if release_of(found) is None:
            reason = f"OpenVINO {found}: its attention op was not measured; releases that are known: {known_releases()}"
            return Availability(False, reason, "pip install 'openvino>=2025.4,<2026.5'", found)
        device = device_name()
        if device != "CPU":
            if not any(Path("/dev/dri").glob("renderD*")):
                reason = f"ATTN_DISPATCH_OPENVINO_DEVICE={device}, but there is no GPU here (/dev/dri/renderD* absent)"
                return Availability(False, reason, "unset ATTN_DISPATCH_OPENVINO_DEVICE", found)
            return Availability(True, f"OpenVINO {found} on {device}", version=found, evidence="never run")
        if python_platform.machine().lower() not in ("x86_64", "amd64") or "avx2" not in cpu_flags():
            return Availability(False, "needs an x86-64 processor with AVX2", "Use another backend", found)
        return Availability(True, f"OpenVINO {found} on the CPU", version=found)

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """Everything that the installed release computes correctly."""
        release, device = self._release(), device_name()
        found = tuple(refusals(spec, release, device))
        if found:
            return self.refuse(*found)
        if device != "CPU":
            return self.accept("built the way the GPU plug-in's layouts want it; never run on one by this project")
        return self.accept(NOTES.get(spec.kv_cache_dtype, ""))

    def layout(self, spec: AttentionSpec) -> CacheLayout:
        """HND, or OpenVINO's own packing of uint8 and uint4."""
        return layout_for(spec.kv_cache_dtype) or (HND if device_name() == "CPU" else GPU)

    def zeros(self, shape: tuple[int, ...], dtype: str, device: str | None) -> Array:
        """Return a zeroed NumPy array."""
        return np.zeros(shape, numpy_dtype(dtype))

    def allocate(self, spec: AttentionSpec, num_blocks: int, device: str | None = None) -> KVCache:
        """Return a zeroed cache; for a GPU, of host memory that it shares."""
        if device not in (None, "cpu") and not str(device).upper().startswith("GPU"):
            raise CacheError(f"device={device!r}: {self.name} keeps caches in host memory; give device='cpu'")
        cache = super().allocate(spec, num_blocks, "cpu")
        if device_name() != "CPU":
            self._execute().share_with_device(cache, device_name())
        return cache

    def to_layout(self, cache: KVCache, layout: CacheLayout) -> KVCache:
        """Return a copy in another layout; packed caches have only their own."""
        if layout != cache.layout and (isinstance(layout, PackedLayout) or isinstance(cache.layout, PackedLayout)):
            raise CacheError(
                f"layout {cache.layout.name} and {layout.name} store different things: one packs integers with their "
                "scales. gather() gives the values that they stand for"
            )
        return super().to_layout(cache, layout)

    def plan(self, spec: AttentionSpec, metadata: AttentionMetadata) -> PagedPlan:
        """Work out the op's own form of the batch."""
        return self._plan(spec, metadata, None)

    def plan_tree(
        self,
        spec: AttentionSpec,
        metadata: AttentionMetadata,
        masks: Sequence[npt.NDArray[np.bool_] | None],
    ) -> PagedPlan:
        """Prepare a step in which a sequence's new tokens are a tree (speculative decoding), not a line.

        The plan is given to `Attention.run` like any other. Every new token sees all tokens before the step.

        Args:
            spec: a causal decoder layer without a window.
            metadata: the batch.
            masks: for each sequence bool[n, n] of its n new tokens, [i, j]: token i sees token j (itself, and only
                earlier ones), or None for the plain order.

        Raises:
            BackendRefusedError: this release, or a layer like this one, has no tree masks.
            MetadataError: a mask does not fit its sequence.
        """
        refused = None
        if not self._release().trees:
            refused = f"OpenVINO {installed_version()} ignores tree masks; install 2026.3 or newer"
        elif spec.kind != "decoder" or not spec.causal or spec.has_window or device_name() != "CPU":
            refused = f"tree masks are for causal decoder layers without a window, on the CPU; this one is {spec}"
        if refused:
            raise BackendRefusedError(f"{self.name}: {refused}")
        return self._plan(spec, metadata, masks)

    def run(self, call: Call) -> Array | tuple[Array, Array]:
        """Write and attend; see `Executor.run`."""
        plan, q, k, v = call.plan, call.q, call.k, call.v
        cache, layer, out = call.cache, call.layer, call.out
        executor = self._executor
        if executor is None:
            executor = self._execute()
        if not isinstance(plan, PagedPlan):
            raise PlanError(f"{self.name} runs plans of its own; this {type(plan).__name__} is another backend's")
        return executor.run(plan, q, k, v, cache, layer, out)

    def _release(self) -> Release:
        found = installed_version()
        release = release_of(found) if found else None
        if release is None:
            raise BackendRefusedError(f"{self.name}: {self.probe().reason}")
        return release

    def _execute(self) -> Executor:
        with self._lock:
            if self._executor is None:
                from .execution import Executor  # imports the vendor: not before something is computed

                self._executor = Executor(self, self._release())
            return self._executor

    def _plan(
        self, spec: AttentionSpec, metadata: AttentionMetadata, masks: Sequence[npt.NDArray[np.bool_] | None] | None
    ) -> PagedPlan:
        release, view = self._release(), metadata.view(spec.kind)
        cross = spec.sees_every_key
        step = None
        if view.side.has_blocks:
            # Without token types, a row that is given alone is the only one that sees all keys.
            step = paged_step(
                view,
                causal=spec.causal,
                rows_at_once=1 if cross and not release.token_types else None,
                clears_tails=release.clears_keys or spec.kv_cache_dtype in ("float32", "bfloat16"),
            )
        tree = None
        if masks is not None and step is not None:
            if step.parted:
                raise BackendRefusedError(
                    f"{self.name}: a tree's last block is shared with a sequence that has more tokens in it; give the "
                    "tree a copy of the block (cache.copy_blocks)"
                )
            tree = tree_bias(masks, view.query_lens, step.sequences)
        return PagedPlan(
            spec=spec,
            view=view,
            step=step,
            op_writes=step is not None
            and spec.writes_kv
            and not (cross or step.parted)
            and view.side.num_written == step.num_rows,
            tree=tree,
        )
