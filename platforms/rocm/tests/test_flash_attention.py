"""flash_attn's CK build without a GPU: verdicts beside the real package, calls against its sources."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import attn_dispatch as ad
from attn_dispatch_rocm.flash_attention import FlashAttentionBackend
from platforms.rocm.evidence.stubs import HostFlashAttention, stubbed

from .conftest import MakeMachine, real

FLASH = ("flash-attn",)
CPU = torch.device("cpu")

# A decode, a prompt, a chunk, padding, and a sequence that waits; and decodes alone.
BATCH = ad.AttentionMetadata.build([1, 9, 40, 3, 0], [70, 9, 300, 0, 5], [[3], [5], [0, 7, 2], [], [4]], 128)
DECODES = ad.AttentionMetadata.build([1, 1], [70, 9], [[3], [5]], 128)


def spec(**fields: Any) -> ad.AttentionSpec:
    plain = {"num_heads": 8, "num_kv_heads": 2, "head_size": 128, "dtype": "bfloat16", "block_size": 128}
    return ad.AttentionSpec(**(plain | fields))


@pytest.mark.parametrize(
    ("target", "fields", "refused"),
    [
        ("gfx942", {}, []),
        ("gfx90a", {"dtype": "float16"}, []),
        ("gfx950", {"block_size": 256}, []),
        ("gfx1100", {}, [""]),
        ("gfx942", {"block_size": 64}, ["block_size"]),
        ("gfx942", {"head_size": 100}, ["head_size"]),
        ("gfx942", {"head_size": 264}, ["head_size"]),
        ("gfx942", {"head_size": 72}, []),
        ("gfx942", {"value_head_size": 64}, ["value_head_size"]),
        ("gfx942", {"dtype": "float32"}, ["dtype"]),
        ("gfx942", {"kv_cache_dtype": "float8_e4m3fn"}, ["kv_cache_dtype"]),
        ("gfx942", {"logits_soft_cap": 5.0}, ["logits_soft_cap"]),
        ("gfx942", {"alibi": True}, []),
        ("gfx942", {"alibi": True, "returns_lse": True}, ["returns_lse"]),
        ("gfx942", {"alibi": True, "sinks": True}, ["sinks"]),
        ("gfx942", {"alibi": True, "sinks": True, "window": (9, 0)}, []),
        ("gfx942", {"alibi": True, "returns_lse": True, "causal": False}, []),
        ("gfx942", {"sinks": True, "returns_lse": True, "window": (9, 0)}, []),
        ("gfx942", {"causal": False, "window": (9, 3)}, []),
        ("gfx942", {"kind": "encoder", "window": (9, 3)}, []),
        ("gfx942", {"kind": "cross"}, []),
        ("gfx942", {"block_size": 16, "head_size": 20, "dtype": "float32"}, ["dtype", "block_size", "head_size"]),
    ],
    ids=str,
)
def test_verdicts(machine: MakeMachine, target: str, fields: dict[str, Any], refused: list[str]) -> None:
    verdict = FlashAttentionBackend("x/flash", machine(target, packages=FLASH)).verdict(spec(**fields))
    assert [refusal.field for refusal in verdict.refusals] == refused
    for refusal in verdict.refusals:
        assert refusal.accepts
        assert refusal.remedy
    if verdict:
        assert "never run on an AMD GPU" in verdict.note


def test_the_triton_build_is_refused_with_words(machine: MakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its variable, and where no compiled library is there; its real source says why (facts.py)."""
    here = machine("gfx942", packages=FLASH)
    monkeypatch.setenv("FLASH_ATTENTION_TRITON_AMD_ENABLE", "TRUE")
    backend = FlashAttentionBackend("x/y", here)
    assert "does not read it" in backend.probe().reason
    (refusal,) = backend.verdict(spec()).refusals
    assert (refusal.field, refusal.value) == ("FLASH_ATTENTION_TRITON_AMD_ENABLE", "TRUE")
    assert "triton/paged" in refusal.remedy
    monkeypatch.setenv("FLASH_ATTENTION_TRITON_AMD_ENABLE", "FALSE")
    assert FlashAttentionBackend("x/y", here).probe()


def test_without_the_compiled_library_it_is_refused(machine: MakeMachine) -> None:
    backend = FlashAttentionBackend("x/y", machine("gfx942", packages=FLASH, compiled=False))
    found = backend.probe()
    assert not found
    assert "flash_attn_2_cuda" in found.reason
    assert "pip install flash-attn" in found.remedy
    assert not backend.verdict(spec())


def given(layer: ad.AttentionSpec, metadata: ad.AttentionMetadata, machine: Any, *, lse: bool = False) -> Any:
    """Return the name of the vendor's function and what it is given, when a layer is run."""
    own: dict[str, Any] = {"alibi_slopes": np.ones(layer.num_heads)} if layer.alibi else {}
    attn = ad.attention(layer, HostFlashAttention("x/y", machine), **own)
    seen: list[tuple[str, dict[str, Any]]] = []
    q, k, v = (torch.zeros(metadata.num_tokens, n, 128, dtype=torch.bfloat16) for n in (8, 2, 2))
    with stubbed(real("flash-attn"), before=lambda *entered: seen.append(entered)):
        cache = attn.allocate(8) if layer.kind != "encoder" else None
        new = (k, v) if layer.writes_kv else ()
        attn.run(attn.plan(metadata), q, *new, cache=cache, return_lse=lse)
    (entered,) = seen
    return entered


@pytest.mark.interface
def test_the_real_functions_take_these_arguments(machine: MakeMachine) -> None:
    here = machine("gfx942", packages=FLASH)
    name, found = given(spec(window=(30, 0), alibi=True, returns_lse=True), BATCH, here, lse=True)
    assert name == "flash_attn_varlen_func"
    assert found["cu_seqlens_q"].tolist() == [0, 1, 10, 50, 53]
    assert found["cu_seqlens_k"].tolist() == [0, 70, 79, 379, 382]
    assert found["block_table"].tolist() == [[3, 0, 0], [5, 0, 0], [0, 7, 2], [0, 0, 0]]
    assert (found["max_seqlen_q"], found["max_seqlen_k"], found["window_size"]) == (40, 300, (30, 0))
    assert (found["causal"], found["return_attn_probs"], found["alibi_slopes"].tolist()) == (True, True, [1.0] * 8)
    name, found = given(spec(), DECODES, here)
    assert name == "flash_attn_with_kvcache"
    assert found["q"].shape == (2, 1, 8, 128)
    assert (found["cache_seqlens"].tolist(), found["block_table"].tolist()) == ([70, 9], [[3], [5]])
    assert "k" not in found
    name, found = given(spec(kind="encoder"), ad.AttentionMetadata.build([5, 9], [5, 9]), here)
    assert (name, found["block_table"]) == ("flash_attn_varlen_func", None)
    assert found["cu_seqlens_k"].tolist() == [0, 5, 14]


@pytest.mark.interface
@pytest.mark.parametrize(
    "fields",
    [{}, {"window": (30, 0)}, {"window": (0, 0)}, {"causal": False, "window": (20, 5)}, {"scale": 0.3}],
    ids=str,
)
def test_the_vendor_means_by_these_arguments_what_the_contract_does(
    monkeypatch: pytest.MonkeyPatch, machine: MakeMachine, fields: dict[str, Any]
) -> None:
    """The vendor's own tests compute in plain PyTorch what windows and causality mean."""
    pytest.importorskip("einops", reason="not run: einops is not installed")
    monkeypatch.syspath_prepend(str(real("flash-attn") / "hopper"))
    import test_util

    layer = spec(dtype="bfloat16", writes_kv=False, **fields)
    batch = ad.AttentionMetadata.build([1, 9, 40], [70, 9, 300], [[3], [5], [0, 7, 2]], 128)
    _, found = given(layer, batch, machine("gfx942", packages=FLASH))
    rng = np.random.default_rng(0)
    q = rng.standard_normal((50, 8, 128)).astype(np.float32)
    key, value = (rng.standard_normal((8, 128, 2, 128)).astype(np.float32) for _ in range(2))
    exact = ad.attention(spec(dtype="float32", writes_kv=False, **fields), "reference")
    cache = exact.allocate(8)
    cache.arrays["key"][...], cache.arrays["value"][...] = (side.transpose(0, 2, 1, 3) for side in (key, value))
    expected = exact.run(exact.plan(batch), q, cache=cache)
    for s, (length, table) in enumerate(
        zip(np.diff(found["cu_seqlens_k"]), found["block_table"].tolist(), strict=True)
    ):
        rows = slice(*found["cu_seqlens_q"][s : s + 2].tolist())
        keys, values = (torch.from_numpy(side[table].reshape(-1, 2, 128)[None, :length]) for side in (key, value))
        scaled = torch.from_numpy(q[None, rows]) * (found["softmax_scale"] / 128**-0.5)
        out, _ = test_util.attention_ref(scaled, keys, values, causal=found["causal"], window_size=found["window_size"])
        assert np.abs(out[0].numpy() - expected[rows]).max() < 1e-5
