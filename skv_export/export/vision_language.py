"""Vision-language checkpoints: the text tower alone is exported, and what an image becomes comes in as embeddings.

The model is transformers' own class without its vision parts; its text tower takes ``inputs_embeds`` in place of
tokens, as the whole model hands them to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

TOWERS = {
    "gemma3": "language_model",
    "idefics3": "text_model",
    "llava": "language_model",
    "qwen2_5_vl": "language_model",
    "qwen2_vl": "language_model",
    "qwen3_vl": "language_model",
    "qwen3_vl_moe": "language_model",
    "smolvlm": "text_model",
}
"""transformers' ``model_type`` -> the attribute of its base model that is the text tower."""
REFUSED = {
    "mllama": "text attends to images in cross attention (cross_attention_layers), whose cache is of another kind",
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


def deepstack_layers(config: PreTrainedConfig) -> int:
    """Returns after how many of the first layers features of images are added to the hidden states (DeepStack)."""
    vision = getattr(config, "vision_config", None) if is_vision_language(config) else None
    return len(getattr(vision, "deepstack_visual_indexes", None) or ())


def first_layers(model: PreTrainedModel) -> Sequence[torch.nn.Module]:
    """Returns the layers of the text tower that features of images are added behind."""
    count = deepstack_layers(model.config)
    if not count:
        return ()
    layers: Sequence[torch.nn.Module] = getattr(model.base_model, TOWERS[model.config.model_type]).layers
    return layers[:count]


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
