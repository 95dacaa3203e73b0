"""The Hugging Face configuration of a GGUF file, with every metadata key and tensor accounted for.

What a key means is what llama.cpp makes of it. A key of the architecture's namespace is used here, or is known to
change nothing at the value that it has, or is an error that names it; keys of other namespaces (``general``,
``tokenizer``, ``split``, notes of quantizers) hold nothing of the model. transformers' own GGUF reader ignores what it
does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from skv_export.checkpoints.gguf_rope import FACTOR_TENSORS, rope_parameters
from skv_export.checkpoints.tensor_files import TensorEntry
from skv_export.errors import SkvError

_SAFETENSORS = "Use the safetensors checkpoint."


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp's in transformers' terms.

    Attributes:
        model_type: transformers' name.
        norm_eps: What its configuration calls the norms' epsilon.
        keys: Further metadata keys and what the configuration calls them.
        fixed: Values that the architecture implies and no key says.
        rows: How the converter leaves the rows of q and k: ``adjacent`` (RoPE's pairs are neighbours) or ``halves``.
        norm_offset: What the converter adds to the norms' weights.
        biases: Configuration's switch of the attention's biases, if it has one, by the tensor that tells.
        partial_rope: Whether the model's class can turn a part of each head.
        positions: What the configuration calls the longest context.
    """

    model_type: str
    norm_eps: str = "rms_norm_eps"
    keys: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    rows: str = "halves"
    norm_offset: float = 0.0
    biases: Mapping[str, str] = field(default_factory=dict)
    partial_rope: bool = False
    positions: str = "max_position_embeddings"


_BIASES = {"blk.0.attn_q.bias": "attention_bias"}
_MOE = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        "llama", rows="adjacent", biases={**_BIASES, "blk.0.ffn_gate.bias": "mlp_bias"}
    ),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", biases=_BIASES),
    "qwen2moe": Architecture(
        "qwen2_moe",
        keys={**_MOE, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        fixed={"norm_topk_prob": False},
    ),
    "qwen3moe": Architecture("qwen3_moe", keys=_MOE, fixed={"norm_topk_prob": True}, biases=_BIASES),
    "gemma": Architecture("gemma", norm_offset=1.0, fixed={"hidden_act": "gelu_pytorch_tanh"}),
    "gemma2": Architecture(
        "gemma2",
        norm_offset=1.0,
        keys={
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
            "attention.sliding_window": "sliding_window",
        },
        fixed={
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
            "hidden_activation": "gelu_pytorch_tanh",
        },
    ),
    "gemma3": Architecture(
        "gemma3_text",
        norm_offset=1.0,
        keys={"final_logit_softcapping": "final_logit_softcapping", "attention.sliding_window": "sliding_window"},
        fixed={"hidden_activation": "gelu_pytorch_tanh"},
    ),
    "phi3": Architecture("phi3", keys={"attention.sliding_window": "sliding_window"}, partial_rope=True),
    "granite": Architecture(
        "granite",
        rows="adjacent",
        keys={
            "logit_scale": "logits_scaling",
            "residual_scale": "residual_multiplier",
            "embedding_scale": "embedding_multiplier",
            "attention.scale": "attention_multiplier",
        },
        biases={**_BIASES, "blk.0.ffn_gate.bias": "mlp_bias"},
    ),
    "olmo2": Architecture("olmo2", biases=_BIASES),
    "smollm3": Architecture("smollm3", rows="adjacent", fixed={"no_rope_layer_interval": 4}, biases=_BIASES),
    "starcoder2": Architecture(
        "starcoder2", norm_eps="norm_epsilon", fixed={"use_bias": True, "hidden_act": "gelu_pytorch_tanh"}
    ),
    "gpt2": Architecture("gpt2", norm_eps="layer_norm_epsilon", positions="n_positions"),
}  # fmt: skip
"""llama.cpp's name to what is known of the architecture; files of others are refused by name."""

_ALTERNATION = {"gemma2": 2, "gemma3": 6}
"""Of so many layers the last sees the whole context, the others a window, unless the metadata say otherwise."""
_SCALE_OF_HIDDEN_SIZE = {("gemma2", 46), ("gemma3", 62)}
"""Architecture and layers of the models (27B) that scale scores by hidden_size / heads instead of head_dim."""
_SWA_THETA = 10000.0
"""RoPE base of gemma3's layers with a window."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (1.0,),
    "expert_count": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_used_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "residual_scale": (1.0,),
    "swin_norm": (False,),
    "use_parallel_residual": (False,),
}
"""Keys of features that are off at these values."""
_NOTES = ("rope.scaling.finetuned", "tensor_data_layout", "source.", "license")
"""Keys that say something about the model's history only."""


class _Keys:
    """The metadata keys of the architecture; remembers which were asked for."""

    def __init__(self, architecture: str, metadata: Mapping[str, Any]) -> None:
        prefix = f"{architecture}."
        self._values = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
        self._used: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """Returns a key's value: one number where a list has one per layer, all alike."""
        self._used.add(key)
        value = self._values.get(key)
        if isinstance(value, list):
            if len(set(map(str, value))) != 1:
                raise SkvError(f"{key}: layers differ", got=str(value)[:80], expected="one value", fix=_SAFETENSORS)
            value = value[0]
        if isinstance(value, float) and value == np.float32(value):
            value = float(str(np.float32(value)))  # 1e-05, as it was before it became 32 bits
        return default if value is None else value

    def layers(self, key: str) -> list[Any] | None:
        """Returns a key that has one value per layer, if it is such a list."""
        value = self._values.get(key)
        if isinstance(value, list):
            self._used.add(key)
            return value
        return None

    def number(self, key: str, default: int | None = None) -> int:
        """Returns a positive integer.

        Raises:
            SkvError: It is missing, or something else.
        """
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise SkvError(key, got=value, expected="a positive integer", fix=_SAFETENSORS)
        return value

    def unknown(self) -> dict[str, Any]:
        """Returns the keys that nobody asked for and that may change what the model computes."""
        return {
            key: value
            for key, value in self._values.items()
            if key not in self._used and not key.startswith(_NOTES) and not (key in _NEUTRAL and value in _NEUTRAL[key])
        }


def gguf_config(metadata: Mapping[str, Any], entries: Mapping[str, TensorEntry], name: str) -> dict[str, Any]:
    """Returns the configuration of a GGUF file's model, as transformers' configuration.

    Args:
        metadata: All of the file's keys.
        entries: All of its tensors.
        name: The file's, for messages.

    Raises:
        SkvError: The architecture or a key is not known here, or the model can't be expressed.
    """
    try:
        return _config(metadata, entries)
    except SkvError as error:
        raise SkvError(
            f"{name}: {error.what}", got=error.got, expected=error.expected, fix=error.fix or _SAFETENSORS
        ) from error


def _config(metadata: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> dict[str, Any]:
    arch, kind = str(metadata.get("general.architecture", "")), metadata.get("general.type", "model")
    known = ARCHITECTURES.get(arch)
    if kind != "model":
        raise SkvError("general.type", got=kind, expected="model", fix="Pass the model's own file.")
    if known is None:
        raise SkvError("GGUF architecture", got=repr(arch), expected=f"one of {', '.join(ARCHITECTURES)}")
    keys = _Keys(arch, metadata)
    hidden, heads, layers = (keys.number(key) for key in ("embedding_length", "attention.head_count", "block_count"))
    head_dim = keys.number("attention.key_length", max(hidden // heads, 1))
    if (values := keys.number("attention.value_length", head_dim)) != head_dim:
        raise SkvError("attention.value_length: other than the keys'", got=values, expected=head_dim)
    eps = keys.get("attention.layer_norm_rms_epsilon", keys.get("attention.layer_norm_epsilon", 1e-5))
    config: dict[str, Any] = {
        "model_type": known.model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": keys.get("feed_forward_length", 4 * hidden),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": _vocab_size(keys, entries),
        known.norm_eps: eps,
        known.positions: keys.number("context_length", 2048),
        "tie_word_embeddings": "output.weight" not in entries,
        "architectures": _architectures(keys, entries, known.model_type),
        **known.fixed,
        **{switch: tensor in entries for tensor, switch in known.biases.items()},
        **{f"{token}_token_id": _token(metadata, token) for token in ("bos", "eos", "pad")},
    }
    for key, name in known.keys.items():
        if (value := keys.get(key)) is not None:
            config[name] = value
    if arch == "gpt2":
        config |= {"n_inner": config.pop("intermediate_size"), "add_cross_attention": False}
        del config["num_key_value_heads"], config["head_dim"]
    else:
        config |= _attention(arch, known, config, keys, entries)
    if unknown := keys.unknown():
        got = ", ".join(f"{arch}.{key} = {str(value)[:40]}" for key, value in sorted(unknown.items()))
        raise SkvError("metadata that this export does not understand, so the model would be another", got=got)
    return config


def _attention(
    arch: str, known: Architecture, config: Mapping[str, Any], keys: _Keys, entries: Mapping[str, TensorEntry]
) -> dict[str, Any]:
    """Returns RoPE, windows and the scale of the scores."""
    made: dict[str, Any] = {}
    if arch == "llama" and (window := keys.get("attention.sliding_window")):
        made |= {"model_type": "mistral", "sliding_window": window}
    if arch in ("qwen2", "qwen3", "qwen2moe", "qwen3moe", "smollm3"):
        made["use_sliding_window"] = False
    if arch == "phi3" and not config.get("sliding_window"):
        made["sliding_window"] = None
    if arch == "smollm3":  # every fourth layer is without RoPE; not what the class itself would take for no list
        made["no_rope_layers"] = [int((i + 1) % 4 != 0) for i in range(config["num_hidden_layers"])]
    if arch in _ALTERNATION:
        hidden, layers, heads = (config[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
        made["layer_types"] = _layer_types(arch, layers, keys)
        wide = (arch, layers) in _SCALE_OF_HIDDEN_SIZE
        made["query_pre_attn_scalar"] = hidden // heads if wide else config["head_dim"]
    context = config[known.positions]
    factors = {name: entries[name].array() for name in FACTOR_TENSORS if name in entries}
    rope = rope_parameters(keys.get, factors, head_dim=config["head_dim"], context=context, partial=known.partial_rope)
    if rope["rope_type"] == "longrope":
        made["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    if arch == "gemma3":
        swa = {"rope_type": "default", "rope_theta": float(keys.get("rope.freq_base_swa", _SWA_THETA))}
        rope = {"full_attention": rope, "sliding_attention": swa}
    return {**made, "rope_parameters": rope}


def _layer_types(arch: str, layers: int, keys: _Keys) -> list[str]:
    """Returns the kind of each layer: windows, and every so manieth layer without."""
    given = keys.layers("attention.sliding_window_pattern")
    if given is None:
        every = int(keys.get("attention.sliding_window_pattern", _ALTERNATION[arch]))
        given = [bool((i + 1) % every) if every > 0 else False for i in range(layers)]
    if len(given) != layers:
        raise SkvError("attention.sliding_window_pattern", got=f"{len(given)} values", expected=layers)
    return ["sliding_attention" if windowed else "full_attention" for windowed in given]


def _architectures(keys: _Keys, entries: Mapping[str, TensorEntry], model_type: str) -> list[str] | None:
    """Returns what the file is if it is no language model, as config.json's ``architectures`` would say it."""
    pooling = keys.get("pooling_type", 0)
    if any(name.startswith("cls.") for name in entries):
        return [f"{model_type}ForSequenceClassification"]
    return [f"{model_type}Model"] if pooling else None


def _vocab_size(keys: _Keys, entries: Mapping[str, TensorEntry]) -> int:
    """Returns the rows of the embedding: the key is optional, and tokens may be fewer."""
    embedding = entries.get("token_embd.weight")
    stated = keys.get("vocab_size")
    if embedding is None or len(embedding.shape) != 2:
        raise SkvError("no tensor token_embd.weight", got=", ".join(list(entries)[:3]))
    if stated is not None and stated != embedding.shape[0]:
        raise SkvError("vocab_size", got=stated, expected=f"{embedding.shape[0]}, the embedding's rows")
    return embedding.shape[0]


def _token(metadata: Mapping[str, Any], token: str) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{ {'pad': 'padding'}.get(token, token) }_token_id")
    return value if isinstance(value, int) else None
