"""Traces two layers of each kind and copies their subgraph for the other layers.

Layers of one kind have the same attention, modules, parameters and settings. Of each kind the first and the last layer
are traced; if their graphs differ only in the weights, the first is copied for all layers between them. If anything
else differs, or the model is not a stack of layers, it is traced whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from skv_export.checkpoints.block_weights import BlockMatrix
from skv_export.export.lazy_weights import LazyWeight
from skv_export.model_folder.names import PAST, PAST_STATE, layer_of_cache, layer_of_state
from skv_export.spec.op import DOMAIN, LayerAttention

BOUNDARY = "LayerBoundary"
"""The operator, of no effect, that a traced graph has before each layer and after the last one."""

torch.library.define("skv::layer_boundary", "(Tensor hidden) -> Tensor")
torch.library.impl("skv::layer_boundary", "CPU", torch.clone)
torch.library.register_fake("skv::layer_boundary", torch.empty_like)


@dataclass(frozen=True)
class Samples:
    """Which layers of a model are traced.

    Attributes:
        path: Name of the model's list of layers.
        kinds: Kind of each layer of the model, a small number.
        traced: Indices of the layers that are traced, rising.
    """

    path: str
    kinds: tuple[int, ...]
    traced: tuple[int, ...]

    def original(self, name: str) -> str:
        """Returns the name in the whole model of a tensor of the cut model, whose layers are renumbered."""
        start = f"{self.path}."
        if not name.startswith(start):
            return name
        place, _, rest = name.removeprefix(start).partition(".")
        return f"{start}{self.traced[int(place)]}.{rest}"

    def layer(self, name: str) -> int | None:
        """Returns the layer that a tensor of the whole model belongs to."""
        start = f"{self.path}."
        return int(name.removeprefix(start).partition(".")[0]) if name.startswith(start) else None

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Returns the first and the last traced layer of each kind."""
        for kind in sorted(set(self.kinds)):
            same = [i for i in self.traced if self.kinds[i] == kind]
            yield same[0], same[-1]


def find_stack(model: PreTrainedModel, count: int) -> tuple[str, torch.nn.ModuleList] | None:
    """Returns the name and the list of a model's layers; None if it has not just one list of so many modules."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    ]
    return lists[0] if len(lists) == 1 else None


def choose(
    model: PreTrainedModel, layers: Sequence[LayerAttention | None], held: Mapping[str, BlockMatrix] | None = None
) -> Samples | None:
    """Returns which layers to trace; None if all of them.

    Args:
        model: The model.
        layers: Attention of each layer; None where it has none.
        held: Matrices that are stored as the checkpoint quantized them: layers of other formats are of another kind.
    """
    found = find_stack(model, len(layers))
    if found is None:
        return None
    path, stack = found
    held = held or {}
    lists_of_config = _per_layer(model.config.get_text_config(), len(layers))
    signatures = [
        (
            layer,
            _signature(module),
            tuple(repr(values[i]) for values in lists_of_config.values()),
            tuple(
                (name, held[whole].format)
                for name, _ in module.named_parameters()
                if (whole := f"{path}.{i}.{name}") in held
            ),
        )
        for i, (layer, module) in enumerate(zip(layers, stack, strict=True))
    ]
    numbers = {signature: i for i, signature in reversed(list(enumerate(signatures)))}
    kinds = tuple(numbers[signature] for signature in signatures)
    last = {kind: i for i, kind in enumerate(kinds)}
    traced = tuple(sorted({*kinds, *last.values()}))
    return Samples(path, kinds, traced) if len(traced) < len(layers) else None


def _per_layer(config: Any, count: int) -> dict[str, Sequence[Any]]:
    """The configuration's lists with one value per layer."""
    return {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == count and not name.startswith("_")
    }


def _signature(layer: torch.nn.Module) -> tuple[object, ...]:
    """A layer's structure, without its weights and its position."""
    parts: list[object] = []
    for name, module in layer.named_modules():
        parts.append((name, type(module)))
        parts += [
            (key, value)
            for key, value in sorted(vars(module).items())
            if key != "layer_idx" and isinstance(value, bool | int | float | str | None)
        ]
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        parts += [(key, tuple(tensor.shape), tensor.dtype) for key, tensor in tensors]
    return tuple(parts)


@contextlib.contextmanager
def cut(model: PreTrainedModel, samples: Samples) -> Iterator[None]:
    """Context manager: the model has only the layers to trace, with boundaries between them."""
    parent, _, name = samples.path.rpartition(".")
    owner = model.get_submodule(parent)
    whole: torch.nn.ModuleList = getattr(owner, name)
    traced = [whole[i] for i in samples.traced]
    config = model.config.get_text_config()
    changed: dict[str, Any] = {
        key: [values[i] for i in samples.traced] for key, values in _per_layer(config, len(samples.kinds)).items()
    }
    changed["num_hidden_layers"] = len(traced)
    before = {key: getattr(config, key) for key in changed}
    hooks = [layer.register_forward_pre_hook(_mark_input, with_kwargs=True) for layer in traced]
    hooks.append(traced[-1].register_forward_hook(_mark_output))
    try:
        setattr(owner, name, torch.nn.ModuleList(traced))
        vars(config).update(changed)
        yield
    finally:
        setattr(owner, name, whole)
        vars(config).update(before)
        for hook in hooks:
            hook.remove()


def _mark_input(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    if args:
        return (torch.ops.skv.layer_boundary(args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": torch.ops.skv.layer_boundary(kwargs["hidden_states"])}


def _mark_output(_: torch.nn.Module, __: object, output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return torch.ops.skv.layer_boundary(output)
    return (torch.ops.skv.layer_boundary(output[0]), *output[1:])


# The graph.


@dataclass
class _Region:
    """The subgraph of one layer.

    Attributes:
        index: The layer.
        start: What comes in: the output of the boundary before it.
        nodes: Its nodes, in order.
        end: What goes out: the input of the boundary behind it.
    """

    index: int
    start: ir.Value
    nodes: list[ir.Node]
    end: ir.Value | None


def repeat(graph: ir.Graph, samples: Samples) -> bool:
    """Turns the graph of the traced layers into the graph of all layers, in place.

    Args:
        graph: With inputs ``past_key_values.N.key`` and outputs ``present.N.key`` (``value``) for the traced layers N,
            and the like for recurrent states.
        samples: Which these are.

    Returns:
        Whether it was possible; if not, the graph is as it was.
    """
    regions = _regions(graph, samples)
    if regions is None or not all(_alike(graph, samples, regions[a], regions[b]) for a, b in samples.pairs()):
        return False
    first = {samples.kinds[a]: regions[a] for a, _ in samples.pairs()}
    boundaries = [node for node in graph if _is_boundary(node)]
    hidden, behind = boundaries[0].inputs[0], boundaries[-1].outputs[0]
    assert hidden is not None
    inputs, outputs = _without_layers(graph.inputs), _without_layers(graph.outputs)
    made: list[ir.Node] = []
    for index, kind in enumerate(samples.kinds):
        hidden, pasts, presents = _copy(graph, samples, first[kind], index, hidden, made)
        inputs += pasts
        outputs += presents
    behind.replace_all_uses_with(hidden)
    graph.outputs[:] = outputs
    old = [*boundaries, *(node for region in regions.values() for node in region.nodes)]
    graph.remove(old, safe=True)
    graph.inputs[:] = inputs
    for name, value in tuple(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
    graph.extend(made)
    graph.sort()
    return True


def _is_boundary(node: ir.Node) -> bool:
    return node.domain == DOMAIN and node.op_type == BOUNDARY


def _without_layers(values: Sequence[ir.Value]) -> list[ir.Value]:
    return [value for value in values if _layer_of(value.name) is None]


def _layer_of(name: str | None) -> int | None:
    """The layer whose cache or state an input or output of the graph is."""
    layer = layer_of_cache(name)
    return layer_of_state(name) if layer is None else layer


def _regions(graph: ir.Graph, samples: Samples) -> dict[int, _Region] | None:
    """Cuts the graph at its boundaries; None if a node belongs to no layer or to two."""
    places = {index: place for place, index in enumerate(samples.traced)}
    owner: dict[ir.Value, int] = {}
    for value in (*graph.inputs, *graph.initializers.values()):
        index = _layer_of(value.name) if value.is_graph_input() else samples.layer(str(value.name))
        if index is not None:
            owner[value] = places[index]
    nodes: list[list[ir.Node]] = [[] for _ in samples.traced]
    boundaries: list[ir.Node] = []
    behind = len(samples.traced)
    for node in graph:
        owners = {owner[value] for value in node.inputs if value is not None and value in owner}
        if _is_boundary(node):
            if owners != ({len(boundaries) - 1} if boundaries else set()):
                return None
            owners = {len(boundaries)}
            boundaries.append(node)
        elif len(owners) > 1 or any(isinstance(x.value, ir.Graph) for x in node.attributes.values()):
            return None
        elif owners != set() and owners != {behind}:
            nodes[min(owners)].append(node)
        owner.update((output, place) for output in node.outputs for place in owners)
    if len(boundaries) != behind + 1:
        return None
    return {
        index: _Region(index, boundaries[place].outputs[0], nodes[place], boundaries[place + 1].inputs[0])
        for index, place in places.items()
    }


def _alike(graph: ir.Graph, samples: Samples, a: _Region, b: _Region) -> bool:
    """Whether two layers of a kind differ only in their weights and caches."""
    if len(a.nodes) != len(b.nodes):
        return False
    same: dict[ir.Value | None, ir.Value | None] = {a.start: b.start, None: None}
    for one, other in zip(a.nodes, b.nodes, strict=True):
        if (one.domain, one.op_type, _attributes(one)) != (other.domain, other.op_type, _attributes(other)):
            return False
        for x, y in zip(one.inputs, other.inputs, strict=True):
            if x not in same and x is not None:
                same[x] = y if _counterpart(samples, x, y, a.index, b.index) else x
            if same[x] is not y:
                return False
        same.update(zip(one.outputs, other.outputs, strict=True))
    return same[a.end] is b.end


def _attributes(node: ir.Node) -> dict[str, object]:
    """A node's attributes, tensors by what they hold: two of them are never equal."""
    values = ((name, attribute.value) for name, attribute in node.attributes.items())
    return {
        name: (x.dtype, tuple(x.shape.numpy()), x.tobytes()) if isinstance(x, ir.TensorProtocol) else x
        for name, x in values
    }


def _counterpart(samples: Samples, x: ir.Value, y: ir.Value | None, a: int, b: int) -> bool:
    """Whether the outer value ``y`` has the same role for layer ``b`` as ``x`` for layer ``a``."""
    if y is None:
        return False
    if x is y:
        return True
    if x.is_graph_input():
        return _renamed_cache(x.name, b) == y.name
    one, other = x.const_value, y.const_value
    if not isinstance(one, LazyWeight) or not isinstance(other, LazyWeight):
        return False
    renamed = one.form.renamed(lambda name: _renamed(samples, name, a, b))
    return (renamed, one.dtype, one.shape) == (other.form, other.dtype, other.shape)


def _renamed(samples: Samples, name: str, a: int, b: int) -> str:
    prefix = f"{samples.path}.{a}."
    return f"{samples.path}.{b}.{name.removeprefix(prefix)}" if name.startswith(prefix) else name


def _renamed_cache(name: str | None, index: int) -> str:
    first, _, last = str(name).split(".")
    return f"{first}.{index}.{last}"


def _copy(
    graph: ir.Graph, samples: Samples, region: _Region, index: int, hidden: ir.Value, made: list[ir.Node]
) -> tuple[ir.Value, list[ir.Value], list[ir.Value]]:
    """Appends layer ``index``'s nodes to ``made``; returns its output, its past and its present caches and states."""
    new: dict[ir.Value, ir.Value] = {region.start: hidden}
    caches: dict[str, ir.Value] = {}
    for node in region.nodes:
        inputs: list[ir.Value | None] = []
        for value in node.inputs:
            if value is not None and value not in new:
                new[value] = _outer(graph, samples, value, region.index, index)
                if value.is_graph_input() and _layer_of(value.name) is not None:
                    caches[str(new[value].name)] = new[value]
            inputs.append(None if value is None else new[value])
        copy = ir.Node(
            node.domain, node.op_type, inputs, tuple(node.attributes.values()), num_outputs=len(node.outputs)
        )
        for old, output in zip(node.outputs, copy.outputs, strict=True):
            output.type, output.shape = old.type, old.shape
            if old.is_graph_output():
                output.name = _renamed_cache(old.name, index)
                caches[output.name] = output
            new[old] = output
        made.append(copy)
    assert region.end is not None
    pasts = [value for name, value in caches.items() if name.partition(".")[0] in (PAST, PAST_STATE)]
    return new[region.end], pasts, [value for value in caches.values() if value not in pasts]


def _outer(graph: ir.Graph, samples: Samples, value: ir.Value, a: int, b: int) -> ir.Value:
    """The value for layer ``b`` that corresponds to an outer value of layer ``a``; weights and caches are created."""
    if value.is_graph_input() and _layer_of(value.name) is not None:
        return ir.Value(name=_renamed_cache(value.name, b), type=value.type, shape=value.shape)
    tensor = value.const_value
    if not value.is_initializer() or not isinstance(tensor, LazyWeight):
        return value
    form = tensor.form.renamed(lambda name: _renamed(samples, name, a, b))
    name = _renamed(samples, str(value.name), a, b)
    if form == tensor.form or name == value.name:
        return value
    if name not in graph.initializers:
        stored = LazyWeight(form, tensor.reader, tensor.dtype, tensor.shape, name)
        graph.register_initializer(ir.Value(name=name, type=value.type, shape=value.shape, const_value=stored))
    return graph.initializers[name]
