"""GGUF files of tiny models, as llama.cpp's converter writes them: its names, its order of rows, its norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

ADJACENT = ("llama", "granite", "smollm3")
"""Architectures whose q and k rows the converter reorders so that RoPE's pairs are neighbours."""
MODEL_TYPES = {"gemma3": "gemma3_text", "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}


def write_gguf(
    path: Path,
    arch: str,
    model: Any,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    *,
    tokenizer: Mapping[str, Any] | None = None,
    quantize: Callable[[str], str | None] = lambda name: None,
) -> Path:
    """Writes a transformers model as a GGUF file.

    Args:
        path: The file.
        arch: llama.cpp's name of the architecture.
        model: The model.
        keys: Metadata of the architecture's beside the usual ones; None leaves out one of those.
        tensors: Tensors beside the model's.
        tokenizer: What a small tokenizer has otherwise than usual (model, pre, merges); None: the file has none.
        quantize: ggml's name of the format of a matrix, by the matrix's name in the file; None: float32.
    """
    import gguf

    config = model.config
    path.parent.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(path, arch)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    usual = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": 4 * config.hidden_size if arch == "gpt2" else config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", config.num_attention_heads),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "vocab_size": config.vocab_size,
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(rope.get("full_attention", rope).get("rope_theta", 10000.0)),
    }
    if arch in ("gpt2", "starcoder2"):
        eps = getattr(config, "layer_norm_epsilon", None) or getattr(config, "norm_epsilon", None)
        usual["attention.layer_norm_epsilon"] = float(eps)
    else:
        usual["attention.layer_norm_rms_epsilon"] = float(config.rms_norm_eps)
    for key, value in {**usual, **(keys or {})}.items():
        _add(writer, f"{arch}.{key}", value)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        _tokenizer(writer, config.vocab_size, tokenizer)
    table = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for stored, array in _converted(arch, table, config, name, tensor.float().numpy()):
            kind = quantize(stored) if array.ndim > 1 else None
            if kind is None:
                writer.add_tensor(stored, np.ascontiguousarray(array, np.float32))
            else:
                seed = sum(stored.encode())
                blocks = quantized(np.ascontiguousarray(array, np.float32), kind, np.random.default_rng(seed))
                writer.add_tensor(stored, blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, np.asarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


HALVES = {
    "Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
"""Where a block's float16 numbers are, if not in its first two bytes."""


def random_blocks(kind: str, shape: tuple[int, ...], rng: np.random.Generator, size: float = 1.0) -> np.ndarray:
    """Returns blocks of random bytes whose scales are of about ``size``, negative ones too: ``[..., row bytes]``."""
    import gguf

    elements, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // elements, nbytes), np.uint8)
    if kind == "MXFP4":
        blocks[..., 0] = np.clip(127 + np.log2(size) + rng.integers(-2, 3, blocks.shape[:-1]), 0, 254)
    else:
        for start in HALVES.get(kind, (0,)):
            scales = size * rng.uniform(0.5, 1.5, blocks.shape[:-1]) * rng.choice([-1, 1], blocks.shape[:-1])
            blocks[..., start : start + 2] = scales.astype(np.float16)[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def quantized(array: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Returns a tensor in one of ggml's formats; where the package gguf can't quantize, other weights as large."""
    from gguf import GGMLQuantizationType, quants

    try:
        return quants.quantize(array, GGMLQuantizationType[kind])
    except NotImplementedError:
        blocks = random_blocks(kind, array.shape, rng)
        size = array.std() / quants.dequantize(blocks, GGMLQuantizationType[kind]).std()
        return random_blocks(kind, array.shape, rng, float(size))


def _add(writer: Any, key: str, value: Any) -> None:
    if value is None:
        return
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    (writer.add_array if isinstance(value, list) else add[type(value)])(key, value)


def _converted(arch: str, table: Any, config: Any, name: str, array: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Returns the tensors of one parameter."""
    stem, _, suffix = name.rpartition(".")
    if name.endswith("experts.gate_up_proj"):
        block = name.split(".")[2]
        halves = np.split(array, 2, axis=1)
        return [
            (f"blk.{block}.ffn_{part}_exps.weight", half) for part, half in zip(("gate", "up"), halves, strict=True)
        ]
    if name.endswith("experts.down_proj"):
        return [(f"blk.{name.split('.')[2]}.ffn_down_exps.weight", array)]
    stored = table.get_name(stem)
    assert stored, name
    if arch in ADJACENT and name.split(".")[-2] in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    if arch.startswith("gemma") and stem.endswith("norm"):
        array = array + 1
    if arch == "gpt2" and suffix == "weight" and stem.rpartition(".")[2] in ("c_attn", "c_proj", "c_fc"):
        array = array.T
    if name.endswith("shared_expert_gate.weight"):
        array = array[0]
    return [(f"{stored}.{suffix}", array)]


def _tokenizer(writer: Any, size: int, given: Mapping[str, Any]) -> None:
    """Writes a byte-level BPE of three special tokens, the bytes and merges; of ``given``, None leaves a key out."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    usual = {"model": "gpt2", "pre": "gpt-2", "merges": ["t h", "th e", "i n", "\u0120 a", "\u0120a n", "\u0120 the"]}
    said = {**usual, **given}
    tokens = ["<unk>", "<s>", "</s>", *bytes_to_unicode().values()]
    tokens += ["".join(pair.split()) for pair in said["merges"] or ()]
    tokens += [f"<extra_{i}>" for i in range(size - len(tokens))]
    writer.add_tokenizer_model(said["model"])
    if said["pre"]:
        writer.add_tokenizer_pre(said["pre"])
    writer.add_token_list(tokens)
    writer.add_token_types([3 if len(token) > 1 and token.startswith("<") else 1 for token in tokens])
    if said["merges"]:
        writer.add_token_merges(said["merges"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
