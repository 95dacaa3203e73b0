"""From scores to a recommendation: by measurement where there is one, else by uniform pairs as measured elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
    uniform = min(fitting or uniforms, key=(_rank if fitting else lambda u: u.effective_bits))
    return Recommendation(
        best,
        uniform,
        tuple(_neighbours(best, uniform, uniforms, cache, allocation, chosen if table is not None else None)),
        score,
        _UNITS.get(score, "none: norms predict no loss"),
        _reasons(score, cache, best, uniform, bool(fitting), flags, measurement),
    )


def _rank(a: Allocation) -> tuple[float, float]:
    pair = a.bits[0]
    known = pair[0] in uniform_pairs.KEY_LOSS
    loss = a.loss if a.loss is not None else uniform_pairs.expected_loss(pair) if known else math.inf
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
            uniform_pairs.expected_loss(pair) if pair[0] in uniform_pairs.KEY_LOSS else math.inf for pair in cache.pairs
        ]
        return np.tile(np.array(row) / len(layers), (len(layers), 1))
    tables = loss_tables(layers, cache, measurement)
    if score == "geometry":
        return tables[score] / len(layers)
    return tables.get(score)


def within_loss(cache: CacheBudget, layers: Sequence[LayerAnalysis], max_loss: float, m: Measurement | None) -> float:
    """Returns the fewest bytes of one sequence's cache at which perplexity is expected to rise by no more.

    A relative rise ``x`` of perplexity is taken as a KL divergence of ``log(1 + x)`` nats per token.

    Raises:
        SkvError: Not positive, or beyond what the largest pair promises.
    """
    if not (max_loss > 0 and math.isfinite(max_loss)):
        raise SkvError("--max-loss", got=max_loss, expected="a positive share of perplexity, such as 0.5%")
    limit = math.log1p(max_loss)
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
            raise _out_of_reach(max_loss)
        while high - low > 1:
            middle = (low + high) / 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high
    losses = ESTIMATE_MARGIN * loss_tables(layers, cache, m)[MEASURE]
    if losses.min(axis=1).sum() > limit:
        raise _out_of_reach(max_loss)
    picks = allocate_options(cache.costs.tolist(), losses.tolist(), limit)
    return float(sum(cache.costs[i, pick] for i, pick in enumerate(picks)))


def _out_of_reach(max_loss: float) -> SkvError:
    return SkvError(
        "--max-loss: not within reach",
        got=f"{100 * max_loss:g}%",
        expected="what the largest of --choices promises",
        fix="Allow more loss or larger bit widths.",
    )


def confirmed(found: Recommendation, confirmation: Confirmation) -> Recommendation:
    """Returns the recommendation with its comparison on held-out text; the uniform pair if the allocation lost."""
    reasons = (f"held-out prose, {confirmation.windows} windows: {confirmation.line}", *found.reasons)
    if confirmation.won:
        return replace(found, confirmation=confirmation, reasons=reasons)
    lost = f"the allocation by {found.score} did not win there, so {found.uniform.name} is recommended; of the other:"
    reasons = (reasons[0], lost, *found.reasons)
    return replace(found, allocation=found.uniform, confirmation=confirmation, reasons=reasons)


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
    return found + sorted((u for u in close if u.name not in (uniform.name, best.name)), key=_rank)[:4]


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
