"""Arithmetic of PTX instructions on one number per thread: the tables of the PTX ISA, in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Parts = tuple[str, ...]

DTYPES = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "f16": np.float16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "f16x2": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "pred": np.bool_,
}  # fmt: skip
_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip
_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_WIDER = {"s32": np.int64, "u32": np.uint64, "s16": np.int32, "u16": np.uint32}


def _fused(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, exact but for the last bit of a double."""
    return a.astype(np.float64) * b + c.astype(np.float64)


def _rounded_down(exact: Array) -> Array:
    nearest = exact.astype(np.float32)
    return np.where(nearest > exact, np.nextafter(nearest, np.float32(-np.inf)), nearest)


def _halves(x: Array) -> Array:
    """``[T, 2]``, the lower first."""
    return np.ascontiguousarray(x).view(np.float16).reshape(-1, 2)


def _from_halves(x: Array) -> Array:
    return np.ascontiguousarray(x.astype(np.float16)).view(np.uint32).reshape(-1)


def shifted(parts: Parts, a: Array, by: Array) -> Array:
    """shl and shr: by the register's width or more is by all."""
    width = a.dtype.itemsize * 8
    amount = np.minimum(by.astype(np.uint32), width - 1).astype(a.dtype)
    result = np.left_shift(a, amount) if parts[0] == "shl" else np.right_shift(a, amount)
    all_out = by.astype(np.uint32) >= width
    return np.where(all_out, result >> (width - 1) if a.dtype.kind == "i" else a.dtype.type(0), result)


def permuted(a: Array, b: Array, selector: Array) -> Array:
    """prmt: four bytes out of eight; bit 3 of a selector takes the byte's sign."""
    both = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
    result = np.zeros_like(a)
    for i in range(4):
        pick = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = (both >> (8 * (pick & np.uint32(7))).astype(np.uint64)).astype(np.uint32) & np.uint32(255)
        sign = np.where(byte >> np.uint32(7) != 0, np.uint32(255), np.uint32(0))
        result = result | np.where(pick & np.uint32(8) != 0, sign, byte) << np.uint32(8 * i)
    return result


def looked_up(a: Array, b: Array, c: Array, table: int) -> Array:
    """lop3: bit 4 a + 2 b + c of the table, for every bit."""
    result = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def divided(parts: Parts, a: Array, b: Array) -> Array:
    """div and rem: towards zero; by zero, which lanes that are not there may hold, anything."""
    if a.dtype == np.float32:
        return a / b
    b = np.where(b == 0, b.dtype.type(1), b)
    quotient = np.abs(a) // np.abs(b)
    quotient = np.where((a < 0) != (b < 0), -quotient, quotient)
    return quotient if parts[0] == "div" else a - quotient * b


def compared(name: str, a: Array, b: Array) -> Array:
    """setp: with a name such as ``ltu``, true where one is not a number."""
    if a.dtype.kind == "f" and name.endswith("u") and name != "nu":
        return _COMPARISONS[name[:-1]](a, b) | np.isnan(a) | np.isnan(b)
    if a.dtype.kind == "f" and name == "ne":
        return (a != b) & ~np.isnan(a) & ~np.isnan(b)
    return _COMPARISONS[{"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name)](a, b)


def converted(parts: Parts, *operands: Array) -> Array:
    """cvt, from the type named last to the one before."""
    to, (a, *more) = parts[-2], operands
    if to == "f16x2":
        return _from_halves(np.stack([more[0], a], 1))
    for name, rounding in _TO_INTEGER.items():
        if name in parts:
            a = rounding(a)
    if "sat" in parts:
        a = np.where(np.isnan(a), np.float32(0), np.clip(a, np.float32(0), np.float32(1)))
    if DTYPES[to] in (np.float32, np.float16) or a.dtype.kind != "f":
        return a.astype(DTYPES[to])
    limits = np.iinfo(DTYPES[to])
    inside = np.clip(np.where(np.isnan(a), 0, a).astype(np.float64), limits.min, limits.max)
    return inside.astype(np.int64 if limits.min < 0 else np.uint64).astype(DTYPES[to])


def _most(a: Array, b: Array) -> Array:
    return np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b)


def _least(a: Array, b: Array) -> Array:
    return np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b)


def _product(parts: Parts, a: Array, b: Array) -> Array:
    if "wide" in parts:
        wider = _WIDER[parts[-1]]
        return a.astype(wider) * b.astype(wider)
    if "hi" in parts:
        wider = _WIDER[parts[-1]]
        return (a.astype(wider) * b.astype(wider) >> 8 * a.dtype.itemsize).astype(a.dtype)
    return _from_halves(_halves(a) * _halves(b)) if parts[-1] == "f16x2" else a * b


def _multiply_add(parts: Parts, a: Array, b: Array, c: Array) -> Array:
    if parts[-1] == "f16x2":
        return _from_halves(_fused(_halves(a), _halves(b), _halves(c)))
    if parts[0] == "mad":
        return _product(parts, a, b) + c
    exact = _fused(a, b, c)
    return _rounded_down(exact) if "rm" in parts else exact.astype(np.float32)


def _insert(a: Array, b: Array, at: Array, count: Array) -> Array:
    mask = ((np.uint64(1) << count.astype(np.uint64)) - np.uint64(1)) << at.astype(np.uint64)
    return ((b & ~mask.astype(np.uint32)) | ((a.astype(np.uint64) << at.astype(np.uint64)) & mask)).astype(np.uint32)


ARITHMETIC: dict[str, Callable[..., Array]] = {
    "add": lambda _, a, b: a + b,
    "sub": lambda _, a, b: a - b,
    "mul": _product,
    "mad": _multiply_add,
    "fma": _multiply_add,
    "div": divided,
    "rem": divided,
    "min": lambda _, a, b: _least(a, b),
    "max": lambda _, a, b: _most(a, b),
    "neg": lambda _, a: -a,
    "abs": lambda _, a: np.abs(a),
    "and": lambda _, a, b: a & b,
    "or": lambda _, a, b: a | b,
    "xor": lambda _, a, b: a ^ b,
    "not": lambda _, a: ~a,
    "shl": shifted,
    "shr": shifted,
    "prmt": lambda _, a, b, c: permuted(a, b, c),
    "lop3": lambda _, a, b, c, table: looked_up(a, b, c, int(table.flat[0])),
    "bfi": lambda _, a, b, at, count: _insert(a, b, at, count),
    "setp": lambda parts, a, b: compared(parts[1], a, b),
    "selp": lambda _, a, b, p: np.where(p, a, b),
    "cvt": converted,
    "rcp": lambda _, a: np.float32(1) / a,
    "sqrt": lambda _, a: np.sqrt(a),
    "ex2": lambda _, a: np.exp2(a),
    "copysign": lambda _, sign, a: np.copysign(a, sign),
    "mov": lambda _, a: a,
    "cvta": lambda _, a: a,
}
"""By an instruction's first part: a function of all its parts and its operands, each of the instruction's type."""


def operand_types(parts: Parts, count: int) -> tuple[str, ...]:
    """The types of an arithmetic instruction's sources."""
    kind = parts[-1]
    if parts[0] in ("shl", "shr"):
        return kind, "u32"
    if parts[0] == "selp":
        return kind, kind, "pred"
    if parts[0] == "mad" and "wide" in parts:
        return kind, kind, {"s32": "s64", "u32": "u64"}[kind]
    if parts[0] == "cvta":
        return ("u64",)
    return (kind,) * count


def result_type(parts: Parts) -> str:
    """The type of an arithmetic instruction's result."""
    if parts[0] == "setp":
        return "pred"
    if parts[0] == "cvt":
        return parts[-2]
    if "wide" in parts:
        return {"s32": "s64", "u32": "u64", "s16": "s32", "u16": "u32"}[parts[-1]]
    return parts[-1]


def _fragment_index() -> tuple[Array, Array, Array]:
    """Where mma.m16n8k16's fragments stand: row and column of each lane's halves of A and B, and numbers of C.

    By the formulas of the PTX ISA (Matrix Fragments for mma.m16n8k16 with floating point type): groupID = lane / 4,
    threadID_in_group = lane % 4.
    """
    lane = np.arange(32)
    group, thread = lane // 4, lane % 4
    a = np.array([
        [group + (8 if i in (2, 3, 6, 7) else 0), thread * 2 + (i & 1) + (8 if i >= 4 else 0)] for i in range(8)
    ])  # fmt: skip
    b = np.array([[thread * 2 + (i & 1) + (8 if i >= 2 else 0), group] for i in range(4)])
    c = np.array([[group + (8 if i >= 2 else 0), thread * 2 + (i & 1)] for i in range(4)])
    return a, b, c


FRAGMENT_A, FRAGMENT_B, FRAGMENT_C = _fragment_index()
"""``[number, row or column, lane]``."""


def multiply_matrices(a: Array, b: Array, c: Array) -> Array:
    """mma.sync.m16n8k16, row by column, float16 to float32.

    Args:
        a: ``[W, 32, 8]`` float16, the lanes' fragments of W warps.
        b: ``[W, 32, 4]``.
        c: ``[W, 32, 4]`` float32.
    """
    warps = len(a)
    left, right = np.zeros((warps, 16, 16), np.float32), np.zeros((warps, 16, 8), np.float32)
    for i in range(8):
        left[:, FRAGMENT_A[i, 0], FRAGMENT_A[i, 1]] = a[:, :, i]
    for i in range(4):
        right[:, FRAGMENT_B[i, 0], FRAGMENT_B[i, 1]] = b[:, :, i]
    product = left @ right
    return np.stack([c[:, :, i] + product[:, FRAGMENT_C[i, 0], FRAGMENT_C[i, 1]] for i in range(4)], 2)


def transpose_matrix(a: Array) -> Array:
    """movmatrix.m8n8.trans.b16 of W warps: ``[W, 32, 2]`` uint16; lane l holds row l / 4, columns 2 (l % 4), + 1."""
    matrix = a.reshape(len(a), 8, 8)
    return np.ascontiguousarray(matrix.swapaxes(1, 2)).reshape(len(a), 32, 2)
