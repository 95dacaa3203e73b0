"""Options of transformers' calls whose wrong values would fail somewhere inside of them, checked beforehand."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache as TransformersCache

from skv_export.arguments import checked
from skv_export.errors import SkvError

MOST = 1 << 24
"""Of any number of tokens, beams and sequences."""
_AT_LEAST_ONE = ("max_new_tokens", "max_length", "num_beams", "num_return_sequences", "prompt_lookup_num_tokens")


@checked
def check_options(
    inputs: torch.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *others: Any,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    past_key_values: TransformersCache | None = None,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    min_new_tokens: int | None = None,
    min_length: int | None = None,
    do_sample: bool | None = None,
    use_cache: bool | None = None,
    num_beams: int = 1,
    num_return_sequences: int | None = None,
    prompt_lookup_num_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    **further: Any,
) -> None:
    """Checks the options of ``generate`` that most callers set; all others are left to transformers.

    Args:
        inputs: ``[B, columns]``, the prompts; or ``input_ids``.
        generation_config: transformers'.
        others: Further arguments of transformers'.
        input_ids: ``[B, columns]``, the prompts.
        attention_mask: ``[B, columns]``.
        past_key_values: Of ``new_cache``.
        max_new_tokens: As transformers has it, like all below.
        max_length: The same.
        min_new_tokens: The same.
        min_length: The same.
        do_sample: The same.
        use_cache: The same.
        num_beams: The same.
        num_return_sequences: The same.
        prompt_lookup_num_tokens: The same.
        temperature: The same.
        top_k: The same.
        top_p: The same.
        min_p: The same.
        repetition_penalty: The same.
        further: The same.

    Raises:
        SkvError: One is of another type, or below 1 where that is the least.
    """
    numbers = locals()
    for name in _AT_LEAST_ONE:
        if numbers[name] is not None and not 1 <= numbers[name] <= MOST:
            raise SkvError(f"generate: {name}", got=numbers[name], expected=f"1 ... {MOST}")
    for name, ids in (("inputs", inputs), ("input_ids", input_ids), ("attention_mask", attention_mask)):
        if ids is not None and ids.ndim != 2:
            raise SkvError(f"generate: {name}: shape", got=list(ids.shape), expected="[batch, tokens]")


def check_labels(labels: torch.Tensor, input_ids: torch.Tensor, *, all_logits: bool) -> None:
    """Checks the labels of ``forward``.

    Args:
        labels: ``[B, S]``.
        input_ids: ``[B, S]``.
        all_logits: Whether the call returns the logits of every token.

    Raises:
        SkvError: It does not, or the shapes differ.
    """
    if not all_logits:
        raise SkvError(
            "labels: the loss needs the logits of every token",
            got="the last token's",
            fix="Export with --all-logits, and leave logits_to_keep out.",
        )
    if labels.shape != input_ids.shape:
        raise SkvError("labels: shape", got=list(labels.shape), expected=list(input_ids.shape))
