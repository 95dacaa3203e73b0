"""Running an exported folder with onnxruntime and numpy, without torch."""

from skv_export.runtime.session import Session

__all__ = ["Session"]
