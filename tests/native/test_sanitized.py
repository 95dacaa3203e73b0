"""The kernels' tests once more, on a library built with AddressSanitizer and UndefinedBehaviorSanitizer.

The library is built into build/sanitized, by the compiler that cmake finds, and loaded into a Python of its own below
which the sanitizer's runtime is preloaded. SKV_SANITIZED_TESTS=all runs every test of test_kernels.py there; without
it, a part that covers each code path.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "sanitized"
PART = (
    "(test_attention_is_the_reference_s and not K and not prompt) or K1V8 or K3V5 or K6V2 or K16 or "
    "(test_append_writes and 80) or test_any_group or test_appending or test_rewind or test_dequantize or "
    "refused or test_threads or not_finite"
)


@pytest.fixture(scope="module")
def library() -> Path:
    configure = [
        "cmake",
        "-S",
        str(ROOT),
        "-B",
        str(BUILD),
        "-DCMAKE_CXX_FLAGS=-O1",
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DSKV_CUDA=off",
    ]
    configure += ["-DSKV_SANITIZE=address,undefined", "-DSKV_ORT=OFF"]
    for command in (configure, ["cmake", "--build", str(BUILD), "--parallel", "2"]):
        subprocess.run(command, check=True, capture_output=True)
    return BUILD / "libskv_ops.so"


def runtime() -> str:
    """libasan.so of the compiler in use; libubsan comes with the library."""
    path = subprocess.run(
        ["c++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert Path(path).is_absolute(), (
        "no AddressSanitizer runtime beside this compiler: install libasan (Debian: libgcc-12-dev)"
    )
    return path


def run_sanitized(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "LD_PRELOAD": runtime(),
        "ASAN_OPTIONS": "detect_leaks=0,detect_stack_use_after_return=1",  # Python itself never frees all
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "SKV_OPS_LIBRARY": str(library),
        "SKV_TESTS_SANITIZED": "1",
    }
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)


def test_the_sanitizers_see_an_overrun(library: Path) -> None:
    """A layout that says more than its buffer holds must stop the process: else a pass below would mean nothing."""
    code = (
        "import sys; sys.path.insert(0, 'tests/support')\n"
        "import native, numpy as np\n"
        "from skv_export.spec.layout import CacheLayout\n"
        "layout = CacheLayout(64, 4, 'channel', 'none', 64, 4, 32, 32, 'float16', False)\n"
        "native.decode_tile(layout, np.zeros(layout.tile_bytes - 64, np.uint8))\n"
    )
    result = run_sanitized(library, "-c", code)
    assert result.returncode != 0 and "heap-buffer-overflow" in result.stderr, result.stderr


def test_kernels_under_sanitizers(library: Path) -> None:
    """Every instruction set of this processor, in one process."""
    chosen = [] if os.environ.get("SKV_SANITIZED_TESTS") == "all" else ["-k", PART]
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/native/test_kernels.py", *chosen]
    result = run_sanitized(library, *command)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def test_calibrated_keys_under_sanitizers(library: Path) -> None:
    part = "(append and 80) or dequantize or golden or refused or threads or (attention and not 128 and not 256)"
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/native/test_key_basis.py", "-k", part]
    result = run_sanitized(library, *command)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def test_random_calls_under_sanitizers(library: Path) -> None:
    files = [f"tests/native/test_{name}.py" for name in ("fuzz", "rewind", "not_a_number")]
    chosen = ["-k", "fuzz or refused or attention or (K4 and recent and 16 and 70)"]
    result = run_sanitized(library, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, *chosen)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
