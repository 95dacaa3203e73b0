"""Weights fitted to what the unquantized model computes: each matrix makes up for the errors of those before it.

GPTQ keeps what a matrix gives for the inputs that it will see, which earlier layers have already changed. Quantization
Error Propagation (arXiv 2504.09629) keeps what it gives in the unquantized model: both models read the text side by
side, and the matrix is first moved to where the one's inputs give the other's outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skv_export.errors import SkvError
from skv_export.evaluation.decode_simulation import Simulation
from skv_export.quantization.layer_by_layer import LayerByLayer, SharedInputs, reading
from skv_export.quantization.solver import Form, Grid, Sums, fit

Matrices = Mapping[str, torch.nn.Linear]


@dataclass(frozen=True)
class ExactRun:
    """A layer of the unquantized model on one window of text.

    Attributes:
        read: What each matrix read that reads every token, ``[S, K]``.
        stages: Names of matrices that read the same tensor, in the order in which they do.
        out: What the layer gave, ``[1, S, hidden]``.
    """

    read: dict[str, Tensor]
    stages: list[list[str]]
    out: Tensor


def run_exactly(model: LayerByLayer, index: int, matrices: Matrices, hidden: Tensor) -> ExactRun:
    """Runs a loaded layer, of which nothing is quantized, on a window ``[1, S, hidden]``."""
    with reading(matrices) as read:
        out = model.run(index, hidden, Simulation.full_precision())
    found: dict[str, Tensor] = {}
    stages: dict[int, list[str]] = {}
    for name, x in read:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) == hidden.shape[1] and name not in found:  # an expert reads some tokens only
            found[name] = rows
            stages.setdefault(id(x), []).append(name)
    return ExactRun(found, list(stages.values()), out)


def fit_layer(
    model: LayerByLayer,
    index: int,
    matrices: Matrices,
    runs: Sequence[ExactRun],
    states: Sequence[Tensor],
    simulation: Simulation,
    forms: Mapping[str, Form],
) -> dict[str, tuple[Tensor, Grid]]:
    """Finds the codes of a loaded layer's matrices, in the order in which they read, and puts their values in place.

    Args:
        model: The model.
        index: The layer.
        matrices: Its matrices by name.
        runs: The layer before anything of it was quantized, on each window of the text.
        states: What the layer reads of each window once those before it are quantized, ``[1, S, hidden]``.
        simulation: The cache that it has meanwhile.
        forms: Of each matrix.

    Returns:
        Codes and grid of each matrix.

    Raises:
        SkvError: What a matrix reads is not finite.
    """
    stages = [*runs[0].stages, [name for name in matrices if name not in runs[0].read]]
    fitted: dict[str, tuple[Tensor, Grid]] = {}
    for stage in filter(None, stages):
        chosen = {name: matrices[name] for name in stage}
        sums = _sums(model, index, chosen, runs, states, simulation)
        for name, module in chosen.items():
            whole = model.name(index, f"{name}.weight")
            if not sums[name].finite():
                raise SkvError(f"{whole}: what it reads is not finite", fix="Check the checkpoint with `quality`.")
            codes, grid = fitted[name] = fit(module.weight.data, forms[name], sums[name])
            module.weight.data = grid.values(codes)
    return fitted


def _sums(
    model: LayerByLayer,
    index: int,
    chosen: Matrices,
    runs: Sequence[ExactRun],
    states: Sequence[Tensor],
    simulation: Simulation,
) -> dict[str, Sums]:
    """Sums over the text of what some matrices read; those that read the same tensor share one."""
    moments: dict[str, Tensor] = {}
    drift: dict[str, Tensor] = {}
    shared = SharedInputs()
    for run, hidden in zip(runs, states, strict=True):
        with reading(chosen, stop=True) as read:
            model.run(index, hidden, simulation)
        for name, rows in shared.distinct(read):
            moments[name] = moments.get(name, 0) + rows.T @ rows
            if name in run.read:
                drift[name] = drift.get(name, 0) + (run.read[name] - rows).T @ rows
    whole = shared.of_each(moments, chosen)
    return {name: Sums(whole[name], drift.get(shared.source.get(name, name))) for name in chosen}
