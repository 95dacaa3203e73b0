"""More tokens in fewer bits, or fewer in more? Caches of equal bytes, compacted at the end of a prompt.

    python benchmarks/fewer_tokens.py [CHECKPOINT] [--window 4096] [--budgets 12.5,16.5] [--windows 2] [--needles 2048]

A prompt of half a window runs, its cache is compacted until it fits the budget (percent of a float16 cache of the whole
prompt, everything counted), and what follows is predicted. OMP_NUM_THREADS=1 is fastest on a busy machine. With
--state it goes on where it stopped. Markdown.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from skv_export.checkpoints.checkpoint import Checkpoint, resolve
from skv_export.checkpoints.demo_model import demo_checkpoint
from skv_export.evaluation import candidates, comparison, needle
from skv_export.evaluation.text import read_text
from skv_export.spec.compaction import least_kept
from skv_export.spec.layout import CacheLayout
from skv_export.spec.recipe import Recipe

PAIRS = ((16, 16), (8, 8), (4, 4), (4, 2), (3, 2), (2, 2))


def fitting(recipe: Recipe, head_dim: int, window: int, prompt: int, budget: float) -> int | None:
    """The most tokens of a prompt that a budget in percent holds; None = not even what must stay.

    The budget is of the layers with full attention; those with a sliding window keep the whole of it.
    """
    layouts = CacheLayout.pair(recipe.layer(0), head_dim)
    least = least_kept([*layouts, *CacheLayout.pair(recipe.layer(0), head_dim, window)])
    most = budget / 100 * prompt * head_dim * 2 * 2
    step = layouts[0].tile_tokens
    for held in range(prompt, least - 1, -step):
        if sum(layout.block_bytes(held) for layout in layouts) <= most:
            return held
    return None


def everybody(head_dim: int, window: int, prompt: int, budgets: list[float]) -> dict[float, list[candidates.Candidate]]:
    """By budget, the pairs that fit, each with as many tokens as fit."""
    found: dict[float, list[candidates.Candidate]] = {}
    for budget in budgets:
        found[budget] = []
        for k, v in PAIRS:
            recipe = Recipe().with_options(k_bits=k, v_bits=v)
            keep = fitting(recipe, head_dim, window, prompt, budget)
            if keep is not None:
                found[budget].append(candidates.of_recipe(f"K{k}V{v}", recipe, keep=keep))
    return found


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--text", type=Path, help="Default: the shipped prose.")
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--first", type=int, help="Measure only the first so many of them.")
    parser.add_argument("--budgets", default="12.5,16.5")
    parser.add_argument("--needles", type=int, help="Tokens of texts with needles.")
    parser.add_argument("--trials", type=int, default=3, help="Needles per depth.")
    parser.add_argument("--state", type=Path)
    given = parser.parse_args()
    source, text = resolve(given.checkpoint or demo_checkpoint()), read_text(given.text)
    config = Checkpoint.open(source).config
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    budgets = [float(part) for part in given.budgets.split(",")]
    prompt = given.window // 2
    window = int(config.get("sliding_window") or 0)
    caches = everybody(head_dim, window, prompt, budgets)
    loaded = comparison.load(source)

    def progress(name: str, done: int, total: int) -> None:
        print(f"{done}/{total} {name}", file=sys.stderr, flush=True)

    wanted = {c.name: c for found in caches.values() for c in found}
    result = comparison.run(
        source, list(wanted.values()), text, windows=given.windows, window=given.window, prompt=prompt,
        first=given.first, state=given.state, progress=progress, loaded=loaded,
    )  # fmt: skip
    rows = {row.name: row for row in result.rows}
    print(f"{prompt} tokens, then {given.window - prompt} more; {result.rows[0].windows} windows; perplexity in full "
          f"precision {result.rows[0].ppl_reference:.2f}\n")  # fmt: skip
    print("| budget | bits | tokens kept | perplexity | KLD mean | top-1 | by eighth of what follows |")
    print("|---|---|---|---|---|---|---|")
    for budget, found in caches.items():
        for candidate in found:
            row, (bits, _, keep) = rows[candidate.name], candidate.name.split()
            parts = " ".join(f"{x:+.1f}" for x in row.ppl_change_by_position)
            print(f"| {budget:g}% | {bits} | {keep} | {row.ppl_change_percent:+.2f}% | {row.kld_mean:.4f} | "
                  f"{row.top1_agreement:.1%} | {parts} |")  # fmt: skip
    if given.needles:
        hidden = everybody(head_dim, window, given.needles, budgets)
        wanted = {c.name: c for found in hidden.values() for c in found}
        retrieval = needle.run(loaded, list(wanted.values()), text, lengths=[given.needles], trials=given.trials)
        print("\n" + retrieval.table())


if __name__ == "__main__":
    main()
