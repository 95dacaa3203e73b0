"""What transformers' models can do and an exported graph can't: each says why, and what to do instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Self

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig

from skv_export.arguments import checked
from skv_export.errors import SkvError
from skv_export.runtime.providers import device_of

_FIX_DEVICE = "Choose where it computes with execution_provider; leave out device."
_FIX_DTYPE = "Choose it at the export: skv-export model --dtype."
_FIX_TRAIN = "Change the checkpoint with transformers, and export it again."


def _refused(name: str, reason: str, fix: str) -> Callable[..., NoReturn]:
    """A method of transformers' models that an exported graph can't support."""

    def method(self: FrozenModel, *_: Any, **__: Any) -> NoReturn:
        raise SkvError(f"SkvForCausalLM.{name}: not supported", got="a call", expected=f"none: {reason}", fix=fix)

    method.__name__, method.__doc__ = name, f"Not supported: {reason}.\n\nRaises:\n    SkvError: Always."
    return method


class FrozenModel:
    """A model whose device, number format and weights are those of its export.

    Attributes:
        device: Of what goes in and comes out: the CPU.
        dtype: Of what comes out: float32.
        config: transformers' configuration of the model.
    """

    device: torch.device
    dtype: torch.dtype
    config: PretrainedConfig

    @checked
    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Returns how many parameters the model has, as its checkpoint's class in PyTorch counts them.

        Args:
            only_trainable: None of an exported model's is.
            exclude_embeddings: Leave out those of embeddings.

        Raises:
            SkvError: It is the text tower of a vision-language model, which has no class of its own.
        """
        if only_trainable:
            return 0
        if type(self.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise SkvError(
                f"num_parameters: transformers has no class of a language model for {self.config.model_type}"
            )
        with torch.device("meta"):  # no memory is taken
            model = AutoModelForCausalLM.from_config(self.config)  # type: ignore[no-untyped-call]
        return int(model.num_parameters(exclude_embeddings=exclude_embeddings))

    def load_custom_generate(self, *_: Any, **__: Any) -> NoReturn:
        """Not supported: code of a generation mode on the hub is not loaded.

        Raises:
            SkvError: Always.
        """
        raise SkvError("custom_generate: not supported, as it runs code from a hub", fix="Leave it out.")

    def to(self, *targets: torch.device | torch.dtype | str | int, dtype: torch.dtype | None = None) -> Self:
        """Returns the model: inputs and outputs are float32 on the CPU, whichever provider computes.

        Args:
            targets: Devices and number formats, as in ``torch.nn.Module.to``.
            dtype: A number format.

        Raises:
            SkvError: Another device or number format.
        """
        for target in (*targets, *(() if dtype is None else (dtype,))):
            if isinstance(target, torch.dtype):
                if target != self.dtype:
                    raise SkvError("dtype of SkvForCausalLM", got=target, expected=self.dtype, fix=_FIX_DTYPE)
            elif isinstance(target, int) or torch.device(target).type != "cpu":  # a number is an accelerator's
                raise SkvError("device of SkvForCausalLM", got=target, expected="cpu", fix=_FIX_DEVICE)
        return self

    def float(self) -> Self:
        """Returns the model: inputs and outputs are float32."""
        return self

    def cpu(self) -> Self:
        """Returns the model: inputs and outputs are on the CPU."""
        return self

    def eval(self) -> Self:
        """Returns the model, which is always in evaluation mode."""
        return self

    def train(self, mode: bool = True) -> Self:
        """Returns the model.

        Raises:
            SkvError: ``mode`` is not False.
        """
        if mode:
            raise SkvError("SkvForCausalLM.train: not supported", got=mode, expected=False, fix=_FIX_TRAIN)
        return self

    half = _refused("half", "the number format is the export's", _FIX_DTYPE)
    bfloat16 = _refused("bfloat16", "the number format is the export's", _FIX_DTYPE)
    double = _refused("double", "the number format is the export's", _FIX_DTYPE)
    cuda = _refused("cuda", "what goes in and comes out is on the CPU", _FIX_DEVICE)
    requires_grad_ = _refused("requires_grad_", "an exported graph can't be trained", _FIX_TRAIN)
    gradient_checkpointing_enable = _refused(
        "gradient_checkpointing_enable", "an exported graph can't be trained", _FIX_TRAIN
    )

    parameters = _refused("parameters", "the weights are the graph's", _FIX_TRAIN)
    named_parameters = _refused("named_parameters", "the weights are the graph's", _FIX_TRAIN)
    state_dict = _refused("state_dict", "the weights are the graph's", _FIX_TRAIN)
    load_state_dict = _refused("load_state_dict", "the weights are the graph's", _FIX_TRAIN)
    add_adapter = _refused("add_adapter", "the weights are the graph's", _FIX_TRAIN)
    get_input_embeddings = _refused("get_input_embeddings", "the weights are the graph's", _FIX_TRAIN)
    get_output_embeddings = _refused("get_output_embeddings", "the weights are the graph's", _FIX_TRAIN)
    resize_token_embeddings = _refused("resize_token_embeddings", "the vocabulary is the graph's", _FIX_TRAIN)


def provider_of(device_map: Any, execution_provider: str) -> str:
    """The execution provider that transformers' ``device_map`` means; the one given where it says nothing.

    Raises:
        SkvError: Several devices, or one that no provider has.
    """
    places = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
    if places <= {None, "auto"}:
        return execution_provider
    names = {f"cuda:{place}" if isinstance(place, int) else str(place) for place in places}
    try:
        (name,) = {"{}:{}".format(*device_of(name)) for name in names}
    except (SkvError, ValueError):
        raise SkvError("device_map", got=device_map, expected="auto, or one device: cpu, cuda, cuda:1, ...") from None
    return name.removesuffix(":0")


def check_dtype(dtype: torch.dtype | str | None, exported: str) -> None:
    """Raises SkvError if a number format is asked for that is not the export's."""
    names = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    wanted = str(dtype).removeprefix("torch.")
    if dtype is not None and wanted != "auto" and names.get(wanted, wanted) != exported:
        raise SkvError(
            "dtype", got=wanted, expected=f"{exported}, the export's", fix="Export again with --dtype, or leave it out."
        )
