"""The quantizer's arithmetic: rotation, codes, scales and offsets of a tile, in numpy float32; normative.

The order of the float32 operations is specified (docs/spec.md, The quantizer's arithmetic): sums over a group are
halving trees, nothing is contracted, so that the kernels give the same bytes.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from skv_export.spec.key_basis import Float, KeyBasis
from skv_export.spec.layout import UNIT_CHANNELS, Bytes, CacheLayout, Half

MIDRISE_STEP = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 8: 0.0308}
"""MSE-optimal step of a uniform mid-rise quantizer of N(0, 1), by bits: where the scale's fit starts."""
CHANNEL_MARGIN = {1: np.float32(1 / 4), 2: np.float32(1 / 8)}
"""By bits, what of a channel's range lies beyond the lowest and the highest level: so few levels are the middles of
equal cells. With more bits they reach to the ends: the extreme tokens then matter more than the many."""
_HALF_MAX = np.float32(65504.0)


def rotate(x: Float, block: int) -> Float:
    """Normalized Walsh-Hadamard transform of each ``block`` of the last axis; its own inverse.

    Butterflies of stride 1, 2, 4, ... and then one multiplication by ``float32(1 / sqrt(block))``.
    """
    y = x.astype(np.float32).reshape(-1, block)
    stride = 1
    while stride < block:
        pairs = y.reshape(-1, block // (2 * stride), 2, stride)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        y = np.stack([a + b, a - b], axis=2).reshape(-1, block)
        stride *= 2
    return (y * np.float32(1 / np.sqrt(block))).reshape(x.shape)


def tree_sum(x: Float) -> Float:
    """Sum over the last axis as a halving tree, ``x[:n/2] + x[n/2:]`` repeated, after padding to a power of two."""
    n = x.shape[-1]
    size = 1 << (n - 1).bit_length()
    if size != n:
        x = np.concatenate([x, np.zeros((*x.shape[:-1], size - n), np.float32)], axis=-1)
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def to_half(x: Float) -> Half:
    """Rounds to float16, to nearest even, saturating at its largest finite value."""
    return np.clip(x, -_HALF_MAX, _HALF_MAX).astype(np.float16)


def _to_bfloat(x: Float) -> Float:
    """Rounds to bfloat16, to nearest even."""
    rounded: Float = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    return rounded


def quantize(
    layout: CacheLayout, x: Float, basis: KeyBasis | None = None
) -> tuple[Bytes, Half | Bytes, Half | Bytes | None]:
    """Quantizes tiles.

    Args:
        layout: Bits, granularity and group size.
        x: ``[..., T, D]``, finite, already rotated; with a basis the first axis is the heads.
        basis: Of calibrated keys.

    Returns:
        codes ``[..., T, D]``, scale and offset as ``CacheLayout.pack_tile`` takes them.
    """
    if basis is not None:
        return _quantize_calibrated(layout, x, basis)
    if layout.granularity == "channel":
        return _quantize_channel(layout, x)
    means = None
    if layout.granularity == "token_channel":
        means = _means(layout, x)
        x = x - _stored_means(layout, means)
    groups = x.reshape(*x.shape[:-1], layout.num_groups, layout.group_size)
    codes, scale = _quantize_midrise(groups, layout.bits)
    return codes.reshape(x.shape), scale.swapaxes(-1, -2), means


def dequantize(layout: CacheLayout, codes: Bytes, scale: Half | Bytes, offset: Half | Bytes | None) -> Float:
    """Inverse of ``quantize`` up to its error: float32 ``[..., T, D]``."""
    if layout.granularity == "channel":
        per_channel, start = _stored_channels(layout, scale, offset)
        return codes * per_channel[..., None, :] + start[..., None, :]
    per_channel = np.repeat(scale.astype(np.float32).swapaxes(-1, -2), layout.group_size, axis=-1)
    x: Float = (codes - np.float32((2**layout.bits - 1) / 2)) * per_channel
    return x if offset is None else x + _stored_means(layout, offset.view(np.uint8))


def _means(layout: CacheLayout, x: Float) -> Bytes:
    """Mean per channel over the tile's tokens, in 8 bits: ``code * unit``, the unit one float16 per tile."""
    mean = tree_sum(x.swapaxes(-1, -2)) / np.float32(x.shape[-2])
    unit = to_half(np.abs(mean).max(axis=-1) / np.float32(127))
    codes = np.rint(_divide(mean, unit.astype(np.float32)[..., None]))
    return layout.pack_means(np.clip(codes, -127, 127).astype(np.int8), unit)


def _stored_means(layout: CacheLayout, means: Bytes) -> Float:
    """``[..., 1, D]``, from ``pack_means``' bytes."""
    codes, unit = layout.unpack_means(means)
    return (codes * unit.astype(np.float32)[..., None])[..., None, :]


def _quantize_channel(layout: CacheLayout, x: Float) -> tuple[Bytes, Half | Bytes, Half | None]:
    """Asymmetric, over the tile's range per channel; codes from the stored scale and offset."""
    scale, offset = _channel_parameters(layout, x)
    per_channel, start = _stored_channels(layout, scale, offset)
    return _channel_codes(layout, x, per_channel[..., None, :], start[..., None, :]), scale, offset


def _channel_codes(layout: CacheLayout, x: Float, scale: Float, start: Float) -> Bytes:
    """``rint((x - start) / scale)`` within the codes; the lowest for what is not a number."""
    codes = _divide(x - start, scale)
    codes = np.where(codes > 0, codes, np.float32(0))
    return np.rint(np.minimum(codes, np.float32(2**layout.bits - 1))).astype(np.uint8)


def _channel_parameters(layout: CacheLayout, x: Float) -> tuple[Half | Bytes, Half | None]:
    """Scale and offset of each channel over the tile's tokens."""
    levels = np.float32(2**layout.bits - 1)
    low, high = x.min(axis=-2) + np.float32(0), x.max(axis=-2) + np.float32(0)  # of -0 and 0 both are 0
    if layout.bits in CHANNEL_MARGIN:
        margin = (high - low) * CHANNEL_MARGIN[layout.bits]
        low, high = low + margin, high - margin
    if layout.parameter_bits == 8:
        return _channels_in_bytes(layout, low, high, levels), None
    return to_half((high - low) / levels), to_half(low)


def _quantize_calibrated(layout: CacheLayout, keys: Float, basis: KeyBasis) -> tuple[Bytes, Half | Bytes, Half | None]:
    """Keys ``[N_kv, ..., T, D]`` in the tile's basis, with error feedback: channels from the last to the first.

    What a channel's stored number is above its true one is known before the channels ahead of it are rounded; each of
    them is lowered by its share of it.
    """
    y = basis.to_tile(keys)
    scale, offset = _channel_parameters(layout, y)
    per_channel, start = _stored_channels(layout, scale, offset)
    heads, dim = len(y), y.shape[-1]
    # Channels first, so that one channel of all tokens is one array: [D, N_kv, tiles, T], and [D, N_kv, tiles, 1].
    tokens = np.ascontiguousarray(np.moveaxis(y.reshape(heads, -1, *y.shape[-2:]), -1, 0))
    steps, starts = (np.moveaxis(p.reshape(heads, -1, dim), -1, 0)[..., None] for p in (per_channel, start))
    codes, added = np.empty(tokens.shape, np.uint8), np.zeros_like(tokens)
    for j in reversed(range(dim)):
        codes[j] = _channel_codes(layout, tokens[j] - added[j], steps[j], starts[j])
        error = (codes[j] * steps[j] + starts[j]) - tokens[j]
        added[:j] += basis.feedback[:, j, :j].T[:, :, None, None] * error
    return np.moveaxis(codes, 0, -1).reshape(y.shape), scale, offset


def _channels_in_bytes(layout: CacheLayout, low: Float, high: Float, levels: np.float32) -> Bytes:
    """Scales and offsets of channels ``[..., D]`` in 8 bits, ``code * unit``, as ``pack_channels`` gives them.

    Offsets are rounded down and scales up: nothing is clipped. Each 32 channels have units of their own, as one channel
    with a large constant (a bias) would coarsen the offsets of all; the units are bfloat16, whose exponent reaches to
    255 times less than the smallest scale.
    """

    def in_units(numbers: Float, largest_code: int) -> tuple[Float, Float]:
        groups = numbers.reshape(*numbers.shape[:-1], -1, UNIT_CHANNELS)
        unit = _to_bfloat(np.abs(groups).max(axis=-1) / np.float32(largest_code))
        return _divide(groups, unit[..., None]).reshape(numbers.shape), unit

    offset, offset_unit = in_units(low, 127)
    offset = np.clip(np.floor(offset), -128, 127)
    start = offset * np.repeat(offset_unit, UNIT_CHANNELS, axis=-1)
    scale, scale_unit = in_units(np.maximum(high - start, np.float32(0)) / levels, 255)
    scale = np.clip(np.ceil(scale), 0, 255)
    units = np.stack([scale_unit, offset_unit], axis=-2)
    return layout.pack_channels(scale.astype(np.uint8), offset.astype(np.int8), units)


def _stored_channels(layout: CacheLayout, scale: Half | Bytes, offset: Half | Bytes | None) -> tuple[Float, Float]:
    """Scales and offsets ``[..., D]`` as they are read back."""
    if layout.parameter_bits == 8:
        scale_codes, offset_codes, units = layout.unpack_channels(scale.view(np.uint8))
        per_channel = np.repeat(units, UNIT_CHANNELS, axis=-1)
        return scale_codes * per_channel[..., 0, :], offset_codes * per_channel[..., 1, :]
    assert offset is not None
    return scale.astype(np.float32), offset.astype(np.float32)


def _quantize_midrise(x: Float, bits: int) -> tuple[Bytes, Half]:
    """Mid-rise codes of groups (last axis): the scale is fitted by least squares, the stored one is unbiased."""
    levels, middle = np.float32(2**bits - 1), np.float32((2**bits - 1) / 2)
    energy = tree_sum(x * x)
    scale = np.sqrt(energy / np.float32(x.shape[-1])) * np.float32(MIDRISE_STEP[bits])

    def codes_of(scale: Float) -> Float:
        return np.clip(np.rint(_divide(x, scale[..., None]) + middle), 0, levels)

    for _ in range(2):
        q = codes_of(scale) - middle
        scale = _divide(tree_sum(x * q), tree_sum(q * q))
    codes = codes_of(scale)
    stored = _divide(energy, tree_sum(x * (codes - middle)))
    empty = ~(stored > 0)
    codes[empty] = np.float32(2 ** (bits - 1))
    return codes.astype(np.uint8), to_half(np.where(empty, np.float32(0), stored))


def _divide(a: Float, b: Float) -> Float:
    """``a / b``, and 0 where b is not above 0."""
    positive = b > 0
    return np.where(positive, a / np.where(positive, b, np.float32(1)), np.float32(0)).astype(np.float32)


def encode_tile(layout: CacheLayout, content: NDArray[np.generic], basis: KeyBasis | None = None) -> Bytes:
    """Tiles ``[..., T, D]`` of ``recent_type`` as bytes ``[..., tile_bytes]``; with a basis, heads come first."""
    if layout.bits == 16:
        rows = np.ascontiguousarray(content.astype(layout.recent_dtype))
        return rows.view(np.uint8).reshape(*content.shape[:-2], -1)
    return layout.pack_tile(*quantize(layout, content.astype(np.float32), basis))


def decode_tile(layout: CacheLayout, tile: Bytes, basis: KeyBasis | None = None) -> Float:
    """Bytes ``[..., tile_bytes]`` as float32 tiles ``[..., T, D]``, calibrated keys in the model's basis."""
    if layout.bits == 16:
        rows = np.ascontiguousarray(tile).view(layout.recent_dtype)
        return rows.reshape(*tile.shape[:-1], layout.tile_tokens, layout.padded_dim).astype(np.float32)
    content = dequantize(layout, *layout.unpack_tile(tile))
    return content if basis is None else basis.from_tile(content)
