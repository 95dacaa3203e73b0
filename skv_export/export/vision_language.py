"""Vision-language checkpoints: the text tower alone is exported, and what an image becomes comes in as embeddings.

The model is transformers' own class without its vision parts; its text tower takes ``inputs_embeds`` in place of
tokens, as the whole model hands them to it.
"""

from __future__ import annotations

import warnings
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

TOWERS = {
    "gemma3": "language_model",
    "idefics3": "text_model",
    "llava": "language_model",
    "qwen2_5_vl": "language_model",
    "qwen2_vl": "language_model",
    "smolvlm": "text_model",
}
"""transformers' ``model_type`` -> the attribute of its base model that is the text tower."""
REFUSED = {
    "mllama": "text attends to images in cross attention (cross_attention_layers), whose cache is of another kind",
    "qwen3_vl": "image features are added to the hidden states of the first layers too (deepstack), which the graph "
    "has no input for",
    "qwen3_vl_moe": "image features are added to the hidden states of the first layers too (deepstack), which the "
    "graph has no input for",
    "paligemma": "a prompt attends to itself in both directions",
}
"""Vision-language models whose text tower can't be exported, and why."""
_BOTH_WAYS = {"gemma3": "Gemma 3's image tokens attend to one another in both directions in transformers"}


def is_vision_language(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint is one whose text tower can be exported."""
    return config.model_type in TOWERS and getattr(config, "vision_config", None) is not None


def position_axes(config: PreTrainedConfig) -> int:
    """Returns how many positions a token has: 3 with multimodal RoPE (time, height, width), else 1."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return 3 if isinstance(rope, dict) and rope.get("mrope_section") else 1


def keep_text_tower(model: PreTrainedModel) -> None:
    """Takes everything off a vision-language model but its text tower and its output embedding, in place."""
    base: Any = model.base_model
    tower = TOWERS[model.config.model_type]
    for name, _ in list(base.named_children()):
        if name != tower:
            setattr(base, name, None)


def warn_of_images(config: PreTrainedConfig) -> None:
    """Says what the export computes otherwise than transformers where there are images."""
    if reason := _BOTH_WAYS.get(config.model_type):
        warnings.warn(
            f"{config.model_type}: {reason}; in the exported model every token sees those before it. Text is exact",
            RuntimeWarning,
            stacklevel=2,
        )
