"""Caches and calls that must be rejected before anything is written, with an error that names what is wrong.

(`bad_batches` has those that never reach a backend.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from attn_dispatch.attention import Attention, attention
from attn_dispatch.backend import Backend, Plan
from attn_dispatch.conformance.adaptation import plain_spec
from attn_dispatch.conformance.bad_batches import expect_error
from attn_dispatch.conformance.compute import any_array, contents, to_backend, to_host
from attn_dispatch.conformance.findings import ConformanceError, NotRun
from attn_dispatch.contract import Array, AttentionMetadata, KVCache
from attn_dispatch.contract.arrays import device_of, library_of
from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.dispatch import verdict_of
from attn_dispatch.reference import ReferenceBackend

__all__ = ["REJECTIONS", "check_rejection"]


class Scene:
    """A layer of the backend with a cache of four blocks and a step of two sequences, all of it correct."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.spec = plain_spec(backend)
        self.attn = attention(self.spec, backend)
        self.cache = self.attn.allocate(4)
        self.before = contents(self.cache)

    @cached_property
    def words(self) -> dict[str, object]:
        """What messages are expected to say of this layer."""
        other = self.other_dtype
        return {"D": self.spec.head_size, "B": self.spec.block_size, "dtype": self.spec.dtype, "other": other}

    @property
    def other_dtype(self) -> str:
        """A dtype that is not the layer's."""
        return "float16" if self.spec.dtype != "float16" else "float32"

    def host(self, name: str) -> Any:
        """Return q, k or v on the host."""
        heads = self.spec.num_heads if name == "q" else self.spec.num_kv_heads
        rng = np.random.default_rng(ord(name))
        return rng.standard_normal((3, heads, self.spec.head_size)).astype(numpy_dtype(self.spec.dtype))

    def array(self, name: str) -> Array:
        """Return q, k or v in the backend's library."""
        return to_backend(self.host(name), any_array(self.backend, self.cache))

    def plan(self, block_tables: list[list[int]] | None = None) -> Plan:
        """Return the step's plan: a decode whose sequence has two blocks, and a prefill of two tokens."""
        return self.attn.plan(self.batch(block_tables))

    def batch(self, block_tables: list[list[int]] | None = None) -> AttentionMetadata:
        """Return the step's batch."""
        size = self.spec.block_size
        return AttentionMetadata.build([1, 2], [size + 8, 2], block_tables or [[2, 0], [3]], size)

    def run(self, **changes: Any) -> Any:
        """Run the step with some arguments replaced."""
        arguments = {name: self.array(name) for name in "qkv"} | {"cache": self.cache, "out": None} | changes
        plan = arguments.pop("plan", None) or self.plan(arguments.pop("block_tables", None))
        return self.attn.run(plan, **arguments)

    def run_host(self, **changes: Any) -> Any:
        """Run the step with NumPy arrays, some arguments replaced."""
        return self.run(**({name: self.host(name) for name in "qkv"} | changes))

    def out(self) -> Any:
        """Return a host array that a result fits into."""
        return np.zeros((3, self.spec.num_heads, self.spec.value_head_size), numpy_dtype(self.spec.dtype))

    def other_layer(self, **fields: Any) -> Attention:
        """Return a layer of another spec.

        Raises:
            NotRun: the backend does not take it.
        """
        spec = replace(self.spec, **fields)
        if not verdict_of(self.backend, spec):
            raise NotRun(f"the backend does not take {fields}")
        return attention(spec, self.backend)

    def torch(self) -> Any:
        """Return torch, if it is installed and results can be computed from its tensors here.

        Raises:
            NotRun: it is not.
        """
        if find_spec("torch") is None:
            raise NotRun("torch is not installed")
        if device_of(any_array(self.backend, self.cache)) != "cpu":
            raise NotRun("the backend computes on a device")
        return import_module("torch")

    def tensor(self, name: str) -> Any:
        """Return q, k or v as a tensor on the CPU."""
        torch = self.torch()
        return torch.from_numpy(self.host(name).astype(np.float32)).to(getattr(torch, self.spec.dtype))


def _read_only(array: Any) -> Any:
    array.flags.writeable = False
    return array


def _read_only_cache(scene: Scene) -> KVCache:
    if any(library_of(array) != "numpy" for array in scene.cache.arrays.values()):
        raise NotRun("only NumPy has arrays that cannot be written")
    cache = scene.attn.allocate(4)
    for array in cache.arrays.values():
        array.flags.writeable = False
    return cache


def _overlapping(scene: Scene) -> Any:
    q = scene.host("q")
    return scene.run_host(q=q, out=q[..., : scene.spec.value_head_size])


def _broadcast_out(scene: Scene) -> Any:
    row = np.zeros((1, scene.spec.num_heads, scene.spec.value_head_size), numpy_dtype(scene.spec.dtype))
    return np.lib.stride_tricks.as_strided(row, (3, *row.shape[1:]), (0, *row.strides[1:]))


def _cache_by_hand(scene: Scene, change: Callable[[dict[str, Array], KVCache], None], num_blocks: int = 4) -> KVCache:
    cache = scene.cache
    arrays = dict(cache.arrays)
    change(arrays, cache)
    return KVCache(cache.owner, cache.geometry, cache.layout, num_blocks, arrays, cache.device)


def _halve(arrays: dict[str, Array], cache: KVCache) -> None:
    arrays.update({name: array[:1] for name, array in arrays.items()})


def _retype(arrays: dict[str, Array], cache: KVCache) -> None:
    other = numpy_dtype("float16" if cache.geometry.dtype != "float16" else "float32")
    arrays.update({name: np.zeros(tuple(array.shape), other) for name, array in arrays.items()})


def _fake_tensor(scene: Scene) -> Any:
    with scene.torch()._subclasses.FakeTensorMode() as mode:
        return mode.from_tensor(scene.tensor("q"))


def _other_plan(scene: Scene) -> Plan:
    return attention(scene.spec, ReferenceBackend("another")).plan(scene.batch())


@dataclass(frozen=True)
class Rejection:
    """An attempt that must be refused, with words that the error must have ({D}, {B}, {dtype}: the layer's)."""

    attempt: Callable[[Scene], object]
    words: tuple[str, ...]


REJECTIONS: Mapping[str, Rejection] = {
    "a block one past the end": Rejection(
        lambda s: s.run(block_tables=[[2, 4], [3]]), ("sequence 0", "block 4", "4 blocks")
    ),
    "a block far outside": Rejection(
        lambda s: s.run(block_tables=[[2, 0], [1_000_000]]), ("sequence 1", "1000000", "4 blocks")
    ),
    "q of another head count": Rejection(lambda s: s.run(q=s.array("q")[:, :3]), ("q", "(3, 3, {D})", "(3, 4, {D})")),
    "q of too few tokens": Rejection(lambda s: s.run(q=s.array("q")[:2]), ("q", "(2, 4, {D})")),
    "k of another head size": Rejection(lambda s: s.run(k=s.array("k")[..., :32]), ("k", "32")),
    "v of too many tokens": Rejection(
        lambda s: s.run_host(v=np.concatenate([s.host("v"), s.host("v")])), ("v", "6")
    ),
    "q of another type": Rejection(
        lambda s: s.run_host(q=s.host("q").astype(numpy_dtype(s.other_dtype))), ("q", "{other}", "{dtype}")
    ),
    "k missing": Rejection(lambda s: s.run(k=None), ("k and v",)),
    "k and v missing": Rejection(lambda s: s.run(k=None, v=None), ("writes 3 tokens",)),
    "arrays of two libraries": Rejection(lambda s: s.run_host(k=s.tensor("k")), ("k", "torch", "numpy")),
    "a cache of other heads": Rejection(
        lambda s: s.run(cache=s.other_layer(num_kv_heads=4).allocate(4)), ("cache", "num_kv_heads=2")
    ),
    "a cache of other blocks": Rejection(
        lambda s: s.run(cache=s.other_layer(block_size=2 * s.spec.block_size).allocate(4)), ("cache", "block_size={B}")
    ),
    "a batch of other blocks": Rejection(
        lambda s: s.attn.plan(AttentionMetadata.build([1], [3], [[0]], 2 * s.spec.block_size)), ("block_size", "{B}")
    ),
    "a plan of another layer": Rejection(
        lambda s: s.run(plan=s.other_layer(scale=0.5).plan(s.batch())), ("plan", "scale=0.5")
    ),
    "a plan of another backend": Rejection(lambda s: s.run(plan=_other_plan(s)), ("plan", "{backend}")),
    "no cache": Rejection(lambda s: s.run(cache=None), ("cache",)),
    "an LSE that the layer does not return": Rejection(
        lambda s: _unwilling(s).run(return_lse=True), ("return_lse",)
    ),
    "out that is read-only": Rejection(lambda s: s.run_host(out=_read_only(s.out())), ("out", "read-only")),
    "a read-only cache": Rejection(lambda s: s.run(cache=_read_only_cache(s)), ("cache", "read-only")),
    "out that overlaps q": Rejection(_overlapping, ("out", "overlap")),
    "out whose rows overlap": Rejection(lambda s: s.run_host(out=_broadcast_out(s)), ("out", "overlap")),
    "out of another shape": Rejection(lambda s: s.run_host(out=s.out()[:2]), ("out", "(2, 4, {D})")),
    "out on another device": Rejection(
        lambda s: s.run(**{n: s.tensor(n) for n in "qkv"}, out=s.tensor("q").to("meta")), ("out", "meta")
    ),
    "big-endian q": Rejection(
        lambda s: s.run_host(q=_big_endian(s)), ("q", "byte order")
    ),
    "q that is a subclass of NumPy's array": Rejection(
        lambda s: s.run_host(q=np.ma.masked_array(s.host("q"), mask=True)), ("q", "Masked")
    ),
    "a conjugate or negative view of q": Rejection(
        lambda s: s.run(**{n: s.tensor(n) for n in "kv"}, q=s.torch()._neg_view(s.tensor("q"))), ("q", "view")
    ),
    "a FakeTensor": Rejection(
        lambda s: s.run(**{n: s.tensor(n) for n in "kv"}, q=_fake_tensor(s)), ("q", "FakeTensor")
    ),
    "a cache made by hand of too few blocks": Rejection(
        lambda s: _cache_by_hand(s, _halve), ("cache", "4")
    ),
    "a cache made by hand of another type": Rejection(
        lambda s: _cache_by_hand(s, _retype), ("cache", "{dtype}")
    ),
    "a cache larger than any memory": Rejection(lambda s: s.attn.allocate(10**12), ("1000000000000",)),
    "a device that does not exist": Rejection(lambda s: s.attn.allocate(1, "nonsense:7"), ("nonsense:7",)),
    "sinks of infinity": Rejection(
        lambda s: attention(
            replace(s.spec, sinks=True), s.backend, sinks=np.full(s.spec.num_heads, np.inf, np.float32)
        ),
        ("sinks", "infinity"),
    ),
}  # fmt: skip


def _unwilling(scene: Scene) -> Scene:
    if verdict_of(scene.backend, replace(scene.spec, returns_lse=True)):
        raise NotRun("the backend returns an LSE whenever it is asked")
    return scene


def _big_endian(scene: Scene) -> Any:
    q = scene.host("q")
    if q.dtype.isnative and q.dtype.kind == "f":
        return q.astype(q.dtype.newbyteorder(">"))
    raise NotRun(f"{q.dtype} has no byte order")


def check_rejection(backend: Backend, name: str) -> None:
    """Check that an attempt is refused with the words that help, and that the cache is as it was.

    Raises:
        ConformanceError: it is not refused, or something was written.
        Refused: the backend takes no plain layer.
        NotRun: the attempt cannot be made on this machine.
    """
    scene = Scene(backend)
    rejection = REJECTIONS[name]
    values = scene.words | {"backend": backend.name}
    words = tuple(word.format(**values) for word in rejection.words)

    def attempt() -> None:
        rejection.attempt(scene)

    try:
        expect_error(name, words, attempt)
    except ConformanceError as error:
        # What the attempt itself could not make is no fault of the backend.
        if isinstance(error.__cause__, NotRun):
            raise error.__cause__ from None
        raise
    if any(not np.array_equal(a, b) for a, b in zip(scene.before, map(to_host, contents(scene.cache)), strict=True)):
        raise ConformanceError(f"clause 10: {name} was refused, but the cache was written to before")
