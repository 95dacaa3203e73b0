"""Properties of the layout and the quantizer that hold for any shape and any numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from skv_export.errors import SkvError
from skv_export.spec.layout import CacheLayout
from skv_export.spec.quantizer import MIDRISE_STEP, decode_tile, dequantize, quantize, to_half
from skv_export.spec.recipe import BITS, TILE_TOKENS
from skv_export.spec.reference import append, load, stored

unhurried = settings(deadline=None)


@st.composite
def layouts(draw: st.DrawFn, *, bits: tuple[int, ...] = BITS, windows: bool = True) -> CacheLayout:
    head_dim = draw(st.integers(1, 200))
    padded = -(-head_dim // 32) * 32
    granularity, parameter_bits = draw(st.sampled_from((("channel", 16), ("channel", 8), ("token", 16))))
    return CacheLayout(
        head_dim=head_dim,
        bits=draw(st.sampled_from(bits)),
        granularity=granularity,
        parameter_bits=parameter_bits,
        rotation=draw(st.sampled_from(("none", "hadamard"))),
        group_size=draw(st.sampled_from([g for g in (32, 64, 96, 128) if padded % g == 0])),
        num_sink_tokens=draw(st.integers(0, 9)),
        recent_tokens=draw(st.integers(0, 70)),
        tile_tokens=draw(st.sampled_from(TILE_TOKENS)),
        recent_type=draw(st.sampled_from(("float16", "float", "bfloat16"))),
        is_value=draw(st.booleans()),
        local_window_size=draw(st.integers(0, 300)) if windows else 0,
    )


def random_tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@unhurried
@given(layouts(), st.integers(0, 5000))
def test_a_shape_holds_what_it_was_made_for(layout: CacheLayout, length: int) -> None:
    rows, width = layout.shape(length)
    size = rows * width
    capacity = layout.capacity(size)
    assert width % 16 == 0 and size % 16 == 0
    assert capacity is None or capacity >= length
    if capacity is None:
        assert layout.tiles_in(size) >= layout.window_tiles
    assert rows == 1 or layout.block_bytes(length) > size - width, "one row fewer would have been enough"


@unhurried
@given(layouts(), st.integers(0, 5000))
def test_every_token_has_one_place(layout: CacheLayout, length: int) -> None:
    n_q, sinks = layout.quantized_tokens(length), layout.num_sink_tokens
    assert n_q % layout.tile_tokens == 0 and layout.quantized_tokens(length + 1) >= n_q
    exact = [p for p in range(length) if p < sinks or p >= sinks + n_q]
    rows = [layout.full_row(p) for p in exact]
    assert len(set(rows)) == len(rows) and all(0 <= r < layout.full_rows for r in rows)
    assert len(exact) + n_q == length
    if length >= sinks + layout.recent_tokens:
        assert sinks + n_q <= length - layout.recent_tokens, "a recent token is in a tile"


@unhurried
@given(layouts(bits=BITS[:-1]), st.integers(0, 2**32))
def test_packing_loses_nothing(layout: CacheLayout, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**layout.bits, (2, layout.tile_tokens, layout.padded_dim), np.uint8)
    if layout.parameter_bits == 8:
        parameters = [rng.integers(0, 256, (2, layout.parameter_bytes), np.uint8)]
    elif layout.granularity == "channel":
        parameters = [rng.standard_normal((2, layout.padded_dim)).astype(np.float16) for _ in range(2)]
    else:
        parameters = [rng.standard_normal((2, layout.num_groups, layout.tile_tokens)).astype(np.float16)]
    scale, offset = (*parameters, None)[:2]
    tile = layout.pack_tile(codes, scale, offset)
    assert tile.shape == (2, layout.tile_bytes)
    back = layout.unpack_tile(tile)
    assert np.array_equal(back[0], codes) and np.array_equal(back[1], scale)
    assert back[2] is None if offset is None else np.array_equal(back[2], offset)


@unhurried
@given(layouts(bits=BITS[:-1], windows=False), st.integers(0, 2**32))
def test_every_byte_of_a_tile_means_something(layout: CacheLayout, seed: int) -> None:
    tile = np.random.default_rng(seed).integers(0, 256, layout.tile_bytes, np.uint8)
    assert np.array_equal(layout.pack_tile(*layout.unpack_tile(tile)), tile)


finite = st.floats(-30000, 30000, width=16)  # a range beyond 65504 saturates its scale


@unhurried
@given(st.sampled_from(BITS[:-1]), hnp.arrays(np.float16, (32, 32), elements=finite))
def test_channel_codes_are_within_half_a_step(bits: int, x: np.ndarray) -> None:
    layout = CacheLayout(32, bits, "channel", "none", 32, 0, 0, 32, "float16", False)
    x = x.astype(np.float32)
    codes, scale, offset = quantize(layout, x)
    assert codes.max() <= 2**bits - 1 and np.isfinite(scale).all() and offset is not None
    error = np.abs(dequantize(layout, codes, scale, offset) - x)
    # Half a step, and what rounding the scale and the offset to float16 can add (a zero scale may hide a tiny range).
    rounding = (2**bits - 1) * np.abs(scale.astype(np.float32)) * 2.0**-11 + np.abs(x).max(0) * 2.0**-11 + 2e-7
    assert (error <= 0.5 * scale.astype(np.float32) + rounding + (2**bits - 1) * 3e-8).all()


@unhurried
@given(st.sampled_from(sorted(MIDRISE_STEP)), hnp.arrays(np.float16, (32, 32), elements=finite))
def test_midrise_keeps_the_projection_on_itself(bits: int, x: np.ndarray) -> None:
    layout = CacheLayout(32, bits, "token", "none", 32, 0, 0, 32, "float16", True)
    x = x.astype(np.float32)
    codes, scale, _ = quantize(layout, x)
    assert codes.max() <= 2**bits - 1 and (scale >= 0).all() and np.isfinite(scale).all()
    back, wide = dequantize(layout, codes, scale, None).astype(np.float64), x.astype(np.float64)
    normal = (scale[0] > 1e-3) & (scale[0] < 65504)  # float16 holds these to 11 bits
    energy = (wide * wide).sum(-1)[normal]
    assert np.allclose((wide * back).sum(-1)[normal], energy, rtol=2e-3)


@unhurried
@given(layouts(), st.integers(0, 400), st.integers(0, 2**32))
def test_a_cache_gives_back_what_it_holds(layout: CacheLayout, length: int, seed: int) -> None:
    rows, width = layout.shape(max(length, 1))
    block = np.full((1, rows * width), 0xFF, np.uint8)
    x = random_tokens(seed, 1, length, layout.head_dim)
    append(layout, block, 0, x)
    held, mask = load(layout, block, length)
    assert np.isfinite(held).all()
    n_q, sinks = layout.quantized_tokens(length), layout.num_sink_tokens
    exact = np.array([p < sinks or p >= sinks + n_q for p in range(length)], bool)
    assert np.array_equal(held[:, exact], stored(layout, x)[:, exact].astype(np.float32))
    if layout.local_window_size:  # whatever the next query sees is held
        assert mask[exact].all() and mask[max(0, length + 1 - layout.local_window_size) :].all()
    else:
        assert mask.all()


@unhurried
@given(hnp.arrays(np.float32, 64, elements=st.floats(-1e6, 1e6, width=32)))
def test_half_saturates_and_rounds_to_nearest(x: np.ndarray) -> None:
    half = to_half(x)
    assert np.isfinite(half).all()
    inside = np.abs(x) <= 65504
    assert np.array_equal(half[inside], x[inside].astype(np.float16))
    assert (np.abs(half[~inside]) == 65504).all()


@unhurried
@given(layouts(bits=(1, 8)), st.integers(0, 2**32))
def test_random_bytes_decode_to_the_grid(layout: CacheLayout, seed: int) -> None:
    tile = np.random.default_rng(seed).integers(0, 256, layout.tile_bytes, np.uint8)
    codes, scale, offset = layout.unpack_tile(tile)
    with np.errstate(invalid="ignore", over="ignore"):
        assert np.array_equal(decode_tile(layout, tile), dequantize(layout, codes, scale, offset), equal_nan=True)


def test_a_block_of_a_wrong_size_is_refused() -> None:
    layout = CacheLayout(64, 4, "channel", "none", 64, 4, 64, 64, "float16", False)
    for size in (layout.full_rows * layout.row_bytes - 16, 100_008):
        with pytest.raises(SkvError, match="cache block: unusable size"):
            layout.tiles_in(size)
    with pytest.raises(SkvError, match="padded head_dim 96 is no multiple of the group size; got 64"):
        CacheLayout(80, 4, "token", "none", 64, 4, 64, 64, "float16", False)
    with pytest.raises(SkvError, match="value cache: parameter_bits with granularity token; got 8; expected 16"):
        CacheLayout(64, 4, "token", "none", 64, 4, 64, 64, "float16", True, parameter_bits=8)
    with pytest.raises(SkvError, match="head_dim; got 2000"):
        CacheLayout(2000, 4, "token", "none", 32, 4, 64, 64, "float16", False)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_few_levels_per_channel_are_the_middles_of_equal_cells(bits: int) -> None:
    """Up to two bits; with more the lowest and the highest number are levels themselves."""
    layout = CacheLayout(32, bits, "channel", "none", 32, 0, 0, 32, "float16", False)
    x = np.repeat(np.linspace(0, 56, 32, dtype=np.float32)[:, None], 32, axis=1)
    codes, scale, offset = quantize(layout, x)
    assert offset is not None
    levels = offset[0] + scale[0] * np.arange(2**bits)
    assert levels.tolist() == {1: [14, 42], 2: [7, 21, 35, 49], 3: [0, 8, 16, 24, 32, 40, 48, 56]}[bits]
    assert np.abs(dequantize(layout, codes, scale, offset) - x).max() <= scale[0] / 2
