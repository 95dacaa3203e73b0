"""Mixtures of experts: ONNX Runtime's MoE and QMoE operators in place of products with gathered matrices.

transformers' layers of experts share an interface (``set_experts_implementation``). While a model is traced, those with
a gated SiLU, or gpt_oss's clamped one, become one operator ``skv::experts`` each; ``place`` makes MoE of it, or QMoE
with weights in 4 bits. All others gather the matrices of each token's experts.

Both operators choose experts by themselves, by the softmax of the k best of ``router``. The layer's router has chosen
already, in its own way, so ``router`` is the logarithm of its weights, and a number below all of them elsewhere. The
softmax divides the weights by their sum; the output is multiplied by it again.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

from skv_export.checkpoints.block_weights import CODES, SCALES, ZERO_POINTS
from skv_export.export.expert_gates import gate_of
from skv_export.export.lazy_weights import TORCH_TYPES, LazyWeight, Named, Reader
from skv_export.export.weight_quantization import BLOCK, quantize
from skv_export.spec.op import DOMAIN
from skv_export.spec.recipe import Recipe

EXPERTS = "Experts"
"""The operator that a traced graph has until ``place``."""
IMPLEMENTATION = "skv_experts"
"""Name under which the layers' forward pass is registered with transformers."""
_OTHERS = -1e4
"""Router's number of an expert that was not chosen: below the logarithm of any weight."""
_LEAST = 1e-30
"""Least weight of an expert."""

torch.library.define(
    "skv::experts",
    "(Tensor hidden, Tensor router, Tensor gate_up, Tensor? gate_up_bias, Tensor down, Tensor? down_bias, *, int k, "
    "float alpha, float beta, float limit, int interleaved, int transposed) -> Tensor",
)
torch.library.register_fake("skv::experts", lambda hidden, *_, **__: torch.empty_like(hidden))


@contextlib.contextmanager
def as_operators(model: PreTrainedModel, recipe: Recipe) -> Iterator[None]:
    """Context manager: a model that is traced has operators for its experts, where the CPU provider runs them."""
    if not model._can_set_experts_implementation() or not (recipe.dtype == "fp32" or recipe.weight_bits == 4):
        yield
        return
    before = model.config._experts_implementation
    model.set_experts_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def _forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """A layer's experts: ``[T, hidden]``, and of each token the experts and their weights ``[T, k]``."""
    form = gate_of(module)
    if form is None:
        made: torch.Tensor = batched_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
        return made
    weights = top_k_weights.float()
    router = weights.new_full((hidden_states.shape[0], module.num_experts), _OTHERS)
    router = router.scatter(1, top_k_index, weights.clamp(min=_LEAST).log()).to(hidden_states.dtype)
    biases = [getattr(module, f"{name}_proj_bias", None) for name in ("gate_up", "down")]
    output = torch.ops.skv.experts(
        hidden_states, router, module.gate_up_proj, biases[0], module.down_proj, biases[1],
        k=top_k_index.shape[1], interleaved=int(not module.is_concatenated), transposed=int(module.is_transposed),
        **dataclasses.asdict(form),
    )  # fmt: skip
    return output * weights.sum(1, keepdim=True).to(output.dtype)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)


# The graph.


@dataclass(frozen=True)
class ExpertRows:
    """The matrices ``[E, N, K]`` of a layer's experts as the operators take them, expert by expert.

    Attributes:
        name: The model's name of them.
        dtype: The number format to store.
        transposed: The model has ``[E, K, N]``.
        halves: The model has all gates before all others, and the operators take them in turns.
        part: Of matrices in 4 bits, one of ``block_weights.PARTS``; "" = as they are.
    """

    name: str
    dtype: ir.DataType
    transposed: bool
    halves: bool
    part: str = ""

    def slabs(self, reader: Reader) -> Iterator[torch.Tensor]:
        """As ``WeightExpr`` says."""
        whole = reader.tensor(self.name)
        for expert in whole:
            rows = expert.T if self.transposed else expert
            if self.halves:
                rows = rows.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
            if not self.part:
                yield rows.to(TORCH_TYPES[self.dtype])
                continue
            parts = dict(zip((CODES, SCALES, ZERO_POINTS), quantize(_floats(rows), 4), strict=True))
            kept = torch.from_numpy(parts[self.part])
            yield kept.to(TORCH_TYPES[self.dtype]) if self.part == SCALES else kept
        reader.release()

    def renamed(self, rename: Callable[[str], str]) -> ExpertRows:
        """As ``WeightExpr`` says."""
        return dataclasses.replace(self, name=rename(self.name))


def _floats(rows: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return rows.float().contiguous().numpy()


def place(graph: ir.Graph, recipe: Recipe, domain: str) -> None:
    """Puts MoE in place of the traced operators, or QMoE where the recipe rounds weights to 4 bits and blocks fit.

    Args:
        graph: Changed in place.
        recipe: Says how weights are stored.
        domain: Of both operators.
    """
    for node in tuple(graph):
        if (node.domain, node.op_type) == (DOMAIN, EXPERTS):
            _place(graph, node, recipe, domain)


def _place(graph: ir.Graph, node: ir.Node, recipe: Recipe, domain: str) -> None:
    hidden, router, gate_up, gate_bias, down, down_bias = (*node.inputs, None)[:6]
    assert gate_up is not None and down is not None
    given = {name: node.attributes[name].value for name in ("k", "alpha", "beta", "limit", "interleaved", "transposed")}
    halves, transposed = not given["interleaved"], bool(given["transposed"])
    attributes: dict[str, Any] = {"k": given["k"], "activation_type": "swiglu", "swiglu_fusion": 1}
    attributes |= {"normalize_routing_weights": 1, "activation_alpha": given["alpha"], "activation_beta": given["beta"]}
    if given["limit"]:
        attributes["swiglu_limit"] = given["limit"]
    matrices = [_Matrices(graph, gate_up, transposed, halves), _Matrices(graph, down, transposed, False)]
    if gate_bias is not None and halves:
        raise AssertionError("experts with a bias have their gates and the others in turns")
    if recipe.weight_bits == 4 and all(x.inputs % BLOCK == 0 for x in matrices):
        first, second = ([x.part(part) for part in (CODES, SCALES, ZERO_POINTS)] for x in matrices)
        inputs = [hidden, router, first[0], first[1], gate_bias, second[0], second[1], down_bias, None, None, None]
        inputs += [first[2], second[2]]
        attributes |= {"expert_weight_bits": 4, "block_size": BLOCK, "weights_prepacked": 0}
        attributes["accuracy_level"] = 1 if recipe.exact_products else 4
        made = ir.node("QMoE", inputs, attributes, domain=domain)
    else:
        inputs = [hidden, router, matrices[0].part(""), gate_bias, matrices[1].part(""), down_bias]
        while inputs[-1] is None:
            inputs.pop()
        made = ir.node("MoE", inputs, attributes, domain=domain)
    old, new = node.outputs[0], made.outputs[0]
    new.type, new.shape = old.type, old.shape
    graph.insert_before(node, made)
    old.replace_all_uses_with(new)
    graph.remove(node, safe=True)
    for value in (gate_up, down):
        if not value.uses():
            graph.initializers.pop(str(value.name), None)


class _Matrices:
    """A layer's experts' matrices in a graph."""

    def __init__(self, graph: ir.Graph, value: ir.Value, transposed: bool, halves: bool) -> None:
        tensor = value.const_value
        assert isinstance(tensor, LazyWeight) and isinstance(tensor.form, Named)
        self._graph, self._tensor = graph, tensor
        self._form = ExpertRows(tensor.form.name, tensor.dtype, transposed, halves)
        experts, rows, inputs = (int(n) for n in tensor.shape.numpy())
        self.experts, self.rows, self.inputs = experts, *((inputs, rows) if transposed else (rows, inputs))

    def part(self, part: str) -> ir.Value:
        """The initializer of one part, or of the matrices as they are."""
        width = {"": self.inputs, CODES: self.inputs // 2, SCALES: self.inputs // BLOCK}
        columns = width.get(part, -(-self.inputs // BLOCK // 2))
        dtype = self._tensor.dtype if part in ("", SCALES) else ir.DataType.UINT8
        name, shape = f"{self._tensor.name}.{part or 'rows'}", ir.Shape([self.experts, self.rows, columns])
        stored = LazyWeight(dataclasses.replace(self._form, part=part), self._tensor.reader, dtype, shape, name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape, const_value=stored)
        self._graph.register_initializer(value)
        return value
