"""Limits of what a configuration may claim of the tensors beside it: an unbacked number would fill the memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from skv_export.checkpoints.tensor_files import TensorEntry
from skv_export.errors import SkvError

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_SIZES = (
    "vocab_size", "hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "head_dim", "num_attention_heads",
    "n_head", "num_key_value_heads", "num_local_experts", "num_experts", "moe_intermediate_size",
)  # fmt: skip
_CONTEXTS = ("max_position_embeddings", "n_positions")
MAX_CONTEXT = 1 << 40
"""Positions that a model may claim: no tensor stands behind them."""
_MAX_TOKEN = (1 << 31) - 1
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LEAST: Mapping[str, float] = {
    **dict.fromkeys((*_LAYERS, *_CONTEXTS), 1),
    **dict.fromkeys(("vocab_size", "hidden_size", "n_embd", "d_model", "intermediate_size", "head_dim"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads", "num_kv_heads", "num_experts_per_tok"), 1),
    "attention_chunk_size": 1,
    **dict.fromkeys(("sliding_window", "window_size"), 0),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"), 0.0),
    **dict.fromkeys(("rope_theta", "rotary_emb_base", "factor", "query_pre_attn_scalar", "logits_scaling"), 1e-30),
    **dict.fromkeys(_TOKENS, -1),  # -1: none, as older configurations write it
}
"""What a number of this name is at least: counts that no model has none of, and bases of powers."""
_LARGEST = 3.4e38
"""In float32."""
_CODES_PER_BYTE = 8
_FIX = "Take the config.json that belongs to the weights."


def check_claims(config: Mapping[str, Any], entries: Mapping[str, TensorEntry], source: str) -> None:
    """Compares a configuration's numbers with what they can be, and with the headers of the checkpoint's files.

    Every layer has a tensor of its own, no size is larger than the number of weights, and what every model has is
    there at least once.

    Raises:
        SkvError: A count that the files can't hold, or of nothing; a number that is none.
    """
    weights = max((max(math.prod(x.shape), x.nbytes * _CODES_PER_BYTE) for x in entries.values()), default=0)
    limits = dict.fromkeys(_LAYERS, len(entries)) | dict.fromkeys(_SIZES, weights)
    limits |= dict.fromkeys(_CONTEXTS, MAX_CONTEXT) | dict.fromkeys(_TOKENS, _MAX_TOKEN)
    for name, value in _numbers(config):
        least = _LEAST.get(name, -math.inf)
        endless = isinstance(value, float) and (
            math.isinf(value) if name in _LEAST else _LARGEST < abs(value) < math.inf
        )
        if not value >= least or endless:  # a NaN is no number of any name
            expected = "a number in float32" if math.isinf(least) else f"a finite number of at least {least:g}"
            raise SkvError(
                f"{source}: {name} in its configuration makes no sense",
                got=f"{value:,}"[:50],
                expected=expected,
                fix=_FIX,
            )
        if name in limits and value > limits[name]:
            behind = "" if name in (*_CONTEXTS, *_TOKENS) else ", as the tensors in its files have it"
            raise SkvError(
                f"{source}: {name} in its configuration",
                got=f"{value:,}"[:50],
                expected=f"at most {limits[name]:,}{behind}",
                fix=_FIX,
            )


def _numbers(config: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, float]]:
    """Names and numbers of a configuration, those in lists and of a text model within it included."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            if depth < 4:
                yield from _numbers(value, depth + 1)
        else:
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int | float) and not isinstance(number, bool):
                    yield name, number
