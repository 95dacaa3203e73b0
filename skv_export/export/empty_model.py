"""Models with fake (zero-memory) parameters, for tracing.

Parameters are torch's fake tensors, which have shapes and no data; buffers that a model computes itself (the
frequencies of RoPE) are real, because they become constants of the graph.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from skv_export.export import vision_language
from skv_export.export.supported import prepare_model


@dataclass(frozen=True)
class EmptyModel:
    """A model without weights.

    Attributes:
        model: Ready for tracing.
        mode: Where its parameters live; what is computed with them is computed in it.
    """

    model: PreTrainedModel
    mode: FakeTensorMode

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """While the block runs, tensors that are made are fake, and no gradients are kept.

        torch writes what fails in a fake tensor to its log, with a traceback, before it raises it; once is enough.
        """
        log = logging.getLogger("torch._subclasses.fake_tensor")
        before, log.disabled = log.disabled, True
        try:
            with self.mode, torch.no_grad():
                yield
        finally:
            log.disabled = before


def build(config: PreTrainedConfig, dtype: torch.dtype) -> EmptyModel:
    """Builds the model of a configuration.

    Args:
        config: A causal language model's.
        dtype: Number format of the weights, but for those that the model keeps in float32.

    Raises:
        Whatever transformers raises where the configuration is no such model's.
    """
    with init_empty_weights(include_buffers=False):
        towers = vision_language.is_vision_language(config)
        made_by = AutoModelForImageTextToText if towers else AutoModelForCausalLM
        model: PreTrainedModel = made_by.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype, trust_remote_code=False
        )
    if towers:
        vision_language.keep_text_tower(model)
    model.tie_weights()
    prepare_model(model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    wide = [re.compile(pattern.replace("*", ".*")) for pattern in model._get_dtype_plan(dtype)]
    made: dict[int, torch.nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                exact = any(pattern.search(f"{path}.{name}") for pattern in wide)
                with mode:
                    empty = torch.empty(parameter.shape, dtype=torch.float32 if exact else parameter.dtype)
                made[id(parameter)] = torch.nn.Parameter(empty, requires_grad=False)
            module.register_parameter(name, made[id(parameter)])
    return EmptyModel(model, mode)
