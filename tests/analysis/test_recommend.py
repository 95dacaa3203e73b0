"""Recommendations: never worse than a uniform pair without a measurement, or where a measured one does not win."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skv_export.analysis import pipeline, uniform_pairs
from skv_export.analysis.budget import CacheBudget
from skv_export.analysis.confirmation import CALIBRATION_TEXT, CONFIRMATION_TEXT, calibration_text, confirm
from skv_export.analysis.pipeline import MeasureOptions, Target
from skv_export.analysis.recommend import confirmed, upgrade_order
from skv_export.analysis.result import Allocation, Confirmation, HeldOut
from skv_export.checkpoints.attention_weights import AttentionConfig
from skv_export.errors import SkvError
from skv_export.spec.recipe import BITS, LayerConfig


def a_config(windows: Sequence[int], kv_heads: int = 2, head_dim: int = 64) -> AttentionConfig:
    """A model of which only the cache's size matters."""
    return AttentionConfig(
        "llama", len(windows), 4, kv_heads, head_dim, head_dim**-0.5, 0.0, head_dim, 1e4, tuple(windows), 32768
    )


# Without a measurement.

CACHES = st.builds(
    lambda windows, kv_heads, head_dim, context: CacheBudget.of(
        a_config(windows, kv_heads, head_dim), LayerConfig(), context=context
    ),
    st.lists(st.sampled_from([0, 512]), min_size=1, max_size=12),
    st.sampled_from([1, 3]),
    st.sampled_from([64, 128]),
    st.sampled_from([2048, 32768]),
)


@settings(max_examples=60, deadline=None)
@given(CACHES, st.floats(1.8, 12))
def test_a_recommendation_from_weights_is_a_uniform_pair_or_raises_some_layers_of_one(
    cache: CacheBudget, budget: float
) -> None:
    limited = cache.limited(budget, None)
    layers = cache.config.num_hidden_layers
    fitting = [p for p in cache.pairs if p[0] >= 2 and limited.fits([p] * layers)]
    if not fitting:
        with pytest.raises(SkvError, match="no uniform pair fits"):
            uniform_pairs.mixed(limited, upgrade_order(layers))
        return
    bits = uniform_pairs.mixed(limited, upgrade_order(layers))
    pair = uniform_pairs.best_uniform(limited)
    assert limited.fits(bits)
    assert all(uniform_pairs.expected_loss(pair) <= uniform_pairs.expected_loss(p) for p in fitting)
    assert len(set(bits)) <= 2 and set(bits) <= {pair, uniform_pairs.neighbour(cache.pairs, pair)}
    assert all(k >= max(2, pair[0]) and v >= pair[1] for k, v in bits)
    assert all(k >= v for k, v in bits)  # never the reverse of what was measured, whatever the weights say


def test_more_bytes_never_lose_more() -> None:
    cache = CacheBudget.of(a_config([0] * 7), LayerConfig(), context=32768)
    losses = []
    for step in range(60):
        bits = uniform_pairs.mixed(cache.limited(2.0 + step / 10, None), upgrade_order(7))
        losses.append(sum(map(uniform_pairs.expected_loss, bits)))
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(losses))


def test_keys_come_first_and_the_sums_give_the_pairs_measured() -> None:
    assert uniform_pairs.expected_loss((4, 2)) < uniform_pairs.expected_loss((3, 3))
    assert uniform_pairs.expected_loss((4, 2)) < uniform_pairs.expected_loss((2, 4))
    assert uniform_pairs.neighbour([(k, v) for k in BITS for v in BITS], (2, 2)) == (3, 2)
    assert uniform_pairs.neighbour([(k, v) for k in BITS for v in BITS], (3, 2)) == (4, 2)
    assert uniform_pairs.neighbour([(k, v) for k in BITS for v in BITS], (4, 2)) == (4, 3)
    measured = {  # means of the two models in docs/defaults.md and benchmarks/RESULTS.md
        (4, 4): 0.0013, (4, 3): 0.00206, (4, 2): 0.0053, (3, 3): 0.0069, (3, 2): 0.0105, (2, 2): 0.0306, (2, 4): 0.0268,
    }  # fmt: skip
    for pair, loss in measured.items():
        assert uniform_pairs.expected_loss(pair) == pytest.approx(loss, rel=0.1)


@pytest.mark.parametrize("arch", ["qwen3", "gemma3_text", "llama", "qwen2"])
@pytest.mark.parametrize("budget", [4.7, 6.0, 7.5])
def test_no_architecture_gets_more_value_than_key_bits_from_weights(
    arch: str, budget: float, tiny_checkpoint: Callable[..., Path]
) -> None:
    found = pipeline.analyze(tiny_checkpoint(arch), target=Target(budget=budget, context=4096))
    r = found.recommendation
    assert r.score == "defaults" and found.budget.fits(r.allocation.bits)
    assert all(k >= v and k >= 2 for k, v in r.allocation.bits)
    assert r.allocation.loss is not None and r.uniform.loss is not None
    assert r.allocation.loss <= r.uniform.loss + 1e-12


@pytest.mark.parametrize("score", ["frobenius", "spectral", "geometry"])
def test_the_papers_rule_can_be_asked_for_and_is_called_no_advice(
    score: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    found = pipeline.analyze(tiny_checkpoint("llama"), target=Target(budget=6.0, context=4096), score=score)
    r = found.recommendation
    assert r.score == score and r.allocation.bits == next(s.bits for s in found.scores if s.name == score)
    assert any("no advice" in reason for reason in r.reasons)
    with pytest.raises(SkvError, match="--score measure"):
        pipeline.analyze(tiny_checkpoint("llama"), score="measure")


def test_layers_are_raised_spread_over_the_model() -> None:
    assert sorted(upgrade_order(30)) == list(range(30))
    first = sorted(upgrade_order(32)[:8])
    assert first == list(range(0, 32, 4))


# Losses instead of sizes.


def test_max_loss_takes_the_fewest_bits_within_it(tiny_checkpoint: Callable[..., Path]) -> None:
    def bits(loss: float) -> pipeline.Analysis:
        return pipeline.analyze(tiny_checkpoint("llama"), target=Target(max_loss=loss, context=32768))

    half, two = bits(0.006), bits(0.012)
    assert half.recommendation.allocation.loss <= math.log1p(0.006)
    assert half.recommendation.allocation.effective_bits > two.recommendation.allocation.effective_bits
    less = half.budget.limited(half.recommendation.allocation.effective_bits - 0.3, None)
    smaller = uniform_pairs.mixed(less, upgrade_order(len(half.layers)))
    assert sum(map(uniform_pairs.expected_loss, smaller)) / len(smaller) > math.log1p(0.006)
    for loss in (0.0, math.nan, 1e-9):
        with pytest.raises(SkvError, match="--max-loss"):
            bits(loss)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": 3.0, "memory": 1000}, "--budget and --memory"),
        ({"budget": 3.0, "max_loss": 0.01}, "--budget and --max-loss"),
        ({"weights": "int4"}, "--weights without"),
    ],
)
def test_targets_that_contradict(options: dict[str, Any], said: str, tiny_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(SkvError, match=said):
        pipeline.analyze(tiny_checkpoint("llama"), target=Target(**options))


# The comparison on held-out text.


def a_recommendation(tiny_checkpoint: Callable[..., Path]) -> Any:
    return pipeline.analyze(tiny_checkpoint("llama"), target=Target(budget=6.1, context=4096)).recommendation


@pytest.mark.parametrize("won", [True, False])
def test_an_allocation_that_does_not_win_gives_way_to_the_uniform_pair(
    won: bool, tiny_checkpoint: Callable[..., Path]
) -> None:
    found = dataclasses.replace(
        a_recommendation(tiny_checkpoint), allocation=Allocation("per layer", ((5, 2), (3, 2)), 6.0, 0.001)
    )
    rows = (HeldOut("K 4.0 / V 2.0 per layer", 6.0, 0.0043, 0.0, 0.3, 0.1), HeldOut("K4V2", 6.1, 0.005, 0.0, 0.3, 0.1))
    judged = confirmed(found, Confirmation(rows, 2, 1024, won))
    assert judged.allocation == (found.allocation if won else found.uniform)
    assert "K 4.0 / V 2.0 per layer: KL 0.0043 at 6.00 bits; K4V2: 0.0050 at 6.10 bits" in judged.reasons[0]
    assert any("did not win" in reason for reason in judged.reasons) is not won


def test_calibration_and_confirmation_are_different_works(tmp_path: Path) -> None:
    assert CALIBRATION_TEXT != CONFIRMATION_TEXT
    text = calibration_text(None)
    assert len(text) > 50_000 and "Light" in text and "Elliot" not in text
    with pytest.raises(SkvError, match="no such file"):
        calibration_text(tmp_path / "missing")


def test_the_confirmation_runs_the_allocation_and_its_rivals(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from skv_export.evaluation import comparison

    found = pipeline.analyze(tiny_checkpoint("llama"), target=Target(budget=5.9, context=4096))
    losses = {"K4V2": 0.005, "K3V2": 0.012}
    asked: list[str] = []

    def run(source: Any, contenders: Any, text: str, **_: Any) -> Any:
        asked.extend(c.name for c in contenders)
        assert "Elliot" in text
        rows = [
            SimpleNamespace(
                kld_mean=losses.get(c.name, 0.02), kld_stderr=0.0, ppl_change_percent=0.0, ppl_stderr_percent=0.0,
                windows=2,
            )
            for c in contenders
        ]  # fmt: skip
        return SimpleNamespace(rows=rows)

    monkeypatch.setattr(comparison, "run", run)
    monkeypatch.setattr(comparison, "load", lambda source, placement: None)
    allocation = Allocation("per layer", ((5, 1), (3, 2)), 5.9, 0.001)
    r = dataclasses.replace(found.recommendation, allocation=allocation)
    judged = confirm(None, found.budget, r, MeasureOptions())  # type: ignore[arg-type]
    assert asked[:2] == ["per layer", r.uniform.name] and len(asked) == 3
    assert not judged.won and "K 4.0 / V 1.5 per layer" in judged.line
