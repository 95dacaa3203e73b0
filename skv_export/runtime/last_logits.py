"""Graphs that return the logits of several tokens of a call, made in memory from one that returns the last token's.

An exported graph picks the hidden states of each sequence's last token before the output embedding. Variants pick more
of them, or all, and use the folder's weights; they are for calls without padding, where the tokens stand in order.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from skv_export.errors import SkvError, require_module
from skv_export.model_folder.names import LOGITS, MODEL_FILE
from skv_export.spec.op import DOMAIN

if TYPE_CHECKING:
    import onnx

_GATHERS = ("GatherElements", "GatherND", "Gather")
_END = (1 << 63) - 1


def with_logits(path: Path, count: int | None) -> onnx.ModelProto:
    """Reads a graph that returns the last token's logits and makes it return more; weights stay beside it.

    Args:
        path: The graph.
        count: Of how many last tokens, or of all of a shorter call; None = of all tokens.

    Returns:
        The graph; its logits are ``[B, min(S, count), vocab_size]``.

    Raises:
        SkvError: The package onnx or the file is missing, or the graph does not pick hidden states where it is expected
            to.
    """
    require_module("onnx", "logits of several tokens")
    import onnx

    if not path.is_file():
        raise SkvError(f"{path}: no such file", fix="Export the model with `skv-export model`.")
    model = onnx.load(path, load_external_data=False)
    gather = last_token_gather(model.graph, path)
    hidden, picked = gather.input[0], gather.output[0]
    if count is None:
        for node in model.graph.node:
            for i, name in enumerate(node.input):
                if name == picked:
                    node.input[i] = hidden
        model.graph.node.remove(gather)
    else:
        bounds = {"start": -count, "end": _END, "axis": 1}
        for name, value in bounds.items():
            number = onnx.helper.make_tensor(f"{picked}.{name}", onnx.TensorProto.INT64, [1], [value])
            model.graph.initializer.append(number)
        inputs = [hidden, *(f"{picked}.{name}" for name in bounds)]
        gather.CopyFrom(onnx.helper.make_node("Slice", inputs, [picked], name=gather.name))
    del model.graph.value_info[:]  # the shapes behind the gather are others now
    for output in model.graph.output:
        if output.name == LOGITS:
            output.type.tensor_type.shape.dim[1].Clear()
            output.type.tensor_type.shape.dim[1].dim_param = "sequence_length" if count is None else "logits_length"
    return model


def last_token_gather(graph: onnx.GraphProto, path: Path) -> onnx.NodeProto:
    """The node nearest to the logits that picks hidden states, searching backwards up to the attention ops."""
    makers = {name: node for node in graph.node for name in node.output}
    weights = {tensor.name for tensor in graph.initializer}
    queue, seen = deque([LOGITS]), {LOGITS}
    while queue:
        node = makers.get(queue.popleft())
        if node is None or node.domain == DOMAIN:
            continue
        if node.op_type in _GATHERS and node.input[0] not in weights:
            return node
        queue.extend(name for name in node.input if name not in seen)
        seen.update(node.input)
    raise SkvError(
        f"{path}: no node picks the last token's hidden states",
        expected=" or ".join(_GATHERS),
        fix=f"Export with --all-logits: {MODEL_FILE} returns those of every token then.",
    )
