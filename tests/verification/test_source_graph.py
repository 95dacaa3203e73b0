"""verify of rewritten folders: held against the source graph in ONNX Runtime, not against a model in PyTorch."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import source_graphs
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from source_graphs import DIM, SourceGraph
from tiny_graph import SMALL
from tiny_models import write_tokenizer

from skv_export.errors import SkvError
from skv_export.rewrite.pipeline import rewrite_model
from skv_export.spec.recipe import Recipe
from skv_export.verification import run
from skv_export.verification.quality_level import Thresholds

pytestmark = pytest.mark.usefixtures("library")


@pytest.fixture(autouse=True)
def _vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_graphs, "VOCAB", 96)  # room for the tokenizer's characters


def _source(folder: Path, *, int4: bool = False) -> Path:
    path = SourceGraph(rotary=DIM, attributes={"local_window_size": 40}).write(folder)
    write_tokenizer(folder, 96)
    if int4:
        quantizer = MatMulNBitsQuantizer(onnx.load(path), bits=4, block_size=32, accuracy_level=4)
        quantizer.process()
        assert any(node.op_type == "MatMulNBits" for node in quantizer.model.model.graph.node)
        quantizer.model.save_model_to_file(str(path))
    return path


def _verify(folder: Path, source: Path | None = None, levels: tuple[str, ...] = ("graph",)) -> run.Report:
    return run.verify(
        folder, checkpoint=source, levels=levels, windows=2, window_tokens=120,
        thresholds=Thresholds(max_ppl_increase=None),
    )  # fmt: skip


@pytest.mark.parametrize("int4", [False, True])
def test_a_rewritten_graph_equals_its_source(int4: bool, tmp_path: Path) -> None:
    source = _source(tmp_path / "source", int4=int4)
    folder = rewrite_model(source, out=tmp_path / "out", recipe=Recipe(SMALL))
    report = _verify(folder, levels=("text", "graph", "quality"))
    assert report.passed, report.table()
    assert report.graph is not None and report.graph.quantized is None and report.quality is not None
    assert report.graph.exact.max_abs < 1e-3 and report.graph.exact.steps == 2 * 32 + 64
    assert report.quality.positions == 2 * 119 and 0 < report.quality.kld_mean < 1
    assert report.text is None and "skip  text" in report.table() and str(source) in report.table()


@pytest.mark.parametrize(("name", "value"), [("scale", 0.2), ("local_window_size", 30)])
def test_another_attention_than_the_sources_fails(name: str, value: float, tmp_path: Path) -> None:
    source = _source(tmp_path / "source")
    folder = rewrite_model(source, out=tmp_path / "out", recipe=Recipe(SMALL))
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    (node, *_) = (node for node in model.graph.node if node.op_type == "QuantizedKVAttention")
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    assert len(kept) == len(node.attribute) - 1
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    report = _verify(folder, source)
    assert any("graph, nothing rounded: the largest logit difference" in f for f in report.failures), report.table()


def test_the_source_must_be_the_graph_that_was_rewritten(tmp_path: Path) -> None:
    source = _source(tmp_path / "source")
    folder = rewrite_model(source, out=tmp_path / "out", recipe=Recipe(SMALL))
    with pytest.raises(SkvError, match="level text needs the model in PyTorch"):
        _verify(folder, levels=("text",))
    other = SourceGraph().write(tmp_path / "other")
    with pytest.raises(SkvError, match="not what the folder was rewritten from"):
        _verify(folder, other)
    source.parent.rename(tmp_path / "moved")
    with pytest.raises(SkvError, match=r"which is not there.*--checkpoint SOURCE\.onnx"):
        _verify(folder)
    assert _verify(folder, tmp_path / "moved").passed


def test_a_source_with_the_last_logits_alone_is_measured_token_by_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _source(tmp_path / "source")
    model = onnx.load(source)
    (head,) = (node for node in model.graph.node if "logits" in node.output)
    for name, value in (("last", -1), ("end", 2**31), ("axis", 1)):
        model.graph.initializer.append(onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [1], [value]))
    model.graph.node.insert(
        len(model.graph.node) - 1,
        onnx.helper.make_node("Slice", [head.input[0], "last", "end", "axis"], ["hidden"]),
    )
    head.input[0] = "hidden"
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    (source.parent / "model.onnx.data").unlink()
    onnx.save(model, source)
    folder = rewrite_model(source, out=tmp_path / "out", recipe=Recipe(SMALL))
    monkeypatch.setattr(run, "STEPPED_TOKENS", 150)  # one window of the two
    report = _verify(folder, levels=("graph", "quality"))
    assert report.passed, report.table()
    assert report.quality is not None and report.quality.positions == 119
