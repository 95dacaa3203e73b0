"""GGUF files against llama.cpp: the exported graph's logits are its logits, and the tokenizer's ids its ids.

PyTorch's model of a file is made by the same reading of the file as the export; llama.cpp's is not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import MODEL_TYPES, write_gguf
from llama_cpp_logits import environment, llama_cpp
from tiny_models import TINY, randomize, tiny_config
from transformers import AutoModelForCausalLM

from skv_export.checkpoints.checkpoint import resolve
from skv_export.checkpoints.tokenizer import load_tokenizer
from skv_export.export import pipeline
from skv_export.model_folder.tokenizer import TEXTS
from skv_export.runtime.session import Session
from skv_export.spec.recipe import Recipe

EXACT = Recipe().with_options(k_bits=16, v_bits=16, num_sink_tokens=2, recent_type="float")
IDS = torch.randint(3, 320, (1, 90), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _oracle() -> None:
    environment()


def session_logits(checkpoint: Path, out: Path, ids: torch.Tensor) -> np.ndarray:
    """Logits of every position, of the export without quantization."""
    pipeline.export_model(checkpoint, out=out, recipe=EXACT, all_logits=True, progress=lambda phase, fraction: None)
    session = Session(out)
    return session.run(ids.numpy(), None, None, session.cache(1, ids.shape[1]))[0]


@dataclasses.dataclass(frozen=True)
class Case:
    """A tiny model in a GGUF file.

    Attributes:
        arch: llama.cpp's name.
        keys: Metadata beside the usual ones.
        config: transformers' configuration; of RoPE nothing, for the file says that.
        tensors: Tensors beside the model's.
    """

    arch: str
    keys: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tensors: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


YARN = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32,
}  # fmt: skip
GRANITE = {"logit_scale": 2.5, "residual_scale": 0.4, "embedding_scale": 3.0, "attention.scale": 0.11}
CASES = {
    "llama": Case("llama"),
    "llama, factors": Case("llama", tensors={"rope_freqs.weight": np.geomspace(1.0, 8.0, 40).astype(np.float32)}),
    "llama, factors and linear": Case(
        "llama",
        {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
        tensors={"rope_freqs.weight": np.geomspace(1.0, 8.0, 40).astype(np.float32)},
    ),
    "llama, linear": Case("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "llama, linear by an old key": Case("llama", {"rope.scale_linear": 4.0}),
    "llama, no scaling": Case("llama", {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}),
    "llama, yarn": Case("llama", YARN),
    "llama, yarn of another magnitude": Case("llama", YARN | {"rope.scaling.attn_factor": 0.8}),
    "llama, biases": Case("llama", config={"attention_bias": True}),
    "qwen2, biases": Case("qwen2", config={"head_dim": 16}),
    "qwen3, yarn": Case("qwen3", YARN),
    "gemma2": Case(
        "gemma2",
        {"attention.sliding_window": 24, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0},
        {"query_pre_attn_scalar": 32},
    ),
    "gemma3": Case(
        "gemma3",
        {"attention.sliding_window": 24, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        {"num_hidden_layers": 7, "layer_types": None, "query_pre_attn_scalar": 64},
    ),
    "phi3, longrope": Case(
        "phi3",
        {
            "rope.scaling.type": "longrope", "rope.scaling.attn_factor": 1.25,
            "rope.scaling.original_context_length": 512,
        },
        {"sliding_window": None},
        {
            "rope_factors_short.weight": np.linspace(1.0, 2.0, 8).astype(np.float32),
            "rope_factors_long.weight": np.linspace(3.0, 9.0, 8).astype(np.float32),
        },
    ),
    "granite": Case("granite", GRANITE),
    "olmo2": Case("olmo2", config={"head_dim": 16}),
    "smollm3": Case("smollm3", config={"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}),
    "qwen3moe": Case(
        "qwen3moe",
        {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32},
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "tie_word_embeddings": False},
    ),
}  # fmt: skip
TOLERANCE = 5e-4
"""Of logits that reach 4 to 11; all weights and both caches are float32. Measured: 1e-5 to 1.1e-4."""
GELU_TOLERANCE = 1e-2
"""ggml takes gelu (gemma's) from a table of float16. Measured: 3e-3."""


@pytest.mark.parametrize("name", CASES)
def test_logits_are_llama_cpps(name: str, tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    monkeypatch.setitem(TINY, "qwen3_moe", {})
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(tiny_config(MODEL_TYPES.get(case.arch, case.arch), **case.config))
    randomize(model)
    file = write_gguf(tmp_path / "model.gguf", case.arch, model, case.keys, case.tensors)
    expected = np.array(llama_cpp(file, ids=IDS[0].tolist())["logits"], np.float32)
    got = session_logits(file, tmp_path / "out", IDS)
    off = float(np.abs(got - expected).max())
    tolerance = GELU_TOLERANCE if case.arch.startswith("gemma") else TOLERANCE
    assert off < tolerance, f"{off:.2g} of logits up to {np.abs(expected).max():.2g}"


@pytest.mark.slow
def test_the_demos_logits_and_ids_are_llama_cpps(demo_checkpoint: Path, tmp_path: Path, library: Path) -> None:
    """Its weights are in 4 to 6 bits, and llama.cpp rounds activations to 8 bits for those; measured: mean 0.17."""
    tokenizer = load_tokenizer(resolve(demo_checkpoint))
    ids = tokenizer(TEXTS[-1])["input_ids"][:120]
    truth = llama_cpp(demo_checkpoint, ids=ids, texts=TEXTS)
    for text, expected in zip(TEXTS, truth["ids"], strict=True):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected, text
    logits = np.array(truth["logits"], np.float32)
    got = session_logits(demo_checkpoint, tmp_path / "out", torch.tensor([ids]))
    off, agree = np.abs(got - logits), (got.argmax(-1) == logits.argmax(-1)).mean()
    assert off.mean() < 0.4 and agree > 0.9, f"mean {off.mean():.3f}, largest {off.max():.3f}, same argmax {agree:.3f}"
