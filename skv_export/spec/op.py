"""The op's interface: its name, inputs, outputs and attributes, and one-node models of it. Needs no torch.

``skv::QuantizedKVAttention`` mirrors com.microsoft::GroupQueryAttention input by input (docs/spec.md, The op); what it
computes is ``reference.quantized_kv_attention``. ``native/ort/op.h`` is the mirror of this file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from skv_export.spec.layout import LAYOUT_VERSION, CacheLayout
from skv_export.spec.recipe import LayerConfig

if TYPE_CHECKING:
    import onnx

DOMAIN = "skv"
OP_NAME = "QuantizedKVAttention"
OP_VERSION = 1

OPSET, IR_VERSION = 20, 9
"""Of models of one node."""

Layouts = tuple[CacheLayout, CacheLayout]
"""Of a layer's keys and values."""
Attributes = dict[str, int | float | str]
TensorSpec = tuple[np.dtype[Any], Sequence[int | str]]
"""Type and shape of a tensor; a dimension with a name is dynamic."""
_T = TypeVar("_T")


class Parameter(NamedTuple):
    """An input or output of the op.

    Attributes:
        name: Its name in the schema.
        type: ONNX's name of its type; ``T`` = the query's, float32, float16 or bfloat16.
        optional: Whether a node may leave it out.
    """

    name: str
    type: str = "T"
    optional: bool = False


INPUTS = (
    Parameter("query"),
    Parameter("key", optional=True),
    Parameter("value", optional=True),
    Parameter("past_key", "tensor(uint8)"),
    Parameter("past_value", "tensor(uint8)"),
    Parameter("seqlens_k", "tensor(int32)"),
    Parameter("total_sequence_length", "tensor(int32)"),
    Parameter("cos_cache", optional=True),
    Parameter("sin_cache", optional=True),
    Parameter("position_ids", "tensor(int64)", optional=True),
    Parameter("attention_bias", optional=True),
    Parameter("head_sink", optional=True),
    Parameter("reserved_12", optional=True),
    Parameter("reserved_13", optional=True),
    Parameter("q_norm_weight", optional=True),
    Parameter("k_norm_weight", optional=True),
    Parameter("query_seqlens", "tensor(int32)", optional=True),
    Parameter("key_basis", "tensor(float)", optional=True),
    Parameter("query_basis", "tensor(float)", optional=True),
    Parameter("key_feedback", "tensor(float)", optional=True),
)
"""In the schema's order; the op refuses ``attention_bias`` and the reserved ones, which keep places of other ops."""
OUTPUTS = (
    Parameter("output"),
    Parameter("present_key", "tensor(uint8)", optional=True),
    Parameter("present_value", "tensor(uint8)", optional=True),
)
INPUT_NAMES = tuple(parameter.name for parameter in INPUTS)
OUTPUT_NAMES = tuple(parameter.name for parameter in OUTPUTS)


@dataclass(frozen=True)
class AttentionParams:
    """The op's attributes that do not describe the cache.

    Attributes:
        num_heads: N, query heads.
        kv_num_heads: N_kv, key and value heads; divides N.
        scale: Multiplies the scores; 0 = 1 / sqrt(head_dim).
        softcap: ``softcap * tanh(score / softcap)`` where above 0.
        local_window_size: Tokens a query sees, itself included; 0 = all.
        do_rotary: Apply RoPE to queries and keys.
        rotary_interleaved: Pairs of channels are neighbours instead of halves.
        qk_norm_epsilon: Of the RMS norms whose weights are given.
    """

    num_heads: int
    kv_num_heads: int
    scale: float = 0.0
    softcap: float = 0.0
    local_window_size: int = 0
    do_rotary: bool = False
    rotary_interleaved: bool = False
    qk_norm_epsilon: float = 1e-6


@dataclass(frozen=True)
class LayerAttention:
    """One layer's attention: the attributes of its ONNX node.

    Attributes:
        params: The attributes that GroupQueryAttention has too.
        layouts: Layouts of keys and values.
    """

    params: AttentionParams
    layouts: Layouts

    @classmethod
    def build(cls, config: LayerConfig, head_dim: int, params: AttentionParams) -> LayerAttention:
        """Returns the layer for a recipe's options; the cache's window is the attention's."""
        return cls(params, CacheLayout.pair(config, head_dim, params.local_window_size))

    def attributes(self) -> Attributes:
        """Returns the op's attributes, all of them, in the schema's order."""
        given = dataclasses.asdict(self.params)
        given.update(do_rotary=int(self.params.do_rotary), rotary_interleaved=int(self.params.rotary_interleaved))
        return given | {"layout_version": LAYOUT_VERSION} | options_of(*self.layouts)

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any], head_dim: int) -> LayerAttention:
        """Inverse of ``attributes``."""
        params = AttentionParams(**{f.name: attributes[f.name] for f in dataclasses.fields(AttentionParams)})
        config = LayerConfig(**{f.name: attributes[f.name] for f in dataclasses.fields(LayerConfig)})
        params = dataclasses.replace(
            params, do_rotary=bool(params.do_rotary), rotary_interleaved=bool(params.rotary_interleaved)
        )
        return cls.build(config, head_dim, params)


def options_of(key: CacheLayout, value: CacheLayout) -> dict[str, Any]:
    """Inverse of ``CacheLayout.pair``: a ``LayerConfig``'s options, resolved; the op's attributes have these names."""
    own = ("bits", "group_size", "granularity", "rotation", "parameter_bits")
    common = ("num_sink_tokens", "recent_tokens", "tile_tokens", "recent_type")
    given = {f"{letter}_{name}": getattr(one, name) for name in own for letter, one in (("k", key), ("v", value))}
    return given | {name: getattr(key, name) for name in common}


ATTRIBUTE_TYPES: dict[str, type] = {
    name: type(value)
    for name, value in LayerAttention.build(LayerConfig(), 64, AttentionParams(1, 1)).attributes().items()
}
"""The op's attributes and their types, in the schema's order."""


# Nodes.


def in_order(given: Mapping[str, _T]) -> list[_T | None]:
    """A node's inputs in the schema's order, from their names: None for omitted ones, none after the last."""
    unknown = set(given) - set(INPUT_NAMES)
    assert not unknown, f"the op has no inputs {unknown}"
    inputs = [given.get(name) for name in INPUT_NAMES]
    while inputs and inputs[-1] is None:
        inputs.pop()
    return inputs


def attention_node(inputs: Sequence[str], attributes: Mapping[str, Any]) -> onnx.NodeProto:
    """Returns a node of the op whose inputs and outputs have the schema's names; ``inputs`` says which it has."""
    from onnx import helper

    names = [name or "" for name in in_order({name: name for name in inputs})]
    return helper.make_node(OP_NAME, names, OUTPUT_NAMES, "attention", domain=DOMAIN, **attributes)


def one_node_model(node: onnx.NodeProto, inputs: Mapping[str, TensorSpec]) -> bytes:
    """Returns a model of one attention node, of the op or of GroupQueryAttention, serialized.

    Args:
        node: Takes ``query``, ``past_key``, ``past_value`` and whatever else, by these names.
        inputs: Type and shape of each; the outputs have the types of these three, and no shapes.
    """
    from onnx import helper

    def info(name: str, like: str, shape: Sequence[int | str] | None) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(inputs[like][0]), shape)

    outputs = [info(n, like, None) for n, like in zip(node.output, ("query", "past_key", "past_value"), strict=True)]
    graph = helper.make_graph([node], "one_node", [info(name, name, inputs[name][1]) for name in inputs], outputs)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(node.domain, OP_VERSION)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION).SerializeToString()
    return model
