"""Calibrated keys: the basis in which a layer's tiles of keys are quantized, and how it is applied, in numpy float32;
normative (docs/spec.md, Calibrated keys).

Tiles hold keys in a basis of their own, ``y = k @ key``; an error that a channel's code makes is shifted into the
channels that are quantized after it (``feedback``). A query meets tiles as ``q @ query``, and full-precision rows as it
is. Where the constants come from is ``calibration``'s matter: here they are any finite matrices.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skv_export.errors import SkvError
from skv_export.spec.layout import CacheLayout

Float = NDArray[np.float32]

_LARGEST = np.float32(65504)
"""Of a channel in a tile's basis: what float16 scales and offsets reach."""


@dataclass(frozen=True, eq=False)
class KeyBasis:
    """One layer's constants, float32 ``[N_kv, D, D]`` each, D as padded; channels that pad a head pass unchanged.

    Attributes:
        key: Takes a key, as a row, into the basis of the tiles.
        query: The inverse of ``key``, transposed: takes a query there, so that products stay what they are.
        feedback: Row j says how much of channel j's error is added to each channel before it; on and above the
            diagonal 0.

    Raises:
        SkvError: A matrix has another shape or type than the others, or numbers that are not finite.
    """

    key: Float
    query: Float
    feedback: Float

    def __post_init__(self) -> None:
        for name in MATRICES:
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name)))
            matrix: Float = getattr(self, name)
            what = f"key basis: {name}"
            if matrix.dtype != np.float32 or matrix.ndim != 3 or matrix.shape[1] != matrix.shape[2]:
                raise SkvError(what, got=f"{matrix.dtype} {list(matrix.shape)}", expected="float32 [N_kv, D, D]")
            if matrix.shape != self.key.shape:
                raise SkvError(what, got=list(matrix.shape), expected=f"{list(self.key.shape)}, as key has")
            if not np.isfinite(matrix).all():
                raise SkvError(what, got="numbers that are not finite", expected="finite ones")

    @property
    def digest(self) -> str:
        """SHA-256 of the constants."""
        return hashlib.sha256(b"".join(getattr(self, name).tobytes() for name in MATRICES)).hexdigest()

    def check(self, layout: CacheLayout, kv_num_heads: int) -> None:
        """Raises SkvError where keys of this layout and so many heads can't have this basis."""
        if not can_be_calibrated(layout):
            form = f"{layout.bits} bits, granularity {layout.granularity}, rotation {layout.rotation}"
            expected = "fewer than 16 bits, granularity channel, rotation none"
            raise SkvError("calibrated keys", got=form, expected=expected)
        shape = (kv_num_heads, layout.padded_dim, layout.padded_dim)
        if self.key.shape != shape:
            raise SkvError("key basis: shape", got=list(self.key.shape), expected=list(shape))

    def to_tile(self, keys: Float) -> Float:
        """Keys ``[N_kv, ..., D]`` in the basis of the tiles, saturated at float16's largest number.

        The sum over a key's channels runs from the first to the last, each product and sum rounded by itself.
        """
        y = _products(keys, self.key)
        y = np.where(y > -_LARGEST, y, -_LARGEST)  # of what is not a number, the lower end
        saturated: Float = np.where(y < _LARGEST, y, _LARGEST)
        return saturated

    def from_tile(self, content: Float) -> Float:
        """Inverse of ``to_tile`` but for rounding: what a tile holds, in the model's basis."""
        return _products(content, self.query.swapaxes(-1, -2))


MATRICES = ("key", "query", "feedback")
"""Fields of ``KeyBasis``."""
INPUTS = ("key_basis", "query_basis", "key_feedback")
"""The op's inputs that these are, in the same order."""


def can_be_calibrated(layout: CacheLayout) -> bool:
    """Whether tiles of this layout can have a basis of their own: quantized keys, per channel, not rotated."""
    return not layout.is_value and layout.bits != 16 and layout.granularity == "channel" and layout.rotation == "none"


def _products(rows: Float, matrices: Float) -> Float:
    """Rows ``[N_kv, ..., D]`` times their head's matrix ``[N_kv, D, D]``, summed channel by channel in order."""
    heads, dim = matrices.shape[:2]
    channels = np.ascontiguousarray(rows.reshape(heads, -1, dim).transpose(0, 2, 1))
    sums = np.zeros_like(channels)
    with np.errstate(over="ignore", invalid="ignore"):  # huge numbers saturate later
        for channel in range(dim):
            sums += matrices[:, channel, :, None] * channels[:, channel, None, :]
    return np.ascontiguousarray(sums.transpose(0, 2, 1)).reshape(rows.shape)
