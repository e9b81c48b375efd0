"""Which of AITER's kernels computes a spec on a target, and why the others do not. No vendor is imported.

By the sources of amd-aiter 0.1.7.post2.dev18. Three functions are called:

unified_attention        Triton, block tables over NHD pages: prefills and decodes, causal. The general one.
paged_attention_v1       HIP: one query per sequence. A faster decode for what it is compiled for.
mha_batch_prefill_func   Composable Kernel, told the slot of every key (pages of one token), so any page size; the one
                         that returns an LSE, looks ahead, and takes an encoder's rows.

Left alone: `pa_fwd_asm` divides by sqrt(head size) whatever the scale, and wants values as [N, K, B/x, D, x], which no
prefill of AITER reads; `paged_attention_ragged` is `paged_attention_v1` without its window; `pa_fwd_naive` is slow.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from attn_dispatch.backend import Refusal
from attn_dispatch.contract import AttentionSpec

from .machine import Machine
from .paged import ELSEWHERE, plain_refusals

__all__ = ["BATCH", "DECODE", "FUNCTIONS", "TARGETS", "UNIFIED", "Installed", "installed", "refusals", "serving"]

UNIFIED, DECODE, BATCH = "unified_attention", "paged_attention_v1", "mha_batch_prefill_func"

# fmt: off
FUNCTIONS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    UNIFIED: ("ops/triton/unified_attention.py", (
        "q", "k", "v", "out", "cu_seqlens_q", "max_seqlen_q", "seqused_k", "max_seqlen_k", "softmax_scale", "causal",
        "window_size", "block_table", "softcap", "q_descale", "k_descale", "v_descale", "alibi_slopes", "sinks",
    )),
    DECODE: ("ops/attention.py", (
        "out", "workspace_buffer", "query", "key_cache", "value_cache", "scale", "block_tables", "cu_query_lens",
        "context_lens", "max_context_len", "alibi_slopes", "kv_cache_dtype", "kv_cache_layout", "logits_soft_cap",
        "k_scale", "v_scale", "fp8_out_scale", "partition_size", "mtp", "sliding_window",
    )),
    BATCH: ("ops/mha.py", (
        "q", "k", "v", "cu_seqlens_q", "kv_indptr", "kv_page_indices", "max_seqlen_q", "max_seqlen_k", "dropout_p",
        "softmax_scale", "logits_soft_cap", "causal", "window_size", "alibi_slopes", "deterministic", "return_lse",
        "return_attn_probs", "out",
    )),
}
"""The file of each function in the package, and the parameters that it must have: newer releases change them."""
# fmt: on

_EXACT = (DECODE, BATCH)
"""Of these a parameter more is another function too: newer batch prefills are told pages, not slots."""

TARGETS: Mapping[str, tuple[str, ...]] = {
    UNIFIED: ("gfx90a", "gfx942", "gfx950"),
    DECODE: ("gfx90a", "gfx942", "gfx950"),
    BATCH: ("gfx90a", "gfx942", "gfx950"),
}
"""Compiled for gfx9 alone, two of them. For gfx1100 Triton's kernel compiles, with 450 to 2,000 registers spilled."""

_FP8_TARGETS = ("gfx942", "gfx950")
"""Targets for which Triton compiles the contract's fp8 (OCP's); gfx942's own is another, so it converts in software."""

_LARGEST_GROUP = 16
_LARGEST_PAGE = 64
"""A decode takes a page as a tile, and keeps several in LDS: with 128 it needs more than there is (compiled to see)."""


@dataclass(frozen=True)
class Installed:
    """An AITER that was found.

    Attributes:
        version: of the distribution.
        where: the package's folder.
        lacks: functions that it has not, or has with other parameters, and what was found.
    """

    version: str
    where: Path
    lacks: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"AITER {self.version}".strip()


def installed(machine: Machine) -> Installed | None:
    """Return the installed AITER, from files alone (`import aiter` fails where there is no ROCm)."""
    for folder in machine.locations("aiter"):
        if (folder / "ops").is_dir():
            lacks = {name: why for name in FUNCTIONS if (why := _mismatch(folder, name))}
            return Installed(machine.version("amd-aiter") or machine.version("aiter") or "", folder, lacks)
    return None


def _mismatch(folder: Path, name: str) -> str:
    """Say in which parameters an installed function differs from the one that calls are written for."""
    file, wanted = FUNCTIONS[name]
    try:
        parameters = _parameters(folder / file, name)
    except (OSError, SyntaxError, LookupError) as error:
        return f"{file}: {error}"
    missing = [p for p in wanted if p not in parameters]
    more = [p for p in parameters if p not in wanted] if name in _EXACT else []
    words = [f"lacks {', '.join(missing)}"] if missing else []
    words += [f"also takes {', '.join(more)}"] if more else []
    return " and ".join(words)


def _parameters(file: Path, name: str) -> list[str]:
    """Return the parameters of a function of a source file; of several of one name the last is what runs.

    Raises:
        LookupError: there is no such function.
    """
    body = ast.parse(file.read_text(encoding="utf-8")).body
    functions = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == name]
    if not functions:
        raise LookupError(f"{file.name} defines no {name}")
    arguments = functions[-1].args
    return [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def serving(one: Installed, target: str, spec: AttentionSpec) -> tuple[tuple[str, ...], list[Refusal]]:
    """Return the kernels that compute a spec on a target, the preferred one for any batch first; or none and why not.

    Why not is said of the kernel that is there for such layers. A decode kernel serves some batches only, and so never
    stands alone.
    """
    no = {name: refusals(one, name, target, spec) for name in (UNIFIED, BATCH)}
    general = [name for name, found in no.items() if not found]
    if not general:
        ahead = spec.kind != "decoder" or not spec.causal
        return (), no[BATCH if ahead or spec.returns_lse or spec.value_head_size != spec.head_size else UNIFIED]
    decodes = [] if refusals(one, DECODE, target, spec) else [DECODE]
    return (*general, *decodes), []


def refusals(one: Installed, name: str, target: str, spec: AttentionSpec) -> list[Refusal]:
    """Return why a kernel cannot compute a spec on a target; nothing when it can."""
    no = plain_refusals(spec, "AITER")
    if name in one.lacks:
        accepts = f"{one}'s {name} {one.lacks[name]}; calls are written for amd-aiter 0.1.7.post2.dev18"
        no.append(Refusal("", None, accepts, "pip install amd-aiter==0.1.7.post2.dev18"))
    if target not in TARGETS[name]:
        no.append(Refusal("", None, f"AITER's {name} is for {', '.join(TARGETS[name])}, this is {target}", ELSEWHERE))
    return no + {UNIFIED: _unified, DECODE: _decode, BATCH: _batch}[name](target, spec)


def _same_widths(spec: AttentionSpec, name: str) -> list[Refusal]:
    if spec.value_head_size == spec.head_size:
        return []
    accepts = f"AITER's {name} takes values as wide as keys, {spec.head_size}"
    return [Refusal("value_head_size", spec.value_head_size, accepts, ELSEWHERE)]


def _own_type(spec: AttentionSpec, name: str) -> list[Refusal]:
    if spec.kv_cache_dtype == spec.dtype:
        return []
    accepts = f"AITER's {name} reads a cache of the layer's own type, {spec.dtype}"
    return [Refusal("kv_cache_dtype", spec.kv_cache_dtype, accepts, f"Ask for {spec.dtype}")]


def _decoder_only(spec: AttentionSpec, name: str) -> list[Refusal]:
    no = []
    if spec.kind != "decoder":
        no.append(Refusal("kind", spec.kind, f"AITER's {name} is for decoder layers", ELSEWHERE))
    elif not spec.causal:
        no.append(Refusal("causal", False, f"AITER's {name} is causal only", ELSEWHERE))
    if spec.returns_lse:
        no.append(Refusal("returns_lse", True, f"AITER's {name} returns no log-sum-exp", ELSEWHERE))
    return no


def _unified(target: str, spec: AttentionSpec) -> list[Refusal]:
    no = _decoder_only(spec, UNIFIED) + _same_widths(spec, UNIFIED)
    stored, size = spec.kv_cache_dtype, spec.block_size
    if stored != spec.dtype:
        fp8 = stored in ("float8_e4m3fn", "float8_e5m2")
        if not (fp8 and target in _FP8_TARGETS):
            accepts = f"AITER's {UNIFIED} reads a cache of {spec.dtype}, and of fp8 on {' and '.join(_FP8_TARGETS)}"
            no.append(Refusal("kv_cache_dtype", stored, accepts, f"Ask for {spec.dtype}, or {ELSEWHERE[8:]}"))
    if size < 16 or size > _LARGEST_PAGE or size & (size - 1):
        accepts = f"AITER's {UNIFIED} takes a page as a tile: a power of two, 16 to {_LARGEST_PAGE}"
        no.append(Refusal("block_size", size, accepts, "Ask for block_size=16, 32 or 64"))
    if not 16 <= spec.head_size <= 256:
        accepts = f"AITER's {UNIFIED} is used with heads of 16 to 256"
        no.append(Refusal("head_size", spec.head_size, accepts, ELSEWHERE))
    if spec.group_size > 128:
        accepts = f"AITER's {UNIFIED} has tiles for at most 128 query heads of a key head"
        no.append(Refusal("num_kv_heads", spec.num_kv_heads, accepts, ELSEWHERE))
    if spec.alibi and spec.sinks:
        # It counts the bias from the first query of the step: the same for all keys of a row, but not for its sink.
        accepts = f"AITER's {UNIFIED} measures ALiBi so that it does not fit a sink"
        no.append(Refusal("sinks", True, accepts, ELSEWHERE))
    return no


def _decode(target: str, spec: AttentionSpec) -> list[Refusal]:
    """Sizes are those that AITER itself compiles ahead of time (aot/pa_v1.py)."""
    no = _decoder_only(spec, DECODE) + _same_widths(spec, DECODE) + _own_type(spec, DECODE)
    if spec.block_size not in (1, 16, 32):
        accepts = f"AITER's {DECODE} has pages of 1, 16 and 32"
        no.append(Refusal("block_size", spec.block_size, accepts, "Ask for block_size=16"))
    if spec.head_size not in (64, 128):
        no.append(Refusal("head_size", spec.head_size, f"AITER's {DECODE} has heads of 64 and 128", ELSEWHERE))
    if spec.group_size > _LARGEST_GROUP:
        accepts = f"AITER's {DECODE} has at most {_LARGEST_GROUP} query heads of a key head"
        no.append(Refusal("num_kv_heads", spec.num_kv_heads, accepts, ELSEWHERE))
    if spec.sinks:
        no.append(Refusal("sinks", True, f"AITER's {DECODE} has no sinks", ELSEWHERE))
    if spec.logits_soft_cap is not None and (spec.has_window or spec.alibi):
        accepts = f"AITER's {DECODE} caps logits after window and bias, the contract before"
        no.append(Refusal("logits_soft_cap", spec.logits_soft_cap, accepts, ELSEWHERE))
    return no


def _batch(target: str, spec: AttentionSpec) -> list[Refusal]:
    no = _own_type(spec, BATCH)
    for name in ("head_size", "value_head_size"):
        size = getattr(spec, name)
        if (size > 128 or size % 8) and (name == "head_size" or size != spec.head_size):
            accepts = f"AITER's {BATCH} has heads of at most 128, multiples of 8"
            no.append(Refusal(name, size, accepts, ELSEWHERE))
    if spec.alibi:
        accepts = f"AITER's {BATCH} hands slopes to its kernel in the place of a bias"
        no.append(Refusal("alibi", True, accepts, ELSEWHERE))

    return no
