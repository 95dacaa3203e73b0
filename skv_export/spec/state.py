"""Recurrent states: what layers without keys and values keep of all earlier tokens, of one size whatever the length."""

from __future__ import annotations

import math
from dataclasses import dataclass

from skv_export.errors import SkvError

CONV, RECURRENT = "conv", "recurrent"
"""Names of states: the last inputs of a causal convolution; the matrix of a linear-attention or state-space layer."""
MAX_SIZE = 1 << 24
"""Numbers along one dimension."""
MAX_LAYER = 1 << 16


@dataclass(frozen=True)
class LayerState:
    """One state of one layer: float32, zeros before the first token.

    Attributes:
        layer: The layer's number in the model.
        name: ``CONV`` or ``RECURRENT``.
        shape: Of one sequence: ``[channels, kernel - 1]``, or ``[heads, key channels, value channels]``.

    Raises:
        SkvError: No such layer, name or shape.
    """

    layer: int
    name: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if type(self.layer) is not int or not 0 <= self.layer <= MAX_LAYER:
            raise SkvError("state: layer", got=str(self.layer)[:50], expected=f"0 ... {MAX_LAYER}")
        if self.name not in (CONV, RECURRENT):
            raise SkvError(f"state of layer {self.layer}", got=str(self.name)[:50], expected=f"{CONV} or {RECURRENT}")
        if not self.shape or not all(type(size) is int and 1 <= size <= MAX_SIZE for size in self.shape):
            raise SkvError(
                f"state {self.name} of layer {self.layer}: shape", got=str(self.shape)[:50], expected="sizes"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of one sequence."""
        return 4 * math.prod(self.shape)
