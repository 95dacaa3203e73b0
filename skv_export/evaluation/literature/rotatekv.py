"""RotateKV (Su et al., arXiv 2501.16383): keys rotated before RoPE, four heads at once, then ordered by their means.

As in the authors' code. Keys, before RoPE: four KV heads together are rotated by a Hadamard matrix; then all channels
of the layer are put in the order of their means on the calibration text, so that those with outliers to one side share
a group; min-max per token in groups of 128. Values: a Hadamard matrix per head, min-max per token in groups of 128.
With 2 bits both ends of a range are clipped to 0.8. Scale and minimum are float16; the order belongs to the model and
is not counted. Nothing is exact but attention sinks.

What differs: the authors keep as sinks those tokens of the prompt, layer by layer, that hold the 20 largest numbers of
its hidden states (massive activations), at most 20; here it is the first 20 tokens, where these are nearly always, as a
cache sees no hidden states. Heads are rotated together in twos or alone where four do not divide them; groups are the
largest part of 128 that divides the channels. The calibration text is short.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from skv_export.evaluation.decode_simulation import CacheFactory
from skv_export.evaluation.literature.from_text import Activations, Ropes
from skv_export.evaluation.literature.rope import KeysBeforeRope
from skv_export.evaluation.literature.tiled import TiledCache, hadamard, min_max

SINKS, HEADS, GROUP = 20, 4, 128
CLIP = {2: 0.8}
"""What is left of a range, by bits; of others all."""


@dataclass(frozen=True)
class RotatekvValues(TiledCache):
    """Values."""

    num_sink_tokens: int = SINKS

    @property
    def group(self) -> int:
        """Channels that share a scale and a minimum."""
        return math.gcd(self.head_dim, GROUP)

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """Min-max in groups of the last dimension."""
        return min_max(x.reshape(*x.shape[:-1], -1, self.group), self.bits, clip=CLIP.get(self.bits, 1.0)).view_as(x)

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """Rotated, head by head."""
        rotation = hadamard(self.head_dim).to(x.device)
        return self.rounded(x @ rotation) @ rotation

    @property
    def stored_bits(self) -> float:
        """Codes, a scale and a minimum per group."""
        return self.bits + 32 / self.group


@dataclass(frozen=True)
class RotatekvKeys(RotatekvValues, KeysBeforeRope):
    """Keys.

    Attributes:
        order: ``[H * D]``: channels of all heads, once rotated, by their means.
    """

    order: torch.Tensor = field(default_factory=lambda: torch.arange(1), repr=False)

    @property
    def group(self) -> int:
        """Of all heads' channels."""
        return math.gcd(len(self.order), GROUP)

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """Rotated, several heads at once, in the order of the means."""
        read = self.rounded(rotated(x)[:, self.order])[:, self.order.argsort()]
        return _mixed(read, len(x)).reshape(x.shape[1], len(x), -1).transpose(0, 1)


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Keys ``[H, T, D]``, those of four heads (two, one) rotated together: ``[T, H * D]``."""
    return _mixed(x.transpose(0, 1).flatten(1), len(x))


def _mixed(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Hadamard matrix, its own inverse, on ``[T, H * D]``."""
    together = x.reshape(len(x), heads // math.gcd(heads, HEADS), -1)
    return (together @ hadamard(together.shape[-1]).to(x.device)).flatten(1)


def fit(k_bits: int, v_bits: int, seen: dict[int, Activations], ropes: Ropes) -> CacheFactory:
    """Returns the caches of a model whose layers saw this."""

    def make(index: int, head_dim: int, window: int) -> tuple[RotatekvKeys, RotatekvValues]:
        order = rotated(seen[index].keys_before_rope()).mean(0).argsort(stable=True)
        keys = RotatekvKeys(k_bits, head_dim, window, order=order, index=index, ropes=ropes)
        return keys, RotatekvValues(v_bits, head_dim, window)

    return make
