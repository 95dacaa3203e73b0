"""Weights in 4 or 8 bits: which weights of a graph are quantized, the operators that read them, and their codes.

A matrix is quantized by ONNX Runtime's own quantizer in blocks of consecutive inputs of one output, each with a scale
and a zero point, and read by MatMulNBits (an embedding by GatherBlockQuantized), whose kernels are part of ONNX
Runtime.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from skv_export.checkpoints.block_weights import SCALES, ZERO_POINTS, BlockFormat, BlockMatrix
from skv_export.checkpoints.pretrained import DTYPES
from skv_export.export.expert_gates import gate_of
from skv_export.export.lazy_weights import TORCH_TYPES, Named, Reader, whole
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.spec.recipe import WEIGHT_BITS, Recipe

BLOCK = 32
"""Inputs that share a scale; what MatMulNBits' kernels are fastest with, and onnxruntime-genai's default."""


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


def rounded_format(bits: int) -> BlockFormat:
    """Returns how a matrix that is rounded to so many bits is stored."""
    return BlockFormat(f"int{bits}", bits, BLOCK, ZERO_POINTS)


@functools.lru_cache(maxsize=1)  # the three parts of a weight are written one behind the other
def _parts(source: Named, bits: int, rows: int, reader: Any) -> dict[str, torch.Tensor]:
    made: dict[str, NDArray[Any]] = {}
    start = 0
    floats = dataclasses.replace(source, dtype=ir.DataType.FLOAT)
    for slab in [whole(floats, reader)] if source.transposed else floats.slabs(reader):
        for part, piece in zip(rounded_format(bits).parts, quantize(slab.numpy(), bits), strict=True):
            if not start:
                made[part] = np.empty((rows, *piece.shape[1:]), piece.dtype)
            made[part][start : start + len(slab)] = piece
        start += len(slab)
    return {part: torch.from_numpy(array) for part, array in made.items()}


@dataclass(frozen=True)
class Rounded:
    """One part of a matrix that is rounded.

    Attributes:
        source: The matrix ``[N, K]``; its ``dtype`` is that of the scales.
        rows: N.
        bits: 4 or 8.
        part: Of ``rounded_format``.
    """

    source: Named
    rows: int
    bits: int
    part: str

    def slabs(self, reader: Reader) -> Iterator[torch.Tensor]:
        """As ``WeightExpr`` says."""
        hashable: Any = reader
        tensor = _parts(self.source, self.bits, self.rows, hashable)[self.part]
        yield tensor.to(TORCH_TYPES[self.source.dtype]) if self.part == SCALES else tensor

    def renamed(self, rename: Callable[[str], str]) -> Rounded:
        """As ``WeightExpr`` says."""
        return dataclasses.replace(self, source=self.source.renamed(rename))


def is_experts(module: Any, tensor: torch.Tensor) -> bool:
    """Whether a parameter holds the matrices of experts that QMoE can take in blocks."""
    across = getattr(module, "is_transposed", None)
    return across is not None and tensor.shape[1 if across else 2] % BLOCK == 0 and gate_of(module) is not None


def stored_bytes(model: PreTrainedModel, recipe: Recipe, held: Mapping[str, BlockMatrix]) -> int:
    """Returns the bytes of a model's weights in the graph and its data file; works on fake parameters.

    A router is counted as if it were rounded like the other matrices.

    Args:
        model: The model.
        recipe: Says what is rounded.
        held: Matrices that are stored as the checkpoint quantized them, by the parameters' names.
    """
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    bits = recipe.weight_bits
    plain: dict[int, int] = {}
    quantized: dict[int, int] = {}
    for path, module in model.named_modules():
        matrix = isinstance(module, torch.nn.Linear | Conv1D) and (recipe.quantize_head or module is not outer)
        chosen = bits and (matrix or (module is inner and recipe.quantize_embeddings))
        for name, tensor in module.named_parameters(recurse=False):
            stored = held.get(f"{path}.{name}")
            if stored is not None and isinstance(module, torch.nn.Linear | Conv1D | torch.nn.Embedding):
                form = stored.format.stored(recipe.exact_products)
                quantized[id(tensor)] = form.nbytes(stored.rows, stored.inputs, tensor.element_size())
            elif bits == 4 and tensor.dim() == 3 and is_experts(module, tensor):
                experts, *sizes = tensor.shape
                inputs, rows = sizes if module.is_transposed else reversed(sizes)
                part = rounded_format(bits).nbytes(rows, inputs, tensor.element_size())
                quantized[id(tensor)] = experts * part
            elif chosen and name == "weight":
                rows, inputs = reversed(tensor.shape) if isinstance(module, Conv1D) else tensor.shape
                quantized[id(tensor)] = rounded_format(bits).nbytes(rows, inputs, tensor.element_size())
            else:
                plain[id(tensor)] = tensor.numel() * tensor.element_size()
    if held:  # a tied weight is stored once, under one of its names
        plain = {key: size for key, size in plain.items() if key not in quantized}
    return sum(plain.values()) + sum(quantized.values())


@contextlib.contextmanager
def rounded(model: PreTrainedModel, quantized: Iterable[str], config: ModelConfig) -> Iterator[None]:
    """Context manager: the model has the exported graph's weights, quantized and dequantized; others in its format.

    Args:
        model: The original, in float32, as the checkpoint has it: the export rounds that, and its scales afterwards.
        quantized: Names of the matrices that are quantized in the graph.
        config: Of the exported folder.
    """
    bits = WEIGHT_BITS.get(config.weights)
    if bits is None:
        yield
        return
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    places = [name.rpartition(".")[::2] for name in quantized]
    chosen = [(model.get_submodule(path), name) for path, name in places]
    chosen = [(module, name) for module, name in chosen if module not in (inner, outer)]
    chosen += [(outer, "weight")] if config.quantize_head else []
    chosen += [(inner, "weight")] if config.quantize_embeddings else []
    before: dict[tuple[torch.nn.Module, str], Any] = {place: getattr(*place) for place in chosen}
    dtype, exact = DTYPES[config.dtype], {}
    try:
        for (module, name), weight in before.items():  # two may share a weight, of which one is not rounded
            made = _rounded(module, weight, bits, dtype).to(weight.device, weight.dtype)
            setattr(module, name, torch.nn.Parameter(made, requires_grad=False))
        taken = {id(getattr(*place)) for place in chosen}
        for parameter in model.parameters():
            if id(parameter) not in taken and parameter.dtype != dtype:
                exact[parameter] = parameter.data
                parameter.data = parameter.data.to(dtype).to(parameter.dtype)
        yield
    finally:
        for parameter, data in exact.items():
            parameter.data = data
        for (module, name), weight in before.items():
            setattr(module, name, weight)


def _rounded(module: torch.nn.Module, weight: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    if weight.dim() == 3:  # of experts, one behind the other
        across = bool(getattr(module, "is_transposed", False))
        rows = [_rounded_rows(expert.T if across else expert, bits, dtype) for expert in weight]
        return torch.stack([expert.T if across else expert for expert in rows])
    if isinstance(module, Conv1D):
        return _rounded_rows(weight.T, bits, dtype).T
    return _rounded_rows(weight, bits, dtype)


def _rounded_rows(weight: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """``[N, K]`` as its codes represent it, with scales in ``dtype``."""
    matrix = weight.detach().float().cpu().contiguous().numpy()
    codes, scales, zeros = quantize(matrix, bits)
    scales = torch.from_numpy(scales).to(dtype).float().numpy()
    return torch.from_numpy(dequantize(codes, scales, zeros, bits, matrix.shape[1]))
