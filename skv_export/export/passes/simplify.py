"""Graph passes that simplify a translated decoder: each replaces a pattern by an equivalent, cheaper one.

They depend on ONNX's operators, not on architectures, and leave unrecognized nodes unchanged. A rewrite visits one node
at a time, in the graph's order; nodes that become unused are removed afterwards.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes import common

from skv_export.export.lazy_weights import LazyWeight, Named, applied
from skv_export.export.passes.matching import (
    SMALL_BYTES,
    Builder,
    attributes,
    made_by,
    numbers,
    only_user,
    permutation,
    static,
)


def simplify(model: ir.Model) -> None:
    """Runs all passes on a translated decoder, in place."""
    common.InlinePass()(model)
    _deduplicate(model.graph)
    _fold_constants(model)
    _fold_weights(model.graph)
    builder = Builder(model.graph)
    for rewrite in _REWRITES:
        for node in tuple(model.graph):
            if node.graph is model.graph and node.domain == "":
                rewrite(builder, node)
        common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _deduplicate(model.graph)
    common.CommonSubexpressionEliminationPass()(model)
    for cleanup in (common.RemoveUnusedNodesPass, common.RemoveUnusedFunctionsPass, common.RemoveUnusedOpsetsPass):
        cleanup()(model)
    common.ClearMetadataAndDocStringPass()(model)


def _fold_constants(model: ir.Model) -> None:
    """Folds constants; weights are detached during folding so that they are not loaded."""
    weights = {value: value.const_value for value in model.graph.initializers.values() if _is_stored(value)}
    for value in weights:
        value.const_value = None

    def should_fold(node: ir.Node) -> bool | None:
        sizes = [v.const_value.nbytes for v in node.inputs if v is not None and v.const_value is not None]
        return False if max(sizes, default=0) > SMALL_BYTES else None

    onnxscript.optimizer.fold_constants(
        model,
        onnx_shape_inference=True,
        input_size_limit=SMALL_BYTES,
        output_size_limit=SMALL_BYTES,
        should_fold=should_fold,
    )
    for value, tensor in weights.items():
        value.const_value = tensor


def _is_stored(value: ir.Value | None) -> bool:
    return value is not None and isinstance(value.const_value, LazyWeight)


def _fold_weights(graph: ir.Graph) -> None:
    """Turns expressions over weights alone into weights; a Transpose of a matrix is left to ``_weight``."""
    for node in tuple(graph):
        if node.domain or len(node.outputs) != 1 or node.op_type == "Transpose":
            continue
        tensors = [None if v is None else ir.convenience.get_const_tensor(v) for v in node.inputs]
        known = all(v is None or tensor is not None for v, tensor in zip(node.inputs, tensors, strict=True))
        stored = [tensor for tensor in tensors if isinstance(tensor, LazyWeight)]
        output = node.outputs[0]
        if not known or not stored or output.shape is None or output.dtype is None or output.is_graph_output():
            continue
        if not output.shape.is_static() or math.prod(output.shape.numpy()) > max(tensor.size for tensor in stored):
            continue
        folded = applied(node, tensors, output.dtype, output.shape)
        value = ir.Value(name=folded.name, type=output.type, shape=output.shape, const_value=folded)
        if folded.name in graph.initializers:
            value.name = folded.name = f"{folded.name}.{len(graph.initializers)}"
        graph.register_initializer(value)
        output.replace_all_uses_with(value)
        graph.remove(node, safe=True)


def _deduplicate(graph: ir.Graph) -> None:
    """Merges equal initializers: tied weights, and small constants."""
    first: dict[object, ir.Value] = {}
    for name, value in tuple(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or value.is_graph_output():
            continue
        if isinstance(tensor, LazyWeight):
            key: object = (tensor.dtype, tensor.form)
        elif tensor.nbytes <= SMALL_BYTES:
            key = (tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes())
        else:
            continue
        same = first.setdefault(key, value)
        if same is not value:
            value.replace_all_uses_with(same)
            del graph.initializers[name]


_SWAPPED = [0, 2, 1, 3]
"""Permutation between ``[B, S, N, D]`` and ``[B, N, S, D]``."""


def _reshape_target(source: ir.Value, result: ir.Value) -> list[int] | None:
    """Returns constant dimensions for a Reshape from ``source`` to ``result``, or None if the shapes are unknown."""
    if source.shape is None or result.shape is None:
        return None
    target = []
    for i, dim in enumerate(result.shape):
        kept = i < len(source.shape) and source.shape[i] == dim and not _unknown(dim)
        target.append(dim if isinstance(dim, int) else 0 if kept else -1)
    return target if target.count(-1) <= 1 else None


def _unknown(dim: int | ir.SymbolicDim) -> bool:
    return not isinstance(dim, int) and dim.value is None


def _reshape(builder: Builder, node: ir.Node) -> None:
    """Gives a Reshape a constant shape, bypasses Reshapes before it, and drops it if it changes nothing."""
    if node.op_type != "Reshape" or node.inputs[0] is None:
        return
    source, result = node.inputs[0], node.outputs[0]
    while (before := made_by(source, "Reshape")) is not None and before.inputs[0] is not None:
        if _reshape_target(before.inputs[0], result) is None:
            break
        source = before.inputs[0]
    target = _reshape_target(source, result)
    if target is None or source.shape is None or result.shape is None:
        return
    if len(target) == len(source.shape) and all(
        a == b and not _unknown(a) for a, b in zip(source.shape, result.shape, strict=True)
    ):
        builder.replace(node, source)
        return
    node.replace_input_with(0, source)
    node.replace_input_with(1, builder.ints(*target))
    node.attributes.pop("allowzero", None)


def _dimension(builder: Builder, node: ir.Node) -> None:
    """Reads a dimension from the first of the graph's inputs that has it."""
    source = node.inputs[0] if node.op_type == "Shape" else None
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", 0)
    if source is None or not source.is_graph_input() or source.shape is None or end != start + 1:
        return
    dim = source.shape[start]
    for value in builder.graph.inputs:
        axes = [i for i, other in enumerate(value.shape or ()) if other == dim and not _unknown(other)]
        if axes and value is not source:
            same = builder.before(node, "Shape", value, like=node.outputs[0], start=axes[0], end=axes[0] + 1)
            builder.replace(node, same)
        if axes:
            return


def _slice(builder: Builder, node: ir.Node) -> None:
    """Drops a Slice that keeps everything."""
    if node.op_type != "Slice" or node.inputs[0] is None:
        return
    _, starts, ends, _, *steps = (*node.inputs, None)[:5]
    keeps = numbers(starts) == [0] and (numbers(ends) or [0])[0] >= 2**31 - 1
    if keeps and all(step is None or numbers(step) == [1] for step in steps):
        builder.replace(node, node.inputs[0])


def _transpose(builder: Builder, node: ir.Node) -> None:
    """Drops a Transpose that changes nothing, and cancels one against the one before it."""
    if (
        node.op_type == "Transpose"
        and (only := permutation(node)) == sorted(only or [0])
        and node.inputs[0] is not None
    ):
        builder.replace(node, node.inputs[0])
        return
    before = made_by(node.inputs[0] if node.op_type == "Transpose" else None, "Transpose")
    first, second = permutation(before), permutation(node)
    if before is None or before.inputs[0] is None or first is None or second is None:
        return
    if [first[i] for i in second] == list(range(len(first))):
        builder.replace(node, before.inputs[0])


def _rms_norm(builder: Builder, node: ir.Node) -> None:
    """``x * rsqrt(mean(x^2) + eps) * weight`` becomes RMSNormalization, which computes in float32 whatever the type."""
    if node.op_type != "Mul":
        return
    found = _normalized(node)
    user = only_user(node.outputs[0])
    if found is None or user is None:
        return
    x, epsilon = found
    # Half precision: x was converted to float32, and the result is converted back before the weight comes in.
    widened = made_by(x, "Cast")
    if user.op_type == "Cast" and widened is not None and widened.inputs[0] is not None:
        if widened.inputs[0].dtype != user.outputs[0].dtype or (scaled := only_user(user.outputs[0])) is None:
            return
        x, normalized, user = widened.inputs[0], user.outputs[0], scaled
    else:
        normalized = node.outputs[0]
    if user.op_type != "Mul" or user.domain:
        return
    (weight,) = [v for v in user.inputs if v is not normalized] or [None]
    if (
        weight is None
        or not weight.is_initializer()
        or weight.dtype != x.dtype
        or weight.shape is None
        or len(weight.shape) != 1
    ):
        return
    fused = builder.before(
        user, "RMSNormalization", x, weight, like=user.outputs[0], axis=-1, epsilon=epsilon, stash_type=1
    )
    builder.replace(user, fused)


def _normalized(node: ir.Node) -> tuple[ir.Value, float] | None:
    """Matches ``x * rsqrt(mean(x^2, -1) + eps)``: x and eps."""
    for x, factor in (node.inputs, node.inputs[::-1]):
        inverse = made_by(factor, "Reciprocal")
        root = made_by(inverse.inputs[0], "Sqrt") if inverse else None
        shifted = made_by(root.inputs[0], "Add") if root else None
        if x is None or shifted is None:
            continue
        mean = made_by(shifted.inputs[0], "ReduceMean")
        square = made_by(mean.inputs[0], "Pow") if mean else None
        epsilon = numbers(shifted.inputs[1])
        if mean is None or square is None or square.inputs[0] is not x or len(epsilon) != 1:
            continue
        if (
            numbers(square.inputs[1]) == [2]
            and numbers(mean.inputs[1]) == [-1]
            and mean.attributes.get_int("keepdims", True)
        ):
            return x, epsilon[0]
    return None


def _norm_first(builder: Builder, node: ir.Node) -> None:
    """Moves a norm over the last axis before a Transpose of the other axes, so that the Transpose can be cancelled."""
    before = made_by(node.inputs[0] if node.op_type == "RMSNormalization" else None, "Transpose")
    if before is None or permutation(before) != _SWAPPED or only_user(before.outputs[0]) is not node:
        return
    x = before.inputs[0]
    normed = builder.before(node, "RMSNormalization", x, *node.inputs[1:], like=x, **attributes(node))
    builder.replace(node, builder.before(node, "Transpose", normed, like=node.outputs[0], perm=_SWAPPED))


def _rotary(builder: Builder, node: ir.Node) -> None:
    """RoPE of ``[B, N, S, D]``, written in halves, becomes RotaryEmbedding."""
    if node.op_type == "Add":
        found = _rotated_half(node)
    elif node.op_type == "Concat":
        found = _rotated_chunks(node)
    else:
        return
    if found is None:
        return
    x, cos, sin = (found[0], *(_half_table(builder, node, table) for table in found[1:]))
    if cos is not None and sin is not None and x.dtype == cos.dtype:
        builder.replace(node, builder.before(node, "RotaryEmbedding", x, cos, sin, like=node.outputs[0]))


def _rotated_half(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """Matches ``x * cos + concat(-x[D/2:], x[:D/2]) * sin``."""
    plain, turned = (made_by(v, "Mul") for v in node.inputs)
    if plain is None or turned is None:
        return None
    (x, cos), (half, sin) = plain.inputs, turned.inputs
    concat = made_by(half, "Concat")
    if (
        x is None
        or cos is None
        or sin is None
        or concat is None
        or len(concat.inputs) != 2
        or (size := static(x, -1)) is None
    ):
        return None
    negated = made_by(concat.inputs[0], "Neg")
    high, low = _slice_of(negated.inputs[0] if negated else None, x), _slice_of(concat.inputs[1], x)
    if high is None or low is None or low != (0, size // 2) or high[0] != size // 2 or high[1] < size:
        return None
    return x, cos, sin


def _slice_of(value: ir.Value | None, source: ir.Value) -> tuple[int, int] | None:
    """Matches a slice of ``source`` along its last axis: start and end."""
    node = made_by(value, "Slice")
    if node is None or node.inputs[0] is not source or source.shape is None:
        return None
    starts, ends, axes = (numbers(v) for v in node.inputs[1:4])
    if len(starts) != 1 or len(ends) != 1 or axes not in ([-1], [len(source.shape) - 1]):
        return None
    return int(starts[0]), int(ends[0])


def _rotated_chunks(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """Matches ``concat(a * cos - b * sin, b * cos + a * sin)`` with ``a, b = chunk(x, 2)``."""
    if len(node.inputs) != 2:
        return None
    first, second = made_by(node.inputs[0], "Sub"), made_by(node.inputs[1], "Add")
    products = [made_by(v, "Mul") for part in (first, second) if part is not None for v in part.inputs]
    if len(products) != 4 or any(p is None for p in products):
        return None
    (a1, c1), (b1, s1), (b2, c2), (a2, s2) = (p.inputs for p in products if p is not None)
    split = a1.producer() if a1 is not None else None
    if (
        split is None
        or split.op_type != "Split"
        or len(split.outputs) != 2
        or a1 is not split.outputs[0]
        or b1 is not split.outputs[1]
    ):
        return None
    if (a2, b2, c2, s2) != (a1, b1, c1, s1) or split.inputs[0] is None or c1 is None or s1 is None:
        return None
    return split.inputs[0], c1, s1


def _half_table(builder: Builder, anchor: ir.Node, table: ir.Value) -> ir.Value | None:
    """Returns a table of cosines or sines, ``[B, S, D/2]``, from what is multiplied with x or with its halves."""
    unsqueezed = made_by(table, "Unsqueeze")
    if unsqueezed is None or unsqueezed.inputs[0] is None or numbers(unsqueezed.inputs[1]) != [1]:
        return None
    value = unsqueezed.inputs[0]
    source: ir.Value | None = value
    while (
        source is not None and (node := source.producer()) is not None and node.op_type in ("Cast", "Cos", "Sin", "Mul")
    ):
        if node.op_type == "Mul" and len(numbers(node.inputs[1])) != 1:
            break
        source = node.inputs[0]
    doubled = made_by(source, "Concat")
    if doubled is None:
        return value
    size = static(value, -1)
    if size is None or len(doubled.inputs) != 2 or doubled.inputs[0] is not doubled.inputs[1]:
        return None
    half = builder.before(anchor, "Slice", value, builder.ints(0), builder.ints(size // 2), builder.ints(2))
    half.type = value.type
    return half


def _flat_rotary(builder: Builder, node: ir.Node) -> None:
    """A RotaryEmbedding between two Transposes works on ``[B, S, N*D]`` without them."""
    if node.op_type != "RotaryEmbedding" or node.outputs[0].is_graph_output():
        return
    before = made_by(node.inputs[0], "Transpose")
    users = [use.node for use in node.outputs[0].uses()]
    if permutation(before) != _SWAPPED or before is None or any(permutation(user) != _SWAPPED for user in users):
        return
    x = before.inputs[0]
    heads, size = static(x, 2), static(x, 3)
    if x is None or heads is None or size is None or x.shape is None:
        return
    flat = builder.before(node, "Reshape", x, builder.ints(0, 0, heads * size))
    flat.type, flat.shape = x.type, ir.Shape([*x.shape[:2], heads * size])
    turned = builder.before(node, "RotaryEmbedding", flat, *node.inputs[1:], like=flat, num_heads=heads)
    for user in users:
        builder.replace(
            user, builder.before(user, "Reshape", turned, builder.ints(0, 0, heads, size), like=user.outputs[0])
        )


def _weight(builder: Builder, node: ir.Node) -> None:
    """Stores a transposed weight transposed; a tied embedding, also read untransposed, becomes an input of a Gemm."""
    transposed = made_by(node.inputs[1] if node.op_type == "MatMul" else None, "Transpose")
    weight = transposed.inputs[0] if transposed is not None else None
    if transposed is None or weight is None or permutation(transposed) != [1, 0]:
        return
    tensor = weight.const_value
    if not isinstance(tensor, LazyWeight) or not isinstance(tensor.form, Named):
        return
    x, graph = node.inputs[0], builder.graph
    if all(use.node is transposed for use in weight.uses()) and only_user(transposed.outputs[0]) is node:
        name, shape = str(weight.name), ir.Shape(tensor.shape.numpy()[::-1])
        form = dataclasses.replace(tensor.form, transposed=True)
        stored = LazyWeight(form, tensor.reader, tensor.dtype, shape, name)
        replacement = ir.Value(name=name, type=weight.type, shape=shape, const_value=stored)
        builder.replace(transposed, replacement)
        del graph.initializers[name]
        graph.register_initializer(replacement)
    elif x is not None and (size := static(weight, 1)) is not None and (rows_out := static(weight, 0)) is not None:
        flat = builder.before(node, "Reshape", x, builder.ints(-1, size))
        product = builder.before(node, "Gemm", flat, weight, transB=1)
        lead = builder.before(node, "Shape", x, start=0, end=-1)
        target = builder.before(node, "Concat", lead, builder.ints(rows_out), axis=0)
        builder.replace(node, builder.before(node, "Reshape", product, target, like=node.outputs[0]))


def _top_k(builder: Builder, node: ir.Node) -> None:
    """TopK takes no bfloat16 before opset 24: the router of a mixture of experts picks in float32, which is exact."""
    x = node.inputs[0] if node.op_type == "TopK" else None
    if x is None or x.dtype != ir.DataType.BFLOAT16:
        return
    wide = builder.before(node, "Cast", x, to=ir.DataType.FLOAT)
    wide.type, wide.shape = ir.TensorType(ir.DataType.FLOAT), x.shape
    node.replace_input_with(0, wide)
    values = node.outputs[0]
    cast = ir.node("Cast", [values], {"to": ir.DataType.BFLOAT16}, name=f"{node.name}_values")
    narrow = cast.outputs[0]
    narrow.name, narrow.type, narrow.shape = f"{values.name}_bfloat16", values.type, values.shape
    values.type = wide.type
    builder.graph.insert_after(node, cast)
    for use in tuple(values.uses()):
        if use.node is not cast:
            use.node.replace_input_with(use.idx, narrow)


_REWRITES: tuple[Callable[[Builder, ir.Node], None], ...] = (
    _dimension,
    _slice,
    _reshape,
    _transpose,
    _rms_norm,
    _norm_first,
    _rotary,
    _flat_rotary,
    _reshape,
    _weight,
    _top_k,
)
