"""Parses the attention nodes of other exporters: each is translated into the op's terms, or refused with the reason.

``com.microsoft::GroupQueryAttention``, and the standard ``Attention`` (opset 23 on), with a past: its own input, or, as
torch.onnx writes it, concatenated before the node. Nothing is changed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from skv_export.spec.op import INPUT_NAMES, AttentionParams

GQA = ("com.microsoft", "GroupQueryAttention", "")
ATTENTION = ("", "Attention", "")
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_OTHERS = {
    "Attention",
    "DecoderMaskedMultiHeadAttention",
    "DecoderMaskedSelfAttention",
    "GatedDeltaNet",
    "LinearAttention",
    "LongformerAttention",
    "MultiHeadAttention",
    "PackedAttention",
    "PackedMultiHeadAttention",
    "PagedAttention",
    "SparseAttention",
}
"""Attention of com.microsoft that has no counterpart here; a graph with one of them is refused."""
_GQA_ATTRIBUTES = {
    "num_heads", "kv_num_heads", "scale", "softcap", "local_window_size", "do_rotary", "rotary_interleaved",
    "qk_norm_epsilon", "q_norm_epsilon", "k_norm_epsilon", "smooth_softmax", "causal", "qk_output",
    "kv_cache_bit_width", "k_quant_type", "v_quant_type", "sliding_window_cache",
}  # fmt: skip
_ATTENTION_ATTRIBUTES = {
    "q_num_heads", "kv_num_heads", "scale", "softcap", "is_causal", "qk_matmul_output_mode", "softmax_precision"
}  # fmt: skip
_INPUTS = {
    GQA: (*INPUT_NAMES[:12], "k_scale", "v_scale", *INPUT_NAMES[14:16]),
    ATTENTION: ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen"),
}
"""Names of the inputs. Ours mirror GroupQueryAttention's, but for the scales of a quantized cache."""
_REPEATS = {"Expand", "Identity", "Reshape", "Tile", "Unsqueeze"}
"""What may stand between a cache and attention, if it repeats heads (``MaskProbe.check_repeats``)."""


class Refusal(Exception):  # noqa: N818 - it is collected with those of the other nodes, and only then an error
    """The reason why a node can't be rewritten."""


@dataclass(frozen=True)
class AttentionNode:
    """An attention node of the source, in the op's terms.

    Attributes:
        node: The node.
        params: The op's attributes that are not the cache's.
        head_dim: Channels per head.
        dtype: Number format of queries, keys, values and of the cache as it was.
        past: past_key and past_value, inputs of the graph.
        present: present_key and present_value, outputs of the graph.
        mask: ``attn_mask`` of a standard Attention that has one.
        is_causal: Whether a standard Attention masks by itself.
        smooth_softmax: A sink of 0 takes part in every softmax.
        heads_first: Queries, keys and values are ``[B, heads, S, head_dim]``.
        new: Keys and values of the new tokens, where a Concat before the node puts the past in front of them; the
            ``present`` is the Concat's. None where the node does that itself.
    """

    node: ir.Node
    params: AttentionParams
    head_dim: int
    dtype: ir.DataType
    past: tuple[ir.Value, ir.Value]
    present: tuple[ir.Value, ir.Value]
    mask: ir.Value | None = None
    is_causal: bool = True
    smooth_softmax: bool = False
    heads_first: bool = False
    new: tuple[ir.Value, ir.Value] | None = None

    @property
    def is_gqa(self) -> bool:
        """Whether it is a GroupQueryAttention, which the op mirrors input by input."""
        return self.node.op_identifier() == GQA

    @property
    def layer(self) -> int | None:
        """The layer's number in the name of its cache, if there is just one."""
        numbers = re.findall(r"\d+", self.past[0].name or "")
        return int(numbers[0]) if len(numbers) == 1 and len(numbers[0]) < 6 else None


def is_attention(node: ir.Node) -> bool:
    """Whether a node is attention, of a kind that can be rewritten or not."""
    return node.op_identifier() in (GQA, ATTENTION) or (node.domain == "com.microsoft" and node.op_type in _OTHERS)


def read_node(node: ir.Node, graph: ir.Graph, head_dim: int | None) -> AttentionNode:
    """Reads an attention node.

    Args:
        node: A node for which ``is_attention``.
        graph: The main graph.
        head_dim: What the model's configuration says, for graphs without shapes.

    Raises:
        Refusal: The node has something that the op does not have, or misses something.
    """
    if node.graph is not graph:
        raise Refusal("stands in a subgraph or function; inline it, or export without branches (no merged decoder)")
    if node.op_identifier() not in (GQA, ATTENTION):
        raise Refusal(f"{node.op_type} is no GroupQueryAttention; build the model with GroupQueryAttention")
    known = _GQA_ATTRIBUTES if node.op_identifier() == GQA else _ATTENTION_ATTRIBUTES
    unknown = sorted(set(node.attributes) - known)
    if unknown:
        raise Refusal(f"unknown attribute {', '.join(unknown)}")
    if node.op_identifier() == GQA:
        return _read_gqa(node, *_caches(node), head_dim)
    if _input(node, "past_key") is None and _input(node, "past_value") is None:
        return _read_attention(node, *_concatenated(node), head_dim)
    return _read_attention(node, *_caches(node), None, head_dim)


Pair = tuple[ir.Value, ir.Value]


def _read_gqa(node: ir.Node, past: Pair, present: Pair, head_dim: int | None) -> AttentionNode:
    attributes = _attributes(node)
    for name, fine, why in (
        ("causal", 1, "attention in both directions"),
        ("qk_output", 0, "returns its scores"),
        ("kv_cache_bit_width", 0, "its cache is quantized already"),
        ("k_quant_type", "NONE", "its cache is quantized already"),
        ("v_quant_type", "NONE", "its cache is quantized already"),
    ):
        if attributes.get(name, fine) != fine:
            raise Refusal(f"{name} = {attributes[name]}: {why}")
    _refuse_inputs(node, "attention_bias", "k_scale", "v_scale")
    if len([x for x in node.outputs if x.name and x.uses()]) > 3 or len(node.outputs) > 3:
        raise Refusal("more than three outputs: it returns its scores")
    for name in ("seqlens_k", "total_sequence_length"):
        if _input(node, name) is None:
            raise Refusal(f"no input {name}")
    window = int(attributes.get("local_window_size", -1))
    if window == 0 or window < -1:
        raise Refusal(f"local_window_size = {window}: expected -1 for none, or at least 1")
    norms = [_input(node, "q_norm_weight"), _input(node, "k_norm_weight")]
    if (norms[0] is None) != (norms[1] is None):
        raise Refusal("only one of q_norm_weight and k_norm_weight")
    epsilons = {attributes.get(f"{x}_norm_epsilon", attributes.get("qk_norm_epsilon", 1e-6)) for x in "qk"}
    if norms[0] is not None and len(epsilons) > 1:
        raise Refusal(f"q_norm_epsilon and k_norm_epsilon differ: {sorted(epsilons)}")
    rotary = bool(attributes.get("do_rotary", 0))
    if rotary and (_input(node, "cos_cache") is None or _input(node, "sin_cache") is None):
        raise Refusal("do_rotary without cos_cache and sin_cache")
    heads = int(attributes.get("num_heads", 0)), int(attributes.get("kv_num_heads", 0))
    params = AttentionParams(
        *_check_heads(heads, past),
        scale=_factor(attributes, "scale"),
        softcap=_factor(attributes, "softcap"),
        local_window_size=max(window, 0),
        do_rotary=rotary,
        rotary_interleaved=bool(attributes.get("rotary_interleaved", 0)),
        qk_norm_epsilon=float(max(epsilons)),
    )
    key, value = _input(node, "key"), _input(node, "value")
    packed = key is None
    if packed != (value is None):
        raise Refusal("only one of key and value: it reads another layer's cache")
    widths = {
        node.inputs[0]: params.num_heads + (2 * params.kv_num_heads if packed else 0),
        key: params.kv_num_heads,
        value: params.kv_num_heads,
        node.outputs[0]: params.num_heads,
        **dict.fromkeys(norms, 1),
    }
    smooth = bool(attributes.get("smooth_softmax", 0)) and _input(node, "head_sink") is None
    return AttentionNode(
        node, params, _head_dim(past, widths, head_dim), _dtype(past), past, present, smooth_softmax=smooth
    )


def _read_attention(node: ir.Node, past: Pair, present: Pair, new: Pair | None, head_dim: int | None) -> AttentionNode:
    attributes = _attributes(node)
    _refuse_inputs(node, "nonpad_kv_seqlen")
    if len(node.outputs) > 3:
        raise Refusal("more than three outputs: it returns its scores")
    # The standard wants the attributes with three dimensions, and with those only.
    heads_first = "q_num_heads" not in attributes
    if heads_first:
        heads = tuple(_dim(value, 1) or 0 for value in (node.inputs[0], new[0] if new else node.inputs[1]))
        if 0 in heads:
            raise Refusal("neither its attributes nor shapes say how many heads there are")
        widths: dict[ir.Value | None, int] = {}
    else:
        heads = int(attributes.get("q_num_heads", 0)), int(attributes.get("kv_num_heads", 0))
        widths = {node.inputs[0]: heads[0], node.inputs[1]: heads[1], node.inputs[2]: heads[1]}
    params = AttentionParams(
        *_check_heads((heads[0], heads[1]), past),
        scale=_factor(attributes, "scale"),
        softcap=_factor(attributes, "softcap"),
    )
    found = _head_dim(past, widths, head_dim)
    if heads_first and any(_dim(value, 3) not in (None, found) for value in node.inputs[:3]):
        raise Refusal("queries, keys and values have different head dims")
    is_causal = bool(attributes.get("is_causal", 0))
    mask = _input(node, "attn_mask")
    if mask is None and not is_causal:
        raise Refusal("neither is_causal nor attn_mask: attention in both directions")
    if new and is_causal:
        raise Refusal(
            "is_causal with a past before the node: new tokens see the first keys only; export it with a mask"
        )
    if new and not heads_first:
        raise Refusal("q_num_heads with a past before the node: expected queries, keys and values of four dimensions")
    return AttentionNode(
        node, params, found, _dtype(past), past, present, mask, is_causal, heads_first=heads_first, new=new
    )


# Parts of a node.


def _attributes(node: ir.Node) -> Mapping[str, Any]:
    return {
        name: attribute.value.decode() if isinstance(attribute.value, bytes) else attribute.value
        for name, attribute in node.attributes.items()
    }


def _factor(attributes: Mapping[str, Any], name: str) -> float:
    value = float(attributes.get(name, 0.0))
    if not 0 <= value < math.inf:
        raise Refusal(f"{name} = {value}: expected 0 or more")
    return value


def _input(node: ir.Node, name: str) -> ir.Value | None:
    index = _INPUTS[node.op_identifier()].index(name)
    return node.inputs[index] if index < len(node.inputs) else None


def _refuse_inputs(node: ir.Node, *names: str) -> None:
    for name in names:
        if _input(node, name) is not None:
            raise Refusal(f"has an input {name}, which the op does not take")


def _caches(node: ir.Node) -> tuple[Pair, Pair]:
    """The past and the present of a node that holds its cache itself."""
    past, present = [], []
    for name in ("past_key", "past_value"):
        value = _input(node, name)
        if value is None:
            raise Refusal(f"no input {name}: export the model with its past, held by this node")
        past.append(_past(value, name, node))
    for index, name in ((1, "present_key"), (2, "present_value")):
        value = node.outputs[index] if index < len(node.outputs) else None
        present.append(_present(value, name, None))
    return (past[0], past[1]), (present[0], present[1])


def _concatenated(node: ir.Node) -> tuple[Pair, Pair, Pair]:
    """The past, the present and the new tokens of a node whose past is concatenated before it."""
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        raise Refusal("no input past_key, but an output present_key: its cache is never read")
    past, present, new = [], [], []
    for read, name in (("K", "key"), ("V", "value")):
        concat, reader = _concat(_input(node, read), node, name)
        axis = concat.attributes["axis"].as_int() if "axis" in concat.attributes else None
        if len(concat.inputs) != 2 or axis not in (2, -2):
            raise Refusal(f"its {name} comes from node {concat.name!r}, no Concat of past_{name} and new along tokens")
        first, second = concat.inputs
        assert first is not None and second is not None  # a Concat has no optional inputs
        past.append(_past(first, f"past_{name}", concat))
        present.append(_present(concat.outputs[0], f"present_{name}", reader))
        new.append(second)
    return (past[0], past[1]), (present[0], present[1]), (new[0], new[1])


def _concat(value: ir.Value | None, reader: ir.Node, name: str) -> tuple[ir.Node, ir.Node]:
    """The Concat that computes a node's input, and its reader: the node, or the nodes that repeat heads in between."""
    while value is not None:
        maker = value.producer()
        if maker is not None and maker.op_type == "Concat":
            return maker, reader
        if maker is None or maker.op_type not in _REPEATS:
            break
        others = [user for user in value.consumers() if user is not reader]
        if others or value.is_graph_output():
            raise Refusal(f"its {name} {value.name!r} is read by others too")
        value, reader = maker.inputs[0], maker
    raise Refusal(
        f"no input past_{name}, and its {name} comes from {_origin(value)}: export the model with its past as inputs, "
        "held by this node or put before the new tokens by a Concat (torch.onnx.export with a DynamicCache)"
    )


def _past(value: ir.Value, name: str, reader: ir.Node) -> ir.Value:
    """A past, which must be an input of the graph and have no other reader."""
    if not value.is_graph_input():
        raise Refusal(f"{name} is no input of the graph but comes from {_origin(value)}")
    sharing = [user for user in value.consumers() if user is not reader and user.op_type != "Shape"]
    if sharing:
        raise Refusal(f"{name} is read by node {sharing[0].name!r} ({sharing[0].op_type}) too")
    if _rank(value) != 4:
        raise Refusal(f"{name}: the graph's input {value.name!r} has no shape of four dimensions")
    return value


def _present(value: ir.Value | None, name: str, reader: ir.Node | None) -> ir.Value:
    """A present, which must be an output of the graph and have no reader but ``reader``."""
    if value is None or not value.is_graph_output():
        raise Refusal(f"{name} is no output of the graph")
    others = [user for user in value.consumers() if user is not reader]
    if others:
        raise Refusal(f"{name} is read by node {others[0].name!r} too")
    return value


def _origin(value: ir.Value | None) -> str:
    maker = None if value is None else value.producer()
    return "no node" if maker is None else f"node {maker.name!r} ({maker.op_type})"


def _check_heads(heads: tuple[int, int], past: Pair) -> tuple[int, int]:
    if min(heads) < 1 or heads[0] % heads[1]:
        raise Refusal(f"{heads[0]} query heads on {heads[1]} key-value heads")
    for value in past:
        if _dim(value, 1) not in (None, heads[1]):
            raise Refusal(f"{value.name!r} has {_dim(value, 1)} heads, the node {heads[1]}")
    return heads


def _dtype(past: Pair) -> ir.DataType:
    key, value = (x.dtype for x in past)
    if key is None or key != value or key not in FLOATS:
        raise Refusal(f"its cache is {key} and {value}: expected FLOAT, FLOAT16 or BFLOAT16 (is it quantized already?)")
    return key


def _head_dim(past: Pair, widths: Mapping[ir.Value | None, int], configured: int | None) -> int:
    """Channels per head, from all shapes that determine it; they must agree.

    Args:
        past: ``[B, N_kv, tokens, head_dim]``.
        widths: Value to how many heads its last dimension holds.
        configured: Where no shape tells.
    """
    found = {_dim(value, 3) for value in past} - {None}
    for value, count in widths.items():
        size = None if value is None else last_dim(value)
        if size is None:
            continue
        if size % count:
            raise Refusal(f"{value.name!r} has {size} channels, no multiple of {count} heads")  # type: ignore[union-attr]
        found.add(size // count)
    if not found and configured is not None:
        found.add(configured)
    if len(found) != 1:
        reason = f"shapes say {sorted(found)}" if found else "no shape tells; run ONNX shape inference first"  # type: ignore[type-var]
        raise Refusal(f"head_dim: {reason}")
    return int(found.pop())  # type: ignore[arg-type]


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _dim(value: ir.Value | None, axis: int) -> int | None:
    if value is None or value.shape is None or axis >= len(value.shape):
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) and size > 0 else None


def last_dim(value: ir.Value) -> int | None:
    """The last dimension of a value, from its shape or from the weights of the node that makes it."""
    if value.shape is not None:
        return _dim(value, len(value.shape) - 1)
    maker = value.producer()
    if maker is None:
        return None
    if maker.op_type == "MatMulNBits" and "N" in maker.attributes:
        return int(maker.attributes["N"].value)
    if maker.op_type == "MatMul":
        return _dim(maker.inputs[1], 1)
    return None
