"""The kit over everything but the vendors' calls: batches cut, brought over and written by this package's own code.

The call in the middle is attention in plain PyTorch, on the CPU, by the step's own tensors: it stands for no vendor and
is no evidence of one. What it shows is that what surrounds a call is right: writes, padding, sinks, outputs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attn_dispatch as ad
from attn_dispatch.backend import Availability, Refusal, Verdict
from attn_dispatch.conformance import BackendConformance
from attn_dispatch.contract import AttentionSpec
from attn_dispatch_rocm.calls import Call
from attn_dispatch_rocm.paged import PagedRocmBackend
from attn_dispatch_rocm.step import RocmPlan, Step


class ByTables(Call):
    """Attention in float32, one sequence after the other, over block tables."""

    def arguments(self, step: Any, *arrays: Any, **named: Any) -> Any:
        return {}

    def keys(self, step: Any, key: torch.Tensor, s: int, length: int) -> torch.Tensor:
        if not step.paged:
            first = int(step.batch.first_row[s])
            return key[first : first + length]
        return key[step.tables[s].long()].flatten(0, 1)[:length]

    def attend(
        self, step: Any, q: Any, key: Any, value: Any, owned: Any, out: Any, *, lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        spec: AttentionSpec = step.spec
        result, found = out.fill_(torch.nan), torch.full((len(q), spec.num_heads), torch.nan)
        start = step.query_start.tolist()
        for s, length in enumerate(step.lens.tolist()):
            rows = slice(*start[s : s + 2])
            keys, values = (self.keys(step, x, s, length).float() for x in (key, value))
            keys = keys * (1 if owned.k_scale is None else owned.k_scale)
            values = values * (1 if owned.v_scale is None else owned.v_scale)
            keys, values = (x.repeat_interleave(spec.group_size, 1) for x in (keys, values))
            scores = torch.einsum("qhd,khd->hqk", q[rows].float(), keys) * spec.scale
            if spec.logits_soft_cap is not None:
                scores = spec.logits_soft_cap * torch.tanh(scores / spec.logits_soft_cap)
            ahead = torch.arange(len(keys)) - (torch.arange(rows.stop - rows.start)[:, None] + len(keys))
            ahead = ahead + (rows.stop - rows.start)
            left, right = spec.window
            hidden = (ahead > 0) & spec.causal
            hidden |= (ahead < -left) & (left >= 0)
            hidden |= (ahead > right) & (right >= 0)
            scores = scores.masked_fill(hidden, -torch.inf)
            found[rows] = scores.logsumexp(-1).T
            result[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(q.dtype)
        return result, found if lse else None


class ByPlaces(ByTables):
    """The same over lists of tokens, as AITER's batch prefill is told them."""

    spare = 256

    def keys(self, step: Any, key: torch.Tensor, s: int, length: int) -> torch.Tensor:
        flat = key.flatten(0, 1) if step.paged else key
        first = int(step.key_start[s])
        return flat[step.places[first : first + length].long()]


class Plain(PagedRocmBackend):
    device_type = "cpu"

    def __init__(self, name: str, call: Call) -> None:
        super().__init__(name)
        self.call = call

    def default_device(self) -> torch.device:
        return torch.device("cpu")

    def probe(self) -> Availability:
        return Availability(True, "PyTorch on the CPU, in this test", evidence="simulated on CPU")

    def verdict(self, spec: AttentionSpec) -> Verdict:
        if spec.kv_cache_dtype in ("uint8", "uint4", "int8", "float64") or spec.dtype == "float64" or spec.alibi:
            return self.refuse(Refusal("kv_cache_dtype", spec.kv_cache_dtype, "this test's types"))
        return self.accept()

    def step(self, spec: Any, plan: RocmPlan, device: Any, *, paged: bool) -> Step:
        return Step(spec, plan.view, device, paged=paged, choose=lambda batch: self.call, tile=64)


class TestTables(BackendConformance):
    backend = Plain("test/tables", ByTables())


class TestPlaces(BackendConformance):
    backend = Plain("test/places", ByPlaces())
    examples = 20


def test_an_output_that_is_given_is_the_one_returned() -> None:
    backend = Plain("test/out", ByTables())
    attn = ad.attention(ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, dtype="float32"), backend)
    plan = attn.plan(ad.AttentionMetadata.build([1, 9], [40, 9], [[1, 0], [2]]))
    inputs = [torch.randn(10, n, 64) for n in (4, 2, 2)]
    expected = attn.run(plan, *inputs, attn.allocate(3))
    for given in (torch.empty(10, 4, 64), torch.empty(4, 10, 64).transpose(0, 1)):
        assert attn.run(plan, *inputs, attn.allocate(3), given) is given
        assert torch.equal(given, expected)


def test_arrays_elsewhere_are_refused_before_anything_is_written() -> None:
    backend = Plain("test/where", ByTables())
    attn = ad.attention(ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, dtype="float32"), backend)
    cache, plan = attn.allocate(1), attn.plan(ad.AttentionMetadata.build([1], [1], [[0]]))
    inputs = [torch.randn(1, n, 64) for n in (4, 2, 2)]
    with pytest.raises(ValueError, match="meta"):
        attn.run(plan, inputs[0], inputs[1], inputs[2].to("meta"), cache)
    with pytest.raises(ValueError, match="meta"):
        attn.run(plan, inputs[0].to("meta"), inputs[1], inputs[2], cache)
    assert not cache.key.any()


def test_everything_comes_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan's tensors are views of one buffer."""
    backend = Plain("test/copy", ByPlaces())
    spec = ad.AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, dtype="float32", block_size=16)
    metadata = ad.AttentionMetadata.build(
        [1, 2], [0, 20], [[], [1, 0]], 16, slot_mapping=[-1, 2, -1]
    )  # fmt: skip
    step = backend.plan(spec, metadata).steps[torch.device("cpu"), True]
    assert step.idle is not None
    assert step.places is not None
    tensors = [step.query_start, step.lens, step.key_start, step.tables, step.places, step.idle]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
