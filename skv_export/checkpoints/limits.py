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
_POSITIVE = {
    *_LAYERS, *_CONTEXTS, "vocab_size", "hidden_size", "n_embd", "d_model", "num_attention_heads", "n_head",
    "num_key_value_heads",
}  # fmt: skip
"""Counts that no model has none of."""
MAX_CONTEXT = 1 << 40
"""Positions that a model may claim: no tensor stands behind them."""
_CODES_PER_BYTE = 8


def check_claims(config: Mapping[str, Any], entries: Mapping[str, TensorEntry], source: str) -> None:
    """Compares a configuration's counts with the headers of the checkpoint's files.

    Every layer has a tensor of its own, no size is larger than the number of weights, and what every model has is
    there at least once.

    Raises:
        SkvError: A count that the files can't hold, or of nothing.
    """
    weights = max((max(math.prod(x.shape), x.nbytes * _CODES_PER_BYTE) for x in entries.values()), default=0)
    limits = dict.fromkeys(_LAYERS, len(entries)) | dict.fromkeys(_SIZES, weights)
    limits |= dict.fromkeys(_CONTEXTS, MAX_CONTEXT)
    for name, value in _numbers(config):
        if name in _POSITIVE and value < 1:
            raise SkvError(
                f"{source}: {name} in its configuration makes no sense",
                got=f"{value:,}",
                expected="at least 1",
                fix="Take the config.json that belongs to the weights.",
            )
        if name in limits and value > limits[name]:
            behind = "" if name in _CONTEXTS else ", as the tensors in its files have it"
            raise SkvError(
                f"{source}: {name} in its configuration",
                got=f"{value:,}",
                expected=f"at most {limits[name]:,}{behind}",
                fix="Take the config.json that belongs to the weights.",
            )


def _numbers(config: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, float]]:
    """Names and numbers of a configuration, those of a text model within it included."""
    for name, value in config.items():
        if isinstance(value, int | float):
            yield name, value
        elif isinstance(value, Mapping) and depth < 4:
            yield from _numbers(value, depth + 1)
