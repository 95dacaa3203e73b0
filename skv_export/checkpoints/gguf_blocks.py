"""ggml's quantized blocks as codes, scales and offsets that MatMulNBits computes with: the same weights, not rounded.

The layouts are those of ggml-common.h. Formats of 5 and 6 bits are held in 8, of 2 and 3 in 4, as MatMulNBits has no
fast kernels for these. Formats whose weights are entries of a table of small integers (IQ4, MXFP4) are integers in 8
bits. Others are dequantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skv_export.checkpoints.block_weights import OFFSETS, BlockFormat, BlockMatrix
from skv_export.checkpoints.tensor_files import TensorEntry

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int16)
_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int16)
"""Twice the numbers of MXFP4's elements (OCP Microscaling Formats 1.0, E2M1)."""


@dataclass(frozen=True)
class _Layout:
    """Where a block's parts are; functions take blocks ``[n, bytes]``.

    Attributes:
        format: How a graph stores the matrix.
        elements: Weights in a block of the file, of one or more scales.
        nbytes: Bytes of such a block.
        codes: Codes ``[n, elements]`` as the graph stores them.
        scales: Scales ``[n, elements / block_size]``.
        minimum: What a stored code of 0 in the file stands for, of each scale; None where there is no offset.
        middle: The file's code that becomes the middle of the graph's.
    """

    format: BlockFormat
    elements: int
    nbytes: int
    codes: Callable[[Bytes], NDArray[Any]]
    scales: Callable[[Bytes], Floats]
    minimum: Callable[[Bytes], Floats] | None = None
    middle: int = 0


def _half(blocks: Bytes, start: int) -> Floats:
    """The float16 at a byte of each block, ``[n, 1]``."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)


def _bits(data: Bytes, shifts: Sequence[int], run: int) -> Bytes:
    """Fields of ``8 / len(shifts)`` bits: of each run of bytes the fields at the first shift, then at the second."""
    mask = np.uint8((1 << 8 // len(shifts)) - 1)
    runs = data.reshape(len(data), -1, 1, run)
    fields: Bytes = (runs >> np.array(shifts, np.uint8).reshape(1, 1, -1, 1) & mask).reshape(len(data), -1)
    return fields


def _nibbles(blocks: Bytes, start: int, count: int, run: int) -> Bytes:
    return _bits(blocks[:, start : start + count], (0, 4), run)


def _fifth(blocks: Bytes, start: int) -> Bytes:
    """The fifth bits of 32 codes, in their place; bit i of four bytes is that of code i."""
    return np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little") << np.uint8(4)


def _fifth_k(blocks: Bytes) -> Bytes:
    """The same of 256 codes of Q5_K: bit i of 32 bytes is that of 32 codes."""
    return _bits(blocks[:, 16:48], range(8), 32) << np.uint8(4)


def _k_parameters(blocks: Bytes) -> tuple[Bytes, Bytes]:
    """The eight scales and eight minima, 6 bits each, in the 12 bytes of Q4_K and Q5_K."""
    low, middle, high = (blocks[:, start : start + 4] for start in (4, 8, 12))
    scales = np.concatenate([low & 63, high & 15 | low >> 2 & 48], axis=1)
    return scales, np.concatenate([middle & 63, high >> 4 | middle >> 2 & 48], axis=1)


def _k_scales(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _k_parameters(blocks)[0]


def _k_minimum(blocks: Bytes) -> Floats:
    return -_half(blocks, 2) * _k_parameters(blocks)[1]


def _q3_scales(blocks: Bytes) -> Floats:
    low, high = _bits(blocks[:, 96:104], (0, 4), 8), _bits(blocks[:, 104:108], (0, 2, 4, 6), 4)
    return _half(blocks, 108) * ((low | high << 4).astype(np.float32) - 32)


def _q3_codes(blocks: Bytes) -> NDArray[Any]:
    return _bits(blocks[:, 32:96], (0, 2, 4, 6), 32) + 4 * _bits(blocks[:, :32], range(8), 32) + 4


def _q6_codes(blocks: Bytes) -> NDArray[Any]:
    return (_nibbles(blocks, 0, 128, 64) | _bits(blocks[:, 128:192], (0, 2, 4, 6), 32) << 4) + np.uint8(96)


def _iq4_scales(blocks: Bytes) -> Floats:
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=-1).reshape(len(blocks), 8)
    high = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    return _half(blocks, 0) * ((low | high << 4).astype(np.float32) - 32)


def _power(blocks: Bytes) -> Floats:
    """Half of the power of two that a byte of MXFP4 stands for; 255 is not a number."""
    exponents = blocks[:, :1].astype(np.float64)
    return np.where(exponents == 255, np.nan, 2.0 ** (exponents - 128)).astype(np.float32)


def _in_8_bits(codes: NDArray[Any], middle: int) -> Bytes:
    """Moves the middle of codes to that of 8 bits."""
    return codes.astype(np.uint8) + np.uint8(128 - middle)


_LAYOUTS: Mapping[str, _Layout] = {
    layout.format.name: layout
    for layout in (
        _Layout(BlockFormat("Q4_0", 4, 32), 32, 18, lambda b: _nibbles(b, 2, 16, 16), lambda b: _half(b, 0)),
        _Layout(
            BlockFormat("Q4_1", 4, 32, OFFSETS), 32, 20,
            lambda b: _nibbles(b, 4, 16, 16), lambda b: _half(b, 0), lambda b: _half(b, 2), 8,
        ),
        _Layout(
            BlockFormat("Q5_0", 8, 32), 32, 22,
            lambda b: _in_8_bits(_nibbles(b, 6, 16, 16) | _fifth(b, 2), 16), lambda b: _half(b, 0),
        ),
        _Layout(
            BlockFormat("Q5_1", 8, 32, OFFSETS), 32, 24,
            lambda b: _in_8_bits(_nibbles(b, 8, 16, 16) | _fifth(b, 4), 16),
            lambda b: _half(b, 0), lambda b: _half(b, 2), 16,
        ),
        _Layout(
            BlockFormat("Q8_0", 8, 32, wide=True), 32, 34, lambda b: b[:, 2:] + np.uint8(128), lambda b: _half(b, 0)
        ),
        _Layout(
            BlockFormat("Q2_K", 4, 16, OFFSETS), 256, 84,
            lambda b: _bits(b[:, 16:80], (0, 2, 4, 6), 32) + np.uint8(8),
            lambda b: _half(b, 80) * (b[:, :16] & 15), lambda b: -_half(b, 82) * (b[:, :16] >> 4),
        ),
        _Layout(BlockFormat("Q3_K", 4, 16), 256, 110, _q3_codes, _q3_scales),
        _Layout(
            BlockFormat("Q4_K", 4, 32, OFFSETS), 256, 144,
            lambda b: _nibbles(b, 16, 128, 32), _k_scales, _k_minimum, 8,
        ),
        _Layout(
            BlockFormat("Q5_K", 8, 32, OFFSETS), 256, 176,
            lambda b: _in_8_bits(_nibbles(b, 48, 128, 32) | _fifth_k(b), 16), _k_scales, _k_minimum, 16,
        ),
        _Layout(
            BlockFormat("Q6_K", 8, 16), 256, 210, _q6_codes,
            lambda b: _half(b, 208) * np.ascontiguousarray(b[:, 192:208]).view(np.int8),
        ),
        _Layout(
            BlockFormat("IQ4_NL", 8, 32), 32, 18,
            lambda b: _IQ4[_nibbles(b, 2, 16, 16)] + 128, lambda b: _half(b, 0),
        ),
        _Layout(
            BlockFormat("IQ4_XS", 8, 32), 256, 136, lambda b: _IQ4[_nibbles(b, 8, 128, 16)] + 128, _iq4_scales
        ),
        _Layout(BlockFormat("MXFP4", 8, 32), 32, 17, lambda b: _E2M1[_nibbles(b, 1, 16, 16)] + 128, _power),
    )
}  # fmt: skip
FORMATS: Mapping[str, BlockFormat] = {name: layout.format for name, layout in _LAYOUTS.items()}
"""How matrices are stored whose codes are kept, by ggml's name of their format."""


class GgufMatrix(BlockMatrix):
    """A matrix of a GGUF file in one of ``FORMATS``.

    Args:
        entry: Where it is, ``[N, K]``.
        order: Row of the file for each row of the matrix; None = as they are.
        transposed: Whether the model's parameter is ``[K, N]``.
    """

    def __init__(self, entry: TensorEntry, order: NDArray[np.int64] | None, transposed: bool) -> None:
        self._layout = _LAYOUTS[entry.dtype]
        super().__init__(entry.name, self._layout.format, entry.shape[0], entry.shape[1], transposed)
        self._entry, self._order = entry, order

    def codes(self, start: int, stop: int) -> NDArray[np.uint8]:
        """As ``BlockMatrix`` says."""
        return self._layout.codes(self._blocks(start, stop)).astype(np.uint8).reshape(stop - start, -1)

    def scales(self, start: int, stop: int) -> NDArray[np.float32]:
        """As ``BlockMatrix`` says."""
        return self._layout.scales(self._blocks(start, stop)).reshape(stop - start, -1)

    def zeros(self, start: int, stop: int) -> NDArray[Any]:
        """As ``BlockMatrix`` says."""
        layout, blocks = self._layout, self._blocks(start, stop)
        assert layout.minimum is not None
        offsets = layout.minimum(blocks) + np.float32(layout.middle) * layout.scales(blocks)
        return offsets.reshape(stop - start, -1)

    def _blocks(self, start: int, stop: int) -> Bytes:
        """The blocks of some rows, one behind the other."""
        row_bytes = self._entry.nbytes // self.rows
        first, last = (start, stop) if self._order is None else (0, self.rows)
        data = self._entry.file.read(self._entry.start + first * row_bytes, self._entry.start + last * row_bytes)
        rows = np.frombuffer(data, np.uint8).reshape(-1, row_bytes)
        chosen = rows if self._order is None else rows[self._order[start:stop]]
        return chosen.reshape(-1, self._layout.nbytes)
