"""verify: each level passes on what is right, and fails, saying where, on what is not."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file
from tiny_graph import EXACT, SMALL, VOCAB, Tiny
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from skv_export.errors import SkvError
from skv_export.evaluation.text import cut_windows, read_text
from skv_export.export.pipeline import export_model
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.native.library import Library, load_library
from skv_export.runtime.session import Session
from skv_export.spec.conformance import Case, op_cases
from skv_export.spec.layout import CacheLayout
from skv_export.spec.recipe import LayerConfig, Recipe
from skv_export.verification import graph_variants, op_level, quality_level, run
from skv_export.verification.graph_level import GraphResult, StepComparison, Tolerance, judge
from skv_export.verification.quality_level import QualityResult, Thresholds, flush_edges

pytestmark = pytest.mark.usefixtures("library")

TOKENS = np.random.default_rng(3).integers(3, VOCAB, 300).tolist()


# op.


def test_every_case_passes() -> None:
    result = op_level.check_op()
    assert result.failures == ()
    assert result.cases == len(op_cases()) > 100
    assert 0 < result.worst < 1 and result.worst_case


class _Wrong(Library):
    """The library, with one thing wrong in what it returns."""

    def __init__(self, fault: str) -> None:
        super().__init__(load_library().path)
        self.fault = fault

    def attention(self, *args: object, **options: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        output, key, value = super().attention(*args, **options)  # type: ignore[arg-type]
        if self.fault == "byte":
            value[0, 1, 3, 5] ^= 1
        elif self.fault == "attention":
            output[0, 0, 7] += 1e-2
        else:
            output[0, 0, 7] = np.nan
        return output, key, value


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "byte",
            r"op, kernels, default: 1 bytes of the value cache differ, the first in sequence 0, head 1, byte 101 of",
        ),
        ("attention", r"op, kernels, default: attention is off by [\d.e-]+ of the largest output, expected 5e-04"),
        ("nan", r"op, kernels, default: attention is off by nan"),
    ],
)
def test_a_wrong_kernel_is_named_with_its_case(fault: str, message: str) -> None:
    result = op_level.check_op(op_cases()[:1], _Wrong(fault))
    (failure,) = result.failures
    assert re.match(message, failure), failure


# The twins.


def test_all_logits_twin_gives_every_position(tmp_path: Path) -> None:
    folder = Tiny(SMALL).write(tmp_path / "last")
    twin = graph_variants.all_logits(folder)
    real = Session(Tiny(SMALL, all_logits=True).write(tmp_path / "all"))
    got, expected = (s.run([TOKENS[:60]], None, None, s.cache(1)) for s in (twin, real))
    assert got.shape == (1, 60, VOCAB) and np.array_equal(got, expected)
    assert np.array_equal(got[:, -1:], (last := Session(folder)).run([TOKENS[:60]], None, None, last.cache(1)))
    assert graph_variants.all_logits(tmp_path / "all").config.all_logits


def test_graph_without_a_gather_is_refused(tmp_path: Path) -> None:
    folder = Tiny(SMALL, all_logits=True).write(tmp_path)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    (gather,) = (node for node in model.graph.node if node.op_type == "GatherElements")
    gather.op_type = "Identity"
    del gather.input[1:], gather.attribute[:]
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    config = folder / "skv_config.json"
    config.write_text(config.read_text().replace('"logits": "all"', '"logits": "last"'))
    with pytest.raises(SkvError, match=r"no node picks the last token.*--all-logits"):
        graph_variants.all_logits(folder)


def test_unquantized_twin_is_the_same_model_with_a_16_bit_cache(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, recent_type="float")
    twin = graph_variants.unquantized(Tiny(config).write(tmp_path))
    expected = Tiny(EXACT).logits(TOKENS[:120], [120])[-1]
    cache = twin.cache(1)
    for start, end in ((0, 70), (70, 119), (119, 120)):
        logits = twin.run([TOKENS[start:end]], None, None, cache)
    assert np.abs(logits[0, -1] - expected).max() < 2e-4


# quality.


def test_chunks_that_end_at_flushes_are_token_by_token(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, recent_type="float")
    tiny = Tiny(config, windows=(40, 0), all_logits=True)
    session = Session(tiny.write(tmp_path))
    edges = flush_edges(tiny.layouts(0)[0], 200)
    assert edges == [50, 82, 114, 146, 178, 200]
    one_by_one, chunked, shifted = session.cache(1), session.cache(1), session.cache(1)
    expected = np.concatenate([session.run([[t]], None, None, one_by_one) for t in TOKENS[:200]], axis=1)
    got = _chunks(session, chunked, edges)
    assert np.abs(got - expected).max() < 2e-4
    for name, layout in zip(("key", "value"), tiny.layouts(0), strict=True):  # layer 0: its inputs are the same bits
        used = layout.tiles_in(chunked.data(0, name)[0, 0].size) * layout.tile_bytes
        tiles = [c.data(0, name).reshape(2, -1)[:, :used] for c in (one_by_one, chunked)]
        assert (tiles[0] != tiles[1]).mean() < 1e-3
    other = _chunks(session, shifted, [60, 92, 124, 156, 188, 200])
    assert np.abs(other - expected).max() > 1e-2  # ten tokens later is another cache


def _chunks(session: Session, cache: object, edges: list[int]) -> np.ndarray:
    spans = zip([0, *edges], edges, strict=False)
    return np.concatenate([session.run([TOKENS[a:b]], None, None, cache) for a, b in spans], axis=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "config", [LayerConfig(), SMALL, LayerConfig(num_sink_tokens=0, recent_tokens=0, tile_tokens=128)]
)
@pytest.mark.parametrize("length", [20, 132, 133, 700])
def test_no_tile_is_flushed_inside_a_chunk(config: LayerConfig, length: int) -> None:
    layout = CacheLayout.pair(config, 64)[0]
    edges = flush_edges(layout, length)
    assert edges[-1] == length and sorted(set(edges)) == edges
    for start, end in zip([0, *edges], edges, strict=False):
        # Every token of the chunk, decoded alone, would have found the tiles that the chunk found.
        assert {layout.quantized_tokens(past) for past in range(start, end)} == {layout.quantized_tokens(start)}


def test_shipped_text_is_there() -> None:
    text = read_text(None)
    assert text.startswith("Chapter 1") and 100_000 < len(text.encode()) < 300_000


def test_unusable_text_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(SkvError, match="no such file"):
        read_text(tmp_path / "nothing.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SkvError, match="not UTF-8"):
        read_text(tmp_path / "bytes.txt")
    tokenizer = Session(Tiny().write_all(tmp_path / "model")).tokenizer
    with pytest.raises(SkvError, match=r"too short; got 5 tokens; expected at least 100"):
        cut_windows(tokenizer, "Anne.", 8, 100)


def test_windows_do_not_overlap_and_cover_the_text(tmp_path: Path) -> None:
    tokenizer = Session(Tiny().write_all(tmp_path)).tokenizer
    text = read_text(None)[:2050]
    windows = cut_windows(tokenizer, text, 100, 500)
    assert windows.shape == (4, 500)
    assert tokenizer.decode(windows[0].tolist()) == text[:500].replace("\n", "")
    assert tokenizer.decode(windows[3].tolist()) == text[-500:].replace("\n", "")


# The report.


GOOD = QualityResult(20.0, 20.2, 0.01, 0.1, 0.95, 4.5, 1024, 8000)


@pytest.mark.parametrize(
    ("limits", "failing"),
    [
        (Thresholds(), 0),
        (Thresholds(max_ppl_increase=0.005), 1),
        (Thresholds(max_kld_mean=0.001, max_kld_p99=0.01, min_top1_agreement=0.99), 3),
        (Thresholds(max_ppl_increase=None), 0),
    ],
)
def test_thresholds_decide(limits: Thresholds, failing: int) -> None:
    assert len(GOOD.against(limits)) == failing


def test_not_a_number_meets_no_threshold() -> None:
    assert dataclasses.replace(GOOD, ppl_exported=float("nan")).against(Thresholds())


def _comparison(**changes: object) -> StepComparison:
    good = StepComparison(131, 192, 5e-4, 1e-5, 7, 1.0, (), (0, 3), (90_000, 90_000), 1000)
    return dataclasses.replace(good, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("quantized", "exact", "message"),
    [
        (
            {},
            {"max_abs": 2e-3, "origin": "step 3: it"},
            "nothing rounded: the largest logit difference is 2.00e-03 at step 7",
        ),
        ({}, {"max_abs": 2e-3, "origin": "step 3: it"}, "expected at most 1e-03; began at step 3: it"),
        ({"max_abs": 0.06}, {}, "recipe's bits: the largest logit difference is 6.00e-02"),
        ({"max_abs": float("inf")}, {}, "difference is inf"),
        ({"median_abs": 3e-4}, {}, "the median logit difference is 3.00e-04"),
        ({"contradictions": (5, 6)}, {}, "though the reference's lead exceeds the difference: steps 5, 6"),
        ({"flips": (0, 91)}, {}, "recipe's bits: layer 1 wrote 91 of 90000 bytes of codes otherwise"),
        ({"origin": "step 9: layer 1's keys are off"}, {}, "recipe's bits: step 9: layer 1's keys are off"),
    ],
)
def test_graph_level_fails_beyond_its_tolerance(
    quantized: dict[str, object], exact: dict[str, object], message: str
) -> None:
    (failure,) = judge(_comparison(**quantized), _comparison(**exact), Tolerance()).failures
    assert message in failure
    assert not judge(_comparison(), _comparison(), Tolerance()).failures


def test_report_has_the_promised_keys(tmp_path: Path) -> None:
    folder = Tiny().write(tmp_path / "model")
    (folder / "recipe.toml").write_text("k_bits = 4\n")
    op = op_level.OpResult(106, 0.1, "default, kernels", ())
    graph = GraphResult(_comparison(), _comparison(), ())
    full = run.Report(folder, "the checkpoint", op, graph, GOOD, thresholds={"max_ppl_increase": 0.05})
    report = json.loads(full.to_json())
    assert report["passed"] is report["op"] is True and report["text"] is None
    assert report["graph"] == {"max_abs_logit_diff": 5e-4, "steps": 192, "argmax_agreement": 1.0}
    assert report["quality"] == {
        "ppl_reference": 20.0, "ppl_exported": 20.2, "kld_mean": 0.01, "kld_p99": 0.1, "top1_agreement": 0.95,
        "effective_bits": 4.5,
    }  # fmt: skip
    assert report["model"]["folder"] == str(folder) and report["model"]["bits"] == "K4V2"
    assert report["model"]["recipe"]["k_bits"] == 4 and report["model"]["source"]["name"] == "tiny"
    assert report["checkpoint"] == "the checkpoint" and report["thresholds"] == {"max_ppl_increase": 0.05}
    assert {"skv-export", "python", "torch", "onnxruntime"} <= set(report["versions"]) and report["failures"] == []
    failed = dataclasses.replace(full, op=dataclasses.replace(op, failures=("op, kernels, default: wrong",)))
    assert not failed.passed and json.loads(failed.to_json())["op"] is False
    assert "FAIL  op" in failed.table() and failed.table().endswith("op, kernels, default: wrong")
    assert "+1.00%" in full.table() and "FAIL" not in full.table()
    alone = json.loads(run.Report(folder, op=op).to_json())
    assert alone["op"] is True and alone["graph"]["steps"] is None


def test_a_report_begins_with_its_verdict_in_a_sentence(tmp_path: Path) -> None:
    op = op_level.OpResult(106, 0.1, "default, kernels", ())
    bad = dataclasses.replace(op, failures=("wrong",))
    worse = dataclasses.replace(GOOD, failures=("perplexity",))
    for report, first in (
        (run.Report(tmp_path, "org/model", op, quality=GOOD), r"PASS: .* computes what org/model computes, within"),
        (run.Report(tmp_path, op=op), r"PASS: .* computes what the specification says.*\(level op\)\."),
        (
            run.Report(tmp_path, "m", bad, quality=worse),
            r"FAIL: .* does not compute what m computes \(levels op, quality",
        ),
        (run.Report(tmp_path, "m", op, quality=worse), r"FAIL: .*its cache costs more quality than allowed\."),
    ):
        assert re.fullmatch(f"{first}.*", report.table().splitlines()[0])
        assert report.verdict == report.table().splitlines()[0]


def test_a_level_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    for levels in (["speed"], []):
        with pytest.raises(SkvError, match="verify: level"):
            run.verify(Tiny().write(tmp_path), levels=levels)


def test_a_device_that_is_not_there_is_refused_before_any_level_runs(tmp_path: Path) -> None:
    with pytest.raises(SkvError, match="device cuda:99: not available"):
        run.verify(Tiny().write(tmp_path), device="cuda:99")


def test_op_level_needs_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_level, "op_cases", lambda: (Case("small", SMALL),))
    report = run.verify(Tiny().write(tmp_path), levels=["op"])
    assert report.passed and report.op is not None and report.op.cases == 1


# An export, end to end.


@dataclass(frozen=True)
class Exported:
    checkpoint: Path
    folder: Path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    """A llama of two layers, its tokenizer of characters, exported with tiles of 32 tokens."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small only wait for each other
    root = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    checkpoint = Tiny().write_all(root / "tokenizer")
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.data *= 4  # attention that looks at something
    model.save_pretrained(root / "checkpoint")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(root / "checkpoint")
    folder = export_model(root / "checkpoint", out=root / "folder", recipe=Recipe(SMALL))
    yield Exported(root / "checkpoint", folder)
    torch.set_num_threads(threads)


def _verify(exported: Exported, folder: Path | None = None, levels: tuple[str, ...] = ("graph",)) -> run.Report:
    return run.verify(
        folder or exported.folder, checkpoint=exported.checkpoint, levels=levels, windows=4, window_tokens=256
    )


def test_export_passes_graph_and_quality(exported: Exported) -> None:
    report = _verify(exported, levels=("graph", "quality"))
    assert report.failures == (), report.table()
    assert report.graph is not None and report.quality is not None
    found = report.graph.quantized
    assert (found.prompt, found.steps) == (49, 2 * 32 + 64)
    assert found.argmax_agreement == 1 and found.max_abs < 1e-3 and sum(found.written) > 0
    assert report.graph.exact.max_abs < 1e-4
    assert report.quality.positions == 4 * 255
    assert 0 < report.quality.kld_mean < 0.1 and 0.5 < report.quality.top1_agreement <= 1
    assert report.quality.effective_bits == pytest.approx(
        quality_level.effective_bits(ModelConfig.load(exported.folder), 256)
    )
    assert json.loads(report.to_json())["graph"]["steps"] == 128


def _edit(exported: Exported, to: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of the folder with the graph changed."""
    shutil.copytree(exported.folder, to)
    model = onnx.load(to / "model.onnx", load_external_data=False)
    change(model)
    (to / "model.onnx").write_bytes(model.SerializeToString())
    return to


def _ops(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "QuantizedKVAttention"]


def test_wrong_attention_is_traced_to_its_layer(exported: Exported, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        (scale,) = (a for a in _ops(model)[1].attribute if a.name == "scale")
        scale.f *= 1.1

    report = _verify(exported, _edit(exported, tmp_path / "wrong", change))
    assert not report.passed
    assert any("layer 2's" in failure and "or layer 1 after its own" in failure for failure in report.failures), (
        report.table()
    )


def test_wrong_quantizer_is_traced_to_its_layer(exported: Exported, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        (rotation,) = (a for a in _ops(model)[2].attribute if a.name == "v_rotation")
        rotation.s = b"none"

    report = _verify(exported, _edit(exported, tmp_path / "wrong", change))
    assert any("layer 2's values are off" in failure for failure in report.failures), report.table()


def test_wrong_output_embedding_is_told_from_the_layers(exported: Exported, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        (head,) = (node for node in model.graph.node if "logits" in node.output)
        model.graph.node.remove(head)
        made = list(head.output)
        head.output[0] = "logits.before"
        model.graph.node.append(head)
        model.graph.initializer.append(numpy_helper.from_array(np.float32(1.1), "gain"))
        model.graph.node.append(helper.make_node("Mul", ["logits.before", "gain"], made))

    report = _verify(exported, _edit(exported, tmp_path / "wrong", change))
    assert any("every layer's keys and values agree" in failure for failure in report.failures), report.table()


def test_quality_fails_where_the_cache_costs_too_much(exported: Exported) -> None:
    strict = Thresholds(max_ppl_increase=-0.5, max_kld_mean=0.0)
    report = run.verify(
        exported.folder,
        checkpoint=exported.checkpoint,
        levels=["quality"],
        windows=1,
        window_tokens=128,
        thresholds=strict,
    )
    assert len(report.failures) == 2 and "perplexity increase" in report.failures[0]


def test_quality_reference_is_transformers_own_loss(exported: Exported) -> None:
    report = run.verify(
        exported.folder, checkpoint=exported.checkpoint, levels=["quality"], windows=2, window_tokens=200
    )
    windows = cut_windows(Session(exported.folder).tokenizer, read_text(None), 2, 200)
    model = LlamaForCausalLM.from_pretrained(exported.checkpoint)
    with torch.no_grad():
        loss = model(torch.from_numpy(windows), labels=torch.from_numpy(windows)).loss
    assert report.quality is not None and report.quality.ppl_reference == pytest.approx(float(loss.exp()), rel=1e-4)


def test_window_too_short_to_quantize_is_refused(exported: Exported) -> None:
    with pytest.raises(SkvError, match=r"window_tokens; got 50; expected more than 50"):
        run.verify(exported.folder, checkpoint=exported.checkpoint, levels=["quality"], window_tokens=50)


def test_another_checkpoint_is_refused(exported: Exported, tmp_path: Path) -> None:
    shutil.copytree(exported.checkpoint, tmp_path / "other")
    config = LlamaConfig.from_pretrained(exported.checkpoint, num_hidden_layers=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    with pytest.raises(SkvError, match="not what the folder was exported from"):
        run.verify(exported.folder, checkpoint=tmp_path / "other", levels=["graph"])
    with pytest.raises(SkvError, match=r"Pass its path: --checkpoint"):
        run.verify(exported.folder, levels=["graph"])


def test_a_tensor_that_is_missing_or_does_not_fit_is_never_made_up(exported: Exported, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    for change in ("missing", "another shape"):
        checkpoint = shutil.copytree(exported.checkpoint, tmp_path / change)
        tensors = load_file(checkpoint / "model.safetensors")
        weight = tensors.pop(name)
        if change == "another shape":
            tensors[name] = weight[:-2].contiguous()
        save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(SkvError, match=name):
            run.verify(exported.folder, checkpoint=checkpoint, levels=["graph"])
        with pytest.raises(SkvError, match=name):
            export_model(checkpoint, out=tmp_path / "out", recipe=Recipe(SMALL))
        assert not (tmp_path / "out").exists()
