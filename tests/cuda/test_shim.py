"""The CUDA kernels against the reference, on the CPU through the shim: every case, byte for byte where they write."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import sys

import gpu_test
import numpy as np
import pytest
import rewinding
from builds import ROOT, build_shim
from harness import AUTO, INVALID_ARGUMENT, MMA, SIMPLE, TYPES, HostMemory, KernelError, Library, difference

from skv_export.native.library import SkvCache
from skv_export.spec.conformance import (
    Case,
    all_layouts,
    make_basis,
    make_inputs,
    not_a_number_cases,
    op_cases,
    output_error,
)
from skv_export.spec.layout import CacheLayout
from skv_export.spec.quantizer import decode_tile, rotate
from skv_export.spec.recipe import LayerConfig
from skv_export.spec.reference import append, load, rewind, rewind_floor

FOLDED_TOLERANCE = 6e-3
"""Loud keys per channel: scores of up to 45 from a float16 query with the scales folded in (2^-12 of each part)."""
BFLOAT16_TOLERANCE = 8e-3
"""The output itself is rounded to 8 bits."""
CASES = op_cases()


@pytest.fixture(scope="session")
def kernels() -> Library:
    return Library(build_shim(ROOT / "build" / "cuda_shim"), HostMemory())


def check(case: Case, kernels: Library, path: int, tolerance: float = 0.0) -> str:
    """Runs a case and compares output and bytes with the reference; returns the path taken."""
    error, taken = difference(case, kernels, path)
    assert error <= (tolerance or case.tolerance)
    return taken


@pytest.mark.parametrize("path", [SIMPLE, MMA])
@pytest.mark.parametrize("head_sink", [False, True])
def test_more_splits_than_a_warp_has_lanes(head_sink: bool, path: int) -> None:
    """As a card with many multiprocessors makes them: the merge takes them in turns."""
    kernels = Library(build_shim(ROOT / "build" / "cuda_shim"), HostMemory(), multiprocessors=100)
    config = LayerConfig(num_sink_tokens=4, recent_tokens=32, tile_tokens=32)
    past = (1500 if path == SIMPLE else 5000,)
    case = Case("many splits", config, 64, 2, 1, past, dtype="float16", head_sink=head_sink, spare_tokens=300)
    _, call, context = kernels.prepare(case, make_inputs(case), path)
    rows = kernels.lib.skv_cuda_scratch_bytes(ctypes.byref(call), ctypes.byref(context)) // (2 * 64 * 4)
    assert rows > 32
    check(case, kernels, path, 0.0 if path == SIMPLE else 6e-3)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_simple_kernels_equal_the_reference(case: Case, kernels: Library) -> None:
    assert check(case, kernels, SIMPLE).startswith("decode_simple")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_chosen_kernels_equal_the_reference(case: Case, kernels: Library) -> None:
    """Every case with float16 inputs, on the path that a call on a GPU takes; it must be the one that covers it."""
    k, v = case.layouts
    fast = (
        k.padded_dim in (64, 128, 256)
        and (k.bits, v.bits) in PAIRS
        and k.recent_type == "float16"
        and all(x.granularity == "channel" or x.group_size % 64 == 0 for x in (k, v))
    )
    path = check(dataclasses.replace(case, dtype="float16"), kernels, AUTO)
    assert path.split()[0].rstrip(":") == (
        "prefill" if case.new_tokens > 8 else "decode_mma" if fast else "decode_simple"
    ), path


@pytest.mark.parametrize("case", not_a_number_cases(), ids=lambda c: c.name)
def test_what_is_not_a_number_stays_where_it_belongs(case: Case, kernels: Library) -> None:
    check(case, kernels, SIMPLE)
    paths = {
        check(dataclasses.replace(case, dtype=x), kernels, AUTO, BFLOAT16_TOLERANCE) for x in ("float16", "bfloat16")
    }
    expected = "prefill" if case.new_tokens > 8 else "decode_simple" if case.config.k_bits == 16 else "decode_mma"
    assert {path.split()[0].rstrip(":") for path in paths} == {expected}


SMALL_CHUNKS = LayerConfig(num_sink_tokens=4, recent_tokens=32, tile_tokens=32)
PAIRS = ((8, 8), (4, 4), (4, 3), (4, 2), (3, 3), (3, 2), (2, 2))
INSTANCES = [
    (head_dim, pair, k, v)
    for head_dim in (64, 128, 256)
    for pair in PAIRS
    for k in ("channel", "token", "token_channel")
    for v in ("channel", "token", "token_channel")
    if (head_dim, pair[1], v) != (256, 3, "channel") or k == "channel"  # see mma_instances.cuh
]


@pytest.mark.parametrize("instance", INSTANCES, ids=lambda x: f"D{x[0]} K{x[1][0]}V{x[1][1]} {x[2]} {x[3]}")
def test_every_instance_of_decode_mma(instance: tuple[int, tuple[int, int], str, str], kernels: Library) -> None:
    head_dim, (k_bits, v_bits), k_granularity, v_granularity = instance
    turn = INSTANCES.index(instance)
    config = dataclasses.replace(
        LayerConfig(num_sink_tokens=4, recent_tokens=32),
        k_bits=k_bits,
        v_bits=v_bits,
        k_granularity=k_granularity,
        v_granularity=v_granularity,
        k_rotation="hadamard" if k_granularity == "token_channel" else "none",
        v_rotation="none" if v_granularity == "channel" else "hadamard",
        tile_tokens=(32, 64, 128)[turn % 3],
    )
    for i, (heads, tokens) in enumerate(((4, 1), (5, 3))):  # 8 columns of queries, and 16
        bits = (16, 8)[(turn + i) % 2]
        config = dataclasses.replace(config, k_parameter_bits=bits, v_parameter_bits=bits)
        case = Case(
            f"instance {instance} {heads} {tokens}",
            config,
            head_dim,
            heads,
            1,
            past_lengths=(290,),
            new_tokens=tokens,
            dtype="float16",
        )
        assert check(case, kernels, MMA, FOLDED_TOLERANCE).startswith(f"decode_mma K{k_bits}V{v_bits} D{head_dim}")


MIDDLE = Case("between decode and prompt", SMALL_CHUNKS, 64, 4, 2, (900, 300), 9, dtype="float16")
MIDDLES = [
    MIDDLE,
    dataclasses.replace(MIDDLE, new_tokens=63, query_seqlens=(63, 20), head_sink=True, softcap=20.0),
    dataclasses.replace(MIDDLE, new_tokens=33, local_window_size=600, head_dim=128, past_lengths=(1500, 20)),
    dataclasses.replace(MIDDLE, new_tokens=12, not_numbers=(("key", 0, 3, 70), ("value", 1, 2, 9), ("query", 1, 7, 5))),
]


@pytest.mark.parametrize("case", MIDDLES, ids=lambda c: f"{c.new_tokens} tokens")
def test_few_new_tokens_split_a_long_past(case: Case) -> None:
    """8 blocks would walk over 128k tokens else. Partial outputs, four blocks of keys each, have room in scratch."""
    case = dataclasses.replace(case, name=f"middle {case.new_tokens}")
    few, many = (Library(build_shim(ROOT / "build" / "cuda_shim"), HostMemory(), multiprocessors=n) for n in (1, 100))
    assert check(case, many, AUTO).startswith("prefill")
    inputs = make_inputs(case)
    rows = 2 * 2 * case.kv_num_heads * max(case.total_lengths) * case.head_dim * 2
    scratch = [library.prepare(case, inputs)[2].scratch_bytes for library in (few, many)]
    columns = case.new_tokens * 2
    seen = min(case.local_window_size + case.new_tokens if case.local_window_size else 10**6, max(case.total_lengths))
    assert scratch[1] - scratch[0] >= 4 * (seen // 256) * columns * (case.head_dim + 2) * 4 > 0
    assert abs(scratch[0] - rows) < 8192


def test_a_prompt_dequantizes_so_many_heads_at_a_time(kernels: Library) -> None:
    """However many sequences a call has: three of six here, then one; the results are the same."""
    case = Case("bounded", SMALL_CHUNKS, 64, 4, 2, (200, 90, 300), 40, dtype="float16")
    inputs = make_inputs(case)
    whole = kernels.attention(case, inputs)
    one = 2 * max(case.total_lengths) * 64 * 2
    sizes = []
    for rows_bytes in (3 * (one + 1), 1):
        bounded = Library(build_shim(ROOT / "build" / "cuda_shim"), HostMemory(), rows_bytes=rows_bytes)
        result = bounded.attention(case, inputs)
        assert all(np.array_equal(getattr(result, x), getattr(whole, x)) for x in ("output", "key", "value"))
        sizes.append(bounded.prepare(case, inputs)[2].scratch_bytes)
    full = kernels.prepare(case, inputs)[2].scratch_bytes
    assert [round((full - size) / one) for size in sizes] == [3, 5]


@pytest.mark.parametrize("tokens", [1, 40])
def test_bfloat16(tokens: int, kernels: Library) -> None:
    case = Case(f"bfloat16, {tokens}", LayerConfig(), past_lengths=(300, 7), new_tokens=tokens, dtype="bfloat16")
    check(case, kernels, AUTO, BFLOAT16_TOLERANCE)


def test_many_columns_take_several_blocks(kernels: Library) -> None:
    """Eight tokens of sixteen heads: 128 columns; and one token of the same."""
    for tokens in (1, 8):
        case = Case(f"columns {tokens}", LayerConfig(), 64, 16, 1, (200,), tokens, dtype="float16")
        assert check(case, kernels, AUTO).startswith("decode_mma")


@pytest.mark.parametrize("head_dim", [64, 80])
def test_calibrated_keys_are_read_back_and_rewound_in_the_models_basis(head_dim: int, kernels: Library) -> None:
    config = LayerConfig(k_bits=3, num_sink_tokens=4, recent_tokens=32, tile_tokens=32)
    layout = CacheLayout.pair(config, head_dim)[0]
    basis = make_basis(2, head_dim, layout.padded_dim)
    rows, width = layout.shape(200)
    block = np.full((2, rows * width), 0xFF, np.uint8)
    keys = np.random.default_rng(0).standard_normal((2, 200, head_dim)).astype(np.float32)
    append(layout, block, 0, keys, basis)
    want, _ = load(layout, block, 200, basis)
    for head in range(2):
        got = kernels.dequantize(layout, block, head, 200, basis)
        assert np.array_equal(got, want[head, :, :head_dim])
    rewound = kernels.rewind(layout, block, 200, 171, basis=basis)
    rewind(layout, block, 200, 171, basis=basis)
    assert np.array_equal(rewound, block)


def test_some_of_the_constants_are_refused(kernels: Library) -> None:
    case = next(case for case in CASES if case.name == "calibrated, both")
    _, call, context = kernels.prepare(case, make_inputs(case))
    call.key_cache.key_feedback = None
    status = kernels.lib.skv_cuda_attention(ctypes.byref(call), ctypes.byref(context))
    assert status == INVALID_ARGUMENT and b"basis; got some matrices" in kernels.lib.skv_cuda_last_error()
    values = SkvCache.of(case.layouts[1], 256, 1 << 16, make_basis(2, 64, 64))
    status = kernels.lib.skv_cuda_rewind(ctypes.byref(values), 2, 0, *3 * [ctypes.c_int64(0)], None)
    assert status == INVALID_ARGUMENT and b"value cache: basis; got 2 bits" in kernels.lib.skv_cuda_last_error()


@pytest.mark.parametrize("name", ["decode_mma", "decode_simple", "prefill"])
def test_attending_alone_appends_nothing(kernels: Library, name: str) -> None:
    """What layers do that read another layer's cache."""
    ways = {"decode_mma": ("float16", 1), "decode_simple": ("float32", 1), "prefill": ("float16", 40)}
    dtype, tokens = ways[name]
    case = Case("reads", LayerConfig(), past_lengths=(200, 90), new_tokens=tokens, dtype=dtype)
    inputs = make_inputs(case)
    buffers, call, context = kernels.prepare(case, inputs)
    assert name.encode() in kernels.lib.skv_cuda_path(ctypes.byref(call), ctypes.byref(context))
    kernels.check(kernels.lib.skv_cuda_attend(ctypes.byref(call), ctypes.byref(context)))
    got = kernels.memory.get(buffers["output"]).astype(np.float32)
    assert output_error(got, kernels.attention(case, inputs).output) == 0
    for past in ("past_key", "past_value"):
        assert np.array_equal(kernels.memory.get(buffers[past]), getattr(inputs, past))


LAYOUTS = list(itertools.islice(all_layouts(), 0, None, 7))


def test_tiles_of_every_layout(kernels: Library) -> None:
    """Append fills one tile and more, byte for byte; the tile is read back exactly."""
    for layout in LAYOUTS:
        other = dataclasses.replace(layout, is_value=not layout.is_value)
        length = layout.full_rows + 5
        rng = np.random.default_rng(layout.bits)
        x = rng.standard_normal((1, length, layout.head_dim)).astype(np.float32)
        x[0, :, 0], x[0, 5] = 3, 0
        x[0, :, 1] = np.where(np.arange(length) % 2, np.float32(0), np.float32(-0.0))
        block = np.full((1, np.prod(layout.shape(length + 1))), 0xFF, np.uint8)
        appended = append_on_device(kernels, layout, other, block, x)
        append(layout, block, 0, x)
        assert np.array_equal(appended, block), layout
        tile = block[0, : layout.tile_bytes]
        assert np.array_equal(kernels.decode_tile(layout, tile), decode_tile(layout, tile)), layout


def append_on_device(
    kernels: Library, layout: CacheLayout, other: CacheLayout, block: np.ndarray, x: np.ndarray
) -> np.ndarray:
    """Appends ``x`` [1, S, head_dim] to one empty block through skv_cuda_append; the other tensor gets them too."""
    tokens = x.shape[1]
    pair = (other, layout) if layout.is_value else (layout, other)
    case = Pair(pair, tokens)
    blocks = [
        block if held is layout else np.full((1, np.prod(held.shape(tokens + 1))), 0xFF, np.uint8) for held in pair
    ]
    inputs = dataclasses.replace(
        make_inputs(Case("append", LayerConfig(), layout.head_dim, 1, 1, past_lengths=(0,), new_tokens=tokens)),
        key=x,
        value=x,
        past_key=blocks[0].reshape(1, 1, 1, -1),
        past_value=blocks[1].reshape(1, 1, 1, -1),
    )
    result = kernels.attention(case, inputs, append_only=True)  # type: ignore[arg-type]
    return (result.value if layout.is_value else result.key).reshape(1, -1)


@dataclasses.dataclass(frozen=True)
class Pair:
    """As much of a Case as an append of any two layouts needs."""

    layouts: tuple[CacheLayout, CacheLayout]
    new_tokens: int
    num_heads: int = 1
    kv_num_heads: int = 1
    softcap: float = 0.0
    dtype: str = "float32"

    @property
    def head_dim(self) -> int:
        return self.layouts[0].head_dim

    @property
    def total_lengths(self) -> tuple[int, ...]:
        return (self.new_tokens,)


SMALL = LayerConfig(num_sink_tokens=4, recent_tokens=32, tile_tokens=32)
READ_BACK = [
    {"k_bits": bits, "v_bits": bits, "v_rotation": rotation, "recent_type": recent, "v_granularity": granularity}
    for bits, rotation, recent, granularity in [
        (2, "hadamard", "float16", "token"),
        (3, "none", "float", "token"),
        (5, "hadamard", "bfloat16", "token"),
        (16, "none", "float16", "token"),
        (3, "hadamard", "float16", "token_channel"),
        (2, "none", "float16", "channel"),
        (4, "none", "float", "token_channel"),
    ]
]


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("changes", READ_BACK, ids=lambda c: f"{c['v_bits']} bits per {c['v_granularity']}")
def test_dequantize_and_rewind(changes: dict[str, object], window: int, kernels: Library) -> None:
    config = dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]
    if config.v_granularity != "token":
        config = dataclasses.replace(config, k_granularity=config.v_granularity, k_parameter_bits=8, v_parameter_bits=8)
    for layout in CacheLayout.pair(config, 64, window):
        length = 210
        block = np.full((2, np.prod(layout.shape(300))), 0xFF, np.uint8)
        append(layout, block, 0, np.random.default_rng(0).standard_normal((2, length, 64)).astype(np.float32))
        expected, _ = load(layout, block, length)
        if layout.rotation == "hadamard":
            expected = rotate(expected, layout.rotation_dim)
        assert np.array_equal(kernels.dequantize(layout, block, 1, length), expected[1])
        floor = rewind_floor(layout, block.shape[1], length, length)
        for new_length in (length, length - 1, length - 17, floor):
            back = kernels.rewind(layout, block, length, new_length)
            taken = block.copy()
            rewind(layout, taken, length, new_length)
            assert np.array_equal(back, taken)
        with pytest.raises(KernelError, match="rewind"):
            kernels.rewind(layout, block, length, floor - 1)


@pytest.mark.parametrize("name", [name for name in rewinding.layouts() if "recent 16" in name])
def test_rewind_in_any_order_is_a_fresh_run(name: str, kernels: Library) -> None:
    def rewind(layout: CacheLayout, block: np.ndarray, length: int, longest: int, new_length: int) -> None:
        block[...] = kernels.rewind(layout, block, length, new_length, longest)

    layout = dataclasses.replace(rewinding.layouts()[name], head_dim=64)  # all that a small build of the shim has
    rewinding.check_random_walk(layout, append, rewind, 0, steps=8)


def test_no_cache_is_refused(kernels: Library) -> None:
    lengths = [ctypes.c_int64(n) for n in (9, 9, 8)]
    statuses = (
        kernels.lib.skv_cuda_rewind(None, 1, 0, *lengths, None),
        kernels.lib.skv_cuda_dequantize(None, 1, 0, 0, lengths[0], TYPES["float"], None, ctypes.c_int64(64), None),
    )
    assert statuses == (INVALID_ARGUMENT, INVALID_ARGUMENT)


def test_random_bytes_are_dequantized(kernels: Library) -> None:
    rng = np.random.default_rng(1)
    for layout in LAYOUTS[::3]:
        tile = rng.integers(0, 256, layout.tile_bytes, np.uint8)
        with np.errstate(all="ignore"):
            expected = decode_tile(layout, tile)
        assert np.array_equal(kernels.decode_tile(layout, tile), expected, equal_nan=True), layout


def test_lengths_that_cannot_be_touch_nothing(kernels: Library) -> None:
    """Only the device knows them: the output is NaN, the cache as before, the other sequences are right."""
    case = Case("lengths", SMALL, past_lengths=(100, 100, 100, 100))
    inputs = make_inputs(case)
    good = kernels.attention(case, inputs)
    for bad, fresh in ((10**6, 1), (-2, 1), (100, 2), (100, -1)):
        seqlens = inputs.seqlens_k.copy()
        seqlens[1] = bad
        query_seqlens = np.array([1, fresh, 1, 1], np.int32)
        result = kernels.attention(case, dataclasses.replace(inputs, seqlens_k=seqlens, query_seqlens=query_seqlens))
        assert np.isnan(result.output[1]).all()
        assert np.array_equal(result.key[1], inputs.past_key[1]) and np.array_equal(
            result.value[1], inputs.past_value[1]
        )
        others = [0, 2, 3]
        assert np.array_equal(result.output[others], good.output[others])
        assert np.array_equal(result.key[others], good.key[others])


def test_bad_arguments_are_refused_before_anything_is_launched(kernels: Library) -> None:
    case = Case("refused", SMALL)
    inputs = make_inputs(case)

    def refused(match: str, **changes: object) -> None:
        buffers, call, context = kernels.prepare(case, inputs)
        for name, value in changes.items():
            target: object = context if hasattr(context, name) else call
            *parents, field = name.split("__")
            for parent in parents:
                target = getattr(target, parent)
            setattr(target, field, value)
        with pytest.raises(KernelError, match=match) as error:
            kernels.check(kernels.lib.skv_cuda_attention(ctypes.byref(call), ctypes.byref(context)))
        assert error.value.status == INVALID_ARGUMENT
        assert np.array_equal(kernels.memory.get(buffers["past_key"]), inputs.past_key)

    refused("capacity of", max_length=10**5)
    refused("total length; got -1", max_length=-1)
    refused("bits; got 7", key_cache__layout__bits=7)
    refused("group_size", value_cache__layout__group_size=48)
    refused("layouts that differ", value_cache__layout__num_sink_tokens=5)
    refused("block bytes", key_cache__block_bytes=64)
    refused("key cache: data; got null", key_cache__data=None)
    refused("num_heads", num_heads=3)
    refused("got null", seqlens_k=None)
    refused("scratch; got", scratch_bytes=0)
    refused("type; got 9", type=9)
    refused("exchanged", key_cache__layout__is_value=1)


def test_prompts_of_any_length_but_in_decode_simple(kernels: Library) -> None:
    """A grid's z has room for 65535 groups of 4 queries; only decode_simple needs it."""
    case = Case("long", SMALL, num_heads=16, kv_num_heads=1, dtype="float16")
    _, call, context = kernels.prepare(case, make_inputs(case))
    call.tokens = 131_072
    size = kernels.lib.skv_cuda_scratch_bytes
    assert size(ctypes.byref(call), ctypes.byref(context)) > 0
    context.path = SIMPLE
    assert size(ctypes.byref(call), ctypes.byref(context)) == -INVALID_ARGUMENT
    assert b"at most 262140 for decode_simple" in kernels.lib.skv_cuda_last_error()


def test_the_gpu_test_itself(kernels: Library) -> None:
    """``make gpu-test`` needs a card; what else it does, it does here, with the shim in the card's place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_test.gpu, "require", lambda: "shim")
        patch.setattr(gpu_test.gpu, "load", lambda: kernels)
        patch.setattr(gpu_test, "captured", lambda call: lambda: call(None))
        patch.setattr(sys, "argv", ["gpu_test.py", "--short"])
        assert gpu_test.main() == 0


def test_not_finite_input_is_stored_as_zero_and_reported(kernels: Library) -> None:
    case = Case("not finite", SMALL, past_lengths=(67,))
    inputs = make_inputs(case)
    inputs.key[0, 0, 3] = np.nan
    inputs.value[0, 0, 5] = np.inf
    buffers, call, context = kernels.prepare(case, inputs)
    kernels.check(kernels.lib.skv_cuda_append(ctypes.byref(call), ctypes.byref(context)))
    key, value = (np.array(x) for x in (inputs.past_key, inputs.past_value))
    for layout, cache, x in zip(case.layouts, (key, value), (inputs.key, inputs.value), strict=True):
        append(layout, cache[0].reshape(2, -1), 67, x[0].reshape(1, 2, -1).swapaxes(0, 1))
    assert np.array_equal(kernels.memory.get(buffers["past_key"]), key)
    assert np.array_equal(kernels.memory.get(buffers["past_value"]), value)
    assert kernels.memory.get(buffers["not_finite"])[0] == 1


def test_an_idle_call_launches_nothing(kernels: Library) -> None:
    case = Case("idle", SMALL)
    inputs = make_inputs(case)
    buffers, call, context = kernels.prepare(case, inputs, AUTO)
    call.tokens = 0
    kernels.check(kernels.lib.skv_cuda_attention(ctypes.byref(call), ctypes.byref(context)))
    assert np.array_equal(kernels.memory.get(buffers["past_key"]), inputs.past_key)
