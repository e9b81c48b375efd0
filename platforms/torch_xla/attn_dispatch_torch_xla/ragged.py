"""`torch_xla/ragged`: torch_xla's ragged paged attention: probe, verdict, layout. Imports no vendor.

On a TPU its Pallas kernel runs. On other devices of PJRT (the CPU) the same function computes with plain XLA, which the
verdict says. torch_xla 2.9 is the last release: it loads with torch 2.9, and its kernel is traced by jax 0.7.1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, ClassVar

import attn_dispatch as ad
from attn_dispatch.adapters.environment import Packages
from attn_dispatch.adapters.joint_pages import JointPages, joint_pages
from attn_dispatch.backend import Availability, Backend, Call, Capabilities, Plan, Refusal, Verdict
from attn_dispatch.contract import Array, AttentionMetadata, AttentionSpec
from attn_dispatch.contract.dtypes import itemsize
from attn_dispatch.errors import CacheError

from .kernel import LANES

__all__ = ["RaggedBackend"]

PACKAGES = {"torch_xla": "2.9.", "torch": "2.9.", "jax": "0.7."}
"""What it was written for, and what torch_xla 2.9 itself requires."""

_MAX_BLOCK = 512  # two blocks of keys and values, and their scores, must fit the memory that the kernel asks for


class RaggedBackend(Backend):
    """torch_xla's ragged paged attention."""

    capabilities: ClassVar[Capabilities] = Capabilities(libraries=("torch",), nan_safe=True)

    def probe(self) -> Availability:
        """Look for the packages' metadata and for a TPU's device files."""
        versions = {name: Packages().version(name) for name in PACKAGES}
        found = ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items())
        if any(not versions[name].startswith(series) for name, series in PACKAGES.items()):
            return Availability(
                False,
                f"needs torch_xla 2.9 with torch 2.9 and jax 0.7; here: {found}",
                "pip install 'torch==2.9.*' 'torch_xla[pallas]==2.9.*' (an environment of its own)",
                versions["torch_xla"],
            )
        if self.on_tpu:
            return Availability(True, ad.platform.description, version=versions["torch_xla"])
        reason = f"no TPU here: named, it runs on the CPU by PJRT, without the kernel ({found})"
        return Availability(True, reason, version=versions["torch_xla"], evidence="ran on CPU")

    @property
    def on_tpu(self) -> bool:
        """Whether PJRT's device is a TPU: this machine has one, and nothing else was asked for."""
        wanted = os.environ.get("PJRT_DEVICE", "TPU")
        return wanted == "TPU" and any(device.kind == "tpu" for device in ad.platform.devices)

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """Compare the spec with what torch_xla 2.9's kernel takes, whatever the device."""
        refusals = tuple(_refusals(spec))
        if refusals:
            return self.refuse(*refusals)
        return self.accept("" if self.on_tpu else "torch_xla's plain XLA form on the CPU: its kernel is for TPUs")

    def layout(self, spec: AttentionSpec) -> JointPages:
        """Return joint pages, heads padded to the kernel's width."""
        return joint_pages(spec.geometry, spec.num_kv_heads, LANES, (2 * spec.num_kv_heads, LANES))

    def zeros(self, shape: tuple[int, ...], dtype: str, device: str | None) -> Array:
        """Return a zeroed tensor on an XLA device ("xla:0").

        Raises:
            CacheError: torch has no such device, or it has not the memory.
        """
        from .ragged_call import zeros

        return zeros(shape, dtype, device)

    def indexable_view(self, array: Any) -> Any:
        """Return the array itself: types that torch cannot index on XLA devices are refused."""
        return array

    def plan(self, spec: AttentionSpec, metadata: AttentionMetadata) -> Plan:
        """Round the batch's sizes up, so that few programs are compiled.

        Raises:
            PlanError: the block table does not fit the scalar memory of a TPU core.
        """
        from .ragged_call import make_plan

        return make_plan(spec, metadata.view(spec.kind))

    def run(self, call: Call) -> Any:
        """Write the new keys and values into the pages, then attend.

        Raises:
            ArrayError: an array is not on the cache's device. Nothing has been written.
        """
        from .ragged_call import run

        if call.cache is None:
            raise CacheError(f"{self.name} reads keys and values from a cache")
        return run(call, use_kernel=self.on_tpu)


def _refusals(spec: AttentionSpec) -> Iterator[Refusal]:
    kernel = "torch_xla 2.9's kernel"
    if spec.kind != "decoder":
        yield Refusal("kind", spec.kind, f"{kernel} is self-attention over pages: decoder layers")
    elif not spec.causal:
        yield Refusal("causal", False, f"{kernel} is causal only")
    if spec.alibi:
        yield Refusal("alibi", True, f"{kernel} has no bias")
    if spec.sinks:
        yield Refusal("sinks", True, f"{kernel}'s softmax has no sink")
    if spec.returns_lse:
        yield Refusal("returns_lse", True, f"{kernel} does not return LSE")
    for name in ("head_size", "value_head_size"):
        if getattr(spec, name) > LANES:
            yield Refusal(
                name, getattr(spec, name), f"{kernel}'s heads have {LANES} elements (smaller ones are padded)"
            )
    if spec.block_size > _MAX_BLOCK:
        yield Refusal("block_size", spec.block_size, f"{kernel} holds blocks of up to {_MAX_BLOCK} tokens")
    if spec.dtype not in ("bfloat16", "float32"):
        yield Refusal("dtype", spec.dtype, f"{kernel} computes bfloat16 and float32", "Ask for bfloat16")
    if spec.kv_cache_dtype not in ("bfloat16", "float32", "int8"):
        accepts = f"{kernel} reads pages of bfloat16, float32, int8; torch 2.9 writes no others on an XLA device"
        yield Refusal("kv_cache_dtype", spec.kv_cache_dtype, accepts, "Ask for bfloat16")
        return
    words, rest = divmod(2 * spec.num_kv_heads, 4 // itemsize(spec.kv_cache_dtype))
    if rest or (words not in (1, 2, 4, 8) and words % 8):
        accepts = f"{kernel} takes key/value heads that fill 1, 2, 4 or a multiple of 8 words"
        yield Refusal("num_kv_heads", spec.num_kv_heads, accepts, "Use tpu/pallas, which pads them")
    elif spec.kv_cache_dtype == "float32" and spec.num_kv_heads > 4 and spec.group_size == 1:
        accepts = f"{kernel} takes four float32 heads at a time, which are no whole tile of queries"
        yield Refusal("num_heads", spec.num_heads, accepts, "Use tpu/pallas, which pads them")
