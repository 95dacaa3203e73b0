"""Repeating layers: the graph made from a few traced layers is the graph of all layers; or it is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from tiny_models import HYBRID, TINY, make_tiny, tiny_config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from skv_export.checkpoints.checkpoint import Source
from skv_export.checkpoints.model_config import load_config
from skv_export.checkpoints.pretrained import load_model
from skv_export.export import empty_model, pipeline, repeat_layers, to_onnx
from skv_export.export.decoder import SkvDecoder
from skv_export.export.lazy_weights import LazyWeight
from skv_export.model_folder.plan import Plan
from skv_export.runtime.session import Session
from skv_export.spec.recipe import Recipe

_TURNS = ["sliding_attention", "full_attention"] * 3
DEEP: dict[str, dict[str, Any]] = {
    arch: {"num_hidden_layers": 6} | ({"layer_types": _TURNS} if "layer_types" in given else {})
    for arch, given in TINY.items()
}
DEEP["smollm3"] |= {"no_rope_layers": [1, 0, 1, 0, 1, 0]}
REPEATED = ("llama", "gemma3_text", "smollm3", "gpt_oss", "gpt_neox")
"""One of each build: plain, kinds that take turns, a setting per layer, experts, parallel residuals with biases."""


class Names:
    """Stands for a checkpoint: it has every weight, and none is read."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._first: dict[int, str] = {}
        self._names = {
            name: self._first.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()
        }

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def canonical(self, name: str) -> str:
        return self._names[name]

    def tensor(self, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")

    def release(self) -> None:
        raise AssertionError("nothing was read")


def planned(config: Any, recipe: Recipe) -> tuple[Plan, empty_model.EmptyModel]:
    with pytest.MonkeyPatch.context() as patch:  # there is a configuration, and no checkpoint
        patch.setattr(pipeline, "load_config", lambda source: config)
        patch.setattr(pipeline, "separate_head", lambda source, config: None)
        patch.setattr(pipeline, "Weights", lambda source, model: SimpleNamespace(held=dict))
        return pipeline._plan(Source("safetensors"), recipe, True)


def both(config: Any, recipe: Recipe | None = None) -> tuple[ir.Model | None, ir.Model, repeat_layers.Samples]:
    """The repeated graph, the graph of all layers, and what was traced for the former."""
    plan, model = planned(config, recipe or Recipe())
    every = range(plan.num_hidden_layers)
    samples = repeat_layers.choose(model.model, [plan.by_index.get(i) for i in every])
    assert samples is not None
    names: Any = Names(model.model)
    with repeat_layers.cut(model.model, samples):
        program = pipeline._trace(plan, model, samples.traced, False)
    repeated = to_onnx.build(program, names, plan.by_index, plan.recipe, samples, plan.states)
    program = pipeline._trace(plan, model, every, False)
    whole = to_onnx.build(program, names, plan.by_index, plan.recipe, states=plan.states)
    assert whole is not None
    return repeated, whole, samples


def meaning(model: ir.Model) -> dict[str, str]:
    """What each output is, as a digest of all that it is computed from."""
    known: dict[ir.Value, str] = {}

    def digest(*parts: object) -> str:
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def of(value: ir.Value | None) -> str:
        if value is None:
            return ""
        if value not in known:
            tensor = value.const_value
            if isinstance(tensor, LazyWeight):
                known[value] = digest(tensor.form, tensor.dtype, tuple(tensor.shape.numpy()))
            elif tensor is not None:
                known[value] = digest(tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes())
            else:
                known[value] = digest(value.name, value.shape)
        return known[value]

    for node in model.graph:
        attributes = sorted((name, str(attribute.value)) for name, attribute in node.attributes.items())
        made = digest(node.domain, node.op_type, attributes, [of(value) for value in node.inputs])
        known.update({output: digest(made, i) for i, output in enumerate(node.outputs)})
    return {str(value.name): of(value) for value in model.graph.outputs}


@pytest.mark.parametrize("arch", REPEATED)
def test_stamped_graph_is_the_graph_of_all_layers(arch: str) -> None:
    repeated, whole, samples = both(tiny_config(arch, **DEEP[arch]))
    assert repeated is not None
    assert len(samples.traced) <= 4
    assert meaning(repeated) == meaning(whole)
    assert [value.name for value in repeated.graph.inputs] == [value.name for value in whole.graph.inputs]
    ours, theirs = (
        {n for n, v in m.graph.initializers.items() if isinstance(v.const_value, LazyWeight)} for m in (repeated, whole)
    )
    assert ours == theirs
    assert sum(1 for _ in repeated.graph) == sum(1 for _ in whole.graph)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["lfm2", "nemotron_h"])
def test_stamped_graph_of_recurrent_layers_is_the_graph_of_all_layers(arch: str) -> None:
    given = HYBRID[arch]
    name = "layers_block_type" if arch == "nemotron_h" else "layer_types"
    turns = given[name] * 2
    repeated, whole, samples = both(tiny_config(arch, **given | {name: turns, "num_hidden_layers": len(turns)}))
    assert repeated is not None and len(samples.traced) < len(turns)
    assert meaning(repeated) == meaning(whole)
    assert [value.name for value in repeated.graph.inputs] == [value.name for value in whole.graph.inputs]


def test_layers_of_a_recipe_that_differ_are_traced_apart() -> None:
    recipe = Recipe.from_dict({"layers": [{"index": [2, 5], "k_bits": 8}]})
    repeated, whole, samples = both(tiny_config("llama", num_hidden_layers=7), recipe)
    assert samples.kinds == (0, 0, 2, 0, 0, 2, 0)
    assert samples.traced == (0, 2, 5, 6)
    assert repeated is not None and meaning(repeated) == meaning(whole)


def test_layers_that_all_differ_are_all_traced() -> None:
    plan, model = planned(tiny_config("gpt2", num_hidden_layers=4), Recipe())  # scores scaled by the layer's index
    assert repeat_layers.choose(model.model, plan.layers) is None


def test_a_layer_that_uses_its_index_in_secret_is_not_stamped(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaDecoderLayer.forward

    def indexed(self: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(self, hidden * (1 + 0.01 * self.self_attn.layer_idx), *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", indexed)
    config = tiny_config("llama", num_hidden_layers=5)
    repeated, whole, _ = both(config)
    assert repeated is None
    plan, model = planned(config, Recipe())
    names: Any = Names(model.model)
    assert meaning(pipeline._build(plan, model, names, False)) == meaning(whole)


def test_a_value_that_skips_a_layer_is_not_stamped(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, first = LlamaDecoderLayer.forward, {}

    def skipping(self: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.self_attn.layer_idx == 0:
            first["hidden"] = hidden
        return forward(self, hidden + first["hidden"], *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", skipping)
    assert both(tiny_config("llama", num_hidden_layers=5))[0] is None


def test_cutting_a_model_leaves_it_whole_afterwards() -> None:
    plan, model = planned(tiny_config("gemma3_text", **DEEP["gemma3_text"]), Recipe())
    samples = repeat_layers.choose(model.model, plan.layers)
    assert samples is not None
    before = model.model.config.to_dict()
    with repeat_layers.cut(model.model, samples):
        assert model.model.config.num_hidden_layers == len(samples.traced) == len(model.model.model.layers)
    assert model.model.config.to_dict() == before
    decoder = SkvDecoder(model.model, plan.recipe.layers(6))
    with model.running():
        cache = [torch.empty(2, 1, 1, 1, dtype=torch.uint8)] * 6
        decoder(*pipeline._example_inputs(cache, cache))
    assert decoder.layers == plan.layers


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "gpt_oss"])
def test_a_deep_model_computes_what_pytorch_does(
    arch: str, tmp_path: Any, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[int] = []
    trace: Callable[..., Any] = pipeline._trace
    monkeypatch.setattr(pipeline, "_trace", lambda *given: (traced.append(len(given[2])), trace(*given))[1])
    checkpoint = make_tiny(tmp_path / "checkpoint", arch, **DEEP[arch])
    exact = Recipe().with_options(k_bits=16, v_bits=16, recent_type="float")
    out = pipeline.export_model(checkpoint, out=tmp_path / "out", recipe=exact, progress=lambda *_: None)
    assert traced in ([2], [4])
    config = load_config(Source("safetensors", checkpoint))
    model = load_model(Source("safetensors", checkpoint), config)
    ids = torch.randint(3, 320, (1, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits[0, -1].numpy()
    session = Session(out)
    got = session.run(ids.numpy(), None, None, session.cache(1, 30))[0, 0]
    np.testing.assert_allclose(got, expected, atol=2e-3, rtol=0)
