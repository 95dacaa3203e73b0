"""Llama 4's attention with RoPE in real numbers: transformers turns it as complex ones, which ONNX has not."""

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


def _patch_attention(module: Any, attend: Attend) -> None:
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


def _turn_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on neighbouring channels of ``x [B, S, heads, D]``."""
    even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


PATCHES: Patches = {
    **OWN_ATTENTION,
    "Llama4TextAttention": _patch_attention,
    "Llama4TextRotaryEmbedding": _patch_rope,
}
"""Class -> what makes a module of it call another function: all that the export replaces."""
