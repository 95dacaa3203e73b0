"""AWQ: what many tokens read strongly is scaled up in the matrices, and down in the norm before them.

Of Lin et al. (arXiv 2306.00978), with scales searched for each set of matrices that read one norm's output. Rounding
then costs the heavy inputs less, and the light ones more; the layer computes the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from skv_export.evaluation.decode_simulation import Simulation
from skv_export.quantization.layer_by_layer import LayerByLayer
from skv_export.quantization.solver import Form, fit_grid

EXPONENTS = torch.linspace(0, 1, 11).tolist()
"""Powers of an input's size that are tried as its scale; 0 scales nothing."""
_SAME = 1e-3
"""Relative difference of a layer's output up to which it computes the same: 16-bit norms are not scaled exactly."""
Matrices = Mapping[str, torch.nn.Linear]


def scale_inputs(
    model: LayerByLayer, index: int, layer: torch.nn.Module, matrices: Matrices, hidden: Tensor,
    moments: dict[str, Tensor], forms: Mapping[str, Form],
) -> dict[str, Tensor]:  # fmt: skip
    """Scales a loaded layer's matrices and norms in place, wherever the layer then computes the same.

    Args:
        model: The model.
        index: The layer.
        layer: The same, as a module.
        matrices: Its matrices by name.
        hidden: What it reads of a window, ``[1, S, hidden]``.
        moments: ``[K, K]`` of each matrix: sums of ``x x^T``; those of what is scaled are replaced.
        forms: Of each matrix.

    Returns:
        The tensors of norms that have changed, by their names in the layer.
    """
    changed: dict[str, Tensor] = {}
    run = Simulation.full_precision()
    for norm, names in readers_of_norms(model, index, layer, matrices, hidden).items():
        module = layer.get_submodule(norm)
        chosen = {name: matrices[name] for name in names}
        before = model.run(index, hidden, run)
        kept = {name: parameter.data for name, parameter in module.named_parameters()}
        weights = {name: matrix.weight.data for name, matrix in chosen.items()}
        made = _best(chosen, moments[names[0]], {name: forms[name] for name in names})
        dtype = model.weights.tensor(model.name(index, f"{norm}.weight")).dtype
        scales = _divide(module, made, dtype)
        for matrix in chosen.values():
            matrix.weight.data = matrix.weight.data * scales
        after = model.run(index, hidden, run)
        if (after - before).norm() > _SAME * (before - hidden).norm():  # something else reads what the norm gives
            for name, parameter in module.named_parameters():
                parameter.data = kept[name]
            for name, matrix in chosen.items():
                matrix.weight.data = weights[name]
            continue
        scaled = moments[names[0]] / scales / scales[:, None]
        moments |= dict.fromkeys(names, scaled)
        changed |= {f"{norm}.{name}": parameter.data.to(dtype) for name, parameter in module.named_parameters()}
    return changed


def readers_of_norms(
    model: LayerByLayer, index: int, layer: torch.nn.Module, matrices: Matrices, hidden: Tensor
) -> dict[str, list[str]]:
    """Returns the norms of a loaded layer with the matrices that read their outputs, by their names in it."""
    outputs: dict[int, str] = {}
    found: dict[str, list[str]] = {}
    alive: list[Tensor] = []  # so that no two of the tensors have one id

    def gives(name: str, out: object) -> None:
        if isinstance(out, Tensor):
            alive.append(out)
            outputs[id(out)] = name

    def reads(name: str, x: Tensor) -> None:
        if id(x) in outputs:
            found.setdefault(outputs[id(x)], []).append(name)

    handles = [
        module.register_forward_hook(lambda _, __, out, name=name: gives(name, out))
        for name, module in layer.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() == 1
    ]
    handles += [
        module.register_forward_pre_hook(lambda _, inputs, name=name: reads(name, inputs[0]))
        for name, module in matrices.items()
    ]
    try:
        model.run(index, hidden, Simulation.full_precision())
    finally:
        for handle in handles:
            handle.remove()
    return found


def _best(chosen: Matrices, moments: Tensor, forms: Mapping[str, Form]) -> Tensor:
    """The scales ``[K]`` with which rounding to the nearest changes the matrices' outputs least."""
    size = moments.diagonal().sqrt().clamp(min=1e-10)
    best, least = torch.ones_like(size), float("inf")
    for exponent in EXPONENTS:
        scales = size**exponent
        scales = scales / (scales.max() * scales.min()).sqrt()
        loss = 0.0
        for name, matrix in chosen.items():
            scaled = matrix.weight.data * scales
            grid = fit_grid(scaled, forms[name], moments.diagonal() / scales.square())
            error = grid.values(grid.codes(scaled)) / scales - matrix.weight.data
            loss += float((error @ moments * error).sum())
        if loss < least:
            best, least = scales, loss
    return best


def _divide(norm: Any, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Divides a norm's output by scales, in a number format of the file; returns the scales that it has then."""
    weight: Tensor = norm.weight.data
    more = offset(norm)
    new = ((weight + more) / scales - more).to(dtype).float()
    made = torch.where(new + more == 0, scales, (weight + more) / (new + more))
    norm.weight.data = new
    if getattr(norm, "bias", None) is not None:
        norm.bias.data = (norm.bias.data / made).to(dtype).float()
    return made


def offset(norm: Any) -> float:
    """What a loaded norm adds to its weights before it multiplies by them: 1 in Gemma's, else 0."""
    weight: Tensor = norm.weight.data
    try:
        norm.weight.data = torch.zeros_like(weight)
        x = torch.linspace(-1, 2, len(weight), device=weight.device)[None, None]
        bias = getattr(norm, "bias", None)
        made = norm(x)[0, 0] - (0 if bias is None else bias.data)
        return 1.0 if made.abs().max() > 0 else 0.0
    finally:
        norm.weight.data = weight
