"""The codes of one matrix: GPTQ against its definition, grids against what they promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from skv_export.quantization.solver import DAMPING, Form, Grid, fit_grid, gptq


def problem(outputs: int = 24, inputs: int = 64, rows: int = 300, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, and second moments of inputs that hang together and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5 + torch.eye(inputs)
    x = torch.randn(rows, inputs, generator=generator) @ mixing * torch.linspace(0.2, 3, inputs)
    return torch.randn(outputs, inputs, generator=generator), x.T @ x


def brain_surgeon(weight: NDArray[np.float64], moments: NDArray[np.float64], grid: Grid) -> NDArray[np.float64]:
    """Optimal Brain Quantization in a given order, as its paper (arXiv 2208.11580) has it: no factors, no blocks.

    After each input the inverse loses its row and column by elimination.
    """
    order = np.argsort(-np.diag(moments), kind="stable")
    inverse = np.linalg.inv(moments + DAMPING * np.diag(moments).mean() * np.eye(len(moments)))
    left, codes, open_inputs = weight.copy(), np.zeros_like(weight), list(range(len(moments)))
    size, levels = grid.form.group_size, grid.form.levels
    for q in order:
        scale, zero = (x.numpy().astype(np.float64)[:, q // size] for x in (grid.scales, grid.zeros))
        codes[:, q] = np.clip(np.round(left[:, q] / scale) + zero, 0, levels)
        error = (left[:, q] - (codes[:, q] - zero) * scale) / inverse[q, q]
        open_inputs.remove(q)
        left[:, open_inputs] -= np.outer(error, inverse[q, open_inputs])
        inverse -= np.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return codes


@pytest.mark.parametrize(("inputs", "form"), [(64, Form(4, 32)), (160, Form(4, 16)), (128, Form(8, 128))])
def test_gptq_is_optimal_brain_surgery_in_the_order_of_the_inputs_weight(inputs: int, form: Form) -> None:
    weight, moments = problem(inputs=inputs)
    grid = fit_grid(weight, form, moments.diagonal())
    codes = gptq(weight.double(), moments, Grid(grid.scales.double(), grid.zeros.double(), form))
    expected = brain_surgeon(weight.double().numpy(), moments.double().numpy(), grid)
    assert (codes.numpy() == expected).mean() > 0.999  # a tie may round the other way


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_keeps_outputs_better_than_rounding(bits: int) -> None:
    for seed in range(4):
        weight, moments = problem(seed=seed)
        grid = fit_grid(weight, Form(bits, 32), moments.diagonal())

        def loss(codes: torch.Tensor, grid: Grid = grid, w: torch.Tensor = weight, m: torch.Tensor = moments) -> float:
            error = grid.values(codes) - w
            return float((error @ m * error).sum())

        assert loss(gptq(weight, moments, grid)) < 0.6 * loss(grid.codes(weight))


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, moments = problem()
    moments[5], moments[:, 5] = 0, 0
    codes = gptq(weight, moments, fit_grid(weight, Form(), moments.diagonal()))
    assert codes.isfinite().all() and codes.min() >= 0 and codes.max() <= 15


def test_moments_of_fewer_rows_than_inputs_can_be_inverted() -> None:
    weight, _ = problem(inputs=128)
    x = torch.randn(3, 128)
    grid = fit_grid(weight, Form())
    assert gptq(weight, x.T @ x, grid).isfinite().all()
    assert gptq(weight, torch.ones(128, 128) * 1e6, grid, damping=1e-16).isfinite().all()


def test_a_spanning_grid_holds_the_range_and_zero() -> None:
    weight, _ = problem()
    grid = fit_grid(weight, Form())
    step = grid.scales.repeat_interleave(32, 1)
    assert ((grid.values(grid.codes(weight)) - weight).abs() <= 0.56 * step).all()  # half, and bfloat16's rounding
    assert (grid.values(grid.codes(torch.zeros_like(weight))) == 0).all()
    assert torch.equal(grid.scales, grid.scales.bfloat16().float())


def test_weights_on_a_grid_stay_as_they_are() -> None:
    codes = torch.randint(0, 16, (8, 64))
    codes[:, ::32], codes[:, 1::32] = 0, 15
    weight = (codes - 6.0) * 0.25
    for importance in (None, torch.ones(64)):
        grid = fit_grid(weight, Form(), importance)
        assert torch.equal(grid.values(grid.codes(weight)), weight)


def test_a_grid_fitted_to_the_inputs_never_loses_more_than_one_that_spans() -> None:
    weight, moments = problem(outputs=64)
    importance = moments.diagonal()
    fitted, spanning = (
        ((grid.values(grid.codes(weight)) - weight).square() * importance).reshape(64, 2, 32).sum(-1)
        for grid in (fit_grid(weight, Form(), importance), fit_grid(weight, Form()))
    )
    assert (fitted <= spanning * (1 + 1e-6)).all() and fitted.sum() < 0.95 * spanning.sum()


def test_a_group_of_zeros() -> None:
    grid = fit_grid(torch.zeros(2, 32), Form(), torch.ones(32))
    assert (grid.values(grid.codes(torch.zeros(2, 32))) == 0).all()
