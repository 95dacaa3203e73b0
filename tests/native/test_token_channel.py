"""Granularity token_channel: scales per token around the tile's mean per channel, in the reference and the library."""

from __future__ import annotations

import dataclasses

import native
import numpy as np
import pytest

from skv_export.spec import reference
from skv_export.spec.conformance import Case, expected_of, make_inputs, token_channel_cases, token_channel_layouts
from skv_export.spec.layout import CacheLayout
from skv_export.spec.quantizer import decode_tile, dequantize, encode_tile, quantize
from skv_export.spec.recipe import LayerConfig

CASES = {case.name: case for case in token_channel_cases()}


def layout(bits: int = 2, **changes: object) -> CacheLayout:
    config = LayerConfig(k_bits=bits, k_granularity="token_channel", k_rotation="hadamard")
    return CacheLayout.pair(dataclasses.replace(config, **changes), 64)[0]  # type: ignore[arg-type]


def tile(seed: int = 0, mean: float = 3.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((2, 64, 64)) + mean * rng.standard_normal((2, 1, 64))).astype(np.float32)


def test_bytes_of_a_tile() -> None:
    """float16 scale per token, int8 mean per channel, the means' float16 unit, 14 zeros."""
    x = np.zeros((64, 64), np.float32)
    x[:, 0], x[:, 1] = 127.0, -12.0
    got = encode_tile(layout(), x)
    assert got.size == 64 * 64 * 2 // 8 + 2 * 64 + 64 + 16
    parameters = got[64 * 64 * 2 // 8 :]
    assert not parameters[: 2 * 64].any(), "what is its own mean has no residual"
    assert parameters[128:130].view(np.int8).tolist() == [127, -12] and not parameters[130:192].any()
    assert parameters[192:194].view("<f2").tolist() == [1.0] and not parameters[194:].any()
    assert np.array_equal(decode_tile(layout(), got), x)


def test_a_constant_shift_of_the_channels_costs_nothing() -> None:
    """The same residuals around other means: the error stays, where scales alone would grow with the means."""

    def error(granularity: str, mean: float) -> float:
        chosen = layout(4, k_granularity=granularity)
        x = tile(1, mean)
        return float(((decode_tile(chosen, encode_tile(chosen, x)) - x) ** 2).mean())

    assert error("token_channel", 3.0) < 1.1 * error("token_channel", 0.0)
    assert error("token", 3.0) > 5 * error("token_channel", 3.0)


def test_the_rounding_of_the_mean_is_not_lost() -> None:
    """The codes hold the difference to the mean as it is stored: at 8 bits the sum is far closer than the mean."""
    x = tile(2, 10.0)
    chosen = layout(8)
    codes, scale, means = quantize(chosen, x)
    assert means is not None
    held, unit = chosen.unpack_means(means)
    mean_error = np.abs(held * unit.astype(np.float32)[..., None] - x.mean(-2)).max()
    assert np.abs(dequantize(chosen, codes, scale, means) - x).max() < 0.4 * mean_error


def test_every_byte_of_a_tile_means_something() -> None:
    for chosen in token_channel_layouts():
        if chosen.bits == 16 or chosen.head_dim != 80:
            continue
        size = chosen.tile_bytes
        raw = np.random.default_rng(size).integers(0, 256, (3, size), np.uint8)
        assert np.array_equal(chosen.pack_tile(*chosen.unpack_tile(raw)), raw)


@pytest.mark.usefixtures("isa")
def test_random_bytes_decode_to_the_library_s_numbers() -> None:
    for chosen in token_channel_layouts():
        if chosen.tile_tokens != 32 or chosen.head_dim not in (64, 80):
            continue
        native.assert_random_tile_is_the_references(chosen)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("is_value", [False, True], ids=["keys", "values"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_append_writes_the_bytes_of_the_reference(head_dim: int, is_value: bool) -> None:
    chosen = [c for c in token_channel_layouts() if (c.head_dim, c.is_value) == (head_dim, is_value)]
    assert len(chosen) > 40
    for one in chosen:
        native.assert_append_of_two_tiles_is_the_references(one)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_any_group_size_and_any_numbers(bits: int) -> None:
    """Odd groups, float32 rows, tiny and huge numbers, constant channels, zero tokens, both zeros."""
    for head_dim, group in ((96, 96), (96, 32), (64, 64), (160, 160), (32, 32)):
        for is_value in (False, True):
            one = CacheLayout(head_dim, bits, "token_channel", "none", group, 1, 0, 32, "float", is_value)
            x = native.awkward_numbers(head_dim, bits)
            for scale in (1, 1e-20, 1e9):
                native.assert_append_is_the_references(one, x * np.float32(scale), [80])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("name", CASES)
def test_attention_is_the_reference_s(name: str) -> None:
    native.assert_attention_is_the_references(CASES[name])


@pytest.mark.usefixtures("isa")
def test_means_stand_apart_from_what_the_kernels_add_up() -> None:
    """Large means of keys and of values: the constants per tile carry the output, and must be exact to a few digits."""
    config = LayerConfig(k_granularity="token_channel", v_granularity="token_channel", k_bits=4, v_bits=4)
    case = Case("large means", config, past_lengths=(0,), new_tokens=400, num_heads=2, kv_num_heads=1)
    inputs = make_inputs(case)
    inputs = dataclasses.replace(inputs, value=inputs.value + np.float32(50))
    blocks = []
    for one, x in zip(case.layouts, (inputs.key, inputs.value), strict=True):
        rows, width = one.shape(470)
        block = np.full((1, rows * width), 0xFF, np.uint8)
        reference.append(one, block, 0, x[0].reshape(400, 1, 64).swapaxes(0, 1))
        blocks.append(block.reshape(1, 1, rows, width))
    step = dataclasses.replace(case, past_lengths=(400,), new_tokens=1)
    one_token = dataclasses.replace(
        inputs,
        query=inputs.query[:, :1],
        key=inputs.key[:, :1],
        value=inputs.value[:, :1],
        past_key=blocks[0],
        past_value=blocks[1],
        seqlens_k=np.array([400], np.int32),
    )
    want = expected_of(step, one_token)[0]
    got = native.Call(step, one_token).run()[0]
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
