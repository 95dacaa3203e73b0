"""Owns the Python side of the CUDA kernels' C interface for tests and benchmarks, on the CPU shim and on a GPU.

``Library`` calls the functions of ``native/cuda/kernels_cuda.h`` on arrays that a ``Memory`` has put where the kernels can
read them: for the shim numpy arrays with sentinels around them, for a GPU torch tensors (``gpu_test.py``).
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from skv_export.cases import Case, Inputs
from skv_export.layout import CacheLayout, layout_fields

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "skv_export" / "native" / "cuda"
SHIM = ROOT / "tests" / "cuda"
GRANULARITIES = {"channel": 0, "token": 1}
ROTATIONS = {"none": 0, "hadamard": 1}
TYPES = {"float16": 0, "float": 1, "float32": 1, "bfloat16": 2}
AUTO, SIMPLE, MMA, PREFILL = range(4)
OK, INVALID_ARGUMENT, NOT_SUPPORTED = range(3)

Array = NDArray[Any]


class Layout(ctypes.Structure):
    """``SkvLayout``."""

    _fields_ = [(name, ctypes.c_int32) for name in layout_fields()]

    @classmethod
    def of(cls, layout: CacheLayout) -> Layout:
        values = dataclasses.asdict(layout)
        values["granularity"] = GRANULARITIES[layout.granularity]
        values["rotation"] = ROTATIONS[layout.rotation]
        values["recent_type"] = TYPES[layout.recent_type]
        return cls(*(int(values[name]) for name in layout_fields()))


class Cache(ctypes.Structure):
    """``SkvCache``."""

    _fields_ = [("layout", Layout), ("data", ctypes.c_void_p), ("block_bytes", ctypes.c_int64)]


class Tokens(ctypes.Structure):
    """``SkvTokens``."""

    _fields_ = [("data", ctypes.c_void_p), ("token_stride", ctypes.c_int64)]


class Attention(ctypes.Structure):
    """``SkvAttention``."""

    _fields_ = [
        ("key_cache", Cache),
        ("value_cache", Cache),
        ("query", Tokens),
        ("key", Tokens),
        ("value", Tokens),
        ("output", ctypes.c_void_p),
        ("seqlens_k", ctypes.c_void_p),
        ("query_seqlens", ctypes.c_void_p),
        ("head_sink", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("batch", ctypes.c_int32),
        ("tokens", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("kv_num_heads", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


class Context(ctypes.Structure):
    """``SkvCudaContext``."""

    _fields_ = [
        ("stream", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("scratch_bytes", ctypes.c_int64),
        ("max_length", ctypes.c_int64),
        ("not_finite", ctypes.c_void_p),
        ("path", ctypes.c_int32),
        ("output_type", ctypes.c_int32),
        ("multiprocessors", ctypes.c_int32),
    ]


class Memory(Protocol):
    """Where the kernels read and write."""

    def put(self, array: Array) -> Any:
        """Copies an array there."""

    def address(self, buffer: Any) -> int:
        """Its first byte."""

    def get(self, buffer: Any) -> Array:
        """Copies it back, having checked that nothing around it was written."""


class HostMemory:
    """numpy arrays between sentinels, for the shim."""

    guard = 256

    def put(self, array: Array) -> tuple[Array, Array]:
        data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        whole = np.full(data.size + 2 * self.guard + 256, 0xA5, np.uint8)
        start = self.guard + -(whole.ctypes.data + self.guard) % 256
        inner = whole[start : start + data.size]
        inner[:] = data
        return whole, inner.view(array.dtype).reshape(array.shape)

    def address(self, buffer: tuple[Array, Array]) -> int:
        return buffer[1].ctypes.data

    def get(self, buffer: tuple[Array, Array]) -> Array:
        whole, array = buffer
        start = array.ctypes.data - whole.ctypes.data
        outside = np.concatenate([whole[:start], whole[start + array.nbytes :]])
        assert (outside == 0xA5).all(), "written outside of the buffer"
        return array.copy()


@dataclasses.dataclass(frozen=True)
class Result:
    """What a call gave: output ``[B, S, N*head_dim]`` and the caches after it."""

    output: Array
    key: Array
    value: Array
    path: str


class KernelError(Exception):
    """A status other than SKV_OK, with the library's reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Library:
    """The kernels' C interface on one kind of memory."""

    def __init__(self, path: Path, memory: Memory, multiprocessors: int = 4) -> None:
        self.memory = memory
        self.multiprocessors = multiprocessors
        self.lib = ctypes.CDLL(str(path))
        self.lib.skv_cuda_last_error.restype = ctypes.c_char_p
        self.lib.skv_cuda_path.restype = ctypes.c_char_p
        self.lib.skv_cuda_scratch_bytes.restype = ctypes.c_int64

    def check(self, status: int) -> None:
        if status != OK:
            raise KernelError(status, self.lib.skv_cuda_last_error().decode())

    def attention(self, case: Case, inputs: Inputs, path: int = AUTO, *, append_only: bool = False) -> Result:
        """Runs a case; ``append_only`` leaves the output as it was."""
        buffers, call, context = self.prepare(case, inputs, path)
        function = self.lib.skv_cuda_append if append_only else self.lib.skv_cuda_attention
        name = self.lib.skv_cuda_path(ctypes.byref(call), ctypes.byref(context))
        self.check(function(ctypes.byref(call), ctypes.byref(context)))
        for name_, buffer in buffers.items():
            if name_ not in ("output", "past_key", "past_value", "scratch", "not_finite"):
                self.memory.get(buffer)
        self.memory.get(buffers["scratch"])
        output = self.memory.get(buffers["output"])
        if case.dtype == "bfloat16":
            output = (output.astype(np.uint32) << 16).view(np.float32)
        return Result(
            output.astype(np.float32),
            self.memory.get(buffers["past_key"]),
            self.memory.get(buffers["past_value"]),
            name.decode() if name else "",
        )

    def prepare(self, case: Case, inputs: Inputs, path: int = AUTO) -> tuple[dict[str, Any], Attention, Context]:
        """Puts a case's tensors in memory and describes the call."""
        put, address = self.memory.put, self.memory.address
        typed = lambda x: as_type(x, case.dtype)  # noqa: E731
        arrays = {
            "query": typed(inputs.query),
            "key": typed(inputs.key),
            "value": typed(inputs.value),
            "past_key": inputs.past_key,
            "past_value": inputs.past_value,
            "output": np.full_like(typed(inputs.query), 123),
            "seqlens_k": inputs.seqlens_k,
            "not_finite": np.zeros(4, np.int32),
        }
        if inputs.query_seqlens is not None:
            arrays["query_seqlens"] = inputs.query_seqlens
        if inputs.head_sink is not None:
            arrays["head_sink"] = typed(inputs.head_sink)
        buffers = {name: put(array) for name, array in arrays.items()}
        at = {name: address(buffer) for name, buffer in buffers.items()}
        caches = [
            Cache(Layout.of(layout), at[name], int(np.prod(arrays[name].shape[2:])))
            for layout, name in zip(case.layouts, ("past_key", "past_value"), strict=True)
        ]
        batch, tokens = inputs.query.shape[:2]
        hidden = [case.num_heads * case.head_dim, *[case.kv_num_heads * case.head_dim] * 2]
        call = Attention(
            *caches,
            *(Tokens(at[name], size) for name, size in zip(("query", "key", "value"), hidden, strict=True)),
            at["output"],
            at["seqlens_k"],
            at.get("query_seqlens"),
            at.get("head_sink"),
            TYPES[case.dtype],
            batch,
            tokens,
            case.num_heads,
            case.kv_num_heads,
            0.0,
            case.softcap,
        )
        context = Context(None, None, 0, max(case.total_lengths), at["not_finite"], path, -1, self.multiprocessors)
        size = self.lib.skv_cuda_scratch_bytes(ctypes.byref(call), ctypes.byref(context))
        if size < 0:
            self.check(-size)
        buffers["scratch"] = put(np.full(max(size, 1), 0xFF, np.uint8))
        context.scratch, context.scratch_bytes = address(buffers["scratch"]), size
        return buffers, call, context

    def decode_tile(self, layout: CacheLayout, tile: Array) -> Array:
        """``[T, D]`` of one tile's bytes."""
        source = self.memory.put(tile)
        out = self.memory.put(np.full((layout.tile_tokens, layout.padded_dim), np.nan, np.float32))
        pointers = (ctypes.c_void_p(self.memory.address(x)) for x in (source, out))
        self.check(self.lib.skv_cuda_decode_tile(ctypes.byref(Layout.of(layout)), *pointers, None))
        return self.memory.get(out)

    def dequantize(self, layout: CacheLayout, block: Array, head: int, length: int) -> Array:
        """``[length, head_dim]`` of one head of blocks ``[N_kv, C]``."""
        held = self.memory.put(block)
        out = self.memory.put(np.full((length, layout.head_dim + 3), 7, np.float32))
        cache = Cache(Layout.of(layout), self.memory.address(held), block.shape[1])
        self.check(
            self.lib.skv_cuda_dequantize(
                ctypes.byref(cache), block.shape[0], 0, head, ctypes.c_int64(length), TYPES["float"],
                ctypes.c_void_p(self.memory.address(out)), ctypes.c_int64(layout.head_dim + 3), None,
            )
        )  # fmt: skip
        rows = self.memory.get(out)
        assert (rows[:, layout.head_dim :] == 7).all()
        return rows[:, : layout.head_dim]

    def rewind(self, layout: CacheLayout, block: Array, length: int, new_length: int) -> Array:
        """Blocks ``[N_kv, C]`` of one sequence, taken back."""
        held = self.memory.put(block)
        cache = Cache(Layout.of(layout), self.memory.address(held), block.shape[1])
        lengths = (ctypes.c_int64(length), ctypes.c_int64(new_length))
        self.check(self.lib.skv_cuda_rewind(ctypes.byref(cache), block.shape[0], 0, *lengths, None))
        return self.memory.get(held)


def as_type(x: Array, dtype: str) -> Array:
    """Numbers that ``dtype`` can hold, in its bits (bfloat16 as uint16)."""
    if dtype == "bfloat16":
        bits = x.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return x.astype(np.dtype(dtype))


def build_shim(out: Path, *, flags: Sequence[str] = (), sources: Path = SOURCES, optimize: str = "-O1") -> Path:
    """Compiles the kernels and the shim into ``out``/<hash of sources and flags>/libskv_cuda_shim.so."""
    files = sorted([*sources.glob("*.cu"), SHIM / "cuda_shim.cc"])
    headers = [
        *sources.glob("*.cuh"),
        *sources.glob("*.h"),
        *sources.glob("*.inc"),
        SHIM / "cuda_shim.h",
        *sources.parent.glob("k*.h"),
    ]
    command = ["g++", "-x", "c++", "-std=c++17", optimize, "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unknown-pragmas", f"-I{SHIM}", f"-I{sources}", *flags]
    if os.uname().machine == "x86_64":
        command += ["-mf16c", "-mavx2"]
    digest = hashlib.sha256(" ".join(command).encode())
    for file in sorted([*files, *headers]):
        digest.update(file.read_bytes())
    folder = out / digest.hexdigest()[:16]
    library = folder / "libskv_cuda_shim.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)

    def compile_(file: Path) -> Path:
        target = folder / f"{file.stem}.o"
        subprocess.run([*command, "-c", str(file), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_, files))
    partial = folder / "partial.so"
    subprocess.run(["g++", "-shared", *flags, *map(str, objects), "-o", str(partial)], check=True)
    partial.rename(library)
    return library
