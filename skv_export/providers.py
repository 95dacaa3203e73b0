"""Owns what is asked of onnxruntime itself: its execution providers, and its errors."""

from __future__ import annotations

from collections.abc import Sequence

from skv_export.errors import SkvError
from skv_export.library import Library

EXECUTION_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def check_provider(name: str, available: Sequence[str], library: Library) -> None:
    """Checks that a provider, and the library's kernels for it, are there.

    Args:
        name: ``cpu`` or ``cuda``.
        available: What onnxruntime has.
        library: The native library.

    Raises:
        SkvError: They are not; never another provider in silence.
    """
    if name not in EXECUTION_PROVIDERS:
        raise SkvError("execution_provider", got=name, expected=" or ".join(EXECUTION_PROVIDERS))
    if EXECUTION_PROVIDERS[name] not in available:
        raise SkvError(
            f"execution provider {name}: this ONNX Runtime does not have it",
            got=", ".join(available),
            fix="pip uninstall onnxruntime; pip install 'skv-export[gpu]', on a machine with an NVIDIA GPU.",
        )
    if name == "cuda" and not library.cuda_build:
        raise SkvError(
            f"execution provider cuda: {library.path} was built without CUDA",
            fix="Build it where nvcc is found, with SKV_CUDA=on.",
        )


def ort_errors() -> tuple[type[Exception], ...]:
    """Returns onnxruntime's exceptions, which have no common base; a call with bound buffers raises RuntimeError."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (RuntimeError, *(x for x in vars(state).values() if isinstance(x, type) and issubclass(x, Exception)))


def brief(error: Exception) -> str:
    """Returns onnxruntime's message without its stack trace, cut to a readable length."""
    return str(error).split("Stacktrace")[0].strip()[:800]
