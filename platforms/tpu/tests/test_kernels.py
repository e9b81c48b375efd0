"""What a step's program asks of the hardware."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch_tpu import programs
from attn_dispatch_tpu.pallas_call import program


def program_text(dtype: str) -> str:
    """Return a step's program in words, the kernel's own included."""
    spec = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=128, dtype=dtype)
    attn = ad.attention(spec, "tpu/pallas")
    plan = attn.plan(ad.AttentionMetadata.build([1], [40], [[0, 1]]))
    rows = [jnp.zeros((plan.options.batch.tokens, h, 128), dtype) for h in (4, 2, 2)]  # type: ignore[attr-defined]
    pages, numbers = attn.allocate(4).arrays["pages"], np.ones(6, np.float32)
    closed = jax.make_jaxpr(lambda *a: programs.attend_and_write(*a, options=plan.options))(  # type: ignore[attr-defined]
        pages,
        *rows,
        plan.batch,
        numbers,  # type: ignore[attr-defined]
    )
    return str(closed)


def test_float32_is_multiplied_as_float32() -> None:
    """Left to itself the hardware rounds float32 operands to bfloat16."""
    words = program_text("float32")
    assert "ragged_paged_attention_kernel" in words
    assert words.count("dot_general") == words.count("HIGHEST") // 2 > 0  # of both operands


def test_bfloat16_is_left_to_the_hardware() -> None:
    words = program_text("bfloat16")
    assert "dot_general" in words
    assert "HIGHEST" not in words


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
def test_scales_of_another_layer_need_no_other_program(dtype: str) -> None:
    spec = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, kv_cache_dtype=dtype)
    batch = ad.AttentionMetadata.build([1], [40], [[0, 1]])
    q, k, v = (jnp.ones((1, h, 64), jnp.bfloat16) for h in (4, 2, 2))
    compiled = []
    for scale in (0.5, 0.25, 0.125):
        attn = ad.attention(spec, "tpu/pallas", k_scale=scale, v_scale=2 * scale)
        attn.run(attn.plan(batch), q, k, v, attn.allocate(4))
        compiled.append(program("attend_and_write", "simulated")._cache_size())
    assert compiled[0] == compiled[1] == compiled[2]
