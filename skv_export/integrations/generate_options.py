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
    prompts = next((x for x in (inputs, input_ids, further.get("inputs_embeds")) if isinstance(x, torch.Tensor)), None)
    if prompts is not None and attention_mask is not None:
        (rows, columns), (got_rows, got_columns) = prompts.shape[:2], attention_mask.shape
        before = past_key_values is not None  # tokens of earlier calls, which the prompts may leave out
        if got_rows != rows or (got_columns < columns if before else got_columns != columns):
            raise SkvError("generate: attention_mask: shape", got=[got_rows, got_columns], expected=[rows, columns])


def new_shape(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> tuple[int, int]:
    """Returns sequences and new tokens of a call of ``forward``, ``(B, S)``.

    Args:
        input_ids: ``[B, S]``, or None.
        inputs_embeds: ``[B, S, hidden]``, or None.

    Raises:
        SkvError: Both or neither are given, or the shape is another one.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise SkvError(
            "input_ids and inputs_embeds", got="both" if input_ids is not None else "neither", expected="one of them"
        )
    if input_ids is not None:
        if input_ids.ndim != 2:
            raise SkvError("input_ids: shape", got=list(input_ids.shape), expected="[batch, tokens]")
        return input_ids.shape[0], input_ids.shape[1]
    assert inputs_embeds is not None
    if inputs_embeds.ndim != 3:
        raise SkvError("inputs_embeds: shape", got=list(inputs_embeds.shape), expected="[batch, tokens, hidden]")
    return inputs_embeds.shape[0], inputs_embeds.shape[1]


def new_inputs(
    input_ids: torch.Tensor, inputs_embeds: torch.Tensor | None, position_ids: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Returns what of a call's new tokens ``forward`` gets.

    Args:
        input_ids: ``[B, S]``.
        inputs_embeds: ``[B, S, hidden]``, the prompt in the place of tokens; None behind it.
        position_ids: ``[3, B, columns]`` of multimodal RoPE; others follow from the mask.
    """
    new = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
    if position_ids is not None and position_ids.ndim == 3:
        (tokens,) = new.values()
        new["position_ids"] = position_ids[..., -tokens.shape[1] :]
    return new


def check_labels(labels: torch.Tensor, shape: tuple[int, int], *, all_logits: bool) -> None:
    """Checks the labels of ``forward``.

    Args:
        labels: ``[B, S]``.
        shape: ``(B, S)``, of the call's new tokens.
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
    if labels.shape != shape:
        raise SkvError("labels: shape", got=list(labels.shape), expected=list(shape))
