"""The graph of an exported folder in ONNX Runtime: opened, checked against ``skv_config.json``, and called.

One call appends new tokens to a cache. What a caller may pass is checked in ``session.py``; here all fits.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from skv_export.errors import SkvError, require_module
from skv_export.model_folder.names import (
    ATTENTION_MASK,
    INPUT_IDS,
    INPUTS_EMBEDS,
    LOGITS,
    MODEL_FILE,
    POSITION_IDS,
    SKV_CONFIG_FILE,
    TENSORS,
    TOKEN_INPUTS,
    past_name,
    past_state_name,
)
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.native.library import Library
from skv_export.runtime.cache import Cache
from skv_export.runtime.cuda_graph import DecodeGraph, uncaptured
from skv_export.runtime.last_logits import with_logits
from skv_export.runtime.providers import brief, check_kernels, load_error, open_session, ort_errors
from skv_export.runtime.queries import QueryOutput, with_queries
from skv_export.spec.op import OP_NAME

logger = logging.getLogger(__name__)
Int64 = NDArray[np.int64]
Logits = NDArray[np.float32]


class Graph:
    """A folder's graph, loaded.

    Args:
        folder: The folder.
        config: What its graph computes.
        library: The native library.
        execution_provider: ``cpu`` or ``cuda``.
        cuda_graph: Capture steps of decoding as CUDA graphs.
        num_threads: Threads inside an op; 0 = ONNX Runtime's choice.
        spinning: Its threads wait busily for the next op.
        model: The graph as bytes, in place of ``model.onnx``.
        num_logits: Last tokens of a call whose logits are returned, where the folder's graph returns one token's.
        score_window: Last tokens of a call whose queries are returned; 0 = none.

    Attributes:
        onnx: onnxruntime's InferenceSession.
        inputs: Names of the graph's inputs beside the caches.
        cuda_graph: As asked for.
        num_logits: As asked for.
        score_window: As asked for.
        queries: The outputs that return queries, by layer; none without ``score_window``.
        captured: The CUDA graphs, by cache.

    Raises:
        SkvError: The graph is missing or damaged, is another one than ``config`` describes, or can't run here.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        library: Library,
        *,
        execution_provider: str,
        cuda_graph: bool,
        num_threads: int,
        spinning: bool,
        model: bytes | None,
        num_logits: int = 1,
        score_window: int = 0,
    ) -> None:
        self._config, self.cuda_graph, self.num_logits, self.score_window = config, cuda_graph, num_logits, score_window
        self._library = library
        self.captured: WeakKeyDictionary[Cache, DecodeGraph] = WeakKeyDictionary()
        self._numbers = itertools.count(1)
        path = folder / MODEL_FILE
        if cuda_graph and config.states:
            raise SkvError(
                f"{folder}: cuda_graph",
                got="a model with recurrent layers",
                expected="one without: a capture runs its step several times, which a state would count",
                fix="Leave cuda_graph out.",
            )
        if model is None and not path.is_file():
            raise SkvError(f"{path}: no such file", fix="Export the model with `skv-export model`.")
        if num_logits > 1 and not config.all_logits:
            model = with_logits(path, num_logits).SerializeToString()
        self.queries: list[QueryOutput] = []
        if score_window:
            model, self.queries = _with_queries(path, model, config, score_window)
        start = time.perf_counter()
        options = session_options(folder, num_threads, spinning)
        try:
            self.onnx = open_session(
                str(path) if model is None else model, options, execution_provider, library,
                op_type=OP_NAME, cuda_graph=cuda_graph,
            )  # fmt: skip
        except ort_errors() as error:
            raise load_error(path, error) from error
        check_kernels(config, execution_provider, library)
        taken = time.perf_counter() - start
        logger.info("%s: %d layers of %s, loaded on %s in %.1f s", path, len(config.layers), config.bits,
                    execution_provider, taken)  # fmt: skip
        self.inputs = _token_inputs(folder, {x.name: x.shape for x in self.onnx.get_inputs()}, config)
        hidden = {x.name: x.shape[2] for x in self.onnx.get_overridable_initializers()}.get(INPUTS_EMBEDS, 0)
        if hidden != config.inputs_embeds:
            raise SkvError(
                f"{folder}: {MODEL_FILE} and {SKV_CONFIG_FILE} do not belong together: {INPUTS_EMBEDS}",
                got=f"{hidden} channels",
                expected=config.inputs_embeds,
                fix="Export the model again.",
            )
        if self.queries and POSITION_IDS not in self.inputs:
            raise SkvError(
                f"{path}: score_window: positions",
                got="counted by the graph itself",
                expected=f"the input {POSITION_IDS}: a compacted cache has fewer tokens than positions",
                fix="Export the checkpoint itself.",
            )

    def run(
        self,
        cache: Cache,
        input_ids: Int64,
        new: NDArray[np.bool_],
        position_ids: Int64,
        inputs_embeds: Logits | None = None,
    ) -> tuple[Logits, list[Logits]]:
        """Appends new tokens to a cache with room for them; the caller updates its lengths.

        Args:
            cache: Of B sequences.
            input_ids: ``[B, S]``.
            new: ``[B, S]``, which columns hold tokens.
            position_ids: ``[B, S]``; not looked at where the graph counts positions itself. With several axes
                ``[axes, B, S]``, or one row that stands for all.
            inputs_embeds: ``[B, S, hidden]``, in the place of the tokens.

        Returns:
            ``[B, min(S, num_logits), vocab_size]``, or ``[B, S, vocab_size]`` where the graph returns all logits; and
            the queries ``[B, min(S, score_window), width]``, by layer.

        Raises:
            SkvError: ONNX Runtime fails; the cache is empty then.
        """
        if self._config.position_axes > 1:
            position_ids = np.broadcast_to(position_ids, (self._config.position_axes, *input_ids.shape))
        given = {INPUT_IDS: input_ids, POSITION_IDS: position_ids}
        inputs: dict[str, Int64 | Logits] = {name: given[name] for name in self.inputs if name in given}
        if self._config.inputs_embeds:  # bound in every call: a binding would keep those of the call before
            none = np.zeros((1, 0, self._config.inputs_embeds), np.float32)
            inputs[INPUTS_EMBEDS] = none if inputs_embeds is None else inputs_embeds
        tokens = input_ids.shape[1]
        columns = tokens if self._config.all_logits else min(tokens, self.num_logits)
        logits = np.empty((len(input_ids), columns, self._config.vocab_size), np.float32)
        rows = len(input_ids), min(tokens, self.score_window)
        outputs = {LOGITS: logits, **{x.name: np.empty((*rows, x.width), np.float32) for x in self.queries}}
        try:
            if not self._replay(cache, inputs, new, outputs):
                # The graph takes lengths from the mask's sums: the shortest that has them says the same as any.
                past = np.arange(cache.held.max())[None, :] < cache.held[:, None]
                mask = np.concatenate([past, new], axis=1).astype(np.int64)
                self._call(cache, inputs | {ATTENTION_MASK: mask}, outputs)
        except ort_errors() as error:
            cache.reset()  # some layers may have appended already
            raise SkvError("ONNX Runtime: the call failed, and the cache has been emptied", got=brief(error)) from error
        return logits, [outputs[x.name] for x in self.queries]

    def _call(self, cache: Cache, inputs: Mapping[str, Int64 | Logits], outputs: Mapping[str, Logits]) -> None:
        import onnxruntime as ort

        values = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x)) for name, x in inputs.items()}
        for name, value in values.items():
            cache.binding.bind_ortvalue_input(name, value)
        for name, output in outputs.items():
            cache.binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(output))
        self.onnx.run_with_iobinding(cache.binding, uncaptured() if self.cuda_graph else None)

    def _replay(
        self, cache: Cache, inputs: Mapping[str, Any], new: NDArray[np.bool_], outputs: Mapping[str, Logits]
    ) -> bool:
        """Runs a step of decoding as a CUDA graph; False where it is none, or its mask has too few columns."""
        if not self.cuda_graph or inputs[INPUT_IDS].shape[1] != 1:
            return False
        if INPUTS_EMBEDS in inputs and inputs[INPUTS_EMBEDS].size:
            return False
        graph = self.captured.get(cache)
        if graph is None:
            widths = {name: output.shape[2] for name, output in outputs.items()}
            axes = self._config.position_axes
            graph = DecodeGraph(self.onnx, self._library, cache, self.inputs, widths, next(self._numbers), axes)
            self.captured[cache] = graph
        if cache.held.max() + 1 > graph.columns:
            return False
        for name, output in graph.run(inputs, cache.held, new[:, 0]).items():
            outputs[name][:] = output
        return True


def _with_queries(path: Path, model: bytes | None, config: ModelConfig, window: int) -> tuple[bytes, list[QueryOutput]]:
    """``queries.with_queries`` of the graph in the file, or of ``model`` in its place."""
    require_module("onnx", "queries of a call's last tokens")
    import onnx

    loaded = onnx.load(path, load_external_data=False) if model is None else onnx.load_model_from_string(model)
    widths = [layer.num_attention_heads * layer.key.head_dim for layer in config.layers]
    changed, outputs = with_queries(loaded, dict(zip(config.by_index, widths, strict=True)), window, path)
    return changed.SerializeToString(), outputs


def session_options(folder: Path, num_threads: int, spinning: bool) -> Any:
    """Returns onnxruntime's SessionOptions for a graph whose weights are in ``folder``; see ``Graph``."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return options


def _token_inputs(folder: Path, inputs: dict[str, Any], config: ModelConfig) -> tuple[str, ...]:
    """The graph's inputs besides the caches; checks that the caches are those of the configuration."""
    for state in config.states:
        shape = inputs.pop(past_state_name(state.layer, state.name), None)
        if shape is None or tuple(shape[1:]) != state.shape:
            raise SkvError(
                f"{folder}: {MODEL_FILE} and {SKV_CONFIG_FILE} do not belong together: layer {state.layer}, "
                f"state {state.name}",
                got=shape and shape[1:],
                expected=list(state.shape),
                fix="Export the model again.",
            )
    for i, layer in config.by_index.items():
        for name, layout in zip(TENSORS, (layer.key, layer.value), strict=True):
            shape = inputs.pop(past_name(i, name), None)
            # A width may be open, for runtimes that allocate keys and values alike: then it has no number.
            width = layout.width if shape is None or not isinstance(shape[3], int) else shape[3]
            if shape is None or shape[1] != layer.num_key_value_heads or width != layout.width:
                raise SkvError(
                    f"{folder}: {MODEL_FILE} and {SKV_CONFIG_FILE} do not belong together: layer {i}, {name}",
                    got=shape and shape[1:],
                    expected=[layer.num_key_value_heads, "rows", layout.width],
                    fix="Export the model again.",
                )
    if set(inputs) - set(TOKEN_INPUTS) or not {INPUT_IDS, ATTENTION_MASK} <= set(inputs):
        raise SkvError(
            f"{folder}: {MODEL_FILE}: inputs",
            got=sorted(inputs),
            expected=f"{', '.join(TOKEN_INPUTS)} and the caches",
            fix="Export the model again.",
        )
    return tuple(name for name in TOKEN_INPUTS if name in inputs)
