"""From scores to a recommendation: by measurement where there is one, else by uniform pairs as measured elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from skv_export.analysis import uniform_pairs
from skv_export.analysis.allocation import allocate_options
from skv_export.analysis.budget import CacheBudget, Pair
from skv_export.analysis.result import Allocation, Confirmation, Recommendation
from skv_export.analysis.scores import Score, loss_tables
from skv_export.errors import SkvError

if TYPE_CHECKING:
    from skv_export.analysis.measurement import Measurement
    from skv_export.analysis.scores import LayerAnalysis

DEFAULTS = "defaults"
MEASURE = "measure"
SCORES = (DEFAULTS, MEASURE, "frobenius", "spectral", "geometry")
"""What may decide; the last three reproduce a rule, and are no advice."""
_KLD = "nats of KL divergence per token"
_UNITS = {
    DEFAULTS: f"{_KLD}, as these bits lost on SmolLM2-135M and Gemma 3 270M",
    MEASURE: _KLD,
    "geometry": "relative squared error of the attention output",
}
ESTIMATE_MARGIN = 2.0
"""A measured loss is an estimate from Fisher information, up to twice below the truth (docs/theory.md)."""
LEAST_STEP, LARGEST_STEP = 1.25, 4.0
"""By how much less is asked for, at least and at most, when an allocation lost more than was expected."""


def recommend(
    score: str,
    layers: Sequence[LayerAnalysis],
    cache: CacheBudget,
    scores: Sequence[Score],
    flags: Sequence[Mapping[str, Any]],
    measurement: Measurement | None,
) -> Recommendation:
    """Returns the recommendation of one score of ``SCORES``, within the budget; ``measure`` takes a measurement.

    Raises:
        SkvError: Nothing fits.
    """
    table = _table(score, layers, cache, measurement)

    def allocation(name: str, bits: Sequence[Pair]) -> Allocation:
        loss = None
        if table is not None:
            loss = float(sum(table[i, cache.pairs.index(pair)] for i, pair in enumerate(bits)))
        return Allocation(name, tuple(bits), cache.effective_bits(bits), loss)

    def chosen(limit: CacheBudget) -> tuple[Pair, ...]:
        if score == DEFAULTS:
            return uniform_pairs.mixed(limit, upgrade_order(len(layers)))
        if table is not None:
            return limit.best(table)
        return next(s.bits for s in scores if s.name == score)

    best = allocation("per layer", chosen(cache))
    if len(set(best.bits)) == 1:
        best = replace(best, name="K{}V{}".format(*best.bits[0]))
    uniforms = [allocation(f"K{k}V{v}", [(k, v)] * len(layers)) for k, v in cache.pairs]
    if score == DEFAULTS:
        uniforms = [u for u in uniforms if u.bits[0] in uniform_pairs.supported(cache.pairs)]
    fitting = [u for u in uniforms if cache.fits(u.bits)]
    # Where no uniform pair fits, the cheapest one stands in, so that the reader sees what it would take.
    uniform = min(fitting or uniforms, key=(partial(_rank, cache) if fitting else lambda u: u.effective_bits))
    return Recommendation(
        best,
        uniform,
        tuple(_neighbours(best, uniform, uniforms, cache, allocation, chosen if table is not None else None)),
        score,
        _UNITS.get(score, "none: norms predict no loss"),
        _reasons(score, cache, best, uniform, bool(fitting), flags, measurement),
    )


def _rank(cache: CacheBudget, a: Allocation) -> tuple[float, float]:
    pair, loss = a.bits[0], a.loss
    if loss is None:
        known = pair[0] in uniform_pairs.KEY_LOSS
        loss = uniform_pairs.expected_loss(pair, bool(cache.bases)) if known else math.inf
    return loss, a.effective_bits


def upgrade_order(layers: int) -> list[int]:
    """Returns the layers in the order in which left-over bytes raise them: spread evenly over the model."""
    return sorted(range(layers), key=lambda i: int(f"{i:016b}"[::-1], 2))


def _table(
    score: str, layers: Sequence[LayerAnalysis], cache: CacheBudget, measurement: Measurement | None
) -> npt.NDArray[np.float64] | None:
    """Losses ``[layers, pairs]`` that sum up to the whole model's; None for scores that predict none."""
    if score == DEFAULTS:
        row = [
            uniform_pairs.expected_loss(pair, bool(cache.bases)) if pair[0] in uniform_pairs.KEY_LOSS else math.inf
            for pair in cache.pairs
        ]
        return np.tile(np.array(row) / len(layers), (len(layers), 1))
    tables = loss_tables(layers, cache, measurement)
    if score == "geometry":
        return tables[score] / len(layers)
    return tables.get(score)


def within_loss(cache: CacheBudget, layers: Sequence[LayerAnalysis], limit: float, m: Measurement | None) -> float:
    """Returns the fewest bytes of one sequence's cache that are expected to lose ``limit`` nats per token at most.

    Raises:
        SkvError: The largest pair is expected to lose more.
    """
    if m is None:
        order, count = upgrade_order(len(layers)), len(layers)
        low, high = 0.0, float(cache.costs.max(axis=1).sum())
        table = _table(DEFAULTS, layers, cache, None)
        assert table is not None

        def enough(size: float) -> bool:
            try:
                bits = uniform_pairs.mixed(replace(cache, limit=size), order)
            except SkvError:
                return False
            return bool(sum(table[i, cache.pairs.index(bits[i])] for i in range(count)) <= limit)

        if not enough(high):
            raise _out_of_reach(limit, float(table.min(axis=1).sum()))
        while high - low > 1:
            middle = (low + high) / 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high
    losses = loss_tables(layers, cache, m)[MEASURE]
    if losses.min(axis=1).sum() > limit:
        raise _out_of_reach(limit, float(losses.min(axis=1).sum()))
    picks = allocate_options(cache.costs.tolist(), losses.tolist(), limit)
    return float(sum(cache.costs[i, pick] for i, pick in enumerate(picks)))


def divergence_of(max_loss: float) -> float:
    """Returns the KL divergence in nats per token that a relative rise of perplexity stands for, ``log(1 + x)``.

    Raises:
        SkvError: Not positive.
    """
    if not (max_loss > 0 and math.isfinite(max_loss)):
        raise SkvError("--max-loss", got=max_loss, expected="a positive share of perplexity, such as 0.5%")
    return math.log1p(max_loss)


def _out_of_reach(limit: float, least: float) -> SkvError:
    return SkvError(
        f"--max-loss: no bits are expected to lose {100 * math.expm1(limit):.2g}% at most",
        got=f"{100 * math.expm1(least):.2g}% with the largest of --choices",
        fix="Allow more loss or larger bit widths.",
    )


def confirmed(found: Recommendation, confirmation: Confirmation, max_loss: float | None = None) -> Recommendation:
    """Returns the recommendation with its comparison on held-out text.

    The allocation stays if it clearly loses less than the uniform pairs that fit; else the best of those, which is
    simpler, takes its place, unless it is beyond ``max_loss`` and the allocation within it.
    """
    first, chosen = confirmation.rows[0], confirmation.winner
    if max_loss is not None and first.loss <= max_loss < chosen.loss:
        chosen = first
    reasons = [f"held-out prose, {confirmation.windows} windows: {confirmation.line}"]
    if max_loss is not None and chosen.loss <= max_loss:
        reasons.append(
            f"within {100 * max_loss:g}% there: perplexity {chosen.ppl_change_percent:+.2f}% ± "
            f"{chosen.ppl_stderr_percent:.2f}, KL divergence {chosen.kld:.4f}"
        )
    if chosen is not first:
        why = "lost" if first.clearly_above(chosen) else "did not clearly win"
        reasons.append(
            f"the allocation by {found.score} {why} there, so {chosen.label}, which is simpler, is recommended; "
            "of the other:"
        )
    return replace(found, allocation=chosen.allocation, confirmation=confirmation, reasons=(*reasons, *found.reasons))


def within_held_out(
    max_loss: float,
    again: Callable[[float], tuple[CacheBudget, Recommendation]],
    judge: Callable[[CacheBudget, Recommendation], Confirmation],
) -> tuple[CacheBudget, Recommendation]:
    """Returns the fewest bits whose loss on held-out text is within ``max_loss``; larger ones are tried until one is.

    Args:
        max_loss: Share of perplexity.
        again: Gives budget and recommendation for an expected divergence in nats.
        judge: Runs them on the held-out text.

    Raises:
        SkvError: Not even the largest bits are within it.
    """
    promise, beyond = divergence_of(max_loss), list[str]()
    while True:
        cache, found = again(promise)
        confirmation = judge(cache, found)
        judged = confirmed(found, confirmation, max_loss)
        chosen = next(row for row in confirmation.rows if row.allocation.bits == judged.allocation.bits)
        if chosen.loss <= max_loss:
            return cache, replace(judged, reasons=(*judged.reasons[:2], *beyond, *judged.reasons[2:]))
        beyond.append(
            f"{chosen.label} at {chosen.allocation.effective_bits:.2f} bits was expected to be, and lost "
            f"{100 * chosen.loss:.2f}%"
        )
        promise /= min(max(chosen.loss / max_loss, LEAST_STEP), LARGEST_STEP)


def _neighbours(
    best: Allocation,
    uniform: Allocation,
    uniforms: Sequence[Allocation],
    cache: CacheBudget,
    allocation: Any,
    again: Any,
) -> list[Allocation]:
    """Allocations with a little less and a little more memory, and the nearest uniform pairs."""
    found = []
    for step in (-0.5, -0.25, 0.25, 0.5) if again else ():
        try:
            bits = again(cache.limited(best.effective_bits + step, None))
        except SkvError:  # nothing fits so few bits
            continue
        found.append(allocation(f"per layer, {step:+g} bits", bits))
    close = sorted(uniforms, key=lambda u: abs(u.effective_bits - best.effective_bits))[:12]
    return found + sorted((u for u in close if u.name not in (uniform.name, best.name)), key=partial(_rank, cache))[:4]


def _reasons(
    score: str,
    cache: CacheBudget,
    best: Allocation,
    uniform: Allocation,
    fits: bool,
    flags: Sequence[Mapping[str, Any]],
    measurement: Measurement | None,
) -> tuple[str, ...]:
    k_mean, v_mean = np.mean(best.bits, axis=0)
    reasons = [
        f"{best.effective_bits:.2f} effective bits at {cache.context} tokens, scales and full-precision tokens counted",
        f"keys get {k_mean:.2f} bits, values {v_mean:.2f}, on average",
    ]
    if cache.fp16_fits:
        size = f"{cache.plain_memory(2 * cache.config.head_dim) / 2**20:.1f} MiB"
        reasons.insert(0, f"a cache in fp16 takes {size} and fits, too: nothing has to be quantized to have the room")
    if cache.bases and score in (DEFAULTS, MEASURE):
        reasons.append("with calibrated keys: `model` needs the same --calibration to lose no more than is said here")
    if not fits:
        reasons.append(f"no uniform pair fits; the cheapest, {uniform.name}, takes {uniform.effective_bits:.2f}")
    elif best.loss is not None and uniform.loss is not None and best.loss < uniform.loss:
        reasons.append(
            f"expected loss {best.loss:.3g} against {uniform.loss:.3g} for the best uniform pair, {uniform.name}"
        )
    if score == DEFAULTS:
        reasons.append(
            "from weights alone: the best uniform pair as measured on other models; left-over bytes raise layers"
        )
        reasons += uniform_pairs.not_measured_for(cache.base)
    elif score == MEASURE and measurement is not None:
        how = "measured layer by layer" if measurement.direct else "measured"
        reasons.append(f"{how} on {measurement.tokens} tokens of text")
    else:
        reasons.append(f"by {score}, which is a rule to reproduce and no advice: it may lose more than a uniform pair")
    for flag in flags:
        if flag["layer"] is None:
            reasons.append(flag["text"])
        elif flag["flag"] == "k_bias":
            k, v = best.bits[flag["layer"]]
            reasons.append(f"{flag['text']}: {k} bits for its keys, {v} for its values")
    disagree = [str(f["layer"]) for f in flags if f["flag"] == "scores_disagree"]
    if disagree:
        reasons.append(f"the paper's norms ask for something else by more than a bit in layers {', '.join(disagree)}")
    return tuple(reasons)
