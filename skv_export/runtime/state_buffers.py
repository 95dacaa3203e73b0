"""Buffers of recurrent states: allocated once, bound as past and as present alike, cleared, copied and read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skv_export.errors import SkvError
from skv_export.model_folder.names import past_state_name, present_state_name
from skv_export.runtime.providers import device_of
from skv_export.spec.state import LayerState

StateKey = tuple[int, str]
"""Names one state: the layer's number in the model, and ``LayerState.name``."""
States = Mapping[StateKey, NDArray[np.float32]]
"""The states of one sequence."""


class StateBuffers:
    """The states of a batch of sequences, zeros before their first tokens.

    The graph reads a past state before it writes the present one, so that both can be one buffer.

    Args:
        states: Of the model.
        batch: Sequences.
        device: ``cpu``, ``cuda``, ``cuda:1``.
    """

    def __init__(self, states: Sequence[LayerState], batch: int, device: str) -> None:
        import onnxruntime as ort

        self._where, self._batch = device_of(device), batch
        # On a CPU the numpy array and the OrtValue are the same memory.
        self._arrays = {(x.layer, x.name): np.zeros((batch, *x.shape), np.float32) for x in states}
        self._buffers = {key: ort.OrtValue.ortvalue_from_numpy(x, *self._where) for key, x in self._arrays.items()}
        if self._where[0] != "cpu":
            self._arrays = {}

    def __bool__(self) -> bool:
        """Whether the model has recurrent layers."""
        return bool(self._buffers)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(4 * math.prod(buffer.shape()) for buffer in self._buffers.values())

    def bind(self, binding: Any, batch: int) -> None:
        """Binds the states of the first ``batch`` sequences to an IOBinding."""
        for key, buffer in self._buffers.items():
            where = *self._where, np.float32, [batch, *buffer.shape()[1:]], buffer.data_ptr()
            binding.bind_input(past_state_name(*key), *where)
            binding.bind_output(present_state_name(*key), *where)

    def clear(self, which: int | slice) -> None:
        """Sets the states of these sequences to zeros."""
        for key in self._buffers:
            found = self._read(key)
            found[which] = 0
            self._write(key, found)

    def of(self, b: int) -> States:
        """Returns a copy of the states of sequence ``b``."""
        return {key: self._read(key)[b].copy() for key in self._buffers}

    def put(self, b: int, states: States) -> None:
        """Gives sequence ``b`` these states.

        Raises:
            SkvError: They are another model's; nothing has changed.
        """
        found = {key: x.shape for key, x in states.items()}
        expected = {key: tuple(buffer.shape()[1:]) for key, buffer in self._buffers.items()}
        if found != expected:
            raise SkvError("cache: recurrent states to restore", got="those of another model", expected="this model's")
        for key, state in states.items():
            whole = self._read(key)
            whole[b] = state
            self._write(key, whole)

    def copy(self, source: StateBuffers, order: NDArray[np.int64]) -> None:
        """Makes the first sequences what sequences ``order`` of ``source`` are."""
        for key in self._buffers:
            whole = self._read(key)
            whole[: len(order)] = source._read(key)[order]
            self._write(key, whole)

    def _read(self, key: StateKey) -> NDArray[np.float32]:
        if self._where[0] == "cpu":
            return self._arrays[key]
        return np.array(self._buffers[key].numpy())

    def _write(self, key: StateKey, values: NDArray[np.float32]) -> None:
        if self._where[0] != "cpu":
            self._buffers[key].update_inplace(np.ascontiguousarray(values))
