"""Uniform pairs ranked by what they were measured to lose: the advice that needs no run of the model.

Weights alone do not tell how sensitive a layer is (docs/theory.md, "What weights can't tell"). So without a measurement
every layer gets the best uniform pair that fits, and bytes that are left raise layers, a bit being worth the same in
all of them. No layer ever has fewer key or value bits than that pair, so the mix can't lose more than the pair does.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from skv_export.analysis.budget import CacheBudget, Pair
from skv_export.errors import SkvError
from skv_export.spec.recipe import LayerConfig

KEY_LOSS = {2: 0.0266, 3: 0.0061, 4: 0.0010, 5: 2.3e-4, 6: 5e-5, 8: 3e-6, 16: 0.0}
VALUE_LOSS = {1: 0.026, 2: 0.0043, 3: 0.00105, 4: 0.0003, 5: 8e-5, 6: 2e-5, 8: 2e-6, 16: 0.0}
"""KL divergence in nats per token with keys or values of all layers in so many bits: means of SmolLM2-135M and Gemma 3
270M, split so that their sums give the pairs measured (``benchmarks/RESULTS.md``) within a tenth. Above 4 bits by the
quantizer's arithmetic. One-bit keys are not in it: without a measurement, keys have two bits at least."""
CALIBRATED_KEY_LOSS = {2: 0.0099, 3: 0.0015, 4: 0.00027, 5: 7e-5, 6: 2e-5, 8: 1e-6, 16: 0.0}
"""The same of calibrated keys (``benchmarks/RESULTS.md``, Calibrated keys)."""
LEAST_KEY_BITS = min(KEY_LOSS)


def expected_loss(pair: Pair, calibrated: bool = False) -> float:
    """Returns what a uniform pair is expected to lose, in nats per token."""
    return (CALIBRATED_KEY_LOSS if calibrated else KEY_LOSS)[pair[0]] + VALUE_LOSS[pair[1]]


def supported(pairs: Sequence[Pair]) -> list[Pair]:
    """Returns the pairs that may be recommended without a measurement."""
    return [pair for pair in pairs if pair[0] >= LEAST_KEY_BITS]


def best_uniform(cache: CacheBudget) -> Pair:
    """Returns the pair that is expected to lose least of those that fit.

    Raises:
        SkvError: None fits.
    """
    layers = cache.config.num_hidden_layers
    pairs = supported(cache.pairs)
    fitting = [pair for pair in pairs if cache.fits([pair] * layers)]
    if fitting:
        return min(fitting, key=lambda pair: (expected_loss(pair, bool(cache.bases)), sum(pair)))
    least = min((cache.effective_bits([pair] * layers) for pair in pairs), default=float("inf"))
    raise SkvError(
        f"budget: no uniform pair fits at {cache.context} tokens",
        got=f"{8 * cache.limit / cache.elements:.2f} effective bits",
        expected=f"at least {least:.2f}, or a measurement: weights alone don't say which layers take fewer",
        fix="Raise the budget, or run the model: --measure.",
    )


def not_measured_for(base: LayerConfig) -> list[str]:
    """Returns a sentence if the table is of other granularities or rotations than these; nothing if it is of these."""
    measured, parts = LayerConfig(), []
    for side, name in (("k", "keys"), ("v", "values")):
        options = [f"{side}_granularity", f"{side}_rotation"]
        if any(getattr(base, option) != getattr(measured, option) for option in options):
            granularity, rotation = (getattr(base, option) for option in options)
            parts.append(f"{name} per {granularity}{', rotated' if rotation != 'none' else ''}")
    if not parts:
        return []
    return [
        f"those were measured with keys per channel and values per token, rotated, not with {' and '.join(parts)}: "
        "the order of the pairs may differ, so measure where you can"
    ]


def above(pairs: Sequence[Pair], pair: Pair) -> list[Pair]:
    """Returns the pairs with no fewer bits of either kind; values are raised as far as the keys and no further."""
    return [
        p
        for p in supported(pairs)
        if p != pair and p[0] >= pair[0] and p[1] >= pair[1] and (p[1] <= p[0] or p[1] == pair[1])
    ]


def mixed(cache: CacheBudget, order: Sequence[int]) -> tuple[Pair, ...]:
    """Returns the best uniform pair with layers raised for as long as anything fits, the most gain per byte first.

    Bytes are those of the layer: a short window's are nearly free, which takes it to the largest pair. Layers that
    gain alike are raised in turn.

    Args:
        cache: The budget.
        order: Layers, the first to be raised first.

    Raises:
        SkvError: No uniform pair fits.
    """
    bits = [best_uniform(cache)] * cache.config.num_hidden_layers
    costs = cache.costs.tolist()
    places = {pair: place for place, pair in enumerate(cache.pairs)}
    steps = {pair: above(cache.pairs, pair) for pair in cache.pairs}
    left = cache.limit * (1 + 1e-12) - cache.bytes(bits)

    def lost(pair: Pair) -> float:
        return expected_loss(pair, bool(cache.bases))

    def best_step(layer: int) -> tuple[float, int, int, Pair] | None:
        """The layer's next step that fits, in the order of a heap: gain per byte, lowest bits, the layer's turn."""
        row, pair = costs[layer], bits[layer]
        loss, size = lost(pair), row[places[pair]]
        fitting = [p for p in steps[pair] if row[places[p]] - size <= left]
        if not fitting:
            return None

        def worth(p: Pair) -> float:
            return (loss - lost(p)) / max(row[places[p]] - size, 1)

        best = max(fitting, key=worth)
        return -worth(best), turns[layer], layer, best

    turns = {layer: turn for turn, layer in enumerate(order)}
    heap = [step for layer in order if (step := best_step(layer))]
    heapq.heapify(heap)
    while heap:
        _, _, layer, raised = heapq.heappop(heap)
        size = costs[layer][places[raised]] - costs[layer][places[bits[layer]]]
        if size <= left:
            bits[layer], left = raised, left - size
        step = best_step(layer)  # of a layer whose step no longer fits, a smaller one
        if step:
            heapq.heappush(heap, step)
    return tuple(bits)
