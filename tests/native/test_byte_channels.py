"""Granularity channel with its parameters in 8 bits (parameter_bits), in the reference and the library."""

from __future__ import annotations

import ctypes
import dataclasses

import native
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from skv_export.native.library import SkvLayout
from skv_export.spec import reference
from skv_export.spec.conformance import byte_channel_cases, byte_channel_layouts
from skv_export.spec.layout import CacheLayout
from skv_export.spec.quantizer import decode_tile, encode_tile, quantize
from skv_export.spec.recipe import LayerConfig
from skv_export.spec.reference import load, rewind

CASES = {case.name: case for case in byte_channel_cases()}


def layout(bits: int = 4, head_dim: int = 64, parameter_bits: int = 8) -> CacheLayout:
    return CacheLayout.pair(LayerConfig(k_bits=bits, k_parameter_bits=parameter_bits), head_dim)[0]


def test_bytes_of_a_tile() -> None:
    """uint8 scales, int8 offsets, bfloat16 units of the scales and of the offsets for each 32 channels, zeros."""
    x = np.zeros((64, 64), np.float32)
    x[::2, 0], x[1::2, 0] = -127.0, 128.0  # 15 steps of 17; the unit of its offset is 1
    x[:, 1], x[::2, 1] = 4.0, 20.5  # from 4, 15 steps of 1.1, which is 16.4 units
    x[:, 33] = 254.0  # a constant of the other 32 channels: the unit of their offsets is 2
    got = encode_tile(layout(), x)[64 * 64 * 4 // 8 :]
    assert got.size == 64 + 64 + 16
    assert got[:64].tolist() == [255, 17, *[0] * 62]
    assert got[64:128].view(np.int8).tolist() == [-127, 4, *[0] * 31, 127, *[0] * 30]
    units = (got[128:136].view("<u2").astype(np.uint32) << 16).view(np.float32)
    assert units.tolist() == [0.06689453125, 0.0, 1.0, 2.0], "17 / 255 in 8 bits of mantissa"
    assert not got[136:].any()


def test_channels_with_16_bits_keep_their_bytes() -> None:
    """Only who asks for 8 bits gets them, and only with granularity channel."""
    key, value = CacheLayout.pair(LayerConfig(k_parameter_bits=8, v_parameter_bits=8), 64)
    assert (key.parameter_bits, value.parameter_bits) == (8, 16), "values per token have no choice"
    assert layout(parameter_bits=16).parameter_bytes == 256 and key.parameter_bytes == 144


def test_sizes_mirror_layout_py() -> None:
    out = (ctypes.c_int64 * 6)()
    for chosen in byte_channel_layouts():
        size = chosen.block_bytes(1000)
        native.check(native.library().skv_layout_sizes(ctypes.byref(SkvLayout.of(chosen)), size, 1000, out))
        assert (out[0], out[3], out[4]) == (chosen.tile_bytes, chosen.tiles_in(size), chosen.capacity(size)), chosen


@settings(deadline=None)
@given(
    st.sampled_from((1, 2, 3, 4, 5, 6, 8)),
    hnp.arrays(np.float16, (32, 64), elements=st.floats(-30000, 30000, width=16)),
)
def test_no_number_is_clipped(bits: int, x: np.ndarray) -> None:
    """Scales are rounded up and offsets down, so the error is half a step everywhere; and steps grow by few units."""
    chosen = dataclasses.replace(layout(bits), tile_tokens=32)
    x = x.astype(np.float32)
    codes, packed, _ = quantize(chosen, x)
    _, _, units = chosen.unpack_channels(packed.view(np.uint8))
    scale_unit, offset_unit = (np.repeat(u, 32) for u in units)
    step = (np.ptp(x, axis=0) + offset_unit) / np.float32(2**bits - 1) + scale_unit
    # Units are rounded to 8 bits of mantissa: the one channel that sets them may lose that much of its range.
    slack = np.ptp(x, axis=0) * 2.0**-8 + np.abs(x).max(0) * 2.0**-8 + 1e-6
    error = np.abs(decode_tile(chosen, encode_tile(chosen, x)) - x)
    assert codes.max() <= 2**bits - 1
    assert (error <= 0.5 * step + slack).all()


def test_a_bias_coarsens_only_the_channels_beside_it() -> None:
    """As Qwen2's keys have it: one channel with a constant a hundred times the others' range."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 128)).astype(np.float32)
    x[:, 5] += 400

    def error(parameter_bits: int) -> np.ndarray:
        chosen = layout(4, 128, parameter_bits)
        return np.asarray(((decode_tile(chosen, encode_tile(chosen, x)) - x) ** 2).mean(0))

    ratio = error(8) / error(16)
    assert ratio[32:].mean() < 1.15
    assert ratio[:32].mean() > 1.3, "if not, units for each 32 channels would not be needed"


@pytest.mark.usefixtures("isa")
def test_random_bytes_decode_to_the_library_s_numbers() -> None:
    for chosen in byte_channel_layouts():
        if chosen.tile_tokens != 32:
            continue
        native.assert_random_tile_is_the_references(chosen)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("is_value", [False, True], ids=["keys", "values"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_append_writes_the_bytes_of_the_reference(head_dim: int, is_value: bool) -> None:
    chosen = [c for c in byte_channel_layouts() if (c.head_dim, c.is_value) == (head_dim, is_value)]
    assert len(chosen) == 48
    for one in chosen:
        native.assert_append_of_two_tiles_is_the_references(one)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_any_numbers(bits: int) -> None:
    """Float32 rows, tiny and huge numbers, constant channels, zero tokens, both zeros."""
    for head_dim in (32, 96, 160):
        for is_value in (False, True):
            one = CacheLayout(head_dim, bits, "channel", "none", 32, 1, 0, 32, "float", is_value, parameter_bits=8)
            x = native.awkward_numbers(head_dim, bits)
            for scale in (1, 1e-20, 1e-38, 1e9, 1e36):
                native.assert_append_is_the_references(one, x * np.float32(scale), [80])


@pytest.mark.usefixtures("isa")
def test_rewind_restores_rows_from_tiles() -> None:
    for is_value in (False, True):
        one = CacheLayout(64, 4, "channel", "none", 64, 4, 32, 32, "float16", is_value, parameter_bits=8)
        rows, width = one.shape(200)
        got, want = (np.full((2, rows * width), 0xFF, np.uint8) for _ in range(2))
        x = np.random.default_rng(1).standard_normal((2, 200, 64)).astype(np.float32)
        for block in (got, want):
            reference.append(one, block, 0, x)
        rewind(one, want, 200, 170)
        native.rewind(one, got, 200, 170)
        assert np.array_equal(got, want)
        assert np.array_equal(load(one, got, 170)[0], load(one, want, 170)[0])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("name", CASES)
def test_attention_is_the_reference_s(name: str) -> None:
    native.assert_attention_is_the_references(CASES[name])
