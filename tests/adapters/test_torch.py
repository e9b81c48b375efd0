"""The adapter layer for torch, on the CPU: the kit around a call in plain PyTorch, copies, writes, renewing, devices.

The call in the middle is attention in plain PyTorch by the device batch's own tensors: it stands for no vendor and is
no evidence of one. What it shows is that what surrounds a call is right: writes, padding, sinks, outputs, renewing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="not run: torch is not installed")

import attn_dispatch as ad  # noqa: E402
from attn_dispatch.adapters.batch import HostBatch  # noqa: E402
from attn_dispatch.adapters.torch.backend import VendorBackend, contiguous_runs  # noqa: E402
from attn_dispatch.adapters.torch.cache_tensors import CacheTensors, round_to  # noqa: E402
from attn_dispatch.adapters.torch.device_batch import DeviceBatch, DeviceBuffer  # noqa: E402
from attn_dispatch.adapters.torch.layer_pass import DeviceCall, add_sinks  # noqa: E402
from attn_dispatch.adapters.torch.layer_tensors import LayerTensors  # noqa: E402
from attn_dispatch.adapters.torch.plan import DevicePlan  # noqa: E402
from attn_dispatch.backend import Availability, Refusal, Verdict  # noqa: E402
from attn_dispatch.conformance import BackendConformance  # noqa: E402
from attn_dispatch.contract import HND, NHD, AttentionSpec, CacheLayout, LayerParameters  # noqa: E402
from attn_dispatch.contract.dtypes import numpy_dtype, quantise  # noqa: E402
from attn_dispatch.errors import ArrayError, CacheError, PlanError  # noqa: E402

CPU = torch.device("cpu")
BLOCK = 16


class Plain(VendorBackend):
    """Attention in float32, one sequence after the other, over block tables on the CPU."""

    order: CacheLayout = NHD
    tile = 1

    @property
    def device_type(self) -> str:
        return "cpu"

    def probe(self) -> Availability:
        return Availability(True, "PyTorch on the CPU, in this test", evidence="simulated on CPU")

    def verdict(self, spec: AttentionSpec) -> Verdict:
        if spec.kv_cache_dtype in ("uint8", "uint4", "float64") or spec.dtype == "float64" or spec.alibi:
            return self.refuse(Refusal("kv_cache_dtype", spec.kv_cache_dtype, "this test's types"))
        return self.accept()

    def layout(self, spec: AttentionSpec) -> CacheLayout:
        return self.order

    def device_batch(self, plan: DevicePlan, device: Any, *, paged: bool) -> DeviceBatch:
        return DeviceBatch(plan.spec, plan.view, device, paged=paged, max_seq_len=plan.max_seq_len, tile=self.tile)

    def attend(self, call: DeviceCall) -> tuple[Any, Any]:
        spec, batch, layer = call.spec, call.batch, call.layer
        result = call.output().fill_(torch.nan)
        lse = torch.full(result.shape[:2], torch.nan, device="cpu", dtype=torch.float32)
        start, key_start = batch.query_start.tolist(), batch.key_start.tolist()
        for s, length in enumerate(batch.lens.tolist()):
            rows = slice(*start[s : s + 2])
            if call.cache is None:
                key, value = (x[key_start[s] : key_start[s] + length].float() for x in (call.key, call.value))
            else:
                key, value = (self._read(x, batch.tables[s], length) for x in (call.key, call.value))
                key, value = key * layer.k_scale, value * layer.v_scale
            key, value = (x.repeat_interleave(spec.group_size, 1) for x in (key, value))
            scores = torch.einsum("qhd,khd->hqk", call.q[rows].float(), key) * spec.scale
            if spec.logits_soft_cap is not None:
                scores = spec.logits_soft_cap * torch.tanh(scores / spec.logits_soft_cap)
            queries = torch.arange(rows.stop - rows.start, device="cpu")[:, None]
            ahead = torch.arange(len(key), device="cpu") - (queries + len(key) - len(queries))
            left, right = spec.window
            hidden = (ahead > 0) & spec.causal
            hidden |= (ahead < -left) & (left >= 0)
            hidden |= (ahead > right) & (right >= 0)
            scores = scores.masked_fill(hidden, -torch.inf)
            lse[rows] = scores.logsumexp(-1).T
            result[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).to(result.dtype)
        return result, lse if call.return_lse else None

    def _read(self, array: Any, table: Any, length: int) -> Any:
        tokens = array[table.long()] if self.order == NHD else array[table.long()].transpose(1, 2)
        return tokens.reshape(-1, *tokens.shape[2:])[:length].float()


class PlainHnd(Plain):
    order = HND
    tile = 64
    contiguous_rows = True


class TestNhd(BackendConformance):
    backend = Plain("test/nhd")


class TestHnd(BackendConformance):
    backend = PlainHnd("test/hnd")
    examples = 20


def spec(**fields: Any) -> AttentionSpec:
    plain = {"num_heads": 4, "num_kv_heads": 2, "head_size": 64, "dtype": "float32", "block_size": BLOCK}
    return ad.AttentionSpec(**(plain | fields))


def rows(tokens: int) -> list[Any]:
    return [torch.randn(tokens, heads, 64, device="cpu") for heads in (4, 2, 2)]


def decodes(lens: list[int], size: int = BLOCK) -> ad.AttentionMetadata:
    """Decodes of these lengths after the step, each in blocks of its own; 0 is padding."""
    tables = [[8 * s + i for i in range(-(-n // size))] for s, n in enumerate(lens)]
    slots = [-1 if not n else t[(n - 1) // size] * size + (n - 1) % size for n, t in zip(lens, tables, strict=True)]
    return ad.AttentionMetadata.build([1] * len(lens), lens, tables, size, slot_mapping=slots)


def test_a_fixed_plan_computes_each_batch_that_it_is_renewed_with() -> None:
    """As a replayed graph would: the same tensors every time, with decodes that begin, grow and end."""
    backend = Plain("test/fixed")
    layer = spec(returns_lse=True, sinks=True)
    attn = ad.attention(layer, backend, sinks=np.array([0.5, -1.0, 2.0, 0.0]))
    cache, other = attn.allocate(32), attn.allocate(32)
    plan = backend.fixed_plan(layer, decodes([40, 1, 64, 7]), 96)
    for lens in ([40, 1, 64, 7], [41, 2, 65, 8], [42, 0, 66, 0], [0, 0, 0, 0], [96, 3, 1, 33]):
        metadata, inputs = decodes(lens), rows(4)
        plan.renew(metadata)
        out, lse = attn.run(plan, *inputs, cache, return_lse=True)
        expected, expected_lse = attn.run(attn.plan(metadata), *inputs, other, return_lse=True)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(lse, expected_lse)
        assert torch.equal(cache.key, other.key)
        assert torch.equal(cache.value, other.value)


def test_a_fixed_plan_is_renewed_in_place() -> None:
    """Addresses and shapes stay, contents follow; a sequence that is over becomes padding."""
    backend, layer = Plain("test/place"), spec()
    plan = backend.fixed_plan(layer, ad.AttentionMetadata.build([1] * 3, [5, 17, 30], [[4], [2, 3], [0, 1]], BLOCK), 64)
    batch = plan.batches[CPU, True]
    assert batch.tables.shape == (3, 4)
    writes = batch.writes
    kept = [batch.lens, batch.tables, batch.idle, writes.block, writes.offset, writes.rows, writes.any_row]
    places = [tensor.data_ptr() for tensor in kept]
    after = ad.AttentionMetadata.build([1, 1, 1], [6, 0, 33], [[4], [], [0, 1, 7]], BLOCK, slot_mapping=[69, -1, 112])
    plan.renew(after)
    assert places == [tensor.data_ptr() for tensor in kept]
    assert batch.lens.tolist() == [6, 1, 33]
    assert batch.key_start.tolist() == [0, 6, 7, 40]
    assert batch.tables.tolist() == [[4, 0, 0, 0], [0, 0, 0, 0], [0, 1, 7, 0]]
    assert batch.idle.view(-1).tolist() == [False, True, False]
    assert [writes.block.tolist(), writes.offset.tolist()] == [[4, 4, 7], [5, 5, 0]]
    assert writes.rows.tolist() == [0, 0, 2]
    assert plan.highest_block == 7
    assert batch.host.max_keys == 64
    plan.renew(ad.AttentionMetadata.build([1, 1, 1], [0, 0, 0], [[], [], []], BLOCK, slot_mapping=[-1] * 3))
    assert writes.any_row.tolist() == [False]
    assert batch.idle.all()


@pytest.mark.parametrize(
    ("new", "lens", "words"),
    [([1, 1], [5, 17], "3 query rows"), ([2, 1, 0], [5, 17, 3], "queries"), ([1, 1, 1], [5, 17, 65], "max_seq_len")],
)
def test_what_does_not_fit_a_fixed_plan_is_refused_and_changes_nothing(
    new: list[int], lens: list[int], words: str
) -> None:
    tables = [list(range(8 * s, 8 * s + 8)) for s in range(3)]
    plan = Plain("test/fit").fixed_plan(spec(), ad.AttentionMetadata.build([1] * 3, [5, 17, 30], tables, BLOCK), 64)
    before = plan.batches[CPU, True].lens.tolist()
    with pytest.raises(PlanError, match=words):
        plan.renew(ad.AttentionMetadata.build(new, lens, tables[: len(new)], BLOCK))
    assert plan.batches[CPU, True].lens.tolist() == before
    assert plan.view.kv_lens.tolist() == before


def test_what_cannot_be_a_fixed_plan() -> None:
    backend, metadata = Plain("test/never"), decodes([5])
    with pytest.raises(PlanError, match="fixed_plan"):
        backend.plan(spec(), metadata).renew(metadata)
    with pytest.raises(PlanError, match="room for 4"):
        backend.fixed_plan(spec(), metadata, 4)
    with pytest.raises(PlanError, match="with a cache"):
        backend.fixed_plan(spec(kind="encoder"), ad.AttentionMetadata.build([5], [5]), 64)
    with pytest.raises(PlanError, match="block_size=32"):
        backend.fixed_plan(spec(), metadata, 64).renew(decodes([5], 32))


def test_an_output_that_is_given_is_the_one_returned() -> None:
    attn = ad.attention(spec(), Plain("test/out"))
    plan = attn.plan(ad.AttentionMetadata.build([1, 9], [40, 9], [[1, 0, 3], [2]], BLOCK))
    inputs = rows(10)
    expected = attn.run(plan, *inputs, attn.allocate(4))
    for out in (torch.empty(10, 4, 64), torch.empty(4, 10, 64).transpose(0, 1)):
        assert attn.run(plan, *inputs, attn.allocate(4), out) is out
        assert torch.equal(out, expected)


def test_arrays_elsewhere_are_refused_before_anything_is_written() -> None:
    attn = ad.attention(spec(), Plain("test/where"))
    cache, plan = attn.allocate(1), attn.plan(ad.AttentionMetadata.build([1], [1], [[0]], BLOCK))
    q, k, v = rows(1)
    for arrays in ((q, k, v.to("meta")), (q, k.to("meta"), v), (q.to("meta"), k, v)):
        with pytest.raises(ArrayError, match="meta"):
            attn.run(plan, *arrays, cache)
    elsewhere = attn.allocate(1, "meta")
    assert elsewhere.device == "meta"
    with pytest.raises(ArrayError, match="computes on cpu devices"):
        attn.run(plan, *(x.to("meta") for x in (q, k, v)), elsewhere)
    assert not cache.key.any()


def test_no_device_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Plain, "device_type", "cuda")
    with pytest.raises(CacheError, match="no cuda device here"):
        Plain("test/none").zeros((1,), "float32", None)


@pytest.mark.parametrize(("devices", "ahead"), [(1, True), (2, False), (8, False)])
def test_with_several_devices_a_batch_goes_where_its_queries_are(
    monkeypatch: pytest.MonkeyPatch, devices: int, ahead: bool
) -> None:
    """The current device is then no more than a guess: what was brought there would be for nothing."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(Plain, "device_type", "cuda")
    monkeypatch.setattr(Plain, "default_device", lambda self: CPU)
    monkeypatch.setattr(Plain, "computes_on", lambda self, device: True)
    backend = Plain("test/several")
    for plan in (backend.plan(spec(), decodes([5])), backend.fixed_plan(spec(), decodes([5]), 64)):
        assert bool(plan.batches) is ahead
        attn = ad.attention(spec(), backend)
        attn.run(plan, *rows(1), attn.allocate(2))
        assert list(plan.batches) == [(CPU, True)]


@pytest.fixture(params=["device", "dtype"])
def changed_default(request: pytest.FixtureRequest) -> Iterator[str]:
    """Torch's default device or type, changed by the user's program."""
    if request.param == "device":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(torch.bfloat16)
    try:
        yield request.param
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def test_torchs_defaults_change_nothing(changed_default: str) -> None:
    """A host buffer that is made on the default device would not be host memory: every plan would fail."""
    layer = spec(sinks=True, returns_lse=True)
    attn = ad.attention(layer, Plain("test/default"), sinks=np.ones(4))
    exact = ad.attention(layer, "reference", sinks=np.ones(4))
    metadata = decodes([5, 0, 33])
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((3, heads, 64)).astype(np.float32) for heads in (4, 2, 2))
    expected = exact.run(exact.plan(metadata), q, k, v, exact.allocate(24))
    cache = attn.allocate(24)
    assert (cache.key.device.type, cache.key.dtype) == ("cpu", torch.float32)
    plan = attn.backend.fixed_plan(layer, decodes([1, 1, 1]), 64)  # type: ignore[attr-defined]
    for step in (attn.plan(metadata), plan):
        if step is plan:
            plan.renew(metadata)
        out = attn.run(step, *map(torch.from_numpy, (q, k, v)), attn.allocate(24))
        assert np.abs(out.numpy() - expected).max() < 1e-5


def test_inference_mode_leaves_nothing_behind_that_cannot_be_used_outside() -> None:
    layer = spec(sinks=True)
    attn = ad.attention(layer, Plain("test/modes"), sinks=np.ones(4))
    inputs = rows(2)
    with torch.inference_mode():
        cache, plan = attn.allocate(24), attn.plan(decodes([5, 20]))
        fixed = attn.backend.fixed_plan(layer, decodes([4, 19]), 64)  # type: ignore[attr-defined]
        inside = attn.run(plan, *inputs, cache)
    assert torch.equal(attn.run(plan, *inputs, cache), inside)
    fixed.renew(decodes([5, 20]))
    torch.testing.assert_close(attn.run(fixed, *inputs, cache), inside)
    assert not any(x.is_inference() for x in plan.batches[CPU, True].tensors.values())


def test_a_layers_output_is_no_part_of_a_graph() -> None:
    attn = ad.attention(spec(), Plain("test/graph"))
    inputs = [x.requires_grad_() for x in rows(1)]
    cache = attn.allocate(8)
    attn.run(attn.plan(decodes([5])), *inputs, cache)
    assert not cache.key.requires_grad


class Lagging:
    """Copies to a device that has not begun yet: they are done, in order, when it is told to catch up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waiting: list[Callable[[], Any]] = []
        self.copy = copy = torch.Tensor.copy_

        def later(target: Any, source: Any, non_blocking: bool = False) -> Any:
            if not non_blocking:
                return copy(target, source)
            self.waiting.append(lambda: copy(target, source))
            return target

        monkeypatch.setattr(torch.Tensor, "copy_", later)

    def catch_up(self) -> None:
        """Do the copies that wait for the next step, and no more."""
        self.waiting.pop(0)()


def test_a_host_that_is_steps_ahead_overwrites_nothing_that_is_still_to_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Lagging(monkeypatch)
    buffer = DeviceBuffer({"lens": np.zeros(4, np.int32)}, CPU)
    steps = [np.full(4, n, np.int32) for n in (1, 2, 3)]
    for step in steps:
        buffer.renew({"lens": step})
    read = []
    while device.waiting:
        device.catch_up()
        read.append(int(buffer.tensors["lens"][0]))
    assert read == [0, 1, 2, 3]


def test_arrays_of_many_types_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {
        "a": np.arange(3, dtype=np.int32),
        "b": np.array([True, False]),
        "c": np.arange(6, dtype=np.int64).reshape(2, 3),
        "none": np.zeros((0, 4), np.int32),
    }
    device = Lagging(monkeypatch)
    buffer = DeviceBuffer(arrays, CPU)
    assert len(device.waiting) == 1
    device.catch_up()
    for name, array in arrays.items():
        assert buffer.tensors[name].numpy().tolist() == array.tolist()
        assert buffer.tensors[name].data_ptr() % 16 == 0 or not array.size
    assert len({tensor.untyped_storage().data_ptr() for tensor in buffer.tensors.values()}) == 1
    places = {name: tensor.data_ptr() for name, tensor in buffer.tensors.items()}
    arrays["c"] = arrays["c"] + 7
    buffer.renew(arrays)
    device.catch_up()
    assert buffer.tensors["c"].tolist() == arrays["c"].tolist()
    assert places == {name: tensor.data_ptr() for name, tensor in buffer.tensors.items()}
    for wrong in ({"a": np.arange(4, dtype=np.int32)}, arrays | {"more": arrays["a"]}):
        with pytest.raises(ValueError, match="bytes"):
            buffer.renew(wrong)
    assert not device.waiting


def test_all_that_a_plan_brings_is_one_buffer() -> None:
    plan = Plain("test/copy").plan(
        spec(), ad.AttentionMetadata.build([1, 2], [0, 20], [[], [1, 0]], BLOCK, slot_mapping=[-1, 2, -1])
    )
    batch = plan.batches[CPU, True]
    tensors = [batch.query_start, batch.key_start, batch.lens, batch.tables, batch.idle, batch.writes.block]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    stored=st.sampled_from(["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8"]),
    layout=st.sampled_from(["NHD", "HND"]),
    fixed=st.booleans(),
    written=st.lists(st.booleans(), min_size=7, max_size=7),
)
def test_writing_stores_what_the_contract_says_and_touches_nothing_else(
    stored: str, layout: str, fixed: bool, written: list[bool]
) -> None:
    """On the CPU, by the code that runs on a GPU: rows with a slot, in both layouts, in shapes that may be fixed."""
    layer = spec(dtype="bfloat16", kv_cache_dtype=stored)
    full = ad.AttentionMetadata.build([1, 5, 1], [20, 5, 33], [[4, 1], [2], [0, 5, 3]], BLOCK)
    slots = np.where(written, full.slot_mapping, -1)
    batch = ad.AttentionMetadata.build([1, 5, 1], [20, 5, 33], [[4, 1], [2], [0, 5, 3]], BLOCK, slot_mapping=slots)
    cache = ad.attention(layer, "reference").allocate(7).to_layout(layout)
    rng = np.random.default_rng(0)
    for array in cache.arrays.values():
        array[...] = rng.standard_normal(array.shape).astype(numpy_dtype(stored))
    k, v = (3 * rng.standard_normal((7, 2, 64)) for _ in range(2))
    k[0, 0, :4] = [1e9, -1e9, 500.0, 0.1875]
    k, v = (x.astype(numpy_dtype("bfloat16")) for x in (k, v))
    quantised = stored in ("float8_e4m3fn", "float8_e5m2", "int8")
    scales = {"k_scale": 0.3, "v_scale": 0.125} if quantised else {"k_scale": 1.0, "v_scale": 1.0}
    expected = [np.array(side) for side in cache.gather(range(7))]
    for side, new, scale in zip(expected, (k, v), scales.values(), strict=True):
        for t, slot in enumerate(slots.tolist()):
            if slot >= 0:
                side[slot // BLOCK, :, slot % BLOCK] = quantise(new[t], stored, scale)
    on_cpu = DeviceBatch(layer, batch.view("decoder"), CPU, paged=True, max_seq_len=64 if fixed else None)
    if on_cpu.writes is not None:
        new = [torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) for x in (k, v)]
        CacheTensors.of(cache).write(on_cpu.writes, *new, LayerTensors.of(LayerParameters(layer, **scales), CPU))
    else:
        assert not any(written)
    for found, side in zip(cache.gather(range(7)), expected, strict=True):
        assert np.array_equal(np.asarray(found).view(np.uint8), side.view(np.uint8))


def test_rounding_ties_to_even_and_saturates() -> None:
    values = torch.tensor([0.5, 1.5, -2.5, 200.0, -1e30], device="cpu")
    assert round_to(values, torch.int8, None).tolist() == [0, 2, -2, 127, -127]
    assert round_to(values, torch.float8_e4m3fn, torch.tensor(0.25)).float().tolist() == [2, 6, -10, 448, -448]
    assert round_to(values, torch.float64, None).dtype == torch.float64


def test_a_cache_that_kernels_cannot_read_is_refused() -> None:
    attn = ad.attention(spec(), Plain("test/strides"))
    cache = attn.allocate(4)
    cache.arrays["key"] = torch.zeros(8, 16, 2, 64)[::2]
    with pytest.raises(CacheError, match="strides"):
        attn.run(attn.plan(decodes([5])), *rows(1), cache)


def test_sinks_added_to_a_result_are_sinks_in_the_softmax() -> None:
    """Against the reference, which has them in its denominators; a row that attends to nothing keeps its sink."""
    layer, plain = spec(sinks=True, returns_lse=True), spec(returns_lse=True)
    sinks = np.array([0.7, -3.0, 5.0, -np.inf], np.float32)
    batch = ad.AttentionMetadata.build([1, 20, 1], [33, 20, 0], [[0, 1, 2], [3, 4], []], BLOCK,
                                       slot_mapping=[2 * BLOCK, *range(48, 68), -1])  # fmt: skip
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((22, heads, 64)).astype(np.float32) for heads in (4, 2, 2))
    results = []
    for which, own in ((layer, {"sinks": sinks}), (plain, {})):
        attn = ad.attention(which, "reference", **own)
        results.append(attn.run(attn.plan(batch), q, k, v, attn.allocate(5), return_lse=True))
    (expected, expected_lse), (out, lse) = results
    mine = torch.from_numpy(out)
    mine_lse = add_sinks(mine, torch.from_numpy(lse), torch.from_numpy(sinks))
    mine[-1] = 0
    assert np.abs(mine.numpy() - expected).max() < 1e-6
    finite = np.isfinite(expected_lse)
    assert np.array_equal(finite, np.isfinite(mine_lse.numpy()))
    assert np.abs(mine_lse.numpy()[finite] - expected_lse[finite]).max() < 1e-5


def test_a_layers_tensors_are_brought_once() -> None:
    layer = spec(sinks=True)
    parameters = LayerParameters(layer, sinks=np.ones(4))
    first = LayerTensors.of(parameters, CPU)
    assert LayerTensors.of(parameters, CPU) is first
    assert LayerTensors.of(parameters, torch.device("meta")) is not first
    assert (first.slopes, first.k_scale, first.k_scale_dev.item()) == (None, 1.0, 1.0)


def test_runs_of_blocks() -> None:
    src, dst = np.array([3, 4, 5, 9, 1, 2]), np.array([0, 1, 2, 3, 8, 9])
    assert contiguous_runs(src, dst) == [(3, 0, 3), (9, 3, 1), (1, 8, 2)]
    assert contiguous_runs(np.array([], np.int64), np.array([], np.int64)) == []


@pytest.mark.parametrize("stored", ["float32", "float8_e4m3fn"])
def test_blocks_are_swapped(stored: str) -> None:
    attn = ad.attention(spec(kv_cache_dtype=stored), Plain("test/swap"))
    cache, other = attn.allocate(6), attn.allocate(6)
    for i in range(6):
        cache.key[i] = i
    cache.swap_blocks(other, [(0, 3), (1, 4), (2, 5), (5, 0)])
    assert other.key[:, 0, 0, 0].float().tolist() == [5, 0, 0, 0, 1, 2]


def test_a_step_without_queries_writes_an_encoders_keys() -> None:
    batch = ad.AttentionMetadata.build([0, 0], [4, 9], [[3], [7]], BLOCK, encoder_seq_lens=[3, 20],
                                       encoder_block_tables=[[0], [4, 5]])  # fmt: skip
    layer = spec(kind="cross", causal=False, returns_lse=True)
    attn = ad.attention(layer, Plain("test/cross"))
    cache = attn.allocate(8)
    k = torch.randn(23, 2, 64)
    out, lse = attn.run(attn.plan(batch), torch.empty(0, 4, 64), k, k, cache, return_lse=True)
    assert (out.shape, lse.shape) == ((0, 4, 64), (0, 4))
    assert torch.equal(cache.key[4].reshape(-1, 2, 64), k[3:19])


def test_the_host_batch_is_the_one_on_the_device() -> None:
    batch = ad.AttentionMetadata.build([1, 9, 3], [70, 9, 0], [[3, 1, 2, 4, 6], [5], []], BLOCK,
                                       slot_mapping=[101, *range(80, 89), -1, -1, -1])  # fmt: skip
    on_cpu = DeviceBatch(spec(), batch.view("decoder"), CPU, paged=True)
    host = HostBatch.of(batch.view("decoder"), spec(), paged=True)
    for name in ("query_start", "key_start", "lens", "tables"):
        assert np.array_equal(getattr(on_cpu, name).numpy(), getattr(host, name))
    assert on_cpu.idle.view(-1).tolist() == host.idle.tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", [Plain("test/nhd"), PlainHnd("test/hnd")], ids=["NHD", "HND"])
def test_compiled_steps(backend: Plain) -> None:
    """Two layers on one cache, compiled: writes into copies of the cache as into itself, and renewed plans."""
    from attn_dispatch.integrations.torch_library import Layer, step

    torch.manual_seed(0)
    torch._dynamo.reset()
    layers = [ad.attention(spec(dtype="float16", writes_kv=writes), backend) for writes in (True, False)]
    cache, other = layers[0].allocate(32), layers[0].allocate(32)
    writes, reads = (Layer(attention, cache) for attention in layers)

    def model(q: Any, k: Any, v: Any) -> Any:
        return reads(writes(q * 2, k, v) + q, k, v)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    steps = [[30, 1, 64, 7], [31, 2, 65, 8], [32, 0, 66, 0], [128, 3, 1, 33]]
    plans = {attention: backend.fixed_plan(attention.spec, decodes(steps[0]), 128) for attention in layers}
    for lens in steps:
        arrays = [x.half() for x in rows(4)]
        first = layers[0].run(layers[0].plan(decodes(lens)), arrays[0] * 2, *arrays[1:], other)
        expected = layers[1].run(layers[1].plan(decodes(lens)), first + arrays[0], None, None, other)
        with step(decodes(lens)):
            assert torch.equal(compiled(*arrays), expected)
        for plan in plans.values():
            plan.renew(decodes(lens))
        with step(plans=plans):
            assert torch.equal(compiled(*arrays), expected)
        for name in ("key", "value"):
            assert torch.equal(cache.arrays[name], other.arrays[name])
