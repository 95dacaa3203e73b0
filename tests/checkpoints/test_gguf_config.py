"""GGUF files of every architecture: what PyTorch computes is the model that was written; nothing is ignored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import MODEL_TYPES, write_gguf
from tiny_models import TINY, randomize, tiny_config
from transformers import AutoModelForCausalLM, PreTrainedModel

from skv_export.checkpoints.checkpoint import Checkpoint, resolve
from skv_export.checkpoints.gguf_weights import load_gguf_model
from skv_export.checkpoints.model_config import load_config
from skv_export.errors import SkvError


def tiny(arch: str, **overrides: Any) -> PreTrainedModel:
    """The tiny model of one of llama.cpp's architectures."""
    model_type = MODEL_TYPES.get(arch, arch)
    torch.manual_seed(7)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides))
    randomize(model)
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel, length: int = 90) -> torch.Tensor:
    ids = torch.randint(3, 320, (1, length), generator=torch.Generator().manual_seed(0))
    return model(ids).logits[0]


def opened(path: Path) -> PreTrainedModel:
    source = resolve(path)
    return load_gguf_model(source, load_config(source), torch.float32).eval()


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
NO_ROPE = {"rope.freq_base": None, "rope.dimension_count": None}
EXPERT_KEYS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}
GRANITE = {"logit_scale": 2.5, "residual_scale": 0.4, "embedding_scale": 3.0, "attention.scale": 0.11}
BASE = {"rope_type": "default", "rope_theta": 3e5}
GEMMA3 = [*["sliding_attention"] * 5, "full_attention", "sliding_attention"]
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "llama, eps and base": ("llama", {"rms_norm_eps": 0.03, "rope_parameters": BASE}, {}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {}, {}),
    "qwen3moe": ("qwen3moe", EXPERTS | {"norm_topk_prob": True}, EXPERT_KEYS),
    "qwen2moe": (
        "qwen2moe",
        EXPERTS | {"shared_expert_intermediate_size": 48},
        EXPERT_KEYS | {"expert_shared_feed_forward_length": 48},
    ),
    "gemma": ("gemma", {"hidden_act": "gelu_pytorch_tanh"}, {}),
    "gemma2": (
        "gemma2",
        {"query_pre_attn_scalar": 32},
        {"attention.sliding_window": 24, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0},
    ),
    "gemma3": (
        "gemma3",
        {"num_hidden_layers": 7, "layer_types": GEMMA3, "query_pre_attn_scalar": 64, "rope_parameters": GEMMA3_ROPE},
        {"attention.sliding_window": 24, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
    ),
    "phi3": ("phi3", {}, {"attention.sliding_window": 24}),
    "phi3, a part of the head": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"attention.sliding_window": 24, "rope.dimension_count": 8},
    ),
    "granite": ("granite", {}, GRANITE),
    "olmo2": ("olmo2", {}, {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}, {}),
    "starcoder2": ("starcoder2", {"use_bias": True, "sliding_window": None}, {}),
    "gpt2": ("gpt2", {"scale_attn_by_inverse_layer_idx": False}, NO_ROPE),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _more_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    for arch in ("gemma", "qwen2_moe", "qwen3_moe", "starcoder2"):
        monkeypatch.setitem(TINY, arch, {"tie_word_embeddings": arch == "gemma"})


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_a_file_holds_the_model_that_was_written(case: str, tmp_path: Path) -> None:
    arch, overrides, keys = ARCHITECTURES[case]
    model = tiny(arch, **overrides)
    got = opened(write_gguf(tmp_path / "model.gguf", arch, model, keys))
    assert got.config.model_type == model.config.model_type
    torch.testing.assert_close(logits(got), logits(model), atol=2e-4, rtol=0)


def llama3_factors(theta: float, head_dim: int, factor: float, original: int = 8192) -> np.ndarray:
    """The tensor that llama.cpp's converter writes for Llama 3.1 and later, in its own words."""
    values = []
    for i in range(0, head_dim, 2):
        wave = 2 * np.pi * theta ** (i / head_dim)
        smooth = (original / wave - 1.0) / 3.0
        middle = 1 / ((1 - smooth) / factor + smooth)
        values.append(1.0 if wave < original / 4 else factor if wave > original else middle)
    return np.array(values, np.float32)


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 128,
    "rope.scaling.finetuned": True,
}
FREE = np.linspace(1.0, 6.0, 40).astype(np.float32)
SHORT, LONG = np.linspace(1.0, 2.0, 8).astype(np.float32), np.linspace(3.0, 9.0, 8).astype(np.float32)
ROPES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, np.ndarray]]] = {
    "llama3": ("llama", LLAMA3, {}, {"rope_freqs.weight": llama3_factors(5e5, 80, 8.0)}),
    "linear": (
        "llama",
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {},
    ),
    "linear, by an old key": (
        "llama", {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, {"rope.scale_linear": 4.0}, {},
    ),
    "yarn": ("llama", YARN, YARN_KEYS, {}),
    "yarn of qwen3": ("qwen3", YARN, YARN_KEYS, {}),
    "yarn, its magnitude": (
        "llama",
        YARN | {"attention_factor": 0.8 * (0.1 * np.log(4.0) + 1.0)},
        YARN_KEYS | {"rope.scaling.attn_factor": 0.8},
        {},
    ),
    "no scaling, though there is a factor": (
        "llama",
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
        {},
    ),
    "other factors": (
        "llama",
        {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": FREE.tolist(), "long_factor": FREE.tolist(),
            "original_max_position_embeddings": 512, "attention_factor": 1.0,
        },
        {},
        {"rope_freqs.weight": FREE},
    ),
    "longrope": (
        "phi3",
        {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": SHORT.tolist(), "long_factor": LONG.tolist(),
            "original_max_position_embeddings": 128, "attention_factor": 1.25,
        },
        {
            "rope.scaling.type": "longrope", "rope.scaling.attn_factor": 1.25, "attention.sliding_window": 24,
            "rope.scaling.original_context_length": 128,
        },
        {"rope_factors_short.weight": SHORT, "rope_factors_long.weight": LONG},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ROPES)
def test_rope_is_taken_over(case: str, tmp_path: Path) -> None:
    arch, rope, keys, tensors = ROPES[case]
    extra = {"original_max_position_embeddings": 128} if case == "longrope" else {}
    model = tiny(arch, rope_parameters=dict(rope), **extra)
    got = opened(write_gguf(tmp_path / "model.gguf", arch, model, keys, tensors))
    assert got.config.rope_parameters["rope_type"] == rope["rope_type"]
    torch.testing.assert_close(logits(got), logits(model), atol=2e-4, rtol=0)
    plain = tiny(arch, rope_parameters={"rope_type": "default", "rope_theta": rope["rope_theta"]})
    if rope["rope_type"] != "default":
        assert (logits(got) - logits(plain)).abs().max() > 0.05  # the test would see it ignored


REFUSED: dict[str, tuple[str, Mapping[str, Any], Mapping[str, np.ndarray], str]] = {
    "a key nobody knows": ("llama", {"attention.new_idea": 3}, {}, r"llama\.attention\.new_idea = 3"),
    "a scale": ("llama", {"logit_scale": 2.0}, {}, r"llama\.logit_scale = 2\.0"),
    "a softcap": ("llama", {"attn_logit_softcapping": 30.0}, {}, "attn_logit_softcapping"),
    "experts": ("llama", {"expert_count": 8, "expert_used_count": 2}, {}, "expert_count = 8"),
    "heads that differ": ("llama", {"attention.head_count_kv": [2, 1]}, {}, "head_count_kv: layers differ"),
    "values of another size": ("llama", {"attention.value_length": 64}, {}, "value_length"),
    "an unknown scaling": ("llama", {"rope.scaling.type": "magic", "rope.scaling.factor": 2.0}, {}, "type 'magic'"),
    "YaRN in part": ("llama", YARN_KEYS | {"rope.scaling.yarn_ext_factor": 0.5}, {}, "yarn_ext_factor"),
    "YaRN of another kind": ("llama", YARN_KEYS | {"rope.scaling.yarn_log_multiplier": 0.1}, {}, "yarn_log_multiplier"),
    "two scalings": ("llama", YARN_KEYS, {"rope_freqs.weight": FREE}, "two scalings"),
    "factors of another length": ("llama", {}, {"rope_freqs.weight": FREE[:7]}, "rope_freqs"),
    "one of two tables": ("phi3", {}, {"rope_factors_long.weight": LONG}, "longrope"),
    "a part of the head": ("qwen3", {"rope.dimension_count": 32}, {}, "rope.dimension_count.*got 32"),
    "a part of a llama's head": ("llama", {"rope.dimension_count": 40}, {}, "rope.dimension_count.*got 40"),
    "YaRN's constants": ("llama", YARN_KEYS | {"rope.scaling.yarn_beta_slow": 2.0}, {}, "yarn_beta_slow"),
    "no numbers": ("llama", {"rope.dimension_count": 0}, {}, "rope.dimension_count"),
    "a tensor nobody knows": ("llama", {}, {"blk.0.attn_extra.weight": FREE}, r"blk\.0\.attn_extra\.weight"),
    "a bias without a place": ("qwen2", {}, {"blk.0.attn_output.bias": FREE}, r"blk\.0\.attn_output\.bias"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_named(case: str, tmp_path: Path) -> None:
    arch, keys, tensors, said = REFUSED[case]
    file = write_gguf(tmp_path / "model.gguf", arch, tiny(arch), keys, tensors)
    with pytest.raises(SkvError, match=rf"model\.gguf: .*{said}"):
        opened(file)


def test_architectures_that_are_not_known_are_refused_by_name(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SkvError, match=r"GGUF architecture; got 'mamba'; expected one of llama, qwen2"):
        _ = Checkpoint.open(tmp_path / "model.gguf").config
