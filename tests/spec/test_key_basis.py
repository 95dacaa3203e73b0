"""Calibrated keys in the reference: the definition spelled out number by number, and what holds for any basis."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from skv_export.errors import SkvError
from skv_export.spec.conformance import make_basis
from skv_export.spec.key_basis import KeyBasis, can_be_calibrated
from skv_export.spec.layout import CacheLayout
from skv_export.spec.op import AttentionParams
from skv_export.spec.quantizer import decode_tile, encode_tile, quantize
from skv_export.spec.recipe import LayerConfig
from skv_export.spec.reference import append, attend, load, quantized_kv_attention, rewind

SMALL = LayerConfig(k_bits=2, num_sink_tokens=4, recent_tokens=32, tile_tokens=32)


def layout_of(head_dim: int = 32, **changes: object) -> CacheLayout:
    return CacheLayout.pair(dataclasses.replace(SMALL, **changes), head_dim)[0]  # type: ignore[arg-type]


def keys(count: int, head_dim: int = 32, seed: int = 0, heads: int = 2) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((heads, count, head_dim)) * np.exp(rng.standard_normal(head_dim))).astype(np.float32)


def by_hand(x: np.ndarray, basis: KeyBasis, head: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """One head's tile ``[T, D]``: codes ``[T, D]`` and what is read back, one float32 operation after the other."""
    f = np.float32
    tokens, dim = x.shape
    y = np.zeros((tokens, dim), f)
    for t in range(tokens):
        for d in range(dim):
            total = f(0)
            for j in range(dim):
                total = f(total + f(basis.key[head, j, d] * x[t, j]))
            y[t, d] = min(max(total, f(-65504)), f(65504))
    scale, offset = np.zeros(dim, f), np.zeros(dim, f)
    for d in range(dim):
        low, high = y[:, d].min(), y[:, d].max()
        if bits <= 2:
            margin = f(f(high - low) * f(0.25 if bits == 1 else 0.125))
            low, high = f(low + margin), f(high - margin)
        scale[d], offset[d] = np.float16(f(f(high - low) / f(2**bits - 1))), np.float16(low)
    codes, read = np.zeros((tokens, dim), np.uint8), np.zeros((tokens, dim), f)
    for t in range(tokens):
        errors = np.zeros(dim, f)
        for d in reversed(range(dim)):
            shift = f(0)
            for j in reversed(range(d + 1, dim)):
                shift = f(shift + f(basis.feedback[head, j, d] * errors[j]))
            number = f(f(f(y[t, d] - shift) - offset[d]) / scale[d])
            codes[t, d] = int(min(max(np.rint(number), 0), 2**bits - 1))
            stored = f(f(codes[t, d] * scale[d]) + offset[d])
            errors[d] = f(stored - y[t, d])
            read[t, d] = stored
    back = np.zeros((tokens, dim), f)
    for t in range(tokens):
        for d in range(dim):
            total = f(0)
            for j in range(dim):
                total = f(total + f(basis.query[head, d, j] * read[t, j]))
            back[t, d] = total
    return codes, back


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_tile_is_what_the_definition_says_number_by_number(bits: int) -> None:
    layout, basis = layout_of(k_bits=bits), make_basis(2, 32, 32, seed=bits)
    content = keys(32, seed=bits).astype(np.float16)
    codes, _, _ = quantize(layout, content.astype(np.float32), basis)
    read = decode_tile(layout, encode_tile(layout, content, basis), basis)
    for head in range(2):
        want_codes, want_read = by_hand(content[head].astype(np.float32), basis, head, bits)
        assert np.array_equal(codes[head], want_codes)
        assert np.array_equal(read[head], want_read)


def test_without_turning_or_feedback_the_bytes_are_those_of_plain_keys() -> None:
    same = np.broadcast_to(np.eye(64, dtype=np.float32), (2, 64, 64))
    basis = KeyBasis(same, same, np.zeros((2, 64, 64), np.float32))
    for bits, parameter_bits in ((1, 16), (2, 16), (3, 8), (4, 16), (8, 8)):
        layout = layout_of(64, k_bits=bits, k_parameter_bits=parameter_bits)
        content = keys(96, 64).reshape(2, 3, 32, 64).astype(np.float16)
        assert np.array_equal(encode_tile(layout, content, basis), encode_tile(layout, content))


def test_feedback_lowers_the_error_that_its_weights_count() -> None:
    layout, basis = layout_of(64, k_bits=4), make_basis(2, 64, 64)
    content = keys(320, 64).reshape(2, 10, 32, 64).astype(np.float16)
    silent = dataclasses.replace(basis, feedback=np.zeros_like(basis.feedback))
    weights = np.eye(64) + basis.feedback.swapaxes(-1, -2)  # W: unit upper triangular

    def cost(used: KeyBasis) -> float:
        y = used.to_tile(content.astype(np.float32))
        error = decode_tile(layout, encode_tile(layout, content, used)) - y
        return float(np.square(np.einsum("hij,hntj->hnti", weights, error)).sum())

    assert cost(basis) < 0.7 * cost(silent)


@pytest.mark.parametrize("head_dim", [64, 80])
def test_the_cache_depends_on_tokens_not_on_calls(head_dim: int) -> None:
    layout = layout_of(head_dim)
    basis = make_basis(2, head_dim, layout.padded_dim)
    x = keys(300, head_dim)
    rows, width = layout.shape(400)
    blocks = []
    for chunks in ([300], [1] * 300, [67, 1, 232], [3, 61, 5, 231]):
        block, done = np.full((2, rows * width), 0xFF, np.uint8), 0
        for size in chunks:
            append(layout, block, done, x[:, done : done + size], basis)
            done += size
        blocks.append(block)
    assert all(np.array_equal(block, blocks[0]) for block in blocks[1:])
    plain = np.full((2, rows * width), 0xFF, np.uint8)
    append(layout, plain, 0, x)
    tiles = layout.quantized_tokens(300) // layout.tile_tokens * layout.tile_bytes
    assert not np.array_equal(plain[:, :tiles], blocks[0][:, :tiles])
    assert np.array_equal(plain[:, tiles:], blocks[0][:, tiles:])  # full-precision rows stay in the model's basis


def test_a_rewound_token_comes_back_in_the_models_basis() -> None:
    layout, basis = layout_of(64, k_bits=8), make_basis(2, 64, 64)
    x = keys(170, 64)
    rows, width = layout.shape(200)
    block = np.zeros((2, rows * width), np.uint8)
    append(layout, block, 0, x, basis)
    rewind(layout, block, 170, 150, basis=basis)
    read, held = load(layout, block, 150, basis)
    assert held.all()
    assert np.abs(read[..., :64] - x[:, :150]).max() < 0.1 * np.abs(x).max()


def test_attention_reads_tiles_as_queries_in_their_basis_would() -> None:
    """Products with the transformed query are those with the keys that are read back: the two readings are one."""
    layouts, basis = CacheLayout.pair(SMALL, 64), make_basis(2, 64, 64)
    x, values = keys(200, 64), keys(200, 64, seed=1)
    blocks = []
    for layout, tokens in zip(layouts, (x, values), strict=True):
        rows, width = layout.shape(220)
        block = np.zeros((2, rows * width), np.uint8)
        append(layout, block, 0, tokens, None if layout.is_value else basis)
        blocks.append(block)
    query, key, value = keys(1, 64, seed=2, heads=4), keys(1, 64, seed=3), keys(1, 64, seed=4)
    params = AttentionParams(4, 2)
    got = attend(params, layouts, query, key, value, (blocks[0], blocks[1]), 200, key_basis=basis)
    read_k, _ = load(layouts[0], blocks[0], 200)  # tiles in their own basis
    read_v, _ = load(layouts[1], blocks[1], 200)
    tiles = slice(4, 4 + layouts[0].quantized_tokens(200))
    read_k, read_v = (np.concatenate(pair, 1) for pair in ((read_k, key), (read_v, layouts_rotate(layouts[1], value))))
    for head in range(4):
        q = query[head, 0].astype(np.float64)
        scores = read_k[head // 2] @ q
        scores[tiles] = read_k[head // 2, tiles] @ (q @ basis.query[head // 2].astype(np.float64))
        weights = np.exp((scores - scores.max()) / 8)
        want = layouts_rotate(layouts[1], (weights / weights.sum() @ read_v[head // 2])[None].astype(np.float32))
        assert np.allclose(got[head], want, atol=1e-4 * np.abs(want).max())


def layouts_rotate(layout: CacheLayout, x: np.ndarray) -> np.ndarray:
    from skv_export.spec.quantizer import rotate

    return rotate(x, layout.rotation_dim)


def test_numbers_beyond_float16_saturate_in_the_basis() -> None:
    basis = make_basis(1, 32, 32)
    huge = np.full((1, 32, 32), 3e38, np.float32)
    y = basis.to_tile(huge)
    assert np.abs(y).max() == 65504 and np.isfinite(y).all()


@pytest.mark.parametrize(
    "changes",
    [{"k_bits": 16}, {"k_granularity": "token"}, {"k_rotation": "hadamard"}, {"k_granularity": "token_channel"}],
)
def test_other_forms_of_keys_are_refused(changes: dict[str, object]) -> None:
    layouts = CacheLayout.pair(dataclasses.replace(SMALL, **changes), 64)  # type: ignore[arg-type]
    assert not can_be_calibrated(layouts[0]) and not can_be_calibrated(layouts[1])
    x = np.zeros((1, 1, 128), np.float32)
    caches = [np.zeros((1, 2, *layout.shape(10)), np.uint8) for layout in layouts]
    with pytest.raises(SkvError, match="calibrated keys"):
        quantized_kv_attention(
            AttentionParams(2, 2), layouts, x, x, x, *caches, np.zeros(1, np.int32), key_basis=make_basis(2, 64, 64)
        )


def test_matrices_that_do_not_fit_are_refused() -> None:
    good = make_basis(2, 64, 64)
    with pytest.raises(SkvError, match="key basis: shape"):
        good.check(layout_of(64), 3)
    with pytest.raises(SkvError, match="feedback"):
        dataclasses.replace(good, feedback=good.feedback[:1])
    with pytest.raises(SkvError, match="not finite"):
        dataclasses.replace(good, query=np.full_like(good.query, np.nan))
    with pytest.raises(SkvError, match="float32"):
        dataclasses.replace(good, key=good.key.astype(np.float64))
