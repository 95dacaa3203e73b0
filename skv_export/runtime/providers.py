"""onnxruntime's execution providers and errors: opening a session, and explaining why it failed."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skv_export.errors import SkvError, install_hint
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.native.library import Library

EXECUTION_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
QMOE_SINCE = "1.31"
"""The first onnxruntime whose QMoE has the attributes that exports give it."""
_RECORD_PLACEMENT = "session.record_ep_graph_assignment_info"
"""Session option ("1") without which ``check_placement`` learns nothing."""

_SHAPE_OPS = {"Cast", "Concat", "Gather", "Reshape", "Shape", "Slice", "Squeeze", "Sub", "Unsqueeze"}
"""Ops on shapes, which are the CPU's anyway."""


def device_of(execution_provider: str) -> tuple[str, int]:
    """Takes the name of an execution provider apart: of ``cuda:1``, ``("cuda", 1)``; of ``cuda``, ``("cuda", 0)``.

    Raises:
        SkvError: There is none of this name.
    """
    name, _, number = execution_provider.partition(":")
    if name in EXECUTION_PROVIDERS and (execution_provider == name or (name == "cuda" and number.isdecimal())):
        return name, int(number or 0)
    raise SkvError("execution_provider", got=execution_provider, expected="cpu, cuda, or cuda:N for the N-th GPU")


def open_session(
    model: str | bytes,
    options: Any,
    name: str,
    library: Library,
    *,
    op_type: str,
    cuda_graph: bool = False,
) -> Any:
    """Opens a session on a provider; never a silent fallback to another.

    Args:
        model: A file, or the model itself.
        options: onnxruntime's SessionOptions; the library's op is registered with them here.
        name: ``cpu``, ``cuda``, ``cuda:1``.
        library: The native library.
        op_type: The op that must be the provider's.
        cuda_graph: Capture calls as CUDA graphs.

    Returns:
        onnxruntime's InferenceSession.

    Raises:
        SkvError: The provider, or the library's kernels for it, are not there; or the op went to the CPU.
        Exception: One of ``ort_errors``: the model can't be loaded.
    """
    import onnxruntime as ort

    name, device_id = device_of(name)
    check_provider(name, ort.get_available_providers(), library)
    preload(name)
    options.register_custom_ops_library(str(library.path))
    options.add_session_config_entry(_RECORD_PLACEMENT, "1")
    wanted = EXECUTION_PROVIDERS[name]
    providers: list[tuple[str, dict[str, str]]] = [(wanted, {})]
    if name != "cpu":
        providers[0][1].update({"device_id": str(device_id)} | ({"enable_cuda_graph": "1"} if cuda_graph else {}))
        providers.append((EXECUTION_PROVIDERS["cpu"], {}))
    session = ort.InferenceSession(model, options, providers=providers)
    if session.get_providers()[0] != wanted:  # ONNX Runtime falls back with no more than a line in its log
        raise SkvError(
            f"execution provider {name}: it failed to start",
            got=", ".join(session.get_providers()),
            fix=f"{install_hint('gpu')}; `skv-export doctor` says what is there.",
        )
    check_placement(session, name, op_type)
    return session


def check_provider(name: str, available: Sequence[str], library: Library) -> None:
    """Checks that a provider, and the library's kernels for it, are there.

    Args:
        name: ``cpu`` or ``cuda``.
        available: What onnxruntime has.
        library: The native library.

    Raises:
        SkvError: They are not; there is never a silent fallback to another provider.
    """
    name, _ = device_of(name)
    if EXECUTION_PROVIDERS[name] not in available:
        raise SkvError(
            f"execution provider {name}: this ONNX Runtime does not have it",
            got=", ".join(available),
            fix=f"On a machine with an NVIDIA GPU: pip uninstall onnxruntime. {install_hint('gpu')}",
        )
    if name == "cuda" and not library.cuda_build:
        raise SkvError(
            f"execution provider cuda: {library.path} was built without CUDA",
            fix="Build it where nvcc is found, with SKV_CUDA=on.",
        )


def preload(name: str) -> None:
    """Loads CUDA's libraries from the Python environment's own packages, where the system's loader does not look.

    Args:
        name: ``cpu`` or ``cuda``. What can't be loaded is said on standard error: the system may still have it.
    """
    if name == "cuda":
        import onnxruntime as ort

        with contextlib.redirect_stdout(sys.stderr):
            ort.preload_dlls()


def check_placement(session: Any, name: str, op_type: str) -> None:
    """Checks on which provider a session's nodes run: ONNX Runtime silently falls back to the CPU.

    Args:
        session: An ``InferenceSession`` that records it.
        name: ``cpu`` or ``cuda``.
        op_type: The op that must be the provider's.

    Raises:
        SkvError: It is the CPU's. Others there than arithmetic on shapes are a RuntimeWarning.
    """
    if name == "cpu":
        return
    on_cpu: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name == EXECUTION_PROVIDERS["cpu"]:
            on_cpu.update(node.op_type for node in part.get_nodes())
    if on_cpu[op_type]:
        raise SkvError(
            f"execution provider {name}: {op_type}",
            got=f"{on_cpu[op_type]} nodes on the CPU",
            expected="none",
            fix="Export with --dtype fp16 or bf16, with the skv-export that is installed.",
        )
    slow = {kind: count for kind, count in on_cpu.items() if kind not in _SHAPE_OPS}
    if slow:
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(slow.items()))
        warnings.warn(
            f"this ONNX Runtime runs {listed} on the CPU: every call waits for copies to it and back. "
            "Another --dtype or --weights may avoid that.",
            RuntimeWarning,
            stacklevel=2,
        )


def gpu_kernels(config: ModelConfig, library: Library, architecture: int = 0) -> dict[str, list[int]]:
    """Returns the kernels that decoding takes on a GPU, each with the layers that take it.

    Args:
        config: The model's.
        library: The native library, with CUDA.
        architecture: The GPU's, where a session has loaded the kernels that are not built in; 0 = without those.

    Raises:
        SkvError: No kernel takes a layer's calls.
    """
    layers: dict[str, list[int]] = {}
    for i, layer in enumerate(config.layers):
        heads = layer.num_attention_heads, layer.num_key_value_heads
        path = library.cuda_path((layer.key, layer.value), *heads, config.dtype, architecture=architecture)
        layers.setdefault(path, []).append(i)
    return layers


def without_tensor_cores(path: str) -> str:
    """Advice on kernels of ``gpu_kernels``; empty for the fast ones. Other reasons in ``path`` have a fix there."""
    if not path.startswith("decode_simple"):
        return ""
    slow = "Without tensor cores, many times slower"
    by_export = any(reason in path for reason in ("float32", "recent_type", "bits are"))
    return f"{slow}: export with --dtype fp16 or bf16 and bits of 8, 4, 3 or 2." if by_export else f"{slow}."


def check_kernels(config: ModelConfig, name: str, library: Library) -> None:
    """Warns (RuntimeWarning) of layers whose decoding does not use tensor cores on a GPU, with the reason.

    Args:
        config: The model's, of which a session was made.
        name: ``cpu`` or ``cuda``.
        library: The native library.

    Raises:
        SkvError: No kernel on a GPU takes a layer's calls.
    """
    provider, device_id = device_of(name)
    if provider != "cuda":
        return
    for path, layers in gpu_kernels(config, library, library.cuda_architecture(device_id)).items():
        if problem := without_tensor_cores(path):
            said = f"attention of {len(layers)} of {len(config.layers)} layers takes {path}. {problem}"
            warnings.warn(said, RuntimeWarning, stacklevel=2)


def ort_errors() -> tuple[type[Exception], ...]:
    """Returns onnxruntime's exceptions, which have no common base; a call with bound buffers raises RuntimeError."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (RuntimeError, *(x for x in vars(state).values() if isinstance(x, type) and issubclass(x, Exception)))


def brief(error: Exception) -> str:
    """Returns onnxruntime's message without its stack trace, cut to a readable length."""
    return str(error).split("Stacktrace")[0].strip()[:800]


def load_error(path: Path, error: Exception) -> SkvError:
    """The error for a model that ONNX Runtime can't load.

    Args:
        path: The graph's file, in the folder of its weights.
        error: What ONNX Runtime raised. It reads no weights from outside the folder, links resolved: a link that leads
            there is named, with what to do; the model itself is fine then.
    """
    folder, said = path.parent, str(error)
    for link in sorted(file for file in folder.rglob("*") if file.is_symlink() and file != path):
        target = link.resolve()
        if f'{link.relative_to(folder).as_posix()}"' in said and not target.is_relative_to(folder.resolve()):
            return SkvError(
                f"{link}: a link that leads out of the folder, where ONNX Runtime reads no weights",
                got=target if target.exists() else f"{target}, which does not exist",
                expected="a file in the folder",
                fix="Put the file itself there, or a hard link: cp -rL FOLDER COPY makes a folder without links. "
                "A model of the hub loads by its id.",
            )
    fix = "Export the model again."
    if "QMoE" in said:  # its experts in 4 bits; older versions don't know the form of their weights
        fix = f"Install onnxruntime {QMOE_SINCE} or newer, or export with other --weights."
    return SkvError(f"{path}: ONNX Runtime can't load it", got=brief(error), fix=fix)
