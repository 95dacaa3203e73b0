"""Libraries that tests of the CUDA kernels load: unmodified sources over the shims, built by g++ once per content."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "skv_export" / "native" / "cuda"
SHIM = ROOT / "tests" / "cuda"
COMPILER = sorted(SOURCES.glob("*.cc"))
PIECE = 64
"""Tokens of a prompt that the op's shim gives to GroupQueryAttention at a time."""
TSAN = "-fsanitize=thread"
ASAN = "-fsanitize=address,undefined"


def build_shim(
    out: Path, *, flags: Sequence[str] = (), sources: Path = SOURCES, few: bool = False, compiles: bool = False
) -> Path:
    """Compiles the kernels and the shim.

    Args:
        out: The library stands in a folder below, named by a hash of sources and flags; built once.
        flags: More of them, such as ``-fsanitize=thread``.
        sources: The kernels' folder.
        few: Only kernels for head_dim 64 and, of decode_mma, 4-bit keys and 2-bit values; else all there are.
        compiles: NVRTC compiles what is not built in; what runs then is in compiled_kernels.cc.

    Returns:
        ``libskv_cuda_shim.so``.
    """
    left_out = ("runtime.cu", "decode_mma_128.cu", "decode_mma_256.cu") if few else ("runtime.cu",)
    files = [f for f in sorted(sources.glob("*.cu")) if f.name not in left_out]
    files += [SHIM / "cuda_shim.cc"]
    files += (
        [*COMPILER, SHIM / "loader_shim.cc", SHIM / "compiled_kernels.cc"] if compiles else [SHIM / "no_compiler.cc"]
    )
    flags = [*flags, "-DSKV_CUDA_FEW=64" if few else "-DSKV_CUDA_ALL"]
    return build(out, "libskv_cuda_shim.so", files, sources.parent, flags)


def build_ort_shim(out: Path, runtime: Path | None = None, instead: Path | None = None) -> Path:
    """Compiles the op's CUDA side over the shim: ``libskv_ops_shim.so``.

    Args:
        out: As for ``build_shim``.
        runtime: The folder of ``build_runtime``: the library registers the op for both providers then, as the real one
            does, and compiles what is not built in. None = for the CPU provider, on the host's memory, all built in.
        instead: A file that takes the place of the source of its name.
    """
    native = SOURCES.parent
    files = [f for f in sorted(SOURCES.glob("*.cu")) if runtime or f.name != "runtime.cu"]
    files += [SHIM / "cuda_shim.cc", SHIM / "ort_shim.cc"]
    files += [native / "ort" / f"{name}.cc" for name in ("kernel_cuda", "prefill_cuda")]
    files += [native / "cpu" / f"{name}.cc" for name in ("attention", "cache", "checks", "unit_scalar")]
    files += [native / "ort" / f"{name}.cc" for name in ("attributes", "gqa", "op", "prepare", "runtime")]
    if runtime is not None:
        files += [native / "ort" / "kernel_cpu.cc", native / "ort" / "prefill.cc", SHIM / "compiled_kernels.cc"]
        files += COMPILER
    else:
        files.append(SHIM / "no_compiler.cc")
    if instead is not None:
        files = [instead if f.name == instead.name else f for f in files]
    pieces = f"-DSKV_CUDA_PIECE={PIECE}"
    if runtime is None:
        provider = '-DSKV_CUDA_PROVIDER="CPUExecutionProvider"'
        return build(out, "libskv_ops_shim.so", files, native, [pieces, provider, "-DSKV_CUDA_ALL"])
    flags = [pieces, "-DSKV_WITH_CUDA", f"-I{cuda_headers()}"]
    return build(out, "libskv_ops_shim.so", files, native, flags, [str(runtime / CUDART)])


def cuda_headers() -> Path | None:
    """The folder of nvcc's ``cuda_runtime_api.h``, if there is one."""
    if shutil.which("nvcc") is None:
        return None
    # A wrapper script's own path says nothing.
    dry_run = subprocess.run(["nvcc", "--dryrun", "-c", "nothing.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", dry_run, re.MULTILINE)
    folder = Path(top[1]) / "include" if top else None
    return folder if folder and (folder / "cuda_runtime_api.h").is_file() else None


CUDART = "libcudart.so.13"
# What the provider's start asks of libraries that the shim has nothing of.
HARMLESS = {"cublasCreate_v2", "cublasDestroy_v2", "cublasSetMathMode", "cublasGetMathMode", "cublasSetStream_v2"}
HARMLESS |= {"cublasLtCreate", "cublasLtDestroy"}


def build_runtime(out: Path, provider: Path) -> Path:
    """Builds the libraries that ONNX Runtime's CUDA provider is linked with, over ``runtime_shim.cc``.

    Args:
        out: As for ``build_shim``.
        provider: ``libonnxruntime_providers_cuda.so``: what it asks for and the shim has not ends the process.

    Returns:
        A folder for ``LD_LIBRARY_PATH``.
    """
    run = lambda *command: subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: E731
    wanted: dict[str, set[str]] = {}
    for line in run("readelf", "--dynamic", str(provider)).splitlines():
        if "(NEEDED)" in line and (name := line.split("[")[1].rstrip("]")).startswith("libcu"):
            wanted[name] = set()
    for symbol in (line.split()[-1] for line in run("nm", "-D", "--undefined-only", str(provider)).splitlines()):
        name, _, library = symbol.partition("@")
        if library in wanted or name.startswith("cu"):
            wanted[library or "libcuda.so.1"].add(name)

    shim, *included = (SHIM / f"runtime_{name}" for name in ("shim.cc", "library.h", "memory.h"))
    source = "".join(f"{name} {' '.join(sorted(names))}\n" for name, names in sorted(wanted.items()))
    folder = (
        out / hashlib.sha256(b"".join(f.read_bytes() for f in (shim, *included)) + source.encode()).hexdigest()[:16]
    )
    if folder.exists():
        return folder
    partial = folder.with_suffix(f".{os.getpid()}")
    partial.mkdir(parents=True)
    compiled = partial / "runtime_shim.o"
    run("g++", "-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{cuda_headers()}", "-c", str(shim),
        "-o", str(compiled))  # fmt: skip
    there = {line.split()[-1] for line in run("nm", "--defined-only", str(compiled)).splitlines()}
    for name in sorted(wanted, key=lambda name: name != CUDART):  # the others are linked with it
        stubs = partial / f"{name}.c"
        bodies = {f: "" if f in HARMLESS else f'skv_shim_missing("{f}");' for f in sorted(wanted[name] - there)}
        functions = [f"int {f}() {{ {body} return 0; }}" for f, body in bodies.items()]
        stubs.write_text("\n".join(["void skv_shim_missing(const char*);", *functions, ""]))
        versions = partial / f"{name}.map"
        versions.write_text(f"{name} {{ global: *; }};\n")
        own = [str(compiled)] if name == CUDART else [str(partial / CUDART)]
        run("g++", "-shared", "-fPIC", "-x", "c", str(stubs), "-x", "none", *own, f"-Wl,-soname,{name}",
            f"-Wl,--version-script={versions}", "-o", str(partial / name))  # fmt: skip
    partial.rename(folder)
    return folder


def build(
    out: Path, name: str, files: Sequence[Path], native: Path, flags: Sequence[str], libraries: Sequence[str] = ()
) -> Path:
    """Compiles files, each once per content of the sources, and links them."""
    headers = [*native.glob("*.h"), *native.glob("c*/*.h"), *native.glob("cuda/*.cuh"), *SHIM.glob("*.h")]
    command = ["g++", "-x", "c++", "-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    # Tests load several builds at once: each has its own tables, which no other sees.
    command += ["-fno-gnu-unique", "-Wno-unknown-pragmas", f"-I{SHIM}", f"-I{native}"]
    if os.uname().machine == "x86_64":
        command += ["-mf16c", "-mavx2"]
    common = hashlib.sha256(" ".join([*command, *flags]).encode())
    for file in sorted(headers):
        common.update(file.read_bytes())

    def compile_(file: Path) -> Path:
        digest = common.copy()
        digest.update(file.read_bytes())
        target = out / f"{file.stem}.{digest.hexdigest()[:16]}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}")
            scheduler = TSAN in flags and file.name == "cuda_shim.cc"  # see there
            own = [f for f in flags if f != TSAN] + ["-DSHIM_TSAN"] if scheduler else flags
            own = [*own, f'-DSKV_CUDA_SOURCES="{native / "cuda"}"'] if file.name == "kernel_sources.cc" else own
            subprocess.run([*command, *own, "-c", str(file), "-o", str(partial)], check=True)
            partial.rename(target)
        return target

    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(x) for x in pool.map(compile_, files)]
    digest = hashlib.sha256(" ".join([*objects, *libraries]).encode()).hexdigest()[:16]
    library = out / digest / name
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", "-shared", *flags, *objects, *libraries, "-o", str(partial)], check=True)
        partial.rename(library)
    return library
