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
from pathlib import Path

from attn_dispatch.adapters.environment import Packages
from attn_dispatch.backend import Refusal
from attn_dispatch.contract import AttentionSpec

from .backend import FALLBACK, FALLBACK_HINT, Installed, dtype_refusals

__all__ = ["BATCH", "DECODE", "SIGNATURES", "TARGETS", "UNIFIED", "find_installed", "kernels_for", "refusals_of"]

UNIFIED, DECODE, BATCH = "unified_attention", "paged_attention_v1", "mha_batch_prefill_func"

# fmt: off
SIGNATURES: Mapping[str, tuple[str, tuple[str, ...]]] = {
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

TARGETS = ("gfx90a", "gfx942", "gfx950")
"""Compiled for gfx9 alone, two of the three. For gfx1100 Triton's compiles, with 450 to 2,000 registers spilled."""

_FP8_TARGETS = ("gfx942", "gfx950")
"""Targets for which Triton compiles the contract's fp8 (OCP's); gfx942's own is another, so it converts in software."""

_LARGEST_GROUP = 16
_LARGEST_PAGE = 64
"""A decode takes a page as a tile, and keeps several in LDS: with 128 it needs more than there is (compiled to see)."""


def find_installed(packages: Packages) -> Installed | None:
    """Return the AITER among packages, from files alone, with its functions that differ from those called here."""
    for folder in packages.folders("aiter"):
        if (folder / "ops").is_dir():
            lacks = {name: difference for name in SIGNATURES if (difference := _mismatch(folder, name))}
            return Installed("AITER", packages.version("amd-aiter", "aiter"), folder, lacks)
    return None


def _mismatch(folder: Path, name: str) -> str:
    """Say in which parameters an installed function differs from the one that calls are written for."""
    file, wanted = SIGNATURES[name]
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


def kernels_for(package: Installed, target: str, spec: AttentionSpec) -> tuple[tuple[str, ...], list[Refusal]]:
    """Return the kernels that compute a spec on a target, the preferred one for any batch first; or none and why not.

    The reasons are those of the kernel that such layers are for. A decode kernel computes some batches only, and so
    never stands alone.
    """
    refusals = {name: refusals_of(package, name, target, spec) for name in (UNIFIED, BATCH)}
    general = [name for name, reasons in refusals.items() if not reasons]
    if not general:
        looks_ahead = spec.kind != "decoder" or not spec.causal
        other = looks_ahead or spec.returns_lse or spec.value_head_size != spec.head_size
        return (), refusals[BATCH if other else UNIFIED]
    decodes = [] if refusals_of(package, DECODE, target, spec) else [DECODE]
    return (*general, *decodes), []


def refusals_of(package: Installed, name: str, target: str, spec: AttentionSpec) -> list[Refusal]:
    """Return why a kernel cannot compute a spec on a target; nothing when it can."""
    reasons = dtype_refusals(spec, "AITER")
    if name in package.lacks:
        accepts = f"{package}'s {name} {package.lacks[name]}; calls are written for amd-aiter 0.1.7.post2.dev18"
        reasons.append(Refusal("", None, accepts, "pip install amd-aiter==0.1.7.post2.dev18"))
    if target not in TARGETS:
        accepts = f"AITER's {name} is for {', '.join(TARGETS)}, this is {target}"
        reasons.append(Refusal("", None, accepts, FALLBACK_HINT))
    if name == UNIFIED:
        return reasons + _unified(target, spec)
    return reasons + (_decode(spec) if name == DECODE else _batch(spec))


def _same_widths(spec: AttentionSpec, name: str) -> list[Refusal]:
    if spec.value_head_size == spec.head_size:
        return []
    accepts = f"AITER's {name} takes values as wide as keys, {spec.head_size}"
    return [Refusal("value_head_size", spec.value_head_size, accepts, FALLBACK_HINT)]


def _own_type(spec: AttentionSpec, name: str) -> list[Refusal]:
    if spec.kv_cache_dtype == spec.dtype:
        return []
    accepts = f"AITER's {name} reads a cache of the layer's own type, {spec.dtype}"
    return [Refusal("kv_cache_dtype", spec.kv_cache_dtype, accepts, f"Ask for {spec.dtype}")]


def _decoder_only(spec: AttentionSpec, name: str) -> list[Refusal]:
    reasons = []
    if spec.kind != "decoder":
        reasons.append(Refusal("kind", spec.kind, f"AITER's {name} is for decoder layers", FALLBACK_HINT))
    elif not spec.causal:
        reasons.append(Refusal("causal", False, f"AITER's {name} is causal only", FALLBACK_HINT))
    if spec.returns_lse:
        reasons.append(Refusal("returns_lse", True, f"AITER's {name} does not return LSE", FALLBACK_HINT))
    return reasons


def _unified(target: str, spec: AttentionSpec) -> list[Refusal]:
    reasons = _decoder_only(spec, UNIFIED) + _same_widths(spec, UNIFIED)
    stored, size = spec.kv_cache_dtype, spec.block_size
    if stored != spec.dtype:
        fp8 = stored in ("float8_e4m3fn", "float8_e5m2")
        if not (fp8 and target in _FP8_TARGETS):
            accepts = f"AITER's {UNIFIED} reads a cache of {spec.dtype}, and of fp8 on {' and '.join(_FP8_TARGETS)}"
            reasons.append(Refusal("kv_cache_dtype", stored, accepts, f"Ask for {spec.dtype}, or {FALLBACK}"))
    if size < 16 or size > _LARGEST_PAGE or size & (size - 1):
        accepts = f"AITER's {UNIFIED} takes a page as a tile: a power of two, 16 to {_LARGEST_PAGE}"
        reasons.append(Refusal("block_size", size, accepts, "Ask for block_size=16, 32 or 64"))
    if not 16 <= spec.head_size <= 256:
        accepts = f"AITER's {UNIFIED} is used with heads of 16 to 256"
        reasons.append(Refusal("head_size", spec.head_size, accepts, FALLBACK_HINT))
    if spec.group_size > 128:
        accepts = f"AITER's {UNIFIED} has tiles for at most 128 query heads of a key head"
        reasons.append(Refusal("num_kv_heads", spec.num_kv_heads, accepts, FALLBACK_HINT))
    if spec.alibi and spec.sinks:
        # It counts the bias from the first query of the step: the same for all keys of a row, but not for its sink.
        accepts = f"AITER's {UNIFIED} measures ALiBi so that it does not fit a sink"
        reasons.append(Refusal("sinks", True, accepts, FALLBACK_HINT))
    return reasons


def _decode(spec: AttentionSpec) -> list[Refusal]:
    """Sizes are those that AITER itself compiles ahead of time (aot/pa_v1.py)."""
    reasons = _decoder_only(spec, DECODE) + _same_widths(spec, DECODE) + _own_type(spec, DECODE)
    if spec.block_size not in (1, 16, 32):
        accepts = f"AITER's {DECODE} has pages of 1, 16 and 32"
        reasons.append(Refusal("block_size", spec.block_size, accepts, "Ask for block_size=16"))
    if spec.head_size not in (64, 128):
        reasons.append(Refusal("head_size", spec.head_size, f"AITER's {DECODE} has heads of 64 and 128", FALLBACK_HINT))
    if spec.group_size > _LARGEST_GROUP:
        accepts = f"AITER's {DECODE} has at most {_LARGEST_GROUP} query heads of a key head"
        reasons.append(Refusal("num_kv_heads", spec.num_kv_heads, accepts, FALLBACK_HINT))
    if spec.sinks:
        reasons.append(Refusal("sinks", True, f"AITER's {DECODE} has no sinks", FALLBACK_HINT))
    if spec.logits_soft_cap is not None and (spec.has_window or spec.alibi):
        accepts = f"AITER's {DECODE} caps logits after window and bias, the contract before"
        reasons.append(Refusal("logits_soft_cap", spec.logits_soft_cap, accepts, FALLBACK_HINT))
    return reasons


def _batch(spec: AttentionSpec) -> list[Refusal]:
    reasons = _own_type(spec, BATCH)
    for name in ("head_size", "value_head_size"):
        size = getattr(spec, name)
        if (size > 128 or size % 8) and (name == "head_size" or size != spec.head_size):
            accepts = f"AITER's {BATCH} has heads of at most 128, multiples of 8"
            reasons.append(Refusal(name, size, accepts, FALLBACK_HINT))
    if spec.alibi:
        accepts = f"AITER's {BATCH} hands slopes to its kernel in the place of a bias"
        reasons.append(Refusal("alibi", True, accepts, FALLBACK_HINT))

    return reasons
