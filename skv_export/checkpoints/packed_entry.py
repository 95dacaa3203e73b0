"""A matrix that several tensors of a checkpoint stand for, and what a format of such matrices is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skv_export.checkpoints.block_weights import BlockMatrix, check_numbers
from skv_export.checkpoints.tensor_files import TensorEntry, split_rows
from skv_export.errors import SkvError

Entries = Mapping[str, TensorEntry]


@dataclass(frozen=True)
class PackedFormat:
    """A format of matrices.

    Attributes:
        suffixes: Ends of the names of its tensors; the first one names a matrix.
        weight: What takes the first suffix' place in the matrix's name.
        shape: Shape of the model's parameter.
        dequantize: Its numbers.
        matrix: Its codes for a graph; None where a graph can't hold them.
    """

    suffixes: tuple[str, ...]
    weight: str
    shape: Callable[[PackedEntry], tuple[int, ...]]
    dequantize: Callable[[PackedEntry], NDArray[Any]]
    matrix: Callable[[PackedEntry], BlockMatrix | None] = lambda _: None


@dataclass(frozen=True)
class PackedEntry(TensorEntry):
    """A matrix that several tensors of the file stand for; ``dtype`` says in which format.

    Attributes:
        parts: These tensors, by the last part of their names.
        options: What ``quantization_config`` says of them.
        packing: The format.
        transposed: Whether the model's parameter is ``[K, N]``, as GPT-2's are, and the file's matrix is not.
    """

    parts: Entries
    options: Mapping[str, Any]
    packing: PackedFormat
    transposed: bool = False

    @classmethod
    def of(cls, name: str, kind: str, packing: PackedFormat, parts: Entries, options: Mapping[str, Any],
           transposed: bool) -> PackedEntry:  # fmt: skip
        """Makes an entry whose parts were found to be of one matrix.

        Raises:
            SkvError: They are not.
        """
        first = next(iter(parts.values()))
        end = first.start + sum(entry.nbytes for entry in parts.values())
        entry = cls(name, kind, (), first.file, first.start, end, parts, options, packing, transposed)
        shape = packing.shape(entry)
        return replace(entry, shape=shape[::-1] if transposed else shape)

    def array(self) -> NDArray[Any]:
        """Returns the matrix dequantized, as float32."""
        dequantized = self.packing.dequantize(self)
        check_numbers(self.name, "weights", dequantized)
        return np.ascontiguousarray(dequantized.T) if self.transposed else dequantized

    def row_blocks(self, nbytes: int) -> Iterator[NDArray[Any]]:
        """As ``TensorEntry`` says; it is dequantized at once."""
        return split_rows(self.array(), nbytes)

    def blocks(self) -> BlockMatrix | None:
        """Returns the matrix as a graph holds it; None where it can't be held but dequantized."""
        made = self.packing.matrix(self)
        if made is not None:
            made.transposed = self.transposed
        return made

    def error(self, what: str, got: object, expected: object) -> SkvError:
        """Returns an error about this matrix."""
        fix = "The file is damaged, or config.json's quantization_config is another checkpoint's."
        return SkvError(f"tensor {self.name!r} ({self.dtype}): {what}", got=got, expected=expected, fix=fix)

    def expect(self, part: str, shape: tuple[int, ...]) -> TensorEntry:
        """Returns a tensor of the group; refuses one of another shape."""
        if part not in self.parts or self.parts[part].shape != shape:
            got = self.parts[part].shape if part in self.parts else "none"
            raise self.error(f"its {part}", got, shape)
        return self.parts[part]

    def rows_and_columns(self, part: str) -> tuple[int, int]:
        """Returns the shape of a part that must be a matrix."""
        shape = self.parts[part].shape if part in self.parts else ()
        if len(shape) != 2:
            raise self.error(f"its {part}", shape or "none", "two dimensions")
        return shape[0], shape[1]

    def number(self, part: str) -> int:
        """Returns a whole number that a tensor of the group holds, or that ``options`` has under that name."""
        if part in self.parts:
            found = self.parts[part].array().reshape(-1)
            if len(found) == 1:
                return int(found[0])
        elif type(self.options.get(part)) is int:
            return int(self.options[part])
        raise self.error(f"its {part}", "none" if part not in self.parts else f"{found.tolist()[:4]}", "a number")


def fields(words: NDArray[Any], bits: int, axis: int) -> NDArray[np.uint8]:
    """Returns the fields of words, of bytes too, lowest first, along an axis of a matrix."""
    width = 8 * words.itemsize
    shifts, mask = np.arange(0, width, bits, dtype=words.dtype), words.dtype.type(2**bits - 1)
    if axis == 0:
        return (words[:, None, :] >> shifts[:, None] & mask).astype(np.uint8).reshape(-1, words.shape[1])
    return (words[:, :, None] >> shifts & mask).astype(np.uint8).reshape(len(words), -1)
