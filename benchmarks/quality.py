"""What caches lose, per bit: our recipes, the default form, and other systems, on text that nothing was chosen on.

    python benchmarks/quality.py [CHECKPOINT] [--windows 16] [--state quality.jsonl] [--baselines kivi,kivi-k4v2,hf-hqq]

OMP_NUM_THREADS=1 is fastest on a busy machine: threads wait for each other at every operation. With --state it goes on
where it stopped. Markdown, fewest bits first.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from skv_export import compare, contenders
from skv_export.checkpoint import demo_checkpoint, resolve
from skv_export.quality import read_text
from skv_export.recipe import Recipe

OURS = "near-lossless,balanced,small,smallest"
CENTERED = ((4, 4), (4, 3), (4, 2))
DEFAULT_FORM = "K4V3,K4V2,K3V3,K3V2,K2V2"


def everybody(baselines: str) -> list[contenders.Contender]:
    """The contenders: recipes of 2.5 to 4.5 bits, other pairs of their form, the default form, the literature."""
    centered = Recipe().with_options(k_granularity="token_channel", k_rotation="hadamard")
    found = contenders.parse_configs(OURS, Recipe())
    for k, v in CENTERED:
        found.append(contenders.of_recipe(f"K{k}V{v}, token_channel", centered.with_options(k_bits=k, v_bits=v)))
    found += contenders.parse_configs(DEFAULT_FORM + ",quarot,kvarn,turboquant", Recipe())
    return found + contenders.parse_baselines(baselines)


def markdown(result: compare.Result) -> str:
    """The table for RESULTS.md."""
    first = result.rows[0]
    front = {row.name for row in compare.pareto(result.rows)}
    lines = [
        f"Perplexity in full precision {first.ppl_reference:.3f}; {first.windows} windows of {result.window} tokens.",
        "",
        "| | bits at 8k | perplexity | KLD mean | KLD p99 | KLD max | top-1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(result.rows, key=lambda row: row.effective_bits):
        name = f"**{row.name}**" if row.name in front else row.name
        lines.append(
            f"| {name} | {row.effective_bits:.3f} | {row.ppl_change_percent:+.2f}% ± {row.ppl_stderr_percent:.2f} | "
            f"{row.kld_mean:.5f} ± {row.kld_stderr:.5f} | {row.kld_p99:.4f} | {row.kld_max:.2f} | "
            f"{row.top1_agreement:.2%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--text", type=Path, help="Default: the shipped prose.")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--baselines", default="kivi,kivi-k4v2")
    parser.add_argument("--state", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()

    def progress(name: str, done: int, total: int) -> None:
        print(f"{done}/{total} {name}", file=sys.stderr, flush=True)

    result = compare.run(
        resolve(given.checkpoint or demo_checkpoint()),
        everybody(given.baselines),
        read_text(given.text),
        windows=given.windows,
        window=given.window,
        state=given.state,
        progress=progress,
    )
    print(markdown(result))
    if given.json:
        given.json.write_text(result.to_json(), encoding="utf-8")


if __name__ == "__main__":
    main()
