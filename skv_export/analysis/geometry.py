"""The score `geometry`: predicts from weights alone the error of the attention output under b-bit keys or values.

docs/theory.md derives it. In short: a key's error changes a logit by ``scale * sqrt(sum_d E[q_d^2] * error_d)``, and
the output by that fraction of the values' spread; a value's error changes the output directly. Rescaling W_Q against
W_K, or W_V against W_O, changes none of these.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from skv_export.checkpoints.attention_weights import AttentionConfig, AttentionWeights
from skv_export.spec.recipe import LayerConfig

Float = npt.NDArray[np.float32]
Double = npt.NDArray[np.float64]

MIDRISE_ERROR = {1: 0.5623, 2: 0.1281, 3: 0.03535, 4: 0.01019, 5: 0.002994, 6: 0.000887, 8: 0.0000757, 16: 0.0}
"""Relative error of a Gaussian vector under the reference's ``token`` quantizer in groups of 64, by bits."""
RANGE_SQUARE = {32: 17.6, 64: 22.4, 128: 27.3}
"""E[(max - min)^2] of T independent N(0, 1), by T."""
MAX_LOGIT_VARIANCE = 15.0
"""Variance of one query's logits beyond which isotropic inputs say nothing any more: one token would take the whole
softmax, which it hardly does in real text (docs/theory.md)."""
REFERENCE_BITS = 4
"""Bits at which the balance of keys and values is stated."""
_TINY = 1e-300
_TOKENS = 1024
_NORMAL = np.array([NormalDist().inv_cdf((i + 0.5) / _TOKENS) for i in range(_TOKENS)])


@dataclass(frozen=True)
class Geometry:
    """Expected attention-output error of one layer over the output's energy (squared norms), mean over its heads.

    Attributes:
        k_error: By key bits, values exact.
        v_error: By value bits, keys exact.
        logit_variance: Of the logits of one query, mean over heads.
        spread: How much of the values' energy a moved logit can move: 1 = flat softmax, 0 = one token takes all.
        k_bias_ratio: Energy of the keys' constant part over their varying part.
        q_norm: Whether queries are normalized after the projection.
        k_norm: Whether keys are.
    """

    k_error: dict[int, float]
    v_error: dict[int, float]
    logit_variance: float
    spread: float
    k_bias_ratio: float
    q_norm: bool
    k_norm: bool

    @property
    def balance(self) -> float:
        """``k_bits - v_bits`` at which keys and values cause equal errors."""
        return balance(self.k_error, self.v_error)


def balance(k_error: dict[int, float], v_error: dict[int, float]) -> float:
    """Half log2 of the error of 4-bit keys over that of 4-bit values: the extra bits that keys need."""
    return 0.5 * float(np.log2(max(k_error[REFERENCE_BITS], _TINY) / max(v_error[REFERENCE_BITS], _TINY)))


def geometry(weights: AttentionWeights, config: AttentionConfig, cache: LayerConfig) -> Geometry:
    """Predicts the errors of one layer from its weights.

    Args:
        weights: The layer; its projections float32.
        config: Heads, scale, softcap, RoPE.
        cache: Granularities and tile; its bits do not matter.
    """
    n, n_kv = config.num_attention_heads, config.num_key_value_heads
    gain = weights.norm if weights.norm is not None else np.ones(weights.q.shape[1], np.float32)
    q, k, v = (_Projection.of(w, b, gain, weights.norm_bias, h) for w, b, h in _parts(weights, n, n_kv))
    q, k = q.normalized(weights.q_norm), k.normalized(weights.k_norm)
    group = n // n_kv

    variance = config.scale**2 * q.overlaps(k)
    spread, weight2, slope = np.array([_softmax(min(x, MAX_LOGIT_VARIANCE), config.softcap) for x in variance]).T
    key_errors = [_key_error(k, i, config, cache) for i in range(n_kv)]
    moved = [float(_rope_mean(q.energy[i], config.rotary_dim) @ key_errors[i // group]) for i in range(n)]
    noise = config.scale**2 * slope * np.array(moved)
    v_varying, v_energy = (np.repeat(x.sum(axis=1), group) for x in (v.varying, v.energy))
    output = np.maximum(v_energy - v_varying + weight2 * v_varying, _TINY)
    k_unit = float(np.mean(noise * spread * weight2 * v_varying / output))
    v_unit = float(np.mean(weight2 * v_energy * _value_unit(v, cache, group) / output))
    tile = cache.tile_tokens
    return Geometry(
        k_error={b: _saturated(k_unit * e) for b, e in _curve(cache.k_granularity, tile).items()},
        v_error={b: v_unit * e for b, e in _curve(cache.v_granularity, tile).items()},
        logit_variance=float(variance.mean()),
        spread=float(spread.mean()),
        k_bias_ratio=float((k.energy - k.varying).sum() / max(k.varying.sum(), _TINY)),
        q_norm=weights.q_norm is not None,
        k_norm=weights.k_norm is not None,
    )


def _parts(w: AttentionWeights, n: int, n_kv: int) -> list[tuple[Float, Float | None, int]]:
    return [(w.q, w.q_bias, n), (w.k, w.k_bias, n_kv), (w.v, w.v_bias, n_kv)]


def grid_error(bits: int, tile_tokens: int) -> float:
    """Mean squared error of a ``channel`` quantizer over the squared range of its tile.

    A uniform grid's error. From three bits on the two extreme tokens are exact; below, levels are the middles of equal
    cells, and theirs is three times the others' (half a cell, squared).
    """
    if bits == 16:
        return 0.0
    if bits > 2:
        return (1 - 2 / tile_tokens) / (12 * (2**bits - 1) ** 2)
    return (1 + 4 / tile_tokens) / (12 * 4**bits)


def _curve(granularity: str, tile_tokens: int) -> dict[int, float]:
    """Error by bits, in units of the granularity: of the vector's energy (per token) or squared range (channel)."""
    return MIDRISE_ERROR if granularity != "channel" else {b: grid_error(b, tile_tokens) for b in MIDRISE_ERROR}


def _saturated(error: float) -> float:
    """First order up to about 1, then towards 2: the distance of two unrelated outputs of equal size."""
    return 2 * (1 - float(np.exp(-error / 2)))


@dataclass(frozen=True)
class _Projection:
    """Second moments of one projection's outputs, for isotropic unit inputs.

    Attributes:
        raw: ``[heads, D, hidden]``, as stored; a scaled copy of all of it is never made.
        gain: ``[hidden]``, the input norm's weight.
        factor: ``[heads, D]``, factor of the output norm for each channel.
        varying: ``[heads, D]``, variance per channel.
        mean: ``[heads, D]``, constant part per channel.
    """

    raw: Float
    gain: Float
    factor: Double
    varying: Double
    mean: Double

    @property
    def energy(self) -> Double:
        return self.varying + self.mean**2

    @classmethod
    def of(cls, weight: Float, bias: Float | None, gain: Float, shift: Float | None, heads: int) -> _Projection:
        mean = np.zeros(weight.shape[0]) if bias is None else bias.astype(np.float64)
        if shift is not None:
            mean = mean + weight @ shift
        raw = weight.reshape(heads, -1, weight.shape[1])
        varying = np.array([(head**2) @ (gain**2) for head in raw], np.float64)
        return cls(raw, gain, np.ones_like(varying), varying, mean.reshape(heads, -1))

    def normalized(self, weight: Float | None) -> _Projection:
        """After an RMS norm of each head (or of all heads together) with this weight."""
        if weight is None:
            return self
        heads, d = self.varying.shape
        energy = self.energy.mean(axis=1, keepdims=True) if weight.size == d else self.energy.mean(keepdims=True)
        factor = np.broadcast_to(weight.reshape(-1, d), (heads, d)) / np.sqrt(np.maximum(energy, _TINY))
        return replace(self, factor=factor, varying=self.varying * factor**2, mean=self.mean * factor)

    def covariance(self, heads: slice) -> Double:
        """``[heads, D, D]``: how the channels of these heads' outputs vary together."""
        raw, factor = self.raw[heads], self.factor[heads]
        grams = np.stack([(head * self.gain) @ (head * self.gain).T for head in raw]).astype(np.float64)
        return grams * factor[:, :, None] * factor[:, None, :]

    def overlaps(self, keys: _Projection) -> Double:
        """``[N]``: variance of the dot product of a query with a key of another token.

        ``E (q.k)^2 = tr(E[q q^T] Cov[k])``: the constant part of queries counts, that of keys moves all logits alike.
        """
        group = len(self.raw) // len(keys.raw)
        found = []
        for head in range(len(keys.raw)):
            mine = slice(head * group, (head + 1) * group)
            key = keys.covariance(slice(head, head + 1))[0]
            constant = self.mean[mine]
            found.append(np.einsum("gij,ij->g", self.covariance(mine), key) + ((constant @ key) * constant).sum(1))
        return np.concatenate(found)


def _rope_mean(energy: Double, rotary_dim: int) -> Double:
    """Energy per channel after RoPE, mean over positions: each pair shares its energy."""
    half = rotary_dim // 2
    if not half:
        return energy
    pair = (energy[:half] + energy[half:rotary_dim]) / 2
    return np.concatenate([pair, pair, energy[rotary_dim:]])


def _key_error(k: _Projection, head: int, config: AttentionConfig, cache: LayerConfig) -> Double:
    """``[D]``: squared error per channel of a key, in units of ``_curve``."""
    if cache.k_granularity != "channel":
        energy = _rope_mean(k.energy[head], config.rotary_dim)
        return np.full_like(energy, energy.mean()) if cache.k_rotation == "hadamard" else energy
    squared = RANGE_SQUARE[cache.tile_tokens] * _rope_mean(k.varying[head], config.rotary_dim)
    half = config.rotary_dim // 2
    if half:
        # A constant pair turns by f * T within a tile and sweeps a chord of the circle it moves on.
        frequency = config.rope_theta ** (-np.arange(half) / half)
        chord = 2 * np.sin(np.minimum(frequency * cache.tile_tokens, np.pi) / 2)
        radius2 = k.mean[head, :half] ** 2 + k.mean[head, half : 2 * half] ** 2
        squared[: 2 * half] += np.tile(radius2 * chord**2, 2)
    return squared


def _value_unit(v: _Projection, cache: LayerConfig, group: int) -> Double | float:
    """``[N]``: a value's error per energy, in units of ``_curve``."""
    if cache.v_granularity != "channel":
        return 1.0
    return np.repeat(
        RANGE_SQUARE[cache.tile_tokens] * v.varying.sum(axis=1) / np.maximum(v.energy.sum(axis=1), _TINY), group
    )


def _softmax(variance: float, softcap: float) -> tuple[float, float, float]:
    """Spread, sum of squared weights and mean squared slope of the softcap, for Gaussian logits of this variance.

    The logits stand at the quantiles of a normal distribution over 1,024 tokens. For values independent of the weights,
    ``sum_j p_j^2 E|v_j - o|^2 = |v|^2 * sum_j p_j^2 (1 - 2 p_j + sum_i p_i^2)``.
    """
    logits = np.sqrt(variance) * _NORMAL
    slope = 1.0
    if softcap > 0:
        slope = float(np.mean(1 / np.cosh(logits / softcap) ** 4))
        logits = softcap * np.tanh(logits / softcap)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    p2 = float((p**2).sum())
    return 1 - 2 * float((p**3).sum()) / p2 + p2, p2, slope
