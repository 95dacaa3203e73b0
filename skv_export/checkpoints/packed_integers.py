"""Matrices of integers in groups that share a scale: GPTQ, AWQ, compressed-tensors, Olive and HQQ."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skv_export.checkpoints.block_weights import OFFSETS, ZERO_POINTS, BlockFormat, BlockMatrix
from skv_export.checkpoints.packed_entry import PackedEntry, PackedFormat, fields
from skv_export.checkpoints.tensor_files import TensorEntry

_LARGEST_BLOCK, _SMALLEST_BLOCK = 128, 16
"""Inputs that share a scale in the graph: MatMulNBits takes powers of two; groups are cut into such blocks."""
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of each nibble of a word, lowest nibble first (AWQ's GEMM version)."""


class _Grouped(BlockMatrix):
    """A matrix whose groups of inputs have a scale and a zero point; its codes are read as ``[N, K]``.

    Args:
        entry: The matrix.
        rows: N.
        inputs: K.
        groups: How many groups of inputs there are.
        group_size: Inputs in each, but maybe the last.
        index: The tensor that names the group of each input, if there is one.
    """

    zeros_are_codes = True
    """Whether every zero point is a number that a code can be."""

    def __init__(
        self, entry: PackedEntry, rows: int, inputs: int, groups: int, group_size: int, index: str = ""
    ) -> None:
        size = _LARGEST_BLOCK
        while size > _SMALLEST_BLOCK and group_size % size:
            size //= 2
        if group_size % size or (groups - 1) * group_size >= inputs or groups * group_size < inputs:
            raise entry.error("groups", f"{groups} of {group_size} for {inputs} inputs", "a multiple of 16 in each")
        self._entry, self._bits, self._index = entry, int(entry.options["bits"]), index
        self._group_size, self._groups = group_size, groups
        reordered = bool(entry.options.get("reordered", index in entry.parts))
        stored = 8 if self._bits == 8 else 4
        name = f"{entry.dtype} {self._bits}-bit"
        zero = "" if entry.options["sym"] else ZERO_POINTS if stored == 4 and self.zeros_are_codes else OFFSETS
        form = BlockFormat(name, stored, size, zero, wide=stored == 8, reordered=reordered)
        super().__init__(entry.name, form, rows, inputs)

    @abstractmethod
    def stored_codes(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Reads the file's codes of some rows, ``[stop - start, K]``."""

    @abstractmethod
    def group_scales(self, start: int, stop: int) -> NDArray[np.float32]:
        """Reads the scales of some rows, ``[stop - start, groups]``."""

    @abstractmethod
    def group_zeros(self, start: int, stop: int) -> NDArray[Any] | None:
        """Reads the zero points of some rows, ``[stop - start, groups]``; None where all are in the middle."""

    @property
    def _moved(self) -> np.uint8:
        """What codes are moved by, so that the middle of 2 bits becomes that of 4."""
        return np.uint8(6 if self._bits == 2 else 0)

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """The inputs group by group: as they are but for those that were quantized in another order."""
        if self._index not in self._entry.parts:
            return np.arange(self.inputs)
        index = self._entry.expect(self._index, (self.inputs,)).array().astype(np.int64)
        outside = int(((index < 0) | (index >= self._groups)).sum())
        if outside:
            raise self._entry.error(
                f"{self._index} names groups that do not exist",
                f"{outside} of {index.size}",
                f"0 ... {self._groups - 1}",
            )
        order = np.argsort(index, kind="stable")
        if not np.array_equal(index[order], np.arange(self.inputs) // self._group_size):
            got = np.bincount(index)[:4].tolist()
            raise self._entry.error(f"{self._index} makes groups of other sizes", got, self._group_size)
        if not self.format.reordered and not np.array_equal(order, np.arange(self.inputs)):
            raise self._entry.error(f"{self._index} reorders inputs", "desc_act false", "desc_act true")
        return order

    def codes(self, start: int, stop: int) -> NDArray[np.uint8]:
        """As ``BlockMatrix`` says; codes of 2 bits are moved to the middle of 4."""
        codes = self.stored_codes(start, stop) + self._moved
        order = self.order
        return codes[:, order] if self.format.reordered else codes

    def scales(self, start: int, stop: int) -> NDArray[np.float32]:
        """As ``BlockMatrix`` says."""
        if not self.format.zero:
            self._middle(start, stop)
        return self._of_blocks(self.group_scales(start, stop))

    def zeros(self, start: int, stop: int) -> NDArray[Any]:
        """As ``BlockMatrix`` says."""
        scales, zeros = self.group_scales(start, stop), self.group_zeros(start, stop)
        if self.format.zero == ZERO_POINTS and zeros is not None:
            return self._of_blocks(zeros.astype(np.uint8) + self._moved)
        if zeros is None:
            return np.zeros_like(self._of_blocks(scales))
        return self._of_blocks(scales * (np.float32(2 ** (self._bits - 1)) - zeros.astype(np.float32)))

    def columns(self) -> NDArray[np.int64]:
        """As ``BlockMatrix`` says."""
        return self.order

    def _middle(self, start: int, stop: int) -> None:
        """Refuses zero points elsewhere where the configuration says that all are in the middle."""
        zeros, middle = self.group_zeros(start, stop), 2 ** (self._bits - 1)
        if zeros is not None and (zeros != middle).any():
            got = sorted(set(zeros[zeros != middle].tolist()))[:4]
            raise self._entry.error("zero points of a symmetric format", got, middle)

    def _of_blocks(self, values: NDArray[Any]) -> NDArray[Any]:
        blocks = np.repeat(values, self._group_size // self.format.block_size, axis=1)
        return blocks[:, : -(-self.inputs // self.format.block_size)]


def _words(entry: TensorEntry) -> NDArray[np.uint32]:
    return entry.array().view(np.uint32)


class _Gptq(_Grouped):
    """``qweight`` int32 ``[K * bits / 32, N]``, ``qzeros`` ``[groups, N * bits / 32]``, ``scales`` ``[groups, N]``.

    Version 1 of the format holds zero points less one: of 4 bits, 16 is one.
    """

    @property
    def zeros_are_codes(self) -> bool:  # type: ignore[override]
        return not (self._entry.options["v1"] and self._bits == 4)

    def __init__(self, entry: PackedEntry) -> None:
        bits, size = int(entry.options["bits"]), int(entry.options["group_size"])
        words, rows = entry.rows_and_columns("qweight")
        inputs = words * 32 // bits
        groups = entry.rows_and_columns("scales")[0]
        super().__init__(entry, rows, inputs, groups, size if size > 0 else inputs, "g_idx")
        entry.expect("scales", (groups, rows))
        entry.expect("qzeros", (groups, rows * bits // 32))

    def stored_codes(self, start: int, stop: int) -> NDArray[np.uint8]:
        return np.ascontiguousarray(fields(_words(self._entry.parts["qweight"])[:, start:stop], self._bits, 0).T)

    def group_scales(self, start: int, stop: int) -> NDArray[np.float32]:
        return self._entry.parts["scales"].array()[:, start:stop].T.astype(np.float32)

    def group_zeros(self, start: int, stop: int) -> NDArray[Any]:
        zeros = fields(_words(self._entry.parts["qzeros"]), self._bits, 1)[:, start:stop].T.astype(np.int16)
        return zeros + 1 if self._entry.options["v1"] else zeros


class _Awq(_Grouped):
    """``qweight`` int32 ``[K, N / 8]``, ``qzeros`` ``[groups, N / 8]``, ``scales`` ``[groups, N]``."""

    def __init__(self, entry: PackedEntry) -> None:
        size = int(entry.options["group_size"])
        inputs, words = entry.rows_and_columns("qweight")
        groups = entry.rows_and_columns("scales")[0]
        super().__init__(entry, 8 * words, inputs, groups, size if size > 0 else inputs)
        entry.expect("scales", (groups, self.rows))
        entry.expect("qzeros", (groups, words))

    def stored_codes(self, start: int, stop: int) -> NDArray[np.uint8]:
        return np.ascontiguousarray(self._columns("qweight", start, stop).T)

    def group_scales(self, start: int, stop: int) -> NDArray[np.float32]:
        return self._entry.parts["scales"].array()[:, start:stop].T.astype(np.float32)

    def group_zeros(self, start: int, stop: int) -> NDArray[Any]:
        return self._columns("qzeros", start, stop).T

    def _columns(self, part: str, start: int, stop: int) -> NDArray[np.uint8]:
        first = start // 8
        found = fields(_words(self._entry.parts[part])[:, first : -(-stop // 8)], 4, 1)
        nibbles = found.reshape(len(found), -1, 8)[:, :, np.argsort(_AWQ_ORDER)]
        return nibbles.reshape(len(found), -1)[:, start - 8 * first : stop - 8 * first]


class _PackQuantized(_Grouped):
    """``weight_packed`` int32 ``[N, K * bits / 32]``, ``weight_scale`` ``[N, groups]``, zero points packed along N."""

    def __init__(self, entry: PackedEntry) -> None:
        bits = int(entry.options["bits"])
        rows, words = entry.rows_and_columns("weight_packed")
        inputs = words * 32 // bits
        scale = entry.parts["weight_scale"].shape if "weight_scale" in entry.parts else ()
        groups = scale[1] if len(scale) == 2 else 1
        super().__init__(entry, rows, inputs, groups, inputs // groups if groups else 0, "weight_g_idx")
        if scale not in ((rows, groups), (1,), (1, 1)):
            raise entry.error("its weight_scale", scale, (rows, groups))
        if not entry.options["sym"]:
            entry.expect("weight_zero_point", (-(-rows * bits // 32), groups))

    def stored_codes(self, start: int, stop: int) -> NDArray[np.uint8]:
        if (shape := self._entry.expect("weight_shape", (2,)).array().tolist()) != [self.rows, self.inputs]:
            raise self._entry.error("its weight_shape", shape, [self.rows, self.inputs])
        entry = self._entry.parts["weight_packed"]
        row = entry.nbytes // self.rows
        data = entry.file.read(entry.start + start * row, entry.start + stop * row)
        words = np.frombuffer(data, np.uint32).reshape(stop - start, -1)
        return fields(words, self._bits, 1)

    def group_scales(self, start: int, stop: int) -> NDArray[np.float32]:
        scales = self._entry.parts["weight_scale"].array().astype(np.float32).reshape(-1, self._groups)
        return np.broadcast_to(scales, (self.rows, self._groups))[start:stop]

    def group_zeros(self, start: int, stop: int) -> NDArray[Any] | None:
        if self._entry.options["sym"]:
            return None
        return fields(_words(self._entry.parts["weight_zero_point"]), self._bits, 0)[start:stop]


class _Olive(_Grouped):
    """``qweight`` uint8 ``[N, K * bits / 8]``, ``scales`` ``[N, groups]``, ``qzeros`` ``[N, groups * bits / 8]``."""

    def __init__(self, entry: PackedEntry) -> None:
        bits, size = int(entry.options["bits"]), int(entry.options["group_size"])
        rows, nbytes = entry.rows_and_columns("qweight")
        inputs = nbytes * 8 // bits
        groups = entry.rows_and_columns("scales")[1]
        super().__init__(entry, rows, inputs, groups, size if size > 0 else inputs)
        if entry.parts["qweight"].dtype != "U8":
            raise entry.error("its qweight", entry.parts["qweight"].dtype, "U8")
        entry.expect("scales", (rows, groups))
        if not entry.options["sym"]:
            entry.expect("qzeros", (rows, -(-groups * bits // 8)))

    def stored_codes(self, start: int, stop: int) -> NDArray[np.uint8]:
        return fields(_file_rows(self._entry.parts["qweight"], start, stop), self._bits, 1)

    def group_scales(self, start: int, stop: int) -> NDArray[np.float32]:
        return self._entry.parts["scales"].array()[start:stop].astype(np.float32)

    def group_zeros(self, start: int, stop: int) -> NDArray[Any] | None:
        if self._entry.options["sym"]:
            return None
        return fields(_file_rows(self._entry.parts["qzeros"], start, stop), self._bits, 1)[:, : self._groups]


def _file_rows(entry: TensorEntry, start: int, stop: int) -> NDArray[np.uint8]:
    """Some rows of a matrix of bytes, read alone."""
    row = entry.shape[1]
    data = entry.file.read(entry.start + start * row, entry.start + stop * row)
    return np.frombuffer(data, np.uint8).reshape(stop - start, row)


class _Hqq(_Grouped):
    """``W_q`` uint8, the groups of all outputs one below the other, ``scale`` and ``zero`` of each: real numbers.

    Of 4 bits, the second half of the groups stands in the low nibbles of the first one's bytes; of 2, quarters.
    """

    zeros_are_codes = False

    def __init__(self, entry: PackedEntry) -> None:
        rows, inputs = hqq_shape(entry)
        size = entry.number("group_size")
        if size < 1 or inputs % size:
            raise entry.error("groups across outputs", f"{size} of {inputs} inputs", "groups of one output each")
        super().__init__(entry, rows, inputs, inputs // size, size)
        for part in ("scale", "zero"):
            if int(np.prod(entry.parts[part].shape if part in entry.parts else ())) != rows * inputs // size:
                raise entry.error(f"its {part}", "other numbers of groups", rows * inputs // size)

    def stored_codes(self, start: int, stop: int) -> NDArray[np.uint8]:
        return _hqq_rows(self._entry)[start * self._groups : stop * self._groups].reshape(stop - start, -1)

    def group_scales(self, start: int, stop: int) -> NDArray[np.float32]:
        return self._of_rows("scale", start, stop)

    def group_zeros(self, start: int, stop: int) -> NDArray[Any]:
        return self._of_rows("zero", start, stop)

    def _of_rows(self, part: str, start: int, stop: int) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._entry.parts[part].array().astype(np.float32).reshape(self.rows, -1)
        return found[start:stop]


def _hqq_rows(entry: PackedEntry) -> NDArray[np.uint8]:
    """The codes as HQQ lays them out, ``[groups, size]`` (axis 1) or ``[size, groups]`` (axis 0)."""
    bits = int(entry.options["bits"])
    packed = np.ascontiguousarray(entry.parts["W_q"].array()).view(np.uint8)  # may be stored as if it were floats
    shifts = range(8 - bits, -1, -bits)
    return np.concatenate([packed >> np.uint8(shift) & np.uint8(2**bits - 1) for shift in shifts])


def hqq_shape(entry: PackedEntry) -> tuple[int, int]:
    """Returns N and K."""
    shape = entry.expect("shape", (2,)).array().astype(np.int64).tolist()
    stored = entry.parts["W_q"].nbytes * 8 // int(entry.options["bits"])
    if min(shape) < 1 or shape[0] * shape[1] != stored:
        raise entry.error("its shape", shape, f"{stored} weights")
    return shape[0], shape[1]


def hqq_matrix(entry: PackedEntry) -> BlockMatrix | None:
    """Returns the codes; None of groups that go over outputs (axis 0), which a graph has no operator for."""
    return _Hqq(entry) if entry.number("axis") == 1 else None


def hqq_dequantized(entry: PackedEntry) -> NDArray[np.float32]:
    """Returns the matrix."""
    shape, codes = hqq_shape(entry), _hqq_rows(entry).astype(np.float32)
    scale, zero = (entry.parts[part].array().astype(np.float32) for part in ("scale", "zero"))
    if any(x.ndim != 2 or x.shape not in ((len(codes), 1), (1, codes.shape[1])) for x in (scale, zero)):
        raise entry.error("its scale and zero", [scale.shape, zero.shape], f"one for each group of {codes.shape}")
    found: NDArray[np.float32] = ((codes - zero) * scale).reshape(shape)
    return found


def _grouped_shape(make: Callable[[PackedEntry], _Grouped]) -> Callable[[PackedEntry], tuple[int, ...]]:
    def shape(entry: PackedEntry) -> tuple[int, ...]:
        matrix = make(entry)
        return matrix.rows, matrix.inputs

    return shape


def _dequantized(make: Callable[[PackedEntry], _Grouped]) -> Callable[[PackedEntry], NDArray[Any]]:
    return lambda entry: make(entry).dequantized()


GPTQ = PackedFormat(
    (".qweight", ".qzeros", ".scales", ".g_idx"), ".weight", _grouped_shape(_Gptq), _dequantized(_Gptq), _Gptq
)
AWQ = PackedFormat((".qweight", ".qzeros", ".scales"), ".weight", _grouped_shape(_Awq), _dequantized(_Awq), _Awq)
OLIVE = PackedFormat(
    (".qweight", ".qzeros", ".scales"), ".weight", _grouped_shape(_Olive), _dequantized(_Olive), _Olive
)
PACK_QUANTIZED = PackedFormat(
    (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx"), ".weight",
    _grouped_shape(_PackQuantized), _dequantized(_PackQuantized), _PackQuantized,
)  # fmt: skip
HQQ = PackedFormat(
    (
        ".W_q", ".scale", ".zero", ".shape", ".nbits", ".group_size", ".axis", ".packing", ".unpack_view_dtype",
        ".view_as_float", ".quant_scale", ".quant_zero", ".compute_dtype", ".offload_meta", ".encoded_state_dict",
        ".stores_quant_config", ".channel_wise", ".optimize", ".round_zero",
    ), ".weight", hqq_shape, hqq_dequantized, hqq_matrix,
)  # fmt: skip
"""What transformers and the library hqq save; beside the first five it holds what the library sets itself to."""
