"""Arrays of torch and JAX: the same memory, bf16 included; strided inputs and caches."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch.reference import ReferenceBackend

SPEC = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64)


def inputs(seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """A batch of a prefill and a decode, its q, k and v."""
    rng = np.random.default_rng(seed)
    batch = ad.AttentionMetadata.build([40, 1], [40, 1], [[3, 1], [0]])
    q, k, v = (rng.standard_normal((41, heads, 64)).astype(ml_dtypes.bfloat16) for heads in (4, 2, 2))
    return batch, q, k, v


def expected(seed: int = 0) -> Any:
    """What NumPy arrays give."""
    batch, q, k, v = inputs(seed)
    attn = ad.attention(SPEC, backend="cpu/numba")
    return attn.run(attn.plan(batch), q, k, v, attn.allocate(4))


def test_torch_writes_into_its_own_output() -> None:
    torch = pytest.importorskip("torch")
    batch, *arrays = inputs()
    q, k, v = (torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) for x in arrays)
    attn = ad.attention(SPEC, backend="cpu/numba")
    cache = attn.allocate(4)
    out = torch.zeros_like(q)
    threads = torch.get_num_threads()
    result = attn.run(attn.plan(batch), q, k, v, cache, out)
    assert result is out
    assert torch.get_num_threads() == threads
    assert np.array_equal(out.view(torch.int16).numpy(), expected().view(np.int16))
    fresh = attn.run(attn.plan(batch), q, k, v, cache)
    assert fresh.dtype == torch.bfloat16
    # The same memory: what torch writes into its view, the cache holds.
    view = cache.arrays_as("torch")["key"]
    assert view.data_ptr() == cache.key.ctypes.data


def test_torch_in_any_strides() -> None:
    """Views of one fused array, rows whose elements are not side by side, an output that is a view, a parameter."""
    torch = pytest.importorskip("torch")
    batch, *arrays = inputs()
    q, k, v = (torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) for x in arrays)
    fused = torch.cat([q, k, v], dim=1)
    attn = ad.attention(SPEC, backend="cpu/numba")
    plan = attn.plan(batch)
    given = [
        (fused[:, :4], fused[:, 4:6], fused[:, 6:]),
        tuple(torch.cat([x, x], dim=2)[:, :, ::2] * 0 + x.repeat_interleave(2, dim=2)[:, :, ::2] for x in (q, k, v)),
        tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)),
        (torch.nn.Parameter(q), k, v),
    ]
    for views in given:
        room = torch.zeros(41, 4, 128, dtype=torch.bfloat16)
        for out in (None, room[:, :, :64], room[:, :, ::2]):
            got = attn.run(plan, *views, attn.allocate(4), out)
            assert out is None or got is out or (views[0].requires_grad and got.data_ptr() == out.data_ptr())
            assert np.array_equal(got.detach().contiguous().view(torch.int16).numpy(), expected().view(np.int16))


def test_torch_encoder_and_lse() -> None:
    torch = pytest.importorskip("torch")
    spec = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, kind="encoder", causal=False, returns_lse=True)
    batch, *arrays = inputs()
    attn = ad.attention(spec, backend="cpu/numba")
    plan = attn.plan(batch)
    out, lse = attn.run(plan, *arrays, None, return_lse=True)
    tensors = [torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) for x in arrays]
    got, got_lse = attn.run(plan, *tensors, None, return_lse=True)
    assert got_lse.dtype == torch.float32
    assert np.array_equal(got.view(torch.int16).numpy(), out.view(np.int16))
    assert np.array_equal(got_lse.numpy(), lse)


def test_tensors_on_a_device_are_refused() -> None:
    torch = pytest.importorskip("torch")
    batch, *arrays = inputs()
    attn = ad.attention(SPEC, backend="cpu/numba")
    q, k, v = (torch.empty(x.shape, dtype=torch.bfloat16, device="meta") for x in arrays)
    with pytest.raises(ad.errors.ArrayError, match="an array on meta cannot be read as host memory"):
        attn.run(attn.plan(batch), q, k, v, attn.allocate(4))


def test_jax() -> None:
    jnp = pytest.importorskip("jax.numpy")
    batch, *arrays = inputs()
    attn = ad.attention(SPEC, backend="cpu/numba")
    result = attn.run(attn.plan(batch), *(jnp.asarray(x) for x in arrays), attn.allocate(4))
    assert np.array_equal(np.asarray(result).view(np.int16), expected().view(np.int16))


def test_slices_of_one_projection() -> None:
    """q, k and v as views of one fused array, tokens not next to each other."""
    batch, q, k, v = inputs()
    fused = np.concatenate([q, k, v], axis=1)
    attn = ad.attention(SPEC, backend="cpu/numba")
    got = attn.run(attn.plan(batch), fused[:, :4], fused[:, 4:6], fused[:, 6:], attn.allocate(4))
    assert np.array_equal(got.view(np.int16), expected().view(np.int16))


def test_an_output_that_is_a_view() -> None:
    batch, q, k, v = inputs()
    attn = ad.attention(SPEC, backend="cpu/numba")
    for shape, pick in (((41, 6, 64), np.s_[:, 1:5]), ((41, 4, 128), np.s_[:, :, ::2])):
        room = np.zeros(shape, ml_dtypes.bfloat16)
        out = room[pick]
        assert attn.run(attn.plan(batch), q, k, v, attn.allocate(4), out) is out
        assert np.array_equal(np.ascontiguousarray(out).view(np.int16), expected().view(np.int16))
        untouched = room.copy()
        untouched[pick] = 0
        assert not untouched.any()


def test_a_cache_of_another_backend_with_the_same_layout() -> None:
    """Prefill by the reference, decode here, one cache."""
    rng = np.random.default_rng(3)
    there, here = ad.attention(SPEC, backend=ReferenceBackend()), ad.attention(SPEC, backend="cpu/numba")
    cache = there.allocate(4)
    batch, q, k, v = inputs()
    there.run(there.plan(batch), q, k, v, cache)
    step = ad.AttentionMetadata.build([1, 1], [41, 2], [[3, 1], [0]])
    q, k, v = (rng.standard_normal((2, heads, 64)).astype(ml_dtypes.bfloat16) for heads in (4, 2, 2))
    got = here.run(here.plan(step), q, k, v, cache).astype(np.float32)
    wanted = there.run(there.plan(step), q, k, v, cache).astype(np.float32)
    np.testing.assert_allclose(got, wanted, atol=0.02)
