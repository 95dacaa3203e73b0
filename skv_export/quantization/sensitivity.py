"""Which matrices need more bits: the divergence that each one's rounding causes at the model's output, measured.

Matrices that read the same tensor are rounded together, those of one layer at a time, everything else staying exact.
All these variants of the model read the text side by side, layer after layer, so a layer is loaded once, and none
computes the layers before its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from skv_export.errors import SkvError
from skv_export.evaluation.decode_simulation import Simulation
from skv_export.quantization.error_propagation import run_exactly
from skv_export.quantization.layer_by_layer import LayerByLayer
from skv_export.quantization.solver import Form, fit_grid

WINDOWS, WINDOW = 2, 256
"""Windows of text on which the divergence is measured, and tokens of each, at most."""
WIDE_BITS = 8
"""Of the matrices that need more."""
_NEGLIGIBLE = 1e-3
"""Matrices whose divergence per weight is below this share of the mean get no more bits, even if there is room."""


@dataclass
class Unit:
    """Matrices that get the same bits.

    Attributes:
        names: The model's names of them.
        elements: Weights in all of them.
        kld: Mean divergence of the model's tokens when these alone are rounded, in nats.
    """

    names: tuple[str, ...]
    elements: int
    kld: float = 0.0


def measure(
    model: LayerByLayer,
    windows: Tensor,
    form: Form,
    chosen: Callable[[int, torch.nn.Module], Mapping[str, torch.nn.Linear]],
    progress: Callable[[str, int, int], None],
) -> list[Unit]:
    """Measures what rounding each unit to the nearest does.

    Args:
        model: A model of which nothing is quantized.
        windows: Tokens ``[windows, S]``.
        form: Bits and groups that they are rounded to.
        chosen: Gives the matrices of a layer that can be quantized, by name.
        progress: Told of each layer.

    Returns:
        The units, layer by layer.
    """
    windows = windows[:WINDOWS, :WINDOW]
    states = model.embed(windows)
    units: list[tuple[Unit, list[Tensor]]] = []
    for index in model.layers:
        progress("measuring layers", index, len(model.layers))
        with model.loaded(index) as layer:
            matrices = chosen(index, layer)
            runs = [run_exactly(model, index, matrices, hidden) for hidden in states]
            for _, own in units:
                own[:] = [model.run(index, hidden, Simulation.full_precision()) for hidden in own]
            for stage in _stages(runs[0].stages, matrices):
                names = tuple(model.name(index, name) for name in stage)
                unit = Unit(names, sum(matrices[name].weight.numel() for name in stage))
                units.append((unit, _rounded(model, index, [matrices[name] for name in stage], states, form)))
            states = [run.out for run in runs]
    exact = [model.logits(hidden, ids).log_softmax(-1) for hidden, ids in zip(states, windows, strict=True)]
    for unit, own in units:
        found = [model.logits(hidden, ids).log_softmax(-1) for hidden, ids in zip(own, windows, strict=True)]
        each = [(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(exact, found, strict=True)]
        unit.kld = float(torch.stack(each).mean())
    return [unit for unit, _ in units]


def _stages(found: Sequence[Sequence[str]], matrices: Mapping[str, torch.nn.Linear]) -> list[Sequence[str]]:
    rest = [name for name in matrices if not any(name in stage for stage in found)]
    return [stage for stage in [*found, rest] if stage]


def _rounded(
    model: LayerByLayer, index: int, modules: Sequence[torch.nn.Linear], states: Sequence[Tensor], form: Form
) -> list[Tensor]:
    """The layer's output for each window with some matrices rounded."""
    before = [module.weight.data for module in modules]
    try:
        for module in modules:
            grid = fit_grid(module.weight.data, form)
            module.weight.data = grid.values(grid.codes(module.weight.data))
        return [model.run(index, hidden, Simulation.full_precision()) for hidden in states]
    finally:
        for module, weight in zip(modules, before, strict=True):
            module.weight.data = weight


def allocate(units: Sequence[Unit], form: Form, budget: float) -> dict[str, Form]:
    """Gives the matrices that need it most ``WIDE_BITS``: those whose divergence per weight is largest come first.

    Args:
        units: Measured.
        form: Of all others.
        budget: Bits per weight, scales and zero points included, over all units.

    Returns:
        The form of each matrix, by the model's name.

    Raises:
        SkvError: The budget is too small for ``form``.
    """
    wide = replace(form, bits=WIDE_BITS)
    elements = sum(unit.elements for unit in units)
    room = (budget - form.effective_bits) * elements
    if room < 0:
        raise SkvError(
            "weight_bits_budget: too small",
            got=f"{budget:g} bits per weight",
            expected=f"at least {form.effective_bits:.3f}: {form.bits} bits in groups of {form.group_size}",
            fix="Raise it, or take larger groups (--group-size).",
        )
    forms = {name: form for unit in units for name in unit.names}
    least = _NEGLIGIBLE * sum(unit.kld for unit in units) / elements
    for unit in sorted(units, key=lambda unit: -unit.kld / unit.elements):
        more = (wide.effective_bits - form.effective_bits) * unit.elements
        if more <= room and unit.kld / unit.elements > least:
            room -= more
            forms |= dict.fromkeys(unit.names, wide)
    return forms
