"""The kernel's route as far as it goes without a TPU: its program is lowered and compared, and not executed."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
import torch_xla
from torch_xla.experimental import custom_kernel
from torch_xla.experimental.pallas_kernels.ragged_paged_attention_v2 import ragged_paged_attention

import attn_dispatch as ad
from attn_dispatch.adapters.torch.layer_tensors import LayerTensors
from attn_dispatch_torch_xla.ragged_call import arguments

SPEC = ad.AttentionSpec(
    num_heads=8, num_kv_heads=4, head_size=64, dtype="bfloat16", window=(31, 0), logits_soft_cap=20.0
)
BATCH = ad.AttentionMetadata.build([1, 20], [50, 20], [[3, 1], [5]])


class LoweredForTpu:
    """`jax.jit` of a function that is lowered for a TPU, which torch_xla expects to be JAX's device."""

    def __init__(self, function: Any, **keywords: Any) -> None:
        self._jitted = _jit(function, **keywords)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._jitted(*arguments, **keywords)

    def lower(self, *arguments: Any, **keywords: Any) -> Any:
        return self._jitted.trace(*arguments, **keywords).lower(lowering_platforms=("tpu",))


_jit = jax.jit


def program(spec: ad.AttentionSpec, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the XLA program of a step's attention with the kernel in it."""
    attn = ad.attention(spec, "torch_xla/ragged")
    pages = attn.allocate(8).arrays["pages"]
    q = torch.zeros(21, spec.num_heads, spec.head_size, dtype=getattr(torch, spec.dtype), device=pages.device)
    layer = LayerTensors.of(attn.parameters, pages.device)
    positional, named = arguments(attn.plan(BATCH), q, pages, layer, use_kernel=True)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(jax, "jit", LoweredForTpu)
        out = custom_kernel.ragged_paged_attention(*positional, **named)
    return str(torch_xla._XLAC._get_xla_tensors_hlo([out]))


def kernel_of(text: str) -> str:
    """Return the kernel that a program calls, serialised."""
    found = re.search(r'custom_call_target="tpu_custom_call".*?"body": ?"([^"]+)"', text)
    assert found is not None
    return found[1]


def test_the_program_calls_the_kernel_on_padded_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    (call,) = [line for line in program(SPEC, monkeypatch).splitlines() if "tpu_custom_call" in line]
    # lengths, block table, starts, the kernel's state, sequences, queries, pages
    for shape in ("s32[8]", "s32[8,8]", "s32[9]", "s32[2]", "s32[1]", "bf16[32,8,128]", "bf16[8,32,8,128]"):
        assert shape in call
    assert re.search(r"= bf16\[32,8,128\]\S* custom-call", call)


def test_the_kernel_is_the_one_that_its_arguments_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What arrives in the program is the kernel traced with the spec's numbers, written out here."""
    sizes = ((32, 8, 128), (8, 32, 8, 128), (8,), (8, 8), (9,), (1,))
    types = (jnp.bfloat16, jnp.bfloat16, *[jnp.int32] * 4)
    named = {
        "sm_scale": 0.125, "sliding_window": 32, "soft_cap": 20.0, "mask_value": custom_kernel.DEFAULT_MASK_VALUE,
        "k_scale": None, "v_scale": None, "num_kv_pages_per_block": 8, "num_queries_per_block": 32,
        "vmem_limit_bytes": 120 << 20,
    }  # fmt: skip
    shapes = [jax.ShapeDtypeStruct(size, kind) for size, kind in zip(sizes, types, strict=True)]
    lowered = jax.jit(partial(ragged_paged_attention, **named)).trace(*shapes).lower(lowering_platforms=("tpu",))
    expected = custom_kernel._extract_backend_config(lowered.compiler_ir())
    assert kernel_of(program(SPEC, monkeypatch)) in expected


@pytest.mark.parametrize(
    "change", [{"window": (32, 0)}, {"logits_soft_cap": 21.0}, {"scale": 0.126}, {"logits_soft_cap": None}]
)
def test_another_layer_gets_another_kernel(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_of(program(replace(SPEC, **change), monkeypatch)) != kernel_of(program(SPEC, monkeypatch))


def test_without_a_tpu_the_kernel_is_no_silent_fallback() -> None:
    attn = ad.attention(SPEC, "torch_xla/ragged")
    pages = attn.allocate(8).arrays["pages"]
    q = torch.zeros(21, 8, 64, dtype=torch.bfloat16, device=pages.device)
    layer = LayerTensors.of(attn.parameters, pages.device)
    positional, named = arguments(attn.plan(BATCH), q, pages, layer, use_kernel=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="interpret"):
        custom_kernel.ragged_paged_attention(*positional, **named)
