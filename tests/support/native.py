"""The native library as the tests see it: kernels.h through ctypes, with sentinels around every buffer.

Knows no torch and no ONNX Runtime, so that a sanitizer can be loaded below it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from unittest import mock

import numpy as np

from skv_export.native.library import SkvAttention, SkvCache, SkvLayout, SkvTokens, library_path
from skv_export.spec import quantizer, reference
from skv_export.spec.conformance import Case, Inputs, expected_of, make_inputs
from skv_export.spec.key_basis import MATRICES, KeyBasis
from skv_export.spec.layout import CacheLayout

TYPE = {"float16": 0, "float": 1, "float32": 1, "bfloat16": 2}
SENTINEL = 0xA5
GUARD = 256
SANITIZED = "SKV_TESTS_SANITIZED" in os.environ
"""Set by test_sanitized.py, which runs these tests again on a library built with sanitizers."""


BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)
PARALLEL_FOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p, BODY, ctypes.c_size_t, ctypes.c_void_p)


class Threads(ctypes.Structure):
    _fields_ = [("run", PARALLEL_FOR), ("pool", ctypes.c_void_p), ("num_threads", ctypes.c_int32)]


class NativeError(Exception):
    """A status other than SKV_OK, with skv_last_error()."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


ISAS = ("scalar", "avx2", "avxvnni", "avx512vnni", "neon")
"""Instruction sets that the kernels are compiled for."""

_isa = ""


def library() -> ctypes.CDLL:
    """Returns the library: with the instruction set of ``instruction_set``, or with the one that it chooses itself."""
    return _load(_isa)


@contextmanager
def instruction_set(name: str) -> Iterator[str]:
    """While the block runs, ``library`` gives a copy that was told to use ``name``; the value is what it uses.

    A loaded library chooses once, so each instruction set has a copy of its own in this process.
    """
    global _isa
    before, _isa = _isa, name
    try:
        yield library().skv_cpu_isa().decode()
    finally:
        _isa = before


def instruction_sets() -> list[str]:
    """Returns those of ``ISAS`` that this build has for this processor."""
    found = []
    for name in ISAS:
        with instruction_set(name) as chosen:
            found += [name] if chosen == name else []
    return found


@cache
def _load(isa: str) -> ctypes.CDLL:
    if isa:  # in a copy of the file, for a file that is loaded already is not loaded again
        with mock.patch.dict(os.environ, SKV_CPU_ISA=isa), tempfile.TemporaryDirectory() as folder:
            lib = ctypes.CDLL(shutil.copy(library_path(), folder))
            lib.skv_cpu_isa()
    else:
        lib = ctypes.CDLL(str(library_path()))
    for name in ("skv_cpu_isa", "skv_cuda_build", "skv_version", "skv_last_error"):
        getattr(lib, name).restype = ctypes.c_char_p
    lib.skv_dequantize.argtypes = [
        ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, ctypes.c_int64, ctypes.c_int32,
        ctypes.c_void_p, ctypes.c_int64,
    ]  # fmt: skip
    lib.skv_rewind.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, *3 * [ctypes.c_int64]]
    lib.skv_layout_sizes.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    lib.skv_decode_tile.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    return lib


def check(status: int) -> None:
    if status:
        raise NativeError(status, library().skv_last_error().decode())


class Guarded:
    """A copy of an array between guards of SENTINEL bytes, on a 16-byte boundary that is no 32-byte boundary.

    Under a sanitizer there are no guards: it sees the end of the allocation itself, and reads past it too.
    """

    def __init__(self, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array)
        guard = 0 if SANITIZED else GUARD
        self.memory = np.full(array.nbytes + 2 * guard, SENTINEL, np.uint8)
        self.start = 0 if SANITIZED else guard // 2 + (16 - self.memory.ctypes.data - guard // 2) % 32
        self.end = self.start + array.nbytes
        self.array = self.memory[self.start : self.end].view(array.dtype).reshape(array.shape)
        self.array[...] = array

    @property
    def pointer(self) -> int:
        return self.memory.ctypes.data + self.start

    def check(self) -> None:
        assert (self.memory[: self.start] == SENTINEL).all(), "written before the buffer"
        assert (self.memory[self.end :] == SENTINEL).all(), "written past the buffer"


@contextmanager
def threads(count: int) -> Iterator[ctypes.c_void_p | None]:
    """An SkvThreads over a Python pool that takes the jobs last first; None for one thread."""
    if count == 1:
        yield None
        return
    with ThreadPoolExecutor(count) as pool:

        def run(_: int, body: Callable[[int, int], None], jobs: int, context: int) -> None:
            for future in [pool.submit(body, context, i) for i in reversed(range(jobs))]:
                future.result()

        holder = Threads(PARALLEL_FOR(run), None, count)
        yield ctypes.cast(ctypes.pointer(holder), ctypes.c_void_p)


class Call:
    """One call of the op on copies of a case's inputs; `fields` override the struct's."""

    def __init__(self, case: Case, inputs: Inputs, *, batch: slice = slice(None), packed: bool = False) -> None:
        dtype = np.dtype(case.dtype)
        d, n, n_kv = case.head_dim, case.num_heads, case.kv_num_heads
        tensors = {name: getattr(inputs, name)[batch].astype(dtype) for name in ("query", "key", "value")}
        rows, tokens = tensors["query"].shape[:2]
        self.caches = [Guarded(inputs.past_key[batch]), Guarded(inputs.past_value[batch])]
        self.output = Guarded(np.full((rows, tokens, n * d), 7, dtype))
        self.not_finite = Guarded(np.full(1, -1, np.int32))
        seqlens = Guarded(inputs.seqlens_k[batch].astype(np.int32))
        new = None if inputs.query_seqlens is None else Guarded(inputs.query_seqlens[batch].astype(np.int32))
        sink = None if inputs.head_sink is None else Guarded(inputs.head_sink.astype(dtype))
        if packed:
            all_three = Guarded(np.concatenate([tensors[k] for k in ("query", "key", "value")], -1))
            starts = [0, n * d, (n + n_kv) * d]
            native = [SkvTokens(all_three.pointer + s * dtype.itemsize, (n + 2 * n_kv) * d) for s in starts]
            inputs_kept = [all_three]
        else:
            inputs_kept = [Guarded(tensors[k]) for k in ("query", "key", "value")]
            native = [SkvTokens(g.pointer, h * d) for g, h in zip(inputs_kept, (n, n_kv, n_kv), strict=True)]
        basis = [] if inputs.key_basis is None else [Guarded(getattr(inputs.key_basis, name)) for name in MATRICES]
        self.buffers = [*self.caches, self.output, self.not_finite, seqlens, *inputs_kept, *basis]
        self.buffers += [g for g in (new, sink) if g is not None]
        self.call = SkvAttention(
            *(
                SkvCache(SkvLayout.of(layout), g.pointer, g.array.shape[2] * g.array.shape[3], *matrices)
                for layout, g, matrices in zip(case.layouts, self.caches, ([m.pointer for m in basis], []), strict=True)
            ),
            *native,
            output=self.output.pointer,
            seqlens_k=seqlens.pointer,
            query_seqlens=new.pointer if new else None,
            head_sink=sink.pointer if sink else None,
            type=TYPE[case.dtype],
            batch=rows,
            tokens=tokens,
            num_heads=n,
            kv_num_heads=n_kv,
            softcap=case.softcap,
            not_finite=self.not_finite.pointer,
        )

    def run(self, function: str = "skv_attention", thread_count: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns output (float32), present_key, present_value, having looked at every guard."""
        with threads(thread_count) as pool:
            check(getattr(library(), function)(ctypes.byref(self.call), pool))
        self.check_guards()
        return self.output.array.astype(np.float32), *(c.array for c in self.caches)

    def check_guards(self) -> None:
        for buffer in self.buffers:
            buffer.check()


def append(
    layout: CacheLayout,
    block: np.ndarray,
    past: int,
    x: np.ndarray,
    chunks: Sequence[int],
    basis: KeyBasis | None = None,
) -> None:
    """reference.append through skv_append, in chunks, in place: ``block`` [N_kv, C], ``x`` [N_kv, S, head_dim].

    The other tensor's cache is a scratch copy of the same shape.
    """
    heads, total, d = x.shape
    assert sum(chunks) == total
    other = dataclasses.replace(layout, is_value=not layout.is_value)
    caches = [Guarded(block), Guarded(np.full_like(block, 0xFF))]
    order = [1, 0] if layout.is_value else [0, 1]
    layouts = [layout, other]
    done = 0
    for size in chunks:
        new = Guarded(x[:, done : done + size].swapaxes(0, 1).astype(np.float32))
        done += size
        seqlens = Guarded(np.array([past + done - 1], np.int32))
        new_tokens = Guarded(np.array([size], np.int32))
        bases = [basis, None]
        pair = [SkvCache.of(layouts[i], caches[i].pointer, block.shape[1], bases[i]) for i in order]
        tokens = SkvTokens(new.pointer, heads * d)
        call = SkvAttention(
            *pair, SkvTokens(), tokens, tokens, seqlens_k=seqlens.pointer, query_seqlens=new_tokens.pointer,
            type=TYPE["float"], batch=1, tokens=size, num_heads=heads, kv_num_heads=heads,
        )  # fmt: skip
        check(library().skv_append(ctypes.byref(call), None))
        for buffer in (*caches, new, seqlens, new_tokens):
            buffer.check()
    block[...] = caches[0].array


def dequantize(
    layout: CacheLayout,
    blocks: np.ndarray,
    b: int,
    h: int,
    length: int,
    dtype: str = "float",
    stride: int | None = None,
    basis: KeyBasis | None = None,
) -> np.ndarray:
    """skv_dequantize of ``blocks`` [B, N_kv, C]: rows [length, head_dim] as float32."""
    memory, stride = Guarded(blocks), stride or layout.head_dim
    numpy_type = {"float": np.float32, "float16": np.float16}[dtype]
    out = Guarded(np.full((length, stride), 7, numpy_type))
    cache = SkvCache.of(layout, memory.pointer, blocks.shape[2], basis)
    check(
        library().skv_dequantize(ctypes.byref(cache), blocks.shape[1], b, h, length, TYPE[dtype], out.pointer, stride)
    )
    memory.check()
    out.check()
    assert (out.array[:, layout.head_dim :] == 7).all() and np.array_equal(memory.array, blocks)
    return out.array[:, : layout.head_dim].astype(np.float32)


def decode_tile(layout: CacheLayout, tile: np.ndarray) -> np.ndarray:
    memory, out = Guarded(tile), Guarded(np.zeros((layout.tile_tokens, layout.padded_dim), np.float32))
    check(library().skv_decode_tile(ctypes.byref(SkvLayout.of(layout)), memory.pointer, out.pointer))
    memory.check()
    out.check()
    return out.array


def rewind(
    layout: CacheLayout,
    block: np.ndarray,
    length: int,
    new_length: int,
    longest_length: int | None = None,
    basis: KeyBasis | None = None,
) -> None:
    """reference.rewind through skv_rewind: ``block`` [N_kv, C], in place."""
    memory = Guarded(block)
    cache = SkvCache.of(layout, memory.pointer, block.shape[1], basis)
    longest = length if longest_length is None else longest_length
    status = library().skv_rewind(ctypes.byref(cache), block.shape[0], 0, length, longest, new_length)
    memory.check()
    block[...] = memory.array
    check(status)


def awkward_numbers(dim: int, seed: int) -> np.ndarray:
    """Returns ``[1, 80, dim]``: constant channels, tiny numbers, a token of zeros, channels of both zeros."""
    x = np.random.default_rng(seed).standard_normal((1, 80, dim)).astype(np.float32)
    even = np.arange(80) % 2 == 0
    zero, minus_zero = np.float32(0), np.float32(-0.0)
    x[0, :, 0], x[0, :, 1], x[0, 40], x[0, :, 2] = 3.0, 1e-30 * x[0, :, 1], 0, -5.0
    x[0, :, 3], x[0, :, 4], x[0, :, 5] = (
        np.where(even, zero, minus_zero),
        minus_zero,
        np.where(even, minus_zero, zero),
    )
    return x


def assert_append_is_the_references(
    layout: CacheLayout, x: np.ndarray, counts: Sequence[int], basis: KeyBasis | None = None
) -> None:
    """Appends ``x``, ``[N_kv, tokens, D]``, in calls of ``counts`` tokens: the bytes are the reference's."""
    rows, width = layout.shape(x.shape[1])
    got, want = (np.full((len(x), rows * width), 0xFF, np.uint8) for _ in range(2))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        reference.append(layout, want, 0, x, basis)
    append(layout, got, 0, x, counts, basis)
    assert np.array_equal(got, want), (layout, np.abs(x).max())


def assert_append_of_two_tiles_is_the_references(layout: CacheLayout) -> None:
    """The same with random tokens that fill two tiles and begin a third, in two calls."""
    count = 2 * layout.tile_tokens + layout.full_rows + 3
    rng = np.random.default_rng(zlib.crc32(repr(layout).encode()))
    x = rng.standard_normal((1, count, layout.head_dim)) + 2 * rng.standard_normal(layout.head_dim)
    assert_append_is_the_references(layout, x.astype(np.float32), [count - 5, 5])


def assert_random_tile_is_the_references(layout: CacheLayout) -> None:
    """Whatever stands in a tile, both read the same numbers."""
    raw = np.random.default_rng(layout.tile_bytes).integers(0, 256, layout.tile_bytes, np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):
        want = quantizer.decode_tile(layout, raw)
    assert np.array_equal(decode_tile(layout, raw), want, equal_nan=True), layout


def assert_attention_is_the_references(case: Case) -> None:
    """Both caches' bytes are equal, and the output is within the case's tolerance."""
    inputs = make_inputs(case)
    want = expected_of(case, inputs)
    output, key, value = Call(case, inputs).run()
    assert np.array_equal(key, want[1]) and np.array_equal(value, want[2])
    assert np.abs(output - want[0]).max() <= case.tolerance * np.abs(want[0]).max()
