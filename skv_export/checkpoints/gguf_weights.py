"""A GGUF file's tensors under the names, orders and shapes of transformers' model; every tensor accounted for.

Which tensor is which parameter is the ``gguf`` package's table, what a converter did to it is undone by transformers'
tensor processors. What transformers' own loader ignores is an error here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    Gemma2TensorProcessor,
    LlamaTensorProcessor,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from skv_export.checkpoints.block_weights import BlockMatrix
from skv_export.checkpoints.checkpoint import Checkpoint, Source
from skv_export.checkpoints.gguf_blocks import GgufMatrix
from skv_export.checkpoints.gguf_config import ARCHITECTURES
from skv_export.checkpoints.gguf_rope import FACTOR_TENSORS
from skv_export.errors import SkvError


@dataclass(frozen=True)
class _ModelNames:
    """What transformers reads of a model to map GGUF's names: it asks each module, which for all of them takes long."""

    config: PreTrainedConfig
    names: tuple[str, ...]
    prefix: str = ""

    def state_dict(self) -> dict[str, None]:
        return dict.fromkeys(self.names)

    def named_children(self) -> list[tuple[str, _ModelNames]]:
        if not self.prefix:
            return []
        inner = tuple(name.removeprefix(f"{self.prefix}.") for name in self.names if name.startswith(f"{self.prefix}."))
        return [(self.prefix, _ModelNames(self.config, inner))]


class GgufWeights:
    """The tensors of a GGUF file as float32, under the model's names.

    Args:
        source: The file.
        model: Its model; only its configuration and its parameters' names matter.

    Raises:
        SkvError: The file holds a tensor that the model has no place for.
    """

    def __init__(self, source: Source, model: PreTrainedModel) -> None:
        self._checkpoint = Checkpoint(source)
        arch = self._checkpoint.gguf_architecture
        self._processor = _processor(arch)(config=model.config.to_dict())
        names = _ModelNames(model.config, tuple(model.state_dict()), model.base_model_prefix)
        self._mapping: dict[str, str] = get_gguf_hf_weights_map(names, self._processor, model_type=arch)
        self._stored: dict[str, list[str]] = {}
        unknown = []
        for name in self._checkpoint.names():
            parameter = self._mapping.get(name, self._mapping.get(name.removesuffix(".weight")))  # experts: no suffix
            if parameter is not None:
                self._stored.setdefault(parameter, []).append(name)
            elif name not in FACTOR_TENSORS:
                unknown.append(name)
        if unknown:
            raise SkvError(
                f"{source}: tensors that {model.config.model_type} has no place for, so the model would be another",
                got=", ".join(unknown[:4]),
                fix="Use the safetensors checkpoint.",
            )

    def names(self) -> Iterable[str]:
        """Returns the parameters that the file holds."""
        return self._stored

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Nothing: some tensors are reshaped, so reading them tells."""
        return None

    def read(self, name: str) -> torch.Tensor:
        """Reads a parameter; stacked experts' gate and up projections are two tensors of the file."""
        return self._undone(name, self._checkpoint.tensor)

    def _undone(self, name: str, tensor: Callable[[str], NDArray[Any]]) -> torch.Tensor:
        """Returns a parameter made of the file's tensors: what the converter did to them is undone."""
        parameters: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
        for stored in self._stored[name]:
            made = self._processor.process(
                tensor(stored), stored, tensor_key_mapping=self._mapping, parsed_parameters=parameters
            )
        if name in parameters["tensors"]:
            return parameters["tensors"][name]
        return torch.from_numpy(np.ascontiguousarray(made.weights))

    def quantized(self, name: str) -> BlockMatrix | None:
        """Returns a parameter as the file quantized it; None where a graph can't hold it so."""
        entries = [self._checkpoint.entries[stored] for stored in self._stored.get(name, ())]
        if len(entries) != 1 or entries[0].blocks() is None:
            return None
        rows = entries[0].shape[0]
        # The rows' numbers, in two columns, show what the converter did to rows.
        numbers = np.arange(rows, dtype=np.float64).repeat(2).reshape(rows, 2)
        made = self._undone(name, lambda _: numbers).numpy()
        transposed = made.shape == (2, rows)
        order = (made[0] if transposed else made[:, 0]).astype(np.int64)
        if not np.array_equal(np.sort(order), numbers[:, 0]):
            return None
        return GgufMatrix(entries[0], None if np.array_equal(order, numbers[:, 0]) else order, transposed)

    def release(self, names: Iterable[str]) -> None:
        """Nothing is kept: dequantizing copies."""


def load_gguf_model(source: Source, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Loads a whole GGUF file into PyTorch, as the model of ``config``.

    Args:
        source: The file.
        config: Its configuration, by ``gguf_config``.
        dtype: Number format of the weights.

    Raises:
        SkvError: A tensor is missing, left over, or of another shape than the model's.
    """
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    weights = GgufWeights(source, model)
    held = set(weights.names())
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.state_dict().items():
        if name in held:
            tensor = weights.read(name)
            if tensor.shape != parameter.shape:
                raise SkvError(
                    f"{source}: the tensor of {name} has another shape",
                    got=tuple(tensor.shape),
                    expected=tuple(parameter.shape),
                )
            state[name] = tensor.to(parameter.dtype)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise SkvError(f"{source}: tensors are missing", got=", ".join(missing[:4]))
    return model


def _processor(arch: str) -> Any:
    """Returns the class that undoes what llama.cpp's converter did; transformers' table lacks some architectures."""
    known = ARCHITECTURES[arch]
    if known.rows == "adjacent":
        return LlamaTensorProcessor
    if known.norm_offset:
        return Gemma2TensorProcessor
    return TENSOR_PROCESSORS.get(arch, TensorProcessor)
