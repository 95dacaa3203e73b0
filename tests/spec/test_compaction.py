"""Which tokens a compacted cache keeps, and what becomes of their bytes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from skv_export.errors import SkvError
from skv_export.spec import reference
from skv_export.spec.compaction import (
    POOLED,
    attention_received,
    candidates,
    choose,
    fewer_tiles,
    least_kept,
    move_tokens,
    shift_rows,
    tokens_to_drop,
)
from skv_export.spec.key_basis import KeyBasis
from skv_export.spec.layout import CacheLayout
from skv_export.spec.quantizer import decode_tile, encode_tile
from skv_export.spec.recipe import LayerConfig

RNG = np.random.default_rng(5)
HEADS, DIM, T = 2, 48, 32
SMALL = LayerConfig(num_sink_tokens=2, recent_tokens=16, tile_tokens=T, v_group_size=32, k_group_size=32)


def layout(is_value: bool = True, window: int = 0, **options: object) -> CacheLayout:
    key, value = CacheLayout.pair(LayerConfig(**{**vars(SMALL), **options}), DIM, window)
    return value if is_value else key


def tiles_of(x: CacheLayout, count: int, basis: KeyBasis | None = None) -> np.ndarray:
    content = RNG.standard_normal((HEADS, count, T, x.padded_dim)).astype(np.float32)
    return encode_tile(x, content.astype(x.recent_dtype), basis)


CHOSEN = np.stack([np.sort(RNG.permutation(5 * T)[: 2 * T]) for _ in range(HEADS)])


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8, 16])
def test_values_per_token_keep_their_numbers(bits: int) -> None:
    x = layout(v_bits=bits)
    tiles = tiles_of(x, 5)
    before = decode_tile(x, tiles).reshape(HEADS, 5 * T, -1)
    after = decode_tile(x, move_tokens(x, tiles, CHOSEN)).reshape(HEADS, 2 * T, -1)
    for head in range(HEADS):
        assert np.array_equal(after[head], before[head, CHOSEN[head]])


@pytest.mark.parametrize("granularity", ["channel", "token_channel"])
@pytest.mark.parametrize("bits", [2, 4])
def test_what_shares_scales_is_quantized_again(granularity: str, bits: int) -> None:
    x = layout(is_value=False, k_bits=bits, k_granularity=granularity)
    tiles = tiles_of(x, 5)
    read = decode_tile(x, tiles).reshape(HEADS, 5 * T, -1)
    wanted = np.stack([read[h, CHOSEN[h]] for h in range(HEADS)]).reshape(HEADS, 2, T, -1)
    assert np.array_equal(move_tokens(x, tiles, CHOSEN), encode_tile(x, wanted.astype(np.float16)))


def test_calibrated_keys_are_quantized_again_in_their_basis() -> None:
    x = layout(is_value=False, k_bits=4)
    turn = np.stack([np.linalg.qr(RNG.standard_normal((x.padded_dim, x.padded_dim)))[0] for _ in range(HEADS)])
    turn = turn.astype(np.float32)
    basis = KeyBasis(turn, turn, np.zeros_like(turn))
    tiles = tiles_of(x, 5, basis)
    read = decode_tile(x, tiles, basis).reshape(HEADS, 5 * T, -1)
    moved = decode_tile(x, move_tokens(x, tiles, CHOSEN, basis), basis).reshape(HEADS, 2 * T, -1)
    wanted = np.stack([read[h, CHOSEN[h]] for h in range(HEADS)])
    assert np.abs(moved - wanted).max() < 0.5 * np.abs(wanted).max() / 4
    assert not np.array_equal(moved, decode_tile(x, move_tokens(x, tiles, CHOSEN), basis).reshape(moved.shape))


def test_the_last_tile_stays_unless_all_go() -> None:
    x = layout(is_value=False, k_bits=3)
    tiles = tiles_of(x, 6)
    few = fewer_tiles(x, tiles, CHOSEN, 3 * T)
    assert np.array_equal(few, np.concatenate([move_tokens(x, tiles[:, :5], CHOSEN), tiles[:, 5:]], axis=1))
    assert np.array_equal(fewer_tiles(x, tiles, CHOSEN[:, :0], 5 * T), tiles[:, 5:])
    assert fewer_tiles(x, tiles, CHOSEN[:, :0], 6 * T).shape[1] == 0
    length = x.num_sink_tokens + x.recent_tokens + 6 * T + 5
    assert candidates(x, length, 3 * T) == (2, 5 * T, 2 * T)
    assert candidates(x, length, 6 * T) == (2, 5 * T, 0)


def test_nothing_chosen_is_no_tile() -> None:
    x = layout()
    assert move_tokens(x, tiles_of(x, 5), CHOSEN[:, :0]).shape == (HEADS, 0, x.tile_bytes)


@pytest.mark.parametrize("dropped", [0, T, 3 * T, 11 * T])
def test_rows_stand_where_the_new_positions_put_them(dropped: int) -> None:
    x = layout(v_bits=2)
    length = 14 * T + 21
    block = np.zeros((HEADS, np.prod(x.shape(length))), np.uint8)
    reference.append(x, block, 0, RNG.standard_normal((HEADS, length, DIM)).astype(np.float32))
    size = x.full_rows * x.row_bytes
    before, _ = reference.load(x, block, length)
    block[:, -size:] = shift_rows(x, np.ascontiguousarray(block[:, -size:]), dropped)
    after, _ = reference.load(x, block, length - dropped)
    recent = length - x.num_sink_tokens - x.quantized_tokens(length)
    assert np.array_equal(after[:, -recent:], before[:, -recent:])
    assert np.array_equal(after[:, : x.num_sink_tokens], before[:, : x.num_sink_tokens])


def test_attention_received_is_what_softmax_gives() -> None:
    length, queries, groups, softcap = 70, 9, 3, 2.0
    q = RNG.standard_normal((HEADS * groups, queries, DIM)).astype(np.float32)
    k = RNG.standard_normal((HEADS, length, DIM)).astype(np.float32)
    got = attention_received(q, k, scale=0.3, softcap=softcap)
    for head, token in itertools.product(range(HEADS), range(0, length, 6)):
        per_head = []
        for group in range(groups):
            received = np.zeros(length)
            for i in range(queries):
                seen = length - queries + i + 1
                scores = [0.3 * float(q[head * groups + group, i] @ k[head, j]) for j in range(seen)]
                weights = np.exp([softcap * np.tanh(s / softcap) for s in scores])
                received[:seen] += weights / weights.sum()
            near = range(max(0, token - POOLED // 2), min(length, token + POOLED // 2 + 1))
            per_head.append(max(received[j] for j in near))
        assert got[head, token] == pytest.approx(np.mean(per_head), rel=1e-4)


def test_the_highest_are_chosen_in_order() -> None:
    scores = np.array([[1, 5, 3, 5, 0], [9, 1, 1, 1, 8]], np.float32)
    assert choose(scores, 3).tolist() == [[1, 2, 3], [0, 1, 4]]
    assert choose(scores, 0).shape == (2, 0)


@pytest.mark.parametrize("window", [0, 40, 100])
def test_what_goes_is_whole_tiles_and_leaves_what_must_stay(window: int) -> None:
    layouts = [layout(), layout(is_value=False), layout(window=window)]
    least = least_kept(layouts)
    for length in range(0, 700, 7):
        for keep in (least, least + 1, least + 40, 600):
            dropped = tokens_to_drop(layouts, length, keep)
            assert dropped % T == 0 and length - dropped <= keep
            assert dropped == 0 or length - dropped > keep - T
            assert dropped <= layouts[0].quantized_tokens(length)
            assert not dropped or length - dropped >= window + layouts[0].num_sink_tokens - 1
    with pytest.raises(SkvError, match="tokens to keep"):
        tokens_to_drop(layouts, 700, least - 1)
