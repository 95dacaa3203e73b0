"""A quantized checkpoint on disk: safetensors in compressed-tensors' pack-quantized format, one file per layer.

``skv-export model`` exports it as it is, and transformers reads it with the package compressed-tensors (0.20 makes room
for zero points only where it dequantizes: ``quantization_config=CompressedTensorsConfig(dequantize=True)``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from skv_export.quantization.solver import Form, Grid


def packed(name: str, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
    """Returns the tensors that stand for a matrix.

    Args:
        name: The matrix's, with its ``.weight``.
        codes: ``[N, K]``, whole numbers.
        grid: What they stand for.
    """
    stem = name.removesuffix("weight")
    return {
        f"{stem}weight_packed": _words(codes, grid.form.bits),
        # In 32 bits, though 16 hold them: the library compressed-tensors computes in the scales' number format.
        f"{stem}weight_scale": grid.scales.cpu().contiguous(),
        f"{stem}weight_zero_point": _words(grid.zeros.T, grid.form.bits).T.contiguous(),
        f"{stem}weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }


def _words(fields: Tensor, bits: int) -> Tensor:
    """``[M, F]`` fields as int32 words along the last axis, the first field lowest, padded with zeros."""
    per_word = 32 // bits
    whole = fields.to("cpu", torch.int64)
    whole = torch.nn.functional.pad(whole, (0, -whole.shape[1] % per_word)).reshape(len(whole), -1, per_word)
    words = (whole << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)


class CheckpointWriter:
    """Writes a checkpoint's tensors file by file, and at the end what says where they are.

    Args:
        folder: Where they go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._where: dict[str, str] = {}
        self._size = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Writes one file."""
        file = f"model-{len(set(self._where.values())) + 1:05}.safetensors"
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, self._folder / file)
        self._where |= dict.fromkeys(tensors, file)
        self._size += sum(tensor.nbytes for tensor in tensors.values())

    def finish(
        self, config: dict[str, Any], forms: Mapping[str, Form], plain: Iterable[str], about: Mapping[str, Any]
    ) -> None:
        """Writes the index and the configuration.

        Args:
            config: Of the model.
            forms: Of each module whose matrix is quantized.
            plain: Modules with matrices that are not quantized.
            about: How the codes were found, for readers.
        """
        index = {"metadata": {"total_size": self._size}, "weight_map": self._where}
        _write_json(self._folder / "model.safetensors.index.json", index)
        found = list(dict.fromkeys(forms.values()))
        groups = {}
        for number, form in enumerate(found):
            weights = {
                "num_bits": form.bits, "type": "int", "symmetric": False, "strategy": "group",
                "group_size": form.group_size, "dynamic": False, "observer": "minmax",
            }  # fmt: skip
            targets = ["Linear"] if len(found) == 1 else [name for name, own in forms.items() if own == form]
            groups[f"group_{number}"] = {
                "targets": targets, "weights": weights, "input_activations": None, "output_activations": None,
                "format": "pack-quantized",
            }  # fmt: skip
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": sorted(plain),
            "made_by": dict(about),
        }
        _write_json(self._folder / "config.json", config)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
