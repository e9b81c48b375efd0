"""FlashAttention 2, 3 and 4: which of them is installed, which fits a GPU, and what each computes. No vendor.

Facts are those of flash-attn 2.8.3.post2 and its `hopper` folder, fa3-fwd 0.0.3, flash-attn-4 4.0.0b36, and the
FlashAttention 3 that the vLLM wheel carries (vllm-project/flash-attention); the tests check calls against them.
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

from .backend import FALLBACK_HINT, shared_refusals
from .gpus import Capability, sm
from .machine import Machine

__all__ = ["KINDS", "Installed", "choose", "installed", "refusals_of"]

KINDS = ("fa2", "fa3", "vllm-fa3", "fa4")

_ORDER: Mapping[int, tuple[str, ...]] = {
    8: ("fa2",),
    9: ("fa3", "vllm-fa3", "fa4", "fa2"),
    10: ("fa4", "fa2"),
    12: ("fa2",),
}
"""By major capability, fastest first. FlashAttention 3 is Hopper's; 4 has paging on Hopper and on SM 10.x alone."""

_BUILT_HEAD_SIZES = (64, 96, 128, 192, 256)

_FLASH_4 = frozenset({"max_seqlen_q", "max_seqlen_k", "page_table", "num_splits", "return_lse"})
"""What is passed to FlashAttention 4; flash-attn 2.8.3 installs an early `cute` that does not take all of it."""


@dataclass(frozen=True)
class Installed:
    """One FlashAttention that is installed.

    Attributes:
        kind: of `KINDS`.
        title: for people.
        version: of its distribution.
        where: its folder or file.
        lacks: what a FlashAttention 3 was built without ("PAGEDKV", "LOCAL", "FP16"...); see also `_lacks_lse`.
        module: the module that has its functions.
    """

    kind: str
    title: str
    version: str
    where: Path
    lacks: frozenset[str] = field(default=frozenset())
    module: str = ""

    def __str__(self) -> str:
        return f"{self.title} {self.version}".strip()


def installed(machine: Machine) -> list[Installed]:
    """Return what is installed, from files alone."""
    versions = []
    for folder in machine.packages.folders("flash_attn"):
        if (folder / "flash_attn_interface.py").exists():
            version = machine.packages.version("flash-attn")
            versions.append(
                Installed("fa2", "FlashAttention 2", version, folder, module="flash_attn.flash_attn_interface")
            )
        if _argument_names(folder / "cute" / "interface.py", "flash_attn_varlen_func") >= _FLASH_4:
            version = machine.packages.version("flash-attn-4", "fa4")
            versions.append(Installed("fa4", "FlashAttention 4", version, folder, module="flash_attn.cute"))
    for module, distribution, config in (
        ("flash_attn_interface", "flash_attn_3", "flash_attn_config"),
        ("fa3_fwd_interface", "fa3-fwd", "fa3_fwd_config"),
    ):
        for file in machine.packages.folders(module):
            lacks = _built_without(file.parent / f"{config}.py") | _lacks_lse(file)
            version = machine.packages.version(distribution)
            versions.append(Installed("fa3", f"FlashAttention 3 ({module})", version, file, lacks, module))
    for folder in machine.packages.folders("vllm"):
        library = folder / "vllm_flash_attn" / "_vllm_fa3_C.abi3.so"
        if library.exists():
            version = machine.packages.version("vllm")
            versions.append(Installed("vllm-fa3", "FlashAttention 3 of the vLLM wheel", version, library))
    return versions


def _built_without(config: Path) -> frozenset[str]:
    """Return the features that a build of FlashAttention 3 says it lacks, from its configuration file."""
    if not config.exists():
        return frozenset()
    for node in ast.parse(config.read_text()).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "CONFIG" for t in node.targets):
            flags = ast.literal_eval(node.value).get("build_flags", {})
            return frozenset(name.partition("_DISABLE_")[2] for name, is_set in flags.items() if is_set) - {""}
    return frozenset()


def _lacks_lse(interface: Path) -> frozenset[str]:
    """Return "VARLEN_LSE" of an interface whose function for keys outside of a cache cannot return the LSE."""
    has = "return_attn_probs" in _argument_names(interface, "flash_attn_varlen_func")
    return frozenset() if has else frozenset({"VARLEN_LSE"})


def _argument_names(file: Path, function: str) -> frozenset[str]:
    """Return the names of a function's arguments in a source file; none when either is missing."""
    if not file.is_file():
        return frozenset()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return frozenset(argument.arg for argument in (*node.args.args, *node.args.kwonlyargs))
    return frozenset()


def choose(
    versions: list[Installed], capability: Capability, spec: AttentionSpec, *, fp8_queries: bool
) -> tuple[Installed | None, list[Refusal]]:
    """Return the version that computes a spec on a GPU, or none and why not (of the version that comes closest)."""
    order = _ORDER.get(capability[0], ())
    ranked = sorted(
        (version for version in versions if version.kind in order), key=lambda version: order.index(version.kind)
    )
    closest: list[Refusal] | None = None
    for version in ranked:
        refusals = refusals_of(version, capability, spec, fp8_queries=fp8_queries)
        if not refusals:
            return version, []
        if closest is None or len(refusals) < len(closest):
            closest = refusals
    if closest is None:
        have = ", ".join(map(str, versions)) or "none"
        wanted = " or ".join(dict.fromkeys(order)) or "none"
        accepts = f"{sm(capability)} is served by {wanted}; installed: {have}"
        closest = [Refusal("", None, accepts, FALLBACK_HINT)]
    return None, closest


def refusals_of(version: Installed, capability: Capability, spec: AttentionSpec, *, fp8_queries: bool) -> list[Refusal]:
    """Return why a version cannot compute a spec on a GPU; nothing when it can."""
    refusals = shared_refusals(spec, version.title)
    stored = spec.kv_cache_dtype
    if stored != spec.dtype:
        refusals += _refused_cache(version, spec, fp8_queries=fp8_queries)
    if spec.alibi and version.kind != "fa2":
        refusals.append(Refusal("alibi", True, f"{version.title} has no ALiBi; FlashAttention 2 has", FALLBACK_HINT))
    refusals += {"fa2": _fa2, "fa3": _fa3, "vllm-fa3": _fa3, "fa4": _fa4}[version.kind](version, capability, spec)
    return refusals


def _refused_cache(version: Installed, spec: AttentionSpec, *, fp8_queries: bool) -> list[Refusal]:
    stored = spec.kv_cache_dtype
    fits = stored == "float8_e4m3fn" and version.kind in ("fa3", "vllm-fa3") and "FP8" not in version.lacks
    if not fits:
        accepts = f"{version.title} reads a cache of the layer's own type, {spec.dtype}"
        return [Refusal("kv_cache_dtype", stored, accepts, f"Ask for {spec.dtype}, or for cuda/flashinfer")]
    if spec.dtype != "bfloat16":
        accepts = f"{version.title} returns bfloat16 from an fp8 cache"
        return [Refusal("dtype", spec.dtype, accepts, "Ask for bfloat16")]
    if not fp8_queries:
        accepts = (
            f"{version.title} reads an fp8 cache only if queries are rounded to fp8 too, beyond the contract's error"
        )
        remedy = "Ask for cuda/flashinfer, or set ATTN_DISPATCH_CUDA_FP8_QUERIES=1 to accept that"
        return [Refusal("kv_cache_dtype", stored, accepts, remedy)]
    return []


def _multiple(spec: AttentionSpec, by: int, title: str) -> list[Refusal]:
    accepts = f"{title} takes multiples of {by}"
    remedy = f"Pad the heads to a multiple of {by}"
    names = ("head_size", "value_head_size")
    return [Refusal(n, getattr(spec, n), accepts, remedy) for n in names if getattr(spec, n) % by]


def _fa2(version: Installed, capability: Capability, spec: AttentionSpec) -> list[Refusal]:
    refusals = []
    if spec.block_size % 256:
        accepts = "FlashAttention 2 reads pages of multiples of 256 tokens"
        refusals.append(Refusal("block_size", spec.block_size, accepts, "Ask for block_size=256"))
    refusals += _multiple(spec, 8, version.title)
    if spec.head_size > 256:
        refusals.append(
            Refusal("head_size", spec.head_size, "FlashAttention 2 has heads of at most 256", FALLBACK_HINT)
        )
    if spec.value_head_size != spec.head_size:
        accepts = f"FlashAttention 2 takes values as wide as keys, {spec.head_size}"
        refusals.append(Refusal("value_head_size", spec.value_head_size, accepts, FALLBACK_HINT))
    return refusals


def _fa3(version: Installed, capability: Capability, spec: AttentionSpec) -> list[Refusal]:
    refusals = []
    title, size, value_size = version.title, spec.head_size, spec.value_head_size
    rebuild = f"Build it without FLASHATTENTION_DISABLE_%s, or {FALLBACK_HINT[0].lower()}{FALLBACK_HINT[1:]}"
    if "PAGEDKV" in version.lacks:
        accepts = f"{version} was built without paged caches"
        refusals.append(Refusal("block_size", spec.block_size, accepts, rebuild % "PAGEDKV"))
    if "VARLEN" in version.lacks:
        refusals.append(Refusal("kind", spec.kind, f"{version} was built without ragged batches", rebuild % "VARLEN"))
    if "LOCAL" in version.lacks and spec.has_window:
        refusals.append(Refusal("window", spec.window, f"{version} was built without windows", rebuild % "LOCAL"))
    if "SOFTCAP" in version.lacks and spec.logits_soft_cap is not None:
        cap = spec.logits_soft_cap
        refusals.append(
            Refusal("logits_soft_cap", cap, f"{version} was built without soft-capping", rebuild % "SOFTCAP")
        )
    if "FP16" in version.lacks and spec.dtype == "float16":
        refusals.append(Refusal("dtype", spec.dtype, f"{version} was built without float16", "Ask for bfloat16"))
    if "VARLEN_LSE" in version.lacks and spec.kind == "encoder" and (spec.returns_lse or spec.sinks):
        name = "returns_lse" if spec.returns_lse else "sinks"
        accepts = f"{version} gives no log-sum-exp for an encoder's keys, which need not be in a cache"
        refusals.append(Refusal(name, True, accepts, FALLBACK_HINT))
    refusals += _multiple(spec, 8 if spec.kv_cache_dtype == spec.dtype else 16, title)
    if size > 256:
        refusals.append(Refusal("head_size", size, f"{title} has heads of at most 256", FALLBACK_HINT))
    else:
        built = [n for n in _BUILT_HEAD_SIZES if f"HDIM{n}" not in version.lacks]
        if not any(size <= n for n in built):
            accepts = f"{version} was built for heads of at most {max(built, default=0)}"
            refusals.append(Refusal("head_size", size, accepts, FALLBACK_HINT))
    if value_size != size:
        mla = 128 < size <= 192 and 96 < value_size <= 128 and "HDIMDIFF192" not in version.lacks
        wide = size <= 64 and value_size <= 512 and "HDIMDIFF64" not in version.lacks
        if not (mla or wide):
            accepts = (
                f"{title} takes values as wide as keys ({size}), 97..128 for keys of 129..192, up to 512 for up to 64"
            )
            refusals.append(Refusal("value_head_size", value_size, accepts, FALLBACK_HINT))
    return refusals


def _fa4(version: Installed, capability: Capability, spec: AttentionSpec) -> list[Refusal]:
    refusals = _multiple(spec, 8, version.title)
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
        accepts = f"FlashAttention 4 has heads of {accepts} on {sm(capability)}"
        refusals.append(Refusal(field_name, value, accepts, FALLBACK_HINT))
    return refusals
