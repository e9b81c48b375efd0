"""What the compile check compiles: specs that a kernel's verdict accepts, each with a batch, and what it refuses.

The accepted rows go once through every field: types, head sizes, block sizes, head counts, features, and batches at the
edges of what a plan lets through. The refused ones leave away exactly what the verdict insists on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from attn_dispatch.contract import AttentionMetadata, AttentionSpec
from attn_dispatch_tpu.kernels import KERNELS, Kernel, kernel_named
from attn_dispatch_tpu.options import ProgramOptions, program_options
from attn_dispatch_tpu.planning import pack
from attn_dispatch_tpu.tiles import SMEM_BYTES, align, table_bytes

__all__ = ["Row", "program", "rows", "verdict"]

MIXED = ((1, 1, 30, 32), (300, 400, 30, 512))
DECODE = ((1,) * 8, (500, 1, 64, 300, 31, 32, 33, 512))
PREFILL = ((2048,), (2048,))
LONG = ((1,), (131_072,))


@dataclass(frozen=True)
class Row:
    """One thing to compile.

    Attributes:
        name: unique for its kernel.
        spec: the layer.
        query_lens: of the batch.
        seq_lens: of the batch.
        sequences: when given, the block table has so many rows and `pages_per_seq` columns, whatever the batch.
        pages_per_seq: see sequences.
        scaled: with scales that are not 1.
        padded: False: as it would be if nothing were padded.
        brief: takes part in the short run.
        supported: the verdict must say yes, and the compiler; else both no.
        kernel: its name.
    """

    name: str
    spec: AttentionSpec
    query_lens: tuple[int, ...] = MIXED[0]
    seq_lens: tuple[int, ...] = MIXED[1]
    sequences: int = 0
    pages_per_seq: int = 0
    scaled: bool = False
    padded: bool = True
    brief: bool = False
    supported: bool = True
    kernel: str = "ragged"

    @property
    def title(self) -> str:
        """Its name and its kernel's."""
        return self.name if self.kernel == "ragged" else f"{self.kernel}: {self.name}"


def rows() -> Iterator[Row]:
    """Yield every row of every kernel that is installed."""
    rows_of = {"ragged": _ragged, "fused": _fused, "fused64": _fused64}
    for kernel in reversed(KERNELS):
        if kernel.installed():
            for row in rows_of[kernel.name]():
                yield replace(row, kernel=kernel.name)


def _spec(**fields: Any) -> AttentionSpec:
    plain: dict[str, Any] = {"num_heads": 8, "num_kv_heads": 2, "head_size": 128, "dtype": "bfloat16"}
    return AttentionSpec(**(plain | fields))


def _no(name: str, spec: AttentionSpec, **fields: Any) -> Row:
    return Row(name, spec, supported=False, **fields)


def _types(pairs: tuple[tuple[str, str], ...], **fields: Any) -> Iterator[Row]:
    for dtype, stored in pairs:
        name = f"{dtype}, {stored} cache" if stored != dtype else dtype
        brief = stored in (dtype, "float8_e4m3fn", "int8")
        yield Row(name, _spec(dtype=dtype, kv_cache_dtype=stored, **fields), brief=brief)


def _batches(**fields: Any) -> Iterator[Row]:
    for name, (query_lens, seq_lens) in {"decode": DECODE, "prefill of 2048": PREFILL, "131072 keys": LONG}.items():
        for dtype in ("bfloat16", "float32"):
            yield Row(f"{name} {dtype}", _spec(dtype=dtype, **fields), query_lens, seq_lens, brief=dtype == "bfloat16")
    yield Row("reads another's cache", _spec(writes_kv=False, **fields), brief=True)
    yield Row("padding sequence", _spec(**fields), (1, 3), (40, 0))
    yield Row("decode after prefill", _spec(**fields), (30, 1), (30, 40))


def _masks(**fields: Any) -> Iterator[Row]:
    yield Row("window", _spec(window=(127, 0), **fields))
    yield Row("window of 1", _spec(window=(0, 0), **fields))
    yield Row("soft-cap", _spec(logits_soft_cap=30.0, **fields))
    yield Row("window and soft-cap", _spec(window=(127, 0), logits_soft_cap=30.0, **fields), brief=True)


_FLOATS = (
    ("bfloat16", "bfloat16"),
    ("float32", "float32"),
    ("bfloat16", "float8_e4m3fn"),
    ("bfloat16", "float8_e5m2"),
    ("bfloat16", "float32"),
    ("float32", "bfloat16"),
)


def _ragged() -> Iterator[Row]:
    yield from _types((*_FLOATS, ("float32", "float8_e4m3fn"), ("bfloat16", "int8"), ("float32", "int8")))
    yield Row("heads 32/8", _spec(num_heads=32, num_kv_heads=8), brief=True)
    yield from _batches()
    yield from _masks()
    for size in (8, 33, 64, 80, 96, 112):
        yield Row(f"head size {size}", _spec(head_size=size), brief=size == 64)
    yield Row("head size 64 float32", _spec(head_size=64, dtype="float32"))
    yield Row("head sizes 64/128", _spec(head_size=64, value_head_size=128))
    for size in (1, 5, 8, 16, 17, 64, 128, 256, 512):
        yield Row(f"block size {size}", _spec(block_size=size), brief=size == 16)
    for size in (512, 1536):
        yield Row(f"block size {size}, heads 32/8", _spec(num_heads=32, num_kv_heads=8, block_size=size), brief=True)
    for size in (1, 256):
        yield Row(f"block size {size} float32", _spec(block_size=size, dtype="float32"))
    for heads, kv_heads in ((8, 1), (96, 1), (14, 2), (9, 3), (28, 4), (15, 5), (64, 8), (128, 8), (40, 10), (32, 32)):
        yield Row(f"heads {heads}/{kv_heads}", _spec(num_heads=heads, num_kv_heads=kv_heads), brief=kv_heads == 3)
    for heads, kv_heads in ((9, 3), (16, 16), (128, 8), (71, 1)):
        fields = {"num_heads": heads, "num_kv_heads": kv_heads, "dtype": "float32"}
        yield Row(f"heads {heads}/{kv_heads} float32", _spec(**fields), brief=heads == kv_heads)
    for heads, kv_heads in ((4, 1), (48, 24)):
        fields = {"num_heads": heads, "num_kv_heads": kv_heads, "kv_cache_dtype": "float8_e4m3fn"}
        yield Row(f"heads {heads}/{kv_heads} float8 cache", _spec(**fields), brief=kv_heads == 1)
    yield Row("scaled float8 cache", _spec(kv_cache_dtype="float8_e4m3fn"), scaled=True)
    yield Row("the largest block table", _spec(), sequences=1920, pages_per_seq=128, brief=True)

    yield _no("dtype float16", _spec(dtype="float16"), brief=True)
    yield _no("float16 cache", _spec(kv_cache_dtype="float16"), brief=True)
    for size in (192, 256):
        yield _no(f"head size {size}", _spec(head_size=size), brief=size == 256)
    yield _no("block size 4096, heads 8/8", _spec(num_kv_heads=8, block_size=4096), brief=True)
    yield _no("head size 64, not padded", _spec(head_size=64), padded=False, brief=True)
    for heads, kv_heads in ((9, 3), (40, 10)):
        fields = {"num_heads": heads, "num_kv_heads": kv_heads}
        yield _no(f"heads {heads}/{kv_heads}, not padded", _spec(**fields), padded=False, brief=kv_heads == 3)
    fields = {"num_heads": 16, "num_kv_heads": 16, "dtype": "float32"}
    yield _no("heads 16/16 float32, not padded", _spec(**fields), padded=False, brief=True)
    fields = {"num_heads": 4, "num_kv_heads": 1, "kv_cache_dtype": "float8_e4m3fn"}
    yield _no("heads 4/1 float8 cache, not padded", _spec(**fields), padded=False)
    yield _no("a block table too large", _spec(), sequences=2048, pages_per_seq=128, brief=True)


def _fused() -> Iterator[Row]:
    yield from _types(_FLOATS)
    yield Row("heads 32/8", _spec(num_heads=32, num_kv_heads=8))
    yield from _batches()
    yield from _masks()
    for size in (64, 80, 192, 256, 512):
        yield Row(f"head size {size}", _spec(head_size=size), brief=size == 256)
    yield Row("head size 256 float32", _spec(head_size=256, dtype="float32"))
    yield Row("head sizes 192/128", _spec(head_size=192, value_head_size=128))
    for size in (2, 8, 16, 64, 256):
        yield Row(f"block size {size}", _spec(block_size=size), brief=size == 16)
    yield Row("block size 1 float32", _spec(block_size=1, dtype="float32"))
    for heads, kv_heads in ((8, 1), (9, 3), (15, 5), (64, 8), (40, 10), (32, 32)):
        yield Row(f"heads {heads}/{kv_heads}", _spec(num_heads=heads, num_kv_heads=kv_heads), brief=kv_heads == 3)
    fields = {"num_heads": 4, "num_kv_heads": 1, "kv_cache_dtype": "float8_e4m3fn"}
    yield Row("heads 4/1 float8 cache", _spec(**fields))
    yield Row("not causal", _spec(causal=False), brief=True)

    yield _no("dtype float16", _spec(dtype="float16"), brief=True)
    yield _no("float16 cache", _spec(kv_cache_dtype="float16"), brief=True)
    yield _no("int8 cache", _spec(kv_cache_dtype="int8"), brief=True)
    yield _no("float32, float8_e4m3fn cache", _spec(dtype="float32", kv_cache_dtype="float8_e4m3fn"), brief=True)
    yield _no("block size 5", _spec(block_size=5), brief=True)


def _fused64() -> Iterator[Row]:
    small = {"head_size": 64}
    yield from _types(_FLOATS, head_size=64)
    yield Row("heads 32/8", _spec(num_heads=32, num_kv_heads=8, **small))
    yield from (row for row in _batches(head_size=64) if row.spec.writes_kv)
    yield from _masks(head_size=64)
    yield Row("sinks", _spec(sinks=True, **small), brief=True)
    yield Row("sinks and window", _spec(sinks=True, window=(127, 0), **small), brief=True)
    yield Row("sinks float32", _spec(sinks=True, dtype="float32", **small))
    for heads, kv_heads in ((8, 1), (9, 3), (64, 8)):
        yield Row(f"heads {heads}/{kv_heads}", _spec(num_heads=heads, num_kv_heads=kv_heads, **small))

    yield _no("int8 cache", _spec(kv_cache_dtype="int8", **small), brief=True)
    yield _no("head size 80", _spec(head_size=80), brief=True)
    yield _no("sinks, heads 9/3", _spec(num_heads=9, num_kv_heads=3, sinks=True, **small), brief=True)


def verdict(row: Row) -> bool:
    """Whether the backend would run a row: by its kernel's verdict, by what `plan` lets through, with its padding."""
    fits = not row.sequences or table_bytes(row.sequences, row.pages_per_seq) <= SMEM_BYTES
    return row.padded and fits and not any(kernel_named(row.kernel).refusals(row.spec))


def program(row: Row) -> tuple[ProgramOptions, tuple[int, ...]]:
    """Return what a row is compiled for on a TPU, and the axes of a page after its tokens."""
    spec, kernel = row.spec, kernel_named(row.kernel)
    counts = [max(1, -(-n // spec.block_size)) for n in row.seq_lens]
    starts = [sum(counts[:s]) for s in range(len(counts))]
    tables = [list(range(start, start + count)) for start, count in zip(starts, counts, strict=True)]
    batch = AttentionMetadata.build(row.query_lens, row.seq_lens, tables, spec.block_size)
    packed = pack(spec, batch.view("decoder"), fused=kernel.fused, token_floor=16).shape
    if row.sequences:
        packed = replace(packed, sequences=row.sequences, pages_per_seq=row.pages_per_seq)
    options = program_options(kernel, spec, packed)
    return (options, kernel.tail(spec)) if row.padded else _unpadded(kernel, spec, options)


def _unpadded(kernel: Kernel, spec: AttentionSpec, options: ProgramOptions) -> tuple[ProgramOptions, tuple[int, ...]]:
    heads, lanes = spec.num_kv_heads, align(spec.head_size, 8)
    options = replace(options, padded_kv_heads=heads, group=spec.group_size, lanes=lanes)
    return options, (2 * heads, lanes)
