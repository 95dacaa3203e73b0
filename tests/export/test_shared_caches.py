"""Layers that read the keys and values of another layer: the graph, every way of running it, and what refuses them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tiny_models import make_tiny, tiny_config, write_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from skv_export.analysis.pipeline import analyze
from skv_export.checkpoints.checkpoint import Source
from skv_export.checkpoints.pretrained import load_model, replace_attention
from skv_export.checkpoints.shared_caches import cache_sources
from skv_export.errors import SkvError
from skv_export.evaluation.decode_simulation import ATTENTION_NAME, Simulation, simulated_logits
from skv_export.export import pipeline
from skv_export.integrations.transformers_model import SkvForCausalLM
from skv_export.model_folder.names import MODEL_FILE
from skv_export.quantization.layer_by_layer import LayerByLayer
from skv_export.runtime.session import Session
from skv_export.spec.op import DOMAIN
from skv_export.spec.recipe import Recipe
from skv_export.verification import graph_level, graph_variants

RECIPE = Recipe().with_options(k_bits=4, v_bits=2, tile_tokens=32, recent_tokens=16, num_sink_tokens=2)
WINDOW = 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 4: a sliding and a full layer, and one of each that reads the former's keys and values."""
    folder = make_tiny(tmp_path_factory.mktemp("shared") / "gemma4", "gemma4_text")
    write_tokenizer(folder, 320)
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, library: Path) -> Path:
    out = tmp_path_factory.mktemp("exported") / "gemma4"
    return pipeline.export_model(checkpoint, out=out, recipe=RECIPE, progress=lambda *_: None)


@pytest.fixture(scope="module")
def original(checkpoint: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    return model.eval()


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 320, (1, count), generator=torch.Generator().manual_seed(seed))


def run(session: Session, ids: torch.Tensor, calls: list[int]) -> np.ndarray:
    """Logits of every token, in calls of so many."""
    cache, ends = session.cache(1, ids.shape[1]), np.cumsum(calls)
    rows = [
        session.run(ids[:, end - n : end].numpy(), None, None, cache)[0] for n, end in zip(calls, ends, strict=True)
    ]
    return np.concatenate(rows)


def attention_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain == DOMAIN]


def test_sources_are_the_last_layers_of_a_kind_that_have_keys() -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 3
    config = tiny_config("gemma4_text", num_hidden_layers=9, layer_types=kinds, num_kv_shared_layers=4)
    assert cache_sources(config) == {5: 2, 6: 4, 7: 4, 8: 2}
    modes = config.kv_sharing_modes  # transformers' own: who stores, and who reads
    assert [i for i, mode in enumerate(modes) if mode == "store"] == sorted({2, 4})
    assert [i for i, mode in enumerate(modes) if mode == "reuse"] == [5, 6, 7, 8]
    assert cache_sources(tiny_config("llama")) == {}


def test_the_cache_is_bound_once_and_one_node_of_each_kind_appends(exported: Path) -> None:
    session = Session(exported)
    assert len(session.config.layers) == 2
    assert [x.name for x in session.onnx.get_inputs()][3:] == [
        f"past_key_values.{i}.{name}" for i in (0, 1) for name in ("key", "value")
    ]
    nodes = [
        node for node in onnx.load(exported / MODEL_FILE, load_external_data=False).graph.node if node.domain == DOMAIN
    ]
    assert [len([x for x in node.output if x]) for node in nodes] == [1, 1, 3, 3]
    assert [node.input[3] for node in nodes] == [f"past_key_values.{i}.key" for i in (0, 1, 0, 1)]


@pytest.mark.parametrize("calls", [[150], [100, *[1] * 50], [40, 60, 7, *[1] * 20, 23]], ids=len)
def test_unquantized_it_is_pytorchs_model(calls: list[int], exported: Path, original: PreTrainedModel) -> None:
    """Prompts longer than the window, prompts in pieces, and token by token."""
    session = graph_variants.unquantized(exported)
    ids = tokens(150)
    with torch.no_grad():
        expected = original(ids).logits[0].numpy()
    got = run(session, ids, calls)
    ends = np.cumsum(calls) - 1  # the graph returns the last token's logits
    np.testing.assert_allclose(got, expected[ends], atol=1e-3, rtol=0)


def test_quantized_it_is_the_simulated_model(exported: Path, checkpoint: Path) -> None:
    """Token by token, against a forward pass in PyTorch in which every reader sees its source's quantized cache."""
    simulated = load_model(Source("safetensors", checkpoint))
    replace_attention(simulated, ATTENTION_NAME)
    ids = tokens(120, 3)
    simulation = Simulation.of_recipe(RECIPE)
    with torch.no_grad():
        expected = simulated_logits(simulated, ids[0], simulation).numpy()
    got = run(Session(exported), ids, [1] * 120)
    difference = np.abs(got - expected)
    assert np.median(difference) < 2e-4 and np.quantile(difference, 0.99) < 5e-2  # codes flip, here and there
    assert sorted(simulation._caches) == [0, 1]  # so the bits of quality count each cache once


def test_graph_level_of_verify_and_what_comes_of_appending_early(exported: Path, checkpoint: Path) -> None:
    model = load_model(Source("safetensors", checkpoint))
    session = Session(exported)
    prompt, steps = graph_level.step_counts(session.config)
    ids = tokens(prompt + steps, 5)[0].tolist()
    assert not graph_level.check(model, exported, ids).failures
    # Let the layer append that owns the cache, and its reader finds the new tokens in what should be the past.
    twin = graph_variants.read_with_exact_products(exported / MODEL_FILE)
    _, owner, _, reader = attention_nodes(twin)
    owner.output.extend(reader.output[1:])
    del reader.output[1:]
    early = Session(exported, model=twin.SerializeToString())
    assert np.abs(run(early, tokens(150), [100, 50]) - run(session, tokens(150), [100, 50])).max() > 1e-2


def test_padded_batches_and_generate(exported: Path, original: PreTrainedModel) -> None:
    session = graph_variants.unquantized(exported)
    model = SkvForCausalLM.from_session(Session(exported))
    short, long = tokens(20, 1)[0].tolist(), tokens(70, 2)[0].tolist()
    together = session.generate([short, long], max_new_tokens=8)
    for prompt, got in zip((short, long), together, strict=True):
        want = original.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
        assert got == want.tolist()
    assert model.generate(torch.tensor([long]), max_new_tokens=8, do_sample=False).shape == (1, 78)


def test_what_looks_at_layers_one_by_one_refuses_it(checkpoint: Path) -> None:
    with pytest.raises(SkvError, match=r"layer by layer; got 2 layers that read the keys and values of an.*quality"):
        analyze(checkpoint)
    with pytest.raises(SkvError, match=r"layer by layer.*Another way\."):
        LayerByLayer(Source("safetensors", checkpoint), instead="Another way.")


def test_the_plan_names_the_readers(tiny_checkpoint: Callable[..., Path], checkpoint: Path) -> None:
    planned = pipeline.plan(checkpoint, RECIPE)
    table = planned.table()
    assert "gemma4_text, 4 layers" in table
    assert "layers 2-3: read the cache of the last layer of their kind above" in table
    assert planned.to_dict()["layers_without_cache"] == 2
    assert pipeline.plan(tiny_checkpoint("llama"), RECIPE).readers == 0
