"""What OpenVINO gets wrong in silence, or dies of: here each is an error that says what to do, before the op sees it.

After every one of them the same process still computes correctly (`still_computes`): nothing was written where it
should not be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import attn_dispatch as ad
from attn_dispatch import AttentionMetadata, AttentionSpec
from attn_dispatch.conformance import Case, run_case
from attn_dispatch.contract import HND, KVCache
from attn_dispatch.dispatch import registry
from attn_dispatch.errors import ArrayError, BackendRefusedError, CacheError, MetadataError, PlanError

NAME = "openvino/paged"

pytestmark = pytest.mark.usefixtures("still_computes")

SILENT = {
    # What is asked: (spec, the field that is refused, words of what is accepted, words of the remedy)
    "ALiBi with a window": ({"alibi": True, "window": (15, 0)}, "window", "drops ALiBi", "another backend"),
    "an odd head size in bfloat16": ({"dtype": "bfloat16", "head_size": 33}, "head_size", "NaN", "float32"),
    "an odd value head size in bfloat16": (
        {"dtype": "bfloat16", "value_head_size": 33}, "value_head_size", "NaN", "float32"),
    "an odd head size in a uint4 cache": ({"kv_cache_dtype": "uint4", "head_size": 33}, "head_size", "NaN", "float32"),
    # Not wrong but worse: past the end of a buffer of its own, with whatever then happens to the process.
    "uint8 keys far wider than values": (
        {"kv_cache_dtype": "uint8", "head_size": 66, "value_head_size": 16}, "value_head_size", "needs 17", "float32"),
    "uint4 keys far wider than values": (
        {"kv_cache_dtype": "uint4", "value_head_size": 8}, "value_head_size", "needs 16", "float32"),
    "a head size that was not measured": ({"head_size": 520}, "head_size", "8 to 512", "another backend"),
    "a soft-cap": ({"logits_soft_cap": 30.0}, "logits_soft_cap", "no soft-cap", "another backend"),
    "the log-sum-exp": ({"returns_lse": True}, "returns_lse", "does not return LSE", "another backend"),
    "a scale of zero": ({"scale": 0.0}, "scale", "1 / sqrt", "another backend"),
    "a scale that float32 rounds to zero": ({"scale": 1e-46}, "scale", "1 / sqrt", "another backend"),
    "a scale that float32 does not hold": ({"scale": 1e39}, "scale", "beyond float32", "another backend"),
    "blocks of 16": ({"block_size": 16}, "block_size", "needs 32", "block_size=32"),
    "blocks of 64": ({"block_size": 64}, "block_size", "needs 32", "block_size=32"),
    "a bfloat16 cache of float32": ({"kv_cache_dtype": "bfloat16"}, "kv_cache_dtype", "float16", "float32"),
    "a float32 cache of bfloat16": (
        {"dtype": "bfloat16", "kv_cache_dtype": "float32"}, "kv_cache_dtype", "bfloat16", "bfloat16"),
    "a float16 cache of bfloat16": (
        {"dtype": "bfloat16", "kv_cache_dtype": "float16"}, "kv_cache_dtype", "bfloat16", "bfloat16"),
    "a float8 cache": ({"kv_cache_dtype": "float8_e4m3fn"}, "kv_cache_dtype", "uint8", "float32"),
    "float64": ({"dtype": "float64"}, "dtype", "float32, float16, bfloat16", "another backend"),
    "a window that looks ahead": (
        {"kind": "encoder", "window": (5, 5)}, "window", "for causal layers", "another backend"),
    "ALiBi of tokens ahead": ({"kind": "encoder", "alibi": True}, "alibi", "sign", "causal=True"),
}  # fmt: skip


def make(**fields: Any) -> AttentionSpec:
    return AttentionSpec(**({"num_heads": 4, "num_kv_heads": 2, "head_size": 64, "dtype": "float32"} | fields))


@pytest.mark.parametrize("name", list(SILENT))
def test_what_is_wrong_in_silence_is_refused(name: str) -> None:
    fields, field, accepts, remedy = SILENT[name]
    spec = make(**fields)
    verdict = ad.explain(spec, NAME).verdicts[0]
    assert not verdict
    refusal = next(each for each in verdict.refusals if each.field == field)
    assert refusal.value == getattr(spec, field)
    assert accepts in refusal.accepts
    assert remedy in refusal.remedy
    # Naming the backend is strict: nothing falls back in silence.
    slopes = np.ones(4, np.float32) if spec.alibi else None
    with pytest.raises(BackendRefusedError, match=field):
        ad.attention(spec, NAME, alibi_slopes=slopes)


@pytest.mark.parametrize("name", list(SILENT))
def test_the_remedy_holds(name: str) -> None:
    """What the refusal says to do is something that can be done, and helps."""
    fields, field, _, remedy = SILENT[name]
    if remedy == "another backend":
        assert [v for v in ad.explain(make(**fields)).verdicts if v and v.backend != NAME]
        return
    sizes = field in ("head_size", "value_head_size")
    followed: dict[str, dict[str, Any]] = {
        "block_size=32": {"block_size": 32},
        "causal=True": {"causal": True},
        "float32": {"dtype": "float32", "kv_cache_dtype": "float32"} if sizes else {"kv_cache_dtype": "float32"},
        "bfloat16": {"kv_cache_dtype": "bfloat16"},
    }
    verdict = ad.explain(make(**fields | followed[remedy]), NAME).verdicts[0]
    assert not [refusal for refusal in verdict.refusals if refusal.field == field]


def test_every_reason_is_given_at_once() -> None:
    verdict = ad.explain(make(block_size=16, logits_soft_cap=5.0, returns_lse=True), NAME).verdicts[0]
    assert [r.field for r in verdict.refusals] == ["block_size", "logits_soft_cap", "returns_lse"]


def test_bfloat16_needs_a_processor_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO lists BF16 on processors without it, and then crashes."""
    flags = frozenset({"avx2", "fma", "f16c", "avx512f"})
    monkeypatch.setattr("attn_dispatch_openvino.paged.cpu_flags", lambda: flags)
    verdict = ad.explain(make(dtype="bfloat16"), NAME).verdicts[0]
    assert [r.field for r in verdict.refusals] == ["dtype"]
    assert "avx512_bf16" in str(verdict)
    assert "float32" in verdict.refusals[0].remedy
    assert ad.explain(make(), NAME).verdicts[0]


def test_scales_that_it_would_ignore_are_refused() -> None:
    spec = make(kv_cache_dtype="uint8")
    if not (verdict := registry().load(NAME).verdict(spec)):
        pytest.skip(f"refused: {verdict}")
    with pytest.raises(BackendRefusedError, match="k_scale"):
        ad.attention(spec, NAME, k_scale=0.5)


@pytest.mark.parametrize(("head_size", "value_head_size"), [(128, 64), (64, 16), (128, 32), (65, 33), (64, 128)])
def test_uint8_keys_wider_than_values(head_size: int, value_head_size: int) -> None:
    """OpenVINO's own default for u8 keys is wrong in silence for D > Dv; by token, which is always set, is right."""
    spec = make(head_size=head_size, value_head_size=value_head_size, kv_cache_dtype="uint8")
    result = run_case(registry().load(NAME), Case("u8", "u8", spec, (40, 33, 0), (1, 5, 20)))
    if not result.verdict:
        pytest.skip(f"refused: {result.verdict}")
    assert result.error <= result.allowed


# Indices that corrupt the op's memory, or end the process.

CORRUPTING: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "too few blocks": (
        {"query_lens": [1, 1], "seq_lens": [9, 70], "block_tables": [[1], [2, 3]]}, ("sequence 1", "70", "2")),
    "no blocks": ({"query_lens": [1], "seq_lens": [9], "block_tables": [[]]}, ("sequence 0", "9 tokens", "0")),
    "-1 in a used entry": (
        {"query_lens": [1], "seq_lens": [40], "block_tables": [[3, -1]]}, ("sequence 0", "entry 1", "-1")),
    "a negative past length": (
        {"query_lens": [5], "seq_lens": [3], "block_tables": [[0]]}, ("sequence 0", "seq_lens=3", "5")),
    "a negative length": (
        {"query_lens": [1], "seq_lens": [-3], "block_tables": [[0]]}, ("sequence 0", "-3")),
    "negative new tokens": (
        {"query_lens": [3, -1], "seq_lens": [3, 3], "block_tables": [[0], [1]]}, ("sequence 1", "-1")),
    "a block id that wraps round in int32": (
        {"query_lens": [1], "seq_lens": [3], "block_tables": [[2**32]]}, ("sequence 0",)),
    "a length that wraps round in int32": (
        {"query_lens": [1], "seq_lens": [2**32 + 1], "block_tables": [[0]]}, ("sequence 0", str(2**32 + 1))),
    "one block for two that write": (
        {"query_lens": [1, 1], "seq_lens": [3, 3], "block_tables": [[1], [1]]}, ("slot 34", "0 and 1")),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CORRUPTING))
def test_what_corrupts_memory_is_an_error(name: str) -> None:
    arguments, words = CORRUPTING[name]
    with pytest.raises(MetadataError) as caught:
        AttentionMetadata.build(**arguments)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("block", [4, 5, 1000, 2**31 - 1])
@pytest.mark.parametrize("new", [1, 40])
def test_a_block_outside_the_cache(layer: Callable[..., Any], block: int, new: int) -> None:
    it = layer()
    attn = it.on()
    cache = attn.allocate(4)
    plan = attn.plan(AttentionMetadata.build([1, new], [9, 40], [[1], [2, block]]))
    with pytest.raises(CacheError, match=rf"sequence 1: block {block} .*4 blocks.*nothing was written"):
        attn.run(plan, *it.arrays(1 + new), cache)
    assert not cache.key.any()
    assert not cache.value.any()


def test_buffers_that_are_filled_for_the_next_step(layer: Callable[..., Any]) -> None:
    """What was checked is what the op gets, even if the engine has gone on writing into its own arrays."""
    it = layer()
    attn, reference = it.on(), it.on("reference")
    given = {
        "query_start_loc": np.array([0, 1], np.int32),
        "seq_lens": np.array([5], np.int32),
        "block_table": np.array([[1]], np.int32),
        "slot_mapping": np.array([36], np.int64),
    }
    batch = AttentionMetadata(**given)
    plan = attn.plan(batch)
    for array in given.values():
        array[...] = 1 << 20
    q, k, v = it.arrays(1)
    expected = reference.run(reference.plan(batch), q, k, v, reference.allocate(2))
    for each in (plan, attn.plan(batch)):
        np.testing.assert_allclose(attn.run(each, q, k, v, attn.allocate(2)), expected, atol=1e-5)


def test_padding_in_tables_is_harmless(layer: Callable[..., Any]) -> None:
    """Entries beyond the last used block may be anything; a sequence may be empty."""
    it = layer()
    tables = np.array([[1, -1, 2**31 - 1], [0, 7, -5]], np.int32)
    batch = AttentionMetadata.build([1, 0], [9, 3], tables)
    q, k, v = it.arrays(1)
    found, expected = (attn.run(attn.plan(batch), q, k, v, attn.allocate(2)) for attn in (it.on(), it.on("reference")))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_no_tokens_at_all(layer: Callable[..., Any]) -> None:
    """The op raises on T = 0; a step without tokens is a step like any other."""
    it = layer()
    attn = it.on()
    for batch in (AttentionMetadata.build([], [], []), AttentionMetadata.build([0, 0], [9, 0], [[1], []])):
        assert attn.run(attn.plan(batch), *it.arrays(0), attn.allocate(2)).shape == (0, 4, 64)


@pytest.mark.parametrize("tokens", [3, 300])
def test_arrays_that_are_not_contiguous(layer: Callable[..., Any], tokens: int) -> None:
    """The op raises on them, or would read the wrong numbers: they are copied, and `out` is written through."""
    it = layer()
    attn = it.on()
    batch = AttentionMetadata.build([tokens], [tokens], [list(range(10))])
    plan = attn.plan(batch)
    given = it.arrays(tokens)
    expected = attn.run(plan, *given, attn.allocate(10))
    apart = [np.repeat(x, 2, axis=1)[:, ::2] for x in given]
    assert not any(x.flags.c_contiguous for x in apart)
    wide = np.full((tokens, 4, 128), np.nan, np.float32)
    found = attn.run(plan, *apart, attn.allocate(10), out=wide[..., ::2])
    np.testing.assert_array_equal(found, expected)
    assert np.isnan(wide[..., 1::2]).all()


def test_arrays_of_another_shape_or_type(layer: Callable[..., Any]) -> None:
    it = layer()
    attn = it.on()
    cache, plan = attn.allocate(2), attn.plan(AttentionMetadata.build([2], [2], [[1]]))
    q, k, v = it.arrays(2)
    for bad in (q[:1], q[:, :2], q[..., :32], q.astype(np.float16), q.reshape(2, -1)):
        with pytest.raises(ArrayError, match=r"^q "):
            attn.run(plan, bad, k, v, cache)
    with pytest.raises(ArrayError, match="k and v must be given"):
        attn.run(plan, q, cache=cache)
    assert not cache.key.any()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda key: key[:1],
        lambda key: key.reshape(1, 2, 64, 64),
        lambda key: key.astype(np.float64),
        lambda key: np.repeat(key, 2, axis=3)[..., ::2],
        lambda key: np.frombuffer(key.tobytes(), key.dtype).reshape(key.shape),
    ],
    ids=["too few blocks", "another shape", "another type", "not contiguous", "read only"],
)
def test_a_cache_that_is_not_what_it_says(layer: Callable[..., Any], spoil: Callable[[Any], Any]) -> None:
    """The op takes a cache's memory as it is: what is behind it must be what the cache says."""
    it = layer()
    attn = it.on()
    good = attn.allocate(2)
    arrays = {"key": spoil(good.key), "value": good.value}
    with pytest.raises(CacheError, match="key array"):
        attn.run(
            attn.plan(AttentionMetadata.build([1], [1], [[1]])),
            *it.arrays(1),
            KVCache(attn.backend, it.spec.geometry, HND, 2, arrays),
        )
    assert not good.value.any()


VIEWS: dict[str, Callable[[Any], Any]] = {
    "halves of [N, K, B, 2D]": lambda shape: np.zeros((*shape[:3], 2 * shape[3]), np.float32)[..., : shape[3]],
    "[N, 2, K, B, D]": lambda shape: np.zeros((shape[0], 2, *shape[1:]), np.float32)[:, 0],
    "[N, B, K, D] transposed": lambda shape: np.zeros((shape[0], shape[2], shape[1], shape[3]), np.float32).transpose(
        0, 2, 1, 3
    ),
    "every second element": lambda shape: np.zeros((*shape[:3], 2 * shape[3]), np.float32)[..., ::2],
}


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("view", list(VIEWS))
def test_a_cache_in_an_engines_memory_must_be_dense(layer: Callable[..., Any], view: str, library: str) -> None:
    """OpenVINO copies what is not dense into a tensor of its own: the engine's memory would never be written."""
    torch = pytest.importorskip("torch", reason="not run: torch is not installed") if library == "torch" else None
    it = layer()
    attn = it.on()
    key, value = VIEWS[view]((2, 2, 32, 64)), np.zeros((2, 2, 32, 64), np.float32)
    arrays = {"key": torch.from_numpy(key), "value": torch.from_numpy(value)} if torch else {"key": key, "value": value}
    with pytest.raises(CacheError, match=r"key array .*contiguous"):
        attn.run(
            attn.plan(AttentionMetadata.build([1], [1], [[1]])),
            *it.arrays(1),
            KVCache(attn.backend, it.spec.geometry, HND, 2, arrays),
        )
    assert not key.any()
    assert not value.any()


def test_a_cache_of_another_layout_says_how_to_convert_it(layer: Callable[..., Any]) -> None:
    it = layer()
    attn = it.on()
    reference = it.on("reference")
    cache = reference.allocate(2).to_layout("NHD")
    plan, (q, k, v) = attn.plan(AttentionMetadata.build([1], [1], [[1]])), it.arrays(1)
    with pytest.raises(CacheError, match=r"NHD.*to_layout\('HND'\)"):
        attn.run(plan, q, k, v, cache)
    attn.run(plan, q, k, v, cache.to_layout("HND"))


def test_a_plan_of_another_backend(layer: Callable[..., Any]) -> None:
    it = layer()
    attn, reference = it.on(), it.on("reference")
    batch = AttentionMetadata.build([1], [1], [[1]])
    with pytest.raises(PlanError, match=f"made by reference, this layer runs on {NAME}"):
        attn.run(reference.plan(batch), *it.arrays(1), attn.allocate(2))
