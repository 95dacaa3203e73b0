"""Matrices that a checkpoint holds quantized in blocks: what of them an exported graph stores, without rounding again.

A block is some neighbouring inputs of one output. Its weights are ``scale * (code - 2 ** (bits - 1)) + offset`` where
the file's own zero is anywhere, or without an offset where it is in the middle, which is what MatMulNBits assumes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skv_export.errors import SkvError

CODES, SCALES, ZERO_POINTS, OFFSETS, COLUMNS = "codes", "scales", "zero_points", "offsets", "columns"
HIGH, LOW = "codes.high", "codes.low"
PARTS = (CODES, HIGH, LOW, SCALES, ZERO_POINTS, OFFSETS, COLUMNS)
"""Tensors that a graph may hold of one matrix."""
ROWS = ".rows"
"""Ends the name of codes that are looked up, ``[N, bytes]``; in the file they are those of the products."""
_WIDTHS = {CODES: 1, HIGH: 2, LOW: 2}
"""What the codes' bits are divided by."""


@dataclass(frozen=True)
class BlockFormat:
    """How a matrix ``[N, K]`` is stored in a graph.

    Attributes:
        name: What the checkpoint calls its format; several may be stored alike.
        bits: Of a code: 4 or 8. Wider than the checkpoint's where MatMulNBits has no such width.
        block_size: Inputs that share a scale.
        zero: Which part says where a block's zero is: ``zero_points`` (a code), ``offsets`` (what is added to the
            weights), or "" where it is the middle of the codes.
        wide: Whether codes take all 8 bits, and not only those below 248.
        planes: Whether 8 bits are held as two times 4, ``16 * (high - 8) + (low - 8)``: MatMulNBits has no fast kernel
            for 8 bits that does not round activations. Of wide codes ``low - 8`` is 8 too little, which the offsets
            make good.
        reordered: Whether blocks are of inputs in another order, which ``columns`` tells.
    """

    name: str
    bits: int
    block_size: int
    zero: str = ""
    wide: bool = False
    planes: bool = False
    reordered: bool = False

    @property
    def codes(self) -> tuple[str, ...]:
        """The parts that hold codes."""
        return (HIGH, LOW) if self.planes else (CODES,)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that the graph holds."""
        more = [self.zero] if self.zero else []
        return *self.codes, SCALES, *more, *([COLUMNS] if self.reordered else [])

    def stored(self, exact: bool) -> BlockFormat:
        """Returns the form for products that do not round activations, if ``exact``, or the form for those that do."""
        if not exact or self.bits != 8:
            return self
        return replace(self, zero=OFFSETS if self.wide or self.zero else "", planes=True)

    def shape(self, part: str, rows: int, inputs: int) -> tuple[int, ...]:
        """Returns the shape of a part as MatMulNBits takes it; offsets are ``[blocks, N]``, to be multiplied with."""
        blocks = -(-inputs // self.block_size)
        if part in _WIDTHS:
            return rows, blocks, self.block_size * self.bits // 8 // _WIDTHS[part]
        return {
            SCALES: (rows, blocks),
            ZERO_POINTS: (rows, -(-blocks * self.bits // 8)),
            OFFSETS: (blocks, rows),
            COLUMNS: (inputs,),
        }[part]

    def nbytes(self, rows: int, inputs: int, parameter_bytes: int) -> int:
        """Returns the bytes of all parts of a matrix ``[rows, inputs]``, with scales and offsets of so many bytes."""
        width = {SCALES: parameter_bytes, OFFSETS: parameter_bytes, COLUMNS: 8}
        return sum(math.prod(self.shape(part, rows, inputs)) * width.get(part, 1) for part in self.parts)

    def weight_bits(self, parameter_bits: int) -> float:
        """Returns the bits that a weight takes, with scales and offsets of so many bits."""
        zero = {ZERO_POINTS: self.bits, OFFSETS: parameter_bits}.get(self.zero, 0)
        return self.bits + (parameter_bits + zero) / self.block_size


class BlockMatrix(ABC):
    """A quantized matrix of a checkpoint, read in runs of rows.

    Attributes:
        name: The checkpoint's name of it, for messages.
        format: How a graph stores it whose products round activations; ``format.stored`` tells the other way.
        rows: N, outputs.
        inputs: K.
        transposed: Whether the model's parameter is ``[K, N]``.
    """

    def __init__(self, name: str, form: BlockFormat, rows: int, inputs: int, transposed: bool = False) -> None:
        self.name, self.format, self.rows, self.inputs, self.transposed = name, form, rows, inputs, transposed

    @abstractmethod
    def codes(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Reads the codes of some rows, ``[stop - start, K]``, one in a byte."""

    @abstractmethod
    def scales(self, start: int, stop: int) -> NDArray[np.float32]:
        """Reads the scales of some rows, ``[stop - start, blocks]``."""

    @abstractmethod
    def zeros(self, start: int, stop: int) -> NDArray[Any]:
        """Reads what ``format.zero`` says of some rows, ``[stop - start, blocks]``."""

    def columns(self) -> NDArray[np.int64]:
        """Reads the order of inputs that ``codes`` has, ``[K]``; only of reordered formats."""
        raise NotImplementedError

    def dequantized(self) -> NDArray[np.float32]:
        """Returns the matrix, ``[N, K]``."""
        form = self.format
        values = self.codes(0, self.rows).astype(np.float32) - np.float32(2 ** (form.bits - 1))
        values *= np.repeat(self.part(SCALES, 0, self.rows), form.block_size, axis=1)[:, : self.inputs]
        if form.zero:
            offsets = self._offsets(0, self.rows, self.scales(0, self.rows))
            values += np.repeat(offsets, form.block_size, axis=1)[:, : self.inputs]
        return values[:, np.argsort(self.columns())] if form.reordered else values

    def part(self, part: str, start: int, stop: int, *, planes: bool = False) -> NDArray[Any]:
        """Returns a part of some rows as the graph stores it; offsets are still ``[stop - start, blocks]``.

        Args:
            part: One of ``PARTS``.
            start: First row.
            stop: The row behind the last one.
            planes: Whether codes of 8 bits are held in two planes.

        Raises:
            SkvError: A scale or an offset is not a number.
        """
        if part == CODES:
            return pack(self._whole_blocks(start, stop), self.format.bits)
        if part in (HIGH, LOW):
            codes = self._whole_blocks(start, stop) + np.uint8(0 if self.format.wide else 8)
            return pack(codes >> 4 if part == HIGH else codes & 15, 4)
        if part == ZERO_POINTS:
            return pack(self.zeros(start, stop), self.format.bits)
        found = self.scales(start, stop)
        if part == OFFSETS:
            found = self._offsets(start, stop, found) + np.float32(8 if planes and self.format.wide else 0) * found
        check_numbers(self.name, part, found)
        return found

    def _whole_blocks(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Codes whose last block is filled up; there is nothing that they are multiplied with."""
        codes = self.codes(start, stop)
        return np.pad(codes, ((0, 0), (0, -self.inputs % self.format.block_size)))

    def _offsets(self, start: int, stop: int, scales: NDArray[np.float32]) -> NDArray[np.float32]:
        """What is added to weights whose zero is taken to be in the middle."""
        if self.format.zero == OFFSETS:
            return self.zeros(start, stop)
        if self.format.zero == ZERO_POINTS:
            return scales * (2.0 ** (self.format.bits - 1) - self.zeros(start, stop).astype(np.float32))
        return np.zeros_like(scales)


def check_numbers(name: str, part: str, values: NDArray[Any]) -> None:
    """Refuses scales, offsets or weights that are infinite or not numbers.

    Raises:
        SkvError: There is one; the message says in which tensor.
    """
    wrong = int(values.size - np.isfinite(values).sum())
    if wrong:
        raise SkvError(
            f"tensor {name!r}: {part}",
            got=f"{wrong} of {values.size} are infinite or not a number",
            expected="numbers",
            fix="The file is damaged, or its quantizer failed: download or make it again.",
        )


def pack(codes: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Packs codes along the last axis into bytes, the first one lowest; an odd one out is filled up with 0."""
    codes = codes.astype(np.uint8, copy=False)
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), np.uint8)], axis=-1)
    packed: NDArray[np.uint8] = codes[..., 0::2] | codes[..., 1::2] << 4
    return packed
