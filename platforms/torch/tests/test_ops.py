"""The custom ops: what torch's own checker says of them, and a compiled layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import attn_dispatch as ad
from attn_dispatch.errors import AttentionDispatchError
from attn_dispatch_torch import ops

H, K, D, B = 4, 2, 16, 8


def step(seed: int = 0, blocks: int = 9) -> dict[str, Any]:
    torch.manual_seed(seed)
    batch = ad.AttentionMetadata.build([3, 1], [3, 20], [[4], [7, 0, 2]], B)
    return {
        "q": torch.randn(4, H, D),
        "k": torch.randn(4, K, D),
        "v": torch.randn(4, K, D),
        "key_cache": torch.randn(blocks, K, B, D),
        "value_cache": torch.randn(blocks, K, B, D),
        "query_start_loc": torch.from_numpy(batch.query_start_loc.copy()),
        "seq_lens": torch.from_numpy(batch.seq_lens.copy()),
        "block_table": torch.from_numpy(batch.block_table.copy()),
        "slot_mapping": torch.from_numpy(batch.slot_mapping.copy()),
        "scale": D**-0.5,
    }


EXTRAS = [
    {},
    {"window_left": 5, "window_right": 0},
    {"soft_cap": 1.5},
    {"sinks": torch.ones(H)},
    {"alibi_slopes": torch.ones(H)},
]


@pytest.mark.parametrize("extra", EXTRAS, ids=lambda extra: "+".join(extra) or "plain")
@pytest.mark.parametrize("op", [ops.paged_attention, ops.paged_attention_lse], ids=["out", "lse"])
def test_opcheck(op: Any, extra: dict[str, Any]) -> None:
    torch.library.opcheck(op, (), step() | extra)


def test_it_computes_what_the_backend_does() -> None:
    given = step()
    spec = ad.AttentionSpec(num_heads=H, num_kv_heads=K, head_size=D, dtype="float32", block_size=B)
    attn = ad.attention(spec, "torch/sdpa")
    cache = attn.allocate(9)
    cache.key.copy_(given["key_cache"])
    cache.value.copy_(given["value_cache"])
    plan = attn.plan(ad.AttentionMetadata.build([3, 1], [3, 20], [[4], [7, 0, 2]], B))
    out, lse = attn.run(plan, given["q"], given["k"], given["v"], cache, return_lse=True)
    found, found_lse = ops.paged_attention_lse(**given)
    assert torch.equal(found, out)
    assert torch.equal(found_lse, lse)
    assert torch.equal(given["key_cache"], cache.key)
    assert torch.equal(ops.paged_attention(**given), out)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(32, (H + 2 * K) * D)
        self.out = torch.nn.Linear(H * D, 32)

    def forward(self, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        q, k, v = self.qkv(x).split([H * D, K * D, K * D], dim=-1)
        rest = {name: value for name, value in given.items() if name not in ("q", "k", "v")}
        y = ops.paged_attention(q.view(-1, H, D), k.view(-1, K, D), v.view(-1, K, D), **rest)
        return self.out(y.flatten(1))


def test_compiled_without_graph_breaks() -> None:
    layer, x = Layer(), torch.randn(4, 32)
    eager, compiled = step(), step()
    with torch.no_grad():
        expected = layer(x, eager)
        found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, compiled)
    torch.testing.assert_close(found, expected)
    assert torch.equal(eager["key_cache"], compiled["key_cache"])


def test_bad_batches_write_nothing() -> None:
    outside = torch.tensor([[4, 0, 0], [7, 0, 90]], dtype=torch.int32)
    for change in ({"block_table": outside}, {"k": torch.randn(3, K, D)}):
        given = step() | change
        before = given["key_cache"].clone()
        with pytest.raises(AttentionDispatchError):
            ops.paged_attention(**given)
        assert torch.equal(before, given["key_cache"])


def test_a_batch_that_was_changed_in_place_is_planned_anew() -> None:
    given = step()
    first = ops.paged_attention(**given)
    given["seq_lens"][1] = 19
    given["slot_mapping"][3] = 2 * B + 2
    second = ops.paged_attention(**given)
    assert not torch.equal(first[3], second[3])
    assert np.isfinite(second.numpy()).all()


def test_a_batch_whose_memory_is_filled_anew_is_planned_anew() -> None:
    """As from NumPy, where torch sees no change; in inference mode, where it counts none."""
    lens = np.array([3, 20], np.int32)
    with torch.inference_mode():
        given = step() | {"seq_lens": torch.from_numpy(lens)}
        first = ops.paged_attention(**given)
        lens[1] = 19
        given["slot_mapping"][3] = 2 * B + 2
        second = ops.paged_attention(**given)
    assert not torch.equal(first[3], second[3])


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.int8])
def test_quantised_caches_and_a_layer_that_reads_them_alone(stored: torch.dtype) -> None:
    given = step() | {"k_scale": 0.03, "v_scale": 0.04}
    for name in ("key_cache", "value_cache"):
        given[name] = torch.zeros(given[name].shape, dtype=stored)
    out = ops.paged_attention(**given)
    assert given["key_cache"].view(torch.uint8).any()
    assert torch.equal(ops.paged_attention(**(given | {"k": None, "v": None})), out)
    if stored == torch.int8:  # the checker itself cannot compare fp8 tensors on a CPU
        torch.library.opcheck(ops.paged_attention, (), given)


def test_cross_attention() -> None:
    """Keys are an encoder's: written by the first step, read by the next."""
    given = step()
    given |= {
        "k": torch.randn(9, K, D),
        "v": torch.randn(9, K, D),
        "seq_lens": torch.tensor([9, 0], dtype=torch.int32),
        "block_table": torch.tensor([[5, 1], [0, 0]], dtype=torch.int32),
        "slot_mapping": torch.tensor([5 * B + i if i < B else B for i in range(9)]),
        "key_start_loc": torch.tensor([0, 9, 9], dtype=torch.int32),
        "causal": False,
    }
    out, lse = ops.paged_attention_lse(**given)
    direct, direct_lse = ops.ragged_attention_lse(
        given["q"], given["k"], given["v"], given["query_start_loc"], D**-0.5, key_start_loc=given["key_start_loc"]
    )
    torch.testing.assert_close(out, direct)
    torch.testing.assert_close(lse, direct_lse)
    assert not out[3].any()
    assert lse[3].isneginf().all()
    nothing = {"k": None, "v": None, "key_start_loc": torch.zeros(3, dtype=torch.int32)}
    nothing["slot_mapping"] = torch.zeros(0, dtype=torch.int64)
    assert torch.equal(ops.paged_attention(**(given | nothing)), out)


@pytest.mark.parametrize("op", [ops.ragged_attention, ops.ragged_attention_lse], ids=["out", "lse"])
@pytest.mark.parametrize("extra", EXTRAS, ids=lambda extra: "+".join(extra) or "plain")
def test_without_a_cache(op: Any, extra: dict[str, Any]) -> None:
    q, k, v = torch.randn(30, H, D), torch.randn(30, K, D), torch.randn(30, K, D)
    arguments = (q, k, v, torch.tensor([0, 1, 1, 30], dtype=torch.int32), D**-0.5)
    torch.library.opcheck(op, arguments, extra)
    if not extra:
        wide = [x[1:].transpose(0, 1)[None].repeat_interleave(H // x.shape[1], 1) for x in (q, k, v)]
        expected = torch.nn.functional.scaled_dot_product_attention(*wide)[0].transpose(0, 1)
        out = op(*arguments)
        torch.testing.assert_close((out[0] if isinstance(out, tuple) else out)[1:], expected)
