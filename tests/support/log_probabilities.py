"""What a checkpoint makes of tokens, and how far two of them are apart."""

from __future__ import annotations

from pathlib import Path

import torch

from skv_export.checkpoints.checkpoint import resolve
from skv_export.checkpoints.pretrained import load_model


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities ``[B, S, vocabulary]`` of tokens ``[B, S]``, computed by transformers."""
    with torch.no_grad():
        return load_model(resolve(folder))(ids).logits.log_softmax(-1)


def divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL divergence of log-probabilities, in nats."""
    return float((reference.exp() * (reference - other)).sum(-1).mean())
