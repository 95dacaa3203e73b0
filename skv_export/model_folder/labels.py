"""Names and notes in a graph for its readers: nodes by the module that they come from, and where the model is from."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from skv_export import __version__
from skv_export.model_folder.names import LOGITS, layer_of_cache
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.spec.op import DOMAIN, OP_NAME
from skv_export.spec.recipe import Recipe

PRODUCER = "skv_export"
_ATTENTION = ("self_attn", "self_attention", "attention", "attn")
_PRODUCTS = ("MatMul", "MatMulNBits", "Gemm")
Scope = tuple[str, ...]
"""Parts of a node's name before its operator."""


def label_model(model: ir.Model, config: ModelConfig, recipe: Recipe) -> None:
    """Writes producer and metadata: ``skv.source``, ``skv.recipe`` (TOML), ``skv.bits``, ``skv.version``."""
    before = " ".join(filter(None, (model.producer_name, model.producer_version)))
    if before and model.producer_name != PRODUCER:
        model.metadata_props["skv.traced_by"] = before
    model.producer_name, model.producer_version = PRODUCER, __version__
    source = config.source
    name, revision = str(source.get("name") or ""), source.get("revision")
    model.metadata_props.update(
        {
            "skv.source": f"{name}@{revision}" if revision else name,
            "skv.recipe": recipe.to_toml(),
            "skv.bits": config.bits,
            "skv.version": __version__,
        }
    )


def label_attention(graph: ir.Graph) -> None:
    """Names the attention nodes, ``/model/layers.3/attn/QuantizedKVAttention``; all others keep their names."""
    for node in graph:
        if (layer := _attention_layer(node)) is not None:
            node.name = _join(_in_layer(layer, "attn"), node.op_type)


def label_nodes(graph: ir.Graph) -> None:
    """Names every node: ``/model/layers.3/mlp/down_proj/MatMul``.

    A node with a weight is of the weight's module; one without is of the block that its latest input comes from.
    """
    scopes: dict[ir.Value, tuple[int, Scope]] = {}
    taken: Counter[str] = Counter()
    for place, node in enumerate(graph):
        layer = _attention_layer(node)
        weights = [scope for v in node.inputs if v is not None and v.is_initializer() and (scope := _module(v))]
        if layer is not None:
            scope = _in_layer(layer, "attn")
        elif any(output.name == LOGITS for output in node.outputs) and node.op_type in (
            "MatMul",
            "MatMulNBits",
            "Gemm",
        ):
            scope = ("lm_head",)
        elif weights:
            scope = weights[0]
        else:
            latest = max((scopes[v] for v in node.inputs if v is not None and v in scopes), default=(0, ("model",)))
            scope = _block(latest[1])
        for output in node.outputs:
            scopes[output] = place, scope
        name = _join(scope, node.op_type)
        node.name = f"{name}_{taken[name]}" if taken[name] else name
        taken[name] += 1


def _attention_layer(node: ir.Node) -> int | None:
    if node.op_type != OP_NAME or node.domain != DOMAIN:
        return None
    return next((i for output in node.outputs if (i := layer_of_cache(output.name)) is not None), None)


def _in_layer(layer: int, *parts: str) -> Scope:
    return ("model", f"layers.{layer}", *parts)


def _module(weight: ir.Value) -> Scope | None:
    """The module of a weight: ``model.layers.3.self_attn.q_proj.weight`` gives model, layers.3, attn, q_proj."""
    parts = str(weight.name).split(".")
    if len(parts) < 2:
        return None
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        modules = [part for part in parts if part not in ("model", "transformer", "weight", "bias")]
        return ("model", *modules[:1]) if modules[0] != "lm_head" else ("lm_head",)
    inner = ["attn" if part in _ATTENTION else part for part in parts[numbers[0] + 1 : -1] if not part.isdigit()]
    return _in_layer(int(parts[numbers[0]]), *inner[:2])


def _block(scope: Scope) -> Scope:
    """The block around a module: attention or MLP of a layer, or the model."""
    return (
        scope[:3] if scope[1:2] and scope[1].startswith("layers.") else scope[:1] if scope[0] == "model" else ("model",)
    )


def _join(scope: Scope, operator: str) -> str:
    return "/" + "/".join((*scope, operator))
