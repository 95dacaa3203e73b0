"""Methods of the literature against their arithmetic written out number by number, and what they read of a cache."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from skv_export.checkpoints.pretrained import replace_attention
from skv_export.evaluation import decode_simulation
from skv_export.evaluation.baselines import parse_baselines
from skv_export.evaluation.decode_simulation import ATTENTION_NAME, Simulation, simulated_logits
from skv_export.evaluation.literature import alignedkv, rotatekv, rvq
from skv_export.evaluation.literature.alignedkv import AlignedCache
from skv_export.evaluation.literature.decoquant import DecoquantCache, decomposed
from skv_export.evaluation.literature.from_text import Activations
from skv_export.evaluation.literature.polarquant import PolarKeys
from skv_export.evaluation.literature.rope import KeysBeforeRope, Rope
from skv_export.evaluation.literature.rotatekv import RotatekvKeys, RotatekvValues
from skv_export.evaluation.literature.rvq import RvqCache, RvqKeys
from skv_export.evaluation.literature.tiled import hadamard

HEADS, DIM = 2, 64


def rows(tokens: int, seed: int = 0, heads: int = HEADS) -> torch.Tensor:
    """Keys-like ``[H, S, D]``, float16 numbers: channels of different means and spreads."""
    x = torch.randn(heads, tokens, DIM, generator=torch.Generator().manual_seed(seed))
    return (x * torch.linspace(0.2, 3, DIM) + torch.linspace(-2, 2, DIM)).half().float()


def seen(keys: torch.Tensor, values: torch.Tensor) -> dict[int, Activations]:
    """Of one layer without RoPE."""
    ones = torch.ones_like(keys)
    return {0: Activations(keys, values, ones, ones, torch.eye(DIM).expand(len(keys), -1, -1), keys.shape[1], None)}


# PolarQuant.


def test_polarquant_puts_radius_and_angle_into_cells_of_128_tokens() -> None:
    keys = rows(256)
    keys[1, 128:, 5] = keys[1, 128:, 37] = 1.0  # a pair that does not change has one cell
    read = PolarKeys(3, DIM).read(keys)
    for head, start, pair in ((0, 0, 0), (0, 128, 31), (1, 0, 7), (1, 128, 5)):
        points = [complex(keys[head, start + i, pair], keys[head, start + i, pair + 32]) for i in range(128)]
        radii, angles = [abs(p) for p in points], [math.atan2(p.imag, p.real) % (2 * math.pi) for p in points]
        middles = []
        for numbers in (radii, angles):
            low, scale = float(np.float16(min(numbers))), float(np.float16((max(numbers) - min(numbers)) / 8))
            cells = [min(7, max(0, math.floor((n - low) / (scale or 1)))) for n in numbers]
            middles.append([low + (cell + 0.5) * scale for cell in cells])
        expected = [(r * math.cos(a), r * math.sin(a)) for r, a in zip(*middles, strict=True)]
        found = read[head, start : start + 128, [pair, pair + 32]]
        # A number within float32's error of a cell's end may fall to either side.
        assert (torch.isclose(found, torch.tensor(expected), atol=1e-3).all(-1).sum()) >= 126
    assert torch.allclose(read[1, 128:, [5, 37]], torch.ones(128, 2), atol=2e-3)


# DecoQuant.


def test_decoquant_rounds_the_large_tensor_per_token_of_all_heads() -> None:
    values = rows(256)
    cache = DecoquantCache(4, DIM)
    read = cache.read(values)
    for start in (0, 128):
        matrix = values[:, start : start + 128].transpose(0, 1).reshape(-1, 16).double().numpy()
        u, s, vh = np.linalg.svd(matrix, full_matrices=False)
        large, small = (u * np.sqrt(s)).reshape(128, -1), np.sqrt(s)[:, None] * vh
        for token in range(128):
            scale = float(np.float16(np.abs(large[token]).max() / 7))
            large[token] = np.clip(np.round(large[token] / scale), -7, 7) * scale
        product = large.reshape(-1, 16) @ small.astype(np.float16).astype(float)
        expected = torch.from_numpy(product).float().reshape(128, HEADS, DIM).transpose(0, 1)
        difference = (read[:, start : start + 128] - expected).norm() / expected.norm()
        assert difference < 0.01, "but for what lies between two levels"
    assert float((read - values).norm() / values.norm()) < 0.15
    large, small = decomposed(values.reshape(2, -1, 16))
    assert torch.allclose((large @ small).view_as(values), values, atol=1e-4)
    assert torch.allclose(large.mT @ large, small @ small.mT, rtol=1e-3, atol=1e-2), "both have S, half of it each"
    # Bits: a scale per token and 16 x 16 numbers per block, shared by all heads of the layer.
    assert cache.stored_bits == 4 + 16 / (HEADS * DIM) + 16 * 256 / (128 * HEADS * DIM)


# RotateKV.


def by_hand(numbers: torch.Tensor, bits: int, clip: float) -> list[float]:
    """Min-max of one group."""
    low, high = float(numbers.min()) * clip, float(numbers.max()) * clip
    scale, offset = float(np.float16((high - low) / (2**bits - 1))), float(np.float16(low))
    return [min(2**bits - 1, max(0, round((float(n) - offset) / scale))) * scale + offset for n in numbers]


@pytest.mark.parametrize(("bits", "clip"), [(2, 0.8), (3, 1.0)])
def test_rotatekv_rotates_heads_together_and_orders_channels_by_their_means(bits: int, clip: float) -> None:
    keys, values = rows(30, 1), rows(30, 2)
    k_cache, v_cache = rotatekv.fit(bits, bits, seen(rows(200, 3), rows(200, 4)), {})(0, DIM, 0)
    assert isinstance(k_cache, RotatekvKeys)
    together = hadamard(HEADS * DIM)
    means = (rows(200, 3).transpose(0, 1).reshape(200, -1) @ together).mean(0)
    assert (means[k_cache.order].diff() >= 0).all() and len(set(k_cache.order.tolist())) == HEADS * DIM
    read = k_cache.read(keys)
    v_read = v_cache.quantized(values)
    for token in (0, 25):
        mixed = (together @ keys[:, token].flatten())[k_cache.order]
        restored = torch.empty(HEADS * DIM)
        restored[k_cache.order] = torch.tensor(by_hand(mixed, bits, clip))
        assert torch.allclose((together @ restored).view(HEADS, DIM), read[:, token], atol=1e-3)
    rotation = hadamard(DIM)
    for head in range(HEADS):
        expected = rotation @ torch.tensor(by_hand(rotation @ values[head, 25], bits, clip))
        assert torch.allclose(v_read[head, 25], expected, atol=1e-3)
    assert torch.equal(v_read[:, :20], values[:, :20]) and not torch.equal(v_read[:, 20], values[:, 20])
    assert k_cache.stored_bits == bits + 32 / 128 and v_cache.stored_bits == bits + 32 / 64


@pytest.mark.parametrize(("heads", "together"), [(1, 1), (2, 2), (3, 1), (6, 2), (8, 4)])
def test_as_many_heads_are_rotated_together_as_divide_them(heads: int, together: int) -> None:
    x = torch.zeros(heads, 1, DIM)
    x[0, 0, 0] = 1
    assert (rotatekv.rotated(x) != 0).sum() == together * DIM
    for cache in (RotatekvKeys(8, DIM, order=torch.randperm(heads * DIM)), RotatekvValues(8, DIM)):
        keys = rows(4, heads=heads)
        assert torch.allclose(cache.read(keys), keys, atol=0.1)


# Keys before RoPE.


def test_keys_before_rope_are_quantized_there_and_turned_again() -> None:
    def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return x * cos + torch.cat([-x[..., DIM // 2 :], x[..., : DIM // 2]], -1) * sin

    @dataclasses.dataclass(frozen=True)
    class Rounded(KeysBeforeRope):
        """To whole numbers."""

        def read(self, x: torch.Tensor) -> torch.Tensor:
            return x.round()

        @property
        def stored_bits(self) -> float:
            return 4.0

    angles = torch.arange(50.0)[:, None] * torch.logspace(0, -3, DIM // 2)
    rope = Rope(
        "it", turn, torch.cat([angles, angles], -1).cos()[None], torch.cat([angles, angles], -1).sin()[None], DIM
    )
    before = rows(50)
    keys = rope.apply(before)
    assert torch.allclose(Rounded(4, DIM, ropes={0: rope}).quantized(keys), rope.apply(before.round()), atol=1e-4)
    assert torch.equal(Rounded(4, DIM, index=1, ropes={0: rope}).quantized(keys), keys.half().float().round())
    x = Activations(keys, keys, keys, keys, torch.eye(DIM), 50, rope)
    assert torch.allclose(x.keys_before_rope(), before, atol=1e-4)


# Residual vector quantization.


@pytest.mark.parametrize("cache_type", [RvqCache, RvqKeys])
def test_rvq_codes_what_each_round_leaves(cache_type: type[RvqCache]) -> None:
    books = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0)) / torch.tensor([1, 2, 4])[:, None, None]
    cache = cache_type(1, DIM, codebooks=books)
    x = rows(5)
    read = cache.read(x)
    for head, token in ((0, 0), (1, 4)):
        vector = x[head, token]
        scale = float(np.float16(np.std(vector.numpy(), ddof=1)))
        for group in range(2):
            channels = range(group, DIM, 2) if cache_type is RvqKeys else range(group * 32, group * 32 + 32)
            rest = vector[list(channels)] / scale
            whole = torch.zeros(32)
            for book in books:
                entry = min(book, key=lambda e, rest=rest: float((e - rest).norm()))  # type: ignore[misc]
                rest, whole = rest - entry, whole + entry
            assert torch.allclose(read[head, token, list(channels)], whole * scale, atol=1e-4)
    assert torch.equal(cache.read(torch.ones(1, 1, DIM)), cache.read(torch.ones(1, 1, DIM))), "no deviation, no NaN"
    assert cache.read(torch.ones(1, 1, DIM)).isfinite().all()


@pytest.mark.parametrize(
    ("bits", "head_dim", "rounds", "stored"),
    [
        (2, 64, 6, 6 * 11 / 32 + 16 / 64),
        (3, 128, 9, 9 * 11 / 32 + 16 / 128),
        (2, 80, 3, 3 * 11 / 16 + 16 / 80),
    ],
)
def test_rvq_has_the_rounds_of_its_bits(bits: int, head_dim: int, rounds: int, stored: float) -> None:
    cache = RvqCache(bits, head_dim)
    assert cache.rounds == rounds and cache.stored_bits == pytest.approx(stored)
    assert cache.quantized_tokens(7) == 7 and cache.effective_bits(8192) == pytest.approx(stored), "nothing is exact"


def test_rvq_codebooks_are_means_of_what_is_nearest_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rvq, "ENTRIES", 16)
    monkeypatch.setattr(rvq, "LLOYD", 60)
    x = torch.randn(2000, 32, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 32)
    first, second = rvq.codebooks(x, 2)
    for codebook in (first, second):
        chosen = torch.cdist(x, codebook).argmin(-1)
        assert torch.equal(chosen, rvq.nearest(x, codebook))
        for entry in range(16):
            assert torch.allclose(x[chosen == entry].mean(0), codebook[entry], atol=1e-3)
        left = x - codebook[chosen]
        assert left.pow(2).sum() < 0.85 * x.pow(2).sum()
        x = left
    monkeypatch.setattr(rvq, "VECTORS", 500)
    keys = rows(300)
    cache, values = rvq.fit(1, 1, seen(keys, keys), {})(0, DIM, 0)
    assert isinstance(cache, RvqKeys) and isinstance(values, RvqCache)
    assert cache.codebooks.shape == (3, 16, 32) and not torch.equal(cache.codebooks, values.codebooks)
    assert (cache.read(keys) - keys).pow(2).sum() < 0.5 * keys.pow(2).sum()


# AlignedKV.


def half_exponent(x: float) -> int:
    return int(np.float16(x).view(np.uint16)) >> 10 & 31


def high_bits(x: float, bits: int) -> float:
    """A float16 number's high bits, and the middle of what the others could be."""
    word = int(np.float16(x).view(np.uint16))
    if bits < 16:
        word = (word >> (16 - bits) << (16 - bits)) + (1 << (15 - bits))
    return float(np.uint16(word).view(np.float16))


def needed(below: int) -> int:
    return 8 if below >= 8 else 12 if below >= 4 else 16


def test_alignedkv_reads_the_bits_that_a_sum_needs() -> None:
    """One step, number by number: keys by channel, values by token, two query heads for a KV head."""
    keys, values = rows(128, 1, heads=1), rows(128, 2, heads=1)
    keys[..., ::3] /= 300
    query = torch.randn(2, 1, DIM, generator=torch.Generator().manual_seed(3)) * torch.logspace(-2, 1, DIM)
    bits = alignedkv.key_bits(query[None], keys)
    largest = [max(half_exponent(float(k)) for k in keys[0, :, c].abs()) for c in range(DIM)]
    terms = [[half_exponent(float(query[h, 0, c].abs())) + largest[c] for c in range(DIM)] for h in range(2)]
    expected = [needed(min(max(terms[h]) - terms[h][c] for h in range(2))) for c in range(DIM)]
    assert bits[0, 0].tolist() == expected and {8, 12, 16} == {*expected}
    product = alignedkv.of_bits(query[None], bits[:, None], keys.mT)
    for head, token in ((0, 5), (1, 127)):
        by_hand = sum(float(query[head, 0, c]) * high_bits(float(keys[0, token, c]), expected[c]) for c in range(DIM))
        assert float(product[0, head, 0, token]) == pytest.approx(by_hand, abs=1e-3)

    weights = torch.softmax(torch.randn(2, 1, 128, generator=torch.Generator().manual_seed(4)) * 4, -1)
    token_bits = alignedkv.value_bits(weights[None], values)
    below = []
    for head in range(2):
        chosen = [max(range(i, 128, 32), key=lambda t, head=head: float(weights[head, 0, t])) for i in range(32)]
        read = [[abs(high_bits(float(v), 8)) for v in values[0, t]] for t in chosen]
        output = weights[head, 0, chosen].double().numpy() @ np.array(read)
        top = [max(half_exponent(float(v)) for v in values[0, :, c].abs()) for c in range(DIM)]
        least = min(half_exponent(o) - 1 + 15 - t for o, t in zip(output, top, strict=True))
        below.append([least - half_exponent(float(w)) for w in weights[head, 0]])
    assert token_bits[0, 0].tolist() == [needed(min(pair)) for pair in zip(*below, strict=True)]
    assert len(set(token_bits.flatten().tolist())) > 1


@pytest.mark.parametrize("window", [0, 100])
def test_alignedkv_with_all_bits_is_the_cache_in_float16(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(n, 200, DIM, generator=generator) * 3 for n in (6, 2, 2))
    caches = AlignedCache(16, DIM, window), AlignedCache(16, DIM, window)
    options = {"scale": 0.1, "softcap": 20.0, "local_window_size": window, "head_sink": torch.randn(6)}
    whole = decode_simulation.attend(query, key, value, caches, **options)  # type: ignore[arg-type]
    assert caches[0].effective_bits(8192) == 16, "before any text"
    found = alignedkv.attend(query, key, value, caches, **options)  # type: ignore[arg-type]
    assert 1e-6 < float((found - whole).abs().max()) < 0.02
    bits = [cache.effective_bits(8192) for cache in caches]
    assert all(8 < b < 16 for b in bits) and caches[0].effective_bits(64) == 16
    assert caches[0].reads.numbers == caches[1].reads.numbers == 2 * DIM * in_blocks(window)
    monkeypatch.setattr(alignedkv, "STEPS", {16: 0})
    assert torch.allclose(alignedkv.attend(query, key, value, caches, **options), whole, atol=1e-4)  # type: ignore[arg-type]
    assert [cache.stored_bits for cache in caches] == [16, 16]


def in_blocks(window: int) -> int:
    """Tokens in whole blocks of 64 that 200 queries see, one by one."""
    return sum(1 for q in range(200) for t in range(q // 64 * 64) if not window or q - t < window)


def test_alignedkv_on_a_model_sees_what_a_decoder_would(tiny_checkpoint: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("qwen3"), dtype=torch.float32).eval()
    replace_attention(model, ATTENTION_NAME)
    (candidate,) = parse_baselines("alignedkv")
    assert candidate.name == "alignedkv-k16v16"
    ids = torch.arange(300) * 37 % 300
    with torch.no_grad():
        exact = simulated_logits(model, ids, Simulation.full_precision())
        got = candidate.logits(model, ids, 0)
        ahead = candidate.logits(model, torch.cat([ids[:250], ids[:50]]), 0)
        assert torch.allclose(ahead[:250], got[:250], atol=1e-4)
        assert 1e-5 < float((got - exact).abs().max()) < 0.1 * float(exact.std())
    assert 8 < candidate.effective_bits(8192) < 16
    assert candidate.quantizes(300) and not candidate.quantizes(60)
