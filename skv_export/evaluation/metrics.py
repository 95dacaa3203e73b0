"""Metrics of predictions: negative log-likelihood, perplexity, KL divergence, top-1 agreement, standard error.

Log-probabilities are ``[..., vocabulary]``; everything is in nats and per position.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor


def nll(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Returns ``[...]``: negative log-likelihood of the tokens ``targets`` ``[...]``."""
    return -log_probs.gather(-1, targets[..., None])[..., 0]


def kl_divergence(reference: Tensor, candidate: Tensor) -> Tensor:
    """Returns ``[...]``: KL(reference || candidate); rounding can leave it a little below 0."""
    return (reference.exp() * (reference - candidate)).sum(-1)


def top1_agreement(reference: Tensor, candidate: Tensor) -> Tensor:
    """Returns ``[...]``: whether both have the same most likely token."""
    return reference.argmax(-1) == candidate.argmax(-1)


def perplexity(nlls: ArrayLike) -> float:
    """Returns the exponential of the mean negative log-likelihood."""
    return math.exp(np.asarray(nlls).mean())


def standard_error(values: ArrayLike) -> float:
    """Returns the standard error of the mean of independent values; 0 of a single one."""
    given = np.asarray(values)
    return float(given.std(ddof=1) / math.sqrt(len(given))) if len(given) > 1 else 0.0
