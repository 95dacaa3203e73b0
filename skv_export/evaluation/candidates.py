"""The cache quantizers that `skv-export quality` compares: what a candidate is, and recipes, by name.

A candidate predicts a window of text decode style: every token sees the cache that a decoder would have.
"""

from __future__ import annotations

import glob
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from skv_export.errors import SkvError, did_you_mean
from skv_export.evaluation.compaction import CompactedAttention
from skv_export.evaluation.decode_simulation import Simulation, simulated_logits
from skv_export.paths import to_path
from skv_export.spec.key_basis import KeyBasis, can_be_calibrated
from skv_export.spec.layout import CacheLayout
from skv_export.spec.recipe import BITS, Recipe, shipped_recipes


@dataclass(frozen=True)
class Candidate(ABC):
    """One cache to be measured.

    Attributes:
        name: As it was asked for.
        key: Changes with anything that changes the figures; ties saved results to what made them.
        note: What it is, in a few words.
    """

    name: str
    key: str
    note: str

    def prepare(self, tokenizer: Any) -> None:  # noqa: B027 - most have nothing to prepare
        """Told of the model's tokenizer before the first ``logits``."""

    @abstractmethod
    def logits(self, model: PreTrainedModel, ids: torch.Tensor, prompt: int) -> torch.Tensor:
        """Predicts a window ``[S]``, whose first ``prompt`` tokens are a prompt: float32 logits ``[S, vocab]``."""

    @abstractmethod
    def effective_bits(self, context_length: int) -> float:
        """Bits per element of a cache of this length, everything counted; after the first ``logits``."""

    def quantizes(self, tokens: int) -> bool:
        """Whether so many tokens are enough for some to be quantized, if any are meant to be; after a ``logits``."""
        return True


@dataclass(frozen=True)
class Simulated(Candidate):
    """A cache whose content follows from the length alone: the whole window in one pass (``decode_simulation.py``)."""

    simulation: Simulation

    def logits(self, model: PreTrainedModel, ids: torch.Tensor, prompt: int = 0) -> torch.Tensor:
        """One forward pass."""
        return simulated_logits(model, ids, self.simulation)

    def effective_bits(self, context_length: int) -> float:
        """Over all layers."""
        return self.simulation.effective_bits(context_length)

    def quantizes(self, tokens: int) -> bool:
        """As the simulation says."""
        return self.simulation.quantizes(tokens)


@dataclass(frozen=True)
class Compacted(Simulated):
    """A recipe's cache that is compacted when the prompt of a window has run; see ``Session.compact``.

    Attributes:
        attention: The simulation's; it holds how many tokens stay.
    """

    attention: CompactedAttention

    def logits(self, model: PreTrainedModel, ids: torch.Tensor, prompt: int = 0) -> torch.Tensor:
        """One forward pass."""
        self.attention.prompt = prompt
        return simulated_logits(model, ids, self.simulation)

    def effective_bits(self, context_length: int) -> float:
        """Bits of the tokens that stay, over all tokens of a prompt of which the share stays that was measured."""
        share = min(1.0, self.attention.keep / max(self.attention.prompt, 1))
        return self.simulation.effective_bits(round(context_length * share)) * share


@dataclass(frozen=True)
class OnOtherWeights(Candidate):
    """A cache of another form of the model, as of one whose weights are quantized; the given model is not run.

    Attributes:
        inner: The cache.
        model: The other form, with simulated attention.
    """

    inner: Candidate
    model: PreTrainedModel

    @classmethod
    def of(cls, inner: Candidate, label: str, digest: str, model: PreTrainedModel) -> OnOtherWeights:
        """Returns a cache's candidate on the weights that ``label`` names and ``digest`` identifies."""
        key = hashlib.sha256(f"{inner.key} {digest}".encode()).hexdigest()[:16]
        return cls(f"{inner.name}{ON}{label}", key, inner.note, inner, model)

    def prepare(self, tokenizer: Any) -> None:
        """As the cache does; the other weights have the same tokenizer."""
        self.inner.prepare(tokenizer)

    def logits(self, model: PreTrainedModel, ids: torch.Tensor, prompt: int) -> torch.Tensor:
        """As the cache computes them, on the other weights."""
        return self.inner.logits(self.model, ids, prompt)

    def effective_bits(self, context_length: int) -> float:
        """Of the cache."""
        return self.inner.effective_bits(context_length)

    def quantizes(self, tokens: int) -> bool:
        """As the cache does."""
        return self.inner.quantizes(tokens)


# By name.


ON = " on "
"""What stands between a cache's name and that of the weights it was measured on."""
CALIBRATED = "+cal"
"""What is put behind a recipe's name where its keys are calibrated."""


def parse_keep(text: str) -> list[int]:
    """Reads ``--keep-tokens``.

    Raises:
        SkvError: Not numbers separated by commas.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise SkvError("--keep-tokens", got=text, expected="numbers of tokens, separated by commas")
    return [int(part) for part in parts]


def parse_configs(
    text: str, base: Recipe, bases: Mapping[int, KeyBasis] | None = None, keep: Sequence[int] = ()
) -> list[Candidate]:
    """Reads ``--configs``: bit pairs such as ``K4V2``, recipes by file, pattern or shipped name, separated by commas.

    Args:
        text: What was given.
        base: The options of the bit pairs beside their bits.
        bases: Of calibrated keys, by layer; each recipe whose keys can have them comes a second time, with them.
        keep: Each recipe comes again with a cache that is compacted to so many tokens, for each of these.

    Raises:
        SkvError: A name that is none of these.
    """
    found: list[tuple[str, Recipe]] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        pair = re.fullmatch(r"K(\d+)V(\d+)", name, re.IGNORECASE)
        if pair:
            bits = {"k_bits": int(pair[1]), "v_bits": int(pair[2])}
            found.append((name.upper(), base.with_options(**bits)))
            continue
        to_path(name, "--configs")
        paths = [Path(p) for p in sorted(glob.glob(name))] or [shipped_recipes().get(name, Path(name))]
        if not paths[0].is_file():
            widths = ", ".join(map(str, BITS))
            raise SkvError(
                f"--configs: {name}",
                expected=f"a bit pair such as K4V2 (bits: {widths}), a recipe file or pattern, or a shipped recipe",
                fix=did_you_mean(name, shipped_recipes()) or "`skv-export recipes` lists those of the package.",
            )
        found += [(path.stem, Recipe.load(path)) for path in paths]
    candidates: list[Candidate] = []
    for name, recipe in found:
        for count in (None, *keep):
            candidates.append(of_recipe(name, recipe, keep=count))
            if bases and any(can_be_calibrated(CacheLayout.pair(recipe.layer(i), 64)[0]) for i in bases):
                candidates.append(of_recipe(name + CALIBRATED, recipe, bases, count))
    return candidates


def check_names(candidates: Sequence[Candidate]) -> None:
    """Checks that there is something to compare, and that each has a name of its own.

    Raises:
        SkvError: There is nothing, or two have one name.
    """
    names = [candidate.name for candidate in candidates]
    double = sorted({name for name in names if names.count(name) > 1})
    if double or not names:
        raise SkvError(
            "--configs and --baselines",
            got=f"{', '.join(double)} twice" if double else "nothing",
            expected="something to compare, each once",
        )


def of_recipe(
    name: str, recipe: Recipe, bases: Mapping[int, KeyBasis] | None = None, keep: int | None = None
) -> Simulated:
    """Returns the candidate of a recipe; its weights' number format is ignored, everything runs in float32.

    Args:
        name: As it is shown.
        recipe: The options.
        bases: Of calibrated keys, by layer.
        keep: Tokens to which the cache is compacted at a prompt's end; None = all.
    """
    hashed = hashlib.sha256(recipe.with_options(dtype="fp32", description="").to_toml().encode())
    for layer in sorted(bases or {}):
        hashed.update(f"{layer} {bases[layer].digest}".encode())  # type: ignore[index]
    note = recipe.description if not bases else f"{recipe.description or name}; keys calibrated"
    if keep is None:
        return Simulated(name, hashed.hexdigest()[:16], note, Simulation.of_recipe(recipe, bases))
    attention = CompactedAttention(keep)
    simulation = Simulation.of_recipe(recipe, bases, attention)
    key = f"{hashed.hexdigest()[:16]} keep {keep}"
    return Compacted(f"{name} keep {keep}", key, f"{note or name}; {keep} tokens kept", simulation, attention)
