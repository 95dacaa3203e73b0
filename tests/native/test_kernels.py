"""The native kernels against the reference: equal bytes, attention within its tolerance, nothing written outside."""

from __future__ import annotations

import ctypes
import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import native
import numpy as np
import pytest

from skv_export.native.library import SkvCache, SkvLayout
from skv_export.spec import quantizer, reference
from skv_export.spec.conformance import Case, attention_cases, layout_cases, make_inputs
from skv_export.spec.layout import CacheLayout
from skv_export.spec.recipe import LayerConfig

SMALL = LayerConfig(num_sink_tokens=4, recent_tokens=32, tile_tokens=32)
pytestmark = pytest.mark.usefixtures("isa")

GOLDEN = Path(__file__).parent / "golden"
CASES = {case.name: case for case in attention_cases()}


def pair(**changes: object) -> tuple[CacheLayout, CacheLayout]:
    window = int(changes.pop("local_window_size", 0))  # type: ignore[call-overload]
    return CacheLayout.pair(dataclasses.replace(SMALL, **changes), 64, window)  # type: ignore[arg-type]


def tokens(count: int, *, heads: int = 2, dim: int = 64, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((heads, count, dim)) * np.exp(rng.standard_normal((heads, 1, dim)))).astype(np.float32)


def empty(layout: CacheLayout, max_length: int, heads: int = 2) -> np.ndarray:
    rows, width = layout.shape(max_length)
    return np.full((heads, rows * width), 0xFF, np.uint8)


def expected(case: Case, batch: slice = slice(None)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    inputs = make_inputs(case)
    return reference.quantized_kv_attention(
        case.params,
        case.layouts,
        *(x[batch] for x in (inputs.query, inputs.key, inputs.value, inputs.past_key, inputs.past_value)),
        inputs.seqlens_k[batch],
        head_sink=inputs.head_sink,
        query_seqlens=None if inputs.query_seqlens is None else inputs.query_seqlens[batch],
    )


def compare(case: Case, got: tuple[np.ndarray, ...], want: tuple[np.ndarray, ...]) -> None:
    error = np.abs(got[0] - want[0]).max() / np.abs(want[0]).max()
    assert error <= case.tolerance, f"attention is off by {error:.1e} of its largest output"
    for name, g, w in zip(("key", "value"), got[1:], want[1:], strict=True):
        assert np.array_equal(g, w), f"{name} cache: {np.count_nonzero(g != w)} bytes differ"


# The cache.


@pytest.mark.parametrize("granularity", ["channel", "token"])
@pytest.mark.parametrize("is_value", [False, True], ids=["keys", "values"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_append_writes_the_bytes_of_the_reference(head_dim: int, is_value: bool, granularity: str) -> None:
    chosen = [c for c in layout_cases() if (c.head_dim, c.is_value, c.granularity) == (head_dim, is_value, granularity)]
    assert len(chosen) > 40
    for layout in chosen:
        count = 2 * layout.tile_tokens + layout.full_rows + 3
        x = tokens(count, heads=1, dim=head_dim)
        got, want = empty(layout, count, 1), empty(layout, count, 1)
        reference.append(layout, want, 0, x)
        native.append(layout, got, 0, x, [count - 5, 5])
        assert np.array_equal(got, want), layout


@pytest.mark.parametrize("granularity", ["channel", "token"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_any_group_size_and_any_numbers(bits: int, granularity: str) -> None:
    """Odd groups, float32 rows, tiny and huge numbers, constant channels, zero tokens, both zeros."""
    for head_dim, group in ((96, 96), (96, 32), (64, 64), (160, 160), (32, 32)):
        for is_value in (False, True):
            layout = CacheLayout(head_dim, bits, granularity, "none", group, 1, 0, 32, "float", is_value)
            x = tokens(80, heads=1, dim=head_dim, seed=bits)
            x[0, :, 0], x[0, :, 1], x[0, :, 2] = 3.0, 1e-30 * x[0, :, 2], 1e30 * x[0, :, 2]
            x[0, 40], x[0, :, 3] = 0, np.where(np.arange(80) % 2, np.float32(-0.0), np.float32(0))
            x[0, :, 4] = np.abs(x[0, :, 4]) * (np.arange(80) % 3 > 0) * np.float32(-1)
            got, want = empty(layout, 80, 1), empty(layout, 80, 1)
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                reference.append(layout, want, 0, x)
            native.append(layout, got, 0, x, [80])
            assert np.array_equal(got, want), layout


@pytest.mark.parametrize("recent_type", ["float16", "float", "bfloat16"])
@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("is_value", [False, True], ids=["keys", "values"])
def test_appending_in_any_chunks_gives_the_same_bytes(is_value: bool, window: int, recent_type: str) -> None:
    layout = pair(local_window_size=window, recent_type=recent_type)[is_value]
    x = tokens(300)
    want = empty(layout, 400)
    reference.append(layout, want, 0, x)
    for chunks in ([300], [1] * 300, [150, 150], [3, 1, 60, 5, 231], [67, 1, 232], [36, 31, 1, 32, 200]):
        got = empty(layout, 400)
        native.append(layout, got, 0, x, chunks)
        assert np.array_equal(got, want), chunks


@pytest.mark.parametrize("is_value", [False, True], ids=["keys", "values"])
def test_any_bytes_dequantize_as_the_reference_does(is_value: bool) -> None:
    rng = np.random.default_rng(5)
    for layout in (c for c in layout_cases() if c.is_value == is_value and c.tile_tokens == 32):
        tile = rng.integers(0, 256, layout.tile_bytes, np.uint8)
        with np.errstate(invalid="ignore", over="ignore"):
            want = quantizer.decode_tile(layout, tile)
        got = native.decode_tile(layout, tile)
        assert np.array_equal(np.isnan(got), np.isnan(want)) and np.array_equal(got, want, equal_nan=True), layout


@pytest.mark.parametrize("length", [0, 1, 4, 5, 36, 67, 68, 69, 100, 132, 133, 300])
def test_dequantize_reads_the_cache_back(length: int) -> None:
    for window in (0, 50):
        for layout in pair(local_window_size=window, k_rotation="hadamard", v_rotation="none"):
            x = tokens(length)
            block = empty(layout, 300)
            reference.append(layout, block, 0, x)
            want, _ = reference.load(layout, block, length)
            if layout.rotation == "hadamard":
                want = quantizer.rotate(want, layout.rotation_dim)
            blocks = np.stack([np.full_like(block, 0x7F), block])
            for h in range(2):
                assert np.array_equal(native.dequantize(layout, blocks, 1, h, length, stride=70), want[h])
            assert np.array_equal(
                native.dequantize(layout, blocks, 1, 1, length, "float16"), want[1].astype(np.float16)
            )


@pytest.mark.parametrize("length", [3, 50, 68, 69, 99, 100, 131, 133, 300])
@pytest.mark.parametrize("recent_type", ["float16", "float", "bfloat16"])
def test_rewind_leaves_the_bytes_of_the_reference(length: int, recent_type: str) -> None:
    for layout in pair(recent_type=recent_type):
        full = empty(layout, 400)
        reference.append(layout, full, 0, tokens(length))
        floor = reference.rewind_floor(layout, full.shape[1], length, length)
        for new_length in {floor, max(floor, length - 7), length}:
            got, want = full.copy(), full.copy()
            reference.rewind(layout, want, length, new_length)
            native.rewind(layout, got, length, new_length)
            assert np.array_equal(got, want)
        for refused in (floor - 1, length + 1):
            got = full.copy()
            with pytest.raises(native.NativeError, match=f"rewind from {length} tokens; got {refused}"):
                native.rewind(layout, got, length, refused)
            assert np.array_equal(got, full)


def golden_cases() -> dict[str, tuple[CacheLayout, np.ndarray]]:
    """Small caches whose bytes are kept in tests/golden: integers, so that no random generator matters."""
    cases = {}
    for name, change in {
        "default": {},
        "k3v3": {"k_bits": 3, "v_bits": 3},
        "token_k": {"k_granularity": "token", "k_rotation": "hadamard", "k_group_size": 32},
        "channel_v": {"v_granularity": "channel", "v_rotation": "none", "v_bits": 6},
        "k16v16": {"k_bits": 16, "v_bits": 16},
        "byte_channels": {"k_parameter_bits": 8, "v_granularity": "channel", "v_parameter_bits": 8},
        "token_channel": {"k_granularity": "token_channel", "k_rotation": "hadamard", "v_granularity": "token_channel"},
    }.items():
        for layout in CacheLayout.pair(dataclasses.replace(SMALL, **change), 32):  # type: ignore[arg-type]
            index = np.arange(1 * 101 * 32).reshape(1, 101, 32)
            x = ((index * 7919 + 12345) % 1009 - 504).astype(np.float32) / 256
            cases[f"{name}_{'value' if layout.is_value else 'key'}"] = (layout, x)
    return cases


@pytest.mark.parametrize("name", golden_cases())
def test_golden_bytes(name: str) -> None:
    """SKV_WRITE_GOLDEN=1 writes the files again, from the reference: only when layout_version changes."""
    layout, x = golden_cases()[name]
    from_reference, from_library = empty(layout, 101, 1), empty(layout, 101, 1)
    reference.append(layout, from_reference, 0, x)
    native.append(layout, from_library, 0, x, [101])
    file = GOLDEN / f"{name}.bin"
    if os.environ.get("SKV_WRITE_GOLDEN"):
        file.write_bytes(from_reference.tobytes())
    golden = file.read_bytes()
    assert from_reference.tobytes() == golden
    assert from_library.tobytes() == golden


# Attention.


@pytest.mark.parametrize("name", CASES)
def test_attention_is_the_reference_s(name: str) -> None:
    case = CASES[name]
    inputs, want = make_inputs(case), expected(case)
    compare(case, native.Call(case, inputs).run(), want)
    compare(case, native.Call(case, inputs, packed=True).run(), want)


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("name", ["default", "gqa 3", "chunk over three tiles", "ragged chunks", "softcap, prompt"])
def test_threads_change_nothing(name: str, count: int) -> None:
    case = CASES[name]
    inputs = make_inputs(case)
    alone, together = native.Call(case, inputs).run(), native.Call(case, inputs).run(thread_count=count)
    for a, b in zip(alone, together, strict=True):
        assert np.array_equal(a, b)


def test_long_context_is_split_and_merged() -> None:
    case = Case("long", LayerConfig(), num_heads=2, kv_num_heads=1, past_lengths=(3000, 700), head_sink=True)
    inputs, want = make_inputs(case), expected(case)
    for count in (1, 4):
        compare(case, native.Call(case, inputs).run(thread_count=count), want)


@pytest.mark.parametrize("name", ["ragged batch", "ragged chunks", "ragged prompts", "one sequence idle"])
def test_a_batch_equals_its_sequences_one_by_one(name: str) -> None:
    case = CASES[name]
    inputs = make_inputs(case)
    together = native.Call(case, inputs).run()
    for b in range(len(case.past_lengths)):
        alone = native.Call(case, inputs, batch=slice(b, b + 1)).run()
        for x, y in zip(alone, together, strict=True):
            assert np.array_equal(x[0], y[b])


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("chunks", [[150], [1] * 150, [70, 80], [33, 67, 50]])
def test_prefill_in_any_chunks_leaves_the_same_cache(chunks: list[int], window: int) -> None:
    case = Case("chunks", SMALL, past_lengths=(0,), new_tokens=150, local_window_size=window)
    inputs, want = make_inputs(case), expected(case)
    done, past_key, past_value = 0, inputs.past_key, inputs.past_value
    for size in chunks:
        span = slice(done, done + size)
        done += size
        part = dataclasses.replace(case, new_tokens=size)
        given = dataclasses.replace(
            inputs,
            query=inputs.query[:, span],
            key=inputs.key[:, span],
            value=inputs.value[:, span],
            past_key=past_key,
            past_value=past_value,
            seqlens_k=np.array([done - 1], np.int32),
        )
        _, past_key, past_value = native.Call(part, given).run()
    assert np.array_equal(past_key, want[1]) and np.array_equal(past_value, want[2])


def test_calls_at_the_same_time_do_not_meet() -> None:
    cases = [CASES[name] for name in ("default", "gqa 3", "K3V5", "chunk with a past", "head sink", "float16")] * 4
    wants = {case.name: native.Call(case, make_inputs(case)).run() for case in cases}
    calls = [native.Call(case, make_inputs(case)) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(native.Call.run, calls))
    for case, result in zip(cases, results, strict=True):
        for got, want in zip(result, wants[case.name], strict=True):
            assert np.array_equal(got, want)


def test_not_finite_tokens_are_stored_as_zero_and_reported() -> None:
    case = CASES["the call flushes the first tile"]
    inputs = make_inputs(case)
    clean = native.Call(case, inputs)
    clean.run()
    assert clean.not_finite.array[0] == 0
    for bad in (np.nan, np.inf, -np.inf):
        poisoned = dataclasses.replace(inputs, key=inputs.key.copy())
        poisoned.key[0, 0, 5] = bad
        zeroed = dataclasses.replace(inputs, key=inputs.key.copy())
        zeroed.key[0, 0, 5] = 0
        call = native.Call(case, poisoned)
        call.run()
        assert call.not_finite.array[0] == 1
        assert np.array_equal(call.caches[0].array, native.Call(case, zeroed).run()[1])


def test_a_query_that_is_not_finite_gives_not_a_number_in_its_row_only() -> None:
    case = CASES["default"]
    inputs = make_inputs(case)
    want = native.Call(case, inputs).run()[0]
    inputs.query[0, 0, 64 + 3] = np.inf
    got = native.Call(case, inputs).run()[0]
    assert np.isnan(got[..., 64:128]).all()
    assert np.array_equal(got[..., :64], want[..., :64]) and np.array_equal(got[..., 128:], want[..., 128:])


# What is refused.


def test_beyond_the_capacity_is_refused_and_nothing_is_written() -> None:
    case = dataclasses.replace(CASES["last token of the capacity"], name="beyond the capacity")
    inputs = make_inputs(case)
    inputs.seqlens_k[0] += 1
    for function in ("skv_attention", "skv_append"):
        call = native.Call(case, inputs)
        before = [buffer.memory.copy() for buffer in call.buffers]
        with pytest.raises(native.NativeError, match=r"key cache: total length of sequence 0; got 196 tokens; .* 195"):
            call.run(function)
        assert all(np.array_equal(a, b.memory) for a, b in zip(before, call.buffers, strict=True))


def test_one_sequence_beyond_the_capacity_stops_the_whole_batch() -> None:
    case = CASES["ragged batch"]
    inputs = make_inputs(case)
    inputs.seqlens_k[2] = 100_000
    call = native.Call(case, inputs)
    with pytest.raises(native.NativeError, match="sequence 2"):
        call.run()
    assert np.array_equal(call.caches[0].array, inputs.past_key) and (call.output.array == 7).all()


@pytest.mark.parametrize(
    ("seqlens_k", "query_seqlens", "message"),
    [
        (-2, None, "seqlens_k; got -2"),
        (-(2**31), None, "seqlens_k; got -2147483648"),
        (2**31 - 1, None, "total length of sequence 0; got 2147483648 tokens"),
        (0, 2, "lengths; got 2 new tokens of 1"),
        (10, -1, "lengths; got -1 new tokens"),
        (10, 3, "lengths; got 3 new tokens of 11 in all; expected 0 ... 2"),
    ],
)
def test_lengths_that_cannot_be_are_refused(seqlens_k: int, query_seqlens: int | None, message: str) -> None:
    case = Case("lengths", SMALL, past_lengths=(10,), new_tokens=2, query_seqlens=(2,))
    inputs = make_inputs(case)
    inputs.seqlens_k[0] = seqlens_k
    new = None if query_seqlens is None else np.array([query_seqlens], np.int32)
    call = native.Call(case, dataclasses.replace(inputs, query_seqlens=new))
    with pytest.raises(native.NativeError, match=message):
        call.run()


BAD_FIELDS = {
    "batch": (-1, "batch and tokens; got -1"),
    "tokens": (-3, "batch and tokens"),
    "num_heads": (3, "num_heads; got 3; expected a multiple of kv_num_heads, 2"),
    "kv_num_heads": (0, "kv_num_heads; got 0; expected at least 1"),
    "type": (9, "type; got 9"),
    "output": (None, "output; got null"),
    "seqlens_k": (None, "seqlens_k; got null"),
    "scale": (-1.0, "scale and softcap"),
    "softcap": (float("nan"), "scale and softcap"),
    "query.data": (None, "query: data; got null"),
    "key.data": (None, "key: data; got null"),
    "value.token_stride": (127, "value: token_stride; got 127; expected at least 128"),
    "key_cache.data": (None, "key cache: data; got null"),
    "value_cache.block_bytes": (100, "value cache: block_bytes; got 100"),
    "key_cache.block_bytes": (1 << 20 | 8, "key cache: block_bytes"),
    "key_cache.layout.bits": (7, "key cache: bits; got 7"),
    "value_cache.layout.bits": (0, "value cache: bits; got 0"),
    "key_cache.layout.head_dim": (0, "key cache: head_dim; got 0"),
    "key_cache.layout.group_size": (48, "key cache: group_size; got 48; expected a divisor of 64"),
    "key_cache.layout.granularity": (3, "key cache: granularity"),
    "key_cache.layout.rotation": (-1, "key cache: rotation"),
    "key_cache.layout.tile_tokens": (48, "key cache: tile_tokens; got 48"),
    "key_cache.layout.recent_type": (3, "key cache: recent_type"),
    "key_cache.layout.recent_tokens": (-1, "key cache: recent_tokens"),
    "key_cache.layout.num_sink_tokens": (5000, "key cache: num_sink_tokens"),
    "key_cache.layout.is_value": (1, "key cache: is_value"),
    "value_cache.layout.local_window_size": (9, "value cache: local_window_size; got 9; expected 0"),
}


@pytest.mark.parametrize("field", BAD_FIELDS)
def test_bad_arguments_are_refused_and_nothing_is_written(field: str) -> None:
    value, message = BAD_FIELDS[field]
    call = native.Call(CASES["default"], make_inputs(CASES["default"]))
    *path, last = field.split(".")
    target = call.call
    for name in path:
        target = getattr(target, name)
    setattr(target, last, value)
    before = [buffer.memory.copy() for buffer in call.buffers]
    with pytest.raises(native.NativeError, match=message) as error:
        call.run()
    assert error.value.status in (1, 2)
    assert all(np.array_equal(a, b.memory) for a, b in zip(before, call.buffers, strict=True))


def test_null_calls_and_bfloat16_are_refused() -> None:
    for function in ("skv_attention", "skv_append"):
        with pytest.raises(native.NativeError, match="call; got null"):
            native.check(getattr(native.library(), function)(None, None))
    with pytest.raises(native.NativeError, match="skv_decode_tile: got null"):
        native.check(native.library().skv_decode_tile(None, None, None))
    call = native.Call(CASES["default"], make_inputs(CASES["default"]))
    call.call.type = 2
    with pytest.raises(native.NativeError, match="bfloat16") as error:
        call.run()
    assert error.value.status == 2


def test_misaligned_blocks_are_refused() -> None:
    call = native.Call(CASES["default"], make_inputs(CASES["default"]))
    call.call.key_cache.data += 8
    with pytest.raises(native.NativeError, match="expected a multiple of 16"):
        call.run()


def test_an_empty_batch_is_no_error() -> None:
    call = native.Call(CASES["default"], make_inputs(CASES["default"]), batch=slice(0, 0))
    call.run()


@pytest.mark.parametrize(("b", "h", "length", "message"), [
    (0, 2, 10, "sequence and head"), (-1, 0, 10, "sequence and head"), (0, 0, -1, "length; got -1"),
    (0, 0, 10**9, "total length"),
])  # fmt: skip
def test_dequantize_refuses_what_is_not_there(b: int, h: int, length: int, message: str) -> None:
    layout = pair()[0]
    memory = native.Guarded(empty(layout, 300))
    out = native.Guarded(np.zeros((4, 64), np.float32))
    held = SkvCache(SkvLayout.of(layout), memory.pointer, memory.array.shape[1])
    with pytest.raises(native.NativeError, match=message):
        native.check(native.library().skv_dequantize(ctypes.byref(held), 2, b, h, length, 1, out.pointer, 64))
    assert not out.array.any()
