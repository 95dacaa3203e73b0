"""Which models can be exported: refuses the others by name, with the reason, and prepares a model for tracing.

A model whose export would compute something else than the checkpoint is refused: here, from the configuration, or by
the attention hook, when the model runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from skv_export.errors import SkvError
from skv_export.export import gemma3n_sparsity, latent_attention, rope_by_length, vision_language
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
    if reason is None and vision_language.is_vision_language(config):
        reason = next(_reasons(config.get_text_config(), has_class=False), None)
    if reason is not None:
        expected = f"a decoder such as {', '.join([*TESTED, *HYBRID])}"
        raise SkvError(f"{config.model_type}: can't be exported: {reason}", expected=expected)


def _reasons(config: PreTrainedConfig, has_class: bool = True) -> Iterator[str]:
    """Yields the reasons why a model cannot be exported, the most specific first; a text tower has no class."""

    def has(*names: str) -> list[str]:
        return [name for name in names if _is_set(config, name)]

    kinds = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())
    if has("is_encoder_decoder"):
        yield "an encoder-decoder model: its cross attention has a cache of another kind"
    if has("add_cross_attention"):
        yield "cross attention (add_cross_attention) has a cache of another kind"
    if has("kv_lora_rank") and config.model_type not in latent_attention.LATENT:
        yield "multi-head latent attention (kv_lora_rank) of a form that is not built in"
    hybrid = config.model_type in HYBRID and attention_layers(config)
    if (state := has(*_STATE_SPACE)) and not hybrid and not (kinds and kinds <= _PLAIN_LAYERS):
        yield f"a state-space model ({', '.join(state)}) has a recurrent state, not keys and values"
    if "chunked_attention" in kinds or (has("attention_chunk_size") and not kinds):
        yield "attention within chunks (attention_chunk_size)"
    if (other := sorted(kinds - _PLAIN_LAYERS)) and not hybrid:
        yield f"layers without a cache of keys and values, such as linear attention ({', '.join(other)})"
    if config.model_type in vision_language.REFUSED:
        yield vision_language.REFUSED[config.model_type]
    if not vision_language.is_vision_language(config) and (senses := has(*_OTHER_SENSES)):
        yield f"it reads more than text ({', '.join(senses)}): export its text model alone"
    if has("attn_temperature_tuning") and not all(getattr(config, "no_rope_layers", None) or ()):
        yield "queries are scaled by their positions (attn_temperature_tuning)"
    if has("alibi") or config.model_type in _ALIBI_MODELS:
        yield "positions are biases on the scores (ALiBi), which the op does not add"
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or vision_language.is_vision_language(config)
    if has_class and not known:
        yield "transformers has no causal language model of this type"


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
        rope_by_length.choose_by_length(module)
        if type(module).__name__ == gemma3n_sparsity.MLP:
            gemma3n_sparsity.use_constant_threshold(module)
        if isinstance(module, PreTrainedModel):  # it looks at the tokens only to warn
            vars(module)["warn_if_padding_and_no_attention_mask"] = lambda *_: None
