"""KVQuant (Hooper et al., arXiv 2401.18079): keys per channel before RoPE, non-uniform levels, 1% of the numbers apart.

As in the authors' code. Keys, before RoPE: each channel has fixed thresholds, the percentiles of the calibration text
that leave 1% outside; what is between them is scaled to [-1, 1]. Values: per token, over all heads of a layer; the
thresholds are the token's own. Levels (nuq): k-means of the scaled numbers of a layer, keys and values apart, each
number weighted by its Fisher information. With 2 bits the levels are shifted and stretched so that mean and deviation
of the numbers are kept (Q-Norm). Numbers outside the thresholds are kept in float16 with an index. The first token is
exact (attention sinks); every other is quantized when it comes.

Bits: a code; per outlier 16 for its number and 16 for its index, as many as there were in the text last read; a 32-bit
pointer per token into the outliers; for values a scale and an offset per token, float16. Levels and thresholds of keys
belong to the model and are not counted.

What differs: values have the same whole number of outliers at either end of each token (at least one) instead of a
percentile; levels are found on a histogram of 4,096 cells; the calibration text is short.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from skv_export.evaluation.decode_simulation import CacheFactory
from skv_export.evaluation.literature.from_text import Activations, Ropes
from skv_export.evaluation.literature.rope import KeysBeforeRope
from skv_export.evaluation.literature.tiled import TiledCache, half
from skv_export.evaluation.literature.turboquant import lloyd_max

OUTLIERS = 0.01
"""Share of the numbers outside the thresholds, half of them at either end."""
_CELLS = 4096


@dataclass
class Outliers:
    """Those of the text last read, of all numbers."""

    found: int = 0
    numbers: int = 0

    @property
    def share(self) -> float:
        """What is stored apart; before any text, as many as there should be."""
        return self.found / self.numbers if self.numbers else OUTLIERS


@dataclass(frozen=True)
class KvquantCache(TiledCache):
    """What keys and values share: numbers between thresholds on levels, the others as they are.

    Attributes:
        levels: ``[2**bits]``, ascending, of numbers scaled to [-1, 1].
        kv_num_heads: Heads of the layer, which share a token's pointer, scale and offset.
        outliers: Counted anew by each text.
    """

    num_sink_tokens: int = 1
    levels: torch.Tensor = field(default_factory=lambda: torch.zeros(1), repr=False)
    kv_num_heads: int = 1
    outliers: Outliers = field(default_factory=Outliers, compare=False)

    def rounded(self, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Numbers inside the thresholds on their levels, the others in float16."""
        middle, reach = half((high + low) / 2), half((high - low) / 2).clamp(min=1e-7)
        outside = (x < low) | (x > high)
        levels = self.levels.to(x.device)
        nearest = levels[torch.bucketize(((x - middle) / reach).contiguous(), (levels[1:] + levels[:-1]) / 2)]
        self.outliers.found, self.outliers.numbers = int(outside.sum()), outside.numel()
        return torch.where(outside, half(x), nearest * reach + middle)

    @property
    def stored_bits(self) -> float:
        """Codes, outliers, and a pointer per token."""
        return self.bits + 32 * self.outliers.share + 32 / (self.kv_num_heads * self.head_dim)


@dataclass(frozen=True)
class KvquantKeys(KvquantCache, KeysBeforeRope):
    """Keys.

    Attributes:
        low: Thresholds ``[H, 1, D]``.
        high: The same.
    """

    low: torch.Tensor = field(default_factory=lambda: torch.zeros(1), repr=False)
    high: torch.Tensor = field(default_factory=lambda: torch.zeros(1), repr=False)

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """By the channels' thresholds."""
        return self.rounded(x, self.low, self.high)


@dataclass(frozen=True)
class KvquantValues(KvquantCache):
    """Values."""

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """By each token's own thresholds."""
        low, high = token_thresholds(x)
        return self.rounded(x, low, high)

    @property
    def stored_bits(self) -> float:
        """Those of keys, and a scale and an offset per token."""
        return super().stored_bits + 32 / (self.kv_num_heads * self.head_dim)


def token_thresholds(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest of each token's numbers, over all heads of ``[H, S, D]``, once its outliers are gone."""
    ordered = x.transpose(0, 1).flatten(1).sort(-1).values
    count = max(1, round(ordered.shape[1] * OUTLIERS / 2))
    return ordered[None, :, count, None], ordered[None, :, -1 - count, None]


def fit(k_bits: int, v_bits: int, seen: dict[int, Activations], ropes: Ropes) -> CacheFactory:
    """Returns the caches of a model whose layers saw this."""

    def make(index: int, head_dim: int, window: int) -> tuple[KvquantKeys, KvquantValues]:
        layer, rope = seen[index], seen[index].rope
        # Without the first token of each window, which is exact.
        keys, values, k_gradients, v_gradients = (
            torch.cat([before(x)[:, 1:] for x in torch.split(tensor, layer.window, 1)], 1)
            for tensor, before in (
                (layer.keys, rope.undo if rope else as_it_is),
                (layer.values, as_it_is),
                (layer.key_gradients, rope.transposed if rope else as_it_is),
                (layer.value_gradients, as_it_is),
            )
        )
        ends = keys.new_tensor([OUTLIERS / 2, 1 - OUTLIERS / 2])
        low, high = half(torch.quantile(keys, ends, dim=1))[:, :, None]
        k_levels = nuq_levels(_scaled(keys, low, high), k_gradients**2, k_bits)
        v_levels = nuq_levels(_scaled(values, *token_thresholds(values)), v_gradients**2, v_bits)
        heads = len(keys)
        return (
            KvquantKeys(
                k_bits, head_dim, window, levels=k_levels, kv_num_heads=heads, low=low, high=high, index=index,
                ropes=ropes,
            ),
            KvquantValues(v_bits, head_dim, window, levels=v_levels, kv_num_heads=heads),
        )  # fmt: skip

    return make


def as_it_is(x: torch.Tensor) -> torch.Tensor:
    """What stands for RoPE where there is none."""
    return x


def _scaled(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return (x - (high + low) / 2) / ((high - low) / 2).clamp(min=1e-12)


def nuq_levels(scaled: torch.Tensor, fisher: torch.Tensor, bits: int) -> torch.Tensor:
    """Levels ``[2**bits]`` of numbers in [-1, 1], weighted; what is outside does not count.

    With 2 bits moved so that the rounded numbers have the mean and the standard deviation of the numbers.
    """
    inside = scaled.abs() <= 1
    cells = ((scaled[inside].double() + 1) / 2 * _CELLS).long().clamp(0, _CELLS - 1)
    x = (torch.arange(_CELLS, dtype=torch.float64, device=cells.device) + 0.5) / _CELLS * 2 - 1
    weight = torch.bincount(cells, fisher[inside].double(), _CELLS)
    count = torch.bincount(cells, minlength=_CELLS).double()
    levels = lloyd_max(x, weight if float(weight.sum()) > 0 else count, bits, rounds=50)
    if bits == 2:
        rounded = levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
        (mean, std), (mean_r, std_r) = (_moments(y, count) for y in (x, rounded))
        levels = (levels - mean_r) * (std / std_r.clamp(min=1e-12)) + mean
    return levels.float()


def _moments(x: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of numbers that occur ``count`` times."""
    mean = (count * x).sum() / count.sum()
    return mean, ((count * (x - mean) ** 2).sum() / count.sum()).sqrt()
