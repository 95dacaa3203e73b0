"""Caches whose keys are fitted to a prompt: a decoder that has run a prompt knows its queries and keys.

Up to the prompt's end there is nothing to quantize keys with, so they are exact, as the prompt's own attention is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from skv_export.evaluation.candidates import Simulated
from skv_export.evaluation.decode_simulation import Simulation, TensorCache, attend, simulated_logits

PROMPT_TOKENS = 256
"""First tokens of a text that has no prompt which are taken for one."""


class PromptKeys(Protocol):
    """Keys' cache before the prompt."""

    def fitted(self, queries: torch.Tensor, keys: torch.Tensor) -> TensorCache:
        """Returns the cache for queries ``[N, P, D]`` and keys ``[H, P, D]`` of a prompt."""

    def effective_bits(self, context_length: int) -> float:
        """As every cache's."""


class PromptAttention:
    """``attend`` for a simulation whose layers' first cache is a ``PromptKeys``.

    Attributes:
        prompt: Tokens of the prompt; set before a window is run.
        keys: The last layer's cache of the last window.
    """

    def __init__(self) -> None:
        self.prompt = PROMPT_TOKENS
        self.keys: TensorCache | None = None

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        caches: tuple[PromptKeys, TensorCache],
        **options: Any,
    ) -> torch.Tensor:
        """As ``attend``."""
        self.keys = caches[0].fitted(query[:, : self.prompt], key[:, : self.prompt])
        return attend(query, key, value, (self.keys, caches[1]), **options)


@dataclass(frozen=True)
class FromPrompt(Simulated):
    """A cache that is fitted to the prompt of each window.

    Attributes:
        attention: The simulation's.
    """

    attention: PromptAttention

    @classmethod
    def of(cls, name: str, note: str, make: Any) -> FromPrompt:
        """Returns the candidate of a ``CacheFactory`` whose first caches are ``PromptKeys``."""
        attention = PromptAttention()
        return cls(name, f"{name} from prompt", note, Simulation(make, attend=attention), attention)

    def logits(self, model: Any, ids: torch.Tensor, prompt: int = 0) -> torch.Tensor:
        """One forward pass."""
        self.attention.prompt = prompt or PROMPT_TOKENS
        return simulated_logits(model, ids, self.simulation)

    def quantizes(self, tokens: int) -> bool:
        """Whether the last of so many tokens sees quantized keys: the prompt has run, and its keys fill a tile."""
        keys = self.attention.keys
        return keys is not None and tokens > self.attention.prompt and keys.quantized_tokens(tokens - 1) > 0
