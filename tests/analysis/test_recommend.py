"""Recommendations: never worse than a uniform pair without a measurement, or where a measured one does not win."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skv_export.analysis import pipeline, uniform_pairs
from skv_export.analysis.budget import CacheBudget
from skv_export.analysis.confirmation import HeldOutText
from skv_export.analysis.pipeline import MeasureOptions, Target
from skv_export.analysis.recommend import confirmed, upgrade_order, within_held_out
from skv_export.analysis.result import Allocation, Confirmation, HeldOut
from skv_export.checkpoints.attention_weights import AttentionConfig
from skv_export.errors import SkvError
from skv_export.evaluation.text import CALIBRATION_TEXT, read_text
from skv_export.spec.conformance import make_basis
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
def test_a_recommendation_from_weights_is_the_best_uniform_pair_raised_as_far_as_the_bytes_go(
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
    assert all(k >= max(2, pair[0]) and v >= pair[1] for k, v in bits)
    assert all(k >= v for k, v in bits)  # never the reverse of what was measured, whatever the weights say
    for layer, (k, v) in enumerate(bits):  # no bytes are left over in which a layer could still be better
        for larger in ((k + 1, v), (k, v + 1)):
            if larger in cache.pairs and larger[1] <= larger[0]:
                assert not limited.fits([*bits[:layer], larger, *bits[layer + 1 :]])


def test_windows_that_cost_nothing_take_the_largest_pair_and_the_rest_stays_uniform() -> None:
    cache = CacheBudget.of(a_config([64, 64, 64, 0], 1), LayerConfig(recent_tokens=0, tile_tokens=32), context=1 << 16)
    bits = uniform_pairs.mixed(cache.limited(3.3, None), upgrade_order(4))
    assert bits[:3] == ((8, 8),) * 3 and bits[3] == uniform_pairs.best_uniform(cache.limited(3.3, None))


def test_left_over_bytes_are_spent_as_well_as_the_best_allocation_of_them_spends_them() -> None:
    cache = CacheBudget.of(a_config([0] * 4, 1), LayerConfig(), choices=(2, 3, 4), context=32768).limited(3.4, None)
    pair = uniform_pairs.best_uniform(cache)
    above = [p for p in cache.pairs if p[0] >= pair[0] and p[1] >= pair[1]]
    possible = [bits for bits in itertools.product(above, repeat=4) if cache.fits(bits)]
    best = min(sum(map(uniform_pairs.expected_loss, bits)) for bits in possible)
    assert sum(map(uniform_pairs.expected_loss, uniform_pairs.mixed(cache, upgrade_order(4)))) == pytest.approx(best)


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
    raised = uniform_pairs.above([(k, v) for k in BITS for v in BITS], (3, 2))
    assert (4, 2) in raised and (3, 3) in raised
    assert not {(3, 2), (2, 3), (3, 4), (4, 1)} & set(raised)
    measured = {  # means of the two models in docs/defaults.md and benchmarks/RESULTS.md
        (4, 4): 0.0013, (4, 3): 0.00206, (4, 2): 0.0053, (3, 3): 0.0069, (3, 2): 0.0105, (2, 2): 0.0306, (2, 4): 0.0268,
    }  # fmt: skip
    for pair, loss in measured.items():
        assert uniform_pairs.expected_loss(pair) == pytest.approx(loss, rel=0.1)
    calibrated = {(4, 4): 0.00057, (4, 2): 0.00433, (3, 3): 0.00259, (3, 2): 0.00567, (2, 2): 0.0142}
    for pair, loss in calibrated.items():
        assert uniform_pairs.expected_loss(pair, calibrated=True) == pytest.approx(loss, rel=0.1)


def test_calibrated_keys_take_fewer_bits_for_more_of_values() -> None:
    base = dataclasses.replace(LayerConfig(), k_parameter_bits=8)
    for bases, pair in (({}, (4, 2)), ({0: make_basis(1, 64, 64)}, (3, 3))):
        cache = CacheBudget.of(a_config([0] * 4, 1), base, context=32768, bases=bases).limited(3.34, None)
        assert uniform_pairs.best_uniform(cache) == pair and set(uniform_pairs.mixed(cache, range(4))) == {pair}


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
        with pytest.raises(SkvError, match=r"max.loss"):
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


ALLOCATION = Allocation("per layer", ((5, 2), (3, 2)), 6.0, 0.001)
PAIRS = {name: Allocation(name, bits, size, None) for name, bits, size in [
    ("K4V2", ((4, 2),) * 2, 6.0), ("K3V3", ((3, 3),) * 2, 6.0), ("K5V2", ((5, 2),) * 2, 6.5)
]}  # fmt: skip


def a_row(allocation: Allocation, parts: Sequence[float], *, fits: bool = True, rise: float = 0.3) -> HeldOut:
    return HeldOut(allocation, fits, sum(parts) / len(parts), 0.0002, rise, 0.1, tuple(parts))


def judged(tiny_checkpoint: Callable[..., Path], rows: Sequence[HeldOut], max_loss: float | None = None) -> Any:
    found = dataclasses.replace(a_recommendation(tiny_checkpoint), allocation=ALLOCATION, score="measure")
    return confirmed(found, Confirmation(tuple(rows), 2, 1024), max_loss)


EASY_AND_HARD = [0.001, 0.009] * 8
"""Divergence by part: parts differ far more than allocations do, which pairs of them take out."""


def test_a_clear_win_keeps_the_allocation_and_prints_the_errors(tiny_checkpoint: Callable[..., Path]) -> None:
    uniform = a_row(PAIRS["K4V2"], [x + 0.0004 + 0.0001 * (i % 3) for i, x in enumerate(EASY_AND_HARD)])
    mean, error = uniform.excess(a_row(ALLOCATION, EASY_AND_HARD))
    differences = [0.0004 + 0.0001 * (i % 3) for i in range(16)]
    assert mean == pytest.approx(statistics.mean(differences))
    assert error == pytest.approx(statistics.stdev(differences) / 4)
    r = judged(tiny_checkpoint, [a_row(ALLOCATION, EASY_AND_HARD), uniform])
    assert r.allocation == ALLOCATION and not any("simpler" in reason for reason in r.reasons)
    assert "K 4.0 / V 2.0 per layer: KL 0.0050 ± 0.0002 at 6.00 bits" in r.reasons[0]
    assert f"K4V2: {uniform.kld:.4f} at 6.00 bits (+0.0005 ± 0.0000)" in r.reasons[0]


def test_a_clear_loss_gives_the_uniform_pair(tiny_checkpoint: Callable[..., Path]) -> None:
    r = judged(
        tiny_checkpoint, [a_row(ALLOCATION, [x + 0.0005 for x in EASY_AND_HARD]), a_row(PAIRS["K4V2"], EASY_AND_HARD)]
    )
    assert r.allocation == PAIRS["K4V2"]
    assert any("by measure lost there, so K4V2, which is simpler" in reason for reason in r.reasons)


def test_a_tie_goes_to_the_uniform_pair_even_where_its_mean_is_larger(tiny_checkpoint: Callable[..., Path]) -> None:
    noisy = [x + (0.002 if i % 2 else -0.0016) for i, x in enumerate(EASY_AND_HARD)]
    uniform = a_row(PAIRS["K4V2"], noisy)
    assert uniform.kld > a_row(ALLOCATION, EASY_AND_HARD).kld
    r = judged(tiny_checkpoint, [a_row(ALLOCATION, EASY_AND_HARD), uniform])
    assert r.allocation == PAIRS["K4V2"]
    assert any("did not clearly win there, so K4V2, which is simpler" in reason for reason in r.reasons)


def test_the_allocation_must_beat_each_pair_that_fits_and_no_larger_one(tiny_checkpoint: Callable[..., Path]) -> None:
    first = a_row(ALLOCATION, EASY_AND_HARD)
    worse, better = [x + 0.001 for x in EASY_AND_HARD], [x - 0.0005 for x in EASY_AND_HARD]
    larger = a_row(PAIRS["K5V2"], better, fits=False)
    assert judged(tiny_checkpoint, [first, a_row(PAIRS["K4V2"], worse), larger]).allocation == ALLOCATION
    both = [first, a_row(PAIRS["K4V2"], worse), a_row(PAIRS["K3V3"], better), larger]
    assert judged(tiny_checkpoint, both).allocation == PAIRS["K3V3"]
    assert judged(tiny_checkpoint, [first, larger]).allocation == ALLOCATION


def test_of_two_uniform_pairs_the_one_that_loses_less_is_taken(tiny_checkpoint: Callable[..., Path]) -> None:
    rows = [a_row(PAIRS["K3V3"], [0.004] * 16), a_row(PAIRS["K4V2"], [0.003] * 16)]
    assert judged(tiny_checkpoint, rows).allocation == PAIRS["K4V2"]
    assert judged(tiny_checkpoint, rows[::-1]).allocation == PAIRS["K4V2"]


def test_a_tie_does_not_replace_what_is_within_the_loss_by_what_is_not(tiny_checkpoint: Callable[..., Path]) -> None:
    rows = [a_row(ALLOCATION, [0.003] * 16, rise=0.4), a_row(PAIRS["K4V2"], [0.0031, 0.0029] * 8, rise=0.6)]
    assert judged(tiny_checkpoint, rows).allocation == PAIRS["K4V2"]
    r = judged(tiny_checkpoint, rows, 0.005)
    assert r.allocation == ALLOCATION and "within 0.5% there: perplexity +0.40% ± 0.10" in r.reasons[1]


@pytest.mark.parametrize(("rise", "divergence"), [(2.0, 0.002), (-0.1, 0.019)])
def test_what_loses_more_on_held_out_text_than_was_promised_gives_way_to_more_bits(
    rise: float, divergence: float, tiny_checkpoint: Callable[..., Path]
) -> None:
    """The rise of perplexity counts, and the divergence where chance made perplexity fall."""
    found = a_recommendation(tiny_checkpoint)
    asked: list[float] = []

    def again(promise: float) -> Any:
        asked.append(promise)
        size = 5.0 + len(asked)
        return len(asked), dataclasses.replace(found, allocation=Allocation("per layer", ALLOCATION.bits, size, 0.001))

    def judge(count: Any, found: Any) -> Confirmation:
        row = a_row(found.allocation, [divergence / count**2] * 16, rise=rise / count**2)
        return Confirmation((row, a_row(PAIRS["K3V3"], [0.02] * 16, fits=False)), 2, 1024)

    budget, r = within_held_out(0.005, again, judge)
    assert budget == 2 and r.allocation.effective_bits == 7.0
    assert asked[0] == pytest.approx(math.log1p(0.005)) and asked[0] / 4 <= asked[1] < asked[0]
    assert "within 0.5% there" in r.reasons[1]
    assert "at 6.00 bits was expected to be, and lost " in r.reasons[2]


def test_calibration_and_confirmation_are_different_works(tmp_path: Path) -> None:
    text = read_text(MeasureOptions().text, CALIBRATION_TEXT)
    assert len(text) > 50_000 and "Light" in text and "Elliot" not in text and "Elliot" in read_text(None)
    with pytest.raises(SkvError, match="no such file"):
        MeasureOptions(text=tmp_path / "missing")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00text")
    with pytest.raises(SkvError, match="not UTF-8"):
        MeasureOptions(text=tmp_path / "binary")


def test_the_confirmation_runs_the_allocation_and_its_rivals_once_each(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from skv_export.evaluation import comparison

    found = pipeline.analyze(tiny_checkpoint("llama"), target=Target(budget=5.9, context=4096))
    losses = {"K4V2": 0.005, "K3V2": 0.012}
    asked: list[str] = []
    notes: list[str] = []

    def run(source: Any, contenders: Any, text: str, **_: Any) -> Any:
        asked.extend(c.name for c in contenders)
        notes.extend(c.note for c in contenders)
        assert "Elliot" in text
        rows = []
        for c in contenders:
            loss = losses.get(c.name, 0.02)
            rows.append(
                SimpleNamespace(
                    kld_mean=loss, kld_stderr=0.0, ppl_change_percent=0.0, ppl_stderr_percent=0.0, windows=2,
                    kld_by_part=[loss] * 16,
                )
            )  # fmt: skip
        return SimpleNamespace(rows=rows)

    monkeypatch.setattr(comparison, "run", run)
    monkeypatch.setattr(comparison, "load", lambda source, placement: None)
    allocation = Allocation("per layer", ((5, 1), (3, 2)), 5.9, 0.001)
    r = dataclasses.replace(found.recommendation, allocation=allocation)
    held_out = HeldOutText(None, found.budget, MeasureOptions())  # type: ignore[arg-type]
    seen = held_out.judge(found.budget, r)
    assert asked[:2] == ["per layer", r.uniform.name] and len(asked) == len(set(asked)) == 3
    assert seen.winner.allocation == r.uniform and "K 4.0 / V 1.5 per layer" in seen.line
    assert held_out.judge(found.budget, r) == seen and len(asked) == 3
    # A measurement that misjudges the uniform pairs is held to the one that is best on other models, too.
    misled = dataclasses.replace(r, uniform=Allocation("K1V5", ((1, 5),) * 2, 5.9, 0.001))
    rows = held_out.judge(found.budget, misled).rows
    assert [row.allocation.name for row in rows[:3]] == ["per layer", "K1V5", r.uniform.name]
    assert not any("calibrated" in note for note in notes)
    calibrated = dataclasses.replace(found.budget, bases={0: make_basis(2, 80, 96)})
    HeldOutText(None, calibrated, MeasureOptions()).judge(calibrated, r)  # type: ignore[arg-type]
    assert all("keys calibrated" in note for note in notes[-3:])


def test_without_a_measurement_other_granularities_are_said_to_be_unmeasured(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    usual = a_recommendation(tiny_checkpoint)
    assert not any("those were measured" in reason for reason in usual.reasons)
    other = pipeline.analyze(
        tiny_checkpoint("llama"),
        target=Target(budget=6.1, context=4096),
        base=LayerConfig(k_granularity="token", k_rotation="hadamard"),
    ).recommendation
    assert any("not with keys per token, rotated: " in reason for reason in other.reasons)
