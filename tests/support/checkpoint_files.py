"""Small checkpoints written by hand: tensors of a tiny llama, raw safetensors headers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 4}


def llama_tensors(layers: int = 2, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {}
    for i in range(layers):
        for part in "qkv":
            tensors[f"model.layers.{i}.self_attn.{part}_proj.weight"] = rng.standard_normal((8, 8)).astype(dtype)
        tensors[f"model.layers.{i}.input_layernorm.weight"] = np.ones(8, dtype)
    return tensors


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}
