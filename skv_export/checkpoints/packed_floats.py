"""Matrices of floats in few bits: FP8 and MXFP4, which a graph holds dequantized."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from skv_export.checkpoints.packed_entry import PackedEntry, PackedFormat

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The numbers of MXFP4's elements (OCP Microscaling Formats 1.0, E2M1)."""


def _fp8_shape(entry: PackedEntry) -> tuple[int, ...]:
    return entry.parts["weight"].shape


def _fp8(entry: PackedEntry) -> NDArray[Any]:
    """8 bits times their scales: one, one for each row or group, or one for each block of rows and inputs."""
    weight = entry.parts["weight"].array().astype(np.float32)
    scale = next(part for name, part in entry.parts.items() if name != "weight").array().astype(np.float32)
    if scale.size == 1:
        return weight * scale.reshape(())
    if scale.ndim != weight.ndim or any(s == 0 or s > w for s, w in zip(scale.shape, weight.shape, strict=True)):
        raise entry.error("its scale", scale.shape, f"one, or one for each block of {weight.shape}")
    for axis, count in enumerate(scale.shape):
        scale = np.repeat(scale, -(-weight.shape[axis] // count), axis)
    return weight * scale[tuple(slice(n) for n in weight.shape)]


def _mxfp4_shape(entry: PackedEntry) -> tuple[int, ...]:
    """Experts are ``[E, K, N]``; in the file ``[E, N, K / 32, 16]``."""
    shape = entry.parts["blocks"].shape
    if len(shape) != 4 or shape[3] != 16:
        raise entry.error("its blocks", shape, "[experts, outputs, blocks, 16]")
    entry.expect("scales", shape[:3])
    return shape[0], 32 * shape[2], shape[1]


def _mxfp4(entry: PackedEntry) -> NDArray[Any]:
    blocks, scales = (entry.parts[part].array() for part in ("blocks", "scales"))
    if (scales == 255).any():
        raise entry.error("its scales", "255, which is not a number", "powers of two, 0 ... 254")
    numbers = np.stack([_E2M1[blocks & 15], _E2M1[blocks >> 4]], axis=-1).reshape(*blocks.shape[:3], 32)
    numbers *= np.exp2(scales.astype(np.float32) - 127)[..., None]
    return np.ascontiguousarray(numbers.reshape(*blocks.shape[:2], -1).swapaxes(1, 2))


FP8 = PackedFormat((".weight", ".weight_scale", ".weight_scale_inv"), ".weight", _fp8_shape, _fp8)
MXFP4 = PackedFormat(("_blocks", "_scales"), "", _mxfp4_shape, _mxfp4)
