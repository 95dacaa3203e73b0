"""Decoding as a CUDA graph: a step of one token per sequence is captured once and replayed as a single launch.

The buffers of a captured step are fixed: the caches, and, held here, inputs and outputs. The mask has as many columns
as the cache holds tokens, so that its shape never changes; the op takes the lengths from its sums, and from its last
column which sequences have a new token. It stays on the device: where every sequence goes on by a token, one more
column is set there, and nothing of the capacity's size is made or copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skv_export.model_folder.names import ATTENTION_MASK, POSITION_IDS
from skv_export.native.library import Library
from skv_export.runtime.cache import Cache
from skv_export.runtime.providers import device_of

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
        library: The native library.
        cache: The cache; its sequences and buffers are the graph's.
        inputs: Names of the graph's inputs beside the caches.
        outputs: Width of each output beside the caches, the logits among them.
        number: One that no other graph of the session has.
        axes: Positions of a token.

    Attributes:
        columns: Of the mask: the most tokens that a sequence can hold here.
    """

    def __init__(
        self,
        onnx: Any,
        library: Library,
        cache: Cache,
        inputs: tuple[str, ...],
        outputs: Mapping[str, int],
        number: int,
        axes: int = 1,
    ) -> None:
        import onnxruntime as ort

        self._onnx, self._library = onnx, library
        self.columns = cache.max_length if cache.capacity is None else cache.capacity
        self._binding = onnx.io_binding()
        cache.bind(self._binding)
        where = self._where = device_of(cache.device)
        self._said: NDArray[np.int64] | None = None  # lengths that the mask's sums say; None = its last column has a 0
        self._free = -1  # the last column that is 0 in all rows, before those that are not
        self._inputs: dict[str, Any] = {}
        for name in inputs:
            shape: tuple[int, ...] = cache.batch, self.columns if name == ATTENTION_MASK else 1
            if name == POSITION_IDS and axes > 1:
                shape = axes, *shape
            self._inputs[name] = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.int64), *where)
            self._binding.bind_ortvalue_input(name, self._inputs[name])
        self._outputs: dict[str, Any] = {}
        for name, width in outputs.items():
            of_step = [cache.batch, 1, width]
            self._outputs[name] = ort.OrtValue.ortvalue_from_shape_and_type(of_step, np.float32, *where)
            self._binding.bind_ortvalue_output(name, self._outputs[name])
        self._options = ort.RunOptions()
        self._options.add_run_config_entry(_GRAPH_ID, str(number))

    def run(
        self, inputs: Mapping[str, NDArray[np.int64]], held: NDArray[np.int64], new: NDArray[np.bool_]
    ) -> dict[str, NDArray[np.float32]]:
        """Runs a step.

        Args:
            inputs: By name, ``[B, 1]``: all but the mask.
            held: ``[B]``, tokens in the cache before the step.
            new: ``[B]``, which sequences have a new token.

        Returns:
            The outputs by name, ``[B, 1, width]``.
        """
        for name, value in self._inputs.items():
            if name != ATTENTION_MASK:
                value.update_inplace(np.ascontiguousarray(inputs[name]))
        self._say(held + new, new)
        # The first run is several: the same step again writes the same bytes.
        self._onnx.run_with_iobinding(self._binding, self._options)
        return {name: np.array(output.numpy()) for name, output in self._outputs.items()}

    def _say(self, lengths: NDArray[np.int64], new: NDArray[np.bool_]) -> None:
        """Makes the mask's sums these lengths, and its last column the new tokens."""
        mask = self._inputs[ATTENTION_MASK]
        if new.all() and self._said is not None and self._free >= 0 and (lengths == self._said + 1).all():
            first = mask.data_ptr() + 8 * self._free
            self._library.set_column(self._where[1], first, 8 * self.columns, len(lengths))
            self._free -= 1
        else:
            columns = np.arange(self.columns - 1, 0, -1)[None, :]
            whole = np.concatenate([columns <= (lengths - new)[:, None], new[:, None]], axis=1)
            mask.update_inplace(np.ascontiguousarray(whole.astype(np.int64)))
            self._free = self.columns - 2 - int((lengths - new).max())
        self._said = lengths if new.all() else None
