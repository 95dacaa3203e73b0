"""Keys before RoPE, from keys after it: the model's own function, with the angle turned round."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from skv_export.errors import SkvError


@dataclass(frozen=True)
class Rope:
    """What one layer does to the keys of a text.

    Attributes:
        function: The model's ``apply_rotary_pos_emb``.
        cos: ``[1, S, R]``.
        sin: The same.
    """

    function: Callable[..., Any]
    cos: torch.Tensor
    sin: torch.Tensor

    def apply(self, keys: torch.Tensor) -> torch.Tensor:
        """Rotates keys ``[H, S, D]`` of the text's first S tokens."""
        return self._turn(keys, self.sin)

    def undo(self, keys: torch.Tensor) -> torch.Tensor:
        """Rotates them back.

        Raises:
            SkvError: The model scales or mixes keys beside rotating them.
        """
        before = self._turn(keys, -self.sin)
        if not torch.allclose(self.apply(before), keys, rtol=1e-3, atol=1e-3 * float(keys.abs().max())):
            raise SkvError(
                "keys before RoPE can't be had from those after it",
                got=f"RoPE of {self.function.__module__}",
                expected="a rotation",
                fix="Leave methods that quantize before RoPE (kvquant) out of --baselines.",
            )
        return before

    def _turn(self, keys: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        cos, sin = (t[:, : keys.shape[1]].to(keys) for t in (self.cos, sin))
        if next(iter(inspect.signature(self.function).parameters)) == "q":
            _, turned = self.function(keys[None], keys[None], cos, sin)
        else:
            turned = self.function(keys[None], cos, sin)
        return turned[0]


@contextmanager
def watched(model: PreTrainedModel, found: dict[int, Rope]) -> Iterator[None]:
    """Calls of the model inside the block put each layer's RoPE into ``found``, before its attention runs."""

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pair = kwargs.get("position_embeddings")
        function = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
        if function is not None and isinstance(pair, tuple) and len(pair) == 2:
            found[module.layer_idx] = Rope(function, *pair)

    found.clear()
    handles = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
