"""A checkpoint's configuration as transformers has it: of ``config.json``, or of a GGUF file's metadata.

Nothing is asked of the checkpoint's own code, and spellings that transformers does not know are put into its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from skv_export.checkpoints.checkpoint import Checkpoint, Source
from skv_export.errors import SkvError, did_you_mean

_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act")
_ROPES = ("default", *ROPE_INIT_FUNCTIONS)


def load_config(source: Source) -> PreTrainedConfig:
    """Returns a checkpoint's configuration.

    Raises:
        SkvError: There is none; transformers does not know its ``model_type`` or does not take its values; a GGUF
            file's metadata are not understood.
    """
    values = Checkpoint(source).config
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise SkvError(
            f"{source}: transformers can't read its configuration: model_type",
            got=repr(model_type),
            expected=f"one that transformers {transformers.__version__} has; code of a checkpoint's own is never run",
        )
    if not isinstance(quantization := values.get("quantization_config"), Mapping | None):
        raise SkvError(
            f"{source}: quantization_config in config.json", got=repr(quantization)[:100], expected="a table"
        )
    try:
        plain = _without_quantization(_plain_floats(values))
        config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(_known_rope(plain))
    except Exception as error:  # whatever the classes of some 500 architectures raise for values they don't expect
        got = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise SkvError(f"{source}: transformers can't read its configuration", got=got, fix="Correct it.") from error
    _check_names(config.get_text_config(), source)
    return config


def _ropes(config: PreTrainedConfig) -> list[Mapping[str, Any]]:
    """Returns the RoPE parameters: one set, or one per kind of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in given.values() if isinstance(value, Mapping)]
    return nested or [given]


def context_length(config: PreTrainedConfig) -> int:
    """Returns the tokens that the exported model, or its text tower, can attend to.

    YaRN reaches ``factor`` times its original length, whether or not ``max_position_embeddings`` was raised with it;
    dynamic NTK ``factor`` times ``max_position_embeddings``.
    """
    text = config.get_text_config()
    full = int(getattr(text, "max_position_embeddings", None) or 2048)
    reached = [full]
    for rope in _ropes(text):
        factor, original = float(rope.get("factor") or 1.0), rope.get("original_max_position_embeddings")
        if rope.get("rope_type") == "yarn" and original:
            reached.append(int(int(original) * factor))
        if rope.get("rope_type") == "dynamic":
            reached.append(int(full * factor))
    return max(reached)


def check_window(config: PreTrainedConfig, window: int) -> None:
    """Refuses windows of text that the model has no positions for.

    Raises:
        SkvError: They are longer than its context.
    """
    if window > (longest := context_length(config)):
        raise SkvError("window", got=f"{window} tokens", expected=f"at most {longest}, the model's context")


def _check_names(config: PreTrainedConfig, source: Source) -> None:
    """Refuses activation functions and kinds of RoPE that transformers does not have: a model would fail on them."""
    for key in _ACTIVATIONS:
        name = getattr(config, key, None)
        if isinstance(name, str) and name not in ACT2FN:
            raise SkvError(
                f"{source}: {key}: an activation function that transformers does not have",
                got=repr(name)[:100],
                expected=f"one of {', '.join(sorted(ACT2FN))}",
                fix=did_you_mean(name, ACT2FN),
            )
    given = getattr(config, "rope_parameters", None) or {}
    for rope in [given, *(value for value in given.values() if isinstance(value, Mapping))]:
        kind = rope.get("rope_type", "default")
        if kind not in _ROPES:
            raise SkvError(
                f"{source}: rope_type: a kind of RoPE that transformers does not have",
                got=repr(kind)[:100],
                expected=f"one of {', '.join(_ROPES)}",
                fix=did_you_mean(str(kind), _ROPES),
            )


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration of plain weights: ``packed_weights`` makes such of those that are quantized."""
    made = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(text := made.get("text_config"), Mapping):
        made["text_config"] = _without_quantization(text)
    return made


def _plain_floats(value: Any) -> Any:
    """Returns JSON with the numbers that it lacks, which transformers writes as ``{"__float__": "Infinity"}``."""
    if isinstance(value, list):
        return [_plain_floats(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(value["__float__"])
    return {key: _plain_floats(item) for key, item in value.items()}


def _known_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration with RoPE as transformers spells it.

    Longrope was called ``su``, and ``mrope`` is plain RoPE where all positions are of text.
    """
    made = dict(config)
    if isinstance(text := made.get("text_config"), Mapping):
        made["text_config"] = _known_rope(text)
    for key in ("rope_scaling", "rope_parameters"):
        rope = made.get(key)
        if not isinstance(rope, Mapping):
            continue
        kind = rope.get("rope_type", rope.get("type"))
        if kind == "mrope":
            made[key] = {**rope, "rope_type": "default", "type": "default"}
        if kind in ("su", "longrope"):
            original = made.get("original_max_position_embeddings")
            known = {"original_max_position_embeddings": original} if original else {}
            made[key] = {**known, **rope, "rope_type": "longrope", "type": "longrope"}
    return made
