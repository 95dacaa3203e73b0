"""What recommendations are worth: each route's allocation and the uniform pairs that fit, judged on unseen text.

    python benchmarks/allocation_truth.py CHECKPOINT [--budgets 2.5,3.25,4.25] [--context 32768] [--windows 3]
        [--window 1024] [--calibration-windows 2] [--measure-state FILE] [--state FILE] [--routes defaults,measure,...]
        [--recent-tokens 64] [--tile-tokens 64] [--first 1]

Calibrated on the shipped calibration text, judged on the shipped prose, decode style. Uniform pairs: those
with as many bits for keys as for values or up to two more that fit, and that no other fitting pair reaches in both
widths. Prints a Markdown table: the last column is the divergence less that of the best uniform pair of the budget,
part by part of the windows. Below it: how many bits the measured allocations need for the loss of each other route,
read off straight lines through their points (bits, log KL). Route `direct` measures every layer alone (`--kl`), which
takes a hundred times as long. Resumable through both state files; --first judges only so many of the windows, so that
a table exists before all are done.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path

import numpy as np
import torch

from skv_export.analysis import pipeline
from skv_export.analysis.budget import Pair
from skv_export.analysis.pipeline import Allocation, Analysis, MeasureOptions, Target
from skv_export.analysis.result import HeldOut
from skv_export.checkpoints.checkpoint import resolve
from skv_export.checkpoints.demo_model import demo_checkpoint
from skv_export.errors import SkvError
from skv_export.evaluation import candidates, comparison
from skv_export.evaluation.text import read_text
from skv_export.spec.recipe import LayerConfig, Recipe

ROUTES = ("measure", "defaults", "spectral", "frobenius")
DATA = Path(pipeline.__file__).parents[1] / "data"


def maximal(pairs: list[Pair]) -> list[Pair]:
    """Pairs that no other pair reaches in both widths."""
    return [p for p in pairs if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in pairs)]


def allocations(analyses: dict[str, Analysis]) -> dict[str, tuple[Pair, ...]]:
    """The allocation of every route, by name, then those of the uniform pairs that fit and are worth a run."""
    found = {route: a.recommendation.allocation.bits for route, a in analyses.items()}
    any_one = next(iter(analyses.values()))
    layers = len(any_one.layers)
    fitting = [p for p in any_one.budget.pairs if any_one.budget.fits([p] * layers)]
    sensible = [(k, v) for k, v in maximal(fitting) if k >= 2 and v <= k <= v + 2]
    return found | {f"uniform K{k}V{v}": ((k, v),) * layers for k, v in sorted(sensible, reverse=True)}


def analyses_of(given: argparse.Namespace, budget: float) -> dict[str, Analysis]:
    """One analysis per route; a route that can't have so few bits is left out, saying so."""
    measure = MeasureOptions(
        windows=given.calibration_windows, window=given.window, state=given.measure_state, confirm_windows=0
    )
    direct_state = given.measure_state and given.measure_state.with_name(given.measure_state.name + ".direct")
    measuring = {"measure": measure, "direct": dataclasses.replace(measure, kl=True, state=direct_state)}
    found = {}
    for route in given.routes.split(","):
        try:
            found[route] = pipeline.analyze(
                given.checkpoint,
                target=Target(budget=budget, context=given.context),
                base=LayerConfig(recent_tokens=given.recent_tokens, tile_tokens=given.tile_tokens),
                score="measure" if route in measuring else route,
                measure=measuring.get(route),
            )
        except SkvError as error:
            print(f"{budget} bits, {route}: {error}", file=sys.stderr)
    return found


def main() -> None:
    """Parses, analyzes, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--budgets", default="2.5,3.25,4.25")
    parser.add_argument("--routes", default=",".join(ROUTES))
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--recent-tokens", type=int, default=LayerConfig.recent_tokens)
    parser.add_argument("--tile-tokens", type=int, default=LayerConfig.tile_tokens)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--first", type=int)
    parser.add_argument("--calibration-windows", type=int, default=2)
    parser.add_argument("--measure-state", type=Path)
    parser.add_argument("--state", type=Path)
    given = parser.parse_args()
    given.checkpoint = given.checkpoint or demo_checkpoint()
    by_budget = {b: analyses_of(given, b) for b in map(float, given.budgets.split(","))}
    wanted = {b: allocations(analyses) for b, analyses in by_budget.items()}
    one = next(iter(next(iter(by_budget.values())).values()))
    base = Recipe(default=one.budget.base)
    distinct = sorted({bits for rows in wanted.values() for bits in rows.values()})
    contenders = [candidates.of_recipe(f"{i}", Recipe.per_layer(list(bits), base)) for i, bits in enumerate(distinct)]
    result = comparison.run(
        resolve(given.checkpoint),
        contenders,
        read_text(None),
        windows=given.windows,
        window=given.window,
        first=given.first,
        state=given.state,
        progress=lambda name, done, total: print(f"{done}/{total}", file=sys.stderr, flush=True),
    )
    rows = dict(zip(distinct, result.rows, strict=True))
    print(f"Perplexity in full precision {result.rows[0].ppl_reference:.3f}; {result.rows[0].windows} windows of "
          f"{given.window} tokens; bits at {given.context} tokens.\n")  # fmt: skip
    print("| budget | allocation | keys, values (mean) | bits | perplexity | KL, nats | against the best uniform |")
    print("|---|---|---|---|---|---|---|")
    for budget, named in wanted.items():
        seen = {n: HeldOut.of(Allocation(n, bits, 0.0, None), rows[bits]) for n, bits in named.items()}
        fitting = [row for name, row in seen.items() if name.startswith("uniform")]
        uniform = min(fitting, key=lambda row: row.kld, default=None)
        for name, row in seen.items():
            k, v = np.mean(row.allocation.bits, axis=0)
            against = ""
            if uniform is not None and row is not uniform:
                more, error = row.excess(uniform)
                against = f"{more:+.2g} ± {error:.1g}"
            print(
                f"| {budget} | {name} | {k:.2f}, {v:.2f} | {one.budget.effective_bits(row.allocation.bits):.2f} | "
                f"{row.ppl_change_percent:+.2f}% ± {row.ppl_stderr_percent:.2f} | "
                f"{row.kld:#.3g} ± {row.kld_stderr:#.2g} | {against} |"
            )
    sizes = {
        (b, n): (one.budget.effective_bits(bits), rows[bits].kld_mean)
        for b, named in wanted.items()
        for n, bits in named.items()
    }
    curve = sorted(point for (_, name), point in sizes.items() if name == "measure")
    print()
    for (budget, name), (bits, loss) in sizes.items():
        needed = bits_at(loss, curve)
        if name != "measure" and needed is not None:
            print(f"{budget}, {name}: {bits:.2f} bits; measured allocations lose as much with {needed:.2f}")


def bits_at(loss: float, curve: list[tuple[float, float]]) -> float | None:
    """Bits at which a curve of (bits, KL) has this KL; None outside of it."""
    for (few, high), (many, low) in itertools.pairwise(curve):
        if high >= loss >= low > 0 and high > low:
            return few + (many - few) * float(np.log(high / loss) / np.log(high / low))
    return None


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
