"""Translates a traced decoder to ONNX: the op's translation, names of inputs and outputs, and saving the graph."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript
import torch
from onnxscript import opset23

from skv_export.calibration.file import Calibration, entries_of
from skv_export.errors import SkvError
from skv_export.export import experts
from skv_export.export.checkpoint_weights import Weights
from skv_export.export.lazy_weights import LazyWeight, Named, write_external
from skv_export.export.passes.simplify import simplify
from skv_export.export.quantized_products import MICROSOFT, quantize_graph
from skv_export.export.repeat_layers import BOUNDARY, Samples, repeat
from skv_export.model_folder.genai_config import cache_widths
from skv_export.model_folder.names import (
    ATTENTION_MASK,
    CALIBRATION_FILE,
    DATA_FILE,
    INPUTS_EMBEDS,
    LOGITS,
    MODEL_FILE,
    TENSORS,
    TOKEN_INPUTS,
    layer_of_cache,
    past_name,
    past_state_name,
    present_name,
    present_state_name,
)
from skv_export.spec.op import (
    ATTRIBUTE_TYPES,
    DOMAIN,
    INPUT_NAMES,
    INPUTS,
    OP_NAME,
    OP_VERSION,
    OUTPUTS,
    LayerAttention,
    Parameter,
    in_order,
)
from skv_export.spec.recipe import Recipe
from skv_export.spec.state import LayerState

STATE_OPS: Mapping[str, tuple[Mapping[str, type], tuple[str, ...], int]] = {
    "CausalConvWithState": ({"activation": str}, ("input", "weight", "bias", "past_state"), 2),
    "LinearAttention": (
        {"q_num_heads": int, "kv_num_heads": int, "scale": float, "update_rule": str},
        ("query", "key", "value", "past_state", "decay", "beta"),
        2,
    ),
}
"""Operators of com.microsoft that recurrent layers become: attributes, inputs, number of outputs. While torch
translates them they stand in our domain, since nobody has registered their schemas."""
OPSET = 23
"""The first with RMSNormalization and RotaryEmbedding; ONNX Runtime has kernels for both from 1.24 on."""


Progress = Callable[[float], None]
"""Called with the fraction of the work that is done."""


def build(
    program: torch.export.ExportedProgram,
    weights: Weights,
    layers: Sequence[LayerAttention] | Mapping[int, LayerAttention],
    recipe: Recipe,
    samples: Samples | None = None,
    states: Sequence[LayerState] = (),
    readers: int = 0,
) -> ir.Model | None:
    """Returns the graph of a traced ``SkvDecoder``, with the ecosystem's names of inputs and outputs.

    Args:
        program: The trace, of a model without weights.
        weights: Where they are when the graph is written.
        layers: Attention of each layer of the model that has a cache; by index, where not every layer has one.
        recipe: Says which weights are quantized.
        samples: Which layers the trace has, if not all.
        states: Of recurrent layers, in the order of layers and names.
        readers: How many further layers read the cache of one of these.

    Returns:
        The graph; None if the traced layers can't stand for the others.

    Raises:
        SkvError: The graph does not have one attention node per layer.
    """
    attention = dict(layers) if isinstance(layers, Mapping) else dict(enumerate(layers))
    caches = [(i, tensor) for tensor in TENSORS for i in attention if samples is None or i in samples.traced]
    kept = [(x.layer, x.name) for x in states if samples is None or x.layer in samples.traced]
    inputs = [*TOKEN_INPUTS, *(past_name(*cache) for cache in caches), *(past_state_name(*x) for x in kept)]
    if len(program.graph_signature.user_inputs) > len(inputs):
        inputs.append(INPUTS_EMBEDS)
    outputs = [LOGITS, *(present_name(*cache) for cache in caches), *(present_state_name(*x) for x in kept)]
    model = translate(program, inputs, outputs)
    _store_weights(model.graph, weights, samples.original if samples is not None else str)
    simplify(model)
    experts.place(model.graph, recipe, MICROSOFT)
    quantize_graph(model.graph, recipe)
    if samples is not None and not repeat(model.graph, samples):
        return None
    nodes = [node for node in model.graph if node.op_type == OP_NAME and node.domain == DOMAIN]
    if len(nodes) != len(layers) + readers:
        raise SkvError(
            "graph: attention nodes", got=len(nodes), expected=f"one in each of {len(layers) + readers} layers"
        )
    _let_the_last_append(nodes)
    _name(model.graph, attention, states)
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type in STATE_OPS:
            node.domain = MICROSOFT
    if any(node.domain == MICROSOFT for node in model.graph):
        model.opset_imports[MICROSOFT] = 1
    return model


def save(
    model: ir.Model,
    folder: Path,
    progress: Progress = lambda fraction: None,
    calibration: Calibration | None = None,
) -> None:
    """Writes ``MODEL_FILE`` and ``DATA_FILE``; weights are read, converted and written slab by slab.

    Args:
        model: The graph.
        folder: Where.
        progress: Told of the fraction of the bytes that is written.
        calibration: Written to ``CALIBRATION_FILE``; the attention of its layers gets it.

    Raises:
        OSError: The disk is full.
        SkvError: The checkpoint does not hold what the graph needs.
    """
    write_external(model, folder / DATA_FILE, progress)
    if calibration is not None:
        calibration.save(folder / CALIBRATION_FILE)
        _add_constants(model.graph, folder / CALIBRATION_FILE)
    ir.save(model, folder / MODEL_FILE)


def _add_constants(graph: ir.Graph, path: Path) -> None:
    """Gives attention nodes the constants of their layers: initializers that are parts of the calibration's file."""
    matrices = entries_of(path)
    for node in graph:
        if node.op_type != OP_NAME or node.domain != DOMAIN:
            continue
        given = dict(zip(INPUT_NAMES, node.inputs, strict=False))
        past = given["past_key"]
        layer = layer_of_cache(past.name) if past is not None else None
        if layer not in matrices:
            continue
        for name, entry in matrices[layer].items():
            shape, kind = ir.Shape(entry.shape), ir.DataType.FLOAT
            place = path.name, entry.start, entry.nbytes, kind
            tensor = ir.ExternalTensor(*place, shape=shape, name=entry.name, base_dir=path.parent)
            value = ir.Value(name=entry.name, shape=shape, type=ir.TensorType(kind), const_value=tensor)
            graph.register_initializer(value)
            given[name] = value
        inputs = in_order({name: value for name, value in given.items() if value is not None})
        node.resize_inputs(len(inputs))
        for i, given_input in enumerate(inputs):
            node.replace_input_with(i, given_input)


def _store_weights(graph: ir.Graph, weights: Weights, original: Callable[[str], str]) -> None:
    """Replaces the trace's empty tensors by the checkpoint's, under their names in the whole model."""
    traced = tuple(graph.initializers.items())
    graph.initializers.clear()
    for name, value in traced:
        given = original(name.removeprefix("model."))
        if given not in weights or value.dtype is None or value.shape is None:
            graph.register_initializer(value)
            continue
        form = Named(weights.canonical(given), value.dtype)
        value.name = given
        value.const_value = LazyWeight(form, weights, value.dtype, value.shape, given)
        graph.register_initializer(value)


def _let_the_last_append(nodes: Sequence[ir.Node]) -> None:
    """Takes the presents off the nodes whose presents nobody wants: they read a cache that a later node appends to.

    Past and present are one buffer when the graph runs, and such a node reads the past. It runs before the one that
    appends because that one's queries are made from its output.
    """
    for node in nodes:
        if not any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
            node.resize_outputs(1)


def _name(graph: ir.Graph, layers: Mapping[int, LayerAttention], states: Sequence[LayerState]) -> None:
    """Names dimensions, and orders inputs and outputs so that each layer's keys and values are adjacent."""
    by_name = {str(value.name): value for value in (*graph.inputs, *graph.outputs)}
    for name in TOKEN_INPUTS:
        columns = "total_sequence_length" if name == ATTENTION_MASK else "sequence_length"
        axes = [3] if len(by_name[name].shape or ()) == 3 else []  # positions of multimodal RoPE
        by_name[name].shape = ir.Shape([*axes, "batch_size", columns])
    logits = by_name[LOGITS]
    assert logits.shape is not None
    logits.shape = ir.Shape(["batch_size", 1 if logits.shape[1] == 1 else "sequence_length", logits.shape[2]])
    inputs, outputs = list(graph.inputs[: len(TOKEN_INPUTS)]), [logits]
    for i, layer in layers.items():
        for tensor, width in zip(TENSORS, cache_widths(layer.layouts), strict=True):
            name = f"{i}.{tensor}"
            shape: list[int | str] = [
                "batch_size",
                layer.params.kv_num_heads,
                f"rows.{name}",
                f"width.{name}" if width is None else width,
            ]
            for value, where in ((by_name[past_name(i, tensor)], inputs), (by_name[present_name(i, tensor)], outputs)):
                value.shape = ir.Shape(shape)
                where.append(value)
    for state in states:
        key = state.layer, state.name
        for value, where in ((by_name[past_state_name(*key)], inputs), (by_name[present_state_name(*key)], outputs)):
            value.shape = ir.Shape(["batch_size", *state.shape])
            where.append(value)
    if (embeds := by_name.get(INPUTS_EMBEDS)) is not None:
        # A default of length 0 makes the input one that may be left out; its batch is its own for the same reason.
        hidden = embeds.shape[2] if embeds.shape is not None else None
        assert isinstance(hidden, int)
        embeds.shape = ir.Shape(["embeds_batch_size", "embeds_length", hidden])
        embeds.const_value = ir.tensor(np.zeros((1, 0, hidden), np.float32), name=INPUTS_EMBEDS)
        graph.register_initializer(embeds)
        inputs.append(embeds)
    graph.inputs[:], graph.outputs[:] = inputs, outputs
    for node in graph:  # shapes inside the graph are torch's symbols: nothing reads them
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape, value.type = None, None


# Translation.


@functools.cache
def register_schema() -> None:
    """Registers the op's ONNX schema, once per process; torch's translation asks for it."""
    schema = onnx.defs.OpSchema
    kinds = {int: schema.AttrType.INT, float: schema.AttrType.FLOAT, str: schema.AttrType.STRING}
    option = schema.FormalParameterOption

    def formal(parameter: Parameter) -> Any:
        kind = option.Optional if parameter.optional else option.Single
        return schema.FormalParameter(parameter.name, parameter.type, param_option=kind)

    floats = ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")
    one, same = ([formal(Parameter(name))] for name in ("hidden", "same"))
    onnx.defs.register_schema(schema(BOUNDARY, DOMAIN, OP_VERSION, inputs=one, outputs=same, type_constraints=[floats]))
    onnx.defs.register_schema(
        schema(
            experts.EXPERTS,
            DOMAIN,
            OP_VERSION,
            inputs=[
                formal(Parameter(name, optional=name.endswith("bias")))
                for name in ("hidden", "router", "gate_up", "gate_up_bias", "down", "down_bias")
            ],
            outputs=[formal(Parameter("output"))],
            type_constraints=[floats],
            attributes=[
                *(schema.Attribute(name, schema.AttrType.INT, "") for name in ("k", "interleaved", "transposed")),
                *(schema.Attribute(name, schema.AttrType.FLOAT, "") for name in ("alpha", "beta", "limit")),
            ],
        )
    )
    onnx.defs.register_schema(
        schema(
            OP_NAME,
            DOMAIN,
            OP_VERSION,
            inputs=[formal(parameter) for parameter in INPUTS],
            outputs=[formal(parameter) for parameter in OUTPUTS],
            type_constraints=[floats],
            attributes=[schema.Attribute(name, kinds[kind], "") for name, kind in ATTRIBUTE_TYPES.items()],
        )
    )
    for name, (attributes, inputs, outputs) in STATE_OPS.items():
        onnx.defs.register_schema(
            schema(
                name,
                DOMAIN,
                OP_VERSION,
                inputs=[formal(Parameter(x, optional=x in ("bias", "beta"))) for x in inputs],
                outputs=[formal(Parameter(f"output{i}")) for i in range(outputs)],
                type_constraints=[floats],
                attributes=[schema.Attribute(x, kinds[kind], "") for x, kind in attributes.items()],
            )
        )


def _attention(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    past_key,
    past_value,
    seqlens_k,
    total_sequence_length,
    head_sink=None,
    query_seqlens=None,
    *_none,  # the constants of calibrated keys, which ``save`` adds
    **attributes,
):
    given = {
        "query": query,
        "key": key,
        "value": value,
        "past_key": past_key,
        "past_value": past_value,
        "seqlens_k": seqlens_k,
        "total_sequence_length": opset23.Cast(total_sequence_length, to=ir.DataType.INT32),
        "head_sink": head_sink,
        "query_seqlens": query_seqlens,
    }
    return onnxscript.values.Opset(DOMAIN, OP_VERSION).QuantizedKVAttention(*in_order(given), **attributes)


def _boundary(hidden):  # type: ignore[no-untyped-def]
    return onnxscript.values.Opset(DOMAIN, OP_VERSION).LayerBoundary(hidden)


def _experts(hidden, router, gate_up, gate_up_bias, down, down_bias, **attributes):  # type: ignore[no-untyped-def]
    opset = onnxscript.values.Opset(DOMAIN, OP_VERSION)
    return opset.Experts(hidden, router, gate_up, gate_up_bias, down, down_bias, **attributes)


def _causal_conv(x, weight, bias, past, activation):  # type: ignore[no-untyped-def]
    made = onnxscript.values.Opset(DOMAIN, OP_VERSION).CausalConvWithState(x, weight, bias, past, activation=activation)
    return made[0]


def _linear_attention(query, key, value, past, decay, beta=None, **attributes):  # type: ignore[no-untyped-def]
    given = (query, key, value, past, decay, *([] if beta is None else [beta]))
    return onnxscript.values.Opset(DOMAIN, OP_VERSION).LinearAttention(*given, **attributes)


def _to_dtype(x, dtype, non_blocking=False, copy=False, memory_format=None):  # type: ignore[no-untyped-def]
    return opset23.Cast(x, to=dtype)


def translate(
    program: torch.export.ExportedProgram, input_names: Sequence[str], output_names: Sequence[str]
) -> ir.Model:
    """Translates a traced ``SkvDecoder`` to ONNX, operator by operator.

    torch.onnx decomposes a program before it translates it, which traces it a second time and takes most of the
    time. A traced decoder hardly needs it: what is left to decompose is ``to``, whose translation stands here. Where a
    program has other operators without a translation, it is decomposed after all.
    """
    register_schema()
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.skv.quantized_kv_attention.default: _attention,
        torch.ops.skv.layer_boundary.default: _boundary,
        torch.ops.skv.experts.default: _experts,
        torch.ops.skv.causal_conv.default: _causal_conv,
        torch.ops.skv.linear_attention.default: _linear_attention,
        torch.ops.aten.to.dtype: _to_dtype,
    }
    _drop_no_ops(program.graph_module)
    _mutate_nothing(program.graph_module)
    if _is_plain(program.graph_module):
        # An operator without a translation is an error: then it is decomposed after all.
        with contextlib.suppress(torch.onnx.OnnxExporterError), _taken_for_decomposed(program):
            return _translate(program, table, input_names, output_names)
    return _translate(program, table, input_names, output_names)


@contextlib.contextmanager
def _taken_for_decomposed(program: torch.export.ExportedProgram) -> Iterator[None]:
    """Meanwhile the program's decomposition, which torch.onnx asks for, is the program itself."""
    program.run_decompositions = lambda *_: program
    try:
        yield
    finally:
        del program.run_decompositions


def _translate(
    program: torch.export.ExportedProgram,
    table: dict[Any, Any],
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> ir.Model:
    with _quiet():
        translated = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            custom_translation_table=table,
            input_names=list(input_names),
            output_names=list(output_names),
        )
    assert translated is not None
    return translated.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences torch.onnx's messages about packages that are not needed, and its deprecations."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _is_plain(module: torch.fx.GraphModule) -> bool:
    """Whether no operator mutates its input or contains a graph; such programs need no decomposition."""
    targets = {node.target for node in module.graph.nodes if node.op == "call_function"}
    overloads = {t for t in targets if isinstance(t, torch._ops.OpOverload)}
    others = {t for t in targets - overloads if isinstance(t, torch._ops.OperatorBase)}
    return not others and not any(t._schema.is_mutable for t in overloads)


_IN_PLACE = {
    torch.ops.aten.mul_.Tensor: torch.ops.aten.mul.Tensor,
    torch.ops.aten.add_.Tensor: torch.ops.aten.add.Tensor,
    torch.ops.aten.sub_.Tensor: torch.ops.aten.sub.Tensor,
    torch.ops.aten.div_.Tensor: torch.ops.aten.div.Tensor,
}


def _mutate_nothing(module: torch.fx.GraphModule) -> None:
    """Puts ``x * y`` in place of ``x *= y`` and the like, where x is an operator's result that shares no memory."""
    for node in module.graph.nodes:
        target = node.args[0] if node.target in _IN_PLACE else None
        if not isinstance(target, torch.fx.Node) or not _owns_its_result(target):
            continue
        if any(isinstance(user.target, torch._ops.OpOverload) and _has_views(user.target) for user in target.users):
            continue  # what shares its memory would have to change, too
        node.target = _IN_PLACE[node.target]
        for user in [user for user in target.users if user > node]:
            user.replace_input_with(target, node)
    module.recompile()


def _owns_its_result(node: torch.fx.Node) -> bool:
    overload = node.target
    return node.op == "call_function" and isinstance(overload, torch._ops.OpOverload) and not _has_views(overload)


def _has_views(overload: torch._ops.OpOverload) -> bool:
    """Whether what an operator returns may share its input's memory."""
    return overload not in _IN_PLACE and any(value.alias_info is not None for value in overload._schema.returns)


def _drop_no_ops(module: torch.fx.GraphModule) -> None:
    """Removes conversions to the type that a tensor already has; models have them for half precision."""
    conversions = (torch.ops.aten.to.dtype, torch.ops.aten.to.device)
    for node in module.graph.nodes:
        if node.target not in conversions or any(user.op == "output" for user in node.users):
            continue
        (source, *_) = node.args
        if node.meta["val"].dtype == source.meta["val"].dtype:
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
    module.recompile()
