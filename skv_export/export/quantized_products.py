"""Products with quantized weights in a graph: MatMulNBits in place of MatMul, GatherBlockQuantized in place of Gather.

Their kernels are part of ONNX Runtime. Weights are rounded here (``weight_quantization``), or stand in the checkpoint
quantized already. MatMulNBits has no offsets that are other than multiples of the scale: a block's offset times the sum
of its inputs is added, ``x @ W = MatMulNBits(x) + sums(x) @ offsets``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from skv_export.checkpoints.block_weights import COLUMNS, OFFSETS, ROWS, SCALES, ZERO_POINTS, BlockFormat
from skv_export.export.lazy_weights import LazyWeight, Named, StoredPart, WeightExpr
from skv_export.export.weight_quantization import Rounded, rounded_format
from skv_export.model_folder.names import LOGITS
from skv_export.spec.recipe import AS_IS, Recipe

MICROSOFT = "com.microsoft"
_ROUTER_REACH = 6
"""Nodes between a router's product and the TopK that picks experts, at most."""
_ROUTER_STEPS = ("Add", "Cast", "Div", "Identity", "Mul", "Reshape", "Sigmoid", "Softmax", "Unsqueeze")


def quantize_graph(graph: ir.Graph, recipe: Recipe) -> None:
    """Replaces a decoder's matrix products by operators on quantized weights, as the recipe specifies.

    Left as they are: routers, whose few rows decide which experts run, and experts, which are gathered, not multiplied.
    """
    if not recipe.weight_bits and recipe.weights != AS_IS:
        return
    products, head = _Products(graph, recipe), _head(graph)
    for node in tuple(graph):
        if node.domain:
            continue
        if node.op_type in ("MatMul", "Gemm") and not _picks_experts(node):
            if recipe.quantize_head or node is not head:
                products.multiply(node)
        elif node.op_type == "Gather" and (recipe.quantize_embeddings or recipe.weights == AS_IS):
            products.look_up(node)
    for name, value in tuple(graph.initializers.items()):
        if not value.uses() and isinstance(value.const_value, LazyWeight):
            del graph.initializers[name]


def _head(graph: ir.Graph) -> ir.Node | None:
    """The product with the output embedding: the last one before the logits."""
    (value,) = (v for v in graph.outputs if v.name == LOGITS)
    node = value.producer()
    while node is not None and node.op_type not in ("MatMul", "Gemm"):
        node = next((v.producer() for v in node.inputs if v is not None and v.producer() is not None), None)
    return node


def _picks_experts(node: ir.Node) -> bool:
    """Whether a product feeds a TopK, as a router's does."""
    reached = [node]
    for _ in range(_ROUTER_REACH):
        reached = [use.node for one in reached for output in one.outputs for use in output.uses()]
        if any(one.op_type == "TopK" for one in reached):
            return True
        reached = [one for one in reached if one.op_type in _ROUTER_STEPS]
    return False


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """A matrix ``[N, K]`` that the graph is to hold quantized.

    Attributes:
        tensor: The graph's weight of it.
        format: How it is stored.
        part: The expression of each of its parts.
        rows: N.
        inputs: K.
    """

    tensor: LazyWeight
    format: BlockFormat
    part: Callable[[str], WeightExpr]
    rows: int
    inputs: int


class _Products:
    """Rewrites the products of a graph, one at a time, in the graph's order."""

    def __init__(self, graph: ir.Graph, recipe: Recipe) -> None:
        self._graph, self._recipe = graph, recipe
        self._sums: dict[tuple[ir.Value, int], ir.Value] = {}

    def multiply(self, node: ir.Node) -> None:
        """Replaces a product with a stored matrix."""
        x, weight, bias = (*node.inputs, None)[:3]
        matrix = self._matrix(weight, rows=node.op_type == "Gemm" and bool(node.attributes.get_int("transB", False)))
        plain = all(node.attributes.get_float(name, 1.0) == 1 for name in ("alpha", "beta"))
        if matrix is None or x is None or not plain or node.attributes.get_int("transA", False):
            return
        form, zeros = matrix.format, None
        if form.zero == ZERO_POINTS:
            zeros = self._initializer(matrix, ZERO_POINTS)
        attributes = {"N": matrix.rows, "K": matrix.inputs, "bits": 4 if form.planes else form.bits}
        attributes |= {"block_size": form.block_size, "accuracy_level": 1 if self._recipe.exact_products else 4}
        made = []
        rank = 2 if node.op_type == "Gemm" or x.shape is None else len(x.shape)
        if form.reordered:
            reordered = ir.node("Gather", [x, self._initializer(matrix, COLUMNS)], {"axis": -1})
            self._graph.insert_before(node, [reordered])
            x = reordered.outputs[0]
        for part in form.codes:
            last = part == form.codes[-1]
            inputs = [x, self._initializer(matrix, part), self._initializer(matrix, SCALES), zeros, None]
            inputs.append(bias if last else None)
            while inputs[-1] is None:
                inputs.pop()
            made.append(ir.node("MatMulNBits", inputs, attributes, domain=MICROSOFT))
        self._join_planes(matrix, made)
        if form.zero == OFFSETS:
            sums = self._block_sums(node, x, rank, form.block_size)
            product = made[-1].outputs[0]
            made.append(ir.node("MatMul", [sums, self._initializer(matrix, OFFSETS)]))
            made.append(ir.node("Add", [product, made[-1].outputs[0]]))
        _replace(self._graph, node, made)

    def _join_planes(self, matrix: _Matrix, made: list[ir.Node]) -> None:
        """Adds what joins the results of the two planes, the high one first."""
        if matrix.format.planes:
            high, low = (node.outputs[0] for node in made)
            made.append(ir.node("Mul", [high, self._sixteen(matrix.tensor.dtype)]))
            made.append(ir.node("Add", [made[-1].outputs[0], low]))

    def look_up(self, node: ir.Node) -> None:
        """Replaces a selection of rows of a stored matrix."""
        table, ids = node.inputs
        matrix = self._matrix(table, rows=True)
        if matrix is None or matrix.format.reordered or node.attributes.get_int("axis", False):
            return
        form = matrix.format
        zeros = [self._initializer(matrix, ZERO_POINTS)] if form.zero == ZERO_POINTS else []
        attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": form.block_size}
        attributes["bits"] = 4 if form.planes else form.bits
        made = []
        for part in form.codes:
            inputs = [self._rows(matrix, part), ids, self._initializer(matrix, SCALES), *zeros]
            made.append(ir.node("GatherBlockQuantized", inputs, attributes, domain=MICROSOFT))
        self._join_planes(matrix, made)
        if form.zero == OFFSETS:
            blocks = self._ints(0, 0, -1, form.block_size)
            offsets = [ir.node("Gather", [self._initializer(matrix, OFFSETS), ids], {"axis": 1})]
            offsets.append(ir.node("Transpose", [offsets[-1].outputs[0]], {"perm": [1, 2, 0]}))
            offsets.append(ir.node("Unsqueeze", [offsets[-1].outputs[0], self._ints(-1)]))
            rows = ir.node("Reshape", [made[-1].outputs[0], blocks])
            moved = ir.node("Add", [rows.outputs[0], offsets[-1].outputs[0]])
            whole = ir.node("Reshape", [moved.outputs[0], self._ints(0, 0, matrix.inputs)])
            made += [*offsets, rows, moved, whole]
        _replace(self._graph, node, made)

    def _matrix(self, value: ir.Value | None, rows: bool) -> _Matrix | None:
        """Returns a stored matrix; ``rows`` tells whether the graph has it as ``[N, K]``."""
        tensor = value.const_value if value is not None else None
        if not isinstance(tensor, LazyWeight) or not isinstance(tensor.form, Named) or len(tensor.shape) != 2:
            return None
        form = tensor.form if rows else dataclasses.replace(tensor.form, transposed=not tensor.form.transposed)
        count, inputs = tensor.shape.numpy()[:: 1 if rows else -1]
        if bits := self._recipe.weight_bits:
            return _Matrix(tensor, rounded_format(bits), lambda part: Rounded(form, count, bits, part), count, inputs)
        held = tensor.reader.quantized(form.name)
        if held is None or held.transposed != form.transposed:
            return None
        stored, dtype = held.format.stored(self._recipe.exact_products), tensor.dtype
        return _Matrix(tensor, stored, lambda part: StoredPart(form.name, stored, part, dtype), count, inputs)

    def _initializer(self, matrix: _Matrix, part: str) -> ir.Value:
        """Returns a part of a matrix; that of a tied one is created once."""
        shape = matrix.format.shape(part, matrix.rows, matrix.inputs)
        return self._stored(f"{matrix.tensor.name}.{part}", matrix, part, shape)

    def _rows(self, matrix: _Matrix, part: str) -> ir.Value:
        """Returns codes as GatherBlockQuantized takes them; in the data file they are those of MatMulNBits."""
        rows, blocks, nbytes = matrix.format.shape(part, matrix.rows, matrix.inputs)
        return self._stored(f"{matrix.tensor.name}.{part}{ROWS}", matrix, part, (rows, blocks * nbytes))

    def _stored(self, name: str, matrix: _Matrix, part: str, shape: tuple[int, ...]) -> ir.Value:
        if name not in self._graph.initializers:
            float_or_int = {SCALES: matrix.tensor.dtype, OFFSETS: matrix.tensor.dtype, COLUMNS: ir.DataType.INT64}
            dtype = float_or_int.get(part, ir.DataType.UINT8)
            stored = LazyWeight(matrix.part(part), matrix.tensor.reader, dtype, ir.Shape(shape), name)
            value = ir.Value(name=name, type=ir.TensorType(dtype), shape=stored.shape, const_value=stored)
            self._graph.register_initializer(value)
        return self._graph.initializers[name]

    def _block_sums(self, before: ir.Node, x: ir.Value, rank: int, block_size: int) -> ir.Value:
        """Returns the sums of an input's blocks, ``[..., K / block_size]``; products of one input share them."""
        if (x, block_size) not in self._sums:
            shape = self._ints(*[0] * (rank - 1), -1, block_size)
            blocks = ir.node("Reshape", [x, shape])
            sums = ir.node("ReduceSum", [blocks.outputs[0], self._ints(-1)], {"keepdims": 0})
            self._graph.insert_before(before, [blocks, sums])
            self._sums[x, block_size] = sums.outputs[0]
        return self._sums[x, block_size]

    def _sixteen(self, dtype: ir.DataType) -> ir.Value:
        """Returns what the high plane counts, in a number format."""
        name = f"plane_{dtype.name.lower()}"
        if name not in self._graph.initializers:
            value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([]))
            value.const_value = ir.tensor(np.array(16, dtype.numpy()), name=name)
            self._graph.register_initializer(value)
        return self._graph.initializers[name]

    def _ints(self, *numbers: int) -> ir.Value:
        """Returns an int64 vector as an initializer, made once."""
        name = "_".join(["blocks", *(str(n).replace("-", "m") for n in numbers)])
        if name not in self._graph.initializers:
            value = ir.Value(name=name, const_value=ir.tensor(np.array(numbers, np.int64), name=name))
            value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([len(numbers)])
            self._graph.register_initializer(value)
        return self._graph.initializers[name]


def _replace(graph: ir.Graph, node: ir.Node, made: list[ir.Node]) -> None:
    old, new = node.outputs[0], made[-1].outputs[0]
    new.type, new.shape = old.type, old.shape
    graph.insert_before(node, made)
    if old.is_graph_output():
        new.name, old.name = old.name, None
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
