"""Which models can be exported: refuses the others by name, with the reason, and prepares a model for tracing.

A model whose export would compute something else than the checkpoint is refused: here, from the configuration, or by
the attention hook, when the model runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from skv_export.errors import SkvError
from skv_export.export.architectures import HYBRID, TESTED

_PLAIN_LAYERS = {"full_attention", "sliding_attention"}
_WITH_ATTENTION = {*_PLAIN_LAYERS, "hybrid"}
"""The last has a recurrent state beside its cache."""
_OTHER_SENSES = ("vision_config", "audio_config", "speech_config", "thinker_config")
_STATE_SPACE = ("ssm_cfg", "state_size", "mamba_d_state", "time_step_rank", "rescale_every")
_ALIBI_MODELS = ("bloom", "mpt")


def check_config(config: PreTrainedConfig) -> None:
    """Refuses what the op can't compute.

    Raises:
        SkvError: Names the architecture and the reason.
    """
    reason = next(_reasons(config), None)
    if reason is not None:
        expected = f"a decoder such as {', '.join([*TESTED, *HYBRID])}"
        raise SkvError(f"{config.model_type}: can't be exported: {reason}", expected=expected)


def _reasons(config: PreTrainedConfig) -> Iterator[str]:
    """Yields the reasons why a model cannot be exported, the most specific first."""

    def has(*names: str) -> list[str]:
        return [name for name in names if _is_set(config, name)]

    kinds = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())
    if has("is_encoder_decoder"):
        yield "an encoder-decoder model: its cross attention has a cache of another kind"
    if has("add_cross_attention"):
        yield "cross attention (add_cross_attention) has a cache of another kind"
    if has("kv_lora_rank"):
        yield "multi-head latent attention (kv_lora_rank) caches one compressed vector, not keys and values"
    hybrid = config.model_type in HYBRID and attention_layers(config)
    if (state := has(*_STATE_SPACE)) and not hybrid and not (kinds and kinds <= _PLAIN_LAYERS):
        yield f"a state-space model ({', '.join(state)}) has a recurrent state, not keys and values"
    if "chunked_attention" in kinds or (has("attention_chunk_size") and not kinds):
        yield "attention within chunks (attention_chunk_size)"
    if (other := sorted(kinds - _PLAIN_LAYERS)) and not hybrid:
        yield f"layers without a cache of keys and values, such as linear attention ({', '.join(other)})"
    if senses := has(*_OTHER_SENSES):
        yield f"it reads more than text ({', '.join(senses)}): export its text model alone"
    if has("num_kv_shared_layers"):
        yield "layers share keys and values (num_kv_shared_layers)"
    if has("attn_temperature_tuning") and not all(getattr(config, "no_rope_layers", None) or ()):
        yield "queries are scaled by their positions (attn_temperature_tuning)"
    if has("alibi") or config.model_type in _ALIBI_MODELS:
        yield "positions are biases on the scores (ALiBi), which the op does not add"
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        yield "transformers has no causal language model of this type"
    if any("dynamic" in str(rope.get("rope_type")) for rope in _ropes(config)):
        yield "RoPE frequencies that change with the length (dynamic NTK) would make the cached keys wrong"


def attention_layers(config: PreTrainedConfig) -> list[int]:
    """Returns the numbers of the layers with attention: all, but for a hybrid model."""
    count = int(config.num_hidden_layers)
    kinds = getattr(config, "layer_types", None) if config.model_type in HYBRID else None
    return [i for i in range(count) if kinds is None or kinds[i] in _WITH_ATTENTION]


def _is_set(config: PreTrainedConfig, name: str) -> bool:
    try:
        return bool(getattr(config, name, None))
    except RuntimeError:  # transformers': the value differs from layer to layer
        return True


def _ropes(config: PreTrainedConfig) -> list[Mapping[str, Any]]:
    """Returns the RoPE parameters: one set, or one per kind of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in given.values() if isinstance(value, Mapping)]
    return nested or [given]


def check_windows(config: PreTrainedConfig, windows: Sequence[int]) -> None:
    """Compares the windows that attention asked for with the configuration.

    Some models tell their window to the mask only, which the op never sees.

    Raises:
        SkvError: They differ.
    """
    local_layers = getattr(config, "attention_layers", None)  # gpt_neo's
    window = getattr(config, "window_size" if local_layers else "sliding_window", None)
    window = window if getattr(config, "use_sliding_window", True) else None
    kinds = local_layers or getattr(config, "layer_types", None)
    kinds = kinds or ["sliding_attention" if window else "full_attention"] * len(windows)
    if config.model_type in HYBRID:
        kinds = [kind for kind in kinds if kind in _WITH_ATTENTION]
    expected = [int(window or 0) if kind in ("sliding_attention", "local") else 0 for kind in kinds]
    if list(windows) != expected:
        raise SkvError(
            f"{config.model_type}: can't be exported: attention does not use the windows of the configuration",
            got=list(windows),
            expected=expected,
        )


def context_length(config: PreTrainedConfig) -> int:
    """Returns the tokens that the exported model can attend to.

    A longrope model has two sets of frequencies, one beyond its original length; a cache can't hold keys of both, so
    the export keeps the first set and ends where it does. YaRN reaches ``factor`` times its original length, whether or
    not ``max_position_embeddings`` was raised with it.
    """
    full = int(getattr(config, "max_position_embeddings", None) or 2048)
    limits = []
    for rope in _ropes(config):
        original = int(rope.get("original_max_position_embeddings") or full)
        if rope.get("rope_type") == "longrope":
            limits.append(original)
        if rope.get("rope_type") == "yarn":
            stated = bool(rope.get("original_max_position_embeddings"))
            full = max(full, int(original * float(rope.get("factor") or 1.0))) if stated else full
    return min([full, *limits])


def prepare_model(model: PreTrainedModel) -> None:
    """Makes a model traceable: evaluation mode, no gradients, experts and RoPE without branches on the data."""
    model.eval()  # type: ignore[no-untyped-call]
    model.requires_grad_(False)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")
    if hasattr(model.config, "quantization_config"):  # a GGUF file's weights are plain by now
        vars(model).update(hf_quantizer=None, is_quantized=False)
        del model.config.quantization_config
    for module in model.modules():
        if getattr(module, "rope_type", None) == "longrope":  # within context_length, it is plain RoPE
            vars(module)["rope_type"] = "default"
        if isinstance(module, PreTrainedModel):  # it looks at the tokens only to warn
            vars(module)["warn_if_padding_and_no_attention_mask"] = lambda *_: None
