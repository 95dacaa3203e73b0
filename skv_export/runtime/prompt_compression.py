"""Prompts made shorter by a draft: a smaller model, or the first layers of the model itself, says which tokens matter.

SpecPC of "Draft-based Approximate Inference for LLMs" (arXiv 2506.08373): the prompt runs through the draft; the tokens
that its last queries look at, in any layer and head, make up the prompt that the model gets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from skv_export.arguments import checked
from skv_export.errors import SkvError, require_module
from skv_export.model_folder.names import INPUT_IDS, LOGITS, MODEL_FILE, TENSORS, past_name, present_name
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.paths import to_path
from skv_export.runtime import arrays
from skv_export.runtime.compaction import WINDOW, token_scores
from skv_export.runtime.session import Session

FRONT = 4
"""First tokens that stay in any case: attention sinks, and what a chat template begins with."""


class PromptCompressor:
    """Leaves out of prompts the tokens that a draft looks at least.

    Args:
        draft: An exported folder.
        first_layers: Use only so many of its first layers; None = all.
        vocab_size: Of the model that gets the prompts.
        execution_provider: ``cpu`` or ``cuda``.
        num_threads: As in ``Session``.

    Raises:
        SkvError: The draft has another vocabulary, not so many layers, or none with full attention; see ``Session``.
    """

    @checked
    def __init__(
        self,
        draft: Path | str,
        *,
        vocab_size: int,
        first_layers: int | None = None,
        execution_provider: str = "cpu",
        num_threads: int = 0,
    ) -> None:
        folder = to_path(draft, "exported folder")
        config, model = ModelConfig.load(folder), None
        if config.vocab_size != vocab_size:
            raise SkvError(
                f"{folder}: as a draft: vocab_size",
                got=config.vocab_size,
                expected=f"{vocab_size}, the model's",
                fix="A draft must have the tokens of the model whose prompts it makes shorter.",
            )
        if first_layers is not None:
            if config.states:
                raise SkvError(f"{folder}: first layers", got="a model with recurrent layers", expected="one without")
            if not 1 <= first_layers <= len(config.layers):
                raise SkvError("first layers", got=first_layers, expected=f"1 ... {len(config.layers)}")
            model = _first_layers(folder / MODEL_FILE, first_layers, vocab_size)
            config = dataclasses.replace(
                config, layers=config.layers[:first_layers], indices=config.indices[:first_layers],
                num_hidden_layers=first_layers, all_logits=False,
            )  # fmt: skip
        self._layers = [i for i, layer in enumerate(config.layers) if not layer.local_window_size]
        if not self._layers:
            raise SkvError(f"{folder}: as a draft: layers with full attention", got="none", expected="at least one")
        self._session = Session(
            folder, execution_provider=execution_provider, num_threads=num_threads, model=model, config=config,
            score_window=WINDOW,
        )  # fmt: skip

    @checked
    def __call__(self, tokens: Sequence[int], keep: float) -> list[int]:
        """Returns a prompt's most important tokens, in their order.

        Args:
            tokens: The prompt.
            keep: Share of the tokens that stay: above 0, at most 1. The first ``FRONT`` and the last ``WINDOW`` always
                do.

        Raises:
            SkvError: Another share, or a prompt that the draft can't take; see ``Session.run``.
        """
        if not 0 < keep <= 1:
            raise SkvError("share of the prompt to keep", got=keep, expected="above 0, at most 1")
        ids = arrays.integers("tokens", [tokens])
        self._session.check_ids(ids, 1)
        count = round(len(tokens) * keep)
        if count >= len(tokens) or len(tokens) <= FRONT + WINDOW:
            return list(tokens)
        self._session.check_length(len(tokens))
        cache = self._session.cache(1, len(tokens))
        self._session.run(ids, None, None, cache)
        scores = np.max([token_scores(self._session, cache, 0, i).max(axis=0) for i in self._layers], axis=0)
        scores[:FRONT] = scores[-WINDOW:] = np.inf
        stay = np.sort(np.argsort(-scores, kind="stable")[: max(count, FRONT + WINDOW)])
        return [int(token) for token in ids[0, stay]]


def _first_layers(path: Path, count: int, vocab_size: int) -> bytes:
    """A folder's graph without what comes after its first layers; its logits are zeros."""
    require_module("onnx", "the first layers of a model")
    import onnx
    from onnx import TensorProto, helper

    if not path.is_file():
        raise SkvError(f"{path}: no such file", fix="Export the model with `skv-export model`.")
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    presents = {present_name(i, name) for i in range(count) for name in TENSORS}
    pasts = {past_name(i, name) for i in range(count) for name in TENSORS}
    makers = {name: node for node in graph.node for name in node.output if name}
    needed, waiting = set[int](), list(presents)
    while waiting:
        node = makers.get(waiting.pop())
        if node is not None and id(node) not in needed:
            needed.add(id(node))
            waiting += [name for name in node.input if name]
    kept = [node for node in graph.node if id(node) in needed]
    used = {name for node in kept for name in node.input}
    shape = helper.make_tensor("skv.no_logits", TensorProto.INT64, [2], [1, vocab_size])
    logits = [x for x in graph.output if x.name == LOGITS]
    kept += [
        helper.make_node("Shape", [INPUT_IDS], ["skv.batch"], start=0, end=1),
        helper.make_node("Concat", ["skv.batch", shape.name], ["skv.logits_shape"], axis=0),
        helper.make_node("ConstantOfShape", ["skv.logits_shape"], [LOGITS]),
    ]
    weights = [*(x for x in graph.initializer if x.name in used), shape]
    inputs = [x for x in graph.input if x.name in pasts or x.name in used or not x.name.startswith("past")]
    outputs = [*(x for x in graph.output if x.name in presents), *logits]
    for field, values in (("node", kept), ("initializer", weights), ("input", inputs), ("output", outputs)):
        copies = [type(x).FromString(x.SerializeToString()) for x in values]
        graph.ClearField(field)
        getattr(graph, field).extend(copies)
    del graph.value_info[:]
    changed: bytes = model.SerializeToString()
    return changed
