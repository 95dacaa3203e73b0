"""Which score allocates best? Perplexity and KL divergence of each score's allocation, decode style, on unseen text.

    python benchmarks/allocation_truth.py CHECKPOINT --calibration FILE --text FILE [--budgets 2.5,3.25,4.25]
        [--context 32768] [--windows 3] [--state FILE]

For every budget: the allocation by each score, every uniform pair that fits and that no other fitting pair reaches in
both widths, and the largest K = V. Prints a Markdown table. Resumable through --state.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from skv_export.analysis import pipeline
from skv_export.analysis.allocation import DEFAULT_CHOICES
from skv_export.analysis.attention_capture import DecodeModel
from skv_export.evaluation import metrics
from skv_export.spec.recipe import LayerConfig


class Judge:
    """Evaluates allocations on the windows of one text, and remembers them."""

    def __init__(
        self, model: DecodeModel, text: str, window: int, windows: int, base: LayerConfig, state: Path
    ) -> None:
        self.model, self.base, self.state = model, base, state
        self.parts = model.windows(text, window, windows)
        self.done = json.loads(state.read_text()) if state.exists() else {}
        self.exact = [model.log_probs(ids) for ids in self.parts]
        self.reference = self._perplexity(self.exact)

    def _perplexity(self, log_probs: list[torch.Tensor]) -> float:
        losses = [metrics.nll(p[:-1], ids[1:]).mean().item() for p, ids in zip(log_probs, self.parts, strict=True)]
        return metrics.perplexity(losses)

    def __call__(self, bits: tuple[tuple[int, int], ...]) -> tuple[float, float]:
        """Returns the change of perplexity in percent and the mean KL divergence in nats."""
        key = json.dumps([bits, len(self.parts), len(self.parts[0])])
        if key not in self.done:
            self.model.bits = {i: replace(self.base, k_bits=k, v_bits=v) for i, (k, v) in enumerate(bits)}
            found = [self.model.log_probs(ids) for ids in self.parts]
            self.model.bits = {}
            kl = [metrics.kl_divergence(a, b).mean().item() for a, b in zip(self.exact, found, strict=True)]
            self.done[key] = (100 * (self._perplexity(found) / self.reference - 1), float(np.mean(kl)))
            self.state.write_text(json.dumps(self.done))
        return tuple(self.done[key])


def maximal(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pairs that no other pair reaches in both widths."""
    return [p for p in pairs if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in pairs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--budgets", default="2.5,3.25,4.25")
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--calibration-windows", type=int, default=2)
    parser.add_argument("--measure-state", type=Path)
    parser.add_argument("--state", type=Path, default=Path("allocation_truth.json"))
    a = parser.parse_args()
    judge = None
    for budget in map(float, a.budgets.split(",")):
        found = pipeline.analyze(
            a.checkpoint,
            budget=budget,
            context=a.context,
            measure=True,
            text=a.calibration,
            windows=a.calibration_windows,
            state=a.measure_state,
            choices=DEFAULT_CHOICES,
        )
        if judge is None:
            model = DecodeModel(pipeline.resolve(a.checkpoint))
            judge = Judge(model, a.text.read_text(), a.window, a.windows, found.budget.base, a.state)
            print(f"full precision: perplexity {judge.reference:.4f}\n")
            _correlations(found)
            print("| budget | allocation | bits of keys, values (mean) | effective bits | perplexity | KL, nats |")
            print("|---|---|---|---|---|---|")
        layers = len(found.layers)
        rows = [(score.name, score.bits) for score in reversed(found.scores)]
        fitting = [p for p in found.budget.pairs if found.budget.fits((p,) * layers)]
        rows += [
            (f"uniform K{k}V{v}", ((k, v),) * layers)
            for k, v in sorted(maximal(fitting), key=lambda p: abs(p[0] - p[1] - 1))
        ]
        equal = max(k for k, v in fitting if k == v) if any(k == v for k, v in fitting) else None
        if equal:
            rows.append((f"K = V = {equal}", ((equal, equal),) * layers))
        for name, bits in rows:
            change, kl = judge(bits)
            k, v = np.mean(bits, axis=0)
            effective = found.budget.effective_bits(bits)
            print(f"| {budget} | {name} | {k:.2f}, {v:.2f} | {effective:.2f} | {change:+.2f}% | {kl:.4f} |", flush=True)


def _correlations(found: pipeline.Analysis) -> None:
    by_name = {s.name: np.array(s.balance, float) for s in found.scores}
    measured = by_name.pop("measure")
    print("| score | correlation of its balance k_bits - v_bits with measurement | without layer 0 |\n|---|---|---|")
    for name, values in by_name.items():
        both = [np.corrcoef(values[i:], measured[i:])[0, 1] for i in (0, 1)]
        print(f"| {name} | {both[0]:+.2f} | {both[1]:+.2f} |")
    print(f"\nmean measured balance {measured.mean():+.2f} bits\n", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
