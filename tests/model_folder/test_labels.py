"""Names and notes in the graph: what Netron shows of an exported and of a rewritten model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from source_graphs import SourceGraph

import skv_export
from skv_export.export.pipeline import export_model
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.rewrite.pipeline import rewrite_model
from skv_export.spec.recipe import Recipe

pytestmark = pytest.mark.usefixtures("library")


@pytest.mark.parametrize("arch", ["qwen3", "gpt2"])
def test_nodes_are_named_by_the_module_that_they_come_from(
    arch: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = Recipe.per_layer([(4, 2), (8, 4)])
    out = export_model(tiny_checkpoint(arch), out=tmp_path / "out", recipe=recipe, progress=lambda *_: None)
    model = onnx.load(out / "model.onnx", load_external_data=False)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"/(model|lm_head)/[\w./]+", name) for name in names)
    for i in range(2):
        assert f"/model/layers.{i}/attn/QuantizedKVAttention" in names
        found = {name.split("/")[3] for name in names if name.startswith(f"/model/layers.{i}/")}
        assert {"attn", "mlp"} <= found
    assert "/lm_head/MatMul" in names
    for node in model.graph.node:  # each product is named by the weight that it reads
        weights = [x for x in node.input if re.search(r"\.(\d+)\..*(proj|fc)\.weight", x)]
        for weight in weights:
            layer, module = re.search(r"\.(\d+)\.(?:.*\.)?(\w+)\.weight", weight).groups()  # type: ignore[union-attr]
            assert re.fullmatch(rf"/model/layers\.{layer}/(\w+/)?{module}/\w+", node.name), (weight, node.name)
    props = {entry.key: entry.value for entry in model.metadata_props}
    assert (model.producer_name, model.producer_version) == ("skv_export", skv_export.__version__)
    assert props["skv.source"] == arch and props["skv.version"] == skv_export.__version__
    assert props["skv.recipe"] == (out / "recipe.toml").read_text()
    assert props["skv.bits"] == ModelConfig.load(out).bits == "K4V2 (1 layers), K8V4 (1)"
    assert props["skv.traced_by"].startswith("pytorch")


def test_a_rewritten_graph_keeps_its_names_but_for_attention(tmp_path: Path) -> None:
    source = SourceGraph(packed=True).write(tmp_path / "source")
    before = onnx.load(source, load_external_data=False)
    out = rewrite_model(source, out=tmp_path / "out")
    model = onnx.load(out / "model.onnx", load_external_data=False)
    names = [node.name for node in model.graph.node]
    assert [n for n in names if "QuantizedKVAttention" in n] == [
        f"/model/layers.{i}/attn/QuantizedKVAttention" for i in range(len(ModelConfig.load(out).layers))
    ]
    kept = [n.name for n in before.graph.node if n.op_type in ("MatMul", "Add")]
    assert set(kept) <= set(names)
    props = {entry.key: entry.value for entry in model.metadata_props}
    assert (
        model.producer_name == "skv_export" and props["skv.source"] == str(source) and "k_bits" in props["skv.recipe"]
    )
