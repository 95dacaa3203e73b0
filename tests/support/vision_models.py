"""Tiny vision-language models with random weights, and what transformers makes of a prompt with an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import randomize, write_tokenizer

IMAGE, VISION_START, VISION_END = 5, 7, 8
_TEXT: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_QWEN: dict[str, Any] = {
    "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
_INTERLEAVED = _MROPE["rope_parameters"] | {"mrope_interleaved": True}
_QWEN3: dict[str, Any] = _QWEN | {
    "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "deepstack_visual_indexes": [0, 1],
    "num_position_embeddings": 64,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_QWEN_IDS = {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END, "video_token_id": 6}
_LLAMA = _TEXT | {"model_type": "llama"}
_IMAGE = {"image_token_id": IMAGE, "tie_word_embeddings": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": _LLAMA, "vision_config": _VISION | {"model_type": "clip_vision_model", "projection_dim": 32},
        "image_seq_length": 16,
    },
    "qwen2_vl": {
        "text_config": _TEXT | _MROPE, **_QWEN_IDS,
        "vision_config": _QWEN | {"embed_dim": 32, "hidden_size": 64, "in_channels": 3, "mlp_ratio": 2},
    },
    "qwen2_5_vl": {
        "text_config": _TEXT | _MROPE, **_QWEN_IDS,
        "vision_config": _QWEN | {
            "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    },
    "qwen3_vl": {
        "text_config": _TEXT | {"rope_parameters": _INTERLEAVED}, **_QWEN_IDS, "vision_config": _QWEN3,
    },
    "qwen3_vl_moe": {
        "text_config": _TEXT | _EXPERTS | {"rope_parameters": _INTERLEAVED}, **_QWEN_IDS, "vision_config": _QWEN3,
    },
    "gemma3": {
        "text_config": _TEXT | {
            "model_type": "gemma3_text", "sliding_window": 24, "query_pre_attn_scalar": 48,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "vision_config": _VISION | {"model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4,
    },
    "idefics3": {"text_config": _LLAMA, "vision_config": _VISION, "scale_factor": 2},
    "smolvlm": {"text_config": _LLAMA, "vision_config": _VISION, "scale_factor": 2},
}  # fmt: skip
"""transformers' ``model_type`` -> what its tiny configuration sets beyond ``_IMAGE``."""


def make_vision_model(folder: Path, kind: str) -> Any:
    """Writes a tiny vision-language checkpoint with a tokenizer, and returns the model in PyTorch."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(20240131)
    config = AutoConfig.for_model(kind, **CONFIGS[kind], **_IMAGE)
    model = AutoModelForImageTextToText.from_config(config).eval()  # type: ignore[no-untyped-call]
    randomize(model)
    model.save_pretrained(folder)
    write_tokenizer(folder, _TEXT["vocab_size"])
    return model


def with_image(model: Any, before: list[int], after: list[int]) -> tuple[Any, Any, Any]:
    """A prompt with an image between two pieces of text, through the whole model in PyTorch.

    Returns:
        The embeddings ``[1, S, hidden]``, wider where features are added to the first layers, and the positions that
        the text tower got (None = as they follow), and the logits ``[1, S, vocab]``.
    """
    kind, generator = model.config.model_type, torch.Generator().manual_seed(9)
    given: dict[str, Any] = {}
    if kind.startswith("qwen"):
        patches = torch.randn(4 * 8, 3 * 2 * 4 * 4, generator=generator)
        given = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 8]])}
        images = [VISION_START, *[IMAGE] * 8, VISION_END]
    else:
        shape = (1, 1, 3, 16, 16) if kind in ("idefics3", "smolvlm") else (1, 3, 16, 16)
        given = {"pixel_values": torch.randn(shape, generator=generator)}
        images = [IMAGE] * {"llava": 16, "gemma3": 4}.get(kind, 4)
    ids = torch.tensor([[*before, *images, *after]])
    if kind.startswith("qwen"):
        given["mm_token_type_ids"] = (ids == IMAGE).int()
    seen: dict[str, Any] = {}
    tower = getattr(model.model, "language_model", None) or model.model.text_model
    hook = tower.register_forward_pre_hook(lambda _, __, named: seen.update(named), with_kwargs=True)
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, **given).logits
    finally:
        hook.remove()
    embeds = seen["inputs_embeds"]
    if features := seen.get("deepstack_visual_embeds"):
        added = torch.zeros(len(features), *embeds.shape)
        added[:, seen["visual_pos_masks"]] = torch.stack(features)
        embeds = torch.cat([embeds, *added], -1)
    return embeds, seen.get("position_ids"), logits
