"""Compares the scores: the allocation that each recommends under the budget, and flags where one is unreliable."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from skv_export.analysis.allocation import allocate_bits
from skv_export.analysis.budget import CacheBudget, Pair
from skv_export.analysis.geometry import Geometry
from skv_export.analysis.norms import Norms

if TYPE_CHECKING:
    from skv_export.analysis.measurement import Measurement

WEAK_CORRELATION = "from weights alone: shown to explain, not followed (docs/theory.md)"


@dataclass(frozen=True)
class LayerAnalysis:
    """What one layer's weights say.

    Attributes:
        index: The layer.
        q_frobenius: Norm of the query projection.
        k: Norms of the key projection.
        v: Norms of the value projection.
        geometry: The expected errors.
        k_bias: Norm of the key projection's bias; 0 without one.
    """

    index: int
    q_frobenius: float
    k: Norms
    v: Norms
    geometry: Geometry
    k_bias: float


@dataclass(frozen=True)
class Score:
    """One way to rank tensors, and what it asks for under the budget.

    Attributes:
        name: ``frobenius``, ``spectral``, ``geometry``, ``geometry_activations`` or ``measure``.
        bits: ``(k_bits, v_bits)`` per layer.
        balance: Per layer, how many more bits it would give keys than values; None where the score says nothing.
        note: Why it should not be trusted here; empty otherwise.
    """

    name: str
    bits: tuple[Pair, ...]
    balance: tuple[float | None, ...]
    note: str = ""


def compare(
    layers: Sequence[LayerAnalysis], cache: CacheBudget, optimal: bool, measurement: Measurement | None
) -> tuple[Score, ...]:
    """Returns the scores, the paper\'s first, the most trusted last."""
    scores = [
        _norm_score(name, [(getattr(x.k, name), getattr(x.v, name)) for x in layers], cache, optimal, layers)
        for name in ("frobenius", "spectral")
    ]
    tables = loss_tables(layers, cache, measurement)
    balances: dict[str, list[float | None]] = {"geometry": [x.geometry.balance for x in layers]}
    if measurement is not None:
        balances |= measurement.balances()
    for name, table in tables.items():
        note = WEAK_CORRELATION if name == "geometry" else ""
        scores.append(Score(name, cache.best(table), tuple(balances[name]), note))
    return tuple(scores)


def _norm_score(
    name: str,
    values: list[tuple[float, float]],
    cache: CacheBudget,
    optimal: bool,
    layers: Sequence[LayerAnalysis],
) -> Score:
    flat = [x for pair in values for x in pair]
    normalized = all(x.geometry.k_norm for x in layers)
    note = "keys are normalized after the projection (k_norm): the norm of W_K says nothing" if normalized else ""
    ratio = tuple(None if normalized or not (k and v) else math.log2(k / v) for k, v in values)
    if optimal or cache.restricted:
        table = np.array([[k * k * 4.0**-kb + v * v * 4.0**-vb for kb, vb in cache.pairs] for k, v in values])
        return Score(name, cache.best(table), ratio, note)

    def allocate(total: int) -> tuple[Pair, ...]:
        bits = allocate_bits(flat, total, cache.choices)
        return tuple(zip(bits[::2], bits[1::2], strict=True))

    return Score(name, cache.largest(allocate), ratio, note)


def loss_tables(
    layers: Sequence[LayerAnalysis], cache: CacheBudget, measurement: Measurement | None
) -> dict[str, npt.NDArray[np.float64]]:
    """Returns, for each score that predicts a loss, ``[layers, pairs]`` in the order of ``cache.pairs``."""
    tables = {
        "geometry": np.array([[x.geometry.k_error[k] + x.geometry.v_error[v] for k, v in cache.pairs] for x in layers])
    }
    if measurement is not None:
        tables |= measurement.tables(cache.pairs)
    return tables


def find_flags(layers: Sequence[LayerAnalysis], scores: Sequence[Score]) -> tuple[Mapping[str, Any], ...]:
    """Returns what the reader should know: normalized keys, large key biases, scores that disagree by over a bit."""
    flags: list[Mapping[str, Any]] = []
    if any(x.geometry.k_norm for x in layers):
        flags.append({"layer": None, "flag": "k_norm", "text": "k_norm present: the weight norm of K says nothing"})
    biases = np.array([x.k_bias for x in layers])
    median = float(np.median(biases))
    for layer in layers:
        if median and layer.k_bias > 8 * median:
            text = f"layer {layer.index}: key biases {layer.k_bias / median:.0f}x the median"
            flags.append({"layer": layer.index, "flag": "k_bias", "text": text})
    best = next(s for s in reversed(scores) if s.name != "spectral")
    paper = scores[0]
    for layer, ours, theirs in zip(layers, best.balance, paper.balance, strict=True):
        if ours is not None and theirs is not None and abs(ours - theirs) > 1:
            text = (
                f"layer {layer.index}: more bits for keys by {paper.name}: {theirs:+.1f}, by {best.name}: {ours:+.1f}"
            )
            flags.append({"layer": layer.index, "flag": "scores_disagree", "text": text})
    return tuple(flags)
