"""The measured allocation against the nearest uniform pairs, on a text that nothing was chosen on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from skv_export.analysis import uniform_pairs
from skv_export.analysis.budget import CacheBudget, Pair
from skv_export.analysis.result import Allocation, Confirmation, HeldOut, Recommendation
from skv_export.checkpoints.checkpoint import Source
from skv_export.errors import SkvError
from skv_export.evaluation.text import read_text
from skv_export.spec.recipe import Recipe

if TYPE_CHECKING:
    from skv_export.analysis.pipeline import MeasureOptions
    from skv_export.evaluation.comparison import CandidateResult


def rivals(cache: CacheBudget, found: Recommendation) -> list[Allocation]:
    """Returns the uniform pairs next to an allocation: those that fit and are expected to lose least, and one larger.

    Of those that fit two are taken, where they differ: the best by the recommendation's own score, and the best as
    measured on other models.
    """
    near = [found.uniform]
    try:
        usual = uniform_pairs.best_uniform(cache)
    except SkvError:  # none fits
        usual = found.uniform.bits[0]
    if usual != found.uniform.bits[0]:
        bits = (usual,) * len(found.uniform.bits)
        near.append(Allocation("K{}V{}".format(*usual), bits, cache.effective_bits(bits), None))
    known = [a for a in found.neighbours if a.uniform and not cache.fits(a.bits)]
    more = sorted(known, key=lambda a: (a.effective_bits, a.loss or 0.0))
    return [a for a in near + more[:1] if a.bits != found.allocation.bits]


class HeldOutText:
    """The held-out text and a model that predicts it, loaded once however many allocations are judged.

    Args:
        source: The checkpoint.
        cache: Everything but the bits.
        options: Windows, device, state.
        progress: Called after each window of each allocation.
    """

    def __init__(
        self,
        source: Source,
        cache: CacheBudget,
        options: MeasureOptions,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        from skv_export.evaluation import comparison

        self._source, self._base, self._options, self._progress = source, Recipe(default=cache.base), options, progress
        self._loaded = None if options.ray else comparison.load(source, options.placement())
        self._known: dict[tuple[Pair, ...], CandidateResult] = {}

    def judge(self, cache: CacheBudget, found: Recommendation) -> Confirmation:
        """Runs an allocation and its rivals.

        Raises:
            SkvError: The text is shorter than a window of this model's tokens.
        """
        from skv_export.evaluation import candidates, comparison

        wanted = [found.allocation, *rivals(cache, found)]
        options = self._options
        new = [
            candidates.of_recipe(a.name, Recipe.per_layer(list(a.bits), self._base), cache.bases)
            for a in wanted
            if a.bits not in self._known
        ]
        if new:
            with contextlib.ExitStack() as running:
                workers = None
                if options.ray:
                    there = comparison.ray_workers(options.ray, self._source, options.placement())
                    workers = running.enter_context(there)
                result = comparison.run(
                    self._source,
                    new,
                    read_text(None),
                    windows=options.confirm_windows,
                    window=options.window,
                    state=options.state.with_name(options.state.name + ".confirm.jsonl") if options.state else None,
                    progress=self._progress,
                    loaded=self._loaded,
                    workers=workers,
                )
            missing = [a for a in wanted if a.bits not in self._known]
            self._known |= {a.bits: row for a, row in zip(missing, result.rows, strict=True)}
        rows = tuple(HeldOut.of(a, self._known[a.bits], cache.fits(a.bits)) for a in wanted)
        return Confirmation(rows, self._known[wanted[0].bits].windows, options.window)
