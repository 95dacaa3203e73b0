"""Replaces the attention nodes of a graph in memory by ``skv::QuantizedKVAttention``, with the inputs that it needs.

GroupQueryAttention keeps its inputs one by one. A standard Attention gets its lengths from the attention mask, and the
nodes that computed its mask are removed, as are those that concatenated the past and the new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from skv_export.model_folder.genai_config import cache_widths
from skv_export.model_folder.names import ATTENTION_MASK, INPUT_IDS, LOGITS, TENSORS, past_name, present_name
from skv_export.rewrite.attention_nodes import AttentionNode
from skv_export.spec.op import DOMAIN, INPUT_NAMES, OP_NAME, OP_VERSION, LayerAttention, in_order

_PREFIX = "skv"


@dataclass(frozen=True)
class Layer:
    """One layer of a rewrite.

    Attributes:
        attention: The node as it was read.
        op: The new node's attributes: parameters and layouts.
    """

    attention: AttentionNode
    op: LayerAttention


def rewrite_graph(model: ir.Model, layers: Sequence[Layer]) -> None:
    """Replaces the attention nodes of a model by the op, in memory.

    The caches become uint8 ``[batch, num_key_value_heads, rows, W]``; weights stay references to the same files.
    """
    surgery = Surgery(model.graph)
    for index, layer in enumerate(layers):
        surgery.past_shapes(layer)
        surgery.attention(layer)
        surgery.caches(layer, index)
    surgery.drop_unread()
    surgery.float_logits()
    model.graph.opset_imports[DOMAIN] = OP_VERSION
    model.graph.sort()


class Surgery:
    """The graph being changed, and the nodes that are added once for all layers.

    Args:
        graph: The main graph; it is changed.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._names = {value.name for node in graph.all_nodes() for value in node.outputs} | set(graph.initializers)
        self._shared: dict[str, ir.Value] = {}
        self._unread: set[ir.Value] = set()

    # The node.

    def attention(self, layer: Layer) -> None:
        """Turns an attention node into the op; it keeps its name, outputs and, for GroupQueryAttention, inputs."""
        node, attention = layer.attention.node, layer.attention
        given: dict[str, ir.Value | None]
        if attention.is_gqa:
            given = dict(zip(INPUT_NAMES, node.inputs, strict=False))
            if not layer.op.params.do_rotary:
                given |= dict.fromkeys(("cos_cache", "sin_cache", "position_ids"))
        else:
            new = [node.inputs[0], *(attention.new or node.inputs[1:3])]
            given = dict(zip(("query", "key", "value"), new, strict=True))
            if attention.heads_first:
                given = {name: self._tokens_first(node, x) for name, x in given.items()}
            given |= dict(zip(("past_key", "past_value"), attention.past, strict=True))
            given |= {"seqlens_k": self.seqlens_k, "total_sequence_length": self.total_sequence_length}
        if attention.smooth_softmax:
            zeros = np.zeros(layer.op.params.num_heads, attention.dtype.numpy())
            given["head_sink"] = self._initializer(f"{node.name}.head_sink", zeros)
        if any(value.name == ATTENTION_MASK for value in self.graph.inputs):
            given["query_seqlens"] = self.query_seqlens
        inputs = in_order(given)
        if attention.heads_first:
            self._heads_first(node, layer)
        if attention.new:
            self._present_outputs(node, attention)
        if not attention.is_gqa:
            self._unread.update(x for x in node.inputs[1:4] if x is not None)
        node.domain, node.op_type, node.version = DOMAIN, OP_NAME, OP_VERSION
        node.resize_inputs(len(inputs))
        for i, value in enumerate(inputs):
            node.replace_input_with(i, value)
        node.attributes.clear()
        node.attributes.update({a.name: a for a in ir.convenience.convert_attributes(layer.op.attributes())})

    def _tokens_first(self, node: ir.Node, value: ir.Value | None) -> ir.Value:
        """``[B, heads, S, D]`` to ``[B, S, heads * D]``."""
        assert value is not None
        turned = self._add("Transpose", [value], before=node, perm=[0, 2, 1, 3])
        return self._add("Reshape", [turned, self._constant("tokens_first", [0, 0, -1])], before=node)

    def _heads_first(self, node: ir.Node, layer: Layer) -> None:
        """Converts the output back: ``[B, S, N * D]`` to ``[B, N, S, D]``."""
        output = node.outputs[0]
        name, shape, graph_output = output.name, output.shape, output.is_graph_output()
        heads, size = layer.op.params.num_heads, layer.attention.head_dim
        split_shape = self._constant(f"heads_first_{heads}_{size}", [0, 0, heads, size])
        split = ir.Node("", "Reshape", [output, split_shape], name=self._unique(f"{node.name}/Reshape"))
        turned = ir.Node(
            "",
            "Transpose",
            [split.outputs[0]],
            [ir.AttrInt64s("perm", [0, 2, 1, 3])],
            name=self._unique(f"{node.name}/Transpose"),
        )
        self.graph.insert_after(node, [split, turned])
        result = turned.outputs[0]
        result.type, result.shape = output.type, shape
        output.replace_all_uses_with(result, replace_graph_outputs=graph_output)
        split.replace_input_with(0, output)
        output.name, output.shape = self._unique(f"{name}/tokens_first"), None
        split.outputs[0].name = self._unique(f"{name}/split")
        result.name = name

    def _present_outputs(self, node: ir.Node, attention: AttentionNode) -> None:
        """Makes the graph return the node's own presents instead of those of the Concats before it."""
        node.resize_outputs(1)
        node.resize_outputs(3)
        for made, output in zip(attention.present, node.outputs[1:], strict=True):
            output.name = self._unique(f"{made.name}/own")
            self.graph.outputs[list(self.graph.outputs).index(made)] = output

    # The caches.

    def caches(self, layer: Layer, index: int) -> None:
        """Gives the inputs and outputs of a layer's cache their new type and shape, and the usual names."""
        past, present = layer.attention.past, layer.attention.node.outputs[1:3]
        widths = cache_widths(layer.op.layouts)
        for kind, source, result, width in zip(TENSORS, past, present, widths, strict=True):
            batch = source.shape[0] if source.shape is not None else None
            size = width if width is not None else f"cache_width.{index}.{kind}"
            for value, name in ((source, past_name), (result, present_name)):
                value.type = ir.TensorType(ir.DataType.UINT8)
                value.shape = ir.Shape([batch, layer.op.params.kv_num_heads, f"cache_rows.{index}.{kind}", size])
                value.name = name(index, kind)

    def past_shapes(self, layer: Layer) -> None:
        """Gives nodes that read a past's shape the shape that it had in the source: ``[B, N_kv, tokens, D]``."""
        for past in layer.attention.past:
            for reader in [node for node in past.consumers() if node.op_type == "Shape"]:
                kept = self._add("Slice", [reader.outputs[0], *self._span(0, 2)])
                width = self._constant(f"head_dim_{layer.attention.head_dim}", [layer.attention.head_dim])
                whole = self._add("Concat", [kept, self.past_length, width], axis=0)
                start = reader.attributes["start"].as_int() if "start" in reader.attributes else 0
                end = reader.attributes["end"].as_int() if "end" in reader.attributes else 4
                part = self._add("Slice", [whole, *self._span(start, end)])
                uses = [use for use in reader.outputs[0].uses() if use.node is not kept.producer()]
                reader.attributes.clear()
                for use in uses:
                    use.node.replace_input_with(use.idx, part)

    def drop_unread(self) -> None:
        """Removes nodes whose results attention no longer reads: masks grow with the square of the length."""
        pending = [value.producer() for value in self._unread]
        while pending:
            node = pending.pop()
            if node is None or node.graph is not self.graph:
                continue
            if any(value.uses() or value.is_graph_output() for value in node.outputs):
                continue
            makers = [value.producer() for value in node.inputs if value is not None]
            self.graph.remove(node, safe=True)
            pending += makers

    def float_logits(self) -> None:
        """Makes the logits float32, whatever the model computes in."""
        for index, value in enumerate(self.graph.outputs):
            if value.name == LOGITS and value.dtype != ir.DataType.FLOAT:
                value.name = self._unique(f"{_PREFIX}/{LOGITS}")
                cast = self._add("Cast", [value], to=ir.DataType.FLOAT)
                cast.name, cast.type, cast.shape = LOGITS, ir.TensorType(ir.DataType.FLOAT), value.shape
                self.graph.outputs[index] = cast

    # Lengths, from the mask.

    @property
    def mask(self) -> ir.Value:
        """The graph's attention_mask ``[B, past + S]``; a graph without one gets it."""
        for value in self.graph.inputs:
            if value.name == ATTENTION_MASK:
                return value
        shape = ir.Shape(["batch_size", "total_sequence_length"])
        value = ir.Value(name=ATTENTION_MASK, shape=shape, type=ir.TensorType(ir.DataType.INT64))
        self.graph.inputs.insert(1, value)
        return value

    @property
    def seqlens_k(self) -> ir.Value:
        """int32 ``[B]``: each sequence's tokens after this call, minus 1."""

        def build() -> ir.Value:
            mask = self._add("Cast", [self.mask], to=ir.DataType.INT64)
            total = self._add("ReduceSum", [mask, self._constant("axis_1", [1])], keepdims=0)
            return self._add("Cast", [self._add("Sub", [total, self._constant("one", [1])])], to=ir.DataType.INT32)

        return self._once("seqlens_k", build)

    @property
    def total_sequence_length(self) -> ir.Value:
        """int32 scalar: the mask's columns."""

        def build() -> ir.Value:
            columns = self._add("Shape", [self.mask], start=1, end=2)
            scalar = self._add("Squeeze", [columns, self._constant("axis_0", [0])])
            return self._add("Cast", [scalar], to=ir.DataType.INT32)

        return self._once("total_sequence_length", build)

    @property
    def query_seqlens(self) -> ir.Value:
        """int32 ``[B]``: each sequence's new tokens. Without it, a sequence without any would count padding as one."""

        def build() -> ir.Value:
            ids = next(x for x in self.graph.inputs if x.name == INPUT_IDS)
            start = self._add("Neg", [self._add("Shape", [ids], start=1, end=2)])
            axis = self._constant("axis_1", [1])
            new = self._add("Slice", [self.mask, start, self._constant("end", [np.iinfo(np.int64).max]), axis])
            new = self._add("Cast", [new], to=ir.DataType.INT64)
            return self._add("Cast", [self._add("ReduceSum", [new, axis], keepdims=0)], to=ir.DataType.INT32)

        return self._once("query_seqlens", build)

    @property
    def past_length(self) -> ir.Value:
        """int64 ``[1]``: the mask's columns before the new tokens."""

        def build() -> ir.Value:
            ids = next(x for x in self.graph.inputs if x.name == INPUT_IDS)
            sizes = [self._add("Shape", [x], start=1, end=2) for x in (self.mask, ids)]
            return self._add("Sub", sizes)

        return self._once("past_length", build)

    # Building.

    def _once(self, name: str, build: Callable[[], ir.Value]) -> ir.Value:
        if name not in self._shared:
            self._shared[name] = build()
        return self._shared[name]

    def _add(self, op: str, inputs: Sequence[ir.Value], before: ir.Node | None = None, **attributes: Any) -> ir.Value:
        name = self._unique(f"{_PREFIX}/{op}")
        node = ir.node(op, inputs, attributes=attributes, name=name)
        node.outputs[0].name = self._unique(f"{name}/output")
        if before is None:
            self.graph.append(node)  # sorted at the end
        else:
            self.graph.insert_before(before, node)
        return node.outputs[0]

    def _span(self, start: int, end: int) -> tuple[ir.Value, ir.Value]:
        return self._constant(f"from_{start}", [start]), self._constant(f"to_{end}", [end])

    def _constant(self, name: str, values: list[int]) -> ir.Value:
        array = np.array(values, np.int64)
        return self._once(f"constant {name}", lambda: self._initializer(f"{_PREFIX}/{name}", array))

    def _initializer(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        name = self._unique(name)
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _unique(self, name: str) -> str:
        unique, count = name, 0
        while unique in self._names:
            count += 1
            unique = f"{name}_{count}"
        self._names.add(unique)
        return unique
