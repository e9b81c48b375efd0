"""The kernels behind `tpu/pallas`: what each computes, and the pages that it wants. No vendor is imported here.

Each refusal is one of the compiler's or of a kernel's signature; `evidence/compile_check.py` checks both directions
with the TPU's own compiler.

    ragged    jax.experimental.pallas.ops.tpu.ragged_paged_attention: always there
    fused     tpu-inference's v3: writes the cache itself, any head size, also without causality
    fused64   tpu-inference's kernel for heads of 64: half the memory, and sinks
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import ClassVar

from attn_dispatch.adapters.environment import Packages
from attn_dispatch.adapters.joint_pages import JointPages, joint_pages
from attn_dispatch.backend import Refusal
from attn_dispatch.contract import AttentionSpec

from .tiles import LANES, VMEM_BYTES, GridStep, align, packing

__all__ = ["KERNELS", "Fused", "Fused64", "Kernel", "Ragged", "choose_kernel", "has_tpu_inference", "kernel_named"]

TPU_INFERENCE = "0.31"
"""Its kernels are private: other versions may not fit (0.32 calls functions that only newer releases of JAX have)."""

TYPES = ("bfloat16", "float32")
"""Of queries: Mosaic has no float16 or float64 vectors that these kernels could use."""


class Kernel(abc.ABC):
    """One kernel; stateless.

    Attributes:
        name: ours.
        cache_types: what its pages may hold.
        fused: it writes the cache itself, and wants decodes first.
    """

    name: ClassVar[str]
    cache_types: ClassVar[tuple[str, ...]]
    fused: ClassVar[bool] = True

    def installed(self) -> bool:
        """Whether its package is there (it is not imported)."""
        return has_tpu_inference()

    @abc.abstractmethod
    def kv_heads(self, spec: AttentionSpec) -> int:
        """Return K', the fewest heads, at least the spec's, whose rows fill whole words."""

    def group(self, spec: AttentionSpec) -> int:
        """Return G', query heads for each key/value head."""
        return spec.group_size

    def lanes(self, spec: AttentionSpec) -> int:
        """Return the elements of a padded head."""
        return align(max(spec.head_size, spec.value_head_size), LANES)

    def tail(self, spec: AttentionSpec) -> tuple[int, ...]:
        """Return the axes of a page after its tokens."""
        packed = packing(spec.kv_cache_dtype)
        return (2 * self.kv_heads(spec) // packed, packed, self.lanes(spec))

    def grid_step(self, spec: AttentionSpec) -> GridStep:
        """Return what a grid step's memory depends on."""
        return GridStep(
            self.kv_heads(spec), self.group(spec), self.lanes(spec), spec.block_size, spec.dtype, spec.kv_cache_dtype
        )

    def layout(self, spec: AttentionSpec) -> JointPages:
        """Return the layout of its pages."""
        return joint_pages(spec.geometry, self.kv_heads(spec), self.lanes(spec), self.tail(spec))

    def refusals(self, spec: AttentionSpec) -> Iterator[Refusal]:
        """Yield every reason against a spec."""
        yield from self._features(spec)
        if spec.dtype not in TYPES:
            accepts = f"Mosaic compiles this kernel for {' and '.join(TYPES)}"
            yield Refusal("dtype", spec.dtype, accepts, "Ask for bfloat16")
        if spec.kv_cache_dtype not in self.cache_types:
            accepts = f"the kernel reads pages of {', '.join(self.cache_types)}"
            yield Refusal("kv_cache_dtype", spec.kv_cache_dtype, accepts, "Ask for bfloat16")
        elif spec.dtype in TYPES and not self.grid_step(spec).fits:
            smaller = spec.block_size
            while smaller > 1 and not self.grid_step(replace(spec, block_size=smaller)).fits:
                smaller //= 2
            accepts = f"two blocks and their scores exceed {VMEM_BYTES >> 20} MiB of VMEM; {smaller} tokens would fit"
            yield Refusal("block_size", spec.block_size, accepts, f"Ask for block_size={smaller}")

    def _features(self, spec: AttentionSpec) -> Iterator[Refusal]:
        if spec.kind != "decoder":
            yield Refusal("kind", spec.kind, "the kernel is self-attention over pages: decoder layers")
        if spec.alibi:
            yield Refusal("alibi", True, "the kernel has no bias")
        if spec.returns_lse:
            yield Refusal("returns_lse", True, "the kernel does not return LSE")


class Ragged(Kernel):
    """JAX's own, "v2": reads pages that were written before."""

    name = "ragged"
    cache_types = ("bfloat16", "float32", "float8_e4m3fn", "float8_e5m2", "int8")
    fused = False

    def installed(self) -> bool:
        """It comes with JAX."""
        return True

    def kv_heads(self, spec: AttentionSpec) -> int:
        """2K' rows fill 1, 2, 4 or a multiple of 8 words."""
        packed, heads = packing(spec.kv_cache_dtype), spec.num_kv_heads
        while not _whole_tiles(2 * heads, packed):
            heads += 1
        return heads

    def group(self, spec: AttentionSpec) -> int:
        """A grid step's query heads are all there are, or a multiple of 8: the last but one axis is tiled by that.

        Where neither holds (float32, one query head for each of eight or more) an empty query head is added.
        """
        group, heads, per_step = spec.group_size, self.kv_heads(spec), self._kv_heads_per_step(spec)
        while per_step != heads and _whole_tiles(per_step * group, packing(spec.dtype)) and per_step * group % 8:
            group += 1
        return group

    def _kv_heads_per_step(self, spec: AttentionSpec) -> int:
        rows, heads = 8 * packing(spec.kv_cache_dtype), self.kv_heads(spec)
        return rows // 2 if 2 * heads % rows == 0 else heads

    def tail(self, spec: AttentionSpec) -> tuple[int, ...]:
        """[2K', 128]."""
        return (2 * self.kv_heads(spec), self.lanes(spec))

    def grid_step(self, spec: AttentionSpec) -> GridStep:
        """Heads are taken a few at a time where they divide."""
        return replace(super().grid_step(spec), kv_heads=self._kv_heads_per_step(spec))

    def _features(self, spec: AttentionSpec) -> Iterator[Refusal]:
        yield from super()._features(spec)
        if spec.kind == "decoder" and not spec.causal:
            yield Refusal("causal", False, "the kernel is causal only", _with_tpu_inference())
        for name in ("head_size", "value_head_size"):
            size = getattr(spec, name)
            if size > LANES and (name == "head_size" or size != spec.head_size):
                accepts = f"the kernel's heads have {LANES} elements (smaller ones are padded)"
                yield Refusal(name, size, accepts, _with_tpu_inference())
        if spec.sinks:
            yield Refusal("sinks", True, "the kernel's softmax has no sink", _with_tpu_inference("for head_size=64 "))


class Fused(Kernel):
    """tpu-inference's v3."""

    name = "fused"
    cache_types = ("bfloat16", "float32", "float8_e4m3fn", "float8_e5m2")

    def kv_heads(self, spec: AttentionSpec) -> int:
        """2K' rows fill whole words."""
        heads = spec.num_kv_heads
        while 2 * heads % packing(spec.kv_cache_dtype):
            heads += 1
        return heads

    def _features(self, spec: AttentionSpec) -> Iterator[Refusal]:
        yield from super()._features(spec)
        if spec.sinks:
            yield Refusal("sinks", True, "the kernel's softmax has a sink for head_size=64 only")
        if spec.kind == "decoder" and not spec.causal and spec.has_window:
            yield Refusal("window", spec.window, "without causality the kernel has no window")
        if spec.dtype == "float32" and spec.kv_cache_dtype.startswith("float8"):
            accepts = "Mosaic does not multiply float32 queries with the kernel's float8 keys"
            yield Refusal("kv_cache_dtype", spec.kv_cache_dtype, accepts, "Ask for dtype bfloat16")
        packed = packing(spec.kv_cache_dtype)
        if spec.block_size % packed:
            accepts = f"the kernel's pages of {spec.kv_cache_dtype} hold a multiple of {packed} tokens"
            yield Refusal("block_size", spec.block_size, accepts, "Ask for 16 or 32")


class Fused64(Fused):
    """tpu-inference's kernel for heads of 64 elements: a key and its value share a row of 128.

    It always writes: of a layer that reads another's cache it writes each row's own key and value, as they are there.
    """

    name = "fused64"

    def kv_heads(self, spec: AttentionSpec) -> int:
        """K' rows fill whole words."""
        return align(spec.num_kv_heads, packing(spec.kv_cache_dtype))

    def lanes(self, spec: AttentionSpec) -> int:
        """Heads are not padded."""
        return 64

    def tail(self, spec: AttentionSpec) -> tuple[int, ...]:
        """[K' / packed, packed, 128]."""
        packed = packing(spec.kv_cache_dtype)
        return (self.kv_heads(spec) // packed, packed, 2 * self.lanes(spec))

    def grid_step(self, spec: AttentionSpec) -> GridStep:
        """Queries and outputs are 128 wide, pages 128 for both."""
        return replace(super().grid_step(spec), lanes=LANES)

    def _features(self, spec: AttentionSpec) -> Iterator[Refusal]:
        for refusal in super()._features(spec):
            if refusal.field != "sinks":
                yield refusal
        if spec.kind == "decoder" and not spec.causal:
            yield Refusal("causal", False, "the kernel is causal only")
        for name in ("head_size", "value_head_size"):
            if getattr(spec, name) != 64:
                yield Refusal(name, getattr(spec, name), "the kernel's heads have 64 elements")
        if spec.sinks and spec.group_size % packing(spec.dtype):
            accepts = f"with sinks the kernel takes groups of a multiple of {packing(spec.dtype)} query heads"
            yield Refusal("num_heads", spec.num_heads, accepts)


KERNELS: tuple[Kernel, ...] = (Fused64(), Fused(), Ragged())
"""In order of preference."""


def choose_kernel(spec: AttentionSpec, fused: bool = True) -> tuple[Kernel | None, tuple[Refusal, ...]]:
    """Return the kernel that runs a spec, or None and why the one that is always there does not.

    Args:
        spec: the layer.
        fused: whether fused kernels may be chosen.
    """
    refusals: tuple[Refusal, ...] = ()
    for kernel in KERNELS:
        if kernel.installed() and (fused or not kernel.fused):
            refusals = tuple(kernel.refusals(spec))
            if not refusals:
                return kernel, ()
    return None, refusals


@cache
def kernel_named(name: str) -> Kernel:
    """Return a kernel by its name."""
    return next(kernel for kernel in KERNELS if kernel.name == name)


def _whole_tiles(rows: int, packed: int) -> bool:
    words, rest = divmod(rows, packed)
    return not rest and (words in (1, 2, 4, 8) or words % 8 == 0)


@cache
def has_tpu_inference() -> bool:
    """Whether tpu-inference is installed, in a version whose kernels have run here (it is not imported)."""
    return Packages().version("tpu-inference").startswith(f"{TPU_INFERENCE}.")


def _with_tpu_inference(what: str = "") -> str:
    if has_tpu_inference():
        return ""
    return f"tpu-inference's kernel {what}can: pip install --no-deps 'tpu-inference=={TPU_INFERENCE}.*'"
