"""Names of the attention weights by architecture, and reading one layer's projections from a checkpoint.

All layers have one form: ``[heads * head_dim, hidden]`` matrices, heads in order, RoPE pairs half a head apart
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from skv_export.checkpoints.checkpoint import Checkpoint
from skv_export.checkpoints.gguf_config import ARCHITECTURES
from skv_export.checkpoints.shared_caches import refuse_shared
from skv_export.errors import SkvError

Array = npt.NDArray[Any]
Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """Names of one architecture's attention weights, inside a layer.

    Attributes:
        layer: Name of a layer, without the model's own prefix.
        q: Query projection; with ``qkv`` unused, as ``k`` and ``v``.
        k: Key projection.
        v: Value projection.
        qkv: Fused projection; empty where there is none.
        fused: Order of its rows: ``concat`` (all queries, all keys, all values), ``heads`` (per head q, k, v) or
            ``groups`` (per KV head its queries, its key, its value).
        transposed: Stored ``[in, out]`` (gpt2's Conv1D).
        norm: Norm before the projections; empty where there is none (olmo2).
        norm_offset: Added to the norms' weights (gemma stores weight - 1).
        q_norm: Norm on queries, after the projection; its absence is fine.
        k_norm: The same for keys.
    """

    layer: str = "layers.{i}."
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str = ""
    fused: str = "concat"
    transposed: bool = False
    norm: str = "input_layernorm"
    norm_offset: float = 0.0
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"

    @property
    def key(self) -> str:
        """The projection that holds the keys."""
        return self.qkv or self.k


_LLAMA = Row()
_GEMMA = Row(norm_offset=1.0)
_POST_NORM = Row(norm="")
_BLOCK = Row(layer="h.{i}.", q="attn.q_proj", k="attn.k_proj", v="attn.v_proj", norm="ln_1")
ROWS: Mapping[str, Row] = {
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "ministral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "granite"), _LLAMA
    ),
    **dict.fromkeys(
        ("granitemoe", "smollm3", "gpt_oss", "cohere", "cohere2", "olmo", "olmoe", "stablelm", "starcoder2"), _LLAMA
    ),
    **dict.fromkeys(
        ("phi", "phimoe", "glm", "glm4", "nemotron", "ernie4_5", "helium", "seed_oss", "hunyuan_v1_dense"), _LLAMA
    ),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), _GEMMA),
    **dict.fromkeys(("olmo2", "olmo3"), _POST_NORM),
    "phi3": Row(qkv="self_attn.qkv_proj"),
    "gpt_neox": Row(qkv="attention.query_key_value", fused="heads"),
    "falcon": Row(layer="h.{i}.", qkv="self_attention.query_key_value", fused="falcon"),
    "bloom": Row(layer="h.{i}.", qkv="self_attention.query_key_value", fused="heads"),
    "gpt2": dataclasses.replace(_BLOCK, qkv="attn.c_attn", transposed=True),
    "gpt_bigcode": dataclasses.replace(_BLOCK, qkv="attn.c_attn"),
    "gptj": _BLOCK,
    "opt": Row(norm="self_attn_layer_norm"),
}
"""model_type to row. An architecture that is not here is read as llama is, if it has llama's names."""

_GGUF = Row("blk.{i}.", "attn_q", "attn_k", "attn_v", norm="attn_norm", q_norm="attn_q_norm", k_norm="attn_k_norm")
_GGUF_FUSED = dataclasses.replace(_GGUF, qkv="attn_qkv")
_PLAIN_HEADS = ("gpt2", "gpt_neox", "gptj", "opt", "bloom")
"""Architectures without grouped-query attention or a head_dim of their own, whatever config.json holds besides."""
_WINDOW_PATTERNS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "gpt_oss": 2, "cohere2": 4}
"""Every so many layers one has full attention, where the configuration names no layer types (GGUF never does)."""
_LATENT = re.compile(r"kv_a_proj|kv_b_proj|q_a_proj|linear_attn|mixer\.(in_proj|conv)|time_mix")
_ONE_PAIR = "Choose one pair of bits for all layers: `skv-export quality --configs K4V2,K4V4` compares pairs."
_WITHOUT = {"conv", "linear_attention", "mamba", "mlp", "moe"}
"""Kinds of layers that have no keys and values."""
_NOT_TEXT = re.compile(r"vision|visual|audio|speech|image|encoder\.|mtp\.|draft")


@dataclass(frozen=True)
class AttentionConfig:
    """What ``config.json`` says about attention.

    Attributes:
        model_type: The architecture.
        num_hidden_layers: Layers.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads.
        head_dim: Channels per head.
        scale: Multiplies the scores.
        softcap: ``softcap * tanh(score / softcap)`` where above 0.
        rotary_dim: Channels per head that RoPE turns; 0 = no RoPE.
        rope_theta: Base of RoPE's frequencies.
        windows: Sliding window per layer; 0 = full attention.
        max_position_embeddings: Longest context; 0 = not said.
    """

    model_type: str
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    scale: float
    softcap: float
    rotary_dim: int
    rope_theta: float
    windows: tuple[int, ...]
    max_position_embeddings: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AttentionConfig:
        """Reads a configuration; multimodal ones through their ``text_config``.

        Raises:
            SkvError: A size is missing, zero or absurd.
        """
        text = config.get("text_config")
        if isinstance(text, dict):
            config = {**text, "model_type": text.get("model_type", config.get("model_type"))}
        model_type = str(config.get("model_type") or "unknown")
        if others := sorted({*(config.get("layer_types") or config.get("layers_block_type") or ())} & _WITHOUT):
            raise SkvError(
                f"config.json: {model_type}: a hybrid model",
                got=f"layers without attention ({', '.join(others)})",
                expected="attention in every layer",
                fix=_ONE_PAIR,
            )
        if config.get("kv_lora_rank"):
            raise SkvError(
                f"config.json: {model_type}: multi-head latent attention",
                got="one latent for keys and values (kv_lora_rank)",
                expected="projections of keys and of values",
                fix="Choose one pair of bits for all layers, `skv-export model --k-bits 4 --v-bits 4`; `skv-export "
                "verify` measures what it loses.",
            )
        layers = _size(config, "num_hidden_layers", "n_layer", "num_layers")
        heads = _size(config, "num_attention_heads", "n_head")
        hidden = _size(config, "hidden_size", "n_embd", "word_embed_proj_dim")
        kv_heads = _kv_heads(config, model_type, heads)
        plain = model_type in _PLAIN_HEADS
        head_dim = (None if plain else _optional(config, "head_dim")) or hidden // heads
        if heads % kv_heads:
            raise SkvError(
                "config.json: num_key_value_heads",
                got=f"{kv_heads} for {heads} heads",
                expected=f"a divisor of {heads}",
            )
        scale = float(config.get("attention_multiplier") or (config.get("query_pre_attn_scalar") or head_dim) ** -0.5)
        rotary_dim, theta = _rope(config, model_type, head_dim)
        return cls(
            model_type=model_type,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            scale=scale,
            softcap=float(config.get("attn_logit_softcapping") or 0.0),
            rotary_dim=rotary_dim,
            rope_theta=theta,
            windows=_windows(config, layers),
            max_position_embeddings=_optional(config, "max_position_embeddings", "n_positions") or 0,
        )


def _optional(config: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = config.get(name)
        if value is not None:
            if type(value) is not int or not 0 < value < 1 << 24:
                raise SkvError(
                    f"config.json: {name}", got=repr(value), expected="a positive integer", fix="Correct config.json."
                )
            return value
    return None


def _size(config: Mapping[str, Any], *names: str) -> int:
    value = _optional(config, *names)
    if value is None:
        raise SkvError(
            f"config.json: {names[0]} is missing",
            expected="a positive integer",
            fix="Pass a language model's checkpoint.",
        )
    return value


def _kv_heads(config: Mapping[str, Any], model_type: str, heads: int) -> int:
    if model_type in _PLAIN_HEADS:
        return heads
    if model_type == "falcon" and not config.get("new_decoder_architecture"):
        return 1 if config.get("multi_query", True) else heads
    if model_type == "gpt_bigcode" and config.get("multi_query", True):
        return 1
    return _optional(config, "num_key_value_heads", "num_kv_heads", "n_head_kv") or heads


def _rope(config: Mapping[str, Any], model_type: str, head_dim: int) -> tuple[int, float]:
    if model_type in ("gpt2", "opt", "bloom", "gpt_bigcode") or (model_type == "falcon" and config.get("alibi")):
        return 0, 1.0
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)  # gemma3 has one set per layer type
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or config.get("rotary_emb_base") or 10000.0)
    fraction = (
        rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or config.get("rotary_pct") or 1.0
    )
    rotary = config.get("rotary_dim") or int(head_dim * float(fraction))
    return min(int(rotary), head_dim) // 2 * 2, theta


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    window = config.get("sliding_window") or 0
    if not window or config.get("use_sliding_window") is False:
        return (0,) * layers
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == layers:
        return tuple(int(window) if kind == "sliding_attention" else 0 for kind in kinds)
    pattern = config.get("sliding_window_pattern") or _WINDOW_PATTERNS.get(str(config.get("model_type")), 0)
    if pattern:
        return tuple(int(window) if (i + 1) % pattern else 0 for i in range(layers))
    return (int(window),) * layers


@dataclass(frozen=True)
class AttentionWeights:
    """One layer's weights, in their stored number format.

    Attributes:
        index: The layer.
        q: ``[N * head_dim, hidden]``.
        k: ``[N_kv * head_dim, hidden]``.
        v: The same.
        q_bias: ``[N * head_dim]`` or None.
        k_bias: ``[N_kv * head_dim]`` or None.
        v_bias: The same.
        norm: Weight of the norm before the projections, ``[hidden]``; None where there is none.
        norm_bias: Its bias.
        q_norm: Weight of the norm on queries: ``[head_dim]``, or ``[N * head_dim]`` if it runs over all heads; or None.
        k_norm: The same for keys.
        names: The tensors that were read.
    """

    index: int
    q: Array
    k: Array
    v: Array
    q_bias: Float | None
    k_bias: Float | None
    v_bias: Float | None
    norm: Float | None
    norm_bias: Float | None
    q_norm: Float | None
    k_norm: Float | None
    names: tuple[str, ...]


class AttentionReader:
    """Cuts the attention weights of each layer out of a checkpoint.

    Raises:
        SkvError: The architecture keeps its keys and values in no form known here; the message lists the names found.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        refuse_shared(checkpoint.config, f"{checkpoint.source}: bits", _ONE_PAIR)
        self.config = AttentionConfig.from_config(checkpoint.config)
        self._row, self._prefix = self._locate()

    def _locate(self) -> tuple[Row, str]:
        rows = [ROWS.get(self.config.model_type, _LLAMA)]
        if self.checkpoint.source.kind == "gguf":
            rows = [_GGUF, _GGUF_FUSED]
        for row in rows:
            tail = row.layer.format(i=0) + row.key + ".weight"
            prefixes = [
                n[: -len(tail)] for n in self.checkpoint.names() if n.endswith(tail) and not _NOT_TEXT.search(n)
            ]
            prefixes = [p for p in prefixes if not p or p.endswith(".")]
            if len(prefixes) == 1:
                return row, prefixes[0]
        raise self._unknown(rows[0])

    def _unknown(self, row: Row) -> SkvError:
        names = self.checkpoint.names()
        found = sorted({re.sub(r"\d+", "N", n) for n in names if re.search(r"att|k_proj|key|qkv|mixer", n)})[:12]
        latent = next((n for n in names if _LATENT.search(n)), None)
        reason = (
            f"; {latent} belongs to latent or linear attention, which has no keys and values per head" if latent else ""
        )
        return SkvError(
            f"{self.checkpoint.source}: architecture {self.config.model_type!r} is not known{reason}",
            got=", ".join(found) or ", ".join(names[:12]) or "no tensors",
            expected=f"{row.layer.format(i=0)}{row.key}.weight",
            fix="Add a row to skv_export/checkpoints/attention_weights.py.",
        )

    def layer_names(self, index: int) -> tuple[str, ...]:
        """Returns the names of the tensors that ``layer(index)`` reads.

        Raises:
            SkvError: A projection is missing.
        """
        row, base = self._row, self._prefix + self._row.layer.format(i=index)
        projections = [row.qkv] if row.qkv else [row.q, row.k, row.v]
        for projection in projections:
            if f"{base}{projection}.weight" not in self.checkpoint.entries:
                raise SkvError(
                    f"{self.checkpoint.source}: layer {index} has no {base}{projection}.weight",
                    expected=f"{self.config.num_hidden_layers} layers alike",
                    fix="Hybrid models are not supported; otherwise download the checkpoint again.",
                )
        parts = [*projections, *(n for n in (row.norm, row.q_norm, row.k_norm) if n)]
        suffixes = (".weight", ".bias", ".weight_scale_inv", ".weight_scale")
        return tuple(base + p + s for p in parts for s in suffixes if base + p + s in self.checkpoint.entries)

    def nbytes(self) -> int:
        """Returns the bytes of all tensors that all layers read."""
        return sum(self.checkpoint.nbytes(n) for i in range(self.config.num_hidden_layers) for n in self.layer_names(i))

    def layer(self, index: int) -> AttentionWeights:
        """Reads one layer.

        Raises:
            SkvError: A missing tensor, a shape that contradicts config.json, or weights packed by another quantizer.
        """
        names = self.layer_names(index)
        base = self._prefix + self._row.layer.format(i=index)
        row = self._row
        (q, k, v), (q_bias, k_bias, v_bias) = self._fused(base) if row.qkv else self._separate(base)
        gguf = ARCHITECTURES.get(self.checkpoint.gguf_architecture)
        if gguf is not None and gguf.rows == "adjacent":
            q, k = self._halves(q), self._halves(k)
        return AttentionWeights(
            index=index,
            q=q,
            k=k,
            v=v,
            q_bias=q_bias,
            k_bias=k_bias,
            v_bias=v_bias,
            norm=self._norm(base, row.norm, ".weight"),
            norm_bias=self._norm(base, row.norm, ".bias"),
            q_norm=self._norm(base, row.q_norm, ".weight"),
            k_norm=self._norm(base, row.k_norm, ".weight"),
            names=names,
        )

    def _separate(self, base: str) -> tuple[list[Array], list[Float | None]]:
        c = self.config
        sizes = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
        parts = (self._row.q, self._row.k, self._row.v)
        weights = [self._matrix(base + p, heads * c.head_dim) for p, heads in zip(parts, sizes, strict=True)]
        return weights, [self._vector(f"{base}{p}.bias") for p in parts]

    def _fused(self, base: str) -> tuple[list[Array], list[Float | None]]:
        c = self.config
        name = base + self._row.qkv
        matrix = self._matrix(name, (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim)
        bias = self._vector(f"{name}.bias")
        biases: list[Float | None] = [None] * 3 if bias is None else [*self._split(bias)]
        return self._split(matrix), biases

    def _split(self, fused: Array) -> list[Array]:
        """Cuts rows ``[(N + 2 * N_kv) * D, ...]`` into queries, keys and values."""
        n, n_kv, d = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        kind = self._row.fused
        if kind == "falcon":  # falcon-7b is one group, falcon-rw has heads, falcon-40b has groups
            kind = "groups"
        if kind == "concat":
            return np.split(fused, [n * d, (n + n_kv) * d])
        group = 1 if kind == "heads" else n // n_kv
        grouped = fused.reshape(n_kv, group + 2, d, *fused.shape[1:])
        parts = (grouped[:, :group], grouped[:, group], grouped[:, group + 1])
        return [p.reshape(-1, *fused.shape[1:]) for p in parts]

    def _halves(self, matrix: Array) -> Array:
        """Undoes llama.cpp's reordering: neighbours become halves."""
        d = self.config.head_dim
        return matrix.reshape(-1, d // 2, 2, matrix.shape[-1]).swapaxes(1, 2).reshape(matrix.shape)

    def _matrix(self, name: str, rows: int) -> Array:
        tensor = self.checkpoint.tensor(f"{name}.weight")
        matrix = tensor.T if self._row.transposed else tensor
        if matrix.ndim != 2 or matrix.shape[0] != rows:
            c = self.config
            raise SkvError(
                f"{name}.weight: shape",
                got=tensor.shape,
                expected=f"{rows} rows: {c.num_attention_heads} + 2 * {c.num_key_value_heads} heads of {c.head_dim}",
                fix="config.json and the weights disagree, or the weights are packed by another quantizer.",
            )
        if matrix.dtype.kind in "iub":
            raise SkvError(
                f"{name}.weight: packed integers",
                got=matrix.dtype,
                expected="float weights",
                fix="Pass the checkpoint before quantization.",
            )
        if matrix.dtype.itemsize == 1:
            return self._scaled(name, matrix)
        return matrix

    def _scaled(self, name: str, matrix: Array) -> Float:
        """fp8 weights times their scales: one, one per row, or one per block."""
        weight = matrix.astype(np.float32)
        for suffix in (".weight_scale_inv", ".weight_scale"):
            if name + suffix in self.checkpoint.entries:
                scale = self.checkpoint.tensor(name + suffix).astype(np.float32)
                scale = scale.reshape(scale.shape[0], -1) if scale.size > 1 else scale.reshape(1, 1)
                for axis, size in enumerate(scale.shape):
                    block = -(-weight.shape[axis] // size)
                    scale = np.repeat(scale, block, axis)
                scale = scale[: weight.shape[0], : weight.shape[1]]
                return weight * scale
        return weight

    def _vector(self, name: str) -> Float | None:
        if name not in self.checkpoint.entries:
            return None
        return np.asarray(self.checkpoint.tensor(name), np.float32)

    def _norm(self, base: str, part: str, suffix: str) -> Float | None:
        vector = self._vector(base + part + suffix) if part else None
        offset = self._row.norm_offset
        return vector + np.float32(offset) if vector is not None and offset and suffix == ".weight" else vector
