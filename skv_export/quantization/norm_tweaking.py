"""Norm Tweaking: a quantized layer's norms are moved until its output is distributed as it was.

Of Li et al. (arXiv 2309.02784): after a layer's matrices are quantized, a few gradient steps on the weights and biases
of its norms bring mean and variance of each channel of its output to those of the unquantized layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from skv_export.evaluation.decode_simulation import Simulation
from skv_export.quantization.layer_by_layer import LayerByLayer
from skv_export.quantization.scaling import offset

RATE = 1e-4
"""Step of the first layer, as a share of what a norm multiplies by in the mean. The last layer's is twice as large, as
the authors raise theirs with depth: its errors are those of all layers before it."""
_JUDGES = 4
"""One window in so many takes no part in the steps, but judges them."""


def tweak(
    model: LayerByLayer,
    index: int,
    layer: torch.nn.Module,
    states: Sequence[Tensor],
    exact: Sequence[Tensor],
    simulation: Simulation,
) -> dict[str, Tensor]:
    """Moves the norms of a loaded, quantized layer in place, a step for each window of the text.

    It is all taken back unless outputs of windows that took no part come nearer to the unquantized model's.

    Args:
        model: The model.
        index: The layer.
        layer: The same, as a module.
        states: What it reads of each window, ``[1, S, hidden]``.
        exact: What it gives in the unquantized model.
        simulation: The cache that it has meanwhile.

    Returns:
        The tensors that have changed, by their names in the layer, in float32: 16 bits hold no steps so small.
    """
    groups = [
        {"params": list(norm.parameters(recurse=False)), "lr": RATE * (1 + index / len(model.layers)) * size}
        for norm, size in _own_norms(model, index, layer)
    ]
    if not groups:
        return {}
    moved = {id(parameter) for group in groups for parameter in group["params"]}  # type: ignore[attr-defined]
    tensors = {name: parameter for name, parameter in layer.named_parameters() if id(parameter) in moved}
    kept = {name: parameter.data.clone() for name, parameter in tensors.items()}
    pairs = list(zip(states, exact, strict=True))
    judges = pairs[::_JUDGES]
    taking_part = [pair for i, pair in enumerate(pairs) if i % _JUDGES] or judges

    def error() -> float:
        return sum(float((model.run(index, hidden, simulation) - wanted).square().sum()) for hidden, wanted in judges)

    before = error()
    optimizer = torch.optim.Adam(groups)
    for parameter in tensors.values():
        parameter.requires_grad_(True)
    for hidden, wanted in taking_part:
        optimizer.zero_grad()
        with torch.enable_grad():
            _distance(model.run(index, hidden, simulation), wanted).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for parameter in tensors.values():
        parameter.requires_grad_(False)
    if error() < before:
        return {name: parameter.data for name, parameter in tensors.items()}
    for name, parameter in tensors.items():
        parameter.data = kept[name]
    return {}


def _own_norms(model: LayerByLayer, index: int, layer: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, float]]:
    """Norms that no other layer has, with the mean size of what they multiply by."""
    uses = Counter(map(model.weights.canonical, model.model.state_dict()))
    for name, norm in layer.named_modules():
        weight = getattr(norm, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 1:
            whole = model.name(index, f"{name}.weight")
            if uses[model.weights.canonical(whole)] == 1:
                yield norm, float((weight + offset(norm)).abs().mean())


def _distance(found: Tensor, wanted: Tensor) -> Tensor:
    """How far the channels' means and variances are apart, of two outputs ``[1, S, hidden]``: the authors' equation 2.

    Divided by the channels' mean spread and variance, so that a step is as large whatever the size of the stream.
    """
    found, wanted = found[0], wanted[0]
    spread = wanted.var(0).mean().clamp(min=1e-20)
    means = (found.mean(0) - wanted.mean(0)).abs().mean() / spread.sqrt()
    return means + (found.var(0) - wanted.var(0)).abs().mean() / spread
