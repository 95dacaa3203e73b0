"""The codes of one matrix: GPTQ against its definition, grids against what they promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from skv_export.quantization.solver import DAMPING, Form, Grid, Sums, descend, fit, fit_grid, gptq, refit_scales


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


def test_scales_and_codes_in_turns_lose_less_each_time() -> None:
    """Least squares, and the best code one by one, of a loss that is computed here; scales are rounded to bfloat16."""
    weight, moments = problem(outputs=48, inputs=160)
    moments += DAMPING * moments.diagonal().mean() * torch.eye(160)
    grid = fit_grid(weight, Form(4, 16), moments.diagonal())
    codes = gptq(weight, moments, grid)

    def loss(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
        error = (grid.values(codes) - weight).double()
        return (error @ moments.double() * error).sum(1)

    before = loss(codes, grid)
    for _ in range(2):
        grid = refit_scales(weight, moments, codes, grid)
        scaled = loss(codes, grid)
        codes = descend(weight, moments, codes, grid)
        after = loss(codes, grid)
        assert (scaled <= 1.02 * before).all() and (after <= scaled * (1 + 1e-5)).all()
        before = after
    assert after.sum() < 0.9 * loss(gptq(weight, moments, start := fit_grid(weight, Form(4, 16), moments.diagonal())),
                                    start).sum()  # fmt: skip
    assert codes.min() >= 0 and codes.max() <= 15 and torch.equal(codes, codes.round())


def test_refitted_scales_are_those_of_least_squares() -> None:
    """One row, by numpy's solver on the inputs themselves."""
    weight, _ = problem(outputs=1, inputs=64)
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(3))
    grid = fit_grid(weight, Form(4, 16))
    codes = grid.codes(weight)
    steps = (codes - grid.zeros.repeat_interleave(16, 1)).numpy().astype(np.float64)
    columns = np.stack([x.numpy()[:, g : g + 16] @ steps[0, g : g + 16] for g in range(0, 64, 16)], axis=1)
    expected = np.linalg.lstsq(columns, x.numpy() @ weight[0].numpy(), rcond=None)[0]
    found = refit_scales(weight, x.T @ x, codes, grid).scales[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=0.01)  # bfloat16, and the ridge


def test_a_matrix_makes_up_for_what_has_become_of_its_inputs() -> None:
    weight, _ = problem()
    exact = torch.randn(400, 64, generator=torch.Generator().manual_seed(5))
    read = exact @ (torch.eye(64) + 0.1 * torch.randn(64, 64, generator=torch.Generator().manual_seed(6)))
    losses = []
    for drift in (None, (exact - read).T @ read):
        codes, grid = fit(weight, Form(4, 32), Sums(read.T @ read, drift))
        losses.append(float((read @ grid.values(codes).T - exact @ weight.T).square().sum()))
    assert losses[1] < 0.3 * losses[0], losses


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, moments = problem()
    moments[5], moments[:, 5] = 0, 0
    for codes in (
        gptq(weight, moments, fit_grid(weight, Form(), moments.diagonal())),
        fit(weight, Form(), Sums(moments, torch.zeros_like(moments)))[0],
    ):
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
