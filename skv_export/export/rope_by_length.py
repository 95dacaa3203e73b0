"""RoPE whose frequencies depend on the length: longrope's two sets, and dynamic NTK.

transformers chooses them in each call, by the largest position in it, in Python; here each sequence's own largest
position chooses, in the graph, so that a batch is its sequences one by one. Keys that are cached keep the frequencies
of their call: with dynamic NTK that is what transformers does too; with longrope, whose sets can't be mixed, the
runtime runs a sequence anew where it passes from one to the other (``runtime/rope_switch.py``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from skv_export.errors import SkvError

LONGROPE, DYNAMIC = "longrope", "dynamic"


def switch_length(config: PreTrainedConfig) -> int:
    """Returns the longest sequence that has longrope's first set of frequencies; 0 = a model of another kind."""
    rope = getattr(config, "rope_parameters", None) or {}
    if not isinstance(rope, Mapping) or rope.get("rope_type") != LONGROPE:
        return 0
    return int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)


def is_dynamic(config: PreTrainedConfig) -> bool:
    """Whether the frequencies grow with the length (dynamic NTK)."""
    rope = getattr(config, "rope_parameters", None) or {}
    return isinstance(rope, Mapping) and DYNAMIC in str(rope.get("rope_type"))


def choose_by_length(module: Any) -> None:
    """Replaces the forward pass of a module of RoPE, if it is one of these kinds.

    Raises:
        SkvError: It has several sets of RoPE parameters, of which one is of these kinds.
    """
    kind = getattr(module, "rope_type", None)
    if isinstance(kind, Mapping) and {LONGROPE, DYNAMIC} & set(kind.values()):
        raise SkvError(
            f"{type(module).__name__}: RoPE that depends on the length, in some kinds of layers",
            got=", ".join(sorted(set(map(str, kind.values())))),
            expected="one kind of RoPE for all layers",
        )
    if kind == LONGROPE:
        _replace_forward(module, _longrope(module))
    elif isinstance(kind, str) and DYNAMIC in kind:
        _replace_forward(module, _dynamic(module.config))


def _replace_forward(module: Any, frequencies: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Makes ``forward(x, position_ids)`` use ``frequencies(lengths [B, 1])``, ``[B, 1, D / 2]``."""
    body = inspect.unwrap(type(module).forward)  # without what chooses frequencies in Python

    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        lengths = position_ids.amax(-1, keepdim=True) + 1
        return body(_With(module, frequencies(lengths)), x, position_ids)

    vars(module)["forward"] = forward


class _With:
    """A module of RoPE with other frequencies."""

    def __init__(self, module: Any, inv_freq: torch.Tensor) -> None:
        self._module, self.inv_freq = module, inv_freq

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _longrope(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    config, switch = module.config, switch_length(module.config)
    short, long = (ROPE_INIT_FUNCTIONS[LONGROPE](config, None, seq_len=n)[0] for n in (switch, switch + 1))

    def frequencies(lengths: torch.Tensor) -> torch.Tensor:
        return torch.where(lengths[..., None] > switch, long, short)

    return frequencies


def _dynamic(config: PreTrainedConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """The base grows with the length: theta * (factor * length / original - (factor - 1)) ** (dim / (dim - 2))."""
    rope = config.rope_parameters
    original, factor = int(config.max_position_embeddings), float(rope["factor"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim

    def frequencies(lengths: torch.Tensor) -> torch.Tensor:
        length = lengths[..., None].float().clamp(min=original)
        base = rope["rope_theta"] * (factor * length / original - (factor - 1)) ** (dim / (dim - 2))
        return 1.0 / base**exponents

    return frequencies
