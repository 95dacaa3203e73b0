"""Decoding as a CUDA graph: a step of one token per sequence is captured once and replayed as a single launch.

The buffers of a captured step are fixed: the caches, and, held here, inputs and outputs. The mask has as many columns
as the cache holds tokens, so that its shape never changes; the op takes the lengths from its sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skv_export.model_folder.names import ATTENTION_MASK, POSITION_IDS
from skv_export.runtime.cache import Cache

_GRAPH_ID = "gpu_graph_id"
"""ONNX Runtime's run option: the graph to replay, captured when its number is new."""


def uncaptured() -> Any:
    """Returns RunOptions that exclude a call from CUDA graph capture."""
    import onnxruntime as ort

    options = ort.RunOptions()
    options.add_run_config_entry(_GRAPH_ID, "-1")
    return options


class DecodeGraph:
    """The decoding steps of one cache.

    Args:
        onnx: onnxruntime's InferenceSession on CUDA, with ``enable_cuda_graph``.
        cache: The cache; its sequences and buffers are the graph's.
        inputs: Names of the graph's inputs beside the caches.
        outputs: Width of each output beside the caches, the logits among them.
        number: One that no other graph of the session has.
        axes: Positions of a token.

    Attributes:
        columns: Of the mask: the most tokens that a sequence can hold here.
    """

    def __init__(
        self, onnx: Any, cache: Cache, inputs: tuple[str, ...], outputs: Mapping[str, int], number: int, axes: int = 1
    ) -> None:
        import onnxruntime as ort

        self._onnx = onnx
        self.columns = cache.max_length if cache.capacity is None else cache.capacity
        self._binding = onnx.io_binding()
        cache.bind(self._binding)
        self._inputs: dict[str, Any] = {}
        for name in inputs:
            shape: tuple[int, ...] = cache.batch, self.columns if name == ATTENTION_MASK else 1
            if name == POSITION_IDS and axes > 1:
                shape = axes, *shape
            self._inputs[name] = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.int64), "cuda", 0)
            self._binding.bind_ortvalue_input(name, self._inputs[name])
        self._outputs: dict[str, Any] = {}
        for name, width in outputs.items():
            of_step = [cache.batch, 1, width]
            self._outputs[name] = ort.OrtValue.ortvalue_from_shape_and_type(of_step, np.float32, "cuda")
            self._binding.bind_ortvalue_output(name, self._outputs[name])
        self._options = ort.RunOptions()
        self._options.add_run_config_entry(_GRAPH_ID, str(number))

    def run(self, inputs: Mapping[str, NDArray[np.int64]]) -> dict[str, NDArray[np.float32]]:
        """Runs a step.

        Args:
            inputs: By name, ``[B, 1]``; the mask ``[B, columns or fewer]``, whose sums are the lengths after the step.

        Returns:
            The outputs by name, ``[B, 1, width]``.
        """
        for name, value in self._inputs.items():
            x = inputs[name]
            if name == ATTENTION_MASK:  # the new token's column is the last one
                x = np.pad(x, ((0, 0), (self.columns - x.shape[1], 0)))
            value.update_inplace(np.ascontiguousarray(x))
        # The first run is several: the same step again writes the same bytes.
        self._onnx.run_with_iobinding(self._binding, self._options)
        return {name: np.array(output.numpy()) for name, output in self._outputs.items()}
