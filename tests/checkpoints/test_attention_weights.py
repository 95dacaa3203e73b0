"""Architectures: weights cut out of a checkpoint are those that attention computes with; odd ones are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import CONFIG, entry, llama_tensors, write
from safetensors.numpy import save_file

from skv_export.checkpoints.attention_weights import AttentionConfig, AttentionReader
from skv_export.checkpoints.checkpoint import Checkpoint
from skv_export.errors import SkvError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(llama_tensors(), tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    "arch",
    [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3_text",
        "phi3",
        "granite",
        "olmo2",
        "smollm3",
        "gpt_oss",
        "gpt2",
        "gpt_neox",
    ],
)
def test_weights_give_what_attention_gets(arch: str, tiny_checkpoint: Callable[..., Path]) -> None:
    """The rows cut out reproduce the queries, keys and values that transformers computes from the same inputs."""
    check_against_transformers(tiny_checkpoint(arch))


@pytest.mark.parametrize(
    ("arch", "full"), [("gemma2", {1, 3, 5}), ("gemma3_text", {5}), ("gpt_oss", {1, 3, 5}), ("cohere2", {3})]
)
def test_windows_without_layer_types_are_those_of_transformers(arch: str, full: set[int]) -> None:
    from transformers import AutoConfig

    sizes = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AttentionConfig.from_config({"model_type": arch, **sizes, "sliding_window": 128})
    assert config.windows == tuple(0 if i in full else 128 for i in range(6))
    theirs = AutoConfig.for_model(arch, **sizes, sliding_window=128).layer_types
    assert config.windows == tuple(128 if kind == "sliding_attention" else 0 for kind in theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"new_decoder_architecture": False, "multi_query": True},
        {"new_decoder_architecture": False, "multi_query": False},
        {"new_decoder_architecture": True, "num_kv_heads": 2},
    ],
)
def test_falcon(options: dict[str, Any], tmp_path: Path) -> None:
    import torch
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bias=True, **options
    )
    model = FalconForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model.save_pretrained(tmp_path)
    reader = AttentionReader(Checkpoint.open(tmp_path))
    attention = model.transformer.h[1].self_attention
    x = torch.randn(1, 1, 64)
    q, k, v = attention._split_heads(attention.query_key_value(x))
    layer = reader.layer(1)
    for ours, bias, theirs in ((layer.q, layer.q_bias, q), (layer.k, layer.k_bias, k), (layer.v, layer.v_bias, v)):
        full = theirs[0, 0].detach().numpy()
        if options["new_decoder_architecture"] and len(full) == 4 and ours.shape[0] == 2 * 16:
            full = full[::2]  # transformers repeats keys and values for each query head
        np.testing.assert_allclose(ours @ x[0, 0].numpy() + bias, full.ravel(), atol=1e-5)


def check_against_transformers(folder: Path) -> None:
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM

    inputs: dict[int, Any] = {}
    seen: dict[int, tuple[Any, Any, Any]] = {}

    def attend(module: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> Any:
        seen[module.layer_idx] = (q[0, :, 0], k[0, :, 0], v[0, :, 0])
        return torch.zeros(1, q.shape[2], q.shape[1], v.shape[-1]), None

    AttentionInterface.register("test_spy", attend)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="test_spy").eval()
    attentions = [
        m
        for m in model.modules()
        if hasattr(m, "layer_idx")
        and any("proj" in n or "attn" in n or "query" in n for n, _ in m.named_children())
        and not hasattr(m, "mlp")
    ]
    for module in attentions:
        module.register_forward_pre_hook(
            lambda m, args, kwargs: inputs.__setitem__(
                m.layer_idx, (args[0] if args else kwargs["hidden_states"])[0, 0]
            ),
            with_kwargs=True,
        )
    with torch.no_grad():
        model(torch.tensor([[5]]), use_cache=False)
    reader = AttentionReader(Checkpoint.open(folder))
    assert sorted(seen) == list(range(reader.config.num_hidden_layers))
    for i, captured in seen.items():
        layer = reader.layer(i)
        parts = [
            (layer.q, layer.q_bias, layer.q_norm),
            (layer.k, layer.k_bias, layer.k_norm),
            (layer.v, layer.v_bias, None),
        ]
        for (weight, bias, norm), theirs in zip(parts, captured, strict=True):
            ours = weight.astype(np.float32) @ inputs[i].numpy() + (0 if bias is None else bias)
            if norm is not None:
                ours = ours.reshape(-1, norm.size)
                ours = (ours / np.sqrt((ours**2).mean(-1, keepdims=True) + 1e-6) * norm).ravel()
            # At position 0 RoPE turns nothing.
            np.testing.assert_allclose(ours, theirs.numpy().ravel(), rtol=1e-4, atol=2e-5)
        check_norm(model, reader, i)


def check_norm(model: Any, reader: AttentionReader, index: int) -> None:
    """The norm's weight is what multiplies the normalized hidden state (gemma's 1 + weight included)."""
    import torch

    layer = reader.layer(index)
    blocks = next(m for n, m in model.named_modules() if n.endswith((".layers", ".h")))
    module = getattr(blocks[index], "input_layernorm", None) or getattr(blocks[index], "ln_1", None)
    if module is None:
        assert layer.norm is None
        return
    x = torch.randn(model.config.hidden_size)
    x = (x - x.mean()) / x.std(correction=0)
    with torch.no_grad():
        expected = module(x[None])[0].numpy()
    shift = 0 if layer.norm_bias is None else layer.norm_bias
    np.testing.assert_allclose(x.numpy() * layer.norm + shift, expected, rtol=1e-3, atol=1e-3)


def test_unknown_architecture_with_known_names(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "model_type": "brand_new"}))
    assert AttentionReader(Checkpoint.open(folder)).layer(1).k.shape == (8, 8)


def test_unknown_architecture_lists_what_was_found(folder: Path) -> None:
    save_file({"blocks.0.attn.Wqkv.weight": np.ones((24, 8), np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "model_type": "brand_new"}))
    with pytest.raises(SkvError, match=r"brand_new.*not known.*blocks\.N\.attn\.Wqkv"):
        AttentionReader(Checkpoint.open(folder))


def test_latent_attention_is_refused_with_the_reason(folder: Path) -> None:
    save_file(
        {"model.layers.0.self_attn.kv_a_proj_with_mqa.weight": np.ones((24, 8), np.float32)},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps({**CONFIG, "model_type": "deepseek_v3"}))
    with pytest.raises(SkvError, match="latent"):
        AttentionReader(Checkpoint.open(folder))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 3}, "layer 2 has no"),
        ({"num_attention_heads": 4}, "shape"),
        ({"num_key_value_heads": 3}, "divisor"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"head_dim": "64"}, "positive integer"),
    ],
)
def test_configurations_that_contradict_the_weights(change: dict[str, Any], said: str, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(SkvError, match=said):
        read_all(folder)


def read_all(folder: Path) -> None:
    reader = AttentionReader(Checkpoint.open(folder))
    for i in range(reader.config.num_hidden_layers):
        reader.layer(i)


def test_fp8_weights_with_scales(folder: Path) -> None:
    tensors = llama_tensors()
    name = "model.layers.0.self_attn.k_proj.weight"
    weight = tensors[name].copy()
    scale = np.array([[0.5, 2.0], [4.0, 1.0]], np.float32)
    stored = (weight / np.repeat(np.repeat(scale, 4, 0), 4, 1)).astype(ml_dtypes.float8_e4m3fn)
    raw = {n: (t.tobytes(), "F32", t.shape) for n, t in tensors.items()}
    raw[name] = (stored.tobytes(), "F8_E4M3", stored.shape)
    raw[name + "_scale_inv"] = (scale.tobytes(), "F32", scale.shape)
    header, data = {}, b""
    for n, (blob, dtype, shape) in raw.items():
        header[n] = entry(dtype, shape, (len(data), len(data) + len(blob)))
        data += blob
    write(folder / "model.safetensors", header, data)
    read = AttentionReader(Checkpoint.open(folder)).layer(0).k
    np.testing.assert_allclose(read, weight, rtol=0.07, atol=0.02)


def test_packed_weights_are_refused(folder: Path) -> None:
    tensors = llama_tensors()
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.ones((8, 8), np.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SkvError, match="packed integers"):
        AttentionReader(Checkpoint.open(folder)).layer(0)


def test_multimodal_checkpoints_use_the_language_model(folder: Path) -> None:
    tensors = {f"model.language_model.{n.removeprefix('model.')}": t for n, t in llama_tensors().items()}
    tensors |= {n.replace("model.", "vision_tower."): t for n, t in llama_tensors().items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "some_vlm", "text_config": CONFIG}))
    assert "language_model" in AttentionReader(Checkpoint.open(folder)).layer(0).names[0]
