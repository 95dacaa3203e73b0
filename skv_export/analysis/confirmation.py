"""The measured allocation against the nearest uniform pairs, on a text that nothing was chosen on."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from skv_export.analysis.budget import CacheBudget
from skv_export.analysis.result import Allocation, Confirmation, HeldOut, Recommendation
from skv_export.checkpoints.checkpoint import Source
from skv_export.evaluation.text import read_text
from skv_export.spec.recipe import Recipe

if TYPE_CHECKING:
    from skv_export.analysis.pipeline import MeasureOptions

CALIBRATION_TEXT = "opticks.txt"
CONFIRMATION_TEXT = "persuasion.txt"
"""Two different works, both shipped: the first chooses bits, the second only judges them."""


def calibration_text(path: Path | str | None) -> str:
    """Returns the text to measure on: a file's, or the shipped one.

    Raises:
        SkvError: See ``evaluation.text.read_text``.
    """
    return _shipped(CALIBRATION_TEXT) if path is None else read_text(path)


def _shipped(name: str) -> str:
    return resources.files("skv_export").joinpath(f"data/{name}").read_text(encoding="utf-8")


def rivals(cache: CacheBudget, found: Recommendation) -> list[Allocation]:
    """Returns the two uniform pairs next to an allocation: the best that fits, and the best of the next more bytes."""
    near = [found.uniform]
    known = [a for a in found.neighbours if len(set(a.bits)) == 1 and not cache.fits(a.bits)]
    more = sorted(known, key=lambda a: (a.effective_bits, a.loss or 0.0))
    return near + more[:1]


def confirm(
    source: Source,
    cache: CacheBudget,
    found: Recommendation,
    options: MeasureOptions,
    progress: Callable[[str, int, int], None] | None = None,
) -> Confirmation:
    """Runs an allocation and its rivals on the held-out text.

    Raises:
        SkvError: The text is shorter than a window of this model's tokens.
    """
    from skv_export.evaluation import candidates, comparison

    rows = [found.allocation, *(a for a in rivals(cache, found) if a.bits != found.allocation.bits)]
    base = Recipe(default=cache.base)
    compared = [candidates.of_recipe(a.name, Recipe.per_layer(list(a.bits), base)) for a in rows]
    state = options.state.with_name(options.state.name + ".confirm.jsonl") if options.state else None
    result = comparison.run(
        source,
        compared,
        _shipped(CONFIRMATION_TEXT),
        windows=options.confirm_windows,
        window=options.window,
        state=state,
        progress=progress,
        loaded=comparison.load(source, options.placement()),
    )
    held_out = tuple(
        HeldOut(_label(a), a.effective_bits, r.kld_mean, r.kld_stderr, r.ppl_change_percent, r.ppl_stderr_percent)
        for a, r in zip(rows, result.rows, strict=True)
    )
    fitting = [h.kld for h, a in zip(held_out[1:], rows[1:], strict=True) if cache.fits(a.bits)]
    return Confirmation(held_out, result.rows[0].windows, options.window, all(held_out[0].kld < k for k in fitting))


def _label(allocation: Allocation) -> str:
    if len(set(allocation.bits)) == 1:
        return allocation.name
    k, v = (sum(pair[side] for pair in allocation.bits) / len(allocation.bits) for side in (0, 1))
    return f"K {k:.1f} / V {v:.1f} {allocation.name}"
