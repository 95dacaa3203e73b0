"""ONNX to ONNX: what is carried over computes the same; the folder, and what onnxruntime-genai needs of it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from source_graphs import CONTEXT, DIM, HEADS, KV_HEADS, VOCAB, WIDTH, SourceGraph, digests, run_source
from tiny_models import tiny_config

from skv_export.errors import SkvError
from skv_export.model_folder import genai_config
from skv_export.model_folder.skv_config import LayerCache, ModelConfig
from skv_export.paths import is_onnx
from skv_export.rewrite import pipeline
from skv_export.rewrite.pipeline import Rewrite, rewrite_model
from skv_export.runtime.session import Session
from skv_export.spec import compaction
from skv_export.spec.layout import CacheLayout
from skv_export.spec.recipe import LayerConfig, Recipe

pytestmark = pytest.mark.usefixtures("library")

EXACT = Recipe(LayerConfig(16, 16, num_sink_tokens=2, recent_tokens=16, tile_tokens=32, recent_type="float"))
"""Nothing is quantized: a rewritten graph must compute what its source does."""
TOKENS = [int(t) for t in np.random.default_rng(3).integers(3, VOCAB, 120)]
CHUNKS = [5, 1, 30, *[1] * 40, 44]


def session(source: Path, out: Path, recipe: Recipe = EXACT) -> Session:
    return Session(rewrite_model(source, out=out, recipe=recipe))


def logits(model: Session, tokens: list[int], chunks: list[int]) -> np.ndarray[Any, Any]:
    cache, rows, start = model.cache(1, CONTEXT), [], 0
    for count in chunks:
        rows.append(model.run([tokens[start : start + count]], None, None, cache)[0])
        start += count
    return np.concatenate(rows)


def graph_of(path: Path) -> onnx.GraphProto:
    return onnx.load(path, load_external_data=False).graph


CARRIED: dict[str, SourceGraph] = {
    "plain": SourceGraph(),
    "packed": SourceGraph(packed=True),
    "rotary": SourceGraph(rotary=DIM),
    "packed rotary": SourceGraph(packed=True, rotary=DIM),
    "partial rotary": SourceGraph(rotary=DIM // 2),
    "interleaved": SourceGraph(rotary=DIM, attributes={"rotary_interleaved": 1}),
    "position_ids": SourceGraph(rotary=DIM, positions=True),
    "scale": SourceGraph(attributes={"scale": 0.3}),
    "softcap": SourceGraph(attributes={"softcap": 2.0}),
    "window": SourceGraph(attributes={"local_window_size": 40}),
    "sinks": SourceGraph(sinks=True),
    "smooth softmax": SourceGraph(attributes={"smooth_softmax": 1}),
    "defaults spelled out": SourceGraph(
        attributes={"causal": 1, "qk_output": 0, "k_quant_type": "NONE", "local_window_size": -1, "softcap": 0.0}
    ),
    "Attention": SourceGraph("attention"),
    "Attention, 4-D": SourceGraph("attention", heads_first=True),
    "Attention, scale and softcap": SourceGraph("attention", attributes={"scale": 0.3, "softcap": 2.0}),
    "Attention, boolean mask": SourceGraph("attention", mask="bool"),
    "Attention, float mask": SourceGraph("attention", mask="float", heads_first=True),
    "Attention, window in the mask": SourceGraph("attention", mask=40),
    "Attention, mask and is_causal": SourceGraph("attention", mask="bool", attributes={"is_causal": 1}),
    "Attention after a Concat": SourceGraph("attention", mask="bool", heads_first=True, concat="plain"),
    "Attention after a Concat, heads repeated": SourceGraph(
        "attention", mask="float", heads_first=True, concat="repeated"
    ),
    "Attention after a Concat, window": SourceGraph("attention", mask=40, heads_first=True, concat="repeated"),
}


@pytest.mark.parametrize("name", CARRIED)
def test_rewritten_graph_computes_what_its_source_does(name: str, tmp_path: Path) -> None:
    source = CARRIED[name].write(tmp_path / "source")
    expected = run_source(source, TOKENS, CHUNKS)
    model = session(source, tmp_path / "out")
    # Both compute in float32, in another order: 1e-4 of logits around 10.
    np.testing.assert_allclose(logits(model, TOKENS, CHUNKS), expected, atol=1e-4)


def test_fused_qk_norm(tmp_path: Path) -> None:
    """ONNX Runtime's CPU kernel has no fused norms: the source that is run has them as nodes."""
    nodes = SourceGraph(rotary=DIM, qk_norm="nodes").write(tmp_path / "nodes")
    fused = SourceGraph(rotary=DIM, qk_norm="fused").write(tmp_path / "fused")
    model = session(fused, tmp_path / "out")
    np.testing.assert_allclose(logits(model, TOKENS, CHUNKS), run_source(nodes, TOKENS, CHUNKS), atol=1e-4)


def test_half_precision(tmp_path: Path) -> None:
    source = SourceGraph(dtype=np.float16, rotary=DIM).write(tmp_path / "source")
    model = session(source, tmp_path / "out", EXACT.with_options(recent_type="float16", dtype="fp32"))
    assert model.config.dtype == "fp16"
    assert 'dtype = "fp16"' in (tmp_path / "out" / "recipe.toml").read_text()
    # Half precision everywhere: two units in the last place of logits around 10, after two layers.
    np.testing.assert_allclose(logits(model, TOKENS, [120]), run_source(source, TOKENS, [120], np.float16), atol=3e-2)


@pytest.mark.parametrize("name", ["packed rotary", "position_ids", "Attention", "Attention after a Concat"])
def test_batches_padded_on_either_side_equal_one_by_one(name: str, tmp_path: Path) -> None:
    """Also with chunks after a past, and with a sequence that gets no token in a call."""
    # An Attention graph that takes positions from the past's shape counts columns, padded or not: so it gets them here.
    options: dict[str, Any] = {"heads_first": True, "concat": "repeated"} if "Concat" in name else {}
    graph = SourceGraph("attention", mask="bool", positions=True, **options) if "Attention" in name else CARRIED[name]
    model = session(graph.write(tmp_path / "source"), tmp_path / "out")
    counts = [[7, 2, 0, 1], [3, 9, 0, 4], [11, 1, 1, 1]]
    alone = [logits(model, TOKENS, [n for n in row if n]) for row in counts]
    cache, past = model.cache(3, CONTEXT), np.zeros(3, int)
    for step in range(4):
        new = np.array([row[step] for row in counts])
        width = max(new.max(), 1)
        side = np.arange(width)[None, :]
        real = side < new[:, None] if step % 2 else side >= width - new[:, None]
        ids = np.zeros((3, width), np.int64)
        for b, row in enumerate(real):
            ids[b, row] = TOKENS[past[b] : past[b] + new[b]]
        held = np.arange(past.max())[None, :] < past[:, None]
        got = model.run(ids, np.concatenate([held, real], axis=1), None, cache)
        for b, row in enumerate(real):
            np.testing.assert_allclose(got[b, row], alone[b][past[b] : past[b] + new[b]], atol=1e-4)
        past += new


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (SourceGraph(), "positions; got counted by the graph itself"),
        (SourceGraph(rotary=DIM, positions=True), "queries of layer 0; got RoPE or QK norm inside the op"),
        (SourceGraph(qk_norm="fused", positions=True), "queries of layer 0; got RoPE or QK norm inside the op"),
    ],
    ids=["no positions", "rotary", "QK norm"],
)
def test_a_graph_that_can_not_be_compacted_says_so(source: SourceGraph, reason: str, tmp_path: Path) -> None:
    folder = rewrite_model(source.write(tmp_path / "source"), out=tmp_path / "out", recipe=EXACT)
    with pytest.raises(SkvError, match=reason):
        Session(folder, score_window=32)


def test_a_rewritten_model_with_positions_is_compacted(tmp_path: Path) -> None:
    folder = rewrite_model(SourceGraph(positions=True).write(tmp_path / "source"), out=tmp_path / "out", recipe=EXACT)
    model = Session(folder, score_window=32)
    tokens = np.random.default_rng(3).integers(3, VOCAB, 400).tolist()
    cache, whole = model.cache(), model.cache()
    for one in (cache, whole):
        model.run([tokens], None, None, one)
    keep = compaction.least_kept([x for layer in model.config.layers for x in (layer.key, layer.value)])
    model.compact(cache, keep=keep)
    assert cache.dropped[0] > 0 and cache.held[0] <= keep
    few, all_of_it = (model.run([tokens[:1]], None, None, one) for one in (cache, whole))
    assert np.isfinite(few).all() and 1e-3 < np.abs(few - all_of_it).max() < 10


def test_only_the_last_logits_of_an_unpadded_batch(tmp_path: Path) -> None:
    source = SourceGraph()
    model = source.model()
    head = next(node for node in model.graph.node if "logits" in node.output)
    ends = [helper.make_node("Slice", [head.input[0], "last", "end", "axis"], ["hidden"])]
    for name, value in (("last", -1), ("end", 2**31), ("axis", 1)):
        model.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [1], [value]))
    head.input[0] = "hidden"
    model.graph.node.insert(len(model.graph.node) - 1, ends[0])
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    path = source.write(tmp_path / "source", external=False)
    full = run_source(path, TOKENS[:9], [9])
    onnx.save(model, path)
    rewritten = session(path, tmp_path / "out")
    assert not rewritten.config.all_logits
    np.testing.assert_allclose(logits(rewritten, TOKENS[:9], [9]), full[-1:], atol=1e-4)
    with pytest.raises(SkvError, match="batches can't be padded"):
        rewritten.run([[5, 6], [7, 0]], [[1, 1], [1, 0]], None, rewritten.cache(2, 64))


# The node and the folder.


def test_recipe_is_applied_layer_by_layer(tmp_path: Path) -> None:
    recipe = Recipe.per_layer([(8, 4), (4, 2)], Recipe().with_options(tile_tokens=32, recent_tokens=32))
    source = SourceGraph(packed=True, rotary=DIM, attributes={"local_window_size": 100}).write(tmp_path / "source")
    out = rewrite_model(source, out=tmp_path / "out", recipe=recipe)
    model = onnx.load(out / "model.onnx", load_external_data=False)
    inputs = {value.name: value for value in model.graph.input}
    for index, node in enumerate(n for n in model.graph.node if n.domain == "skv"):
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        pair = CacheLayout.pair(recipe.layer(index), DIM, 100)
        assert (
            node.name == f"/model/layers.{index}/attn/QuantizedKVAttention" and node.op_type == "QuantizedKVAttention"
        )
        assert (attributes["k_bits"], attributes["v_bits"]) == ((8, 4), (4, 2))[index]
        assert attributes["num_heads"] == HEADS and attributes["kv_num_heads"] == KV_HEADS
        assert attributes["local_window_size"] == 100 and attributes["layout_version"] == 1
        assert attributes["tile_tokens"] == 32 and attributes["do_rotary"] == 1 and attributes["v_group_size"] == 32
        for part, layout in zip(("key", "value"), pair, strict=True):
            kind = inputs[f"past_key_values.{index}.{part}"].type.tensor_type
            widths = genai_config.cache_widths(pair)[part == "value"]
            assert kind.elem_type == TensorProto.UINT8 and kind.shape.dim[1].dim_value == KV_HEADS
            assert kind.shape.dim[3].dim_value == (widths or 0) and widths in (layout.width, None)
    assert {o.domain: o.version for o in model.opset_import}["skv"] == 1
    assert Recipe.load(out / "recipe.toml") == recipe
    assert Session(out).generate([TOKENS[:80]], max_new_tokens=4)


def test_masks_that_nobody_reads_are_gone(tmp_path: Path) -> None:
    source = SourceGraph("attention", mask="bool").write(tmp_path / "source")
    before = {node.op_type for node in graph_of(source).node}
    after = [node.op_type for node in graph_of(rewrite_model(source, out=tmp_path / "out") / "model.onnx").node]
    assert {"LessOrEqual", "And"} <= before and not {"LessOrEqual", "And", "Attention"} & set(after)
    assert "Range" in after  # the positions are still read


def test_repeated_heads_that_nobody_reads_are_gone(tmp_path: Path) -> None:
    """Also the Concats: their outputs, the graph's, are the op's now."""
    source = CARRIED["Attention after a Concat, heads repeated"].write(tmp_path / "source")
    before = [node.op_type for node in graph_of(source).node]
    graph = graph_of(rewrite_model(source, out=tmp_path / "out") / "model.onnx")
    after = [node.op_type for node in graph.node]
    assert before.count("Expand") == 4 and "Expand" not in after and "Attention" not in after
    assert [value.name for value in graph.output] == [value.name for value in graph_of(source).output]
    made = {name: node.op_type for node in graph.node for name in node.output}
    assert all(made[x.name] == "QuantizedKVAttention" for x in graph.output if x.name.startswith("present"))


@pytest.fixture(scope="module")
def torch_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama as ``torch.onnx.export`` writes it from transformers' own attention and DynamicCache, opset 23."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    config = tiny_config("llama", vocab_size=VOCAB, head_dim=DIM, num_key_value_heads=KV_HEADS)
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *past: Any) -> Any:
            cache = DynamicCache(config=config)
            for i in range(2):
                cache.update(past[2 * i], past[2 * i + 1], i)
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
            result = self.model(**inputs, past_key_values=cache, use_cache=True)
            return result.logits, *(x for layer in cache.layers for x in (layer.keys, layer.values))

    tokens, past, dynamic = 3, 5, torch.export.Dim.AUTO
    caches = [torch.zeros(2, KV_HEADS, past, DIM) for _ in range(4)]
    ids, mask = torch.ones(2, tokens, dtype=torch.long), torch.ones(2, past + tokens, dtype=torch.long)
    parts = [f"{i}.{part}" for i in range(2) for part in ("key", "value")]
    program = torch.onnx.export(
        Decoder().eval(), (ids, mask, ids.clone(), *caches), dynamo=True, opset_version=23, verbose=False,
        dynamic_shapes=(*[{0: dynamic, 1: dynamic}] * 3, tuple({0: dynamic, 2: dynamic} for _ in caches)),
        input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{x}" for x in parts)],
        output_names=["logits", *(f"present.{x}" for x in parts)],
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("torch")
    program.save(folder / "model.onnx", external_data=True)
    config.save_pretrained(folder)
    return folder / "model.onnx"


def test_what_torch_writes_is_carried_over(torch_export: Path, tmp_path: Path) -> None:
    """Its past is concatenated before Attention, its heads are repeated, its mask is transformers'."""
    nodes = [node.op_type for node in graph_of(torch_export).node]
    assert nodes.count("Attention") == 2 and "Expand" in nodes  # what this test is about
    model = session(torch_export, tmp_path / "out")
    np.testing.assert_allclose(logits(model, TOKENS, CHUNKS), run_source(torch_export, TOKENS, CHUNKS), atol=1e-4)
    assert Session(rewrite_model(torch_export, out=tmp_path / "k4v2")).generate([TOKENS], max_new_tokens=4)


def test_caches_get_the_names_of_the_ecosystem(tmp_path: Path) -> None:
    graph = SourceGraph()
    path = graph.write(tmp_path / "source", external=False)
    model = onnx.load(path)
    renamed = {f"past_key_values.{i}.{p}": f"past_{p}_{i}" for i in range(2) for p in ("key", "value")}
    renamed |= {f"present.{i}.{p}": f"present_{p}_{i}" for i in range(2) for p in ("key", "value")}
    for value in [*model.graph.input, *model.graph.output]:
        value.name = renamed.get(value.name, value.name)
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    onnx.save(model, path)
    expected = logits(session(graph.write(tmp_path / "same"), tmp_path / "a"), TOKENS, [120])
    assert np.array_equal(logits(session(path, tmp_path / "b"), TOKENS, [120]), expected)


def test_weights_are_shared_and_the_source_is_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[Path] = []
    copy = shutil.copyfile
    monkeypatch.setattr(shutil, "copyfile", lambda file, target: (copied.append(Path(file)), copy(file, target)))
    source = SourceGraph(rotary=DIM).write(tmp_path / "source").parent
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE"):
        (source / name).write_text(name)
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    before = digests(source)
    out = rewrite_model(source, out=tmp_path / "out", recipe=EXACT)
    assert digests(source) == before
    assert (source / "model.onnx.data").read_bytes() == (out / "model.onnx.data").read_bytes()
    assert source / "model.onnx.data" not in copied and source / "tokenizer.json" in copied
    assert {path.name for path in out.iterdir()} == {
        "model.onnx", "model.onnx.data", "config.json", "tokenizer.json", "chat_template.jinja", "LICENSE",
        "skv_config.json", "skv_files.json", "genai_config.json", "recipe.toml", "libskv_ops.so", "README.md",
    }  # fmt: skip
    assert (out / "LICENSE").read_text() == "LICENSE"
    assert (out / "model.onnx").stat().st_size < 32 << 10


@pytest.mark.parametrize("asked", [False, True])
def test_weights_are_copied(asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they can't be linked, or the caller wants a copy."""

    def refuse(*_: object) -> None:
        raise OSError("cross-device link")

    if not asked:
        monkeypatch.setattr(os, "link", refuse)
        monkeypatch.setattr(pipeline, "_clone", refuse)
    source = SourceGraph(rotary=DIM).write(tmp_path / "source").parent
    out = rewrite_model(source, out=tmp_path / "out", copy_weights=asked)
    assert not os.path.samefile(source / "model.onnx.data", out / "model.onnx.data")
    onnx.load(out / "model.onnx")  # it reads no weights that have several links
    assert (source / "model.onnx.data").read_bytes() == (out / "model.onnx.data").read_bytes()


def test_disk_full_while_copying_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    source = SourceGraph().write(tmp_path / "source")
    before = digests(tmp_path)
    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(SkvError, match="No space left"):
        rewrite_model(source, out=tmp_path / "out")
    assert digests(tmp_path) == before and not [p for p in tmp_path.iterdir() if p.name != "source"]


def test_target_is_checked(tmp_path: Path) -> None:
    source = SourceGraph().write(tmp_path / "source")
    out = rewrite_model(source, out=tmp_path / "out", recipe=EXACT)
    before = digests(out)
    with pytest.raises(SkvError, match="exists already"):
        rewrite_model(source, out=out)
    assert digests(out) == before
    rewrite_model(source, out=out, force=True)
    assert Session(out).config.layers[0].key.bits == 4
    again = tmp_path / "again"
    again.mkdir()
    with pytest.raises(SkvError, match="an exported folder, made from"):  # ours is not theirs
        rewrite_model(out, out=again, force=True)


@pytest.mark.parametrize("place", ["hub snapshot", "community folder", "weights inside", "subfolder of weights"])
def test_layouts_of_source_folders(place: str, tmp_path: Path) -> None:
    graph = SourceGraph(packed=True)
    source = tmp_path / "source"
    if place == "hub snapshot":
        graph.write(source / "blobs")
        source = source / "snapshots" / "0123abcd"
        source.mkdir(parents=True)
        for file in (tmp_path / "source" / "blobs").iterdir():
            (source / file.name).symlink_to(Path("../../blobs") / file.name)
    elif place == "community folder":
        graph.write(source / "onnx", name="model_q4.onnx")
        (source / "onnx" / "config.json").rename(source / "config.json")
    elif place == "weights inside":
        graph.write(source, external=False)
    else:
        path = graph.write(source)
        (source / "weights").mkdir()
        (source / "model.onnx.data").rename(source / "weights" / "0.bin")
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = "weights/0.bin" if entry.key == "location" else entry.value
        onnx.save(model, path)
    out = rewrite_model(source, out=tmp_path / "out", recipe=EXACT)
    expected = run_source(SourceGraph(packed=True).write(tmp_path / "plain"), TOKENS[:20], [20])
    np.testing.assert_allclose(logits(Session(out), TOKENS[:20], [20]), expected, atol=1e-4)
    assert not any(path.is_symlink() for path in out.rglob("*"))


def test_plan_says_what_will_be_written(tmp_path: Path) -> None:
    source = SourceGraph(packed=True).write(tmp_path / "source")
    before = digests(tmp_path)
    plan = pipeline.plan(source, Recipe())
    assert [[layout.bits for layout in layer.layouts] for layer in plan.layers] == [[4, 2]] * 2
    assert str(source) in plan.table() and "2 layers" in plan.table() and plan.recipe.dtype == "fp32"
    assert "onnxruntime-genai: runs this folder" in plan.table() and "K3V3 is the equal pair" in plan.table()
    assert plan.weight_bytes == (source.parent / "model.onnx.data").stat().st_size
    assert digests(tmp_path) == before
    read = Rewrite.read(source, Recipe())
    assert read.config.vocab_size == VOCAB and read.config.eos_token_id == (2,) and read.hidden_size == WIDTH


def test_what_is_an_onnx_model(tmp_path: Path) -> None:
    path = SourceGraph().write(tmp_path / "source")
    assert is_onnx(path) and is_onnx(path.parent)
    assert not is_onnx(tmp_path) and not is_onnx("org/name")
    (path.parent / "model.safetensors").touch()
    assert not is_onnx(path.parent) and is_onnx(path)


# onnxruntime-genai's configuration and costs.


def test_genai_config_keeps_what_is_not_ours(tmp_path: Path) -> None:
    source = SourceGraph(rotary=DIM).write(tmp_path / "source")
    given = {
        "model": {
            "type": "phi3", "context_length": 256, "eos_token_id": [2, 5], "pad_token_id": 3, "vocab_size": VOCAB,
            "decoder": {
                "hidden_size": WIDTH, "head_size": DIM, "filename": "old.onnx",
                "session_options": {"intra_op_num_threads": 3}, "sliding_window": {"window_size": 8},
                "inputs": {"past_key_names": "past_%d"},
            },
        },
        "search": {"temperature": 0.5, "past_present_share_buffer": False, "num_beams": 4, "max_length": 200},
    }  # fmt: skip
    (source.parent / "genai_config.json").write_text(json.dumps(given))
    out = rewrite_model(source, out=tmp_path / "out")
    written = json.loads((out / "genai_config.json").read_text())
    model, decoder, search = written["model"], written["model"]["decoder"], written["search"]
    assert model["type"] == "phi3" and model["eos_token_id"] == [2, 5] and model["context_length"] == 256
    assert decoder["session_options"]["custom_ops_library"] == "libskv_ops.so"
    assert decoder["session_options"]["intra_op_num_threads"] == 3 and "sliding_window" not in decoder
    assert decoder["filename"] == "model.onnx" and decoder["num_hidden_layers"] == 2
    assert decoder["inputs"] == {
        "input_ids": "input_ids", "attention_mask": "attention_mask",
        "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value",
    }  # fmt: skip
    assert search["temperature"] == 0.5 and search["max_length"] == 200
    assert search["past_present_share_buffer"] is True and search["num_beams"] == 1
    config = Session(out).config
    assert config.context_length == 256 and config.eos_token_id == (2, 5) and config.pad_token_id == 3


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("bits", [(4, 2), (4, 4), (3, 3), (2, 4), (8, 4), (16, 16), (1, 1)])
@pytest.mark.parametrize("window", [0, 300])
def test_capacity_in_genai_is_what_the_layout_says(head_dim: int, bits: tuple[int, int], window: int) -> None:
    pair = CacheLayout.pair(LayerConfig(*bits), head_dim, window)
    width = genai_config.row_bytes(pair)
    least = genai_config.least_length([pair], 4096)

    def held(length: int) -> int | None:
        sizes = [length * width for _ in pair]
        if any(size < x.full_rows * x.row_bytes for size, x in zip(sizes, pair, strict=True)):
            return 0
        return min((c for c in map(CacheLayout.capacity, pair, sizes) if c is not None), default=None)

    lengths = [1, 63, 64, 100, 300, 500, 512, 1000, 1024, 1500, 2000, 3000, 4096]
    assert [genai_config.capacity([pair], length) for length in lengths] == [held(length) for length in lengths]
    enough = [length for length in range(1, 4097) if (size := held(length)) is None or size >= length]
    missing = set(range(1, 4097)) - set(enough)
    assert least == (1 if not missing else max(missing) + 1 if max(missing) < 4096 else None)


def test_pairs_offered_for_genai() -> None:
    config = LayerConfig(4, 2)
    equal, free = genai_config.equal_pair(config, 128), genai_config.free_pair(config, 128)
    assert equal is not None and equal.name == "K3V3" and free.name == "K4V4"
    pair = CacheLayout.pair(config, 128)
    advice = genai_config.advice([config] * 3, [pair] * 3, 8192)
    assert "160 instead of 128 bytes" in advice and "K4V4" in advice and "K3V3" in advice and "in 3 of 3" in advice
    alike = genai_config.advice([free], [CacheLayout.pair(free, 128)], 8192)
    assert "instead" not in alike and "max_length of" in alike
    part = genai_config.advice([config], [pair], 512)
    assert "195 tokens of the context's 512" in part
    none = genai_config.advice([config], [pair], 16)
    assert "can't use this folder" in none and "16 tokens" in none and "runs" not in none
    assert genai_config.cache_widths(pair) == (80, None)
    assert genai_config.cache_widths(CacheLayout.pair(LayerConfig(2, 4), 128)) == (None, 80)
    assert genai_config.cache_widths(CacheLayout.pair(free, 128)) == (80, 80)


def test_genai_config_alone_says_what_the_exporter_needs() -> None:
    """A folder without a source's genai_config.json: every key that genai reads."""
    pair = CacheLayout.pair(LayerConfig(4, 2), 64)
    config = ModelConfig("unheard_of", "fp32", 100, 256, None, (), None, False, {}, (LayerCache(4, 2, 0, *pair),) * 3)
    values = genai_config.genai_config(config, 32, ["input_ids", "attention_mask", "position_ids"])
    assert (
        values["model"]["type"] == "decoder" and values["model"]["decoder"]["inputs"]["position_ids"] == "position_ids"
    )
    assert values["model"]["decoder"]["head_size"] == pair[0].width and values["search"]["max_length"] == 256
    assert values["model"]["eos_token_id"] == [] and values["model"]["pad_token_id"] == 0
    other = genai_config.genai_config(dataclasses.replace(config, eos_token_id=(7,)), 32, ["input_ids"])
    assert other["model"]["eos_token_id"] == 7 and other["model"]["pad_token_id"] == 7
