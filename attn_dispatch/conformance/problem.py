"""A case made concrete: numbers of unit variance, permuted blocks, a batch, and what must come out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from attn_dispatch.conformance.cases import Case
from attn_dispatch.contract import AttentionMetadata, AttentionSpec, LayerParameters
from attn_dispatch.contract.dtypes import numpy_dtype

__all__ = ["Problem", "make_problem"]

Arrays = npt.NDArray[Any]
Attend = Callable[[AttentionSpec, Arrays, Arrays, Arrays, LayerParameters], tuple[Arrays, Arrays]]


@dataclass(frozen=True)
class Problem:
    """Inputs of one case. Arrays are NumPy, of the spec's dtype.

    Attributes:
        case: what it was made of.
        num_blocks: the cache's size; some blocks belong to nobody.
        context: the step that fills the cache before (None: nothing was there), with its keys and values.
        batch: the step that is checked.
        q: [T, H, D].
        k: [rows, K, D] and v [rows, K, Dv]; None when the step brings none.
        keys: per sequence, all its keys, [length, K, D]; values likewise.
        parameters: what the layer owns, as `ad.attention` takes it.
    """

    case: Case
    num_blocks: int
    context: tuple[AttentionMetadata, Arrays, Arrays] | None
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

    def solve(
        self, attend: Attend, spec: AttentionSpec, layer: LayerParameters, keys: list[Arrays], values: list[Arrays]
    ) -> tuple[Arrays, Arrays]:
        """Return (out [T, H, Dv], lse [T, H]) by a function of one sequence, for given stored keys and values."""
        view = self.batch.view(spec.kind)
        outs = [np.zeros((0, spec.num_heads, spec.value_head_size))]
        lses = [np.zeros((0, spec.num_heads))]
        for s in range(view.num_seqs):
            rows = self.q[slice(*view.query_start_loc[s : s + 2])].astype(np.float64)
            if len(rows):
                length = int(view.kv_lens[s])
                out, lse = attend(spec, rows, keys[s][:length], values[s][:length], layer)
                outs.append(out)
                lses.append(lse)
        return np.concatenate(outs), np.concatenate(lses)


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
    tables, num_blocks = _tables(rng, stored, spec.block_size)
    keys = [normal(n, spec.num_kv_heads, spec.head_size) for n in stored]
    values = [normal(n, spec.num_kv_heads, spec.value_head_size) for n in stored]
    new = [*case.new, *([case.padding] if case.padding else [])]
    totals = [*lengths, *([0] if case.padding else [])]
    empty: list[list[int]] = [[]] if case.padding else []
    arguments: dict[str, Any] = {"query_lens": new, "seq_lens": totals, "block_size": spec.block_size}
    in_cache = [0] * len(stored)
    if spec.kind == "cross":
        in_cache = [e if c else 0 for e, c in zip(stored, case.context, strict=True)]
        arguments |= {
            "encoder_seq_lens": stored,
            "encoder_query_lens": [e - c for e, c in zip(stored, in_cache, strict=True)],
            "encoder_block_tables": tables,
            # The decoder's own blocks are of no concern to a cross layer, but the batch has them.
            "block_tables": _tables(rng, lengths, spec.block_size)[0],
        }
    elif spec.kind == "decoder":
        arguments["block_tables"] = [*tables, *empty]
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
    return Problem(
        case=case,
        num_blocks=num_blocks,
        context=_context(case, tables, keys, values, in_cache),
        batch=batch,
        q=normal(batch.view(spec.kind).num_tokens, spec.num_heads, spec.head_size),
        k=k if brings else None,
        v=v if brings else None,
        keys=[*keys, *([pad[0][:0]] if case.padding else [])],
        values=[*values, *([pad[1][:0]] if case.padding else [])],
        parameters=_parameters(case, rng),
    )


def _tables(rng: np.random.Generator, lengths: list[int], block_size: int) -> tuple[list[list[int]], int]:
    """Return block tables in an order that no kernel can guess, and a cache size with blocks that nobody owns."""
    counts = [-(-n // block_size) for n in lengths]
    num_blocks = sum(counts) + 3
    ids = rng.permutation(num_blocks).tolist()
    tables = [[ids.pop() for _ in range(n)] for n in counts]
    return tables, num_blocks


def _context(
    case: Case,
    tables: list[list[int]],
    keys: list[Arrays],
    values: list[Arrays],
    before: list[int],
) -> tuple[AttentionMetadata, Arrays, Arrays] | None:
    """Return the step that writes what the cache holds beforehand: the first `before` tokens of each sequence."""
    if not sum(before):
        return None
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
        batch = AttentionMetadata.build(query_lens=before, seq_lens=before, block_tables=tables, block_size=size)
    k = np.concatenate([x[:n] for x, n in zip(keys, before, strict=True)])
    v = np.concatenate([x[:n] for x, n in zip(values, before, strict=True)])
    return batch, k, v


def _parameters(case: Case, rng: np.random.Generator) -> dict[str, Any]:
    spec = case.spec
    parameters: dict[str, Any] = {"k_scale": case.scales[0], "v_scale": case.scales[1]}
    if spec.alibi:
        parameters["alibi_slopes"] = (2.0 ** -(1 + np.arange(spec.num_heads) % 8)).astype(np.float32)
    if spec.sinks:
        parameters["sinks"] = (1 + rng.standard_normal(spec.num_heads)).astype(np.float32)
    return parameters
