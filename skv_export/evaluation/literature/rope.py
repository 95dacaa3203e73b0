"""Keys before RoPE, from keys after it: the model's own function, as it was called, with the angle turned round."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from skv_export.errors import SkvError
from skv_export.evaluation.literature.tiled import TiledCache


@dataclass(frozen=True)
class Rope:
    """What one layer does to the keys of a text.

    Attributes:
        name: Of what does it.
        turn: The model's function, of keys ``[1, H, S, channels]``, cos and sin.
        cos: ``[1, S, R]``.
        sin: The same.
        channels: First channels of a head, which the function is given; the others stay as they are.
        turned: What it made of the text's keys, ``[H, S, channels]``; None where it is not known.
    """

    name: str
    turn: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    cos: torch.Tensor
    sin: torch.Tensor
    channels: int
    turned: torch.Tensor | None = None

    def apply(self, keys: torch.Tensor) -> torch.Tensor:
        """Rotates keys ``[H, S, D]`` of the text's first S tokens, and scales them where the model does."""
        return self._turned(keys, self.sin)

    def transposed(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the transposed matrix: gradients ``[H, S, D]`` of keys after RoPE to those of keys before it."""
        return self._turned(x, -self.sin)

    def undo(self, keys: torch.Tensor) -> torch.Tensor:
        """Rotates keys ``[H, S, D]`` back.

        The product of the matrix and its transpose is diagonal, and 1 only where cos and sin are exact and not scaled.

        Raises:
            SkvError: The model's RoPE is none of the known forms, or does more than rotate and scale pairs of channels.
        """
        before = self.transposed(keys) / self.transposed(self.apply(torch.ones_like(keys[:1])))
        if not torch.allclose(self.apply(before), keys, rtol=1e-3, atol=1e-3 * float(keys.abs().max())):
            raise _refusal(self.name)
        return before

    def checked(self, keys: torch.Tensor) -> Rope:
        """Returns itself, or RoPE that can't be undone if the text's keys ``[H, S, D]`` are not what it made.

        Some models norm keys after RoPE.
        """
        if self.turned is None:
            return self
        made, found = self.turned.to(keys), keys[..., : self.channels]
        if made.shape == found.shape and torch.allclose(made, found, rtol=1e-2, atol=1e-2 * float(found.abs().max())):
            return self
        return _unknown(f"{self.name}, with other operations after it")

    def _turned(self, x: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        cos, sin = (t[:, : x.shape[1]].to(x) for t in (self.cos, sin))
        turned = self.turn(x[None, ..., : self.channels], cos, sin)[0]
        return torch.cat([turned, x[..., self.channels :]], -1)


@dataclass(frozen=True)
class KeysBeforeRope(TiledCache):
    """Keys that are quantized before RoPE, which every query's step applies to what it reads.

    Attributes:
        index: The layer's.
        ropes: RoPE of the text at hand, by layer.
    """

    index: int = 0
    ropes: dict[int, Rope] = field(default_factory=dict, repr=False)

    def quantized(self, x: torch.Tensor) -> torch.Tensor:
        """Before RoPE, and RoPE again."""
        rope = self.ropes.get(self.index)
        return super().quantized(x) if rope is None else rope.apply(super().quantized(rope.undo(x)))


def _refusal(name: str) -> SkvError:
    return SkvError(
        "keys before RoPE can't be had from those after it",
        got=f"RoPE of {name}",
        expected="a rotation by the cos and sin of positions",
        fix="Leave methods that quantize before RoPE (kvquant, rvq, rotatekv) out of --baselines.",
    )


def _unknown(name: str) -> Rope:
    """RoPE that can't be undone: using it raises."""

    def turn(*_: torch.Tensor) -> torch.Tensor:
        raise _refusal(name)

    return Rope(name, turn, torch.empty(1, 0, 0), torch.empty(1, 0, 0), 0)


@contextmanager
def watched(model: PreTrainedModel, found: dict[int, Rope]) -> Iterator[None]:
    """Calls of the model inside the block put each layer's RoPE into ``found``, before the scores are computed.

    What a layer is given says nothing of what it does, so the RoPE functions of the model's modules of code tell when
    they are called; a layer that calls none has no RoPE. Where no layer does though the configuration says that there
    is RoPE, all have an unknown one from the block's end on.
    """
    layers = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    running = -1

    def enter(module: Any, args: tuple[Any, ...]) -> None:
        nonlocal running
        running = module.layer_idx

    def telling(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            output = function(*args, **kwargs)
            found[running] = _rope(function, args, kwargs, output)  # once it is done: it counts, not what it calls
            return output

        return call

    found.clear()
    handles = [module.register_forward_pre_hook(enter) for module in layers]
    replaced = [
        (code, name, function)
        for code in {sys.modules[type(module).__module__] for module in layers}
        for name, function in vars(code).items()
        if name.startswith("apply_") and "rotary" in name and callable(function)
    ]
    try:
        for code, name, function in replaced:
            setattr(code, name, telling(function))
        yield
    finally:
        for code, name, function in replaced:
            setattr(code, name, function)
        for handle in handles:
            handle.remove()
    if not found and _has_rope(model.config):
        found.update({module.layer_idx: _unknown(str(model.config.model_type)) for module in layers})  # type: ignore[misc]


def _rope(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Rope:
    """What a call does, of functions of queries and keys, or of either, that take cos and sin as most models' do.

    ``unsqueeze_dim`` is what tells that the function takes heads before tokens unless told otherwise.
    """
    signature = inspect.signature(function)
    given = signature.bind(*args, **kwargs).arguments
    names = list(signature.parameters)
    name = f"{function.__module__}.{function.__name__}"
    if not {"cos", "sin", "unsqueeze_dim"} <= {*names} or not {"cos", "sin"} <= {*given}:
        return _unknown(name)
    tensors = names[: names.index("cos")]
    needed = {key for key, p in signature.parameters.items() if p.default is p.empty} - {"cos", "sin", *tensors}
    if names.index("sin") < names.index("cos") or len(tensors) not in (1, 2) or needed:
        return _unknown(name)

    def of_keys(turned: Any) -> torch.Tensor:
        return turned if len(tensors) == 1 else turned[-1]

    def turn(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return of_keys(function(*[keys] * len(tensors), cos=cos, sin=sin))

    turned = of_keys(output)[0].detach()
    if given.get("unsqueeze_dim", 1) == 2:
        turned = turned.transpose(0, 1)
    return Rope(name, turn, given["cos"], given["sin"], turned.shape[-1], turned)


def _has_rope(config: Any) -> bool:
    """What a configuration says of its layers."""
    config = config.get_text_config()
    without = (
        getattr(config, "position_embedding_type", "rope") not in ("rope", "rotary"),
        bool(getattr(config, "alibi", False)),
        not any(getattr(config, "no_rope_layers", None) or [1]),
    )
    return not any(without) and bool(getattr(config, "rope_parameters", None) or getattr(config, "rotary_dim", None))
