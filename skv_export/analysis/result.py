"""What `analyze` returns: scores side by side and a recommendation that a recipe can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from skv_export.analysis.budget import CacheBudget, Pair
from skv_export.analysis.scores import LayerAnalysis, Score
from skv_export.checkpoints.attention_weights import AttentionConfig
from skv_export.checkpoints.checkpoint import Checkpoint, Source
from skv_export.spec.recipe import Recipe

if TYPE_CHECKING:
    from skv_export.analysis.measurement import Measurement
    from skv_export.evaluation.comparison import CandidateResult


@dataclass(frozen=True)
class Allocation:
    """One allocation, with what it costs and what it is expected to lose.

    Attributes:
        name: ``K4V2`` for a uniform pair, else what it is.
        bits: ``(k_bits, v_bits)`` per layer.
        effective_bits: All bytes of the cache per element, in bits.
        loss: Expected loss, in the unit of the recommendation's score; None where the score predicts none.
    """

    name: str
    bits: tuple[Pair, ...]
    effective_bits: float
    loss: float | None

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same bits."""
        return len(set(self.bits)) == 1

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return {
            "name": self.name,
            "k_bits": [k for k, _ in self.bits],
            "v_bits": [v for _, v in self.bits],
            "effective_bits": self.effective_bits,
            "loss": self.loss,
        }


CLEAR = 2.0
"""A difference is clear if it is more than so many of its standard errors."""


@dataclass(frozen=True)
class HeldOut:
    """What one allocation lost on text that nothing was chosen on.

    Attributes:
        allocation: The allocation.
        fits: Whether it is within the budget.
        kld: Mean KL divergence from full precision, nats per token.
        kld_stderr: Its standard error over windows.
        ppl_change_percent: Of perplexity.
        ppl_stderr_percent: Its standard error.
        kld_by_part: Mean KL divergence of equal parts of the windows, the same for all rows.
    """

    allocation: Allocation
    fits: bool
    kld: float
    kld_stderr: float
    ppl_change_percent: float
    ppl_stderr_percent: float
    kld_by_part: tuple[float, ...]

    @classmethod
    def of(cls, allocation: Allocation, row: CandidateResult, fits: bool = True) -> HeldOut:
        """Takes the figures from a comparison."""
        figures = (row.kld_mean, row.kld_stderr, row.ppl_change_percent, row.ppl_stderr_percent)
        return cls(allocation, fits, *figures, tuple(row.kld_by_part))

    @property
    def loss(self) -> float:
        """The rise of perplexity as a share: the one seen, or the one that the divergence stands for if it is more."""
        return max(self.ppl_change_percent / 100, math.expm1(self.kld))

    @property
    def label(self) -> str:
        """``K4V2``, or the mean bits of an allocation by layer."""
        if self.allocation.uniform:
            return self.allocation.name
        k, v = (sum(side) / len(side) for side in zip(*self.allocation.bits, strict=True))
        return f"K {k:.1f} / V {v:.1f} {self.allocation.name}"

    def excess(self, other: HeldOut) -> tuple[float, float]:
        """Returns how much more KL divergence this has than another, and the standard error: part by part, in pairs."""
        pairs = zip(self.kld_by_part, other.kld_by_part, strict=True)
        differences = [mine - theirs for mine, theirs in pairs]
        count = len(differences)
        mean = sum(differences) / count
        if count < 2:
            return mean, math.inf
        variance = sum((x - mean) ** 2 for x in differences) / (count - 1)
        return mean, math.sqrt(variance / count)

    def clearly_above(self, other: HeldOut) -> bool:
        """Whether this loses more than another, beyond doubt."""
        mean, error = self.excess(other)
        return mean > CLEAR * error

    def to_json(self, first: HeldOut) -> dict[str, Any]:
        """Returns plain data; differences are from ``first``."""
        mean, error = self.excess(first)
        return {
            "name": self.label,
            "effective_bits": self.allocation.effective_bits,
            "fits": self.fits,
            "kld": self.kld,
            "kld_stderr": self.kld_stderr,
            "ppl_change_percent": self.ppl_change_percent,
            "ppl_stderr_percent": self.ppl_stderr_percent,
            "kld_excess": mean,
            "kld_excess_stderr": error,
        }


@dataclass(frozen=True)
class Confirmation:
    """The measured allocation against the nearest uniform pairs, on held-out text.

    Attributes:
        rows: The allocation first, then the uniform pairs.
        windows: Windows of text.
        window: Tokens in each.
    """

    rows: tuple[HeldOut, ...]
    windows: int
    window: int

    @property
    def winner(self) -> HeldOut:
        """The allocation if it clearly loses less than every uniform pair that fits; else the best of those pairs."""
        first = self.rows[0]
        uniforms = [row for row in self.rows if row.fits and row.allocation.uniform]
        if not first.allocation.uniform and all(row.clearly_above(first) for row in uniforms):
            return first
        return min(uniforms, key=lambda row: row.kld, default=first)

    @property
    def line(self) -> str:
        """Returns the comparison in one line, with standard errors; differences are those of pairs of text parts."""
        first = self.rows[0]
        said = [
            f"{first.label}: KL {first.kld:.4f} ± {first.kld_stderr:.4f} at {first.allocation.effective_bits:.2f} bits"
        ]
        for row in self.rows[1:]:
            mean, error = row.excess(first)
            said.append(
                f"{row.label}: {row.kld:.4f} at {row.allocation.effective_bits:.2f} bits ({mean:+.4f} ± {error:.4f})"
            )
        return "; ".join(said)


@dataclass(frozen=True)
class Recommendation:
    """What to export with.

    Attributes:
        allocation: The one to use.
        uniform: The best pair that is the same in every layer.
        neighbours: Allocations with a little less and a little more memory, and other uniform pairs.
        score: Name of the score that judged: ``defaults`` (uniform pairs as measured on other models), ``measure``, or
            one of the scores from weights.
        loss_unit: What ``Allocation.loss`` counts.
        reasons: Plain sentences.
        confirmation: The comparison on held-out text; None where nothing was measured.
    """

    allocation: Allocation
    uniform: Allocation
    neighbours: tuple[Allocation, ...]
    score: str
    loss_unit: str
    reasons: tuple[str, ...]
    confirmation: Confirmation | None = None


@dataclass(frozen=True)
class Analysis:
    """Everything that `analyze` found; ``to_json`` and ``to_recipe`` are its outputs.

    Attributes:
        source: What was analyzed.
        model: Its name.
        bytes_read: Bytes of tensors that were read.
        tensor_bytes: Bytes of all tensors that hold queries, keys, values and their norms.
        config: The attention's sizes.
        budget: The memory model: context, batch and the bits allowed.
        layers: Per layer.
        scores: Side by side.
        flags: ``layer`` (None = the model), ``flag`` and ``text``.
        recommendation: What to export with.
        measurement: What running the model found; None without it.
    """

    source: Source
    model: str
    bytes_read: int
    tensor_bytes: int
    config: AttentionConfig
    budget: CacheBudget
    layers: tuple[LayerAnalysis, ...]
    scores: tuple[Score, ...]
    flags: tuple[Mapping[str, Any], ...]
    recommendation: Recommendation
    measurement: Measurement | None = None

    def to_recipe(self, recipe: Recipe | None = None) -> Recipe:
        """Returns the recommendation as a recipe for `model`; ``recipe`` gives what has nothing to do with bits."""
        allocation = self.recommendation.allocation
        recipe = Recipe.per_layer(list(allocation.bits), recipe or Recipe(default=self.budget.base))
        description = f"{self.model}: {allocation.effective_bits:.2f} effective bits at {self.budget.context} tokens"
        calibrated = ", for calibrated keys" if self.budget.bases else ""
        return replace(recipe, description=f"{description}, by {self.recommendation.score}{calibrated}")

    def to_preset(self, command: str) -> str:
        """Returns the recipe as TOML with what it rests on: model, revision, layers, the command and the evidence."""
        facts = [
            f"model: {self.model}, {len(self.layers)} layers",
            f"revision: {Checkpoint(self.source).revision()}",
            f"command: {command}",
            *self.recommendation.reasons,
        ]
        return "".join(f"# {fact}\n" for fact in facts) + "\n" + self.to_recipe().to_toml()

    def to_json(self) -> dict[str, Any]:
        """Returns plain data: the keys of `--json`."""
        by_layer = {score.name: score for score in self.scores}
        layers = [
            {
                "index": layer.index,
                "k_frobenius": layer.k.frobenius,
                "v_frobenius": layer.v.frobenius,
                "q_frobenius": layer.q_frobenius,
                "k_spectral": layer.k.spectral,
                "v_spectral": layer.v.spectral,
                "k_stable_rank": layer.k.stable_rank,
                "v_stable_rank": layer.v.stable_rank,
                "k_spectrum": list(layer.k.spectrum),
                "v_spectrum": list(layer.v.spectrum),
                "k_head_frobenius": list(layer.k.head_frobenius),
                "v_head_frobenius": list(layer.v.head_frobenius),
                "k_head_spectral": list(layer.k.head_spectral),
                "v_head_spectral": list(layer.v.head_spectral),
                "k_bias": layer.k_bias,
                "k_error": {str(b): e for b, e in layer.geometry.k_error.items()},
                "v_error": {str(b): e for b, e in layer.geometry.v_error.items()},
                "scores": {
                    name: {"k_bits": s.bits[i][0], "v_bits": s.bits[i][1], "balance": s.balance[i]}
                    for name, s in by_layer.items()
                },
            }
            for i, layer in enumerate(self.layers)
        ]
        r = self.recommendation
        return {
            "model": self.model,
            "bytes_read": self.bytes_read,
            "tensor_bytes": self.tensor_bytes,
            "context": self.budget.context,
            "batch": self.budget.batch,
            "calibrated": bool(self.budget.bases),
            "layers": layers,
            "notes": {s.name: s.note for s in self.scores if s.note},
            "flags": list(self.flags),
            "recommendation": {
                "k_bits": [k for k, _ in r.allocation.bits],
                "v_bits": [v for _, v in r.allocation.bits],
                "effective_bits": r.allocation.effective_bits,
                "memory_bytes": self.budget.memory(r.allocation.bits),
                "score": r.score,
                "loss": r.allocation.loss,
                "loss_unit": r.loss_unit,
                "uniform": r.uniform.to_json(),
                "neighbours": [p.to_json() for p in r.neighbours],
                "reasons": list(r.reasons),
                "confirmation": None
                if r.confirmation is None
                else [row.to_json(r.confirmation.rows[0]) for row in r.confirmation.rows],
            },
        }
