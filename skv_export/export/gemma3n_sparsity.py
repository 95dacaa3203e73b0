"""Gemma 3n's sparse MLP with its threshold as a number: transformers computes it in every call, by the inverse error
function, which ONNX has not."""

from __future__ import annotations

from typing import Any

import torch

MLP = "Gemma3nTextMLP"
"""The class."""


def use_constant_threshold(module: Any) -> None:
    """Replaces ``_gaussian_topk`` of such a module: what lies below ``mean + std * icdf(sparsity)`` becomes 0."""
    if not module.activation_sparsity > 0:
        return
    sparsity = torch.tensor(module.activation_sparsity, dtype=torch.float32)
    deviations = float(torch.distributions.Normal(0.0, 1.0).icdf(sparsity))  # type: ignore[no-untyped-call]

    def gaussian_topk(inputs: torch.Tensor) -> torch.Tensor:
        mean = inputs.mean(-1, keepdim=True)
        deviation = (inputs - mean).square().mean(-1, keepdim=True).sqrt()
        # As transformers has it: the factor is rounded to the activations' type.
        factor = torch.tensor(deviations, dtype=torch.float32).to(inputs.dtype)
        return torch.nn.functional.relu(inputs - (mean + deviation * factor))

    module._gaussian_topk = gaussian_topk
