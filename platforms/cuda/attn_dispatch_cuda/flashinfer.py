"""`cuda/flashinfer`: FlashInfer's wrappers, planned in our plan and run in our run.

Loading this imports no vendor. Written against flashinfer-python 0.7.2.post1 (its Python, its kernels' sources, which
the compile cell builds); never run on a GPU here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_dispatch.backend import Availability, Refusal, Verdict
from attn_dispatch.contract import Array, AttentionSpec, CacheLayout, layout_named
from attn_dispatch.contract.arrays import library_of
from attn_dispatch.contract.dtypes import dtype_name
from attn_dispatch.errors import EnvironmentVariableError

from .gpus import Capability, written
from .machine import Machine
from .paged import PagedCudaBackend, plain_refusals
from .plans import CudaPlan

if TYPE_CHECKING:
    import torch

    from .flashinfer_step import InferStep
    from .layer import Owned
    from .store import Store

__all__ = [
    "KERNELS_VARIABLE",
    "LAYOUT_VARIABLE",
    "MIXED",
    "MIXED_VARIABLE",
    "FlashInferBackend",
    "against_one_kernel",
    "decode_kernel",
    "kernels",
    "merges",
]

KERNELS_VARIABLE = "ATTN_DISPATCH_CUDA_FLASHINFER"
"""`auto`, `fa2` or `fa3`: FlashInfer's prefill kernels. fa3 (Hopper) takes nvcc minutes where no wheel has it built."""

LAYOUT_VARIABLE = "ATTN_DISPATCH_CUDA_FLASHINFER_LAYOUT"
"""`NHD` (default: shared with FlashAttention) or `HND`."""

MIXED_VARIABLE = "ATTN_DISPATCH_CUDA_FLASHINFER_MIXED"
"""Who computes a batch of decodes and prompts: see `MIXED`."""

MIXED = ("two-wrappers", "batch-attention")
"""By default decodes by one wrapper and the rest by another; or all by FlashInfer's one persistent kernel, in layers
that it computes (`against_one_kernel`). Which is faster was not measured by this project."""

UNTRIED = "by the vendor's sources and signatures; never run on a GPU by this project"

_HEAD_SIZES = (64, 128, 256)
_ELSEWHERE = "Ask for triton/paged or torch/sdpa"
_INSTALL = "pip install flashinfer-python, with nvcc and ninja to build its kernels (or flashinfer-jit-cache, built)"


class FlashInferBackend(PagedCudaBackend):
    """Decodes by the decode wrapper, everything else by the prefill wrapper; lists of pages instead of block tables.

    Where `ATTN_DISPATCH_CUDA_FLASHINFER_MIXED=batch-attention`, batches of both by `BatchAttention`.
    """

    def probe(self) -> Availability:
        """A GPU, torch's CUDA build, FlashInfer, and its kernels or a compiler for them."""
        version = self.machine.version("flashinfer-python") or ""
        missing = self.machine.needs_torch()
        if missing is not None:
            return Availability(False, missing.reason, missing.remedy, version)
        if not self.machine.locations("flashinfer"):
            return Availability(False, "FlashInfer is not installed", _INSTALL)
        for capability in self.machine.capabilities:
            if capability < (8, 0):
                reason = (
                    f"FlashInfer's kernels are for sm_80 and later, {self.machine.gpus[0]} is {written(capability)}"
                )
                return Availability(False, reason, _ELSEWHERE, version)
        built = kernels(self.machine)
        if not built:
            reason = f"FlashInfer {version} has no kernels: neither nvcc with ninja nor prebuilt ones were found"
            return Availability(False, reason, _INSTALL, version)
        return Availability(True, f"FlashInfer {version} ({built}) on {self.machine.gpus[0]}; {UNTRIED}", "", version)

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """Sizes that its kernels were written for, its own ALiBi slopes, and windows with a closed right side."""
        no = plain_refusals(spec, "FlashInfer")
        stored = spec.kv_cache_dtype
        if stored != spec.dtype and not stored.startswith("float8"):
            accepts = f"FlashInfer reads a cache of the layer's own type ({spec.dtype}) or fp8"
            no.append(Refusal("kv_cache_dtype", stored, accepts, "Ask for one of these"))
        if spec.head_size not in _HEAD_SIZES:
            accepts = f"FlashInfer's kernels are for {', '.join(map(str, _HEAD_SIZES))}"
            no.append(Refusal("head_size", spec.head_size, accepts, _ELSEWHERE))
        if spec.value_head_size != spec.head_size:
            accepts = f"FlashInfer's paged kernels take values as wide as keys, {spec.head_size}"
            no.append(Refusal("value_head_size", spec.value_head_size, accepts, _ELSEWHERE))
        if spec.alibi:
            accepts = "FlashInfer computes slopes of its own, a layer's cannot be given"
            no.append(Refusal("alibi", True, accepts, "Ask for cuda/flash-attention with FlashAttention 2"))
        if spec.window[1] > 0:
            accepts = "FlashInfer closes the right side of a window at the query itself, or not at all"
            no.append(Refusal("window", spec.window, accepts, "Ask for cuda/flash-attention"))
        return self.refuse(*no) if no else self.accept(f"{UNTRIED}{self._mixed_note(spec)}")

    def _mixed_note(self, spec: AttentionSpec) -> str:
        """Return what becomes of the user's wish for BatchAttention."""
        if _chosen(MIXED_VARIABLE, MIXED) != "batch-attention":
            return ""
        against = against_one_kernel(spec, self.machine.capabilities)
        return f"; mixed batches by two wrappers: {against}" if against else "; mixed batches by BatchAttention"

    def layout(self, spec: AttentionSpec) -> CacheLayout:
        """By the variable: FlashInfer reads both.

        Raises:
            EnvironmentVariableError: it names another.
        """
        return layout_named(_chosen(LAYOUT_VARIABLE, ("NHD", "HND")))

    def step(
        self, spec: AttentionSpec, plan: CudaPlan, device: torch.device, *, paged: bool, capacity: int | None
    ) -> InferStep:
        """Plan FlashInfer's wrappers."""
        from .flashinfer_step import InferStep

        wanted = _chosen(MIXED_VARIABLE, MIXED) == "batch-attention"
        return InferStep(
            spec,
            plan.view,
            device,
            paged=paged,
            capacity=capacity,
            layout=self.layout(spec).name,
            kernels=_chosen(KERNELS_VARIABLE, ("auto", "fa2", "fa3")),
            one_kernel=wanted and not against_one_kernel(spec, self.machine.capabilities),
        )

    def attend(
        self,
        step: Any,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        store: Store | None,
        owned: Owned,
        out: torch.Tensor | None,
        *,
        wants_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the wrappers that the step planned."""
        pair = (k, v) if store is None else (store.key, store.value)
        result: tuple[torch.Tensor, torch.Tensor | None] = step.run(q, pair, owned, out, wants_lse=wants_lse)
        return result

    def merge_states(self, states: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
        """By FlashInfer's kernels on a GPU; see `Backend.merge_states`."""
        if not merges(states):
            return super().merge_states(states)
        from .flashinfer_merge import merged

        return merged(states)


def merges(states: Sequence[tuple[Array, Array]]) -> bool:
    """Return whether FlashInfer's own kernels merge these results: on one GPU, of 16 bits, in a block of theirs.

    A block has the threads of all heads; each thread takes 8 elements of a row.
    """
    if len(states) < 2:
        return False
    out, lse = states[0]
    if any(library_of(x) != "torch" or not x.is_cuda or x.requires_grad for state in states for x in state):
        return False
    if dtype_name(out.dtype) not in ("float16", "bfloat16") or dtype_name(lse.dtype) != "float32":
        return False
    same = all(
        (a.shape, a.dtype, a.device, b.shape, b.dtype, b.device)
        == (out.shape, out.dtype, out.device, lse.shape, lse.dtype, out.device)
        for a, b in states
    )
    if not same or len(out.shape) != 3 or tuple(lse.shape) != tuple(out.shape[:2]):
        return False
    rows, heads, size = out.shape
    return rows > 0 and size in _HEAD_SIZES and heads * (size // 8) <= 1024


def against_one_kernel(spec: AttentionSpec, capabilities: Sequence[Capability]) -> str:
    """Return why `BatchAttention` does not compute a layer's mixed batches here; empty when it does.

    Its `plan` takes no window, FlashInfer's own tests have it read caches of 16 bits alone, and an encoder's keys are
    in no pages. It launches two blocks per processor (one for head size 256) cooperatively, without asking whether they
    fit: 136 KiB of shared memory for head sizes 128 and 256, where sm_86, sm_89 and sm_12x have 100.
    """
    if spec.kind == "encoder":
        return "BatchAttention reads pages"
    if spec.window[0] >= 0:
        return "BatchAttention has no windows"
    if spec.kv_cache_dtype != spec.dtype:
        return f"BatchAttention is tried by its authors on a cache of the layer's own type ({spec.dtype})"
    small = [written(one) for one in capabilities if one[0] not in (9, 10, 11) and one not in ((8, 0), (8, 7))]
    if small:
        return f"BatchAttention's blocks do not fit {small[0]}'s shared memory"
    return ""


def decode_kernel(group_size: int) -> bool:
    """Whether decodes go over tensor cores: a group of several heads fills a tile of theirs.

    FlashInfer's CUDA-core kernel is compiled for few group sizes, and reads keys once for each head of a group.
    """
    return group_size not in (1, 2)


def kernels(machine: Machine) -> str:
    """Return where FlashInfer's kernels would come from, in words; empty when from nowhere."""
    if machine.locations("flashinfer_jit_cache"):
        return "prebuilt kernels"
    if any((folder / "data" / "aot").is_dir() for folder in machine.locations("flashinfer")):
        return "prebuilt kernels"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    # Where FlashInfer looks: the variable alone if it is set, else the path, else the usual folder.
    usual = Path(home or "/usr/local/cuda") / "bin" / "nvcc"
    compiler = usual.exists() or (not home and shutil.which("nvcc") is not None)
    return "kernels built here by nvcc" if compiler and shutil.which("ninja") else ""


def _chosen(variable: str, accepted: tuple[str, ...]) -> str:
    text = os.environ.get(variable) or accepted[0]
    if text not in accepted:
        raise EnvironmentVariableError(f"{variable}={text!r} is not one of {', '.join(accepted)}")
    return text
