"""FlashAttention 2, 3 and 4: which of them is installed, which fits a GPU, and what each computes. No vendor.

Facts are those of flash-attn 2.8.3.post2 and its `hopper` folder, fa3-fwd 0.0.3, flash-attn-4 4.0.0b36, and the
FlashAttention 3 that the vLLM wheel carries (vllm-project/flash-attention); the tests hold calls against them.
torch's own `varlen_attn` takes a block table only once FlashAttention 3 is activated in it, whose operators are called
here directly: it adds nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from attn_dispatch.backend import Refusal
from attn_dispatch.contract import AttentionSpec

from .gpus import Capability, written
from .machine import Machine
from .paged import plain_refusals

__all__ = ["KINDS", "Installed", "choose", "installed", "refusals"]

KINDS = ("fa2", "fa3", "vllm-fa3", "fa4")

_ORDER: Mapping[int, tuple[str, ...]] = {
    8: ("fa2",),
    9: ("fa3", "vllm-fa3", "fa4", "fa2"),
    10: ("fa4", "fa2"),
    12: ("fa2",),
}
"""By major capability, fastest first. FlashAttention 3 is Hopper's; 4 has paging on Hopper and on SM 10.x alone."""

_HDIMS = (64, 96, 128, 192, 256)
_ELSEWHERE = "Ask for triton/paged or torch/sdpa"

_FLASH_4 = frozenset({"max_seqlen_q", "max_seqlen_k", "page_table", "num_splits", "return_lse"})
"""What is passed to FlashAttention 4; flash-attn 2.8.3 installs an early `cute` that does not take all of it."""


@dataclass(frozen=True)
class Installed:
    """One FlashAttention that was found.

    Attributes:
        kind: of `KINDS`.
        title: for people.
        version: of its distribution.
        where: its folder or file.
        off: what a FlashAttention 3 was built without ("PAGEDKV", "LOCAL", "FP16"...); see also `_lacks`.
        module: the module that has its functions.
    """

    kind: str
    title: str
    version: str
    where: Path
    off: frozenset[str] = field(default=frozenset())
    module: str = ""

    def __str__(self) -> str:
        return f"{self.title} {self.version}".strip()


def installed(machine: Machine) -> list[Installed]:
    """Return what is installed, from files alone."""
    found = []
    for folder in machine.locations("flash_attn"):
        if (folder / "flash_attn_interface.py").exists():
            version = machine.version("flash-attn") or ""
            found.append(
                Installed("fa2", "FlashAttention 2", version, folder, module="flash_attn.flash_attn_interface")
            )
        if _taken(folder / "cute" / "interface.py", "flash_attn_varlen_func") >= _FLASH_4:
            version = machine.version("flash-attn-4") or machine.version("fa4") or ""
            found.append(Installed("fa4", "FlashAttention 4", version, folder, module="flash_attn.cute"))
    for module, distribution, config in (
        ("flash_attn_interface", "flash_attn_3", "flash_attn_config"),
        ("fa3_fwd_interface", "fa3-fwd", "fa3_fwd_config"),
    ):
        for file in machine.locations(module):
            off = _built_without(file.parent / f"{config}.py") | _lacks(file)
            version = machine.version(distribution) or ""
            found.append(Installed("fa3", f"FlashAttention 3 ({module})", version, file, off, module))
    for folder in machine.locations("vllm"):
        library = folder / "vllm_flash_attn" / "_vllm_fa3_C.abi3.so"
        if library.exists():
            version = machine.version("vllm") or ""
            found.append(Installed("vllm-fa3", "FlashAttention 3 of the vLLM wheel", version, library))
    return found


def _built_without(config: Path) -> frozenset[str]:
    """Return the features that a build of FlashAttention 3 says it lacks, from its configuration file."""
    if not config.exists():
        return frozenset()
    for node in ast.parse(config.read_text()).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "CONFIG" for t in node.targets):
            flags = ast.literal_eval(node.value).get("build_flags", {})
            return frozenset(name.partition("_DISABLE_")[2] for name, is_set in flags.items() if is_set) - {""}
    return frozenset()


def _lacks(interface: Path) -> frozenset[str]:
    """Return "VARLEN_LSE" of an interface whose function for keys outside of a cache cannot return the LSE."""
    has = "return_attn_probs" in _taken(interface, "flash_attn_varlen_func")
    return frozenset() if has else frozenset({"VARLEN_LSE"})


def _taken(file: Path, function: str) -> frozenset[str]:
    """Return the names of a function's arguments in a source file; none when either is missing."""
    if not file.exists():
        return frozenset()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return frozenset(argument.arg for argument in (*node.args.args, *node.args.kwonlyargs))
    return frozenset()


def choose(
    found: list[Installed], capability: Capability, spec: AttentionSpec, *, fp8_queries: bool
) -> tuple[Installed | None, list[Refusal]]:
    """Return the version that computes a spec on a GPU, or none and why not (of the one that comes closest)."""
    order = _ORDER.get(capability[0], ())
    ranked = sorted((one for one in found if one.kind in order), key=lambda one: order.index(one.kind))
    closest: list[Refusal] | None = None
    for one in ranked:
        no = refusals(one, capability, spec, fp8_queries=fp8_queries)
        if not no:
            return one, []
        if closest is None or len(no) < len(closest):
            closest = no
    if closest is None:
        have = ", ".join(map(str, found)) or "none"
        wanted = " or ".join(dict.fromkeys(order)) or "none"
        accepts = f"{written(capability)} is served by {wanted}; installed: {have}"
        closest = [Refusal("", None, accepts, _ELSEWHERE)]
    return None, closest


def refusals(one: Installed, capability: Capability, spec: AttentionSpec, *, fp8_queries: bool) -> list[Refusal]:
    """Return why a version cannot compute a spec on a GPU; nothing when it can."""
    no = plain_refusals(spec, one.title)
    stored = spec.kv_cache_dtype
    if stored != spec.dtype:
        no += _refused_cache(one, spec, fp8_queries=fp8_queries)
    if spec.alibi and one.kind != "fa2":
        no.append(Refusal("alibi", True, f"{one.title} has no ALiBi; FlashAttention 2 has", _ELSEWHERE))
    no += {"fa2": _fa2, "fa3": _fa3, "vllm-fa3": _fa3, "fa4": _fa4}[one.kind](one, capability, spec)
    return no


def _refused_cache(one: Installed, spec: AttentionSpec, *, fp8_queries: bool) -> list[Refusal]:
    stored = spec.kv_cache_dtype
    fits = stored == "float8_e4m3fn" and one.kind in ("fa3", "vllm-fa3") and "FP8" not in one.off
    if not fits:
        accepts = f"{one.title} reads a cache of the layer's own type, {spec.dtype}"
        return [Refusal("kv_cache_dtype", stored, accepts, f"Ask for {spec.dtype}, or for cuda/flashinfer")]
    if spec.dtype != "bfloat16":
        accepts = f"{one.title} returns bfloat16 from an fp8 cache"
        return [Refusal("dtype", spec.dtype, accepts, "Ask for bfloat16")]
    if not fp8_queries:
        accepts = f"{one.title} reads an fp8 cache only if queries are rounded to fp8 too, beyond the contract's error"
        remedy = "Ask for cuda/flashinfer, or set ATTN_DISPATCH_CUDA_FP8_QUERIES=1 to accept that"
        return [Refusal("kv_cache_dtype", stored, accepts, remedy)]
    return []


def _multiple(spec: AttentionSpec, by: int, title: str) -> list[Refusal]:
    accepts = f"{title} takes multiples of {by}"
    remedy = f"Pad the heads to a multiple of {by}"
    names = ("head_size", "value_head_size")
    return [Refusal(n, getattr(spec, n), accepts, remedy) for n in names if getattr(spec, n) % by]


def _fa2(one: Installed, capability: Capability, spec: AttentionSpec) -> list[Refusal]:
    no = []
    if spec.block_size % 256:
        accepts = "FlashAttention 2 reads pages of multiples of 256 tokens"
        no.append(Refusal("block_size", spec.block_size, accepts, "Ask for block_size=256"))
    no += _multiple(spec, 8, one.title)
    if spec.head_size > 256:
        no.append(Refusal("head_size", spec.head_size, "FlashAttention 2 has heads of at most 256", _ELSEWHERE))
    if spec.value_head_size != spec.head_size:
        accepts = f"FlashAttention 2 takes values as wide as keys, {spec.head_size}"
        no.append(Refusal("value_head_size", spec.value_head_size, accepts, _ELSEWHERE))
    return no


def _fa3(one: Installed, capability: Capability, spec: AttentionSpec) -> list[Refusal]:
    no = []
    title, size, value_size = one.title, spec.head_size, spec.value_head_size
    rebuild = f"Build it without FLASHATTENTION_DISABLE_%s, or {_ELSEWHERE[0].lower()}{_ELSEWHERE[1:]}"
    if "PAGEDKV" in one.off:
        accepts = f"{one} was built without paged caches"
        no.append(Refusal("block_size", spec.block_size, accepts, rebuild % "PAGEDKV"))
    if "VARLEN" in one.off:
        no.append(Refusal("kind", spec.kind, f"{one} was built without ragged batches", rebuild % "VARLEN"))
    if "LOCAL" in one.off and spec.has_window:
        no.append(Refusal("window", spec.window, f"{one} was built without windows", rebuild % "LOCAL"))
    if "SOFTCAP" in one.off and spec.logits_soft_cap is not None:
        cap = spec.logits_soft_cap
        no.append(Refusal("logits_soft_cap", cap, f"{one} was built without soft-capping", rebuild % "SOFTCAP"))
    if "FP16" in one.off and spec.dtype == "float16":
        no.append(Refusal("dtype", spec.dtype, f"{one} was built without float16", "Ask for bfloat16"))
    if "VARLEN_LSE" in one.off and spec.kind == "encoder" and (spec.returns_lse or spec.sinks):
        name = "returns_lse" if spec.returns_lse else "sinks"
        accepts = f"{one} gives no log-sum-exp for an encoder's keys, which need not be in a cache"
        no.append(Refusal(name, True, accepts, _ELSEWHERE))
    no += _multiple(spec, 8 if spec.kv_cache_dtype == spec.dtype else 16, title)
    if size > 256:
        no.append(Refusal("head_size", size, f"{title} has heads of at most 256", _ELSEWHERE))
    else:
        built = [n for n in _HDIMS if f"HDIM{n}" not in one.off]
        if not any(size <= n for n in built):
            accepts = f"{one} was built for heads of at most {max(built, default=0)}"
            no.append(Refusal("head_size", size, accepts, _ELSEWHERE))
    if value_size != size:
        mla = 128 < size <= 192 and 96 < value_size <= 128 and "HDIMDIFF192" not in one.off
        wide = size <= 64 and value_size <= 512 and "HDIMDIFF64" not in one.off
        if not (mla or wide):
            accepts = (
                f"{title} takes values as wide as keys ({size}), 97..128 for keys of 129..192, up to 512 for up to 64"
            )
            no.append(Refusal("value_head_size", value_size, accepts, _ELSEWHERE))
    return no


def _fa4(one: Installed, capability: Capability, spec: AttentionSpec) -> list[Refusal]:
    no = _multiple(spec, 8, one.title)
    size, value_size = spec.head_size, spec.value_head_size
    if capability[0] == 9:
        right, accepts = 8 <= size <= 256 and 8 <= value_size <= 256, "8 to 256"
    else:
        narrow = 8 <= size <= 128 and 8 <= value_size <= 128
        right = narrow or (size, value_size) in ((192, 128), (256, 256))
        accepts = "8 to 128, 192 with values of 128, or 256"
    if not right:
        field_name = "head_size" if size == value_size else "head_size, value_head_size"
        value: object = size if size == value_size else (size, value_size)
        accepts = f"FlashAttention 4 has heads of {accepts} on {written(capability)}"
        no.append(Refusal(field_name, value, accepts, _ELSEWHERE))
    return no
