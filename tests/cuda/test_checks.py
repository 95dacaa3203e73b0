"""The CUDA kernels under sanitizers, with bugs planted, in ONNX Runtime, and through nvcc where it is installed."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from builds import ASAN, COMPILER, ROOT, SOURCES, TSAN, build_ort_shim, build_shim
from harness import OK
from mutations import MUTATIONS, Mutation

pytestmark = pytest.mark.slow

OUT = ROOT / "build" / "cuda_shim"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def runtime(name: str) -> str:
    """The compiler's sanitizer library, to be loaded before Python."""
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def run_check(library: Path, sanitizer: str = "") -> subprocess.CompletedProcess[str]:
    """Runs check.py on a library built for a sanitizer, or for none."""
    command = [sys.executable, str(ROOT / "tests" / "cuda" / "check.py"), str(library)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    if sanitizer == ASAN:
        environment["LD_PRELOAD"] = f"{runtime('libasan.so')} {runtime('libubsan.so')}"
        environment["ASAN_OPTIONS"] = "detect_leaks=0"
    if sanitizer == TSAN:
        environment["LD_PRELOAD"] = runtime("libtsan.so")
        environment["TSAN_OPTIONS"] = "halt_on_error=1"
        command = ["setarch", "-R", *command, "short"]  # its shadow memory does not fit a randomized address space
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def build_for(sanitizer: str, sources: Path = SOURCES, out: Path = OUT) -> Path:
    flags = [sanitizer, "-g", *(["-fno-sanitize-recover=all"] if sanitizer == ASAN else [])] if sanitizer else []
    return build_shim(out, flags=flags, sources=sources, few=True)


@pytest.mark.parametrize("sanitizer", [ASAN, TSAN], ids=["address and undefined", "thread"])
def test_sanitizers_find_nothing(sanitizer: str) -> None:
    result = run_check(build_for(sanitizer), sanitizer)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_planted_bugs_are_found(mutation: Mutation, tmp_path: Path) -> None:
    native = tmp_path / "native"
    shutil.copytree(SOURCES.parent, native)
    file = native / "cuda" / mutation.file
    text = file.read_text()
    assert text.count(mutation.old) == 1, "the planted text stands there no longer: update mutations.py"
    file.write_text(text.replace(mutation.old, mutation.new))
    sanitizer = {"results": "", "address": ASAN, "thread": TSAN}[mutation.found_by]
    result = run_check(build_for(sanitizer, native / "cuda", tmp_path / "build"), sanitizer)
    assert result.returncode != 0, "the bug survived"
    expected = {"results": "", "address": "AddressSanitizer", "thread": "data race"}[mutation.found_by]
    assert expected in result.stderr


def test_the_op_in_onnxruntime() -> None:
    """ort/kernel_cuda.cc, for the CPU provider over the shim, in a process of its own: the op's tests of results."""
    environment = {**os.environ, "SKV_OPS_LIBRARY": str(build_ort_shim(OUT))}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(ROOT / "tests" / "cuda" / "ort_op.py"),
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_nvcc_compiles_every_architecture_without_spills(tmp_path: Path) -> None:
    """Nothing of any kernel is in local memory; of decode_mma, the default layout's: the release build has them all.

    What does not depend on the architecture is compiled once, for head_dim 128, and given to ptxas for each of them;
    what takes most registers for each number of channels, too.
    """
    command = ["nice", "nvcc", "-std=c++17", "-O3", "-Xcompiler=-fPIC", "-Xptxas", "-v"]
    mma = list(SOURCES.glob("decode_mma*.cu"))
    others = [source for source in SOURCES.glob("*.cu") if source not in mma]
    first, *rest = ARCHITECTURES
    text = f'-DSKV_CUDA_SOURCES="{SOURCES}"'
    whole = [
        [str(source), f"-arch=sm_{first}", "-c", "-DSKV_CUDA_FEW=64", text] for source in (*mma, *others, *COMPILER)
    ]
    codes = ",".join(f"sm_{architecture}" for architecture in ARCHITECTURES)
    jobs = [
        *whole,
        *([str(source), "-gencode", f"arch=compute_{first},code=[{codes}]", "-c", "-DSKV_CUDA_FEW=128"]
          for source in others),
        [str(SOURCES / "append.cu"), "-gencode", f"arch=compute_{first},code=sm_90", "-c"],
        *([str(source), f"-arch=sm_{architecture}", "-cubin", "-DSKV_CUDA_FEW=64"]
          for source in mma for architecture in rest),
    ]  # fmt: skip

    def compile_(job: tuple[int, list[str]]) -> str:
        number, arguments = job
        result = subprocess.run(
            [*command, *arguments, "-o", str(tmp_path / f"{number}.o")], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert "warning" not in result.stderr, result.stderr
        return result.stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = "".join(pool.map(compile_, enumerate(jobs)))
    kernels = re.findall(r"Compiling entry function '\w*?([a-z][a-z_]*_kernel)", reports)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", reports)
    assert Counter(kernels)["decode_mma_kernel"] == len(ARCHITECTURES) * (5 + 5 + 4)
    assert set(kernels) == {
        name
        for source in SOURCES.glob("*.cu*")
        for name in re.findall(r"^(?:__global__ .*?|    )(\w+_kernel)\(", source.read_text(), re.MULTILINE)
    }
    assert len(frames) == len(kernels) and set(frames) == {("0", "0", "0")}
    # The kernels are a library of their own, as gpu-test builds it, and it loads without a driver.
    objects = [str(tmp_path / f"{number}.o") for number in range(len(whole))]
    subprocess.run(["nvcc", "-shared", *objects, "-o", str(tmp_path / "libskv_cuda.so")], check=True)
    kernels = ctypes.CDLL(str(tmp_path / "libskv_cuda.so"), os.RTLD_NOW)
    kernels.skv_cuda_last_error.restype = ctypes.c_char_p
    numbers = ctypes.byref(ctypes.c_int32()), ctypes.byref(ctypes.c_int32())
    assert kernels.skv_cuda_device(*numbers) == OK or b"driver" in kernels.skv_cuda_last_error()
