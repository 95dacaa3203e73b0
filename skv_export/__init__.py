"""Export language models to ONNX with a KV cache quantized separately for keys and values."""

from __future__ import annotations

__version__ = "0.1.0"
