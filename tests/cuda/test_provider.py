"""The op and exported models under ONNX Runtime's CUDA provider, over a CUDA runtime of the tests' own.

Wants ``SKV_ORT_GPU``, a folder that onnxruntime-gpu has been installed into (``pip install --no-deps --target``), and
nvcc's headers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from builds import ROOT, SOURCES, build_ort_shim, build_runtime, cuda_headers

OUT = ROOT / "build" / "cuda_shim"
ORT_GPU = Path(os.environ.get("SKV_ORT_GPU", ""))
PROVIDER = ORT_GPU / "onnxruntime" / "capi" / "libonnxruntime_providers_cuda.so"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PROVIDER.is_file() or cuda_headers() is None,
        reason="SKV_ORT_GPU has no onnxruntime-gpu, or nvcc no headers",
    ),
]


# File, what stands there, what a mistake would be; each must be found by decoding under the provider.
PLANTED = {
    "kernels on the default stream": (
        "kernel_cuda.cc",
        "check(api().KernelContext_GetGPUComputeStream(context, &device.stream));",
        "",
    ),
    "total_sequence_length on the device": ("op.cc", "MemoryType::kCpuInput", "MemoryType::kDefault"),
    "lengths read by the host": (
        "kernel_cuda.cc",
        "device.max_length = call.total_sequence_length.as<int32_t>()[0];",
        "device.max_length = call.seqlens_k.as<int32_t>()[0] + 1;",
    ),
    "a wait in every call": (
        "kernel_cuda.cc",
        "check_kernel(skv_cuda_attention(&attention, &device));",
        "check_kernel(skv_cuda_attention(&attention, &device));\ncheck_kernel(skv_cuda_synchronize(device.stream));",
    ),
}


@pytest.fixture(scope="module")
def runtime() -> Path:
    return build_runtime(OUT, PROVIDER)


def run(runtime: Path, library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ORT_GPU),
        "LD_LIBRARY_PATH": str(runtime),
        "SKV_OPS_LIBRARY": str(library),
        "SKV_TEST_PROVIDER": "CUDAExecutionProvider",
        "XDG_CACHE_HOME": str(OUT / "cache"),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("file", ["ort_op.py", "provider.py"])
def test_under_the_cuda_provider(file: str, runtime: Path) -> None:
    result = run(runtime, build_ort_shim(OUT, runtime), str(ROOT / "tests" / "cuda" / file))
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


@pytest.mark.parametrize("planted", PLANTED)
def test_planted_mistakes_are_found(planted: str, runtime: Path, tmp_path: Path) -> None:
    name, old, new = PLANTED[planted]
    text = (SOURCES.parent / "ort" / name).read_text()
    assert old in text, "the planted text stands there no longer: update PLANTED"
    (tmp_path / name).write_text(text.replace(old, new))
    library = build_ort_shim(OUT, runtime, tmp_path / name)
    result = run(runtime, library, str(ROOT / "tests" / "cuda" / "provider.py"), "-x", "-k", "decoding")
    assert result.returncode != 0, "the mistake survived"
