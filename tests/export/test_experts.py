"""Mixtures of experts: ONNX Runtime's operators against transformers' own layers, in fp32 and with rounded weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tiny_models import TINY, save_random, small_config, tiny_config
from transformers import AutoModelForCausalLM

from skv_export.checkpoints.checkpoint import Source
from skv_export.checkpoints.pretrained import Placement
from skv_export.export import experts, pipeline, weight_quantization
from skv_export.export.expert_gates import gate_of
from skv_export.model_folder.names import MODEL_FILE
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.runtime.providers import load_error
from skv_export.spec.recipe import Recipe
from skv_export.verification import graph_level, graph_variants
from skv_export.verification.router_margins import RouterMargins
from skv_export.verification.run import load_original

pytestmark = pytest.mark.usefixtures("library")
EXACT = Recipe().with_options(
    k_bits=16, v_bits=16, tile_tokens=32, recent_tokens=8, num_sink_tokens=2, recent_type="float"
)
FORMS = {"fp32": ("MoE", {}), "int4": ("QMoE", {"weights": "int4"})}
QUICK = {("mixtral", "int4"), ("qwen3_moe", "fp32")}
CASES = [
    pytest.param(arch, form, marks=[] if (arch, form) in QUICK else pytest.mark.slow)
    for arch in ("mixtral", "qwen3_moe", "gpt_oss", "olmoe", "phimoe")
    for form in FORMS
]


def checkpoint_of(folder: Path, arch: str, **changes: Any) -> Path:
    """A tiny model of two layers."""
    if arch in TINY:
        return save_random(folder, tiny_config(arch, **changes))
    config = small_config(arch)
    config.num_hidden_layers = 2
    for name, value in changes.items():
        setattr(config, name, value)
    return save_random(folder, config)


def nodes_of(folder: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(folder / MODEL_FILE, load_external_data=False).graph.node)


@pytest.mark.parametrize(("arch", "form"), CASES)
def test_experts_are_transformers(arch: str, form: str, tmp_path: Path) -> None:
    """Routers of each kind: weights that sum to 1 or not, biases, gates that are clamped, transposed matrices."""
    operator, options = FORMS[form]
    checkpoint = checkpoint_of(tmp_path / "checkpoint", arch)
    recipe = EXACT.with_options(**options)
    out = pipeline.export_model(checkpoint, out=tmp_path / "out", recipe=recipe, progress=lambda *_: None)
    assert nodes_of(out)[operator] == 2
    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()
    ids = torch.randint(3, 320, (1, 60), generator=torch.Generator().manual_seed(1))
    session, names = graph_variants.exact_products(out), graph_variants.quantized_weights(out)
    assert any("experts" in name for name in names) == (form == "int4")
    with torch.no_grad(), weight_quantization.rounded(model, names, ModelConfig.load(out)):
        expected = model(ids).logits[0].numpy()
    cache = session.cache(1, 60)
    got = [session.run(ids[:, :40].numpy(), None, None, cache)[0, 0]]
    got += [session.run(ids[:, i : i + 1].numpy(), None, None, cache)[0, 0] for i in range(40, 60)]
    np.testing.assert_allclose(got, expected[39:], atol=1e-3, rtol=0)
    written = (out / "model.onnx.data").stat().st_size
    assert abs(pipeline.plan(checkpoint, recipe).weight_bytes / written - 1) < 0.1  # routers count as rounded


def test_near_ties_of_experts_are_no_fault_of_an_export(tmp_path: Path) -> None:
    """Two experts whose routers are the same: rounding chooses between them, and not alike on both sides."""
    checkpoint = checkpoint_of(tmp_path / "made", "mixtral", num_local_experts=32)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    for name, weight in model.named_parameters():
        if name.endswith("gate.weight"):
            weight.data[1] = weight.data[0]
    model.save_pretrained(tmp_path / "checkpoint")
    source, out = Source("safetensors", tmp_path / "checkpoint"), tmp_path / "out"
    recipe = Recipe().with_options(tile_tokens=32, recent_tokens=16, num_sink_tokens=2)
    config = ModelConfig.load(pipeline.export_model(source, out=out, recipe=recipe, progress=lambda *_: None))
    model, count = load_original(source, config, Placement()), sum(graph_level.step_counts(config))
    ids = torch.randint(3, 320, (count,), generator=torch.Generator().manual_seed(2)).tolist()
    found = graph_level.check(model, out, ids)
    assert found.failures == () and found.quantized is not None and found.quantized.ties
    assert any("rounding chose between two experts" in row for row in found.rows())
    model.get_parameter("model.layers.1.self_attn.o_proj.weight").data *= 1.05  # which is a fault, ties or not
    assert graph_level.check(model, out, ids).failures


def test_how_near_experts_are_is_seen_in_what_a_router_chooses() -> None:
    masked, plain = torch.tensor([[3.0, 2.0, -torch.inf]]), torch.tensor([[3.0, 2.0, 1.9], [9.0, 5.0, 1.0]])
    with RouterMargins() as margins:
        torch.topk(masked, 2)  # the third can't be chosen
        torch.topk(plain[None], 1, dim=-1)  # groups of experts
        plain.topk(k=3)  # all are
        assert margins.least == torch.inf
        torch.topk(plain, 2, dim=-1, sorted=False)
    assert margins.least == pytest.approx(0.05)


def test_other_experts_and_other_formats_are_gathered(tmp_path: Path) -> None:
    """The CPU provider's MoE is float32 alone, and a gate of another kind is no operator's."""
    checkpoint = checkpoint_of(tmp_path / "checkpoint", "mixtral", hidden_act="gelu")
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    layers = [module for module in model.modules() if type(module).__name__ == "MixtralExperts"]
    assert len(layers) == 2 and [gate_of(module) for module in layers] == [None, None]
    for dtype, weights in (("fp16", "fp16"), ("bf16", "bf16"), ("fp16", "int8")):
        with experts.as_operators(model, Recipe().with_options(dtype=dtype, weights=weights)):
            assert model.config._experts_implementation != experts.IMPLEMENTATION
    with experts.as_operators(model, Recipe()):
        assert model.config._experts_implementation == experts.IMPLEMENTATION
        ids = torch.arange(3, 20)[None]
        with torch.no_grad():
            gathered = model(ids).logits
    model.set_experts_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(gathered, model(ids).logits, atol=1e-4, rtol=0)


def test_an_older_onnxruntime_is_told_what_it_lacks() -> None:
    said = load_error(Path("some/model.onnx"), RuntimeError("Unrecognized attribute of operator QMoE"))
    assert "onnxruntime 1.31 or newer" in str(said)
