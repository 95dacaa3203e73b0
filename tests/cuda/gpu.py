"""The kernels on a GPU: builds the library for the machine's card, and manages device memory. Needs nvcc, torch and
numpy.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
try:
    import ml_dtypes  # noqa: F401

    HAS_BFLOAT16 = True
except ImportError:  # a bare machine: only the number format's name is needed, and its cases are left out
    sys.modules["ml_dtypes"] = types.SimpleNamespace(bfloat16=np.float16)  # type: ignore[assignment]
    HAS_BFLOAT16 = False
from builds import COMPILER, SOURCES  # noqa: E402
from harness import Array, Library  # noqa: E402


def can_pack(parameter_bits: int, recent_type: str) -> bool:
    """Whether the reference has bfloat16 numbers where a layout holds some."""
    return HAS_BFLOAT16 or (parameter_bits != 8 and recent_type != "bfloat16")


class DeviceMemory:
    """torch tensors between sentinels."""

    guard = 256

    def put(self, array: Array) -> tuple[torch.Tensor, np.dtype[Any], tuple[int, ...]]:
        data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        whole = np.full(data.size + 2 * self.guard, 0xA5, np.uint8)
        whole[self.guard : self.guard + data.size] = data
        return torch.from_numpy(whole).cuda(), array.dtype, array.shape

    def set(self, buffer: tuple[torch.Tensor, np.dtype[Any], tuple[int, ...]], array: Array) -> None:
        data = torch.from_numpy(np.ascontiguousarray(array).view(np.uint8).reshape(-1).copy())
        buffer[0][self.guard : self.guard + data.numel()].copy_(data)

    def address(self, buffer: tuple[torch.Tensor, np.dtype[Any], tuple[int, ...]]) -> int:
        return int(buffer[0].data_ptr()) + self.guard

    def get(self, buffer: tuple[torch.Tensor, np.dtype[Any], tuple[int, ...]]) -> Array:
        tensor, dtype, shape = buffer
        whole = tensor.cpu().numpy()
        inner = whole[self.guard : whole.size - self.guard]
        assert (whole[: self.guard] == 0xA5).all() and (whole[whole.size - self.guard :] == 0xA5).all(), (
            "written outside of the buffer"
        )
        return inner.view(dtype).reshape(shape)


def require() -> str:
    """Returns the card's name.

    Raises:
        SystemExit: No nvcc, or no GPU of compute capability 8.0 or newer.
    """
    if shutil.which("nvcc") is None:
        sys.exit("gpu: nvcc is not on the PATH; install a CUDA toolkit")
    if not torch.cuda.is_available():
        sys.exit("gpu: torch sees no GPU; got none, expected an NVIDIA GPU and a driver")
    if torch.cuda.get_device_capability() < (8, 0):
        sys.exit(f"gpu: compute capability {torch.cuda.get_device_capability()}, expected (8, 0) or newer")
    return torch.cuda.get_device_name()


def build(out: Path) -> Path:
    """Compiles all kernels for this card, once per content of the sources."""
    capability = "".join(map(str, torch.cuda.get_device_capability()))
    files = [*sorted(SOURCES.glob("*.cu")), *COMPILER]
    digest = hashlib.sha256(capability.encode())
    for file in sorted([*SOURCES.glob("*.*"), *SOURCES.parent.glob("k*.h")]):
        digest.update(file.read_bytes())
    library = out / digest.hexdigest()[:16] / "libskv_cuda.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    command = ["nvcc", "-std=c++17", "-O3", "-lineinfo", f"-arch=sm_{capability}", "-Xcompiler=-fPIC"]
    command.append(f'-DSKV_CUDA_SOURCES="{SOURCES}"')

    def compile_(file: Path) -> str:
        target = library.parent / f"{file.stem}.o"
        subprocess.run([*command, "-c", str(file), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_, files))
    partial = library.with_suffix(".partial")
    subprocess.run([*command, "-shared", *objects, "-ldl", "-o", str(partial)], check=True)
    partial.rename(library)
    return library


def load() -> Library:
    """The kernels on this card."""
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    major, minor = torch.cuda.get_device_capability()
    library = build(SOURCES.parents[2] / "build" / "gpu")
    return Library(library, DeviceMemory(), multiprocessors, architecture=10 * major + minor)
