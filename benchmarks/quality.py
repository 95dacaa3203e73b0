"""What caches lose, per bit: our recipes, the default form, and other systems, on text that nothing was chosen on.

    python benchmarks/quality.py [CHECKPOINT] [--windows 16] [--state quality.jsonl] [--baselines kivi,kivi-k4v2,hf-hqq]

OMP_NUM_THREADS=1 is fastest on a busy machine: threads wait for each other at every operation. With --state it goes on
where it stopped, and --first 4 measures the first four windows only, so that slow candidates can have fewer. --only
names candidates of the list; --calibration FILE adds each of them with calibrated keys, as NAME+cal. Markdown, fewest
bits first; on the Pareto front of bits and KL divergence in bold.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from skv_export.calibration.file import Calibration
from skv_export.checkpoints.checkpoint import resolve
from skv_export.checkpoints.demo_model import demo_checkpoint
from skv_export.errors import SkvError
from skv_export.evaluation import candidates, comparison
from skv_export.evaluation.baselines import parse_baselines
from skv_export.evaluation.text import read_text
from skv_export.spec.key_basis import KeyBasis
from skv_export.spec.recipe import Recipe

RECIPES = "near-lossless,balanced,small,smallest,quarot,kvarn-like"
PAIRS = ((4, 4), (4, 3), (4, 2), (3, 3), (3, 2), (2, 2), (2, 4))
FORMS: dict[str, dict[str, int | str]] = {
    "": {},
    ", 8-bit parameters": {"k_parameter_bits": 8},
    ", token_channel": {"k_granularity": "token_channel", "k_rotation": "hadamard"},
}
"""What is put behind a pair's name, and what it stands for; keys of the default form are per channel, in 16 bits."""


def everybody(baselines: str, bases: Mapping[int, KeyBasis] | None = None) -> list[candidates.Candidate]:
    """The candidates: recipes, the pairs in each form (less what a recipe is already), the literature."""
    found: list[candidates.Candidate] = [*candidates.parse_configs(RECIPES, Recipe(), bases)]
    for suffix, options in FORMS.items():
        for k, v in PAIRS:
            recipe = Recipe().with_options(k_bits=k, v_bits=v, **options)
            name = f"K{k}V{v}{suffix}"
            candidate = candidates.of_recipe(name, recipe)
            if candidate.key in {c.key for c in found}:
                continue
            found.append(candidate)
            if bases and recipe.default.k_granularity == "channel":
                found.append(candidates.of_recipe(name + candidates.CALIBRATED, recipe, bases))
    return found + parse_baselines(baselines)


def chosen(everyone: list[candidates.Candidate], names: str) -> list[candidates.Candidate]:
    """Those of the names, separated by semicolons as names have commas; all if there are none."""
    wanted = [name.strip() for name in names.split(";") if name.strip()]
    by_name = {candidate.name: candidate for candidate in everyone}
    unknown = [name for name in wanted if name not in by_name]
    if unknown:
        raise SkvError("--only", got="; ".join(unknown), expected="; ".join(by_name))
    return [by_name[name] for name in wanted] or everyone


def markdown(result: comparison.ComparisonResult) -> str:
    """The table for RESULTS.md."""
    front = {row.name for row in comparison.pareto(result.rows)}
    lines = [
        f"Perplexity in full precision {result.rows[0].ppl_reference:.3f}; windows of {result.window} tokens.",
        "",
        "| | bits at 8k | perplexity | KLD mean | KLD p99 | KLD max | top-1 | windows |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(result.rows, key=lambda row: row.effective_bits):
        name = f"**{row.name}**" if row.name in front else row.name
        lines.append(
            f"| {name} | {row.effective_bits:.3f} | {row.ppl_change_percent:+.2f}% ± {row.ppl_stderr_percent:.2f} | "
            f"{row.kld_mean:.5f} ± {row.kld_stderr:.5f} | {row.kld_p99:.4f} | {row.kld_max:.2f} | "
            f"{row.top1_agreement:.2%} | {row.windows} |"
        )
    return "\n".join(lines)


def by_position(result: comparison.ComparisonResult) -> str:
    """Change of perplexity in percent, by the part of the window."""
    parts = len(result.rows[0].ppl_change_by_position)
    ends = [result.window * (i + 1) // parts for i in range(parts)]
    lines = [f"| up to token | {' | '.join(map(str, ends))} |", "|---" * (parts + 1) + "|"]
    for row in sorted(result.rows, key=lambda row: row.effective_bits):
        lines.append(f"| {row.name} | {' | '.join(f'{x:+.2f}' for x in row.ppl_change_by_position)} |")
    return "\n".join(lines)


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--text", type=Path, help="Default: the shipped prose.")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--first", type=int, help="Measure only the first so many of them.")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--baselines", default="kivi,kivi-k4v2")
    parser.add_argument("--only", default="", help="Candidates, separated by semicolons. Default: all.")
    parser.add_argument("--calibration", type=Path, help="What `skv-export calibrate` wrote.")
    parser.add_argument("--state", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()

    def progress(name: str, done: int, total: int) -> None:
        print(f"{done}/{total} {name}", file=sys.stderr, flush=True)

    bases = Calibration.load(given.calibration).bases if given.calibration else None
    result = comparison.run(
        resolve(given.checkpoint or demo_checkpoint()),
        chosen(everybody(given.baselines, bases), given.only),
        read_text(given.text),
        windows=given.windows,
        window=given.window,
        first=given.first,
        state=given.state,
        progress=progress,
    )
    print(markdown(result), by_position(result), sep="\n\n")
    if given.json:
        given.json.write_text(result.to_json(), encoding="utf-8")


if __name__ == "__main__":
    main()
