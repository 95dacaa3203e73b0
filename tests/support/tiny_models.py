"""The tiny models of all tests: one configuration for each attention variant that must work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

_COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
TINY: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "head_dim": 80},
    "mistral": {"sliding_window": 24},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "gemma2": {
        "num_hidden_layers": 4, "layer_types": _ALTERNATING, "sliding_window": 24, "query_pre_attn_scalar": 48,
        "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0, "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "num_hidden_layers": 4, "layer_types": _ALTERNATING, "sliding_window": 24, "query_pre_attn_scalar": 48,
        "tie_word_embeddings": True, "head_dim": 64,
    },
    "gemma3n_text": {
        "num_hidden_layers": 4, "layer_types": _ALTERNATING, "num_kv_shared_layers": 2, "sliding_window": 24,
        "head_dim": 64, "tie_word_embeddings": True, "vocab_size_per_layer_input": 256,
        "hidden_size_per_layer_input": 16, "laurel_rank": 8, "activation_sparsity_pattern": [0.9, *[0.0] * 3],
    },
    "gemma4_text": {
        "num_hidden_layers": 4, "layer_types": _ALTERNATING, "num_kv_shared_layers": 2, "sliding_window": 24,
        "global_head_dim": 64, "num_global_key_value_heads": 1, "attention_k_eq_v": False,
        "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 320, "tie_word_embeddings": True,
    },
    "phi3": {"head_dim": 16, "sliding_window": 24},
    "granite": {
        "attention_multiplier": 0.11, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.5,
    },
    "olmo2": {"num_key_value_heads": 4},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]},
    "gpt_oss": {
        "layer_types": _ALTERNATING[:2], "sliding_window": 24, "num_local_experts": 4, "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "gpt2": {"num_attention_heads": 2, "scale_attn_by_inverse_layer_idx": True},
    "gpt_neox": {"num_attention_heads": 2},
    "granitemoehybrid": {
        "layer_types": ["full_attention"] * 2, "position_embedding_type": "rope", "attention_multiplier": 0.11,
        "num_local_experts": 4, "shared_intermediate_size": 64, "mamba_n_heads": 4,
    },
    "llama4_text": {
        "layer_types": ["full_attention"] * 2, "no_rope_layers": [1, 0], "attn_temperature_tuning": False,
        "num_local_experts": 2, "moe_layers": [1], "intermediate_size_mlp": 96,
    },
    "stablelm": {"head_dim": 16, "partial_rotary_factor": 0.5, "qk_layernorm": True, "use_qkv_bias": True},
    "nemotron": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 2, "window_size": 24},
    "gptj": {"num_attention_heads": 2, "rotary_dim": 16},
    "codegen": {"rotary_dim": 8},
}  # fmt: skip
"""Architecture -> what its tiny configuration sets beyond ``_COMMON`` (None: leaves out): every attention variant that
has to work."""
_MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 24, "mamba_expand": 2, "mamba_chunk_size": 8,
    "mamba_n_groups": 1,
}  # fmt: skip
_DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 24,
}  # fmt: skip
HYBRID: dict[str, dict[str, Any]] = {
    "lfm2": {
        "num_hidden_layers": 6, "layer_types": [*["conv"] * 2, "full_attention", *["conv"] * 2, "full_attention"],
        "head_dim": None, "block_auto_adjust_ff_dim": False,
    },
    "lfm2_moe": {
        "num_hidden_layers": 4, "layer_types": [*["conv"] * 2, "full_attention", "conv"], "head_dim": None,
        "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "num_dense_layers": 1,
    },
    "bamba": {
        **_MAMBA, "num_hidden_layers": 4, "attn_layer_indices": [1, 3], "head_dim": None, "mamba_n_groups": 2,
    },
    "granitemoehybrid": {
        **_MAMBA, **TINY["granitemoehybrid"], "num_hidden_layers": 5, "mamba_n_heads": 8, "mamba_d_head": 16,
        "layer_types": [*["linear_attention"] * 3, "full_attention", "linear_attention"],
        "position_embedding_type": "nope",
    },
    "falcon_h1": {
        **_MAMBA, "num_hidden_layers": 2, "mamba_d_ssm": 128, "mamba_n_groups": 2,
    },
    "nemotron_h": {
        "num_hidden_layers": 5, "head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2,
        "ssm_state_size": 24, "chunk_size": 8, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention", "moe"],
    },
    "qwen3_next": {
        **_DELTA, "num_hidden_layers": 4,
        "layer_types": [*["linear_attention"] * 2, "full_attention", "linear_attention"],
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    },
    "qwen3_5_text": {
        **_DELTA, "num_hidden_layers": 4, "layer_types": [*["linear_attention"] * 3, "full_attention"],
    },
}  # fmt: skip
"""The same for models with recurrent layers between those with attention."""


_SMALL: dict[str, Any] = {
    "num_hidden_layers": 4,
    "sliding_window": 24,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "ffn_dim": 96,
    "word_embed_proj_dim": 64,
    "dtype": "float32",
}
"""Further settings, of those configurations that have them."""
_LATENT = {
    "head_dim": 16,
    "kv_lora_rank": 64,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
}
_SPECIAL: dict[str, dict[str, Any]] = {
    name: {**_LATENT, "num_key_value_heads": 4, "num_hidden_layers": 2}
    for name in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu")
}


def tiny_config(arch: str, **overrides: Any) -> Any:
    """Returns the configuration of a tiny model."""
    from transformers import AutoConfig

    given = {**_COMMON, **(HYBRID | TINY)[arch], **overrides}
    return AutoConfig.for_model(arch, **{name: value for name, value in given.items() if value is not None})


def small_config(model_type: str) -> Any:
    """Returns any architecture's default configuration, scaled down by the names that configurations share.

    Raises:
        ValueError, TypeError, ...: Whatever its class has against it.
    """
    from transformers import AutoConfig

    default = AutoConfig.for_model(model_type)
    given = {name: value for name, value in (_COMMON | _SMALL).items() if _has(default, name)}
    if kinds := getattr(default, "layer_types", None):
        distinct = list(dict.fromkeys(kinds))
        given["layer_types"] = [distinct[i % len(distinct)] for i in range(given["num_hidden_layers"])]
    if not getattr(default, "sliding_window", None):
        given.pop("sliding_window", None)
    return AutoConfig.for_model(model_type, **(given | _SPECIAL.get(model_type, {})))


def _has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except RuntimeError:  # transformers': the value differs from layer to layer
        return False


def make_tiny(folder: Path, arch: str, **overrides: Any) -> Path:
    """Writes a tiny model of ``TINY``; see ``save_random``."""
    return save_random(folder, tiny_config(arch, **overrides))


def save_random(folder: Path, config: Any) -> Path:
    """Writes a model with random weights, large enough that a wrong attention shows in the logits."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(20240131)
    model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    randomize(model)
    model.save_pretrained(folder)
    return folder


def randomize(model: Any) -> None:
    """Gives a model random weights, by torch's random state."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 2.0 / parameter.shape[-1] ** 0.5)
            elif "norm" in name or "ln_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(0, 0.3)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Writes a tokenizer with a token for each printable character; 0 is padding and what is not in the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0} | {chr(31 + i): i for i in range(1, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder)
