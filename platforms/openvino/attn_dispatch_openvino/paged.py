"""`openvino/paged`: what OpenVINO's paged attention op is, and what it computes correctly. Imports no vendor.

Each refusal was measured. Most stand for a result that would be wrong without an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

import attn_dispatch
from attn_dispatch import (
    HND,
    AttentionMetadata,
    AttentionSpec,
    Availability,
    Backend,
    CacheLayout,
    Call,
    Capabilities,
    KVCache,
    Plan,
    Refusal,
    Verdict,
)
from attn_dispatch.adapters.environment import num_threads
from attn_dispatch.contract import Array
from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.errors import BackendRefusedError, CacheError, EnvironmentVariableError

from .layouts import GPU, PackedLayout, layout_for
from .releases import Release, Target, installed_version, known_releases, release_of

__all__ = ["DEVICE_VARIABLE", "PagedBackend"]

DEVICE_VARIABLE = "ATTN_DISPATCH_OPENVINO_DEVICE"
"""The OpenVINO device to compute on: CPU (the default), GPU or GPU.<number>."""

_DEVICE = re.compile(r"CPU|GPU(\.\d+)?")
_INSTALL = "pip install 'openvino>=2025.4,<2026.5'"
_CPU_BLOCK, _GPU_BLOCK = 32, 16
_MIN_HEAD, _MAX_HEAD = 8, 512
_PACKED_RATIO = 4  # seen with a checking malloc: in float32, beyond D = 4 Dv it writes past the end of a buffer

_CPU_CACHES = {
    "float32": ("float32", "float16", "uint8", "uint4"),
    "float16": ("float16", "float32"),
    "bfloat16": ("bfloat16", "uint8", "uint4"),
}
_GPU_CACHES = {"float32": ("float16",), "float16": ("float16",)}
"""Cache types by compute type."""

_NOTES = {
    "uint8": "8-bit cache, a scale per token and head: results are off by about 1 % (root mean square)",
    "uint4": "4-bit cache, a scale per token and head: results are off by about 15 % (root mean square)",
}
"""What a user should know of a yes, by cache type: measured on numbers of unit variance (tests/test_cache_types.py)."""

_OTHER = "Use another backend"
_NEWER = "Install OpenVINO 2026.3 or newer"
_NEWER_THAN_2025 = "Install OpenVINO 2026.0 or newer"


def device_name() -> str:
    """Return the OpenVINO device that the environment asks for.

    Raises:
        EnvironmentVariableError: it is neither the CPU nor a GPU.
    """
    name = os.environ.get(DEVICE_VARIABLE) or "CPU"
    if not _DEVICE.fullmatch(name):
        raise EnvironmentVariableError(f"{DEVICE_VARIABLE}={name!r} is not a device. Known: CPU, GPU, GPU.<number>")
    return name


def cpu_flags() -> frozenset[str]:
    """Return what the processor says it can do (nothing on systems that do not tell)."""
    return frozenset(attn_dispatch.platform.facts.get("cpu_flags", ()))


class PagedBackend(Backend):
    """Attention by OpenVINO's native op, on the CPU unless ATTN_DISPATCH_OPENVINO_DEVICE says otherwise."""

    # Unused slots may hold NaN. Scales of the packed caches are the op's own: a layer's cannot be given.
    capabilities: ClassVar[Capabilities] = Capabilities(
        libraries=("numpy", "torch"), nan_safe=True, applies_scales=False
    )

    def probe(self) -> Availability:
        """Look for OpenVINO of a release that was measured, and for the device."""
        version = installed_version()
        if not version:
            return Availability(False, "OpenVINO is not installed", _INSTALL)
        if release_of(version) is None:
            known = f"its attention op was not measured; releases that are known: {known_releases()}"
            return Availability(False, f"OpenVINO {version}: {known}", _INSTALL, version)
        device = device_name()
        if device != "CPU":
            if not any(Path("/dev/dri").glob("renderD*")):
                reason = f"{DEVICE_VARIABLE}={device}, but there is no GPU here (/dev/dri/renderD* absent)"
                return Availability(False, reason, f"unset {DEVICE_VARIABLE}", version)
            return Availability(True, f"OpenVINO {version} on {device}", version=version, evidence="never run")
        if missing := _missing_on_cpu():
            return Availability(False, missing, _OTHER, version)
        return Availability(True, f"OpenVINO {version} on the CPU", version=version)

    def verdict(self, spec: AttentionSpec) -> Verdict:
        """Everything that the installed release computes correctly."""
        device = device_name()
        refusals = tuple(_refusals(spec, self._release(), device))
        if refusals:
            return self.refuse(*refusals)
        if device != "CPU":
            return self.accept("built the way the GPU plug-in's layouts want it; never run on one by this project")
        return self.accept(_NOTES.get(spec.kv_cache_dtype, ""))

    def layout(self, spec: AttentionSpec) -> CacheLayout:
        """HND, or OpenVINO's own packing of uint8 and uint4."""
        return layout_for(spec.kv_cache_dtype) or (HND if device_name() == "CPU" else GPU)

    def zeros(self, shape: tuple[int, ...], dtype: str, device: str | None) -> Array:
        """Return a zeroed NumPy array."""
        return np.zeros(shape, numpy_dtype(dtype))

    def allocate(self, spec: AttentionSpec, num_blocks: int, device: str | None = None) -> KVCache:
        """Return a zeroed cache; for a GPU, of host memory that it shares."""
        computes_on = device_name()
        if str(device or "cpu").upper() not in ("CPU", computes_on):
            raise CacheError(f"device={device!r}: {self.name} keeps caches in host memory; give device='cpu'")
        cache = super().allocate(spec, num_blocks, "cpu")
        if computes_on != "CPU":
            self._calls.share_with_device(cache, self._target())
        return cache

    def to_layout(self, cache: KVCache, layout: CacheLayout) -> KVCache:
        """Return a copy in another layout; packed caches have only their own."""
        if layout != cache.layout and (isinstance(layout, PackedLayout) or isinstance(cache.layout, PackedLayout)):
            raise CacheError(
                f"layout {cache.layout.name} and {layout.name} store different things: one packs integers with their "
                "scales. gather() gives the values that they stand for"
            )
        return super().to_layout(cache, layout)

    def plan(self, spec: AttentionSpec, metadata: AttentionMetadata) -> Plan:
        """Work out the op's own form of the batch."""
        return self._plan(spec, metadata, None)

    def plan_tree(
        self, spec: AttentionSpec, metadata: AttentionMetadata, masks: Sequence[npt.NDArray[np.bool_] | None]
    ) -> Plan:
        """Prepare a step in which a sequence's new tokens are a tree (speculative decoding), not a line.

        The plan is given to `Attention.run` like any other. Every new token sees all tokens before the step.

        Args:
            spec: a causal decoder layer without a window.
            metadata: the batch.
            masks: for each sequence bool[n, n] of its n new tokens, [i, j]: token i sees token j (itself, and only
                earlier ones), or None for the plain order.

        Raises:
            BackendRefusedError: this release, or a layer like this one, has no tree masks.
            MetadataError: a mask does not fit its sequence.
        """
        if not self._release().trees:
            refusal = f"OpenVINO {installed_version()} ignores tree masks; install 2026.3 or newer"
        elif spec.kind != "decoder" or not spec.causal or spec.has_window or device_name() != "CPU":
            refusal = f"tree masks are for causal decoder layers without a window, on the CPU; this one is {spec}"
        else:
            return self._plan(spec, metadata, masks)
        raise BackendRefusedError(f"{self.name}: {refusal}")

    def run(self, call: Call) -> Array | tuple[Array, Array]:
        """Write and attend; see `paged_call.run`."""
        return self._calls.run(call, self.allocate)

    @cached_property
    def _calls(self) -> Any:
        from . import paged_call  # imports the vendor: not before something is computed

        return paged_call

    def _plan(
        self, spec: AttentionSpec, metadata: AttentionMetadata, masks: Sequence[npt.NDArray[np.bool_] | None] | None
    ) -> Plan:
        plan: Plan = self._calls.make_plan(spec, metadata.view(spec.kind), self._target(), masks)
        return plan

    def _target(self) -> Target:
        return Target(self._release(), device_name(), num_threads())

    def _release(self) -> Release:
        version = installed_version()
        release = release_of(version)
        if release is None:
            raise BackendRefusedError(f"{self.name}: {self.probe().reason}")
        return release


def _missing_on_cpu() -> str:
    """Return what the op needs and this machine lacks; empty when nothing."""
    facts = attn_dispatch.platform.facts
    system, machine = facts.get("system", ""), facts.get("machine", "")
    if machine.lower() not in ("x86_64", "amd64"):
        return f"the op was measured on x86-64 alone, this machine is {machine or 'of an unknown architecture'}"
    if not cpu_flags():
        return f"needs AVX2, and {system or 'this system'} does not list the processor's instruction sets in a file"
    return "" if "avx2" in cpu_flags() else "needs AVX2, which this processor lacks"


def _refusals(spec: AttentionSpec, release: Release, device: str) -> Iterator[Refusal]:
    """Yield every reason why a spec cannot be run."""
    yield from _type_refusals(spec, release, device)
    block = _CPU_BLOCK if device == "CPU" else _GPU_BLOCK
    if spec.block_size != block:
        yield Refusal("block_size", spec.block_size, f"needs {block}", f"Ask for block_size={block}")
    with np.errstate(over="ignore"):
        scale = np.float32(spec.scale)
    if scale == 0:
        yield Refusal("scale", spec.scale, "the op takes 0 for 1 / sqrt(head_size)", _OTHER)
    elif not np.isfinite(scale):
        yield Refusal("scale", spec.scale, "is beyond float32", _OTHER)
    if spec.logits_soft_cap is not None:
        yield Refusal("logits_soft_cap", spec.logits_soft_cap, "the op has no soft-cap", _OTHER)
    if spec.returns_lse:
        yield Refusal("returns_lse", True, "the op does not return LSE", _OTHER)
    yield from _mask_refusals(spec, release)
    if spec.sinks and not release.sinks:
        yield Refusal("sinks", True, "this release ignores sinks", _NEWER_THAN_2025)


def _type_refusals(spec: AttentionSpec, release: Release, device: str) -> Iterator[Refusal]:
    by_dtype = _CPU_CACHES if device == "CPU" else _GPU_CACHES
    caches, stored = by_dtype.get(spec.dtype), spec.kv_cache_dtype
    if caches is None:
        yield Refusal("dtype", spec.dtype, f"needs {', '.join(by_dtype)}", _OTHER)
        return
    packed = stored.startswith("uint")
    if stored not in caches:
        accepts = f"with dtype={spec.dtype} it stores {', '.join(caches)}"
        yield Refusal("kv_cache_dtype", stored, accepts, f"Ask for {caches[0]}")
    elif packed and not release.reads_only:
        accepts = "this release cannot leave a cache as it is, and rewriting would round again"
        yield Refusal("kv_cache_dtype", stored, accepts, _NEWER)
    elif stored == "float16" and not release.float16_exact:
        yield Refusal("kv_cache_dtype", stored, "this release does not round to nearest", _NEWER)
    if spec.dtype == "bfloat16" and device == "CPU" and not cpu_flags() & {"avx512_bf16", "amx_bf16"}:
        # OpenVINO lists BF16 among its capabilities there too, and then crashes.
        accepts = "this processor has neither avx512_bf16 nor amx_bf16"
        yield Refusal("dtype", "bfloat16", accepts, "Ask for float32")
    if packed and spec.head_size > _PACKED_RATIO * spec.value_head_size:
        least = -(-spec.head_size // _PACKED_RATIO)
        accepts = f"a {stored} cache with head_size={spec.head_size} needs {least}: the op corrupts memory"
        yield Refusal("value_head_size", spec.value_head_size, accepts, f"Ask for kv_cache_dtype={spec.dtype}")
    even = "bfloat16" if spec.dtype == "bfloat16" else "a uint4 cache" if stored == "uint4" else ""
    for field in ("head_size", "value_head_size"):
        size = getattr(spec, field)
        if not _MIN_HEAD <= size <= _MAX_HEAD:
            yield Refusal(field, size, f"{_MIN_HEAD} to {_MAX_HEAD} were measured", _OTHER)
        elif even and size % 2:
            yield Refusal(field, size, f"odd sizes give NaN in {even}", "Ask for float32")


def _mask_refusals(spec: AttentionSpec, release: Release) -> Iterator[Refusal]:
    if spec.has_window and not release.window:
        yield Refusal("window", spec.window, "this release's window is one token off", _NEWER_THAN_2025)
    if spec.has_window and spec.alibi:
        yield Refusal("window", spec.window, "with a window the op drops ALiBi", _OTHER)
    if not spec.causal and spec.has_window:
        yield Refusal("window", spec.window, "windows are for causal layers: the op would ignore it", _OTHER)
    if not (spec.causal or spec.sees_every_key or release.token_types):
        yield Refusal("causal", False, "this release ignores token types, which make tokens see ahead", _NEWER)
    if not spec.causal and spec.alibi:
        accepts = "the op's bias has a sign: tokens ahead would be favoured"
        yield Refusal("alibi", True, accepts, "Ask for causal=True, or another backend")
