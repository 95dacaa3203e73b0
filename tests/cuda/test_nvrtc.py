"""Kernels that are not built in: compiled by NVRTC where there is one, kept, and run as what has their names."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from builds import ROOT, SHIM, build_shim
from check import cases
from harness import MMA, HostMemory, KernelError, Library, difference

from skv_export.native.library import ORIGINS, SkvLayout
from skv_export.spec.conformance import Case
from skv_export.spec.layout import CacheLayout
from skv_export.spec.recipe import LayerConfig

pytestmark = pytest.mark.slow

OUT = ROOT / "build" / "cuda_shim"
NVRTC = os.environ.get("SKV_NVRTC", "")
OLD = [path for path in os.environ.get("SKV_NVRTC_OLD", "").split(":") if Path(path).is_file()]
"""The oldest releases that are supported of the majors that are looked for."""
assert len(OLD) == os.environ.get("SKV_NVRTC_OLD", "").count("libnvrtc"), "SKV_NVRTC_OLD names files that are not there"
with_nvrtc = pytest.mark.skipif(not NVRTC, reason="SKV_NVRTC names no libnvrtc.so (.ci/install makes one)")
SMALL = LayerConfig(num_sink_tokens=4, recent_tokens=32, tile_tokens=32)
PER_TOKEN = dataclasses.replace(SMALL, k_bits=8, v_bits=8, k_granularity="token")
TWO_WIDTHS = dataclasses.replace(SMALL, k_bits=2, v_bits=4)
FRAME_SIZE = rb"\x04\x11\x08\x00.\x00\x00\x00(.{4})"
"""Of a kernel in a cubin's .nv.info, behind its symbol's number: local memory of a thread."""
SAY = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p)


@pytest.fixture(scope="module")
def built() -> Path:
    return build_shim(OUT, few=True, compiles=True)


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("fake") / "libnvrtc.so"
    command = ["g++", "-std=c++17", "-shared", "-fPIC", str(SHIM / "fake_nvrtc.cc"), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


@pytest.fixture
def machine(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """The library as one that has found no NVRTC yet, an empty cache folder, and an NVRTC to find."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FAKE_NVRTC_LOG", str(tmp_path / "log"))

    def start(nvrtc: str | Path) -> Path:
        monkeypatch.setenv("SKV_NVRTC", str(nvrtc))
        return Path(shutil.copy(built, tmp_path / f"lib{len(list(tmp_path.iterdir()))}.so"))

    return start


def compile_(library: Path, config: LayerConfig = TWO_WIDTHS, architecture: int = 90, head_dim: int = 64) -> None:
    kernels = Library(library, HostMemory())
    layouts = (ctypes.byref(SkvLayout.of(layout)) for layout in CacheLayout.pair(config, head_dim))
    kernels.check(kernels.lib.skv_cuda_compile(*layouts, architecture))


def load(library: Path, config: LayerConfig, architecture: int = 80) -> tuple[int, list[tuple[int, str]]]:
    """The status, and what was said."""
    said: list[tuple[int, str]] = []
    kernels = Library(library, HostMemory())
    layouts = (ctypes.byref(SkvLayout.of(layout)) for layout in CacheLayout.pair(config, 64))
    hear = SAY(lambda _, is_warning, text: said.append((is_warning, text.decode())))
    return kernels.lib.skv_cuda_load(*layouts, architecture, hear, None), said


def origin(library: Path, config: LayerConfig, architecture: int = 0) -> tuple[str, str]:
    text = ctypes.c_char_p()
    layouts = (ctypes.byref(SkvLayout.of(layout)) for layout in CacheLayout.pair(config, 64))
    number = Library(library, HostMemory()).lib.skv_cuda_origin(*layouts, architecture, ctypes.byref(text))
    return ORIGINS[number], (text.value or b"").decode()


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "skv_export" / "kernels").iterdir())


def compiled(tmp_path: Path) -> list[str]:
    """The architecture of each compilation."""
    log = tmp_path / "log"
    return [line.rsplit("=")[1] for line in log.read_text().splitlines()] if log.exists() else []


@with_nvrtc
@pytest.mark.parametrize(
    ("architecture", "head_dim", "config"),
    [
        (90, 64, dataclasses.replace(SMALL, k_bits=3, v_bits=8, v_granularity="channel")),
        (120, 64, dataclasses.replace(SMALL, k_bits=8, v_bits=2, k_granularity="token", v_granularity="channel")),
        # Those that have the fewest registers for what they do: mma_form.h, warps_by_registers.
        (80, 128, dataclasses.replace(SMALL, k_bits=2, v_bits=8)),
        (90, 128, dataclasses.replace(SMALL, k_bits=3, v_bits=2)),
        (90, 128, dataclasses.replace(SMALL, k_bits=3, v_bits=8, k_granularity="token")),
    ],
    ids=lambda x: x if isinstance(x, int) else x.name,
)
def test_the_sources_in_the_library_compile(
    architecture: int, head_dim: int, config: LayerConfig, machine: Callable[[str], Path], tmp_path: Path
) -> None:
    compile_(machine(NVRTC), config, architecture, head_dim)
    (file,) = kept(tmp_path)
    code = file.read_bytes()
    assert code[:4] == b"\x7fELF" and f"sm_{architecture}" in file.name
    assert set(re.findall(FRAME_SIZE, code, re.DOTALL)) == {bytes(4)}, "a register is spilled"


@pytest.mark.parametrize("nvrtc", OLD)
def test_the_oldest_compilers_take_the_sources(nvrtc: str, machine: Callable[[str], Path], tmp_path: Path) -> None:
    """From a folder that the loader does not know of, as a package's is."""
    compile_(machine(nvrtc))
    (file,) = kept(tmp_path)
    assert file.read_bytes()[:4] == b"\x7fELF"


@with_nvrtc
def test_compiled_kernels_are_asked_for_by_their_names(machine: Callable[[str], Path]) -> None:
    """What runs is g++'s build of the same name and form; 8 columns of queries, 16, and keys per token."""
    kernels = Library(machine(NVRTC), HostMemory(), architecture=80)
    (case,) = cases(("default",))
    wide = dataclasses.replace(case, name="wide", config=TWO_WIDTHS, num_heads=9, kv_num_heads=1)
    for each in (wide, dataclasses.replace(wide, num_heads=4), dataclasses.replace(case, config=PER_TOKEN)):
        error, path = difference(each, kernels, MMA)
        assert error <= each.tolerance and path.startswith("decode_mma K"), path


def test_a_kernel_is_compiled_once(machine: Callable[[str], Path], fake: Path, tmp_path: Path) -> None:
    for architecture in (90, 90, 86):
        compile_(machine(fake), architecture=architecture)
    older, newer = kept(tmp_path)
    assert older.name.startswith("K2V4-D64-channel-token-sm_86-") and "-sm_90-" in newer.name
    assert b"decode_mma_kernel<MmaShape<64, 2, 4, false, false, 2>>(Attention)" in newer.read_bytes()
    assert compiled(tmp_path) == ["sm_90", "sm_80"]  # the newest that the compiler knows and the card runs
    compile_(machine(fake), SMALL)  # built in
    assert len(kept(tmp_path)) == 2
    with pytest.raises(KernelError, match=r"NVRTC 99.1 \(.*libnvrtc.so\) does not know sm_120. Install a newer"):
        compile_(machine(fake), architecture=120)


def test_a_damaged_file_is_compiled_anew(machine: Callable[[str], Path], fake: Path, tmp_path: Path) -> None:
    compile_(machine(fake))
    (file,) = kept(tmp_path)
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", whole[:50] + bytes([whole[50] ^ 1]) + whole[51:]):
        file.write_bytes(damaged)
        compile_(machine(fake))
        assert file.read_bytes() == whole and kept(tmp_path) == [file]
    assert len(compiled(tmp_path)) == 5


def test_processes_that_compile_the_same_at_once(machine: Callable[[str], Path], fake: Path, tmp_path: Path) -> None:
    library = machine(fake)
    code = f"from test_nvrtc import *; compile_(Path({str(library)!r}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait(60) for process in running] == [0, 0]
    assert len(kept(tmp_path)) == 1


def test_what_does_not_load_is_compiled_anew_once(machine: Callable[[str], Path], fake: Path, tmp_path: Path) -> None:
    compile_(machine(fake), architecture=80)
    status, said = load(machine(fake), TWO_WIDTHS)
    assert status and len(compiled(tmp_path)) == 2
    ((is_warning, text),) = said
    assert is_warning and "the cubin has no such kernel" in text and text.endswith("decode_simple, many times slower.")


def test_a_folder_that_cannot_be_written(
    machine: Callable[[str], Path], fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(KernelError, match="file/skv_export/kernels: Not a directory"):
        compile_(machine(fake))
    if NVRTC:
        status, said = load(machine(NVRTC), PER_TOKEN)
        assert status == 0 and [warns for warns, _ in said] == [0, 1]
        assert "compiled, and not kept: " in said[1][1] and "set XDG_CACHE_HOME" in said[1][1]


def test_a_failed_compilation_says_what_nvrtc_said(
    machine: Callable[[str], Path], fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NVRTC_FAILS", "1")
    with pytest.raises(KernelError, match=r"decode_mma.cu\(1\): error: made by the test"):
        compile_(machine(fake))


def test_without_nvrtc_the_simple_kernel_runs(machine: Callable[[str], Path]) -> None:
    library = machine("/nowhere/libnvrtc.so")
    status, said = load(library, PER_TOKEN)
    ((is_warning, text),) = said
    assert status and is_warning and "no NVRTC was found. Put it where the loader finds it: pip install" in text
    kernels = Library(library, HostMemory(), architecture=80)
    case = Case("no compiler", PER_TOKEN, dtype="float16")
    error, path = difference(case, kernels)
    assert error <= case.tolerance and path.startswith("decode_simple: no NVRTC was found.")
    assert load(library, PER_TOKEN)[1] == []  # said once


def test_where_kernels_come_from(machine: Callable[[str], Path], fake: Path) -> None:
    without = machine("/nowhere/libnvrtc.so")
    assert origin(without, TWO_WIDTHS)[0] == "missing" and origin(without, SMALL)[0] == "built in"
    expected = "decode_simple: bits are not 2, 3, 4 or 8"
    assert origin(without, dataclasses.replace(SMALL, k_bits=5)) == ("decode_simple", expected)
    library = machine(fake)
    assert origin(library, TWO_WIDTHS, 90)[0] == origin(library, TWO_WIDTHS)[0] == "to compile"
    compile_(library)
    found, line = origin(library, TWO_WIDTHS, 90)
    assert found == "kept" and line.startswith("decode_mma K2V4 D64, keys channel, values token: from /")
