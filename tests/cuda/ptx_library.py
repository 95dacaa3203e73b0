"""The kernels' C interface on nvcc's PTX: ptx_machine executes launches, all around them is the library's own."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from builds import SOURCES
from harness import Array, HostMemory, Library
from ptx_machine import Block, Counters, GlobalMemory, TrapError
from ptx_program import Instruction, Kernel, kernels_of

_KERNEL = re.compile(r"[a-z][a-z_]*_kernel(?:I(?:L[bi]n?\d+E|NS\d_\d+[A-Za-z]+I(?:L[bi]n?\d+E)+E)+E)?")
_ON_LAUNCH = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t), ctypes.c_size_t,
)  # fmt: skip


def compile_ptx(out: Path, sources: Sequence[Path], head_dim: int = 64) -> dict[str, Kernel]:
    """Compiles kernels with nvcc, each file once per content of all sources.

    Args:
        out: Where PTX files stand.
        sources: ``.cu`` files, compiled as on sm_80.
        head_dim: The only one that kernels are compiled for.

    Returns:
        Kernels by name and template arguments, such as ``append_kernelILi2EE``.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = list(pool.map(lambda source: ptx_of(out, source, head_dim), sources))
    return {key: kernel for file in files for key, kernel in keyed(file.read_text()).items()}


def ptx_of(out: Path, source: Path, head_dim: int = 64) -> Path:
    """Compiles one file; see ``compile_ptx``."""
    out.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(f"{head_dim}".encode())
    headers = [*source.parent.glob("*.cuh"), *source.parent.glob("*.h"), *source.parents[1].glob("*.h")]
    for file in (*sorted(headers), source):
        digest.update(file.read_bytes())
    target = out / f"{source.stem}.{digest.hexdigest()[:16]}.ptx"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}")
        command = ["nvcc", "-std=c++17", "-O3", "-arch=compute_80", "-ptx", f"-DSKV_CUDA_FEW={head_dim}"]
        subprocess.run([*command, str(source), "-o", str(partial)], check=True)
        partial.rename(target)
    return target


def keyed(text: str) -> dict[str, Kernel]:
    """The kernels of a file's text by ``key_of``."""
    return {key_of(name): kernel for name, kernel in kernels_of(text).items()}


def key_of(mangled: str) -> str:
    """A kernel's name and template arguments, the same from g++ and nvcc."""
    found = _KERNEL.search(mangled)
    assert found is not None, mangled
    return found[0]


class PtxMemory(HostMemory):
    """numpy arrays between sentinels; nothing else can be read or written."""

    def __init__(self) -> None:
        self.known = GlobalMemory()

    def put(self, array: Array) -> tuple[Array, Array]:
        """Copies an array there."""
        whole, inner = super().put(array)
        self.known.add(inner)
        return whole, inner


class PtxLibrary(Library):
    """The library of the shim, with kernels from PTX.

    Attributes:
        counters: What launches did since the last ``reset``, by kernel.
        shared_less: Bytes of shared memory that launches are given less than they ask for.
    """

    memory: PtxMemory

    def __init__(self, path: Path, kernels: dict[str, Kernel], **options: Any) -> None:
        super().__init__(path, PtxMemory(), **options)
        self._kernels = kernels
        self._trap: Exception | None = None
        self.shared_less = 0
        self.counters: dict[str, Counters] = {}
        listing = subprocess.run(["nm", str(path)], check=True, capture_output=True, text=True).stdout
        symbols = {parts[-1]: int(parts[0], 16) for line in listing.splitlines() if len(parts := line.split()) == 3}
        here = ctypes.cast(self.lib.skv_cuda_attention, ctypes.c_void_p).value or 0
        base = here - symbols["skv_cuda_attention"]
        self._names = {base + at: key_of(name) for name, at in symbols.items() if _KERNEL.search(name)}
        self._callback = _ON_LAUNCH(self._launch)

    def __enter__(self) -> PtxLibrary:
        self.lib.skv_shim_on_launch(self._callback)
        return self

    def __exit__(self, *_: object) -> None:
        self.lib.skv_shim_on_launch(None)

    def reset(self) -> None:
        """Forgets what was counted, and the buffers."""
        self.counters.clear()
        self.memory.known = GlobalMemory()

    def check(self, status: int) -> None:
        """Raises what a launch or the library has to say.

        Raises:
            TrapError: A kernel did what it must not.
        """
        if self._trap is not None:
            trap, self._trap = self._trap, None
            raise trap
        super().check(status)

    def code(self, kernel: str) -> Sequence[Instruction]:
        """A kernel's instructions, in the order that counters number them."""
        return self._kernels[kernel].code

    def _launch(
        self, kernel: int, grid: Any, threads: int, shared_bytes: int, arguments: Any, sizes: Any, count: int
    ) -> None:
        try:
            name = self._names[kernel]
            given = [ctypes.string_at(arguments[i], sizes[i]) for i in range(count)]
            x, y, z = grid[0], grid[1], grid[2]
            with np.errstate(all="ignore"):
                for at in itertools.product(range(z), range(y), range(x)):
                    where = (x, y, z), (at[2], at[1], at[0])
                    known = self.memory.known
                    counters = self.counters.setdefault(name, Counters())
                    before, given_bytes = counters.instructions.total(), shared_bytes - self.shared_less
                    Block(self._kernels[name], given, *where, threads, given_bytes, known, counters).run()
                    taken = (counters.instructions.total() - before) / (threads / 32)
                    counters.longest = max(counters.longest, taken)
        except TrapError as trap:
            self._trap = self._trap or TrapError(f"{name}: {trap}")
        except Exception as error:  # noqa: BLE001  it would be lost in the library's frames; check raises it
            self._trap = self._trap or error


ALL_SOURCES = [
    SOURCES / f"{name}.cu"
    for name in ("append", "decode_mma_64", "decode_simple", "dequantize", "prefill", "prepare", "prompt")
]
