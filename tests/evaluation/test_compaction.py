"""A compacted cache in one simulated pass equals the reference's cache, compacted at the prompt's end."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from skv_export.errors import SkvError
from skv_export.evaluation.candidates import Compacted, of_recipe, parse_configs, parse_keep
from skv_export.evaluation.compaction import SCORE_WINDOW, CompactedAttention
from skv_export.evaluation.decode_simulation import LayoutCache, attend
from skv_export.runtime.compaction import WINDOW
from skv_export.spec import reference
from skv_export.spec.compaction import POOLED, move_tokens, shift_rows
from skv_export.spec.conformance import Case, make_inputs
from skv_export.spec.recipe import LayerConfig, Recipe

SMALL = LayerConfig(num_sink_tokens=4, recent_tokens=32, tile_tokens=32)
CASES = [
    Case("default", SMALL, num_heads=4, kv_num_heads=2),
    Case("rotated keys, padded", dataclasses.replace(SMALL, k_granularity="token", k_rotation="hadamard"), head_dim=80),
    Case("not quantized", dataclasses.replace(SMALL, k_bits=16, v_bits=16)),
    Case("softcap", SMALL, softcap=5.0),
    Case("head sink", dataclasses.replace(SMALL, v_granularity="channel"), head_sink=True),
    Case("window", SMALL, local_window_size=50),
]
PROMPT, TOKENS = 330, 410
DROPPED = 192  # of 330 tokens 9 tiles are full; to hold 150 at most, 6 tiles' worth go


def by_reference(case: Case, tensors: tuple[np.ndarray, ...], head_sink: np.ndarray | None) -> np.ndarray:
    """The op's reference token by token; at the prompt's end its blocks are compacted, by hand."""
    query, key, value = tensors
    blocks = tuple(np.zeros((case.kv_num_heads, np.prod(x.shape(TOKENS))), np.uint8) for x in case.layouts)
    out, past = [], 0
    for i in range(TOKENS):
        if i == PROMPT and not case.local_window_size:
            _compact(case, blocks, query[:, i - WINDOW : i])
            past -= DROPPED
        new = [x[:, i : i + 1] for x in (query, key, value)]
        out.append(reference.attend(case.params, case.layouts, *new, blocks, past, head_sink))
        for layout, block, x in zip(case.layouts, blocks, new[1:], strict=True):
            reference.append(layout, block, past, x)
        past += 1
    return np.concatenate(out, axis=1)


def _compact(case: Case, blocks: tuple[np.ndarray, ...], queries: np.ndarray) -> None:
    layout, sinks, t = case.layouts[0], SMALL.num_sink_tokens, SMALL.tile_tokens
    keys, _ = reference.load(layout, blocks[0], PROMPT)
    q = reference.prepare(layout, queries)
    groups = case.num_heads // case.kv_num_heads
    chosen = []
    for h in range(case.kv_num_heads):
        total = np.zeros(PROMPT)
        for head in range(h * groups, (h + 1) * groups):
            received = np.zeros(PROMPT)
            for i in range(WINDOW):
                scores = (keys[h, : PROMPT - WINDOW + i + 1] @ q[head, i]).astype(np.float64) * case.head_dim**-0.5
                if case.softcap:
                    scores = case.softcap * np.tanh(scores / case.softcap)
                weights = np.exp(scores - scores.max())
                received[: len(weights)] += weights / weights.sum()
            total += [received[max(0, p - POOLED // 2) : p + POOLED // 2 + 1].max() for p in range(PROMPT)]
        candidates = total[sinks : sinks + 8 * t]  # the last tile is none
        chosen.append(np.sort(np.argsort(-candidates, kind="stable")[: 2 * t]))
    for x, block in zip(case.layouts, blocks, strict=True):
        tiles = block[:, : 9 * x.tile_bytes].reshape(len(block), 9, x.tile_bytes).copy()
        moved = move_tokens(x, tiles[:, :8], np.array(chosen))
        new = np.concatenate([moved, tiles[:, 8:]], axis=1)
        block[:, : 3 * x.tile_bytes] = new.reshape(len(block), -1)
        block[:, 3 * x.tile_bytes : 9 * x.tile_bytes] = 0xFF
        size = x.full_rows * x.row_bytes
        block[:, -size:] = shift_rows(x, np.ascontiguousarray(block[:, -size:]), DROPPED)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_pass_equals_a_compacted_reference(case: Case) -> None:
    made = make_inputs(dataclasses.replace(case, past_lengths=(0,), new_tokens=TOKENS))
    tensors = tuple(x[0].reshape(TOKENS, -1, case.head_dim).swapaxes(0, 1) for x in (made.query, made.key, made.value))
    expected = by_reference(case, tensors, made.head_sink)
    attention = CompactedAttention(150)
    attention.prompt = PROMPT
    query, key, value = (torch.from_numpy(np.ascontiguousarray(x)) for x in tensors)
    caches = LayoutCache(case.layouts[0]), LayoutCache(case.layouts[1])
    options = {
        "scale": case.head_dim**-0.5,
        "softcap": case.softcap,
        "local_window_size": case.local_window_size,
        "head_sink": None if made.head_sink is None else torch.from_numpy(made.head_sink),
    }
    got = attention(query, key, value, caches, **options)
    assert np.abs(got.numpy() - expected).max() < 2e-5 * np.abs(expected).max() + 2e-5
    whole = attend(query, key, value, caches, **options)
    assert torch.allclose(got[:, :PROMPT], whole[:, :PROMPT], atol=1e-5)
    assert case.local_window_size or (got - whole)[:, PROMPT:].abs().max() > 0.01


def test_the_runtime_looks_at_as_many_queries() -> None:
    assert SCORE_WINDOW == WINDOW


def test_configurations_come_again_with_fewer_tokens() -> None:
    names = [c.name for c in parse_configs("K4V2,balanced", Recipe(LayerConfig()), keep=[256, 300])]
    assert names == ["K4V2", "K4V2 keep 256", "K4V2 keep 300", "balanced", "balanced keep 256", "balanced keep 300"]
    assert parse_keep("") == [] and parse_keep(" 256, 512 ") == [256, 512]
    with pytest.raises(SkvError, match="--keep-tokens"):
        parse_keep("256,-1")


def test_bits_count_the_share_that_stays() -> None:
    recipe = Recipe(LayerConfig())
    kept, whole = of_recipe("x", recipe, keep=256), of_recipe("x", recipe)
    assert isinstance(kept, Compacted) and kept.key != whole.key
    kept.attention.prompt = 1024
    for candidate in (kept, whole):
        candidate.simulation.layer(0, 2, 64, 0)
    assert kept.effective_bits(8192) == pytest.approx(whole.effective_bits(2048) / 4)
