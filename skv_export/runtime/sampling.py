"""Sampling: chooses the next token from logits, greedy or with transformers' knobs in transformers' order, in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skv_export.arguments import check_fields
from skv_export.errors import SkvError
from skv_export.runtime import arrays

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; ``repetition_penalty`` first, greedy too, then in this order, as transformers does.

    Attributes:
        temperature: Divides the logits; 0 = greedy.
        top_k: Only the k most likely tokens; 0 = all.
        top_p: Only the most likely tokens that together reach this probability; 1 = all.
        seed: Same seed, same tokens.
        min_p: Only tokens at least this probable, measured by the most probable one; 0 = all.
        repetition_penalty: Of tokens that are there already: positive logits are divided by it, negative ones
            multiplied (Keskar et al., arXiv 1909.05858); 1 = none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.temperature < float("inf"):
            raise SkvError("temperature", got=self.temperature, expected="at least 0 (0 = greedy)")
        if self.top_k < 0:
            raise SkvError("top_k", got=self.top_k, expected="at least 0 (0 = all)")
        if not 0 < self.top_p <= 1:
            raise SkvError("top_p", got=self.top_p, expected="above 0, at most 1")
        if self.seed < 0:
            raise SkvError("seed", got=self.seed, expected="at least 0")
        if not 0 <= self.min_p <= 1:
            raise SkvError("min_p", got=self.min_p, expected="0 ... 1 (0 = all)")
        if not 0 < self.repetition_penalty < float("inf"):
            raise SkvError("repetition_penalty", got=self.repetition_penalty, expected="above 0 (1 = none)")


class Sampler:
    """Chooses tokens; holds the random state and which tokens have been there.

    Args:
        sampling: How.
        present: ``[B, vocab_size]``, tokens that the penalty of repetition counts; None = none yet.
    """

    def __init__(self, sampling: Sampling, present: NDArray[np.bool_] | None = None) -> None:
        self.sampling = sampling
        self._rng = np.random.default_rng(sampling.seed)
        self._present = None if sampling.repetition_penalty == 1 or present is None else present.copy()

    def __call__(self, logits: NDArray[np.float32]) -> Int64:
        """Returns a token per row of ``[B, vocab_size]``, as ``[B]``."""
        tokens = self._choose(self._penalized(logits))
        if self._present is not None:
            self._present[np.arange(len(tokens)), tokens] = True
        return tokens

    def _penalized(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._present is None:
            return logits
        penalty = np.float32(self.sampling.repetition_penalty)
        return np.where(self._present, np.where(logits < 0, logits * penalty, logits / penalty), logits)

    def _choose(self, logits: NDArray[np.float32]) -> Int64:
        if self.sampling.temperature == 0:
            return logits.argmax(axis=-1)
        probabilities = self.probabilities(logits)
        cumulative = probabilities.cumsum(axis=-1)
        draws = self._rng.random((len(logits), 1)) * cumulative[:, -1:]
        # The first token whose cumulative probability passes the draw: never one of probability 0.
        return (cumulative > draws).argmax(axis=-1)

    def probabilities(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """Returns the distribution that a token is drawn from, ``[B, vocab_size]``; unnormalized where p cuts."""
        scores = logits.astype(np.float64) / self.sampling.temperature
        k = self.sampling.top_k
        if 0 < k < scores.shape[-1]:
            threshold = np.partition(scores, -k, axis=-1)[:, -k, None]
            scores = np.where(scores < threshold, -np.inf, scores)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        if self.sampling.top_p < 1:
            order = np.argsort(-weights, axis=-1, kind="stable")
            ordered = np.take_along_axis(weights, order, axis=-1)
            # A token stays if those before it have not reached top_p: the first always does.
            kept = ordered.cumsum(axis=-1) - ordered < self.sampling.top_p
            np.put_along_axis(weights, order, np.where(kept, ordered, 0.0), axis=-1)
        if self.sampling.min_p > 0:
            weights = np.where(weights < self.sampling.min_p * weights.max(axis=-1, keepdims=True), 0.0, weights)
        return weights


def marked(vocab_size: int, present: Sequence[Sequence[int]]) -> NDArray[np.bool_]:
    """Marks the tokens that sequences have; what came as an embedding is none.

    Args:
        vocab_size: Tokens of the model.
        present: The tokens of each of B sequences.

    Returns:
        ``[B, vocab_size]``.

    Raises:
        SkvError: No such token.
    """
    found = np.zeros((len(present), vocab_size), np.bool_)
    for row, tokens in zip(found, present, strict=True):
        ids = arrays.integers("present", [token for token in tokens if token != arrays.NO_TOKEN])
        if ids.size:
            arrays.check_ids(ids[None], 1, vocab_size)
            row[ids] = True
    return found
