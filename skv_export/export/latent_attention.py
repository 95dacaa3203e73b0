"""Multi-head latent attention (DeepSeek) in its absorbed form, which the op computes.

Keys and values of all heads are products with one latent per token, ``k = W_K c`` and ``v = W_V c``. So a score is
``q . k = (W_K^T q) . c``, and the output ``W_V (sum of p c)``: attention with one KV head whose key is the latent and
the part with RoPE side by side, and whose value is the latent, padded to the key's width. The latent stands in the
cache twice, each time in its own number of bits.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

LATENT = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu")
"""transformers' ``model_type`` of the models that are tested."""


def has_latents(module: Any) -> bool:
    """Whether a module is such an attention, as transformers builds it."""
    return hasattr(module, "expand_kv") and hasattr(module, "kv_b_proj") and hasattr(module, "kv_lora_rank")


def keep_latents(model: PreTrainedModel, attention: str) -> None:
    """Makes the model's attention hand on latents instead of each head's keys and values, while it has ``attention``.

    Args:
        model: Changed in place.
        attention: Name of the function that takes them: ``absorb`` and ``expand`` are for it.
    """
    for module in model.modules():
        if has_latents(module) and "expand_kv" not in vars(module):
            vars(module)["expand_kv"] = _Latents(module, module.expand_kv, attention)


class _Latents:
    """``expand_kv`` of a module: the latent ``[B, 1, S, rank]`` and its part with RoPE ``[B, 1, S, R]``, as K and V."""

    def __init__(self, module: Any, own: Any, attention: str) -> None:
        self._module, self._own, self._attention = module, own, attention

    def __call__(self, latent: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._module.config._attn_implementation != self._attention:
            own: tuple[torch.Tensor, torch.Tensor] = self._own(latent, rotated)
            return own
        return torch.cat((latent, rotated), -1), torch.nn.functional.pad(latent, (0, rotated.shape[-1]))


def _matrices(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """``W_K`` ``[N, nope, rank]`` and ``W_V`` ``[N, v, rank]``."""
    sizes = [module.qk_nope_head_dim, module.v_head_dim]
    keys, values = torch.split(module.kv_b_proj.weight.unflatten(0, (-1, sum(sizes))), sizes, 1)
    return keys, values


def absorb(module: Any, query: torch.Tensor) -> torch.Tensor:
    """Returns queries ``[B, N, S, nope + R]`` as latents see them, ``[B, N, S, rank + R]``."""
    plain, rotated = torch.split(query, [module.qk_nope_head_dim, module.qk_rope_head_dim], -1)
    return torch.cat((plain @ _matrices(module)[0], rotated), -1)


def expand(module: Any, output: torch.Tensor) -> torch.Tensor:
    """Returns outputs ``[B, S, N, v]`` of sums of latents ``[B, S, N, rank + R]``."""
    latents = output[..., : module.kv_lora_rank].transpose(1, 2)
    return (latents @ _matrices(module)[1].transpose(1, 2)).transpose(1, 2)
