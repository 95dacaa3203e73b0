"""The reference against itself and against plain attention: what must hold whatever the kernels do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from skv_export.errors import SkvError
from skv_export.spec.conformance import Case, attention_cases, make_inputs
from skv_export.spec.layout import CacheLayout
from skv_export.spec.quantizer import rotate, tree_sum
from skv_export.spec.recipe import LayerConfig
from skv_export.spec.reference import (
    AttentionParams,
    append,
    attend,
    load,
    quantized_kv_attention,
    rewind,
    rewind_floor,
    stored,
)

SMALL = LayerConfig(num_sink_tokens=4, recent_tokens=32, tile_tokens=32)


def pair(**changes: object) -> tuple[CacheLayout, CacheLayout]:
    window = int(changes.pop("local_window_size", 0))  # type: ignore[call-overload]
    return CacheLayout.pair(dataclasses.replace(SMALL, **changes), 64, window)  # type: ignore[arg-type]


def filled(layout: CacheLayout, x: np.ndarray, chunks: list[int], max_length: int = 400) -> np.ndarray:
    rows, width = layout.shape(max_length)
    block = np.full((x.shape[0], rows * width), 0xFF, np.uint8)
    done = 0
    for size in chunks:
        append(layout, block, done, x[:, done : done + size])
        done += size
    return block


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, count, 64)).astype(np.float32)


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("is_value", [False, True])
def test_cache_depends_on_tokens_not_on_calls(window: int, is_value: bool) -> None:
    layout = pair(local_window_size=window)[is_value]
    x = tokens(300)
    at_once = filled(layout, x, [300])
    for chunks in ([1] * 300, [150, 150], [3, 1, 60, 5, 231], [67, 1, 232]):
        assert np.array_equal(at_once, filled(layout, x, chunks)), chunks


@pytest.mark.parametrize("length", [0, 1, 4, 36, 67, 68, 69, 100, 132, 133, 399])
def test_sixteen_bits_hold_every_token_exactly(length: int) -> None:
    for layout in pair(k_bits=16, v_bits=16, v_rotation="none"):
        x = tokens(length).astype(np.float16).astype(np.float32)
        held, mask = load(layout, filled(layout, x, [length]), length)
        assert mask.all() and np.array_equal(held, x)


def test_sinks_and_recent_tokens_are_exact_and_the_rest_close() -> None:
    layout = pair(v_rotation="none", v_bits=8)[1]
    x = tokens(200).astype(np.float16).astype(np.float32)
    held, _ = load(layout, filled(layout, x, [200]), 200)
    n_q = layout.quantized_tokens(200)
    assert n_q == 160
    exact = [*range(4), *range(4 + n_q, 200)]
    assert np.array_equal(held[:, exact], x[:, exact])
    error = np.abs(held - x)[:, 4 : 4 + n_q]
    assert 0 < error.max() < 0.05 and not np.array_equal(held, x)


def test_rotation_is_its_own_inverse_and_keeps_norms() -> None:
    x = tokens(5)
    assert np.allclose(rotate(rotate(x, 64), 64), x, atol=1e-5)
    assert np.allclose(np.linalg.norm(rotate(x, 32), axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)
    unit = np.zeros(4, np.float32)
    unit[1] = 1
    assert rotate(unit, 4).tolist() == [0.5, -0.5, 0.5, -0.5]


def test_tree_sum_pads_with_zeros() -> None:
    x = np.arange(6, dtype=np.float32)
    assert tree_sum(x) == 15
    big = np.array([1e8, 1, -1e8, 1], np.float32)
    assert tree_sum(big) == 2  # (1e8 - 1e8) + (1 + 1), where a running sum would lose a 1


def plain_attention(case: Case) -> np.ndarray:
    """Full-precision attention over the same tokens, straight from the definition."""
    inputs = make_inputs(dataclasses.replace(case, past_lengths=(0,)))
    d, total = case.head_dim, case.total_lengths[0]
    tensors = (inputs.query, inputs.key, inputs.value)
    q, k, v = (x.reshape(total, -1, d).swapaxes(0, 1).astype(np.float64) for x in tensors)
    k, v = (np.repeat(x, case.num_heads // case.kv_num_heads, axis=0) for x in (k, v))
    scores = q @ k.swapaxes(1, 2) / np.sqrt(d)
    if case.softcap:
        scores = case.softcap * np.tanh(scores / case.softcap)
    distance = np.arange(total)[:, None] - np.arange(total)[None]
    hidden = (distance < 0) | ((distance >= case.local_window_size) if case.local_window_size else False)
    scores[:, hidden] = -np.inf
    if case.head_sink:
        assert inputs.head_sink is not None
        scores = np.concatenate([scores, np.broadcast_to(inputs.head_sink[:, None, None], (*scores.shape[:2], 1))], -1)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out: np.ndarray = (p[..., :total] @ v).swapaxes(0, 1).reshape(1, total, -1)
    return out


@pytest.mark.parametrize("change", [{}, {"local_window_size": 40}, {"softcap": 5.0}, {"head_sink": True}])
@pytest.mark.parametrize("chunks", [[150], [1] * 150, [70, 80], [33, 67, 50]])
def test_sixteen_bits_are_plain_attention_however_called(change: dict[str, object], chunks: list[int]) -> None:
    config = dataclasses.replace(SMALL, k_bits=16, v_bits=16, recent_type="float")
    case = Case("plain", config, past_lengths=(0,), new_tokens=150, **change)  # type: ignore[arg-type]
    inputs = make_inputs(case)
    past_key, past_value, done, outputs = inputs.past_key, inputs.past_value, 0, []
    for size in chunks:
        span = slice(done, done + size)
        done += size
        output, past_key, past_value = quantized_kv_attention(
            case.params,
            case.layouts,
            inputs.query[:, span],
            inputs.key[:, span],
            inputs.value[:, span],
            past_key,
            past_value,
            np.array([done - 1], np.int32),
            head_sink=inputs.head_sink,
        )
        outputs.append(output)
    assert np.abs(np.concatenate(outputs, 1) - plain_attention(case)).max() < 2e-5


@pytest.mark.parametrize("case", attention_cases(), ids=lambda c: c.name)
def test_a_batch_equals_its_sequences_one_by_one(case: Case) -> None:
    inputs = make_inputs(case)

    def run(b: slice) -> tuple[np.ndarray, ...]:
        return quantized_kv_attention(
            case.params,
            case.layouts,
            inputs.query[b],
            inputs.key[b],
            inputs.value[b],
            inputs.past_key[b],
            inputs.past_value[b],
            inputs.seqlens_k[b],
            head_sink=inputs.head_sink,
            query_seqlens=None if inputs.query_seqlens is None else inputs.query_seqlens[b],
        )

    output, key, value = run(slice(None))
    assert np.isfinite(output).all()
    for b in range(len(case.past_lengths)):
        alone = run(slice(b, b + 1))
        assert np.allclose(alone[0][0], output[b], atol=1e-6)
        assert np.array_equal(alone[1][0], key[b]) and np.array_equal(alone[2][0], value[b])


def test_packed_qkv_rope_and_qk_norm_equal_the_same_done_outside() -> None:
    rng = np.random.default_rng(3)
    params = AttentionParams(4, 2, do_rotary=True)
    q, k, v = (rng.standard_normal((1, 5, h * 64)).astype(np.float32) for h in (4, 2, 2))
    angles = np.arange(64)[:, None] / 100 ** (np.arange(32) / 32)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    weights = [rng.standard_normal(64).astype(np.float32) for _ in range(2)]
    layouts = pair(k_bits=16, v_bits=16)
    shapes = [np.zeros((1, 2, *layout.shape(64)), np.uint8) for layout in layouts]
    packed = quantized_kv_attention(
        params,
        layouts,
        np.concatenate([q, k, v], -1),
        None,
        None,
        *shapes,
        np.array([4], np.int32),
        cos_cache=cos,
        sin_cache=sin,
        q_norm_weight=weights[0],
        k_norm_weight=weights[1],
    )[0]

    def outside(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        x = x.reshape(5, -1, 64)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight
        z = (x[..., :32] + 1j * x[..., 32:]) * (cos[:5] + 1j * sin[:5])[:, None]
        return np.concatenate([z.real, z.imag], -1).astype(np.float32).reshape(1, 5, -1)

    turned = outside(q, weights[0]), outside(k, weights[1])
    plain = quantized_kv_attention(AttentionParams(4, 2), layouts, *turned, v, *shapes, np.array([4], np.int32))[0]
    assert np.allclose(packed, plain, atol=1e-5)


@pytest.mark.parametrize("length", [3, 50, 68, 69, 99, 100, 131, 133, 300])
def test_rewind_gives_the_cache_of_the_shorter_sequence(length: int) -> None:
    for layout in pair(k_bits=16, v_bits=16):  # lossless, so that restored rows can be compared exactly
        x = tokens(400)
        floor = rewind_floor(layout, filled(layout, x, [length]).shape[1], length, length)
        for new_length in {floor, max(floor, length - 7), length}:
            block = filled(layout, x, [length])
            rewind(layout, block, length, new_length)
            append(layout, block, new_length, x[:, new_length:])
            assert np.array_equal(load(layout, block, 400)[0], stored(layout, x).astype(np.float32))


def test_rewind_too_far_is_refused_and_writes_nothing() -> None:
    layout = pair()[0]
    block = filled(layout, tokens(200), [200])
    before = block.copy()
    with pytest.raises(SkvError, match="rewind from 200 tokens; got 167; expected 168"):
        rewind(layout, block, 200, 167)
    assert np.array_equal(block, before)


def test_beyond_the_capacity_is_refused_before_anything_is_written() -> None:
    layout = pair()[0]
    x = tokens(500)
    block = filled(layout, x, [195], max_length=195)
    capacity = layout.capacity(block.shape[1])
    assert capacity == 195
    before = block.copy()
    with pytest.raises(SkvError, match=r"got 196 tokens; expected at most its capacity of 195"):
        append(layout, block, 195, x[:, 195:196])
    assert np.array_equal(block, before)


def test_lengths_that_cannot_be_are_refused() -> None:
    case = Case("lengths", SMALL, past_lengths=(10,), new_tokens=2)
    inputs = make_inputs(case)
    arguments = (case.params, case.layouts, inputs.query, inputs.key, inputs.value, inputs.past_key, inputs.past_value)
    for seqlens, new in (([-5], None), ([0], [2]), ([11], [-1]), ([11], [3])):
        with pytest.raises(SkvError, match="sequence 0: lengths"):
            quantized_kv_attention(
                *arguments, np.array(seqlens, np.int32), query_seqlens=None if new is None else np.array(new, np.int32)
            )


@pytest.mark.parametrize("granularity", ["channel", "token"])
def test_zero_and_not_finite_tokens_are_stored_as_zero(granularity: str) -> None:
    for layout in pair(k_granularity=granularity, v_granularity=granularity, k_rotation="hadamard"):
        zeros = filled(layout, np.zeros((2, 200, 64), np.float32), [200])
        assert not load(layout, zeros, 200)[0].any()
        poisoned = np.zeros((2, 200, 64), np.float32)
        poisoned[:, 50, 3], poisoned[:, 60, 9], poisoned[:, 199, 0] = np.nan, np.inf, -np.inf
        assert np.array_equal(filled(layout, poisoned, [200]), zeros)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_midrise_is_unbiased_and_its_error_is_the_known_one(bits: int) -> None:
    layout = pair(v_bits=bits)[1]
    x = np.random.default_rng(0).standard_normal((8, 2000, 64)).astype(np.float32)
    held, _ = load(layout, filled(layout, x, [2000], 2000), 2000)
    span = slice(4, 4 + layout.quantized_tokens(2000))
    true, got = stored(layout, x)[:, span].astype(np.float32), held[:, span]
    assert abs((true * got).sum() / (true * true).sum() - 1) < 2e-3
    error = ((true - got) ** 2).sum() / (true**2).sum()
    gaussian = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 5: 0.00349, 6: 0.00104, 8: 0.000081}[bits]
    assert error < gaussian / (1 - gaussian) * 1.05  # the unbiased scale pays e/(1-e) for a scalar quantizer's e


def test_attend_reads_nothing_that_was_not_written() -> None:
    layouts = pair()
    x = tokens(1)
    blocks = [np.full((2, layout.block_bytes(100)), 0xFF, np.uint8) for layout in layouts]
    out = attend(AttentionParams(2, 2), layouts, x, x, x, (blocks[0], blocks[1]), 0)
    assert np.allclose(out, x, atol=1e-6)
