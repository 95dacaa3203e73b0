"""Export language models to ONNX with a KV cache quantized separately for keys and values.

Public names are loaded when they are first used: ``import skv_export`` loads neither torch nor onnxruntime. Once it is
imported, ``AutoModelForCausalLM.from_pretrained`` and ``pipeline`` of transformers load exported folders.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skv_export.analysis.pipeline import analyze
    from skv_export.errors import SkvError
    from skv_export.export.pipeline import export_model
    from skv_export.integrations.transformers_model import SkvForCausalLM
    from skv_export.runtime.session import Session
    from skv_export.spec.recipe import Recipe
    from skv_export.verification.run import verify

__version__ = "0.1.0"
__all__ = ["Recipe", "Session", "SkvError", "SkvForCausalLM", "__version__", "analyze", "export_model", "verify"]

_PUBLIC = {
    "Recipe": "skv_export.spec.recipe",
    "Session": "skv_export.runtime.session",
    "SkvError": "skv_export.errors",
    "SkvForCausalLM": "skv_export.integrations.transformers_model",
    "analyze": "skv_export.analysis.pipeline",
    "export_model": "skv_export.export.pipeline",
    "verify": "skv_export.verification.run",
}
"""Where each public name is defined (PEP 562)."""


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_PUBLIC[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_PUBLIC))


import_module("skv_export.integrations.auto_model").install()  # AutoModelForCausalLM loads exported folders
