"""Weights in 4 and 8 bits: codes as ONNX Runtime reads them, and exports against PyTorch with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper

from skv_export.checkpoints.checkpoint import Source
from skv_export.checkpoints.model_config import load_config
from skv_export.checkpoints.pretrained import Placement, load_model
from skv_export.errors import SkvError
from skv_export.export import pipeline, weight_quantization
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.spec.recipe import Recipe
from skv_export.verification import graph_level, graph_variants
from skv_export.verification.run import load_original

EXACT = Recipe().with_options(k_bits=16, v_bits=16, recent_type="float")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [64, 80])
def test_codes_are_what_matmulnbits_reads(bits: int, inputs: int) -> None:
    rng = np.random.default_rng(bits)
    weight = rng.normal(size=(24, inputs)).astype(np.float32)
    x = rng.normal(size=(3, inputs)).astype(np.float32)
    codes, scales, zeros = weight_quantization.quantize(weight, bits)
    parts = {"codes": codes, "scales": scales, "zeros": zeros}
    node = helper.make_node(
        "MatMulNBits", ["x", *parts], ["y"], domain="com.microsoft",
        K=inputs, N=24, bits=bits, block_size=weight_quantization.BLOCK,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (3, 24))],
        [onnx.numpy_helper.from_array(array, name) for name, array in parts.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    (got,) = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    rounded = weight_quantization.dequantize(codes, scales, zeros, bits, inputs)
    np.testing.assert_allclose(got, x @ rounded.T, atol=1e-4)
    step = (weight.max() - weight.min()) / (2**bits - 1)
    assert 0 < np.abs(rounded - weight).max() <= step


@pytest.mark.parametrize(
    ("arch", "weights", "options"),
    [
        ("llama", "int4", {}),
        ("llama", "int8", {"quantize_embeddings": True}),
        ("qwen2", "int4", {"quantize_head": False, "quantize_embeddings": True}),
        ("gpt2", "int8", {}),
        ("gpt_oss", "int4", {"dtype": "fp32"}),
    ],
)
def test_export_computes_with_the_rounded_weights(
    arch: str,
    weights: str,
    options: dict[str, object],
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    library: Path,
) -> None:
    checkpoint = Source("safetensors", tiny_checkpoint(arch))
    recipe = EXACT.with_options(weights=weights, **options)
    out = pipeline.export_model(checkpoint, out=tmp_path / "out", recipe=recipe, progress=lambda *_: None)
    written = onnx.load(out / "model.onnx", load_external_data=False).graph.initializer
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in written]
    stored = {place["offset"]: int(place["length"]) for place in places if place}  # a tied one's codes: once
    assert pipeline.plan(checkpoint, recipe).weight_bytes == pytest.approx(
        sum(stored.values()) + sum(len(tensor.raw_data) for tensor in written), rel=0.02
    )
    config = ModelConfig.load(out)
    assert config.weights == weights and Recipe.load(out / "recipe.toml") == recipe
    model = load_model(checkpoint, load_config(checkpoint))
    ids = torch.randint(3, 320, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        original = model(ids).logits[0, -1].numpy()
        with weight_quantization.rounded(model, graph_variants.quantized_weights(out), config):
            expected = model(ids).logits[0, -1].numpy()
        restored = model(ids).logits[0, -1].numpy()
    session = graph_variants.exact_products(out)
    got = session.run(ids.numpy(), None, None, session.cache(1, 20))[0, 0]
    np.testing.assert_allclose(got, expected, atol=2e-3, rtol=0)
    assert np.abs(expected - original).max() > 10 * np.abs(got - expected).max()
    np.testing.assert_array_equal(restored, original)
    session = graph_variants.plain(out)  # activations in 8 bits, as it is deployed
    close = session.run(ids.numpy(), None, None, session.cache(1, 20))[0, 0]
    assert np.corrcoef(close, expected)[0, 1] > 0.98


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_verify_rounds_as_a_graph_in_16_bits_is_rounded(
    weights: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path, library: Path
) -> None:
    """Codes of the checkpoint's own numbers, and scales in the graph's number format: bit for bit."""
    source = Source("safetensors", tiny_checkpoint("llama"))
    recipe = Recipe().with_options(weights=weights, dtype="fp16", tile_tokens=32, recent_tokens=16, num_sink_tokens=2)
    out = pipeline.export_model(source, out=tmp_path / "out", recipe=recipe, progress=lambda *_: None)
    config, bits, name = ModelConfig.load(out), int(weights[3:]), "model.layers.1.mlp.gate_proj.weight"
    graph = onnx.load(out / "model.onnx").graph
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    node = next(n for n in graph.node if n.op_type == "MatMulNBits" and n.input[1].startswith(name))
    codes, scales, zeros = (held[x] for x in node.input[1:4])
    assert scales.dtype == np.float16
    stored = weight_quantization.dequantize(codes, scales.astype(np.float32), zeros, bits, 64)
    model = load_original(source, config, Placement())
    with weight_quantization.rounded(model, graph_variants.quantized_weights(out), config):
        np.testing.assert_array_equal(model.get_parameter(name).numpy(), stored)
        norm = model.get_parameter("model.norm.weight")
        assert torch.equal(norm, norm.half().float())
        count = sum(graph_level.step_counts(config))
        ids = torch.randint(3, 320, (count,), generator=torch.Generator().manual_seed(2)).tolist()
        assert not graph_level.check(model, out, ids).failures


def test_what_is_quantized(tiny_checkpoint: Callable[..., Path], tmp_path: Path, library: Path) -> None:
    out = pipeline.export_model(
        tiny_checkpoint("gpt_oss"), out=tmp_path / "out", recipe=EXACT.with_options(weights="int4"),
        progress=lambda *_: None,
    )  # fmt: skip
    names = set(graph_variants.quantized_weights(out))
    projections = {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (0, 1) for p in "qkvo"}
    experts = {f"model.layers.{i}.mlp.experts.{p}_proj" for i in (0, 1) for p in ("gate_up", "down")}
    assert names == projections | experts | {"lm_head.weight"}  # no router, no embedding
    kept = {t.name for t in onnx.load(out / "model.onnx", load_external_data=False).graph.initializer}
    assert "model.layers.0.mlp.router.weight" in kept
    assert not names & kept


def test_weights_and_dtype_agree_or_are_refused() -> None:
    assert Recipe().with_options(weights="fp16").dtype == "fp16"
    assert Recipe().with_options(weights="fp16").with_options(dtype="bf16").weights == "bf16"
    half = Recipe.from_dict({"weights": "int4", "dtype": "fp16", "quantize_head": False})
    assert (half.weight_bits, half.dtype, half.quantize_head) == (4, "fp16", False)
    with pytest.raises(SkvError, match="weights fp16 with dtype fp32"):
        Recipe().with_options(weights="fp16", dtype="fp32")
    with pytest.raises(SkvError, match=r"weights.*int3"):
        Recipe().with_options(weights="int3")
    with pytest.raises(SkvError, match="quantize_head"):
        Recipe.from_dict({"quantize_head": 1})
