"""Attention of models that compute it themselves instead of through transformers' AttentionInterface.

One row for each class, by name: what replaces its own computation by a call of a function of AttentionInterface's kind.
The export and the simulation of caches replace the same attention, each by a function of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from skv_export.errors import SkvError

Attend = Callable[..., tuple[torch.Tensor, None]]
"""As transformers' attention functions: ``[B, N, S, D]`` and twice ``[B, N_kv, S, D]`` to ``[B, S, N, D]``, None."""
Patches = Mapping[str, Callable[[Any, Attend], None]]
_REPLACED = ("_attn", "forward")
"""Methods that patches put beside a module's own, as attributes of the module."""
_PATCHED = "_has_replaced_attention"
"""Attribute of a module whose methods are patched: others may have put a ``forward`` there, too (accelerate does)."""


def patch_attention(model: PreTrainedModel, attend: Attend, patches: Patches) -> bool:
    """Makes the modules of a model whose classes are in ``patches`` call ``attend``.

    Args:
        model: Changed in place, each attention module by itself.
        attend: Called for each layer; the module that it gets has ``layer_idx``.
        patches: ``OWN_ATTENTION``, or the same with further classes.

    Returns:
        Whether the model has such modules; if not, it is as it was.
    """
    found = [module for module in model.modules() if type(module).__name__ in patches]
    for module in found:
        patches[type(module).__name__](module, attend)
        vars(module)[_PATCHED] = True
    return bool(found)


def restore_attention(model: PreTrainedModel) -> bool:
    """Gives the modules of a model that were patched their own attention back; whether there were any."""
    found = [module for module in model.modules() if vars(module).pop(_PATCHED, False)]
    for module in found:
        for name in _REPLACED:
            vars(module).pop(name, None)
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
    from transformers.models.falcon import modeling_falcon

    def forward(
        hidden_states: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None,
        layer_past: Any = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        alibi: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        if alibi is not None:
            raise SkvError("falcon: positions are biases on the scores (ALiBi)", expected="a model with RoPE")
        fused = module.query_key_value(hidden_states).unflatten(-1, (-1, module.head_dim))
        query, key, value = (x.transpose(1, 2) for x in _split_falcon(module, fused))
        # Looked up at each call, as the model's own code does: who replaces the function is heard.
        query, key = modeling_falcon.apply_rotary_pos_emb(query, key, *position_embeddings)  # type: ignore[no-untyped-call]
        if layer_past is not None:
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


OWN_ATTENTION: Patches = {
    "CodeGenAttention": _patch_gptj,
    "FalconAttention": _patch_falcon,
    "GPTJAttention": _patch_gptj,
    "GPTNeoSelfAttention": _patch_gpt_neo,
}
"""Class -> what makes a module of it call another function."""
