"""Lazy weights: expressions over checkpoint tensors, evaluated in slabs when the graph is saved.

Expressions are compared and renamed without reading any tensor; so the weights of one layer can be mapped to those of
another layer of the same kind.
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from skv_export.checkpoints.block_weights import COLUMNS, OFFSETS, SCALES, BlockFormat, BlockMatrix
from skv_export.errors import SkvError

SLAB_BYTES = 16 << 20
"""Bytes that are converted at a time; memory for much more than that comes from the system anew, page by page."""
_DENSE_BYTES = 1 << 20
"""Bytes that are transposed at a time: they stay in a core's cache."""
EXTERNAL_BYTES = 1024
"""Tensors of at least this size stand in the data file."""
_PAGE_BYTES, _PAGED_BYTES = 4096, 1 << 20
"""Tensors from ``_PAGED_BYTES`` on start at a page, so that a runtime can map them; others at 64 bytes."""

TORCH_TYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT64: torch.int64,
    ir.DataType.BOOL: torch.bool,
}


Item = TypeVar("Item")


class Reader(Protocol):
    """Gives a checkpoint's tensors by the model's names; see ``checkpoint_weights.Weights``."""

    def tensor(self, name: str) -> torch.Tensor:
        """Reads a tensor."""

    def row_blocks(self, name: str, nbytes: int) -> Iterator[torch.Tensor]:
        """Reads a tensor in blocks of rows of about so many bytes, or of one row; each when it is asked for."""

    def quantized(self, name: str) -> BlockMatrix | None:
        """Returns a tensor as the checkpoint holds it quantized, if it does."""

    def release(self) -> None:
        """Releases what was read last; tensors that are still referenced stay valid and are read again if needed."""


class WeightExpr(Protocol):
    """A weight as an expression over the checkpoint's tensors."""

    def slabs(self, reader: Reader) -> Iterator[torch.Tensor]:
        """Computes the tensor, as consecutive pieces of its flattened elements."""

    def renamed(self, rename: Callable[[str], str]) -> WeightExpr:
        """Returns the same expression over other tensors."""


@dataclass(frozen=True)
class Named:
    """A tensor of the checkpoint in the graph's number format, optionally transposed.

    Attributes:
        name: The model's name of it.
        dtype: The number format to store.
        transposed: Whether rows become columns.
    """

    name: str
    dtype: ir.DataType
    transposed: bool = False

    def slabs(self, reader: Reader) -> Iterator[torch.Tensor]:
        """As ``WeightExpr`` says; of a transposed matrix consecutive columns, so that the file is read in order."""
        dtype = TORCH_TYPES[self.dtype]
        for block in reader.row_blocks(self.name, SLAB_BYTES):
            converted = block.to(dtype)
            yield _transposed(converted) if self.transposed else converted
        reader.release()

    def renamed(self, rename: Callable[[str], str]) -> Named:
        """As ``WeightExpr`` says."""
        return Named(rename(self.name), self.dtype, self.transposed)


def _transposed(block: torch.Tensor) -> torch.Tensor:
    """A transposed copy, made in pieces that are dense and fit a core's cache: twice as fast as at once."""
    made = block.new_empty(block.shape[::-1])
    step = max(1, _DENSE_BYTES // (block.shape[0] * block.element_size()))
    for piece, columns in zip(torch.split(made, step), torch.split(block, step, 1), strict=True):
        piece.copy_(columns.contiguous().T)
    return made


@dataclass(frozen=True)
class StoredPart:
    """One part of a matrix that the checkpoint holds quantized.

    Attributes:
        name: The model's name of the matrix.
        format: How the graph stores it.
        part: One of ``block_weights.PARTS``.
        dtype: The number format of scales and offsets.
    """

    name: str
    format: BlockFormat
    part: str
    dtype: ir.DataType

    def slabs(self, reader: Reader) -> Iterator[torch.Tensor]:
        """As ``WeightExpr`` says."""
        matrix = reader.quantized(self.name)
        if matrix is not None and self.part == COLUMNS:
            yield torch.from_numpy(matrix.columns())
            return
        if matrix is None or matrix.format.stored(exact=self.format.planes) != self.format:
            raise SkvError(f"weight {self.name}: not quantized as its layer's others", expected=self.format.name)
        step = max(1, SLAB_BYTES // matrix.inputs)
        slabs = (
            torch.from_numpy(matrix.part(self.part, start, min(start + step, matrix.rows), planes=self.format.planes))
            for start in range(0, matrix.rows, step)
        )
        kept = TORCH_TYPES[self.dtype] if self.part in (SCALES, OFFSETS) else torch.uint8
        if self.part == OFFSETS:  # a 32nd of the matrix, or less
            yield torch.cat(list(slabs)).T.to(kept).contiguous()
        else:
            yield from (slab.to(kept) for slab in slabs)

    def renamed(self, rename: Callable[[str], str]) -> StoredPart:
        """As ``WeightExpr`` says."""
        return dataclasses.replace(self, name=rename(self.name))


@dataclass(frozen=True)
class Constant:
    """A small tensor that no checkpoint holds: ``data`` is a serialized TensorProto."""

    data: bytes

    def slabs(self, reader: Reader) -> Iterator[torch.Tensor]:
        """As ``WeightExpr`` says."""
        yield to_torch(onnx.numpy_helper.to_array(onnx.TensorProto.FromString(self.data)))

    def renamed(self, rename: Callable[[str], str]) -> Constant:
        """As ``WeightExpr`` says."""
        return self


@dataclass(frozen=True)
class Applied:
    """An operator of ONNX on other forms.

    Attributes:
        node: A serialized NodeProto with inputs ``0``, ``1``, ... and output ``y``.
        inputs: What it is applied to, with their shapes; None = left out.
    """

    node: bytes
    inputs: tuple[tuple[WeightExpr, tuple[int, ...]] | None, ...]

    def slabs(self, reader: Reader) -> Iterator[torch.Tensor]:
        """As ``WeightExpr`` says."""
        feeds: dict[str, NDArray[Any]] = {}
        for i, given in enumerate(self.inputs):
            if given is not None:
                form, shape = given
                feeds[str(i)] = _numpy(whole(form, reader).reshape(shape))
        from onnx.reference import ReferenceEvaluator  # takes a tenth of a second to import; few models need it

        (result,) = ReferenceEvaluator(onnx.NodeProto.FromString(self.node)).run(None, feeds)
        yield to_torch(np.ascontiguousarray(result))

    def renamed(self, rename: Callable[[str], str]) -> Applied:
        """As ``WeightExpr`` says."""
        return Applied(self.node, tuple(x and (x[0].renamed(rename), x[1]) for x in self.inputs))


def whole(form: WeightExpr, reader: Reader) -> torch.Tensor:
    """Computes a weight at once: its slabs joined, of a transposed matrix as a matrix, else flattened."""
    slabs = list(form.slabs(reader))
    return torch.cat(slabs, 1) if _is_transposed(form) else torch.cat([slab.reshape(-1) for slab in slabs])


def _is_transposed(form: WeightExpr) -> bool:
    return isinstance(form, Named) and form.transposed


def applied(
    node: ir.Node, tensors: Sequence[ir.TensorProtocol | None], dtype: ir.DataType, shape: ir.Shape
) -> LazyWeight:
    """Returns what a node of ONNX computes from weights and constants, named after the first weight."""
    inputs: list[tuple[WeightExpr, tuple[int, ...]] | None] = []
    for tensor in tensors:
        if tensor is None:
            inputs.append(None)
            continue
        form = tensor.form if isinstance(tensor, LazyWeight) else Constant(_proto(tensor))
        inputs.append((form, tuple(int(n) for n in tensor.shape.numpy())))
    proto = onnx.NodeProto(op_type=node.op_type, input=["" if x is None else str(i) for i, x in enumerate(inputs)])
    proto.output.append("y")
    proto.attribute.extend(ir.to_proto(attribute) for attribute in node.attributes.values())
    first = next(tensor for tensor in tensors if isinstance(tensor, LazyWeight))
    form = Applied(proto.SerializeToString(deterministic=True), tuple(inputs))
    return LazyWeight(form, first.reader, dtype, shape, f"{first.name}.{node.op_type.lower()}")


def _proto(tensor: ir.TensorProtocol) -> bytes:
    array = onnx.numpy_helper.from_array(tensor.numpy())
    return array.SerializeToString(deterministic=True)


def _numpy(tensor: torch.Tensor) -> NDArray[Any]:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ir.DataType.BFLOAT16.numpy())
    return tensor.numpy()


def to_torch(array: NDArray[Any]) -> torch.Tensor:
    """Returns a view of an array; the view of a read-only array must not be written to."""
    if array.dtype == ir.DataType.BFLOAT16.numpy():
        return to_torch(array.view(np.int16)).view(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


class LazyWeight(ir.LazyTensor):
    """A tensor of the graph whose bytes are computed on access.

    Args:
        form: What it is.
        reader: Where its weights come from.
        dtype: Number format.
        shape: Its sizes.
        name: The initializer's name.
    """

    def __init__(self, form: WeightExpr, reader: Reader, dtype: ir.DataType, shape: ir.Shape, name: str) -> None:
        super().__init__(self._whole, dtype=dtype, shape=shape, name=name)
        self.form, self.reader = form, reader

    def _whole(self) -> ir.TensorProtocol:
        data = np.empty(self.nbytes, np.uint8)
        for slab in self.slabs():
            for at, piece in self.places(*slab):
                data[at : at + len(piece)] = piece
        return ir.Tensor(data.view(self.dtype.numpy()).reshape(self.shape.numpy()), dtype=self.dtype, name=self.name)

    def slabs(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Computes the tensor slab by slab, each with the number of bytes before it; see ``places``.

        Raises:
            SkvError: The weights do not make as many bytes as the graph says.
        """
        count = 0
        for slab in self.form.slabs(self.reader):
            if count + slab.nbytes <= self.nbytes:
                yield count, slab.contiguous()
            count += slab.nbytes
        if count != self.nbytes:
            raise SkvError(f"weight {self.name}", got=f"{count} bytes", expected=f"{self.nbytes}")

    def places(self, before: int, slab: torch.Tensor) -> Iterator[tuple[int, memoryview]]:
        """Returns where the bytes of a slab stand in the tensor: in one piece, or of some of its columns row by row."""
        rows = slab.shape[0] if _is_transposed(self.form) and slab.nbytes < self.nbytes else 1
        data = slab.view(-1).view(torch.uint8).numpy().data
        length = slab.nbytes // rows
        for row in range(rows):
            yield before // rows + row * (self.nbytes // rows), data[row * length : (row + 1) * length]


def write_external(model: ir.Model, path: Path, progress: Callable[[float], None]) -> int:
    """Writes the tensors of a graph into a data file, slab by slab, and makes the graph refer to it.

    The file gets its full size first, so that a disk without room for it is noticed before any work.

    Args:
        model: Its initializers become external tensors; small ones are computed and stay in the graph.
        path: The data file.
        progress: Told of the fraction of the bytes that is written.

    Returns:
        Bytes of the file.

    Raises:
        OSError: The disk is full.
        SkvError: The checkpoint does not hold what the graph needs.
    """
    places: list[tuple[ir.Value, ir.TensorProtocol, int]] = []
    first: dict[object, int] = {}
    end = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        if tensor.nbytes < EXTERNAL_BYTES:
            if isinstance(tensor, LazyWeight):
                value.const_value = ir.tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
            continue
        key = (tensor.form, tensor.dtype) if isinstance(tensor, LazyWeight) else value
        if key in first:  # the same bytes in another shape
            places.append((value, tensor, first[key]))
            continue
        alignment = _PAGE_BYTES if tensor.nbytes >= _PAGED_BYTES else 64
        start = math.ceil(end / alignment) * alignment
        places.append((value, tensor, start))
        first[key] = start
        end = start + tensor.nbytes
    with path.open("wb") as file:
        if end:
            os.posix_fallocate(file.fileno(), 0, end)
        done = 0
        for start, pieces in _ahead(_bytes(places)):
            for at, piece in pieces:
                _write_at(file.fileno(), piece, start + at)
                done += len(piece)
            progress(done / end)
    for value, tensor, start in places:
        place = (path.name, start, tensor.nbytes, tensor.dtype)
        shape = ir.Shape(tensor.shape.numpy())
        value.const_value = ir.ExternalTensor(*place, shape=shape, name=str(value.name), base_dir=path.parent)
    return end


def _bytes(
    places: Sequence[tuple[ir.Value, ir.TensorProtocol, int]],
) -> Iterator[tuple[int, Iterator[tuple[int, memoryview]]]]:
    """Computes what stands in the data file: pieces of tensors, beside where in the file each tensor starts."""
    first: dict[int, ir.TensorProtocol] = {}
    for _, tensor, start in places:  # tied weights share a place
        first.setdefault(start, tensor)
    for start, tensor in first.items():
        if isinstance(tensor, LazyWeight):
            for slab in tensor.slabs():
                yield start, tensor.places(*slab)
        else:
            yield start, iter([(0, memoryview(tensor.tobytes()))])


def _write_at(descriptor: int, data: memoryview, place: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, place)
        data, place = data[count:], place + count


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Iterates, while another thread computes the next item."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
