"""Checkpoint folders quantized as other tools do it: their published layouts, written out with numpy.

Each writer returns what the matrix stands for, computed from the integers before they are packed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Writer = Callable[[np.ndarray, np.random.Generator], tuple[Tensors, np.ndarray]]


def words(codes: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Packs unsigned codes into int32 along an axis, the first one lowest."""
    per = 32 // bits
    moved = np.moveaxis(codes.astype(np.uint64), axis, -1)
    moved = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, -moved.shape[-1] % per)])
    grouped = moved.reshape(*moved.shape[:-1], -1, per)
    packed = sum(grouped[..., i] << np.uint64(bits * i) for i in range(per))
    return np.moveaxis(np.asarray(packed).astype(np.uint32).view(np.int32), -1, axis)


def rounded(
    matrix: np.ndarray, bits: int, index: np.ndarray, symmetric: bool, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Quantizes ``[N, K]`` by groups of inputs: codes, float16 scales and zero points ``[N, groups]``, the matrix."""
    groups = int(index.max()) + 1
    top = 2**bits - 1
    scales, zeros = np.empty((len(matrix), groups), np.float16), np.empty((len(matrix), groups), np.int64)
    for group in range(groups):
        part = matrix[:, index == group]
        if symmetric:
            scales[:, group] = np.abs(part).max(axis=1) / (2 ** (bits - 1) - 0.5)
            zeros[:, group] = 2 ** (bits - 1)
        else:
            low, high = np.minimum(part.min(axis=1), 0), np.maximum(part.max(axis=1), 0)
            scales[:, group] = (high - low) / top
            zeros[:, group] = np.clip(np.round(-low / scales[:, group].astype(np.float32)), 1, top)
    scale, zero = scales.astype(np.float32)[:, index], zeros[:, index]
    codes = np.clip(np.round(matrix / scale) + zero, 0, top).astype(np.int64)
    return codes, scales, zeros, ((codes - zero) * scale).astype(np.float32)


def gptq(bits: int = 4, group: int = 32, *, symmetric: bool = True, reordered: bool = False, v1: bool = True) -> Writer:
    """AutoGPTQ and GPTQModel: packed along inputs; version 1 stores zero points less one; g_idx says each's group."""

    def write(matrix: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        index = np.arange(matrix.shape[1]) // (group if group > 0 else matrix.shape[1])
        if reordered:
            index = index[rng.permutation(len(index))]
        codes, scales, zeros, stands_for = rounded(matrix, bits, index, symmetric, rng)
        return {
            "qweight": torch.from_numpy(words(codes.T, bits, 0)),
            "qzeros": torch.from_numpy(words((zeros.T - v1) & (2**bits - 1), bits, 1)),
            "scales": torch.from_numpy(np.ascontiguousarray(scales.T)),
            "g_idx": torch.from_numpy(index.astype(np.int32)),
        }, stands_for

    return write


def awq(group: int = 32) -> Writer:
    """AutoAWQ's GEMM version: packed along outputs, in the order 0 2 4 6 1 3 5 7."""

    def write(matrix: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        index = np.arange(matrix.shape[1]) // group
        codes, scales, zeros, stands_for = rounded(matrix, 4, index, False, rng)
        order = np.array([0, 2, 4, 6, 1, 3, 5, 7])

        def packed(columns: np.ndarray) -> torch.Tensor:
            mixed = columns.reshape(len(columns), -1, 8)[:, :, order].reshape(columns.shape)
            return torch.from_numpy(words(mixed, 4, 1))

        tensors = {"qweight": packed(codes.T), "qzeros": packed(zeros.T)}
        return tensors | {"scales": torch.from_numpy(np.ascontiguousarray(scales.T))}, stands_for

    return write


def pack_quantized(bits: int = 4, group: int = 32, *, symmetric: bool = True, reordered: bool = False) -> Writer:
    """compressed-tensors' pack-quantized: packed along inputs, zero points along outputs; codes are shifted ints."""

    def write(matrix: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        index = np.arange(matrix.shape[1]) // (group if group > 0 else matrix.shape[1])
        if reordered:
            index = index[rng.permutation(len(index))]
        codes, scales, zeros, stands_for = rounded(matrix, bits, index, symmetric, rng)
        tensors = {
            "weight_packed": torch.from_numpy(words(codes, bits, 1)),
            "weight_scale": torch.from_numpy(scales),
            "weight_shape": torch.tensor(matrix.shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = torch.from_numpy(words(zeros, bits, 0))
        if reordered:
            tensors["weight_g_idx"] = torch.from_numpy(index.astype(np.int32))
        return tensors, stands_for

    return write


def olive(bits: int = 4, group: int = 32, *, symmetric: bool = True) -> Writer:
    """Olive's: bytes packed along inputs, zero points along groups, the first one lowest."""

    def write(matrix: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        index = np.arange(matrix.shape[1]) // (group if group > 0 else matrix.shape[1])
        codes, scales, zeros, stands_for = rounded(matrix, bits, index, symmetric, rng)

        def packed(values: np.ndarray) -> torch.Tensor:
            per = 8 // bits
            whole = np.pad(values, ((0, 0), (0, -values.shape[1] % per))).reshape(len(values), -1, per)
            return torch.from_numpy((whole << bits * np.arange(per)).sum(-1).astype(np.uint8))

        tensors = {"qweight": packed(codes), "scales": torch.from_numpy(scales)}
        return tensors if symmetric else tensors | {"qzeros": packed(zeros)}, stands_for

    return write


def hqq(bits: int = 4, group: int = 32, axis: int = 1, *, as_floats: bool = False) -> Writer:
    """HQQ's: groups one below the other (axis 1) or side by side, real zero points, the first groups in high bits."""

    def write(matrix: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        groups = matrix.reshape(-1, group) if axis else matrix.reshape(group, -1)
        low, high = groups.min(axis, keepdims=True), groups.max(axis, keepdims=True)
        scale = ((high - low) / (2**bits - 1)).astype(np.float16)
        zero = (-low / scale + rng.uniform(-0.4, 0.4, low.shape)).astype(np.float16)
        codes = np.clip(np.round(groups / scale + zero), 0, 2**bits - 1).astype(np.uint8)
        parts = np.split(codes, 8 // bits)
        packed = np.zeros_like(parts[0])
        for i, part in enumerate(parts):
            packed |= part << (8 - bits * (i + 1))
        w_q = torch.from_numpy(packed)
        said = {"nbits": bits, "group_size": group, "axis": axis}
        return {
            "W_q": w_q.view(torch.float16) if as_floats else w_q,
            "scale": torch.from_numpy(scale),
            "zero": torch.from_numpy(zero),
            "shape": torch.tensor(matrix.shape),
            **{name: torch.tensor(value, dtype=torch.int32) for name, value in said.items()},
            "packing": torch.tensor([ord(c) for c in f"{bits}bit_u8"], dtype=torch.uint8),
        }, ((codes - zero.astype(np.float32)) * scale.astype(np.float32)).reshape(matrix.shape)

    return write


def fp8(block: tuple[int, int] | None = None, suffix: str = "weight_scale") -> Writer:
    """float8_e4m3 with a scale for each row, or for each block of rows and inputs."""

    def write(matrix: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        rows, inputs = matrix.shape
        tall, wide = block or (1, inputs)
        scale = np.empty((-(-rows // tall), -(-inputs // wide)), np.float32)
        whole = np.empty_like(matrix)
        for i, j in np.ndindex(scale.shape):
            place = np.s_[i * tall : (i + 1) * tall, j * wide : (j + 1) * wide]
            scale[i, j] = np.abs(matrix[place]).max() / 448
            whole[place] = scale[i, j]
        eighths = torch.from_numpy(matrix / whole).to(torch.float8_e4m3fn)
        return {"weight": eighths, suffix: torch.from_numpy(scale)}, eighths.float().numpy() * whole

    return write


def mxfp4(experts: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
    """gpt-oss: blocks of 32 inputs of ``[E, K, N]``, two E2M1 numbers in a byte, a power of two for each block."""
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    blocks = experts.swapaxes(1, 2).reshape(experts.shape[0], experts.shape[2], -1, 32)
    exponents = np.floor(np.log2(np.abs(blocks).max(-1))).astype(np.int64) - 2
    relative = blocks / 2.0 ** exponents[..., None]
    magnitudes = np.abs(np.abs(relative)[..., None] - numbers).argmin(-1)
    codes = (magnitudes + 8 * (relative < 0)).astype(np.uint8)
    stands_for = np.where(relative < 0, -1, 1) * numbers[magnitudes] * 2.0 ** exponents[..., None]
    return {
        "blocks": torch.from_numpy(codes[..., 0::2] | codes[..., 1::2] << 4),
        "scales": torch.from_numpy((exponents + 127).astype(np.uint8)),
    }, stands_for.reshape(blocks.shape[0], blocks.shape[1], -1).swapaxes(1, 2).astype(np.float32)


def pack_folder(
    plain: Path, folder: Path, write: Writer, config: Mapping[str, Any], others: Mapping[str, Writer] | None = None
) -> Path:
    """Copies a folder of plain weights to one where the layers' matrices are quantized.

    ``others`` are the writers of matrices whose names match a pattern.

    Beside it, in ``folder.plain``, stands the folder of plain float32 weights that it stands for.
    """
    tensors, packed, rng = load_file(plain / "model.safetensors"), {}, np.random.default_rng(2)
    for name, tensor in list(tensors.items()):
        if write is mxfp4:
            if not re.search(r"experts\.(gate_up|down)_proj$", name):
                packed[name] = tensor
                continue
            parts, stands_for = write(tensor.float().numpy(), rng)
            packed |= {f"{name}_{part}": value.contiguous() for part, value in parts.items()}
            tensors[name] = torch.from_numpy(np.ascontiguousarray(stands_for))
        elif re.search(r"\.(layers|h)\.", name) and tensor.dim() == 2:
            across = bool(re.search(r"\.c_(attn|proj|fc)\.weight$", name))  # GPT-2's are [K, N]
            matrix = np.ascontiguousarray(tensor.float().numpy().T) if across else tensor.float().numpy()
            own = [writer for pattern, writer in (others or {}).items() if re.search(pattern, name)]
            parts, stands_for = (own[0] if own else write)(matrix, rng)
            stands_for = stands_for.T if across else stands_for
            packed |= {name.removesuffix("weight") + part: value.contiguous() for part, value in parts.items()}
            tensors[name] = torch.from_numpy(np.ascontiguousarray(stands_for))
        else:
            packed[name] = tensor
    values = json.loads((plain / "config.json").read_text())
    for path, kept, extra in ((folder, packed, {"quantization_config": dict(config)}), (exact(folder), tensors, {})):
        path.mkdir()
        save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(values | extra))
    return folder


def exact(folder: Path) -> Path:
    """The folder of plain weights beside a packed one."""
    return folder.with_name(folder.name + ".plain")
