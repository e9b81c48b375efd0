"""`Program`: the op, compiled. One per heads, types and features, shared by every layer that has those.

This module imports OpenVINO: only what computes may import it.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino.op import _PagedAttentionExtension as PagedAttentionOp

from attn_dispatch.contract.dtypes import numpy_dtype
from attn_dispatch.errors import BackendLoadError

from .fork_safety import fork_safe_lock
from .releases import INPUTS, Target, known_releases

__all__ = ["ELEMENT", "MOST_PROGRAMS", "Program", "ProgramKey", "compiled", "core"]

MOST_PROGRAMS = 32
"""Compiled programs that are kept (2 MB each): the least recently used goes, unless a cache's request still has it."""

ELEMENT: dict[str, Any] = {
    "float32": ov.Type.f32,
    "float16": ov.Type.f16,
    "bfloat16": ov.Type.bf16,
    "uint8": ov.Type.u8,
    "uint4": ov.Type.u4,
}
_PRECISION = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "uint8": "u8", "uint4": "u4"}
_INDEX_INPUTS = ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins")
_compiling = fork_safe_lock()


class ProgramKey(NamedTuple):
    """What a program depends on. Everything else (scale, window, slopes, sinks) is an input on the CPU.

    Attributes:
        writes: the op writes new keys and values into the cache.
        constants: (scale, window, slopes, sinks) of one layer, for devices that want them in the model.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    value_head_size: int
    dtype: str
    cache_dtype: str
    alibi: bool
    sinks: bool
    token_types: bool
    tree: bool
    writes: bool
    target: Target
    constants: tuple[float, int, tuple[float, ...] | None, tuple[float, ...] | None] | None = None


class Program:
    """The op, compiled.

    Attributes:
        key: what it was compiled for.
        inputs: index of each input by name.
    """

    def __init__(self, key: ProgramKey) -> None:
        self.key = key
        self._compiled = core().compile_model(_model(key), key.target.device, _options(key))
        self.inputs = {port.any_name: i for i, port in enumerate(self._compiled.inputs)}
        # Compiling chooses the cache's type, and rewrites it without a word where it does not like the one asked for.
        for name in ("key_cache", "value_cache"):
            element = self._compiled.inputs[self.inputs[name]].element_type
            if element != ELEMENT[key.cache_dtype]:
                raise BackendLoadError(
                    f"OpenVINO {ov.__version__} compiled a cache of {element.get_type_name()} where "
                    f"{key.cache_dtype} was asked for (dtype={key.dtype})"
                )

    def new_request(self) -> Any:
        """Return a new `openvino.InferRequest`: one caller at a time, its tensors stay bound."""
        return self._compiled.create_infer_request()

    def property(self, name: str) -> Any:
        """Return what OpenVINO understood of a compile option."""
        return self._compiled.get_property(name)


@cache
def core() -> Any:
    """Return the process's OpenVINO runtime."""
    return ov.Core()


def compiled(key: ProgramKey) -> Program:
    """Return the program of a key, compiled when first asked (30 to 140 ms).

    Raises:
        BackendLoadError: the installed release's op is not the one that was measured.
    """
    with _compiling:
        return _compiled(key)


_compiled = lru_cache(maxsize=MOST_PROGRAMS)(Program)


def _model(key: ProgramKey) -> Any:
    parameters: dict[str, Any] = {}

    def parameter(name: str, shape: list[int], element: Any) -> Any:
        node = ops.parameter(shape, element)
        node.set_friendly_name(name)
        node.output(0).get_tensor().set_names({name})
        parameters[name] = node
        return node

    nodes = _nodes(key, parameter)
    try:
        op = PagedAttentionOp([nodes[name].output(0) for name in INPUTS[: key.target.release.inputs]])
    except RuntimeError as error:
        raise BackendLoadError(
            f"OpenVINO {ov.__version__}: its paged attention does not take the {key.target.release.inputs} inputs that "
            f"this adapter knows of it ({str(error).strip().splitlines()[-1]}). Releases that are known: "
            f"{known_releases()}. pip install one of them"
        ) from error
    sizes = op.get_rt_info()
    sizes["num_k_heads"] = sizes["num_v_heads"] = key.num_kv_heads
    sizes["k_head_size"], sizes["v_head_size"] = key.head_size, key.value_head_size
    if not key.writes and key.target.release.reads_only:
        op.set_attribute("write_kv_cache", False)
    return ov.Model([op.output(0)], list(parameters.values()), "paged_attention")


def _nodes(key: ProgramKey, parameter: Any) -> dict[str, Any]:
    """Return a node for every input that any release has; an older one does not look at those that it lacks."""

    def constant(value: Any, dtype: type[np.generic]) -> Any:
        return ops.constant(np.asarray(value, dtype))

    def off(dtype: type[np.generic]) -> Any:
        return constant(np.zeros(0, dtype), dtype)

    heads, element = key.num_heads, ELEMENT[key.dtype]
    nodes = {
        "q": parameter("q", [-1, heads * key.head_size], element),
        "k": parameter("k", [-1, key.num_kv_heads * key.head_size], element),
        "v": parameter("v", [-1, key.num_kv_heads * key.value_head_size], element),
        # The caches' own types are the compiler's to fill in, by the options.
        "key_cache": parameter("key_cache", [-1] * 4, ov.Type.dynamic),
        "value_cache": parameter("value_cache", [-1] * 4, ov.Type.dynamic),
        **{name: parameter(name, [-1], ov.Type.i32) for name in _INDEX_INPUTS},
        "max_context_len": parameter("max_context_len", [], ov.Type.i32),
        "alibi_slopes": off(np.float32),
        "score_aggregation_window": off(np.int32),
        "rotated_block_indices": off(np.int32),
        "rotation_deltas": off(np.int32),
        "rotation_trig_lut": off(np.float32),
        "xattention_threshold": off(np.float32),
        "xattention_block_size": constant(64, np.int32),
        "xattention_stride": constant(8, np.int32),
        "sinks": off(np.float32),
        "adaptive_rkv_start_size": constant(0, np.int32),
        "adaptive_rkv_evictable_sizes": off(np.int32),
        "adaptive_rkv_diversity_block_set_indices": off(np.int32),
        "adaptive_rkv_diversity_block_set_indices_begins": off(np.int32),
        "token_type_ids": parameter("token_type_ids", [-1], ov.Type.i32) if key.token_types else off(np.int32),
        "qq_bias": parameter("qq_bias", [-1], ov.Type.u8) if key.tree else off(np.uint8),
        "qq_bias_begins": parameter("qq_bias_begins", [-1], ov.Type.i32) if key.tree else off(np.int32),
    }
    if key.constants is not None:
        scale, window, slopes, sinks = key.constants
        nodes |= {"scale": constant(scale, np.float32), "sliding_window": constant(window, np.int32)}
        if slopes is not None:
            nodes["alibi_slopes"] = constant(slopes, np.float32)
        if sinks is not None:
            nodes["sinks"] = constant(np.reshape(sinks, (1, heads, 1, 1)), np.float32)
        return nodes
    nodes |= {
        "scale": parameter("scale", [], ov.Type.f32),
        "sliding_window": parameter("sliding_window", [], ov.Type.i32),
    }
    if key.alibi:
        nodes["alibi_slopes"] = parameter("alibi_slopes", [-1], ov.Type.f32)
    if key.sinks:
        nodes["sinks"] = parameter("sinks", [1, heads, 1, 1], ov.Type.f32)
    return nodes


def _options(key: ProgramKey) -> dict[str, Any]:
    # Both precisions are always given: by default OpenVINO stores float32 models' caches as u8, and computes in bf16.
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "bf16" if key.dtype == "bfloat16" else "f32",
        "KV_CACHE_PRECISION": _PRECISION[key.cache_dtype],
    }
    if key.target.device != "CPU":
        options["INFERENCE_PRECISION_HINT"] = _PRECISION[key.dtype]
        return options
    options["ENABLE_CPU_PINNING"] = False  # on a shared machine, pinned threads cost 5x
    options["INFERENCE_NUM_THREADS"] = key.target.threads
    if numpy_dtype(key.cache_dtype).kind == "u":
        options["KEY_CACHE_QUANT_MODE"] = "BY_TOKEN"
    return options
