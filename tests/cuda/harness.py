"""The CUDA kernels' C interface in Python, for tests and benchmarks, on the CPU shim and on a GPU.

``Library`` calls the functions of ``native/cuda/kernels_cuda.h`` on arrays that a ``Memory`` has put where the kernels
can read them: for the shim numpy arrays with sentinels around them, for a GPU torch tensors (``gpu_test.py``).
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from skv_export.native.library import SkvAttention, SkvCache, SkvCudaContext, SkvLayout, SkvTokens
from skv_export.spec.conformance import Case, Inputs, expected_of, make_inputs, output_error
from skv_export.spec.key_basis import MATRICES, KeyBasis
from skv_export.spec.layout import CacheLayout
from skv_export.spec.quantizer import rotate
from skv_export.spec.recipe import LayerConfig
from skv_export.spec.reference import load

TYPES = {"float16": 0, "float": 1, "float32": 1, "bfloat16": 2}
AUTO, SIMPLE, MMA, PREFILL = range(4)
OK, INVALID_ARGUMENT, NOT_SUPPORTED = range(3)

Array = NDArray[Any]


class Memory(Protocol):
    """Where the kernels read and write."""

    def put(self, array: Array) -> Any:
        """Copies an array there."""

    def set(self, buffer: Any, array: Array) -> None:
        """Copies an array of the same shape and type over the one that is there."""

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

    def set(self, buffer: tuple[Array, Array], array: Array) -> None:
        buffer[1][...] = array

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
    """The kernels' C interface on one kind of memory; with an ``architecture``, of compiled kernels too."""

    def __init__(
        self, path: Path, memory: Memory, multiprocessors: int = 4, rows_bytes: int = 0, architecture: int = 0
    ) -> None:
        self.memory = memory
        self.multiprocessors = multiprocessors
        self.rows_bytes = rows_bytes
        self.architecture = architecture
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

    def prepare(
        self, case: Case, inputs: Inputs, path: int = AUTO
    ) -> tuple[dict[str, Any], SkvAttention, SkvCudaContext]:
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
        if inputs.key_basis is not None:
            arrays |= {f"{name} basis": getattr(inputs.key_basis, name) for name in MATRICES}
        buffers = {name: put(array) for name, array in arrays.items()}
        at = {name: address(buffer) for name, buffer in buffers.items()}
        basis = [] if inputs.key_basis is None else [at[f"{name} basis"] for name in MATRICES]
        caches = [
            SkvCache(SkvLayout.of(layout), at[name], int(np.prod(arrays[name].shape[2:])), *matrices)
            for layout, name, matrices in zip(case.layouts, ("past_key", "past_value"), (basis, []), strict=True)
        ]
        batch, tokens = inputs.query.shape[:2]
        hidden = [case.num_heads * case.head_dim, *[case.kv_num_heads * case.head_dim] * 2]
        call = SkvAttention(
            *caches,
            *(SkvTokens(at[name], size) for name, size in zip(("query", "key", "value"), hidden, strict=True)),
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
            at["not_finite"],
        )
        context = SkvCudaContext(
            None, None, 0, max(case.total_lengths), path, -1, self.multiprocessors, self.rows_bytes, self.architecture
        )
        self.load(caches)
        size = self.lib.skv_cuda_scratch_bytes(ctypes.byref(call), ctypes.byref(context))
        if size < 0:
            self.check(-size)
        buffers["scratch"] = put(np.full(max(size, 1), 0xFF, np.uint8))
        context.scratch, context.scratch_bytes = address(buffers["scratch"]), size
        return buffers, call, context

    def load(self, caches: Sequence[SkvCache]) -> None:
        """Loads the kernels that are not built in for the library's ``architecture``, if it has one."""
        if self.architecture:
            layouts = (ctypes.byref(cache.layout) for cache in caches)
            status = self.lib.skv_cuda_load(*layouts, self.architecture, None, None)
            self.check(status if status != NOT_SUPPORTED else OK)

    def compile(self, layouts: Sequence[CacheLayout]) -> int:
        """Compiles the kernels of keys and values that are not built in into the cache folder; returns the status."""
        structures = (ctypes.byref(SkvLayout.of(layout)) for layout in layouts)
        return int(self.lib.skv_cuda_compile(*structures, self.architecture))

    def decode_tile(self, layout: CacheLayout, tile: Array) -> Array:
        """``[T, D]`` of one tile's bytes."""
        source = self.memory.put(tile)
        out = self.memory.put(np.full((layout.tile_tokens, layout.padded_dim), np.nan, np.float32))
        pointers = (ctypes.c_void_p(self.memory.address(x)) for x in (source, out))
        self.check(self.lib.skv_cuda_decode_tile(ctypes.byref(SkvLayout.of(layout)), *pointers, None))
        return self.memory.get(out)

    def dequantize(
        self, layout: CacheLayout, block: Array, head: int, length: int, basis: KeyBasis | None = None
    ) -> Array:
        """``[length, head_dim]`` of one head of blocks ``[N_kv, C]``."""
        held = self.memory.put(block)
        out = self.memory.put(np.full((length, layout.head_dim + 3), 7, np.float32))
        cache, _kept = self.cache(layout, held, block.shape[1], basis)
        self.check(
            self.lib.skv_cuda_dequantize(
                ctypes.byref(cache), block.shape[0], 0, head, ctypes.c_int64(length), TYPES["float"],
                ctypes.c_void_p(self.memory.address(out)), ctypes.c_int64(layout.head_dim + 3), None,
            )
        )  # fmt: skip
        rows = self.memory.get(out)
        assert (rows[:, layout.head_dim :] == 7).all()
        return rows[:, : layout.head_dim]

    def cache(
        self, layout: CacheLayout, held: Any, block_bytes: int, basis: KeyBasis | None
    ) -> tuple[SkvCache, list[Any]]:
        """Describes blocks in memory, and returns what must stay there meanwhile."""
        kept = [] if basis is None else [self.memory.put(getattr(basis, name)) for name in MATRICES]
        matrices = [self.memory.address(buffer) for buffer in kept]
        return SkvCache(SkvLayout.of(layout), self.memory.address(held), block_bytes, *matrices), kept

    def rewind(
        self,
        layout: CacheLayout,
        block: Array,
        length: int,
        new_length: int,
        longest_length: int | None = None,
        basis: KeyBasis | None = None,
    ) -> Array:
        """Blocks ``[N_kv, C]`` of one sequence, taken back."""
        held = self.memory.put(block)
        cache, _kept = self.cache(layout, held, block.shape[1], basis)
        longest = length if longest_length is None else longest_length
        lengths = (ctypes.c_int64(length), ctypes.c_int64(longest), ctypes.c_int64(new_length))
        self.check(self.lib.skv_cuda_rewind(ctypes.byref(cache), block.shape[0], 0, *lengths, None))
        return self.memory.get(held)


def check_dense(kernels: Library) -> None:
    """What attention of somebody else's takes and leaves: dense rows, a call in pieces, what is not a number, padding.

    Raises:
        AssertionError: Something differs from the reference.
    """
    config = LayerConfig(num_sink_tokens=4, recent_tokens=32, tile_tokens=32)
    past, new, tokens, room = (150, 0, 70, 40), (9, 3, 0, 9), 9, 300
    case = Case("dense", config, past_lengths=past, new_tokens=tokens, query_seqlens=new, dtype="float16")
    inputs = make_inputs(case)
    inputs.seqlens_k[3] = 10**6  # a length that can't be
    inputs.query[0, 2, 64], inputs.key[0, 5, 3], inputs.value[1, 1, 70], inputs.value[1, 7, 5] = 4 * [np.nan]
    inputs.value[0, 0, 0] = np.inf
    buffers, call, context = kernels.prepare(case, inputs)
    lib, put, get, address = kernels.lib, kernels.memory.put, kernels.memory.get, kernels.memory.address
    calls = ctypes.byref(call), ctypes.byref(context)
    pointer = lambda buffer: ctypes.c_void_p(address(buffer))  # noqa: E731
    lengths = put(np.zeros((2, 3, 4), np.int32))
    kernels.check(lib.skv_cuda_piece_lengths(*calls, 5, pointer(lengths)))
    (seqlens, fresh, ends), (seqlens2, fresh2, ends2) = get(lengths)
    assert seqlens[:3].tolist() == [154, 2, 69] and seqlens2[:3].tolist() == [158, 2, 69]
    assert fresh.tolist() == [5, 3, 0, -1] and fresh2.tolist() == [4, 0, 0, -1]
    assert ends.tolist() == [154, 4, 74, 4] and ends2.tolist() == [158, 6, 73, 3]
    for b in range(3):
        dense = [put(np.full((2, room, 64), 7, np.float16)) for _ in range(2)]
        kernels.check(lib.skv_cuda_dense_rows(*calls, b, ctypes.c_int64(room), *map(pointer, dense)))
        for layout, cache, buffer in zip(case.layouts, (inputs.past_key, inputs.past_value), dense, strict=True):
            held, _ = load(layout, cache[b].reshape(2, -1), past[b])
            if layout.rotation == "hadamard":
                held = rotate(held, layout.rotation_dim)
            rows, total = get(buffer), past[b] if new[b] else 0  # nothing for an idle sequence
            assert np.array_equal(rows[:, :total], held.astype(np.float16)[:, :total])
            assert (rows[:, total:] == (0 if new[b] else 7)).all()
    masks = put(np.full((4, 8, 1), 0xFFFFFFFF, np.uint32))
    parts = (inputs.query, inputs.key, inputs.value)
    for b in range(4):
        for name, x, target in zip(("query", "key", "value"), parts, (call.query, call.key, call.value), strict=True):
            target.data = address(buffers[name]) + b * tokens * x.shape[2] * 2
        call.batch, call.seqlens_k = 1, address(buffers["seqlens_k"]) + 4 * b
        call.query_seqlens = address(buffers["query_seqlens"]) + 4 * b
        rows = put(np.zeros((tokens, 8 * 64), np.float16))
        kernels.check(lib.skv_cuda_pack_rows(*calls, pointer(rows), ctypes.c_void_p(address(masks) + b * 8 * 4), 1, 0))
        whole = np.concatenate([x[b] for x in parts], 1).astype(np.float16)
        assert np.array_equal(get(rows), np.nan_to_num(whole, nan=0, posinf=65504))
    call.batch, call.seqlens_k = 4, address(buffers["seqlens_k"])
    call.query_seqlens = address(buffers["query_seqlens"])
    for name, target in (("query", call.query), ("key", call.key), ("value", call.value)):
        target.data = address(buffers[name])
    found = get(masks)[..., 0]
    assert np.argwhere(found).tolist() == [[0, 1], [0, 4], [1, 7]]  # the value of a token of padding is nobody's
    assert found[found > 0].tolist() == [1 << 2, 1 << 5, 1 << 1]
    kernels.check(lib.skv_cuda_finish_rows(*calls, pointer(masks)))
    output = get(buffers["output"]).astype(np.float32).reshape(4, tokens, 4, 64)
    expected = np.full(output.shape, 123, np.float32)
    expected[0, 2, 1] = expected[0, 5:, :2] = expected[1, 1:, 2:] = np.nan  # rotated: every channel
    for b in range(3):
        expected[b, new[b] :] = 0
    expected[3] = np.nan
    assert np.array_equal(output, expected, equal_nan=True)


def difference(case: Case, kernels: Library, path: int = AUTO) -> tuple[float, str]:
    """Runs a case and the reference.

    Returns:
        ``output_error`` of the outputs, and the path taken.

    Raises:
        AssertionError: The caches' bytes differ, or something outside a buffer was written.
    """
    inputs = make_inputs(case)
    if inputs.head_sink is not None:
        inputs = dataclasses.replace(inputs, head_sink=inputs.head_sink.astype(case.dtype).astype(np.float32))
    expected, key, value = expected_of(case, inputs)
    result = kernels.attention(case, inputs, path)
    assert np.array_equal(result.key, key), f"{case.name}: bytes of the keys"
    assert np.array_equal(result.value, value), f"{case.name}: bytes of the values"
    return output_error(result.output, expected), result.path


def as_type(x: Array, dtype: str) -> Array:
    """Numbers that ``dtype`` can hold, in its bits (bfloat16 as uint16)."""
    if dtype == "bfloat16":
        bits = x.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return x.astype(np.dtype(dtype))
