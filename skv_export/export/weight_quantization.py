"""Weights in 4 or 8 bits: which weights of a graph are quantized, the operators that read them, and their codes.

A matrix is quantized by ONNX Runtime's own quantizer in blocks of consecutive inputs of one output, each with a scale
and a zero point, and read by MatMulNBits (an embedding by GatherBlockQuantized), whose kernels are part of ONNX
Runtime.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from skv_export.export.lazy_weights import TORCH_TYPES, LazyWeight, Named, Reader
from skv_export.model_folder.names import LOGITS
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.spec.recipe import WEIGHT_BITS, Recipe

BLOCK = 32
"""Inputs that share a scale; what MatMulNBits' kernels are fastest with, and onnxruntime-genai's default."""
ACCURACY_LEVEL = 4
"""MatMulNBits' inner number format: int8, which rounds activations in blocks of ``BLOCK`` too."""
MICROSOFT = "com.microsoft"
CODES, SCALES, ZERO_POINTS = "codes", "scales", "zero_points"
PARTS = (CODES, SCALES, ZERO_POINTS)
_ROUTER_REACH = 6
"""Nodes between a router's product and the TopK that picks experts, at most."""
_ROUTER_STEPS = ("Add", "Cast", "Div", "Identity", "Mul", "Reshape", "Sigmoid", "Softmax", "Unsqueeze")


def quantize(weight: NDArray[np.float32], bits: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Quantizes a matrix.

    Args:
        weight: float32 ``[N, K]``: N outputs of K inputs.
        bits: 4 or 8.

    Returns:
        Codes uint8 ``[N, ceil(K / BLOCK), BLOCK * bits / 8]``, scales float32 ``[N, ceil(K / BLOCK)]``, zero points
        uint8 ``[N, ceil(ceil(K / BLOCK) * bits / 8)]``.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=False, bits=bits)
    columns = torch.from_numpy(weight).T.contiguous().numpy()  # numpy's own copy of a transpose is far slower
    codes, scales, zeros = DefaultWeightOnlyQuantizer(config).qbits_block_quant(columns)
    return codes, scales.astype(np.float32), zeros


def dequantize(
    codes: NDArray[Any], scales: NDArray[Any], zeros: NDArray[Any], bits: int, inputs: int
) -> NDArray[np.float32]:
    """Returns the matrix ``[N, K]`` that ``quantize``'s result represents; ``inputs`` is K."""
    rows, blocks, _ = codes.shape
    values = _unpacked(codes.reshape(rows, -1), bits).reshape(rows, blocks, BLOCK).astype(np.float32)
    offsets = _unpacked(zeros, bits)[:, :blocks, None].astype(np.float32)
    return ((values - offsets) * scales.reshape(rows, blocks, 1)).reshape(rows, -1)[:, :inputs]


def _unpacked(packed: NDArray[Any], bits: int) -> NDArray[Any]:
    return packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


@functools.lru_cache(maxsize=1)  # the three parts of a weight are written one behind the other
def _parts(source: Named, bits: int, rows: int, reader: Any) -> dict[str, torch.Tensor]:
    made: dict[str, NDArray[Any]] = {}
    start = 0
    for slab in dataclasses.replace(source, dtype=ir.DataType.FLOAT).slabs(reader):
        for part, piece in zip(PARTS, quantize(slab.numpy(), bits), strict=True):
            if not start:
                made[part] = np.empty((rows, *piece.shape[1:]), piece.dtype)
            made[part][start : start + len(slab)] = piece
        start += len(slab)
    return {part: torch.from_numpy(array) for part, array in made.items()}


@dataclass(frozen=True)
class Quantized:
    """One part of a quantized matrix.

    Attributes:
        source: The matrix ``[N, K]``; its ``dtype`` is that of the scales.
        rows: N.
        bits: 4 or 8.
        part: One of ``PARTS``.
    """

    source: Named
    rows: int
    bits: int
    part: str

    def slabs(self, reader: Reader) -> Iterator[torch.Tensor]:
        """As ``stored.Form`` says."""
        hashable: Any = reader
        tensor = _parts(self.source, self.bits, self.rows, hashable)[self.part]
        yield tensor.to(TORCH_TYPES[self.source.dtype]) if self.part == SCALES else tensor

    def renamed(self, rename: Callable[[str], str]) -> Quantized:
        """As ``stored.Form`` says."""
        return dataclasses.replace(self, source=self.source.renamed(rename))


# The graph.


def quantize_graph(graph: ir.Graph, recipe: Recipe) -> None:
    """Replaces a decoder's matrix products by operators on quantized weights, as the recipe specifies.

    Left as they are: routers, whose few rows decide which experts run, and experts, which are gathered, not multiplied.
    """
    if not recipe.weight_bits:
        return
    head = _head(graph)
    for node in tuple(graph):
        if node.domain:
            continue
        if node.op_type in ("MatMul", "Gemm") and not _picks_experts(node):
            if recipe.quantize_head or node is not head:
                _multiply(graph, node, recipe.weight_bits)
        elif node.op_type == "Gather" and recipe.quantize_embeddings:
            _look_up(graph, node, recipe.weight_bits)
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


def _matrix(value: ir.Value | None, rows: bool) -> LazyWeight | None:
    """Returns a stored matrix as ``[N, K]``; ``rows`` tells whether the graph has it in this form."""
    tensor = value.const_value if value is not None else None
    if not isinstance(tensor, LazyWeight) or not isinstance(tensor.form, Named) or len(tensor.shape) != 2:
        return None
    if rows:
        return tensor
    form = dataclasses.replace(tensor.form, transposed=not tensor.form.transposed)
    return LazyWeight(form, tensor.reader, tensor.dtype, ir.Shape(tensor.shape.numpy()[::-1]), str(tensor.name))


def _multiply(graph: ir.Graph, node: ir.Node, bits: int) -> None:
    x, weight, bias = (*node.inputs, None)[:3]
    matrix = _matrix(weight, rows=node.op_type == "Gemm" and bool(node.attributes.get_int("transB", False)))
    plain = all(node.attributes.get_float(name, 1.0) == 1 for name in ("alpha", "beta"))
    if matrix is None or not plain or node.attributes.get_int("transA", False):
        return
    outputs, inputs = matrix.shape.numpy()
    attributes = {"N": outputs, "K": inputs, "bits": bits, "block_size": BLOCK, "accuracy_level": ACCURACY_LEVEL}
    parts = _initializers(graph, matrix, bits)
    made = ir.node("MatMulNBits", [x, *parts, None, bias][: 6 if bias else 4], attributes, domain=MICROSOFT)
    _replace(graph, node, [made])


def _look_up(graph: ir.Graph, node: ir.Node, bits: int) -> None:
    table, ids = node.inputs
    matrix = _matrix(table, rows=True)
    if matrix is None or node.attributes.get_int("axis", False):
        return
    codes, scales, zeros = _initializers(graph, matrix, bits)
    flat = ir.Value(
        name=f"{matrix.name}.row", const_value=ir.tensor([matrix.shape.numpy()[0], -1], name=f"{matrix.name}.row")
    )
    graph.register_initializer(flat)
    rows = ir.node("Reshape", [codes, flat])
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": BLOCK, "bits": bits}
    made = ir.node("GatherBlockQuantized", [rows.outputs[0], ids, scales, zeros], attributes, domain=MICROSOFT)
    _replace(graph, node, [rows, made])


def _initializers(graph: ir.Graph, matrix: LazyWeight, bits: int) -> list[ir.Value]:
    """Returns codes, scales and zero points of a matrix ``[N, K]``; those of a tied one are created once."""
    assert isinstance(matrix.form, Named)
    rows, inputs = matrix.shape.numpy()
    blocks = -(-inputs // BLOCK)
    byte = ir.DataType.UINT8
    kinds = {
        CODES: (byte, (rows, blocks, BLOCK * bits // 8)),
        SCALES: (matrix.dtype, (rows, blocks)),
        ZERO_POINTS: (byte, (rows, -(-blocks * bits // 8))),
    }
    values = []
    for part, (dtype, shape) in kinds.items():
        name = f"{matrix.name}.{part}"
        if name not in graph.initializers:
            stored = LazyWeight(Quantized(matrix.form, rows, bits, part), matrix.reader, dtype, ir.Shape(shape), name)
            value = ir.Value(name=name, type=ir.TensorType(dtype), shape=stored.shape, const_value=stored)
            graph.register_initializer(value)
        values.append(graph.initializers[name])
    return values


def _replace(graph: ir.Graph, node: ir.Node, made: list[ir.Node]) -> None:
    old, new = node.outputs[0], made[-1].outputs[0]
    new.type, new.shape = old.type, old.shape
    graph.insert_before(node, made)
    if old.is_graph_output():
        new.name, old.name = old.name, None
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


# PyTorch.


def stored_bytes(model: PreTrainedModel, recipe: Recipe) -> int:
    """Returns the bytes of a model's weights in the data file, without routers; works on fake parameters."""
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    bits = recipe.weight_bits
    plain: dict[int, float] = {}
    quantized: dict[int, float] = {}
    for module in model.modules():
        matrix = isinstance(module, torch.nn.Linear | Conv1D) and (recipe.quantize_head or module is not outer)
        chosen = bits and (matrix or (module is inner and recipe.quantize_embeddings))
        for name, tensor in module.named_parameters(recurse=False):
            if chosen and name == "weight":  # codes, and a scale and a zero point per block
                bits_of_block = BLOCK * bits + 8 * tensor.element_size() + bits
                quantized[id(tensor)] = tensor.numel() * bits_of_block / BLOCK / 8
            else:
                plain[id(tensor)] = tensor.numel() * tensor.element_size()
    return round(sum(plain.values()) + sum(quantized.values()))


@contextlib.contextmanager
def rounded(model: PreTrainedModel, quantized: Iterable[str], config: ModelConfig) -> Iterator[None]:
    """Context manager: the model has the exported graph's weights, quantized and dequantized.

    Args:
        model: The original, in float32.
        quantized: Names of the matrices that are quantized in the graph.
        config: Of the exported folder.
    """
    bits = WEIGHT_BITS.get(config.weights)
    if bits is None:
        yield
        return
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    modules = [model.get_submodule(name.rpartition(".")[0]) for name in quantized]
    chosen = [module for module in modules if module not in (inner, outer)]
    chosen += [outer] if config.quantize_head else []
    chosen += [inner] if config.quantize_embeddings else []
    before: dict[torch.nn.Module, Any] = {module: module.weight for module in chosen}
    try:
        for module, weight in before.items():  # two may share a weight, of which one is not rounded
            module.weight = torch.nn.Parameter(_rounded(module, weight, bits), requires_grad=False)
        yield
    finally:
        for module, weight in before.items():
            module.weight = weight


def _rounded(module: torch.nn.Module, weight: torch.Tensor, bits: int) -> torch.Tensor:
    matrix = (weight.T if isinstance(module, Conv1D) else weight).float().numpy()
    result = torch.from_numpy(dequantize(*quantize(matrix, bits), bits, matrix.shape[1]))
    return result.T if isinstance(module, Conv1D) else result
