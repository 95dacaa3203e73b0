"""The queries of a call's last tokens, which the op keeps to itself: graphs that return them, and what came of them.

``Session.compact`` asks them what the next tokens will look at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from skv_export.errors import SkvError
from skv_export.model_folder.names import past_name
from skv_export.spec.op import DOMAIN, INPUT_NAMES

if TYPE_CHECKING:
    import onnx

MAX_WINDOW = 1024
_END = (1 << 63) - 1


@dataclass(frozen=True)
class QueryOutput:
    """A layer's queries as an output of the graph.

    Attributes:
        name: The output's, float32 ``[B, S, width]``; where the op takes packed QKV, the queries come first.
        width: Numbers of a token.
        scale: The op's attribute.
        softcap: The same.
    """

    name: str
    width: int
    scale: float
    softcap: float


def with_queries(
    model: onnx.ModelProto, widths: Mapping[int, int], window: int, what: object
) -> tuple[onnx.ModelProto, list[QueryOutput]]:
    """Makes a graph return the queries of each call's last tokens, in place.

    Args:
        model: The graph.
        widths: Numbers of a token's queries, N * head_dim, by the layer's number in the model.
        window: Of how many last tokens, or of all of a shorter call.
        what: Names the graph in errors.

    Returns:
        The graph, and its new outputs, by layer.

    Raises:
        SkvError: A layer's op turns queries itself (RoPE, QK norm), as in some rewritten graphs.
    """
    from onnx import TensorProto, helper

    graph, found = model.graph, list[QueryOutput]()
    nodes = {node.input[INPUT_NAMES.index("past_key")]: node for node in graph.node if node.domain == DOMAIN}
    for name, value in {"start": -window, "end": _END, "axis": 1, "channel": 0, "channels": 2}.items():
        graph.initializer.append(helper.make_tensor(f"skv.queries.{name}", TensorProto.INT64, [1], [value]))
    for i, width in widths.items():
        node = nodes[past_name(i, "key")]
        attributes = {x.name: helper.get_attribute_value(x) for x in node.attribute}
        inputs = dict(zip(INPUT_NAMES, node.input, strict=False))
        if attributes.get("do_rotary") or inputs.get("q_norm_weight"):
            raise SkvError(
                f"{what}: queries of layer {i}",
                got="RoPE or QK norm inside the op",
                expected="both before it, as exports of checkpoints have them",
                fix="Export the checkpoint itself.",
            )
        output = QueryOutput(f"queries.{i}", width, attributes["scale"], attributes["softcap"])
        last, cut = f"{output.name}.last", f"{output.name}.cut"
        stop = helper.make_tensor(f"{output.name}.width", TensorProto.INT64, [1], [width])
        graph.initializer.append(stop)
        of_tokens = [inputs["query"], *(f"skv.queries.{x}" for x in ("start", "end", "axis"))]
        of_channels = [last, "skv.queries.channel", stop.name, "skv.queries.channels"]
        graph.node.append(helper.make_node("Slice", of_tokens, [last]))
        graph.node.append(helper.make_node("Slice", of_channels, [cut]))
        graph.node.append(helper.make_node("Cast", [cut], [output.name], to=TensorProto.FLOAT))
        graph.output.append(helper.make_tensor_value_info(output.name, TensorProto.FLOAT, ["batch", None, width]))
        found.append(output)
    return model, found


class LastQueries:
    """The last queries of each sequence, call by call, for ``Session.compact``; empty where a session keeps none.

    Args:
        batch: Sequences.
    """

    def __init__(self, batch: int) -> None:
        self._calls: list[list[list[NDArray[np.float32]]]] = [[] for _ in range(batch)]

    def add(self, counts: NDArray[np.int64], columns: int, queries: Sequence[NDArray[np.float32]], window: int) -> None:
        """Notes a call's queries.

        Args:
            counts: ``[B]``, new tokens of each sequence.
            columns: Columns of the call; of a sequence that has fewer tokens, queries can't be told from padding.
            queries: By layer, ``[B, S, width]``.
            window: Queries that are wanted; what is older goes.
        """
        for b, calls in enumerate(self._calls):
            if counts[b] == columns:
                calls.append([x[b] for x in queries])
            elif counts[b]:
                calls.clear()
            while len(calls) > 1 and sum(len(call[0]) for call in calls[1:]) >= window:
                del calls[0]

    def last(self, b: int, window: int) -> list[NDArray[np.float32]]:
        """The last ``window`` queries of sequence ``b``, or as many as there are, by layer: ``[S, width]``."""
        return [np.concatenate(parts)[-window:] for parts in zip(*self._calls[b], strict=True)]

    def clear(self, b: int | None = None) -> None:
        """Forgets those of sequence ``b``, or all."""
        for calls in self._calls if b is None else [self._calls[b]]:
            calls.clear()

    def copy(self, source: LastQueries, order: Iterable[int]) -> None:
        """Makes them those of these sequences of ``source``, in place."""
        for calls, others in zip(self._calls, [list(source._calls[b]) for b in order], strict=True):
            calls[:] = others

    def first(self, n: int) -> LastQueries:
        """Those of the first ``n`` sequences, shared: what one notes, the other has."""
        part = LastQueries(0)
        part._calls = self._calls[:n]
        return part
