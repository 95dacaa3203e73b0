"""Attention of models that can't be exported as transformers computes it.

They compute it themselves instead of through AttentionInterface, or turn RoPE as complex numbers, which ONNX has not.
One row for each class, by name: what replaces its own computation by a call of a function of AttentionInterface's kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

Attend = Callable[..., tuple[torch.Tensor, None]]
"""As transformers' attention functions: ``[B, N, S, D]`` and twice ``[B, N_kv, S, D]`` to ``[B, S, N, D]``, None."""


def patch_attention(model: PreTrainedModel, name: str, attend: Attend) -> bool:
    """Makes a model whose attention is in ``_PATCHES`` call ``attend``.

    Args:
        model: Changed in place, each attention module by itself.
        name: The implementation's name in ``model.config``; one that transformers makes no mask for.
        attend: Called for each layer; the module that it gets has ``layer_idx``.

    Returns:
        Whether the model has such attention; if not, it is as it was.
    """
    found = [module for module in model.modules() if type(module).__name__ in _PATCHES]
    for module in found:
        _PATCHES[type(module).__name__](module, attend)
    if found:
        model.config._attn_implementation_internal = name
    return bool(found)


def _patch_scores(module: Any, attend: Attend, scaling: float, window: int = 0) -> None:
    """Replaces ``_attn(query, key, value, attention_mask)``, which returns ``[B, N, S, D]`` and the weights."""

    def attn(query: Any, key: Any, value: Any, attention_mask: Any = None) -> tuple[torch.Tensor, None]:
        # CodeGen's RoPE is in float32 whatever the model's format is.
        query, key = query.to(value.dtype), key.to(value.dtype)
        output, _ = attend(module, query, key, value, attention_mask, scaling=scaling, sliding_window=window)
        return output.transpose(1, 2), None

    module._attn = attn


def _patch_gptj(module: Any, attend: Attend) -> None:
    _patch_scores(module, attend, module.head_dim**-0.5)


def _patch_gpt_neo(module: Any, attend: Attend) -> None:
    """Scores are not scaled; a local layer's queries see ``window_size`` tokens, their own included."""
    module.layer_idx = module.layer_id
    window = module.config.window_size if module.attention_type == "local" else 0
    _patch_scores(module, attend, 1.0, window)


def _patch_falcon(module: Any, attend: Attend) -> None:
    """Replaces ``forward``, whose scores have no function of their own, for models with RoPE."""
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    def forward(
        hidden_states: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None,
        layer_past: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        fused = module.query_key_value(hidden_states).unflatten(-1, (-1, module.head_dim))
        query, key, value = (x.transpose(1, 2) for x in _split_falcon(module, fused))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)  # type: ignore[no-untyped-call]
        key, value = layer_past.update(key, value, module.layer_idx)
        output, _weights = attend(module, query, key, value, attention_mask, scaling=module.head_dim**-0.5)
        return module.dense(output.flatten(2)), None

    module.forward = forward


def _split_falcon(module: Any, fused: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns queries, keys and values ``[B, S, heads, D]`` of ``[B, S, heads of all three, D]``.

    The new architecture has for each KV head its queries, its key, its value; an old one with one KV head all queries,
    the key, the value; another old one for each head the query, the key, the value. The first covers all three. (The
    model's own ``_split_heads`` repeats KV heads once for each query.)
    """
    per_head = fused.reshape(*fused.shape[:2], module.num_kv_heads, -1, module.head_dim)
    return per_head[..., :-2, :].flatten(2, 3), per_head[..., -2, :], per_head[..., -1, :]


def _patch_llama4_rope(module: Any, _: Attend) -> None:
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


def _turn_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on neighbouring channels of ``x [B, S, heads, D]``."""
    even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


_PATCHES: Mapping[str, Callable[[Any, Attend], None]] = {
    "CodeGenAttention": _patch_gptj,
    "FalconAttention": _patch_falcon,
    "GPTJAttention": _patch_gptj,
    "GPTNeoSelfAttention": _patch_gpt_neo,
    "Llama4TextAttention": _patch_llama4,
    "Llama4TextRotaryEmbedding": _patch_llama4_rope,
}
