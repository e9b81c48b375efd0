"""FlashInfer's merge: when it is taken, and what goes in and out of it, with its documented formula in its place."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import attn_dispatch as ad
from attn_dispatch.errors import ArrayError
from attn_dispatch_cuda.flashinfer import FlashInferBackend, mergeable

State = tuple[torch.Tensor, torch.Tensor]


def states(count: int, rows: int = 5, size: int = 64, device: str = "cpu") -> list[State]:
    made = []
    for i in range(count):
        torch.manual_seed(i)
        made.append((torch.randn(rows, 8, size).to(device, torch.bfloat16), 3 * torch.randn(rows, 8).to(device)))
    return made


def on_a_gpu(
    count: int = 2,
    shape: tuple[int, int, int] = (5, 8, 64),
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
) -> list[State]:
    """Tensors without memory, of a GPU that is not here."""
    return [
        (torch.empty(shape, dtype=dtype, device=device), torch.empty(shape[:2], device=device)) for _ in range(count)
    ]


def test_what_its_kernels_do_not_take_is_merged_by_the_core() -> None:
    """Without a GPU that is everything."""
    backend = FlashInferBackend("x/infer")
    given = states(3)
    assert not mergeable(given)
    for found, expected in zip(backend.merge_states(given), ad.merge_states(given), strict=True):
        assert torch.equal(found, expected)
    arrays = [(out.float().numpy(), lse.numpy()) for out, lse in given]
    assert isinstance(backend.merge_states(arrays)[0], np.ndarray)
    with pytest.raises(ArrayError):
        backend.merge_states([])


@pytest.mark.parametrize(
    ("fields", "taken"),
    [
        ({}, True),
        ({"count": 7, "shape": (1, 64, 128)}, True),
        ({"dtype": torch.float16, "shape": (9, 32, 256)}, True),
        ({"count": 1}, False),
        ({"dtype": torch.float32}, False),
        ({"shape": (0, 8, 64)}, False),
        ({"shape": (5, 8, 96)}, False),
        ({"shape": (5, 65, 128)}, False),
        ({"shape": (5, 33, 256)}, False),
        ({"device": "cpu"}, False),
    ],
    ids=str,
)
def test_what_its_kernels_take(fields: dict[str, Any], taken: bool) -> None:
    with FakeTensorMode():
        assert mergeable(on_a_gpu(**fields)) is taken


def test_states_that_differ_are_left_to_the_core_which_refuses_them() -> None:
    with FakeTensorMode():
        first, (out, lse) = on_a_gpu()
        others = [
            *(on_a_gpu(**fields)[0] for fields in ({"shape": (4, 8, 64)}, {"dtype": torch.float16})),
            *(on_a_gpu(device=device)[0] for device in ("cuda:1", "cpu")),
            (out, on_a_gpu(device="cuda:1")[0][1]),
            (out, torch.empty(5, 8, dtype=torch.float64, device="cuda")),
            (out, torch.empty(8, 5, device="cuda")),
            (out, torch.empty(5, device="cuda")),
        ]
        assert mergeable([first, (out, lse)])
        assert not any(mergeable([first, other]) or mergeable([other, first]) for other in others)
        assert not mergeable([(out.requires_grad_(), lse), first])


@pytest.fixture
def formula(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the vendor documents, in float64; what it is given must be what its real functions and kernels take."""
    vendor = pytest.importorskip("flashinfer", reason="not run: flashinfer is not installed")
    called = []

    def by_formula(name: str, outs: torch.Tensor, lses: torch.Tensor) -> State:
        called.append(name)
        assert lses.dtype == torch.float32
        weights, wide = torch.exp2(lses.double()), outs.double()
        total = weights.sum(1)
        scaled = torch.where(total[:, None] > 0, weights / total[:, None], 0)
        return (wide * scaled[..., None]).sum(1).to(outs.dtype), torch.log2(total).float()

    def bound(real: Any, *given: torch.Tensor) -> list[torch.Tensor]:
        found = list(inspect.signature(real).bind(*given).arguments.values())
        assert all(array.is_contiguous() for array in found)
        return found

    real_two, real_many = vendor.merge_state, vendor.merge_states

    def two(*given: torch.Tensor) -> State:
        v_a, s_a, v_b, s_b = bound(real_two, *given)
        return by_formula("merge_state", torch.stack([v_a, v_b], 1), torch.stack([s_a, s_b], 1))

    def many(*given: torch.Tensor) -> State:
        return by_formula("merge_states", *bound(real_many, *given))

    monkeypatch.setattr(vendor, "merge_state", two)
    monkeypatch.setattr(vendor, "merge_states", many)
    return called


@pytest.mark.interface
@pytest.mark.parametrize("count", [2, 3, 6])
def test_natural_in_natural_out(formula: list[str], count: int) -> None:
    from attn_dispatch_cuda.flashinfer_call import merge

    given = states(count)
    given[0] = (given[0][0].transpose(0, 1).contiguous().transpose(0, 1), given[0][1].T.contiguous().T)
    for s, (out, lse) in enumerate(given):
        # Row 0 attends to nothing in any part, row 1 only in the last one.
        nothing = 1 if s == count - 1 else 2
        out[:nothing], lse[:nothing] = 0, -torch.inf
    before = [(out.clone(), lse.clone()) for out, lse in given]
    found, lse = merge(given)
    assert formula == ["merge_state" if count == 2 else "merge_states"]
    expected, expected_lse = ad.merge_states([(out.double(), lse.double()) for out, lse in given])
    assert (found.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(found.double(), expected, atol=2e-3, rtol=2**-8)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-6, rtol=1e-6)
    assert not found[0].any()
    assert torch.isneginf(lse[0]).all()
    assert torch.equal(found[1], given[-1][0][1])
    assert torch.isfinite(lse[1:]).all()
    for (out, lse), (out_before, lse_before) in zip(given, before, strict=True):
        assert torch.equal(out, out_before)
        assert torch.equal(lse, lse_before)


@pytest.mark.interface
def test_the_kernels_are_of_base_2_and_keep_rows_that_attended_to_nothing() -> None:
    """By the header that they are compiled from: two empty parts would otherwise be (-inf) - (-inf)."""
    vendor = pytest.importorskip("flashinfer", reason="not run: flashinfer is not installed")
    folder = vendor.__path__[0] + "/data/include/flashinfer/attention/"
    with open(folder + "cascade.cuh") as file:
        text = " ".join(file.read().split())
    two = text[text.index("void MergeStateKernel(") :]
    for words in (
        "math::ptx_exp2(max(s_a_val - s_max, -math::inf))",
        "(d_sum > 0.f) ? s_a_val / d_sum : 0.f",
        "math::ptx_log2(d_sum) + s_max",
    ):
        assert words in two[:1500], words
    assert "uint32_t bdx = HEAD_DIM / vec_size; uint32_t bdy = num_heads;" in text
    with open(folder + "state.cuh") as file:
        text = " ".join(file.read().split())
    for words in ("math::ptx_exp2(max(m_prev - m, -math::inf))", "(d > 0.f) ? __fdividef(1.f, d) : 0.f"):
        assert words in text, words


@pytest.mark.parametrize("count", [2, 5])
def test_on_a_gpu_it_is_the_cores(count: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("not run: needs nvidia")
    pytest.importorskip("flashinfer", reason="not run: flashinfer is not installed")
    given = states(count, rows=300, size=128, device="cuda")
    for out, lse in given:
        out[:2], lse[:2] = 0, -torch.inf
    assert mergeable(given)
    found, lse = FlashInferBackend("x/infer").merge_states(given)
    expected, expected_lse = ad.merge_states(given)
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)
    assert not found[:2].any()
