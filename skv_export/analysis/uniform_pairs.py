"""Uniform pairs ranked by what they were measured to lose: the advice that needs no run of the model.

Weights alone do not tell how sensitive a layer is (docs/theory.md, "What weights can't tell"). So without a measurement
every layer gets the best uniform pair that fits, and bytes that are left raise some layers to the next pair. No layer
ever has fewer key or value bits than that pair, which is why the mix can't lose more than the pair does.
"""

from __future__ import annotations

from collections.abc import Sequence

from skv_export.analysis.budget import CacheBudget, Pair
from skv_export.errors import SkvError

KEY_LOSS = {2: 0.0266, 3: 0.0061, 4: 0.0010, 5: 2.3e-4, 6: 5e-5, 8: 3e-6, 16: 0.0}
VALUE_LOSS = {1: 0.026, 2: 0.0043, 3: 0.00105, 4: 0.0003, 5: 8e-5, 6: 2e-5, 8: 2e-6, 16: 0.0}
"""KL divergence in nats per token with keys or values of all layers in so many bits: means of SmolLM2-135M and Gemma 3
270M, split so that their sums give the pairs measured (``benchmarks/RESULTS.md``) within a tenth. Above 4 bits by the
quantizer's arithmetic. One-bit keys are not in it: without a measurement, keys have two bits at least."""
LEAST_KEY_BITS = min(KEY_LOSS)


def expected_loss(pair: Pair) -> float:
    """Returns what a uniform pair is expected to lose, in nats per token."""
    return KEY_LOSS[pair[0]] + VALUE_LOSS[pair[1]]


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
        return min(fitting, key=lambda pair: (expected_loss(pair), sum(pair)))
    least = min((cache.effective_bits([pair] * layers) for pair in pairs), default=float("inf"))
    raise SkvError(
        f"budget: no uniform pair fits at {cache.context} tokens",
        got=f"{8 * cache.limit / cache.elements:.2f} effective bits",
        expected=f"at least {least:.2f}, or a measurement: weights alone don't say which layers take fewer",
        fix="Raise the budget, or run the model: --measure.",
    )


def neighbour(pairs: Sequence[Pair], pair: Pair) -> Pair | None:
    """Returns the pair with no fewer bits of either kind whose extra bits are worth most; None above all others."""
    above = [p for p in supported(pairs) if p != pair and p[0] >= pair[0] and p[1] >= pair[1]]
    gain = expected_loss(pair)
    return max(above, key=lambda p: (gain - expected_loss(p)) / (sum(p) - sum(pair)), default=None)


def mixed(cache: CacheBudget, order: Sequence[int]) -> tuple[Pair, ...]:
    """Returns the best uniform pair with as many layers raised to its neighbour as the budget allows.

    Args:
        cache: The budget.
        order: Layers, the first to be raised first.

    Raises:
        SkvError: No uniform pair fits.
    """
    pair = best_uniform(cache)
    bits = [pair] * cache.config.num_hidden_layers
    raised = neighbour(cache.pairs, pair)
    if raised is None:
        return tuple(bits)
    for layer in order:
        bits[layer] = raised
        if not cache.fits(bits):
            bits[layer] = pair
    return tuple(bits)
