"""The choice of an instruction set, and the kernels of other processors under qemu-user.

Emulated processors need Debian's qemu-user, and for Arm g++-aarch64-linux-gnu; where these are missing the tests are
skipped and say so.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import native
import numpy as np
import pytest

from skv_export.native.library import FILE_NAMES, SkvAttention, library_path, load_library
from skv_export.spec.conformance import (
    Case,
    attention_cases,
    byte_channel_cases,
    calibrated_cases,
    expected_of,
    make_inputs,
    not_a_number_cases,
    output_error,
    token_channel_cases,
)
from skv_export.spec.key_basis import INPUTS
from skv_export.spec.recipe import LayerConfig

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "skv_export" / "native"
POINTERS = ("output", "seqlens_k", "query_seqlens", "head_sink", "not_finite")
NESTED = (("key_cache", "data"), ("value_cache", "data"), ("query", "data"), ("key", "data"), ("value", "data"))
NESTED += tuple(("key_cache", name) for name in INPUTS)
EMULATED = ("K", "default", "gqa", "head", "ragged", "window", "per channel", "per token", "groups", "tile", "softcap")


@pytest.mark.parametrize("isa", native.ISAS)
def test_an_instruction_set_can_be_named(isa: str) -> None:
    """What kernels of other processors do is seen under emulation only, below; the kernels' tests take all of these."""
    with native.instruction_set(isa) as chosen:
        if chosen != isa:
            pytest.skip(f"{isa}: not supported by this processor (it has {chosen})")
    assert isa in native.instruction_sets()


@pytest.mark.parametrize("unit", ["avx2", "avx512"])
def test_units_share_no_code(unit: str, tmp_path: Path) -> None:
    """A weak symbol could be kept by the linker in this unit's instruction set, and crash an older processor."""
    if os.uname().machine != "x86_64":
        pytest.skip("x86-64 units: not supported by this compiler")
    flags = {"avx2": [], "avx512": [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni")]}[unit]
    output = tmp_path / "unit.o"
    command = [
        "c++",
        "-std=c++17",
        "-O0",
        "-I",
        str(NATIVE),
        "-mavx2",
        "-mfma",
        "-mf16c",
        *flags,
        "-c",
        "-o",
        str(output),
    ]
    subprocess.run([*command, str(NATIVE / "cpu" / f"unit_{unit}.cc")], check=True)
    symbols = subprocess.run(["nm", str(output)], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(symbols) > 20
    assert [s for s in symbols if s.split()[-2] in "WVu"] == []


def record(cases: list[Case], path: Path) -> list[native.Call]:
    """Writes the calls of these cases for replay.cc."""
    calls = []
    with path.open("wb") as file:
        file.write(struct.pack("<q", len(cases)))
        for case in cases:
            call = native.Call(case, make_inputs(case))
            index = {buffer.pointer: i + 1 for i, buffer in enumerate(call.buffers)}
            written = SkvAttention.from_buffer_copy(call.call)
            for holder, name in [(written, p) for p in POINTERS] + [(getattr(written, a), b) for a, b in NESTED]:
                pointer = getattr(holder, name)
                setattr(holder, name, index[pointer] if pointer else None)
            file.write(bytes(written) + struct.pack("<q", len(call.buffers)))
            for buffer in call.buffers:
                file.write(struct.pack("<q", buffer.array.nbytes) + buffer.array.tobytes())
            calls.append(call)
    return calls


def compare(cases: list[Case], calls: list[native.Call], path: Path) -> None:
    with path.open("rb") as file:
        for case, call in zip(cases, calls, strict=True):
            assert struct.unpack("<q", file.read(8)) == (0,), case.name
            for buffer in call.buffers:
                buffer.array[...] = np.frombuffer(file.read(buffer.array.nbytes), buffer.array.dtype).reshape(
                    buffer.array.shape
                )
            inputs = make_inputs(case)
            output, key, value = expected_of(case, inputs)
            error = output_error(call.output.array.astype(np.float32), output)
            assert error <= case.tolerance, f"{case.name}: {error:.1e}"
            assert np.array_equal(call.caches[0].array, key) and np.array_equal(call.caches[1].array, value), case.name
        assert file.read() == b""


def replay(
    emulator: list[str], compiler: str | list[str], library: Path, tmp_path: Path, cases: list[Case], suffix: str = ""
) -> str:
    """Runs the cases under an emulator, compares them, and returns the instruction set that was chosen there."""
    binary = tmp_path / f"replay{suffix}"
    command = [
        *([compiler] if isinstance(compiler, str) else compiler),
        "-std=c++17",
        "-O1",
        "-I",
        str(NATIVE),
        "-o",
        str(binary),
        str(Path(__file__).parent / "replay.cc"),
    ]
    subprocess.run([*command, str(library), f"-Wl,-rpath,{library.parent}"], check=True)
    calls = record(cases, tmp_path / "in")
    run = [*emulator, str(binary), str(tmp_path / "in"), str(tmp_path / "out")]
    environment = {k: v for k, v in os.environ.items() if k not in ("SKV_CPU_ISA", "LD_PRELOAD")}
    result = subprocess.run(run, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, f"exit code {result.returncode}: {result.stderr[-2000:]}"
    compare(cases, calls, tmp_path / "out")
    return result.stdout.strip()


def emulator(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name}: not supported here (install qemu-user)")
    return path


@pytest.mark.parametrize(("processor", "isa"), [("Nehalem", "scalar"), ("Haswell", "avx2")])
def test_an_older_processor_gets_what_it_has(processor: str, isa: str, tmp_path: Path) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("x86-64 processors: not supported by this library")
    cases = [c for c in attention_cases() if c.name in ("default", "gqa 3", "K3V5", "K8V1", "head_dim 80, padded")]
    cases += [*not_a_number_cases(), *calibrated_cases()[:3]]
    assert replay([emulator("qemu-x86_64"), "-cpu", processor], "c++", library_path(), tmp_path, cases) == isa


# Arm.

ON_ARM = ("-cpu", "max", "-L", "/usr/aarch64-linux-gnu")


@pytest.fixture(scope="module")
def arm() -> tuple[str, Path]:
    """A compiler for aarch64, and the folder that the library was built in with it."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("aarch64-linux-gnu-g++: not supported here (install g++-aarch64-linux-gnu)")
    build = ROOT / "build" / "aarch64"
    configure = [
        "cmake",
        "-S",
        str(ROOT),
        "-B",
        str(build),
        "-DSKV_ORT=OFF",
        "-DSKV_CUDA=off",
        "-DCMAKE_SYSTEM_NAME=Linux",
    ]
    configure += ["-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={compiler}"]
    configure += [f"-DCMAKE_C_COMPILER={compiler.removesuffix('g++')}gcc"]
    for command in (configure, ["cmake", "--build", str(build), "--parallel", "2"]):
        subprocess.run(command, check=True, capture_output=True)
    return compiler, build


@pytest.mark.slow
def test_neon_kernels_under_emulation(arm: tuple[str, Path], tmp_path: Path) -> None:
    compiler, build = arm
    cases = [c for c in attention_cases() if any(word in c.name for word in EMULATED) and "prompt" not in c.name]
    cases += [*token_channel_cases()[:8], *byte_channel_cases()[:8], *calibrated_cases()[:8], *not_a_number_cases()]
    assert len(cases) > 70
    command = [emulator("qemu-aarch64"), *ON_ARM]
    assert replay(command, compiler, build / "libskv_ops.so", tmp_path, cases) == "neon"


@pytest.fixture(scope="module")
def neon_counter(arm: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], int]:
    """Runs a case under qemu and counts the instructions of the NEON unit.

    The library's own object files are linked without relocation, the unit's code in a section of its own, so that it is
    known where it stands; qemu then logs each instruction that it runs there.
    """
    compiler, build = arm
    qemu, folder = emulator("qemu-aarch64"), tmp_path_factory.mktemp("neon")
    program, tool = folder / "replay", compiler.removesuffix("g++")
    objects = {file.name: file for file in build.glob("**/skv_ops.dir/cpu/*.o")}
    unit = folder / "unit.o"
    subprocess.run(
        [f"{tool}objcopy", "--rename-section", ".text=neon", str(objects.pop("unit_neon.cc.o")), str(unit)], check=True
    )
    link = [compiler, "-std=c++17", "-O1", "-static", "-I", str(NATIVE), "-o", str(program)]
    sources = [Path(__file__).parent / "replay.cc", unit, *objects.values()]
    subprocess.run([*link, *map(str, sources)], check=True)
    sections = subprocess.run([f"{tool}readelf", "-SW", str(program)], capture_output=True, text=True, check=True)
    place = next(line.partition("PROGBITS")[2].split() for line in sections.stdout.splitlines() if " neon " in line)
    usage = subprocess.run([qemu, "-help"], capture_output=True, text=True, check=False).stdout
    one_by_one = "-one-insn-per-tb" if "one-insn-per-tb" in usage else "-singlestep"
    logging = [one_by_one, "-d", "exec,nochain", "-dfilter", f"0x{place[0]}+0x{place[2]}", "-D", str(folder / "log")]

    def count(case: Case) -> int:
        record([case], folder / "in")
        run = [qemu, *ON_ARM, *logging, str(program), str(folder / "in"), str(folder / "out")]
        subprocess.run(run, check=True, capture_output=True)
        with (folder / "log").open("rb") as log:
            return sum(line.startswith(b"Trace") for line in log)

    return count


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "limit"), [(1, 215), (4, 640)], ids=["no grouping", "four queries a head"])
def test_neon_instructions_per_token(rows: int, limit: int, neon_counter: Callable[[Case], int]) -> None:
    """Of a decode step: what eight more tiles of K4V2 cost; GCC 12 makes 207 and 618 (benchmarks/RESULTS.md)."""
    short, long = (
        Case("counted", LayerConfig(), 128, rows, 1, past_lengths=(tokens,)) for tokens in (500, 500 + 8 * 64)
    )
    per_token = (neon_counter(long) - neon_counter(short)) / (8 * 64)
    assert 0.8 * limit < per_token <= limit


# Other platforms, by zig.

PLATFORMS = {
    "x86_64-windows-gnu": ("skv_ops.dll", b"MZ"),
    "aarch64-macos.11.0": ("libskv_ops.dylib", b"\xcf\xfa\xed\xfe"),
}


def zig() -> list[str]:
    program = ROOT / "build" / "zig" / "ziglang" / "zig"
    if program.is_file():
        return [str(program)]
    pytest.importorskip("ziglang", reason="ziglang is not installed: pip install ziglang (or .ci/install)")
    return [sys.executable, "-m", "ziglang"]


def built_for(target: str) -> Path:
    build, name = ROOT / "build" / f"zig-{target}", PLATFORMS[target][0]
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DSKV_ZIG_TARGET={target}"]
    configure += [f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'packaging' / 'zig.cmake'}", f"-DSKV_ZIG={';'.join(zig())}"]
    for command in (configure, ["cmake", "--build", str(build), "--parallel", "2"]):
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return build / name


@pytest.mark.slow
@pytest.mark.parametrize("target", PLATFORMS)
def test_the_library_is_built_for_other_platforms(target: str) -> None:
    data = built_for(target).read_bytes()
    assert data.startswith(PLATFORMS[target][1])
    assert PLATFORMS[target][0] in FILE_NAMES.values() and len(set(FILE_NAMES.values())) == len(FILE_NAMES)
    for name in (b"RegisterCustomOps", b"skv_attention", b"skv_rewind", b"skv_version"):
        assert name in data
    for foreign in (b"libstdc++-6.dll", b"libgcc_s", b"libwinpthread", b"libc++.1"):  # it brings what it needs
        assert foreign not in data


@pytest.mark.slow
def test_windows_kernels_under_wine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wine = shutil.which("wine")
    if wine is None:
        pytest.skip("wine: not installed (.ci/install adds it)")
    target = "x86_64-windows-gnu"
    library = built_for(target)
    monkeypatch.setenv("WINEDEBUG", "-all")
    monkeypatch.setenv("WINEPREFIX", str(tmp_path / "wine"))
    shutil.copy(library, tmp_path)  # Windows looks for libraries beside the program
    cases = [c for c in attention_cases() if any(word in c.name for word in EMULATED) and "prompt" not in c.name]
    cases += [*token_channel_cases()[:8], *byte_channel_cases()[:8], *calibrated_cases()[:8], *not_a_number_cases()]
    compiler, imports = [*zig(), "c++", "-target", target], library.parent / "skv_export/native/libskv_ops.dll.a"
    assert replay([wine], compiler, imports, tmp_path, cases, ".exe") == load_library().cpu_isa
