"""Pattern matching and rewriting of nodes, for passes over an ONNX graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

SMALL_BYTES = 1 << 16
"""Constants up to this size are folded while the graph is built."""


class Builder:
    """Makes constants and nodes, and puts them into a graph in place of others."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._constants: dict[tuple[int, ...], ir.Value] = {}
        self._number = 0

    def ints(self, *numbers: int) -> ir.Value:
        """Returns an int64 vector as an initializer."""
        if numbers not in self._constants or not self._constants[numbers].is_initializer():
            name = "ints_" + "_".join(str(n).replace("-", "m") for n in numbers)
            value = ir.Value(name=name, const_value=ir.tensor(np.array(numbers, np.int64), name=name))
            value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([len(numbers)])
            self.graph.register_initializer(value)
            self._constants[numbers] = value
        return self._constants[numbers]

    def before(
        self, anchor: ir.Node, op_type: str, *inputs: ir.Value | None, like: ir.Value | None = None, **attributes: Any
    ) -> ir.Value:
        """Inserts a node before ``anchor`` and returns its output, typed like ``like``."""
        node = ir.node(op_type, inputs, attributes=attributes)
        self._number += 1
        output = node.outputs[0]
        output.name = f"fused_{op_type.lower()}_{self._number}"
        node.name = f"node_{output.name}"
        if like is not None:
            output.type, output.shape = like.type, like.shape
        self.graph.insert_before(anchor, node)
        return output

    def replace(self, node: ir.Node, value: ir.Value) -> None:
        """Puts ``value`` in place of a node's only output and removes the node."""
        old = node.outputs[0]
        if old.is_graph_output():
            if value.is_graph_output() or value.producer() is None:
                return  # an output has one name, and is computed
            value.name, old.name = old.name, None
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Returns the node that computes ``value`` if it is an ``op_type`` of ONNX itself."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """Returns a small constant's array, if ``value`` is one."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.nbytes > SMALL_BYTES else tensor.numpy()


def numbers(value: ir.Value | None) -> list[float]:
    """Returns a constant's numbers; an empty list if it is not a constant."""
    array = constant(value)
    return [] if array is None else [float(x) for x in array.reshape(-1)]


def permutation(node: ir.Node | None) -> list[int] | None:
    """Returns the permutation of a Transpose that has one."""
    return list(node.attributes.get_ints("perm")) if node is not None and "perm" in node.attributes else None


def attributes(node: ir.Node) -> dict[str, Any]:
    """Returns a node's attributes as plain values."""
    return {name: attribute.value for name, attribute in node.attributes.items()}


def only_user(value: ir.Value) -> ir.Node | None:
    """Returns the one node that reads ``value``, if nothing else does."""
    users = [use.node for use in value.uses()]
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


def static(value: ir.Value | None, axis: int) -> int | None:
    """Returns a dimension if it is a number."""
    if value is None or value.shape is None:
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) else None
