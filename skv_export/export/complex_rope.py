"""Attention of Llama 4 and DeepSeek V2 with RoPE in real numbers: transformers has complex ones, which ONNX has not."""

from __future__ import annotations

from typing import Any

import torch

from skv_export.checkpoints.attention_patches import OWN_ATTENTION, Attend, Patches


def _patch_rope(module: Any, _: Attend) -> None:
    """Replaces RoPE's complex numbers by cosines and sines, ``[2, B, S, 1, D / 2]``."""

    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        angles = (position_ids[..., None].float() * module.inv_freq).unsqueeze(2)
        return torch.stack((angles.cos(), angles.sin())) * module.attention_scaling

    module.forward = forward


def _patch_llama4(module: Any, attend: Attend) -> None:
    """Replaces ``forward`` by the same with real numbers; queries that are scaled by their positions are refused."""

    def forward(
        hidden_states: torch.Tensor,
        position_embeddings: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Any,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, module.head_dim))
            for project in (module.q_proj, module.k_proj, module.v_proj)
        )
        if module.use_rope:
            query, key = (_turn_pairs(x, *position_embeddings) for x in (query, key))
            if hasattr(module, "qk_norm"):
                query, key = module.qk_norm(query), module.qk_norm(key)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        key, value = past_key_values.update(key, value, module.layer_idx)
        output, _weights = attend(module, query, key, value, attention_mask, scaling=module.scaling)
        return module.o_proj(output.flatten(2)), None

    module.forward = forward


def _patch_deepseek_v2(module: Any, attend: Attend) -> None:
    """Replaces ``forward`` by the same with real numbers; ``expand_kv`` makes keys and values of the latents."""

    def forward(
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Any,
        position_embeddings: torch.Tensor,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        low_rank = module.q_lora_rank is not None
        query = module.q_b_proj(module.q_a_layernorm(module.q_a_proj(hidden_states))) if low_rank else None
        query = (module.q_proj(hidden_states) if query is None else query).unflatten(-1, (-1, module.qk_head_dim))
        sizes = [module.qk_nope_head_dim, module.qk_rope_head_dim]
        query, rotated_query = torch.split(query, sizes, -1)
        sizes[0] = module.kv_lora_rank
        latent, rotated_key = torch.split(module.kv_a_proj_with_mqa(hidden_states).unsqueeze(2), sizes, -1)
        rotated_query, rotated_key = (_turn_pairs(x, *position_embeddings) for x in (rotated_query, rotated_key))
        latent, rotated_key = (x.transpose(1, 2) for x in (module.kv_a_layernorm(latent), rotated_key))
        latent, rotated_key = past_key_values.update(latent, rotated_key, module.layer_idx)
        key, value = module.expand_kv(latent, rotated_key)
        query = torch.cat((query, rotated_query), -1).transpose(1, 2)
        output, _weights = attend(module, query, key, value, attention_mask, scaling=module.scaling)
        return module.o_proj(output.flatten(2)), None

    module.forward = forward


def _turn_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on neighbouring channels of ``x [B, S, heads, D]``."""
    even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


PATCHES: Patches = {
    **OWN_ATTENTION,
    "DeepseekV2Attention": _patch_deepseek_v2,
    "DeepseekV2RotaryEmbedding": _patch_rope,
    "Llama4TextAttention": _patch_llama4,
    "Llama4TextRotaryEmbedding": _patch_rope,
}
"""Class -> what makes a module of it call another function: all that the export replaces."""
