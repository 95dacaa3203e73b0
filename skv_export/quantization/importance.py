"""Which tokens of a text matter to a layer, for methods that weigh their errors."""

from __future__ import annotations

import torch
from torch import Tensor

from skv_export.evaluation.decode_simulation import AttentionOptions

LEAST = 0.01
"""Importance of the token that is read least, where that of the one read most is 1."""
_BLOCK = 128


def token_importance(query: Tensor, key: Tensor, options: AttentionOptions) -> Tensor:
    """Returns how much attention each token gets, ``[S]``: RSQ's AttnCon (arXiv 2503.01820, section 4.2).

    The sum over heads and later queries of the attention weights, moved to ``LEAST`` ... 1.

    Args:
        query: ``[N, S, D]``, after RoPE.
        key: ``[N_kv, S, D]``.
        options: Of the layer's attention; a sink of the head takes part of the weight.
    """
    heads, tokens, dim = key.shape
    grouped = (query * options["scale"]).reshape(heads, -1, tokens, dim)
    total = torch.zeros(tokens, device=query.device)
    column = torch.arange(tokens, device=query.device)
    sink, window = options["head_sink"], options["local_window_size"]
    for start in range(0, tokens, _BLOCK):
        scores = grouped[:, :, start : start + _BLOCK] @ key[:, None].mT
        if options["softcap"] > 0:
            scores = options["softcap"] * torch.tanh(scores / options["softcap"])
        position = column[start : start + _BLOCK, None]
        hidden = column > position
        scores.masked_fill_(hidden | (column <= position - window) if window else hidden, -torch.inf)
        if sink is not None:
            more = sink.float().reshape(heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
            total += torch.cat([scores, more], -1).softmax(-1)[..., :-1].sum((0, 1, 2))
        else:
            total += scores.softmax(-1).sum((0, 1, 2))
    low, high = total.min(), total.max()
    return LEAST + (1 - LEAST) * (total - low) / (high - low).clamp(min=1e-20)
