"""Quantized checkpoints exported as they are: the graph's logits are those of PyTorch with the same weights."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
import torch
from gguf_files import MODEL_TYPES, write_gguf
from llama_cpp_logits import llama_cpp
from tiny_models import TINY, randomize, tiny_config
from transformers import AutoModelForCausalLM

from skv_export.checkpoints.checkpoint import resolve
from skv_export.checkpoints.gguf_blocks import FORMATS
from skv_export.checkpoints.gguf_weights import load_gguf_model
from skv_export.checkpoints.model_config import load_config
from skv_export.errors import SkvError
from skv_export.export import lazy_weights, pipeline
from skv_export.export.supported import prepare_model
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.spec.recipe import Recipe
from skv_export.verification import graph_variants

EXACT = Recipe().with_options(k_bits=16, v_bits=16, recent_type="float")
IDS = torch.randint(3, 320, (1, 20), generator=torch.Generator().manual_seed(1))
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
"""Sizes whose rows hold blocks of 256."""


def written(
    path: Path, arch: str, quantize: Callable[[str], str | None], keys: dict[str, Any] | None = None, **config: Any
) -> Path:
    """A GGUF file of a tiny model."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(tiny_config(MODEL_TYPES.get(arch, arch), **config))
    randomize(model)
    return write_gguf(path, arch, model, keys, quantize=quantize)


def export(checkpoint: Path, out: Path, **options: Any) -> Path:
    return pipeline.export_model(
        checkpoint, out=out, recipe=EXACT.with_options(**options), progress=lambda phase, fraction: None
    )


@torch.no_grad()
def torch_logits(checkpoint: Path) -> np.ndarray:
    """Logits of the last token with the weights that the package gguf decodes."""
    source = resolve(checkpoint)
    model = load_gguf_model(source, load_config(source), torch.float32).eval()
    prepare_model(model)
    return model(IDS).logits[0, -1].numpy()


def assert_same_logits(checkpoint: Path, out: Path, atol: float = 1e-3) -> None:
    """Compares the graph, its activations not rounded, with PyTorch."""
    session = graph_variants.exact_products(out)
    got = session.run(IDS.numpy(), None, None, session.cache(1, IDS.shape[1]))[0, 0]
    expected = torch_logits(checkpoint)
    np.testing.assert_allclose(got, expected, atol=atol, rtol=0)
    session = graph_variants.plain(out)  # activations in 8 bits, as it is deployed
    close = session.run(IDS.numpy(), None, None, session.cache(1, IDS.shape[1]))[0, 0]
    assert np.corrcoef(close, expected)[0, 1] > 0.98


def products(out: Path) -> Counter[tuple[str, int, int]]:
    """How often each operator on quantized weights occurs, with its bits and block size."""
    found: Counter[tuple[str, int, int]] = Counter()
    for node in onnx.load(out / "model.onnx", load_external_data=False).graph.node:
        values = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            found[node.op_type, values["bits"], values["block_size"]] += 1
    return found


def spread(name: str) -> str | None:
    """Gives each matrix of a model of two layers a format of its own, as far as there are formats."""
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    if name.startswith("token_embd"):
        return "Q8_0"
    block, matrix = name.split(".")[1:3]
    return [*FORMATS, "Q4_1"][7 * int(block) + matrices.index(matrix)]


@pytest.mark.parametrize("level", [0, 4])
def test_every_format_keeps_its_codes(level: int, tmp_path: Path, library: Path) -> None:
    checkpoint = written(tmp_path / "model.gguf", "llama", spread, **WIDE)
    out = export(checkpoint, tmp_path / "out", accuracy_level=level)
    assert_same_logits(checkpoint, out)
    expected: Counter[tuple[str, int, int]] = Counter()
    for form in (*FORMATS.values(), FORMATS["Q4_1"], FORMATS["Q8_0"]):
        stored = form.stored(exact=level == 0)
        expected["MatMulNBits", 4 if stored.planes else form.bits, form.block_size] += 1 + stored.planes
    assert products(out) - Counter({("GatherBlockQuantized", 8, 32): 1, ("GatherBlockQuantized", 4, 32): 2}) == expected
    recipe = EXACT.with_options(accuracy_level=level)
    planned = pipeline.plan(checkpoint, recipe)
    size = (out / "model.onnx.data").stat().st_size
    assert planned.weight_bytes == pytest.approx(size, rel=0.03)  # the tied embedding stands in the file once
    assert all(kind in planned.table() for kind in FORMATS) and ModelConfig.load(out).weights == "as-is"
    assert Recipe.load(out / "recipe.toml") == planned.recipe == recipe.with_options(weights="as-is")


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
EXPERT_KEYS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}
SCALES_OF_GRANITE = {
    "logit_scale": 2.5, "residual_scale": 0.4, "embedding_scale": 3.0, "attention.scale": 0.11,
}  # fmt: skip
ARCHITECTURES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "granite": (SCALES_OF_GRANITE, {}, 15),  # rows of q and k are reordered
    "qwen2": ({}, {}, 15),  # biases
    "phi3": ({"attention.sliding_window": 24}, {}, 9),  # fused projections
    "gemma3": ({"attention.sliding_window": 24}, {"num_hidden_layers": 2, "layer_types": None}, 15),  # tied
    "gpt2": ({"rope.freq_base": None, "rope.dimension_count": None}, {"scale_attn_by_inverse_layer_idx": False}, 9),
    "qwen3moe": (EXPERT_KEYS, EXPERTS, 9),  # experts are gathered, and stay float32
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_is_computed_with_the_files_weights(
    arch: str, tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TINY, "qwen3_moe", {})
    keys, config, count = ARCHITECTURES[arch]
    checkpoint = written(tmp_path / "model.gguf", arch, lambda name: "Q4_1", keys, **config)
    out = export(checkpoint, tmp_path / "out")
    assert products(out)["MatMulNBits", 4, 32] == count
    assert_same_logits(checkpoint, out)


def mixed(name: str) -> str | None:
    """What llama.cpp's mixtures do: some layers' matrices are in another format, small ones not quantized at all."""
    if name.endswith("attn_k.weight"):
        return None
    if name.endswith("attn_v.weight"):
        return "F16"
    if "ffn_down" in name and name.split(".")[1] in "12":
        return "Q8_0"
    return "Q5_0" if "token_embd" in name else "Q4_0"


def test_layers_of_different_formats_stay_different(tmp_path: Path, library: Path) -> None:
    checkpoint = written(tmp_path / "model.gguf", "llama", mixed, num_hidden_layers=6)
    out = export(checkpoint, tmp_path / "out")
    assert products(out) == {
        ("MatMulNBits", 4, 32): (6 * 5 - 2) + 2 * (2 + 1),
        ("GatherBlockQuantized", 4, 32): 2,
    }
    assert_same_logits(checkpoint, out)
    assert "28 Q4_0 (5 bits), 2 Q8_0 (10 bits), 1 Q5_0 (9 bits); the rest in fp32" in pipeline.plan(checkpoint).table()


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_other_weights_are_made_of_the_dequantized_ones(weights: str, tmp_path: Path, library: Path) -> None:
    checkpoint = written(tmp_path / "model.gguf", "llama", lambda name: "Q4_1")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        out = export(checkpoint, tmp_path / "out", weights=weights)
    again = [str(w.message) for w in said if "rounded a second time" in str(w.message)]
    assert len(again) == (weights == "int8") and all("15 of its matrices" in text for text in again)
    assert bool(products(out)) == (weights == "int8") and not any(bits == 4 for _, bits, _ in products(out))
    assert ModelConfig.load(out).weights == ("int8" if weights == "int8" else "")
    assert Recipe.load(out / "recipe.toml").weights == weights
    if weights == "fp32":
        assert_same_logits(checkpoint, out)


def test_half_precision_keeps_the_codes_too(tmp_path: Path, library: Path) -> None:
    checkpoint = written(tmp_path / "model.gguf", "llama", lambda name: "Q4_1")
    out = export(checkpoint, tmp_path / "out", dtype="fp16")
    assert products(out)["MatMulNBits", 4, 32] == 15
    assert_same_logits(checkpoint, out, atol=0.1)


def test_float_checkpoints_have_nothing_to_keep(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    planned = pipeline.plan(tiny_checkpoint("llama"), EXACT.with_options(weights="as-is"))
    assert planned.recipe.weights == "" and planned == pipeline.plan(tiny_checkpoint("llama"), EXACT)


def test_slabs_make_the_same_file(tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = written(tmp_path / "model.gguf", "llama", lambda name: "Q4_1")
    whole = export(checkpoint, tmp_path / "whole")
    monkeypatch.setattr(lazy_weights, "SLAB_BYTES", 1000)
    pieces = export(checkpoint, tmp_path / "pieces")
    assert (whole / "model.onnx.data").read_bytes() == (pieces / "model.onnx.data").read_bytes()


def test_llama_cpp_agrees(tmp_path: Path, library: Path) -> None:
    """It rounds activations to 8 bits, as the deployed graph does; each in its own blocks."""
    checkpoint = written(tmp_path / "model.gguf", "llama", lambda name: "Q4_1")
    expected = np.array(llama_cpp(checkpoint, ids=IDS[0].tolist())["logits"], np.float32)[-1]
    out = export(checkpoint, tmp_path / "out")
    for session in (graph_variants.plain(out), graph_variants.exact_products(out)):
        got = session.run(IDS.numpy(), None, None, session.cache(1, IDS.shape[1]))[0, 0]
        assert np.corrcoef(got, expected)[0, 1] > 0.995


def test_damaged_scales_leave_nothing_behind(tmp_path: Path, library: Path) -> None:
    checkpoint = written(tmp_path / "model.gguf", "llama", lambda name: "Q8_0")
    (entry,) = [t for t in gguf.GGUFReader(checkpoint).tensors if t.name == "blk.1.ffn_up.weight"]
    data = bytearray(checkpoint.read_bytes())
    data[entry.data_offset : entry.data_offset + 2] = np.array([np.inf], np.float16).tobytes()
    checkpoint.write_bytes(data)
    for weights in ("as-is", "fp32"):
        with pytest.raises(SkvError, match=r"blk.1.ffn_up.weight.*infinite or not a number"):
            export(checkpoint, tmp_path / "out", weights=weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf"]
