"""The protocol that a backend speaks, and what it answers: `Availability`, `Verdict`, `Capabilities`.

`reference.py` is the smallest complete backend and the template for a new one.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from attn_dispatch.call import Call, Plan
from attn_dispatch.contract import (
    CONTRACT_VERSION,
    HND,
    Array,
    AttentionMetadata,
    AttentionSpec,
    CacheLayout,
    KVCache,
)
from attn_dispatch.contract.adoption import CacheViews
from attn_dispatch.contract.arrays import as_library, device_of, library_of
from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.errors import CacheError, PlanError
from attn_dispatch.merge import merge_states

__all__ = ["Availability", "Backend", "Call", "Capabilities", "Plan", "Refusal", "Verdict"]

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Availability:
    """Whether a backend could run on this machine at all, found without importing its vendor.

    Attributes:
        available: its vendor's library is installed and the hardware is there.
        reason: what was found, in words; when not available, what is missing.
        remedy: what to do about it (a command, where there is one).
        version: the vendor library's version, when installed.
        evidence: what a run here proves: "ran" on the hardware that it is for, "ran on CPU" through the vendor's real
            runtime, "simulated on CPU".
    """

    available: bool
    reason: str = ""
    remedy: str = ""
    version: str = ""
    evidence: str = "ran"

    def __bool__(self) -> bool:
        return self.available


@dataclass(frozen=True)
class Refusal:
    """One reason against: the field, its value, what would be accepted, what to do."""

    field: str
    value: object
    accepts: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f" {self.remedy}" if self.remedy else ""
        return f"{self.field}={self.value}: {self.accepts}.{remedy}" if self.field else f"{self.accepts}.{remedy}"


@dataclass(frozen=True)
class Verdict:
    """What one backend says of one spec: yes (`bool(verdict)`), or every refusal that it has.

    Attributes:
        backend: its name.
        refusals: why not; none means yes.
        note: what a user should know of a yes ("runs in the simulator").
        failed: it could not even be asked: not loaded, or crashed.
    """

    backend: str
    refusals: tuple[Refusal, ...] = ()
    note: str = ""
    failed: bool = False

    def __bool__(self) -> bool:
        return not self.refusals

    @property
    def answer(self) -> str:
        """Return "yes", "no", or "?" of a backend that could not be asked."""
        return "?" if self.failed else "no" if self.refusals else "yes"

    def __str__(self) -> str:
        return "; ".join(str(refusal) for refusal in self.refusals) or self.note or "yes"


@dataclass(frozen=True)
class Capabilities:
    """What holds of a backend whatever the spec.

    Attributes:
        libraries: the array libraries that it computes on; others are exchanged without a copy.
        nan_safe: its output does not depend on unused slots even when they hold NaN (clause 2).
        rounds_kv_to: a type to which the runtime rounds keys and values of its own accord (clause 7).
        applies_scales: it applies a layer's k_scale and v_scale; if not, only scales of 1 are accepted (clause 12).
        cache_views: what it reads and writes in place of memory that an engine owns (`Attention.adopt`): "strided", any
            strides with a dense last axis; "blocks", blocks that may lie apart; "dense", contiguous arrays alone.
        fixed_plans: it has `fixed_plan`: plans whose buffers stay, for graphs that are captured once.
    """

    libraries: tuple[str, ...]
    nan_safe: bool = False
    rounds_kv_to: str | None = None
    applies_scales: bool = True
    fixed_plans: bool = False
    cache_views: CacheViews = "dense"


class Backend(abc.ABC):
    """One vendor runtime's attention behind the contract.

    A subclass imports its vendor only in methods that compute (`zeros`, `plan`, `run`): loading it, asking `probe` and
    asking `verdict` must be possible on a machine that lacks the vendor, and must initialise no device.
    A vendor that merges partial results itself (cascade, split-KV) overrides `merge_states` as well.

    A backend compares equal to its name.
    """

    contract_version: ClassVar[int] = CONTRACT_VERSION
    capabilities: ClassVar[Capabilities]

    def __init__(self, name: str) -> None:
        self.name = name
        """`folder/library`; an installed backend's is that of its entry point."""

    @abc.abstractmethod
    def probe(self) -> Availability:
        """Say whether this machine could run the backend, from files and package metadata alone."""

    def import_vendor(self) -> None:
        """Import what the backend computes with: the module `<library>_call` beside its own, where there is one.

        Called when it has been chosen without having been named: a vendor that cannot be imported (built for another
        version, a missing shared library) then leaves the choice to the next backend, with its error as the verdict.
        """
        module = f"{type(self).__module__}_call"
        if find_spec(module) is not None:
            import_module(module)

    @abc.abstractmethod
    def verdict(self, spec: AttentionSpec) -> Verdict:
        """Say whether it computes this spec correctly; every field takes part. `accept` and `refuse` make answers."""

    @abc.abstractmethod
    def zeros(self, shape: tuple[int, ...], dtype: str, device: str | None) -> Array:
        """Return a zeroed array of the backend's library. `dtype` is a canonical name; None: the default device."""

    @abc.abstractmethod
    def plan(self, spec: AttentionSpec, metadata: AttentionMetadata) -> Plan:
        """Prepare a step: everything that does not depend on the layer is done here, once."""

    @abc.abstractmethod
    def run(self, call: Call) -> Array | tuple[Array, Array]:
        """Write the new keys and values, then attend.

        The caller (`Attention.run`) has checked shapes, types, the cache's geometry and layout, and that every block
        of the plan is inside the cache. `call.plan` is from this backend's `plan`; arrays are of one of
        `capabilities.libraries`.

        Returns:
            [T, H, Dv] (`call.out`, when given), or that and the LSE when `call.return_lse`.
        """

    def fixed_plan(self, spec: AttentionSpec, metadata: AttentionMetadata, max_seq_len: int) -> Plan:
        """Prepare a step whose buffers stay: captured once in a graph, replayed after `plan.renew(metadata)`.

        Optional: a backend that has it declares `Capabilities.fixed_plans`.

        Args:
            spec: the layers.
            metadata: a batch of the shape that all others will have (padding included).
            max_seq_len: the most tokens that a sequence will ever have.

        Raises:
            PlanError: the backend has no fixed plans, or the batch does not fit.
        """
        raise PlanError(f"{self.name} has no fixed plans: plan(spec, metadata) anew for each step")

    def merge_states(self, states: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
        """Merge partial results that `run` returned: the core's `merge_states`, for what a vendor's does not take.

        Args:
            states: see `attn_dispatch.merge_states`; the LSE is natural, here and in what is returned.
        """
        return merge_states(states)

    def layout(self, spec: AttentionSpec) -> CacheLayout:
        """Return the layout of a cache for this spec (HND unless overridden)."""
        return HND

    def allocate(self, spec: AttentionSpec, num_blocks: int, device: str | None = None) -> KVCache:
        """Return a zeroed cache for one layer (clause 2: unused slots are finite)."""
        layout, geometry = self.layout(spec), spec.geometry
        on_host = self.capabilities.libraries[0] == "numpy"
        if on_host and device not in (None, "cpu"):
            raise CacheError(
                f"device={device!r}: {self.name} keeps its caches in host memory; give device='cpu' or none"
            )
        try:
            arrays = {
                name: self.zeros(shape, "float32" if name.endswith("_scale") else geometry.dtype, device)
                for name, shape in layout.shapes(geometry, num_blocks).items()
            }
        except (MemoryError, ValueError, RuntimeError) as error:
            where = "" if device is None else f" on device={device!r}"
            raise CacheError(f"num_blocks={num_blocks} of {geometry}{where} cannot be had: {error}") from error
        place = "cpu" if on_host else device_of(next(iter(arrays.values())))
        return KVCache(self, geometry, layout, num_blocks, arrays, place)

    def accept(self, note: str = "") -> Verdict:
        """Return a yes."""
        return Verdict(self.name, note=note)

    def refuse(self, *refusals: Refusal) -> Verdict:
        """Return a no for these reasons (a yes if there are none: collect, then `refuse(*refusals)`)."""
        return Verdict(self.name, refusals)

    # Moving blocks. These defaults suit any library whose arrays can be indexed and assigned (NumPy, torch).

    def indexable_view(self, array: Array) -> Array:
        """Return a view that can be indexed (a library may lack that for fp8: give its bytes)."""
        return array

    def gather(self, cache: KVCache, blocks: Ids) -> tuple[Array, Array]:
        """Return a copy of blocks in logical order; see `KVCache.gather`."""
        picked = {
            name: self._unbits(cache, name, self.indexable_view(array)[_at(cache.layout.block_axis(name), blocks)])
            for name, array in cache.arrays.items()
        }
        key, value = cache.layout.to_logical(picked)
        if cache.layout.per_token_scales:
            key = as_float32(key) * picked["key_scale"][..., None]
            value = as_float32(value) * picked["value_scale"][..., None]
        return key, value

    def _unbits(self, cache: KVCache, name: str, picked: Array) -> Array:
        dtype = cache.arrays[name].dtype
        return picked if picked.dtype == dtype else picked.view(dtype)

    def copy_blocks(self, cache: KVCache, src: Ids, dst: Ids) -> None:
        """Copy blocks within a cache; ids have been checked."""
        for name, array in cache.arrays.items():
            axis, bits = cache.layout.block_axis(name), self.indexable_view(array)
            bits[_at(axis, dst)] = bits[_at(axis, src)]

    def copy_slots(self, cache: KVCache, src: Ids, dst: Ids) -> None:
        """Copy tokens within a cache; slots have been checked."""
        size = cache.geometry.block_size
        for name, array in cache.arrays.items():
            block, token = cache.layout.slot_axes(name)
            bits = self.indexable_view(array)
            target, source = ([slice(None)] * bits.ndim for _ in range(2))
            target[block], target[token] = dst // size, dst % size  # type: ignore[call-overload]
            source[block], source[token] = src // size, src % size  # type: ignore[call-overload]
            bits[tuple(target)] = bits[tuple(source)]

    def swap_blocks(self, cache: KVCache, other: KVCache, src: Ids, dst: Ids) -> None:
        """Copy blocks from `cache` into `other`, which may lie on another device."""
        for name, array in cache.arrays.items():
            axis, target = cache.layout.block_axis(name), self.indexable_view(other.arrays[name])
            moved = self.indexable_view(array)[_at(axis, src)]
            library = library_of(target)
            moved = as_library(moved, library)
            target[_at(axis, dst)] = moved.to(target.device) if library == "torch" else moved

    def to_layout(self, cache: KVCache, layout: CacheLayout) -> KVCache:
        """Return a copy of a cache in another layout."""
        if layout.per_token_scales != cache.layout.per_token_scales:
            raise CacheError(
                f"layout {cache.layout.name} and {layout.name} store different things: one keeps scales per token"
            )
        shapes: Mapping[str, tuple[int, ...]] = layout.shapes(cache.geometry, cache.num_blocks)
        arrays = {
            name: self.zeros(shape, "float32" if name.endswith("_scale") else cache.geometry.dtype, cache.device)
            for name, shape in shapes.items()
        }
        elements = {name: self.indexable_view(array) for name, array in cache.arrays.items()}
        targets = {name: self.indexable_view(array) for name, array in arrays.items()}
        layout.put_logical(targets, *cache.layout.to_logical(elements))
        for name in shapes:
            if name.endswith("_scale"):
                arrays[name][...] = cache.arrays[name]
        return KVCache(self, cache.geometry, layout, cache.num_blocks, arrays, cache.device)

    def __eq__(self, other: object) -> bool:
        return self.name == other if isinstance(other, str) else self is other

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


def _at(axis: int, ids: Ids) -> tuple[Any, ...]:
    return (slice(None),) * axis + (ids,)


def as_float32(array: Array) -> Array:
    """Return a float32 array of the same library."""
    return array.float() if library_of(array) == "torch" else array.astype(numpy_dtype("float32"))
