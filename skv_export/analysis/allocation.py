"""Allocation of bit widths to layers: the paper's greedy rule, its exact optimum, and dynamic programming under a byte
budget.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from skv_export.errors import SkvError

DEFAULT_CHOICES = (1, 2, 3, 4, 5, 6, 8)
TIE = 1e-6
"""A later tensor wins a step of the greedy rule only by more than this (arXiv 2502.15075)."""


def allocate_bits(
    sensitivities: Sequence[float], total_bits: int, choices: Sequence[int] = DEFAULT_CHOICES
) -> list[int]:
    """Greedily minimises ``sum(c_i^2 * 4^-b_i)`` with ``sum(b_i) <= total_bits``, as arXiv 2502.15075 does.

    Every tensor starts at the smallest choice; each step raises one tensor to its next choice: the one with the largest
    drop of error per added bit among those that fit.

    Args:
        sensitivities: c_i, in the order K0, V0, K1, V1, ...
        total_bits: Budget for the sum of the bits.
        choices: Bit widths to choose from.

    Returns:
        Bits per tensor.

    Raises:
        SkvError: Even the smallest choice everywhere is beyond the budget, or a sensitivity is negative or not finite.
    """
    ladder = _ladder(sensitivities, total_bits, choices)
    step = [0] * len(sensitivities)
    left = total_bits - ladder[0] * len(step)
    while True:
        best, best_gain = -1, 0.0
        for i, c in enumerate(sensitivities):
            if step[i] + 1 == len(ladder):
                continue
            low, high = ladder[step[i]], ladder[step[i] + 1]
            gain = c * c * (4.0**-low - 4.0**-high) / (high - low)
            if high - low <= left and (best < 0 or gain > best_gain + TIE):
                best, best_gain = i, gain
        if best < 0:
            return [ladder[s] for s in step]
        left -= ladder[step[best] + 1] - ladder[step[best]]
        step[best] += 1


def allocate_bits_optimal(
    sensitivities: Sequence[float],
    total_bits: int,
    choices: Sequence[int] = DEFAULT_CHOICES,
    pairs: Sequence[tuple[int, int]] | None = None,
) -> list[int]:
    """Minimises the same objective exactly, by dynamic programming.

    Args:
        sensitivities: c_i, in the order K0, V0, K1, V1, ...
        total_bits: Budget for the sum of the bits.
        choices: Bit widths to choose from.
        pairs: The (key, value) bits that one layer may have; any pair of ``choices`` if not given.

    Returns:
        Bits per tensor, in the same order.

    Raises:
        SkvError: As ``allocate_bits``; or an odd number of tensors with ``pairs``.
    """
    if pairs is None:
        ladder = _ladder(sensitivities, total_bits, choices)
        errors = [[c * c * 4.0**-b for b in ladder] for c in sensitivities]
        picks = allocate_options(errors, [list(ladder)] * len(errors), total_bits)
        return [ladder[p] for p in picks]
    if len(sensitivities) % 2:
        raise SkvError("sensitivities", got=f"{len(sensitivities)} tensors", expected="a key and a value per layer")
    _ladder(sensitivities, total_bits, sorted({b for pair in pairs for b in pair}))
    layers = list(zip(sensitivities[::2], sensitivities[1::2], strict=True))
    errors = [[k * k * 4.0**-kb + v * v * 4.0**-vb for kb, vb in pairs] for k, v in layers]
    picks = allocate_options(errors, [[kb + vb for kb, vb in pairs]] * len(layers), total_bits)
    return [bits for p in picks for bits in pairs[p]]


def allocate_options(errors: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float) -> list[int]:
    """Picks one option per layer so that the summed error is least and the summed cost within the budget; exact.

    Dynamic programming over the Pareto front of (cost, error) of the layers so far: states that cost more and err more
    than another are dropped, so costs need not be integers.

    Args:
        errors: ``[layers][options]``.
        costs: ``[layers][options]``, in any unit.
        budget: The most that all costs together may be.

    Returns:
        The index of each layer's option.

    Raises:
        SkvError: No combination fits, or an error is not finite.
    """
    error_table = [np.asarray(row, np.float64) for row in errors]
    cost_table = [np.asarray(row, np.float64) for row in costs]
    if not all(np.isfinite(row).all() for row in error_table):
        raise SkvError(
            "bit allocation: an error is not finite",
            expected="finite errors",
            fix="Check the checkpoint for NaN weights.",
        )
    cheapest = np.array([row.min() for row in cost_table])
    if not len(cheapest):
        raise SkvError("bit allocation: no layers", expected="at least one")
    slack = budget * (1 + 1e-12)
    if cheapest.sum() > slack:
        raise SkvError(
            "bit budget: too small",
            got=f"{budget:g}",
            expected=f"at least {cheapest.sum():g}, the smallest choice everywhere",
            fix="Raise the budget, allow smaller bit widths or keep fewer tokens in full precision.",
        )
    rest = np.append(np.cumsum(cheapest[::-1])[::-1][1:], 0.0)  # what later layers cost at least
    cost, error = np.zeros(1), np.zeros(1)
    trail: list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]] = []
    for layer_cost, layer_error, later in zip(cost_table, error_table, rest, strict=True):
        options = len(layer_cost)
        all_cost = (cost[:, None] + layer_cost).ravel()
        all_error = (error[:, None] + layer_error).ravel()
        keep = _pareto(all_cost, all_error, slack - later)
        cost, error = all_cost[keep], all_error[keep]
        trail.append((keep // options, keep % options))
    state = int(np.argmin(error))
    picks = []
    for parent, option in reversed(trail):
        picks.append(int(option[state]))
        state = int(parent[state])
    return picks[::-1]


def _pareto(cost: npt.NDArray[np.float64], error: npt.NDArray[np.float64], limit: float) -> npt.NDArray[np.intp]:
    """Indices of the states within the limit that no other state beats in both."""
    order = np.lexsort((error, cost))
    order = order[cost[order] <= limit]
    best = np.minimum.accumulate(error[order])
    first = np.append(True, best[1:] < best[:-1])
    return np.asarray(order[first], np.intp)


def _ladder(sensitivities: Sequence[float], total_bits: int, choices: Sequence[int]) -> list[int]:
    ladder = sorted(set(choices))
    if not ladder or ladder[0] < 1:
        raise SkvError("bit choices", got=list(choices), expected="positive bit widths")
    if not len(sensitivities):
        raise SkvError("bit allocation: no tensors", expected="at least one")
    for i, c in enumerate(sensitivities):
        if not (np.isfinite(c) and c >= 0):
            raise SkvError(f"sensitivity of {'KV'[i % 2]}{i // 2}", got=c, expected="a finite number of at least 0")
    if ladder[0] * len(sensitivities) > total_bits:
        raise SkvError(
            "bit budget: too small",
            got=total_bits,
            expected=f"at least {ladder[0] * len(sensitivities)}, {ladder[0]} for each tensor",
            fix="Raise the budget or allow smaller bit widths.",
        )
    return ladder
