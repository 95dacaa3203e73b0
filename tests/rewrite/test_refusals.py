"""ONNX to ONNX: what is refused, node by node, and that no graph can read what it should not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from source_graphs import DIM, SourceGraph, digests

from skv_export.errors import SkvError
from skv_export.rewrite import source
from skv_export.rewrite.pipeline import Rewrite, rewrite_model
from skv_export.rewrite.surgery import rewrite_graph

pytestmark = pytest.mark.usefixtures("library")


# Refusals: each names its node.


def edit(change: Callable[[onnx.ModelProto], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        model = onnx.load(path, load_external_data=False)
        change(model)
        onnx.save(model, path)

    return apply


def attention_of(model: onnx.ModelProto, layer: int = 1) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == f"/layers.{layer}/attn")


def set_input(index: int, name: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        node = attention_of(model)
        node.input.extend([""] * (index + 1 - len(node.input)))
        node.input[index] = name

    return change


def insert_before_cache(model: onnx.ModelProto) -> None:
    node = attention_of(model)
    model.graph.node.insert(0, helper.make_node("Identity", [node.input[3]], ["copied"], name="between"))
    node.input[3] = "copied"


def read_present(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", ["present.1.key"], ["again"], name="reader"))
    model.graph.output.append(helper.make_tensor_value_info("again", TensorProto.FLOAT, None))


def rename_op(model: onnx.ModelProto) -> None:
    attention_of(model).op_type = "MultiHeadAttention"


def forget_shape(model: onnx.ModelProto) -> None:
    next(x for x in model.graph.input if x.name == "past_key_values.1.value").type.tensor_type.ClearField("shape")


def int8_cache(model: onnx.ModelProto) -> None:
    for value in [*model.graph.input, *model.graph.output]:
        if value.name.split(".")[0] in ("past_key_values", "present"):
            value.type.tensor_type.elem_type = TensorProto.INT8


def into_subgraph(model: onnx.ModelProto) -> None:
    node = attention_of(model)
    body = helper.make_graph([node], "then", [], [helper.make_tensor_value_info(x, 1, None) for x in node.output])
    branch = helper.make_node("If", ["flag"], list(node.output), name="branch", then_branch=body, else_branch=body)
    model.graph.initializer.append(helper.make_tensor("flag", TensorProto.BOOL, [], [True]))
    place = list(model.graph.node).index(node)
    model.graph.node.remove(node)
    model.graph.node.insert(place, branch)


def concat(**options: Any) -> SourceGraph:
    return SourceGraph("attention", mask="bool", **{"heads_first": True, "concat": "repeated", **options})


def feeding(model: onnx.ModelProto, index: int, op: str) -> onnx.NodeProto:
    """The node of a kind that is nearest before an input of the second layer's attention."""
    made = {output: node for node in model.graph.node for output in node.output}
    node = made[attention_of(model).input[index]]
    while node.op_type != op:
        node = made[node.input[0]]
    return node


def tiled_heads(model: onnx.ModelProto) -> None:
    """The heads one after the other, and again, in place of each one several times."""
    model.graph.initializer.append(helper.make_tensor("before_heads", TensorProto.INT64, [1], [1]))
    feeding(model, 1, "Unsqueeze").input[1] = "before_heads"
    shape = next(n for n in model.graph.node if feeding(model, 1, "Expand").input[1] in n.output)
    shape.input[1], shape.input[2] = shape.input[2], shape.input[1]


def new_before_past(model: onnx.ModelProto) -> None:
    node = feeding(model, 2, "Concat")
    node.input[:] = list(node.input)[::-1]


def along_heads(model: onnx.ModelProto) -> None:
    feeding(model, 1, "Concat").attribute[0].i = 1


def no_concat(model: onnx.ModelProto) -> None:
    node = feeding(model, 1, "Concat")
    node.op_type = "ScatterND"
    node.ClearField("attribute")


def read_repeated(model: onnx.ModelProto) -> None:
    name = attention_of(model).input[1]
    model.graph.node.append(helper.make_node("Identity", [name], ["again"], name="reader"))
    model.graph.output.append(helper.make_tensor_value_info("again", TensorProto.FLOAT, None))


def own_present(model: onnx.ModelProto) -> None:
    attention_of(model).output.append("again")
    model.graph.output.append(helper.make_tensor_value_info("again", TensorProto.FLOAT, None))


def gqa(**attributes: Any) -> SourceGraph:
    return SourceGraph(attributes=attributes)


bias = np.zeros((1, 1, 1, 1), np.float32)
REFUSED: dict[str, tuple[SourceGraph, Callable[[onnx.ModelProto], object] | None, str]] = {
    "attention_bias": (SourceGraph(extra={10: bias}), None, "input attention_bias"),
    "k_scale": (SourceGraph(extra={12: bias}), None, "input k_scale"),
    "v_scale": (SourceGraph(extra={13: bias}), None, "input v_scale"),
    "bidirectional": (gqa(causal=0), None, "causal = 0"),
    "scores": (gqa(qk_output=1), None, "qk_output = 1"),
    "4-bit cache": (gqa(kv_cache_bit_width=4), None, "quantized already"),
    "static scales": (gqa(k_quant_type="PER_TENSOR"), None, "k_quant_type = PER_TENSOR"),
    "window of 0": (gqa(local_window_size=0), None, "local_window_size = 0"),
    "new attribute": (gqa(sparsity=2), None, "unknown attribute sparsity"),
    "negative scale": (gqa(scale=-1.0), None, "scale = -1"),
    "heads": (gqa(num_heads=3), None, "3 query heads on 2"),
    "cache heads": (gqa(num_heads=4, kv_num_heads=1), None, "has 2 heads, the node 1"),
    "epsilons": (
        SourceGraph(qk_norm="fused", attributes={"q_norm_epsilon": 1e-5, "k_norm_epsilon": 1e-6}),
        None,
        "q_norm_epsilon and k_norm_epsilon differ",
    ),
    "one norm": (SourceGraph(qk_norm="fused"), set_input(15, ""), "only one of q_norm_weight"),
    "rotary without tables": (SourceGraph(rotary=DIM), set_input(8, ""), "do_rotary without"),
    "no past": (SourceGraph(), set_input(3, ""), "no input past_key"),
    "no lengths": (SourceGraph(), set_input(5, ""), "no input seqlens_k"),
    "another layer's values": (SourceGraph(), set_input(2, ""), "only one of key and value"),
    "another layer's cache": (SourceGraph(), set_input(3, "past_key_values.0.key"), "is read by node"),
    "cache is computed": (SourceGraph(), insert_before_cache, "no input of the graph but comes from node 'between'"),
    "present is read": (SourceGraph(), read_present, "present_key is read by node 'reader'"),
    "no shape": (SourceGraph(), forget_shape, "has no shape of four dimensions"),
    "int8 cache": (SourceGraph(), int8_cache, "is it quantized already"),
    "multi-head": (SourceGraph(), rename_op, "MultiHeadAttention is no GroupQueryAttention"),
    "branches": (SourceGraph(), into_subgraph, "stands in a subgraph"),
    "Attention without mask": (SourceGraph("attention", attributes={"is_causal": 0}), None, "both directions"),
    "Concat, is_causal": (concat(attributes={"is_causal": 1}), None, "new tokens see the first keys only"),
    "Concat, heads tiled": (concat(), tiled_heads, "is not the cache with each head repeated 2 times"),
    "Concat, new tokens first": (concat(), new_before_past, "past_value is no input of the graph but comes from node"),
    "Concat along heads": (concat(), along_heads, "no Concat of past_key and new along tokens"),
    "Concat, present is read": (concat(), read_present, "present_key is read by node 'reader'"),
    "Concat, repeated is read": (concat(), read_repeated, "is read by others too"),
    "Concat, its own present": (concat(), own_present, "its cache is never read"),
    "static cache": (
        concat(),
        no_concat,
        "(ScatterND): export the model with its past as inputs",
    ),
    "no cache": (concat(), set_input(1, "past_key_values.1.key"), "its key comes from no node: export the model with"),
    "Attention with lengths": (SourceGraph("attention"), set_input(6, "scalar"), "nonpad_kv_seqlen"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rewritten_is_named(name: str, tmp_path: Path) -> None:
    graph, change, message = REFUSED[name]
    path = graph.write(tmp_path / "source")
    if change is not None:
        edit(change)(path)
    before = digests(tmp_path)
    with pytest.raises(SkvError, match="attention nodes can't be rewritten") as error:
        rewrite_model(path, out=tmp_path / "out")
    assert message in str(error.value) and "/layers.1/attn: " in str(error.value)
    assert digests(tmp_path) == before and not (tmp_path / "out").exists()


def test_every_refused_node_is_named(tmp_path: Path) -> None:
    path = SourceGraph(extra={10: bias}, layers=3).write(tmp_path / "source")
    with pytest.raises(SkvError, match="3 of 3 attention nodes") as error:
        rewrite_model(path, out=tmp_path / "out")
    assert all(f"/layers.{i}/attn: has an input attention_bias" in str(error.value) for i in range(3))


def alibi(model: onnx.ModelProto) -> None:
    """A bias instead of a mask: -1 times the distance."""
    node = next(n for n in model.graph.node if "attn_mask" in n.output)
    node.output[0] = "seen_only"
    far = next(n for n in model.graph.node if n.op_type == "LessOrEqual")
    made = [
        helper.make_node("Sub", list(far.input), ["distance"], name="distance"),
        helper.make_node("Cast", ["distance"], ["slope"], name="slope", to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["slope", "axes01"], ["attn_mask"], name="alibi"),
    ]
    model.graph.initializer.append(helper.make_tensor("axes01", TensorProto.INT64, [2], [0, 1]))
    place = list(model.graph.node).index(node)
    for i, extra in enumerate(made):
        model.graph.node.insert(place + 1 + i, extra)


def bidirectional(model: onnx.ModelProto) -> None:
    next(n for n in model.graph.node if n.op_type == "LessOrEqual").op_type = "GreaterOrEqual"


def hidden_states(model: onnx.ModelProto) -> None:
    node = next(n for n in model.graph.node if "attn_mask" in n.output)
    node.input[1] = "embedding"


@pytest.mark.parametrize(
    ("change", "message"),
    [(alibi, "adds a bias"), (bidirectional, "neither causal nor"), (hidden_states, "depends on weights")],
)
def test_masks_that_mean_something_else(
    change: Callable[[onnx.ModelProto], object], message: str, tmp_path: Path
) -> None:
    path = SourceGraph("attention", mask="bool").write(tmp_path / "source")
    edit(change)(path)
    with pytest.raises(SkvError, match="can't be rewritten") as error:
        rewrite_model(path, out=tmp_path / "out")
    assert message in str(error.value)


# Graphs that are damaged, or want what is not theirs.


def external(key: str, value: str | None, name: str = "head") -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(x for x in model.graph.initializer if x.name == name)
        for entry in [e for e in tensor.external_data if e.key == key]:
            tensor.external_data.remove(entry)
        if value is not None:
            tensor.external_data.add(key=key, value=value)

    return change


def cycle(model: onnx.ModelProto) -> None:
    attention_of(model, 0).input[0] = "attended.1"


def undefined(model: onnx.ModelProto) -> None:
    attention_of(model).input[0] = "nowhere"


def negative_shape(model: onnx.ModelProto) -> None:
    next(x for x in model.graph.initializer if x.name == "head").dims[0] = -4


def huge_shape(model: onnx.ModelProto) -> None:
    next(x for x in model.graph.initializer if x.name == "head").dims[:] = [1 << 62, 1 << 62]


def hidden_in_a_branch(model: onnx.ModelProto) -> None:
    """External data of a constant in a subgraph."""
    tensor = TensorProto(name="secret", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    constant = helper.make_node("Constant", [], ["secret"], value=tensor)
    body = helper.make_graph([constant], "then", [], [helper.make_tensor_value_info("secret", 1, [1])])
    model.graph.initializer.append(helper.make_tensor("flag", TensorProto.BOOL, [], [True]))
    model.graph.node.append(helper.make_node("If", ["flag"], ["x"], name="if", then_branch=body, else_branch=body))


def other_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1]))


def other_state(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("past_conv.0", TensorProto.FLOAT, [1, 2, 3, 4]))


def skip_a_layer(model: onnx.ModelProto) -> None:
    for value in [*model.graph.input, *model.graph.output]:
        value.name = value.name.replace(".1.", ".5.")
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [x.replace(".1.", ".5.") if x.startswith(("past_", "present")) else x for x in names]


def no_attention(model: onnx.ModelProto) -> None:
    for layer in range(2):
        attention_of(model, layer).domain = "custom"


def no_logits(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "scores"
    next(n for n in model.graph.node if "logits" in n.output).output[0] = "scores"


def remove_weights(path: Path) -> None:
    (path.parent / "model.onnx.data").unlink()


def cut_weights(path: Path) -> None:
    data = path.parent / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])


def link_outside(path: Path) -> None:
    data = path.parent / "model.onnx.data"
    outside = data.rename(path.parent.parent / "elsewhere")
    data.symlink_to(outside)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-77])


def several(path: Path) -> None:
    path.rename(path.parent / "a.onnx")
    (path.parent / "b.onnx").write_bytes(b"")


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "path traversal": (edit(external("location", "../../etc/passwd")), "outside the model's folder"),
    "traversal inside": (edit(external("location", "weights/../../secret")), "outside the model's folder"),
    "absolute path": (edit(external("location", "/etc/passwd")), "outside the model's folder"),
    "drive letter": (edit(external("location", "C:/secret")), "outside the model's folder"),
    "backslashes": (edit(external("location", "..\\secret")), "outside the model's folder"),
    "no location": (edit(external("location", None)), "outside the model's folder"),
    "memory address": (edit(external("location", "*/_ORT_MEM_ADDR_/*")), "the file is missing"),
    "link outside": (link_outside, "a link that leads outside"),
    "in a subgraph": (edit(hidden_in_a_branch), "outside the model's folder"),
    "a file we write": (edit(external("location", "config.json")), "beyond the end of config.json"),
    "missing weights": (remove_weights, "the file is missing"),
    "weights cut short": (cut_weights, "beyond the end of model.onnx.data"),
    "offset beyond the end": (edit(external("offset", str(1 << 50))), "beyond the end of model.onnx.data"),
    "negative offset": (edit(external("offset", "-8")), "expected numbers of bytes"),
    "offset is no number": (edit(external("offset", "0x10")), "expected numbers of bytes"),
    "length of another shape": (edit(external("length", "12")), "expected 32768 for [128, 64]"),
    "negative shape": (edit(negative_shape), "expected no negative sizes"),
    "huge shape": (edit(huge_shape), "length"),
    "cycle": (edit(cycle), "the graph has a cycle"),
    "undefined value": (edit(undefined), "'nowhere', which nothing defines"),
    "truncated": (truncate, "not an ONNX file"),
    "empty": (lambda path: path.write_bytes(b""), "not an ONNX file"),
    "no protobuf": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)), "not an ONNX file"),
    "no configuration": (lambda path: (path.parent / "config.json").unlink(), "no configuration beside the graph"),
    "broken configuration": (lambda path: (path.parent / "config.json").write_text("{"), "not valid JSON"),
    "no context length": (lambda path: (path.parent / "config.json").write_text('{"hidden_size": 8}'), "is unknown"),
    "other input": (edit(other_input), "use_cache_branch"),
    "other state": (edit(other_state), "past_conv.0"),
    "hybrid": (edit(skip_a_layer), "caches of the layers [0, 5]"),
    "no attention": (edit(no_attention), "no attention to rewrite"),
    "no logits": (edit(no_logits), "expected logits"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_damaged_and_hostile_graphs(name: str, tmp_path: Path) -> None:
    damage, message = HOSTILE[name]
    path = SourceGraph().write(tmp_path / "source")
    damage(path)
    before = digests(tmp_path)
    with pytest.raises(SkvError) as error:
        rewrite_model(path, out=tmp_path / "out")
    assert message in str(error.value) and str(path.parent) in str(error.value)
    assert digests(tmp_path) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("op", ["gqa", "attention", "concat"])
def test_flipped_bits_are_errors_or_harmless(op: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the bytes say, nothing but a SkvError comes out, and what passes can be rewritten."""
    caplog.set_level("CRITICAL", "onnx_ir")
    graphs = {"gqa": SourceGraph(), "attention": SourceGraph("attention", mask="bool"), "concat": concat()}
    path = dataclasses.replace(graphs[op], layers=1).write(tmp_path / "source")
    original, rng, refused = path.read_bytes(), np.random.default_rng(1), 0
    for _ in range(150):
        changed = bytearray(original)
        for place in rng.integers(0, len(original), rng.integers(1, 4)):
            changed[place] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(changed)
        try:
            read = Rewrite.read(path)
        except SkvError:
            refused += 1
            continue
        rewrite_graph(read.source.graph, read.layers)
        ir.to_proto(read.source.graph)
    assert 50 < refused < 150


def test_a_loop_in_a_mask_is_not_run(tmp_path: Path) -> None:
    def loop(model: onnx.ModelProto) -> None:
        body = helper.make_graph(
            [helper.make_node("Identity", ["go"], ["goes"]), helper.make_node("Identity", ["seen"], ["sees"])],
            "forever",
            [helper.make_tensor_value_info(n, t, None) for n, t in (("i", 7), ("go", 9), ("seen", 9))],
            [helper.make_tensor_value_info(n, 9, None) for n in ("goes", "sees")],
        )
        node = next(n for n in model.graph.node if "attn_mask" in n.output)
        node.output[0] = "once"
        model.graph.initializer.append(helper.make_tensor("true", TensorProto.BOOL, [], [True]))
        place = list(model.graph.node).index(node)
        forever = helper.make_node("Loop", ["", "true", "once"], ["attn_mask"], name="forever", body=body)
        model.graph.node.insert(place + 1, forever)

    path = SourceGraph("attention", mask="bool").write(tmp_path / "source")
    edit(loop)(path)
    with pytest.raises(SkvError, match="depends on a branch or loop, 'forever'"):
        rewrite_model(path, out=tmp_path / "out")


def test_folders_without_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SkvError, match="no ONNX model there"):
        rewrite_model(tmp_path / "nothing.onnx", out=tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SkvError, match="no ONNX model in this folder"):
        rewrite_model(tmp_path / "empty", out=tmp_path / "out")
    path = SourceGraph().write(tmp_path / "source")
    with pytest.raises(SkvError, match="holds what no export wrote"):
        rewrite_model(path, out=path.parent, force=True)
    monkeypatch.setattr(source, "MAX_GRAPH_BYTES", 1000)
    with pytest.raises(SkvError, match="too large for an ONNX file"):
        rewrite_model(path, out=tmp_path / "out")
    several(path)
    with pytest.raises(SkvError, match="several ONNX models"):
        rewrite_model(path.parent, out=tmp_path / "out")
