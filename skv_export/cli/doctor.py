"""The command `skv-export doctor`: what is installed, which kernels will run, what is missing and how to fix it."""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skv_export import __version__
from skv_export.errors import SkvError, install_hint
from skv_export.provenance import package_version

if TYPE_CHECKING:
    from skv_export.native.library import Library

_PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "tokenizers")
_ORT_FLOOR = (1, 24)
_BUILD_CUDA = "install with nvcc on the PATH and -C cmake.define.SKV_CUDA=on."


@dataclass(frozen=True)
class Check:
    """One line: ``problem`` says what is missing and how to fix it, and fails the report if ``required``."""

    name: str
    found: str
    problem: str = ""
    required: bool = True


@dataclass(frozen=True)
class Diagnosis:
    """All lines; ``passed`` when nothing required is missing."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether an exported model can run here."""
        return not any(check.problem and check.required for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The report's lines as data."""
        return {"passed": self.passed, "checks": [dataclasses.asdict(check) for check in self.checks]}

    def table(self) -> str:
        """The report as text, a line per check, problems beneath the line they belong to."""
        width = max(len(check.name) for check in self.checks)
        lines = []
        for check in self.checks:
            mark = "ok" if not check.problem else "!!" if check.required else "--"
            lines.append(f"{mark}  {check.name:{width}}  {check.found}")
            if check.problem:
                lines.append(f"    {'':{width}}  {check.problem}")
        return "\n".join(lines)


def diagnose(folder: Path | None = None, cuda_arch: Sequence[int] = ()) -> Diagnosis:
    """Looks at the machine; loads neither torch nor a model.

    Args:
        folder: An exported model, whose kernels on a GPU are named too.
        cuda_arch: Architectures, such as 90, for which those that are not built in are compiled into the cache folder.

    Raises:
        SkvError: It is none; or a kernel can't be compiled.
    """
    if cuda_arch and folder is None:
        raise SkvError("--cuda-arch: FOLDER", got="none", expected="the model whose kernels are to be compiled")
    versions = {name: package_version(name) for name in _PACKAGES}
    checks = [Check("skv-export", f"{__version__}, Python {sys.version.split()[0]}, {platform.machine()}")]
    checks += [Check(name, version) for name, version in versions.items() if version and "runtime" not in name]
    checks += [_onnxruntime(versions["onnxruntime"], versions["onnxruntime-gpu"]), *_library(), _providers(), _demo()]
    if folder is not None:
        checks += _attention(folder, cuda_arch)
    return Diagnosis(tuple(checks))


def _onnxruntime(cpu: str, gpu: str) -> Check:
    found = " and ".join(f"{n} {v}" for n, v in (("onnxruntime", cpu), ("onnxruntime-gpu", gpu)) if v)
    if cpu and gpu:
        fix = "Both are one Python module: pip uninstall onnxruntime onnxruntime-gpu, then install one of them."
        return Check("onnxruntime", found, fix)
    if not found:
        return Check("onnxruntime", "missing", f"{install_hint('cpu')}, or '.[gpu]' for an NVIDIA GPU.")
    if tuple(int(part) for part in (cpu or gpu).split(".")[:2]) < _ORT_FLOOR:
        return Check(
            "onnxruntime", found, f"Needs at least {'.'.join(map(str, _ORT_FLOOR))}: pip install -U onnxruntime."
        )
    return Check("onnxruntime", found)


def _library() -> list[Check]:
    """The native library: where it is, what it was built for, which instruction set it chose."""
    from skv_export.native.library import load_library

    try:
        library = load_library()
    except SkvError as error:
        return [Check("native library", "missing", str(error))]
    cuda = library.cuda_build
    return [
        Check("native library", f"{library.path} ({library.version})"),
        Check("CPU kernels", library.cpu_isa, _wanted(library.cpu_isa), required=False),
        Check(
            "CUDA kernels",
            cuda or "not built",
            "" if cuda else f"For NVIDIA GPUs: {_BUILD_CUDA}",
            required=False,
        ),
    ]


def _attention(folder: Path, cuda_arch: Sequence[int]) -> list[Check]:
    """Which kernels a model's decoding takes on a GPU, whether or not there is one, and where they come from."""
    from skv_export.model_folder.skv_config import ModelConfig
    from skv_export.native.library import load_library
    from skv_export.runtime.providers import gpu_kernels, without_tensor_cores

    name = "decoding on a GPU"
    config, library = ModelConfig.load(folder), load_library()
    if not library.cuda_build:
        problem = f"The library has no CUDA kernels: {_BUILD_CUDA}"
        return [Check(name, "unknown", problem, required=bool(cuda_arch))]
    if config.dtype == "fp32" and cuda_arch:
        problem = "In float32 there are no kernels to compile: export with --dtype fp16 or bf16."
        return [Check(name, "decode_simple", problem, required=True)]
    found: Counter[tuple[str, str]] = Counter()
    for path, layers in gpu_kernels(config, library).items():
        for layouts in ((config.layers[i].key, config.layers[i].value) for i in layers):
            if config.dtype == "fp32" or library.cuda_origin(layouts)[0] == "decode_simple":
                found[path, without_tensor_cores(path)] += 1
                continue
            for architecture in cuda_arch:
                library.cuda_compile(layouts, architecture)
            for architecture in cuda_arch or (_architecture(library),):
                origin, line = library.cuda_origin(layouts, architecture)
                found[line, "Without it tensor cores are not used." if origin == "missing" else ""] += 1
    return [
        Check(name, f"{line}: {count} of {len(config.layers)} layers", problem, required=False)
        for (line, problem), count in found.items()
    ]


def _architecture(library: Library) -> int:
    """The first GPU's; 0 = there is none."""
    try:
        return library.cuda_architecture(0)
    except SkvError:
        return 0


def _wanted(isa: str) -> str:
    """What is wrong with SKV_CPU_ISA, if it is set."""
    wanted = os.environ.get("SKV_CPU_ISA", isa)
    return "" if wanted == isa else f"SKV_CPU_ISA asks for {wanted}, which this build or this processor does not have."


def _providers() -> Check:
    try:
        import onnxruntime
    except ImportError as error:
        return Check("execution providers", "none", f"onnxruntime does not import: {error}")
    providers = onnxruntime.get_available_providers()
    cuda = "CUDAExecutionProvider" in providers
    return Check(
        "execution providers",
        ", ".join(p.removesuffix("ExecutionProvider") for p in providers),
        "" if cuda else f"No CUDA. On a machine with a GPU: pip uninstall onnxruntime. {install_hint('gpu')}",
        required=False,
    )


def _demo() -> Check:
    from skv_export.checkpoints.demo_model import demo_checkpoint

    try:
        return Check("demo model", str(demo_checkpoint()))
    except SkvError as error:
        return Check("demo model", "missing", str(error), required=False)
