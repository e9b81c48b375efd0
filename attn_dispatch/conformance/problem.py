"""A case made concrete: numbers of unit variance, permuted blocks, a batch, and what must come out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from attn_dispatch.conformance.case import Case
from attn_dispatch.contract import AttentionMetadata, AttentionSpec, BatchView, LayerParameters
from attn_dispatch.contract.dtypes import numpy_dtype

__all__ = ["Arrays", "Problem", "Reading", "Step", "make_problem"]

Arrays = npt.NDArray[Any]
Attend = Callable[[AttentionSpec, Arrays, Arrays, Arrays, LayerParameters], tuple[Arrays, Arrays]]

_ATTENDED = 2048  # a longer context is written without attending to it: that is quadratic
_WATCHED_WHOLE = 4096  # a larger cache is compared where the step may write, and in some blocks beside


@dataclass(frozen=True)
class Step:
    """A batch with its new keys [rows, K, D] and values [rows, K, Dv]."""

    batch: AttentionMetadata
    k: Arrays
    v: Arrays


@dataclass(frozen=True)
class Reading:
    """What a computation reads.

    Attributes:
        spec: the layer as it is computed.
        layer: its slopes, sinks and scales.
        q: [T, H, D].
        keys: per sequence, f64[length, K, D]; values likewise, f64[length, K, Dv].
        after: changes a sequence's (out [n, H, Dv], lse [n, H]) once more.
    """

    spec: AttentionSpec
    layer: LayerParameters
    q: Arrays
    keys: list[Arrays]
    values: list[Arrays]
    after: Callable[[Arrays, Arrays], tuple[Arrays, Arrays]] = lambda out, lse: (out, lse)

    def solve(self, view: BatchView, s: int, attend: Attend) -> tuple[Arrays, Arrays]:
        """Return sequence `s`'s (out [n, H, Dv], lse [n, H]) by a function of one sequence."""
        q = self.q[slice(*view.query_start_loc[s : s + 2])].astype(np.float64)
        return self.after(*attend(self.spec, q, self.keys[s], self.values[s], self.layer))


@dataclass(frozen=True)
class Problem:
    """Inputs of one case. Arrays are NumPy, of the spec's dtype.

    Attributes:
        case: that it was made of.
        num_blocks: the cache's size; some blocks belong to nobody.
        watched: i64, blocks whose contents are compared, ascending.
        before: steps that fill the cache.
        batch: the step that is checked.
        q: [T, H, D].
        k: [rows, K, D] and v [rows, K, Dv]; None when the step brings none.
        keys: per sequence, all its keys, [length, K, D]; values likewise.
        parameters: the layer's slopes, sinks and scales, as `ad.attention` takes them.
    """

    case: Case
    num_blocks: int
    watched: npt.NDArray[np.int64]
    before: tuple[Step, ...]
    batch: AttentionMetadata
    q: Arrays
    k: Arrays | None
    v: Arrays | None
    keys: list[Arrays]
    values: list[Arrays]
    parameters: dict[str, Any]

    @property
    def spec(self) -> AttentionSpec:
        """The layer."""
        return self.case.spec

    @property
    def view(self) -> BatchView:
        """The step's batch as the layer sees it."""
        return self.batch.view(self.spec.kind)

    def reading(self, keys: list[Arrays], values: list[Arrays]) -> Reading:
        """Return what is read of these stored keys and values (f64, longer than is read in this step at most)."""
        lens = [int(n) for n in self.view.kv_lens]
        keys, values = ([x[:n] for x, n in zip(side, lens, strict=True)] for side in (keys, values))
        return Reading(self.spec, LayerParameters(self.spec, **self.parameters), self.q, keys, values)


def make_problem(case: Case, seed: int = 0) -> Problem:
    """Make a case concrete; the same seed gives the same problem."""
    # The name takes part, so that no two cases share their numbers.
    rng = np.random.default_rng([seed, *case.name.encode()])
    spec = case.spec
    dtype = numpy_dtype(spec.dtype)

    def normal(*shape: int) -> Arrays:
        return rng.standard_normal(shape).astype(dtype)

    lengths = [c + n for c, n in zip(case.context, case.new, strict=True)]
    stored = list(case.encoder) if case.encoder is not None else lengths
    tables, num_blocks = _tables(rng, case, stored)
    keys = [normal(n, spec.num_kv_heads, spec.head_size) for n in stored]
    values = [normal(n, spec.num_kv_heads, spec.value_head_size) for n in stored]
    _share_prefix(case, tables, keys, values)
    if case.shift:
        for key in keys:
            key[..., 0] = 8.0
    arguments: dict[str, Any] = {
        "query_lens": [*case.new, *([case.padding] if case.padding else [])],
        "seq_lens": [*lengths, *([0] if case.padding else [])],
        "block_size": spec.block_size,
    }
    in_cache = [0] * len(stored)
    if spec.kind == "cross":
        in_cache = [e if c else 0 for e, c in zip(stored, case.context, strict=True)]
        arguments |= {
            "encoder_seq_lens": stored,
            "encoder_query_lens": [e - c for e, c in zip(stored, in_cache, strict=True)],
            "encoder_block_tables": tables,
            # The decoder's own blocks are of no concern to a cross layer, but the batch has them.
            "block_tables": _tables(rng, case, lengths)[0],
        }
    elif spec.kind == "decoder":
        arguments["block_tables"] = [*tables, *([[]] if case.padding else [])]
        in_cache = lengths if not spec.writes_kv else list(case.context)
    batch = AttentionMetadata.build(**arguments)
    pad = [normal(case.padding, spec.num_kv_heads, n) for n in (spec.head_size, spec.value_head_size)]
    k = np.concatenate([*(x[c:] for x, c in zip(keys, in_cache, strict=True)), pad[0]])
    v = np.concatenate([*(x[c:] for x, c in zip(values, in_cache, strict=True)), pad[1]])
    if case.skipped_slots:
        skipped = np.arange(batch.num_tokens) % 3 == 1
        batch = AttentionMetadata.build(**arguments, slot_mapping=np.where(skipped, -1, batch.slot_mapping))
        # Those tokens are in the cache; what the step brings for them is wrong and must not get there.
        k[skipped] = normal(*k[skipped].shape)
        v[skipped] = normal(*v[skipped].shape)
        in_cache = lengths
    brings = spec.writes_kv and (len(k) > 0 or spec.kind != "cross")
    q = (case.magnitude * normal(batch.view(spec.kind).num_tokens, spec.num_heads, spec.head_size)).astype(dtype)
    if case.shift:
        q[..., 0] = case.shift / (8.0 * spec.scale)
    return Problem(
        case=case,
        num_blocks=num_blocks,
        watched=_watched(num_blocks, tables),
        before=tuple(_filling(case, tables, keys, values, in_cache)),
        batch=batch,
        q=q,
        k=k if brings else None,
        v=v if brings else None,
        keys=[*keys, *([pad[0][:0]] if case.padding else [])],
        values=[*values, *([pad[1][:0]] if case.padding else [])],
        parameters=_parameters(case, rng),
    )


def _tables(rng: np.random.Generator, case: Case, lengths: list[int]) -> tuple[list[list[int]], int]:
    """Return block tables in an order that no kernel can guess, and a cache size with blocks that nobody owns."""
    counts = [-(-n // case.spec.block_size) for n in lengths]
    ids = (case.first_block + rng.permutation(sum(counts) + 3)).tolist()
    tables = [[ids.pop() for _ in range(n)] for n in counts]
    return tables, case.first_block + sum(counts) + 3


def _watched(num_blocks: int, tables: list[list[int]]) -> npt.NDArray[np.int64]:
    if num_blocks <= _WATCHED_WHOLE:
        return np.arange(num_blocks)
    used = np.array([block for table in tables for block in table])
    # The first blocks too: that is where an id lands of which the upper bits are lost.
    others = np.concatenate([np.arange(64), used & 0xFFFF, used & 0x7FFF, np.arange(num_blocks - 3, num_blocks)])
    return np.unique(np.concatenate([used, others]))


def _share_prefix(case: Case, tables: list[list[int]], keys: list[Arrays], values: list[Arrays]) -> None:
    """Let every sequence begin as the first does, in the same blocks."""
    if not case.shared:
        return
    size = case.spec.block_size
    whole = case.shared // size
    for s in range(1, len(tables)):
        blocks = whole
        if s == 1 and not case.spec.writes_kv and case.shared % size:
            blocks += 1  # the first sequence ends in this block, the second goes on in it
        tokens = case.shared if blocks > whole else whole * size
        tables[s][:blocks] = tables[0][:blocks]
        keys[s][:tokens] = keys[0][:tokens]
        values[s][:tokens] = values[0][:tokens]


def _filling(
    case: Case, tables: list[list[int]], keys: list[Arrays], values: list[Arrays], before: list[int]
) -> list[Step]:
    """Return the steps that write what the cache holds beforehand: the first `before` tokens of each sequence."""
    if not sum(before):
        return []
    if not case.shared:
        return [_fill(case, tables, keys, values, before, [0] * len(before))]
    # A shared prefix is the first sequence's; the others skip what they find in it.
    only = [before[0], *([0] * (len(before) - 1))]
    size = case.spec.block_size
    prefix = [case.shared // size * size] * len(before)
    if not case.spec.writes_kv and len(before) > 1:
        prefix[1] = case.shared
    skipped = [n if s == 0 else min(n, prefix[s]) for s, n in enumerate(before)]
    steps = [_fill(case, tables, keys, values, only, [0] * len(before))]
    # One by one: a sequence that is written must not share the block with another of the batch.
    for s in range(1, len(before)):
        alone = [n if i == s else 0 for i, n in enumerate(before)]
        steps.append(_fill(case, tables, keys, values, alone, skipped))
    return steps


def _fill(
    case: Case,
    tables: list[list[int]],
    keys: list[Arrays],
    values: list[Arrays],
    before: list[int],
    skipped: list[int],
) -> Step:
    """Return the step that writes tokens `skipped` up to `before` of each sequence (none of those with 0)."""
    size = case.spec.block_size
    if case.spec.kind == "cross":
        batch = AttentionMetadata.build(
            query_lens=[0] * len(before),
            seq_lens=[0] * len(before),
            block_tables=[[]] * len(before),
            block_size=size,
            encoder_seq_lens=before,
            encoder_block_tables=tables,
        )
    else:
        new = [n - skip if n else 0 for n, skip in zip(before, skipped, strict=True)]
        batch = AttentionMetadata.build(query_lens=new, seq_lens=before, block_tables=tables, block_size=size)
        if max(new) > _ATTENDED:
            batch = AttentionMetadata.write_only(batch.own)
    pairs = list(zip(before, skipped, strict=True))
    k = np.concatenate([x[skip if n else 0 : n] for x, (n, skip) in zip(keys, pairs, strict=True)])
    v = np.concatenate([x[skip if n else 0 : n] for x, (n, skip) in zip(values, pairs, strict=True)])
    return Step(batch, k, v)


def _parameters(case: Case, rng: np.random.Generator) -> dict[str, Any]:
    spec = case.spec
    parameters: dict[str, Any] = {"k_scale": case.scales[0], "v_scale": case.scales[1]}
    if spec.alibi:
        # No model's own: a backend that knows the usual slopes must still take the layer's.
        parameters["alibi_slopes"] = (2.0 ** -rng.uniform(1, 8, spec.num_heads)).astype(np.float32)
    if spec.sinks:
        parameters["sinks"] = (1 + case.sink + rng.standard_normal(spec.num_heads)).astype(np.float32)
    return parameters
