"""Determines what a computed attention mask means, by running its part of the graph on a few small inputs.

The nodes that compute the mask of a standard ``Attention`` differ between exporters, so no pattern matches them in
general. The mask is therefore evaluated on inputs for which causal, padded and windowed masks differ, and compared. The
nodes between a cache and attention, which must repeat each key-value head for its query heads, are checked in the same
way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from skv_export.model_folder.names import ATTENTION_MASK, INPUT_IDS, POSITION_IDS
from skv_export.rewrite.attention_nodes import AttentionNode, Refusal

MASKED = -1e4
"""A float mask hides what it lowers by this much or more."""
MAX_NODES = 4096
_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
_Run = Callable[[dict[str, NDArray[Any]]], NDArray[Any]]
_ERRORS = (
    ArithmeticError,
    AttributeError,
    IndexError,
    KeyError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What evaluating nodes that are not what they seem may raise."""


class MaskProbe:
    """Evaluates masks of one graph; layers that share a mask share the evaluation.

    Args:
        model: The source, before anything is changed.
        context_length: The longest sequence to look at: a sliding window is shorter.
    """

    def __init__(self, model: ir.Model, context_length: int) -> None:
        self._model, self._context_length = model, context_length
        self._windows: dict[tuple[str, bool], int] = {}

    def window(self, attention: AttentionNode) -> int:
        """Returns ``local_window_size`` of a standard Attention: 0 where its mask is causal and nothing else.

        Raises:
            Refusal: The mask is something else, or can't be evaluated by itself.
        """
        if attention.mask is None:
            return 0
        key = (attention.mask.name or "", attention.is_causal)
        if key not in self._windows:
            self._windows[key] = self._evaluate(attention)
        return self._windows[key]

    def check_repeats(self, attention: AttentionNode) -> None:
        """Checks that a node whose past is concatenated before it attends to the cache as the op does.

        Raises:
            Refusal: Its keys or values are not the cache's, each head as often as it has query heads.
        """
        if attention.new is None:
            return
        heads, kv_heads = attention.params.num_heads, attention.params.kv_num_heads
        past, tokens = 3, 2
        rng = np.random.default_rng(0)
        for name, value, cache in zip(("key", "value"), attention.node.inputs[1:3], attention.present, strict=True):
            if value is None or value is cache:
                continue
            what = f"its {name} {value.name!r}"
            inputs = self._leaves(value, what, cache)
            run = self._cut(value, what, [cache, *inputs])
            held = rng.integers(0, 100, (1, kv_heads, past + tokens, attention.head_dim))
            feeds = {str(x.name): _feed(x, past, tokens, 0) for x in inputs}
            found = run(feeds | {str(cache.name): held.astype(attention.dtype.numpy())})
            if not np.array_equal(found, np.repeat(held, heads // kv_heads, axis=1)):
                raise Refusal(f"{what} is not the cache with each head repeated {heads // kv_heads} times")

    def _evaluate(self, attention: AttentionNode) -> int:
        mask = attention.mask
        assert mask is not None
        what = f"attn_mask {mask.name!r}"
        inputs = self._leaves(mask, what)
        run = self._cut(mask, what, inputs)

        def seen(past: int, tokens: int, padding: int = 0) -> NDArray[np.bool_]:
            value = run({str(x.name): _feed(x, past, tokens, padding) for x in inputs})
            return _allowed(value, mask, past, tokens, attention.is_causal)

        length = max(self._context_length, 16)
        visible = int(seen(length - 1, 1).sum())
        window = 0 if visible == length else visible
        for past, tokens, padding in ((0, 5, 0), (0, 5, 2), (7, 5, 0), (length - 1, 1, 0)):
            real = tokens - padding
            found = seen(past, tokens, padding)[:real, : past + real]
            distance = past + np.arange(real)[:, None] - np.arange(past + real)[None, :]
            wanted = (distance >= 0) & ((distance < window) if window else True)
            if not np.array_equal(found, wanted):
                raise Refusal(f"attn_mask {mask.name!r} is neither causal nor a sliding window")
        return window

    def _cut(self, value: ir.Value, what: str, inputs: list[ir.Value]) -> _Run:
        """The part of the graph from some values to another, as a function."""
        try:
            graph = ir.convenience.extract(self._model.graph, inputs, [value])
            evaluator = ReferenceEvaluator(ir.to_proto(ir.Model(graph, ir_version=self._model.ir_version)))
        except _ERRORS as error:
            raise Refusal(f"{what} can't be cut out of the graph: {error}") from error

        def run(feeds: dict[str, NDArray[Any]]) -> NDArray[Any]:
            try:
                outputs: Any = evaluator.run(None, feeds)
                return np.asarray(outputs[0])
            except _ERRORS as error:
                raise Refusal(f"{what} can't be evaluated: {str(error)[:200]}") from error

        return run

    def _leaves(self, value: ir.Value, what: str, stop: ir.Value | None = None) -> list[ir.Value]:
        """The graph's inputs that a value depends on, besides ``stop``."""
        inputs: list[ir.Value] = []
        pending, visited = [value], {value, stop}
        while pending:
            value = pending.pop()
            maker = value.producer()
            if value.is_graph_input():
                inputs.append(value)
            elif maker is None and isinstance(value.const_value, ir.ExternalTensor):
                raise Refusal(f"{what} depends on weights ({value.name!r})")
            elif maker is not None and any(x.type in _GRAPHS for x in maker.attributes.values()):
                raise Refusal(f"{what} depends on a branch or loop, {maker.name!r}")
            elif maker is not None:
                fresh = [x for x in maker.inputs if x is not None and x not in visited]
                visited.update(fresh)
                pending += fresh
            if len(visited) > MAX_NODES:
                raise Refusal(f"{what} depends on the model's hidden states")
        return inputs


def _feed(value: ir.Value, past: int, tokens: int, padding: int) -> NDArray[Any]:
    """An input of the graph for one sequence whose last ``padding`` tokens are padding."""
    if value.shape is None or value.dtype is None:
        raise Refusal(f"the graph's input {value.name!r} has no shape")
    if len(value.shape) == 4:
        fixed = [size if isinstance(size, int) else 1 for size in value.shape]
        return np.zeros((1, fixed[1], past, fixed[3]), value.dtype.numpy())
    if value.name == ATTENTION_MASK:
        array = np.ones((1, past + tokens), np.int64)
        array[:, past + tokens - padding :] = 0
    elif value.name == POSITION_IDS:
        array = np.arange(past, past + tokens)[None, :]
    elif value.name == INPUT_IDS:
        array = np.zeros((1, tokens), np.int64)
    else:
        raise Refusal(f"its mask depends on the graph's input {value.name!r}")
    return array.astype(value.dtype.numpy())


def _allowed(value: NDArray[Any], mask: ir.Value, past: int, tokens: int, is_causal: bool) -> NDArray[np.bool_]:
    """The pairs that a mask allows, ``[tokens, past + tokens]``, the same for all heads."""
    if value.dtype != np.bool_:
        value = value.astype(np.float64)
        if np.any((value != 0) & ~(value <= MASKED)):
            raise Refusal(f"attn_mask {mask.name!r} adds a bias to the scores")
        value = value == 0
    shape = (math.prod(value.shape[:-2]), tokens, value.shape[-1])
    if value.ndim < 2 or value.shape[-2] not in (1, tokens) or value.shape[-1] > past + tokens:
        raise Refusal(f"attn_mask {mask.name!r} has shape {list(value.shape)}")
    value = np.broadcast_to(value.reshape(shape[0], -1, shape[2]), shape)
    if not (value == value[:1]).all():
        raise Refusal(f"attn_mask {mask.name!r} differs from head to head")
    # What a short mask leaves out is masked (the standard's words).
    allowed = np.zeros((tokens, past + tokens), np.bool_)
    allowed[:, : shape[2]] = value[0]
    if is_causal:
        allowed &= np.arange(past + tokens)[None, :] <= past + np.arange(tokens)[:, None]
    return allowed
