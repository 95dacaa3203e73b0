"""The memory model of `analyze`: bytes of the cache for an allocation at a context length, and the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from skv_export.analysis.allocation import DEFAULT_CHOICES, allocate_options
from skv_export.checkpoints.attention_weights import AttentionConfig
from skv_export.errors import SkvError
from skv_export.spec.key_basis import KeyBasis
from skv_export.spec.layout import CacheLayout, cache_bytes
from skv_export.spec.recipe import BITS, LayerConfig

Pair = tuple[int, int]
MAX_CONTEXT = 1 << 24
DEFAULT_CONTEXT = 32768
MAX_BATCH = 1 << 20


def check_choices(choices: Sequence[int], pairs: Sequence[Pair] | None) -> set[int]:
    """Returns the bit widths that are to choose from.

    Raises:
        SkvError: There are none, or one that the cache does not have.
    """
    widths = {b for pair in pairs for b in pair} if pairs is not None else set(choices)
    if not widths or not widths <= set(BITS):
        raise SkvError("bit choices", got=sorted(widths), expected=f"some of {', '.join(map(str, BITS))}")
    return widths


def check_count(name: str, value: object, most: int, least: int = 1) -> None:
    """Raises SkvError unless a parameter is an integer in a range."""
    if type(value) is not int or not least <= value <= most:
        raise SkvError(f"--{name.replace('_', '-')}", got=repr(value)[:50], expected=f"{least} ... {most}")


def check_positive(name: str, value: object) -> None:
    """Raises SkvError unless a parameter is a finite number above 0, or not given."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and value > 0 and math.isfinite(value)):  # type: ignore[operator,arg-type]
        raise SkvError(f"--{name.replace('_', '-')}", got=repr(value)[:50], expected="a positive number")


@dataclass(frozen=True)
class CacheBudget:
    """A model's cache as a function of its bits, and how large it may be.

    Attributes:
        config: Heads, layers and windows.
        base: Everything but the bits.
        pairs: The (key, value) bits that a layer may have.
        restricted: Whether the pairs were given and not made from choices.
        context: Tokens per sequence.
        batch: Sequences.
        limit: Bytes for one sequence; negative = not set.
        bases: Of calibrated keys, by layer: the bytes are the same, what they lose is less.
    """

    config: AttentionConfig
    base: LayerConfig
    pairs: tuple[Pair, ...]
    restricted: bool
    context: int
    batch: int
    limit: float = -1.0
    bases: Mapping[int, KeyBasis] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(
        cls,
        config: AttentionConfig,
        base: LayerConfig,
        *,
        choices: Sequence[int] = DEFAULT_CHOICES,
        pairs: Sequence[Pair] | None = None,
        context: int | None = None,
        batch: int = 1,
        bases: Mapping[int, KeyBasis] | None = None,
    ) -> CacheBudget:
        """Checks the options and makes a budget without a limit.

        Raises:
            SkvError: A bit width that the cache does not have, or a context or batch out of range.
        """
        widths = check_choices(choices, pairs)
        longest = config.max_position_embeddings or DEFAULT_CONTEXT
        tokens = context if context is not None else min(DEFAULT_CONTEXT, longest)
        check_count("context", tokens, MAX_CONTEXT)
        check_count("batch", batch, MAX_BATCH)
        order = sorted(set(pairs)) if pairs is not None else [(k, v) for k in sorted(widths) for v in sorted(widths)]
        return cls(config, base, tuple(order), pairs is not None, tokens, batch, bases=bases or {})

    def limited(self, budget: float | None, memory: int | None) -> CacheBudget:
        """Returns the same with a limit: effective bits, or bytes for the whole batch, or what the default pair takes.

        Raises:
            SkvError: Both are given, or one is not positive.
        """
        if budget is not None and memory is not None:
            raise SkvError("--budget and --memory", got="both", expected="one of them")
        check_positive("budget", budget)
        check_positive("memory", memory)
        if memory is not None:
            return replace(self, limit=memory / self.batch)
        if budget is None:
            budget = self.effective_bits([(self.base.k_bits, self.base.v_bits)] * self.config.num_hidden_layers)
        return replace(self, limit=budget * self.elements / 8)

    @property
    def choices(self) -> list[int]:
        """Bit widths that occur in the pairs."""
        return sorted({b for pair in self.pairs for b in pair})

    @cached_property
    def elements(self) -> int:
        """Keys and values of one sequence that attention can see: a sliding window's layer counts its window."""
        c = self.config
        tokens = sum(min(self.context, w) if w else self.context for w in c.windows)
        return 2 * tokens * c.num_key_value_heads * c.head_dim

    @cached_property
    def costs(self) -> npt.NDArray[np.float64]:
        """``[layers, pairs]``: bytes of each layer's cache under each pair."""
        return np.array([[self._layer_bytes(window, pair) for pair in self.pairs] for window in self.config.windows])

    def _layouts(self, window: int, pair: Pair) -> tuple[CacheLayout, CacheLayout]:
        return CacheLayout.pair(replace(self.base, k_bits=pair[0], v_bits=pair[1]), self.config.head_dim, window)

    def _layer_bytes(self, window: int, pair: Pair) -> int:
        known = self._known_bytes
        if (window, pair) not in known:
            layouts = self._layouts(window, pair)
            known[window, pair] = self.config.num_key_value_heads * sum(x.block_bytes(self.context) for x in layouts)
        return known[window, pair]

    @cached_property
    def _known_bytes(self) -> dict[tuple[int, Pair], int]:
        return {}

    def bytes(self, bits: Sequence[Pair]) -> int:
        """Bytes of one sequence's cache."""
        return sum(self._layer_bytes(w, pair) for w, pair in zip(self.config.windows, bits, strict=True))

    def effective_bits(self, bits: Sequence[Pair]) -> float:
        """All bytes of the cache, scales and full-precision tokens included, per element."""
        return 8 * self.bytes(bits) / self.elements

    def memory(self, bits: Sequence[Pair], context: int | None = None) -> int:
        """Bytes of the batch's caches as allocated, at this or another context length."""
        layouts = [self._layouts(w, pair) for w, pair in zip(self.config.windows, bits, strict=True)]
        heads = [self.config.num_key_value_heads] * len(layouts)
        return self.batch * cache_bytes(layouts, heads, context or self.context)

    def plain_memory(self, row_bytes: int, context: int | None = None) -> int:
        """Bytes of the batch's caches where each token has rows of so many bytes, a window's layer as many as it sees.

        Args:
            row_bytes: Of one head's key or value: twice ``head_dim`` in fp16.
            context: Tokens; those of the budget if not given.
        """
        tokens = self.context if context is None else context
        held = sum(min(tokens, w) if w else tokens for w in self.config.windows)
        return self.batch * 2 * self.config.num_key_value_heads * row_bytes * held

    @property
    def fp16_fits(self) -> bool:
        """Whether a cache that is not quantized at all is within the limit, in fp16."""
        return self.plain_memory(2 * self.config.head_dim) <= self.limit * self.batch

    def fits(self, bits: Sequence[Pair]) -> bool:
        """Whether an allocation is within the limit."""
        return self.bytes(bits) <= self.limit * (1 + 1e-12)

    @property
    def feasible(self) -> bool:
        """Whether any allocation is within the limit."""
        return bool(self.costs.min(axis=1).sum() <= self.limit)

    def best(self, losses: npt.NDArray[Any]) -> tuple[Pair, ...]:
        """Returns the allocation with the least summed loss within the limit.

        Args:
            losses: ``[layers, pairs]``.

        Raises:
            SkvError: Nothing fits; the message says what would.
        """
        self.check()
        picks = allocate_options(losses.tolist(), self.costs.tolist(), self.limit)
        return tuple(self.pairs[p] for p in picks)

    def largest(self, allocate: Callable[[int], tuple[Pair, ...]]) -> tuple[Pair, ...]:
        """Returns ``allocate(total)`` for the largest sum of bits whose allocation is within the limit.

        Raises:
            SkvError: Nothing fits.
        """
        self.check()
        low = 2 * self.choices[0] * self.config.num_hidden_layers
        high = 2 * self.choices[-1] * self.config.num_hidden_layers
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.fits(allocate(middle)) else (low, middle - 1)
        return allocate(low)

    def check(self) -> None:
        """Raises SkvError if no allocation is within the limit; the message says what would be."""
        if self.feasible:
            return
        least = 8 * self.costs.min(axis=1).sum() / self.elements
        raise SkvError(
            f"budget: too small at {self.context} tokens",
            got=f"{8 * self.limit / self.elements:.2f} effective bits ({self.limit * self.batch / 2**20:.1f} MiB)",
            expected=f"at least {least:.2f} ({self.costs.min(axis=1).sum() * self.batch / 2**20:.1f} MiB)",
            fix="Raise it, lower --recent-tokens, or count at a longer --context.",
        )
