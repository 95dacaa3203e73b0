"""The cache of a running model: buffers that are allocated once, bound in place, rewound and reordered."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from skv_export.errors import SkvError
from skv_export.model_folder.names import TENSORS, past_name, present_name
from skv_export.model_folder.skv_config import LayerCache
from skv_export.native.library import Library
from skv_export.spec import reference
from skv_export.spec.key_basis import MATRICES, KeyBasis
from skv_export.spec.layout import Bytes, CacheLayout

logger = logging.getLogger(__name__)


class Cache:
    """The buffers of a batch of sequences, allocated once and bound as past and present alike.

    Memory is reserved for ``max_length`` tokens and, on a CPU, taken by the system only as tokens come. Nothing grows:
    a call that would pass the capacity is an error before anything is written.

    Args:
        onnx: onnxruntime's InferenceSession.
        layers: The model's layers.
        batch: Sequences.
        max_length: Tokens per sequence.
        device: ``cpu`` or ``cuda``.
        library: The native library.
        bases: Gives the constants of calibrated keys, by layer; asked when tokens are taken back.

    Attributes:
        binding: IOBinding of the session, to which the buffers are bound.
        layers: As given.
        batch: Sequences.
        max_length: Tokens per sequence that were asked for; ``capacity`` may be a little more.
        lengths: ``[batch]``, tokens held.
    """

    def __init__(
        self,
        onnx: Any,
        layers: Sequence[LayerCache],
        batch: int,
        max_length: int,
        device: str,
        library: Library,
        bases: Callable[[], Mapping[int, KeyBasis]] = dict,
    ) -> None:
        import onnxruntime as ort

        self.binding = onnx.io_binding()
        self.layers, self.batch, self.max_length = tuple(layers), batch, max_length
        self.lengths: NDArray[np.int64] = np.zeros(batch, np.int64)
        self._longest = self.lengths.copy()  # since each was empty: up to there rows are overwritten
        self._onnx, self._device, self._library, self._bases = onnx, device, library, bases
        self._tensors: dict[tuple[int, str], tuple[CacheLayout, Any]] = {}
        for i, layer in enumerate(layers):
            for name, layout in zip(TENSORS, (layer.key, layer.value), strict=True):
                shape = [batch, layer.num_key_value_heads, *layout.shape(max_length)]
                buffer = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.uint8, device)
                self._tensors[i, name] = layout, buffer
        self.bind(self.binding)
        logger.debug("cache of %d sequences of %d tokens: %d bytes on %s", batch, max_length, self.nbytes, device)

    def bind(self, binding: Any) -> None:
        """Binds the buffers, as past and present alike, to an IOBinding of the session."""
        for key, (_, buffer) in self._tensors.items():
            binding.bind_ortvalue_input(past_name(*key), buffer)
            binding.bind_ortvalue_output(present_name(*key), buffer)

    def belongs_to(self, onnx: Any) -> bool:
        """Whether the buffers are bound to this session of onnxruntime's."""
        return self._onnx is onnx

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(math.prod(buffer.shape()) for _, buffer in self._tensors.values())

    @cached_property
    def _constants(self) -> dict[int, list[Any]]:
        """Constants of calibrated keys, by layer, where the buffers are."""
        import onnxruntime as ort

        return {
            layer: [ort.OrtValue.ortvalue_from_numpy(getattr(basis, name), self._device) for name in MATRICES]
            for layer, basis in self._bases().items()
        }

    @cached_property
    def capacity(self) -> int | None:
        """Tokens that a sequence can hold; None = any number (every layer has a sliding window)."""
        sizes = (layout.capacity(math.prod(b.shape()[2:])) for layout, b in self._tensors.values())
        return min((size for size in sizes if size is not None), default=None)

    def data(self, layer: int, name: str) -> Bytes:
        """Returns a copy of one tensor's bytes, ``[batch, N_kv, rows, W]``; ``name`` is ``key`` or ``value``."""
        return np.array(self._tensors[layer, name][1].numpy())

    def reset(self) -> None:
        """Forgets every token; the buffers stay."""
        self.lengths[:] = self._longest[:] = 0

    def advance(self, lengths: ArrayLike) -> None:
        """Notes that a call has appended tokens: ``lengths``, ``[batch]``, are held now."""
        self.lengths[:] = lengths
        np.maximum(self._longest, self.lengths, out=self._longest)

    def rewind_floor(self, b: int) -> int:
        """Smallest length above 0 to which sequence ``b`` can be rewound."""
        length, longest = int(self.lengths[b]), int(self._longest[b])
        tensors = self._tensors.values()
        return max(reference.rewind_floor(x, math.prod(y.shape()[2:]), length, longest) for x, y in tensors)

    def rewind(self, lengths: int | ArrayLike) -> None:
        """Takes back tokens, so that each sequence holds ``lengths`` of them (one number, or one per sequence).

        At most ``recent_tokens`` can be taken back, or everything; with a sliding window, repeated rewinds may end
        earlier, but never within ``recent_tokens`` of the longest length. Tokens whose exact form is gone come back
        from their codes; all others are as if the tokens taken back had never been there.

        Raises:
            SkvError: Too far back, or longer than what is held; nothing has changed.
        """
        new = np.broadcast_to(np.asarray(lengths, np.int64), self.lengths.shape)
        for b, (held, wanted) in enumerate(zip(self.lengths.tolist(), new.tolist(), strict=True)):
            floor = self.rewind_floor(b)
            if wanted != 0 and not floor <= wanted <= held:
                raise SkvError(
                    f"rewind of sequence {b}, which holds {held} tokens",
                    got=wanted,
                    expected=f"{floor} ... {held}, or 0",
                    fix="Start the sequence again, or export with more recent_tokens.",
                )
        for (layer, name), (layout, buffer) in self._tensors.items():
            basis = [x.data_ptr() for x in self._constants.get(layer, ())] if name == "key" else []
            heads, block_bytes = buffer.shape()[1], math.prod(buffer.shape()[2:])
            for b in np.flatnonzero((new != 0) & (new != self.lengths)).tolist():
                lengths_of_b = int(self.lengths[b]), int(self._longest[b]), int(new[b])
                self._library.rewind(
                    layout, buffer.data_ptr(), block_bytes, heads, b, *lengths_of_b, basis=basis, device=self._device
                )
        if self._device == "cuda":  # the next call runs on a stream of ONNX Runtime's
            self._library.synchronize()
        for b in np.flatnonzero(new != self.lengths).tolist():
            longest, wanted = int(self._longest[b]), int(new[b])
            counted = (reference.longest_after_rewind(x, longest, wanted) for x, _ in self._tensors.values())
            self._longest[b] = max(counted) if wanted else 0
        self.lengths[:] = new

    def reorder(self, indices: ArrayLike) -> None:
        """Makes sequence ``i`` a copy of what sequence ``indices[i]`` was, in place (beam search).

        Raises:
            SkvError: Not an index of a sequence for each sequence.
        """
        order = self._order(indices)
        if len(order) != self.batch:
            raise SkvError("reorder: indices", got=len(order), expected=f"{self.batch}, one for each sequence")
        if not np.array_equal(order, np.arange(self.batch)):
            self._copy(self, order)

    def select(self, indices: ArrayLike) -> Cache:
        """Returns a new cache, with buffers of its own, whose sequence ``i`` is a copy of sequence ``indices[i]``.

        Raises:
            SkvError: No indices, or not of sequences.
        """
        order = self._order(indices)
        twin = Cache(self._onnx, self.layers, len(order), self.max_length, self._device, self._library, self._bases)
        twin._copy(self, order)
        return twin

    def _order(self, indices: ArrayLike) -> NDArray[np.int64]:
        order = np.asarray(indices, np.int64)
        if order.ndim != 1 or not order.size or order.min() < 0 or order.max() >= self.batch:
            raise SkvError("sequences of the cache", got=order.tolist(), expected=f"indices of 0 ... {self.batch - 1}")
        return order

    def _copy(self, source: Cache, order: NDArray[np.int64]) -> None:
        for key, (_, buffer) in self._tensors.items():
            buffer.update_inplace(np.ascontiguousarray(source._tensors[key][1].numpy()[order]))
        self.lengths[:], self._longest[:] = source.lengths[order], source._longest[order]
