"""The cache of a running model: buffers allocated once and bound in place, which are rewound, copied and saved."""

from __future__ import annotations

import copy
import ctypes
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from skv_export.arguments import checked
from skv_export.errors import SkvError
from skv_export.model_folder.names import TENSORS, past_name, present_name
from skv_export.model_folder.skv_config import LayerCache
from skv_export.native.library import Library
from skv_export.runtime import arrays
from skv_export.runtime.cache_state import Key, SequenceState, TensorState, held_tiles, parts
from skv_export.runtime.providers import device_of
from skv_export.runtime.queries import LastQueries
from skv_export.runtime.state_buffers import StateBuffers
from skv_export.spec import reference
from skv_export.spec.key_basis import MATRICES, KeyBasis
from skv_export.spec.layout import Bytes, CacheLayout
from skv_export.spec.state import LayerState

logger = logging.getLogger(__name__)
MAX_BATCH = 1 << 16
"""Sequences of a cache."""
_BY_SEQUENCE = ("lengths", "_longest", "dropped", "chosen", "second_rope")
"""Arrays ``[batch]`` of a cache."""


class Cache:
    """The buffers of a batch of sequences, allocated once and bound as past and present alike.

    Memory is reserved for ``max_length`` tokens and, on a CPU, taken by the system only as tokens come. Nothing grows:
    a call that would pass the capacity is an error before anything is written.

    Args:
        onnx: onnxruntime's InferenceSession.
        layers: The model's layers that have a cache.
        batch: Sequences.
        max_length: Tokens per sequence.
        device: ``cpu``, ``cuda``, ``cuda:1``.
        library: The native library.
        bases: Gives the constants of calibrated keys, by layer; asked when tokens are taken back.
        model: Says which model the cache is of, in a saved file.
        states: Of its recurrent layers.
        indices: Numbers in the model of ``layers``; empty = from 0 on.

    Attributes:
        binding: IOBinding of the session, to which the buffers are bound.
        layers, device: As given.
        batch: Sequences.
        max_length: Tokens of a sequence that the buffers are for; ``capacity`` may be a little more.
        lengths: ``[batch]``, tokens that have come: the position of the next one; ``first`` shares it and what follows.
        tokens: Which these are, by sequence.
        dropped: ``[batch]``, those of them that ``Session.compact`` has left out; 0 in a cache that was not compacted.
        chosen: ``[batch]``, tokens at the front of the buffers that each KV head has chosen for itself: no rewind ends
            among them.
        second_rope: ``[batch]``, whose keys have longrope's second set of frequencies.
        queries: The last queries, where the session keeps them.
        shared: Whether the buffers are those of another cache too; see ``first``.
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
        model: Callable[[], str] = str,
        states: Sequence[LayerState] = (),
        indices: Sequence[int] = (),
    ) -> None:
        import onnxruntime as ort

        self.binding = onnx.io_binding()
        self.layers, self.batch, self.max_length = tuple(layers), batch, max_length
        self.lengths: NDArray[np.int64] = np.zeros(batch, np.int64)
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.dropped, self.chosen = self.lengths.copy(), self.lengths.copy()
        self.second_rope: NDArray[np.bool_] = np.zeros(batch, np.bool_)
        self.queries, self.shared = LastQueries(batch), False
        self._longest = self.lengths.copy()  # in the buffers, since each was empty: up to there rows are overwritten
        self._onnx, self._library, self._bases, self.model = onnx, library, bases, model
        self.device, self._where = device, device_of(device)
        self._indices, self.recurrent = tuple(indices) or tuple(range(len(layers))), tuple(states)
        self.states = StateBuffers(states, batch, device)
        self._tensors: dict[Key, tuple[CacheLayout, Any]] = {}
        for i, layer in enumerate(layers):
            for name, layout in zip(TENSORS, (layer.key, layer.value), strict=True):
                shape = [batch, layer.num_key_value_heads, *layout.shape(max_length)]
                buffer = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.uint8, *self._where)
                self._tensors[i, name] = layout, buffer
        self.bind(self.binding)
        logger.debug("cache of %d sequences of %d tokens: %d bytes on %s", batch, max_length, self.nbytes, device)

    def bind(self, binding: Any) -> None:
        """Binds the buffers, as past and present alike, to an IOBinding of the session."""
        self.states.bind(binding, self.batch)
        for (i, name), (_, buffer) in self._tensors.items():
            where = *self._where, np.uint8, [self.batch, *buffer.shape()[1:]], buffer.data_ptr()
            binding.bind_input(past_name(self._indices[i], name), *where)
            binding.bind_output(present_name(self._indices[i], name), *where)

    @checked
    def first(self, n: int) -> Cache:
        """Returns the first ``n`` sequences as a cache that shares everything with this one: calls on it leave the
        others out, and cost what ``n`` sequences cost.

        Raises:
            SkvError: There are not so many, or none is wanted.
        """
        if not 1 <= n <= self.batch:
            raise SkvError("cache: first sequences", got=n, expected=f"1 ... {self.batch}")
        self.shared = True
        part = copy.copy(self)
        part.batch, part.tokens, part.queries = n, self.tokens[:n], self.queries.first(n)
        for name in _BY_SEQUENCE:
            setattr(part, name, getattr(self, name)[:n])
        part.binding = self._onnx.io_binding()
        part.bind(part.binding)
        return part

    def belongs_to(self, onnx: Any) -> bool:
        """Whether the buffers are bound to this session of onnxruntime's."""
        return self._onnx is onnx

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return self.states.nbytes + sum(math.prod(buffer.shape()) for _, buffer in self._tensors.values())

    @cached_property
    def _constants(self) -> dict[int, list[Any]]:
        """Constants of calibrated keys, by layer, where the buffers are."""
        import onnxruntime as ort

        return {
            layer: [ort.OrtValue.ortvalue_from_numpy(getattr(basis, name), *self._where) for name in MATRICES]
            for layer, basis in self._bases().items()
        }

    @cached_property
    def capacity(self) -> int | None:
        """Tokens that a sequence can hold; None = any number (every layer has a sliding window)."""
        sizes = (layout.capacity(math.prod(b.shape()[2:])) for layout, b in self._tensors.values())
        return min((size for size in sizes if size is not None), default=None)

    @checked
    def data(self, layer: int, name: str) -> Bytes:
        """Returns a copy of one tensor's bytes, ``[batch, N_kv, rows, W]``; ``name`` is ``key`` or ``value``.

        Raises:
            SkvError: No such layer or name.
        """
        self._check_tensor(layer, name)
        return np.array(self._tensors[layer, name][1].numpy()[: self.batch])

    @property
    def held(self) -> NDArray[np.int64]:
        """``[batch]``, tokens in the buffers: fewer than have come after ``Session.compact``."""
        return self.lengths - self.dropped

    def reset(self) -> None:
        """Forgets every token; the buffers stay."""
        for name in _BY_SEQUENCE:
            getattr(self, name)[:] = 0
        for held in self.tokens:
            held.clear()
        self.queries.clear()
        self.states.clear(slice(self.batch))

    @checked
    def advance(self, new: Sequence[Sequence[int]]) -> None:
        """Notes which tokens a call has appended to each sequence."""
        if len(new) != self.batch:
            raise SkvError("cache: tokens appended", got=f"{len(new)} sequences", expected=self.batch)
        for held, more in zip(self.tokens, new, strict=True):
            held.extend(more)
        self.lengths[:] = [len(held) for held in self.tokens]
        np.maximum(self._longest, self.held, out=self._longest)

    @checked
    def rewind_floor(self, b: int) -> int:
        """Smallest length above 0 to which sequence ``b`` can be rewound; its own where a recurrent state holds it."""
        self._check_sequence(b)
        if self.states:
            return int(self.lengths[b])
        length, longest = int(self.held[b]), int(self._longest[b])
        tensors = self._tensors.values()
        floor = max(reference.rewind_floor(x, math.prod(y.shape()[2:]), length, longest) for x, y in tensors)
        return max(floor, int(self.chosen[b])) + int(self.dropped[b])

    @checked
    def rewind_to_common(self, b: int, tokens: Sequence[int]) -> int:
        """Takes back what sequence ``b`` does not have in common with the beginning of ``tokens``, but for their last.

        Returns:
            How many of ``tokens`` the cache holds then; none where what differs is too far back.
        """
        common = self.common(b, tokens)
        if common < len(self.tokens[b]):
            lengths = self.lengths.copy()
            lengths[b] = common
            self.rewind(lengths)
        return common

    @checked
    def common(self, b: int, tokens: Sequence[int]) -> int:
        """How many of ``tokens`` ``rewind_to_common`` would leave."""
        self._check_sequence(b)
        held = self.tokens[b]
        common = next((i for i, (x, y) in enumerate(zip(held, tokens, strict=False)) if x != y), len(held))
        common = min(common, max(len(tokens) - 1, 0))
        return common if common >= self.rewind_floor(b) or common == len(held) else 0

    @checked
    def draft_room(self, b: int) -> int:
        """How many tokens may follow the next one of sequence ``b`` in the same call as if they came one by one.

        Up to there no tile is written that the next tokens should see, and all of them can be taken back exactly.
        """
        self._check_sequence(b)
        length = int(self.held[b])
        room = 0 if self.states else self.max_length - length - 1
        for layout, _ in self._tensors.values():
            flush = layout.quantized_tokens(length) + layout.num_sink_tokens + layout.recent_tokens + layout.tile_tokens
            room = min(room, flush - length - 1)
            if layout.quantized_tokens(length + 1 + room):
                room = min(room, layout.recent_tokens)
        return max(room, 0)

    @checked
    def rewind(self, lengths: int | ArrayLike) -> None:
        """Takes back tokens, so that each sequence holds ``lengths`` of them (one number, or one per sequence).

        At most ``recent_tokens`` can be taken back, or everything; with a sliding window, repeated rewinds may end
        earlier, but never within ``recent_tokens`` of the longest length. Tokens whose exact form is gone come back
        from their codes; all others are as if the tokens taken back had never been there. A model with recurrent layers
        takes back everything or nothing: their states hold no single tokens.

        Raises:
            SkvError: Too far back, or longer than what is held; nothing has changed.
        """
        new = arrays.integers("rewind: lengths", lengths)
        if new.shape not in ((), (1,), self.lengths.shape):
            raise SkvError("rewind: lengths", got=list(new.shape), expected=f"one number, or {self.batch} of them")
        new = np.broadcast_to(new, self.lengths.shape)
        for b, (held, wanted) in enumerate(zip(self.lengths.tolist(), new.tolist(), strict=True)):
            floor = self.rewind_floor(b)
            if wanted != 0 and not floor <= wanted <= held:
                raise SkvError(
                    f"rewind of sequence {b}, which holds {held} tokens",
                    got=wanted,
                    expected=f"{floor} ... {held}, or 0",
                    fix="Start the sequence again, or keep a copy (Cache.select) of the place to return to."
                    if self.states
                    else "Start the sequence again, or export with more recent_tokens.",
                )
        packed = np.where(new == 0, 0, new - self.dropped)
        for (layer, name), (layout, buffer) in self._tensors.items():
            basis = [x.data_ptr() for x in self._constants.get(layer, ())] if name == "key" else []
            heads, block_bytes = buffer.shape()[1], math.prod(buffer.shape()[2:])
            for b in np.flatnonzero((new != 0) & (new != self.lengths)).tolist():
                lengths_of_b = int(self.held[b]), int(self._longest[b]), int(packed[b])
                self._library.rewind(
                    layout, buffer.data_ptr(), block_bytes, heads, b, *lengths_of_b, basis=basis, device=self._where
                )
        if self._where[0] == "cuda":  # the next call runs on a stream of ONNX Runtime's
            self._library.synchronize()
        for b in np.flatnonzero(new != self.lengths).tolist():
            longest, wanted = int(self._longest[b]), int(packed[b])
            counted = (reference.longest_after_rewind(x, longest, wanted) for x, _ in self._tensors.values())
            self._longest[b] = max(counted) if wanted else 0
            del self.tokens[b][int(new[b]) :]
            self.queries.clear(b)
            self.states.clear(b)  # only to 0
        self.dropped[new == 0] = self.chosen[new == 0] = 0
        self.lengths[:] = new

    @checked
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

    @checked
    def select(self, indices: ArrayLike) -> Cache:
        """Returns a new cache, with buffers of its own, whose sequence ``i`` is a copy of sequence ``indices[i]``.

        Raises:
            SkvError: No indices, or not of sequences.
        """
        order = self._order(indices)
        twin = Cache(
            self._onnx, self.layers, len(order), self.max_length, self.device, self._library, self._bases, self.model,
            self.recurrent, self._indices,
        )  # fmt: skip
        twin._copy(self, order)
        return twin

    @checked
    def fork(self, n: int) -> Cache:
        """Returns a new cache with ``n`` copies of each sequence, side by side, each of which goes on by itself.

        Raises:
            SkvError: ``n`` is no number of copies.
        """
        if not 1 <= n <= MAX_BATCH:
            raise SkvError("fork: copies of each sequence", got=n, expected=f"1 ... {MAX_BATCH}")
        return self.select(np.arange(self.batch).repeat(n))

    def _order(self, indices: ArrayLike) -> NDArray[np.int64]:
        order = arrays.integers("sequences of the cache", indices)
        if order.ndim != 1 or not order.size or order.min() < 0 or order.max() >= self.batch:
            raise SkvError("sequences of the cache", got=order.tolist(), expected=f"indices of 0 ... {self.batch - 1}")
        return order

    def _copy(self, source: Cache, order: NDArray[np.int64]) -> None:
        for key, (_, buffer) in self._tensors.items():
            kept = np.arange(len(order), buffer.shape()[0])  # of a cache whose first sequences this is
            buffer.update_inplace(np.ascontiguousarray(source._tensors[key][1].numpy()[[*order, *kept]]))
        self.states.copy(source.states, order)
        for name in _BY_SEQUENCE:
            getattr(self, name)[:] = getattr(source, name)[order]
        for held, tokens in zip(self.tokens, [list(source.tokens[b]) for b in order.tolist()], strict=True):
            held[:] = tokens
        self.queries.copy(source.queries, order)

    # States: what is held, apart from the buffers.

    @checked
    def longest(self, b: int) -> int:
        """Most tokens in the buffers of sequence ``b`` since it was empty, as far as ``reference.rewind`` must know."""
        self._check_sequence(b)
        return int(self._longest[b])

    @checked
    def tensor_state(self, b: int, key: Key, behind: int = 0) -> TensorState:
        """Copies what one tensor holds of sequence ``b``, without the tiles that it had at a length of ``behind``."""
        layout, _ = self._tensors[key]
        with self._block(b, key) as block:
            tiles = layout.tiles_in(block.shape[1])
            held = held_tiles(layout, block.shape[1], int(self.held[b]), self.longest(b))
            first = max(held.start, min(held.stop, layout.quantized_tokens(behind) // layout.tile_tokens))
            slots = [tile % tiles for tile in range(first, held.stop)]
            found, rows = parts(layout, block)
            rows = rows.copy()
            rows[:, self.longest(b) * layout.row_bytes :] = 0  # what was never written
            return TensorState(first, found[:, slots], rows)

    @checked
    def state(self, b: int, behind: int = 0) -> SequenceState:
        """Copies what the cache holds of sequence ``b``.

        Args:
            b: The sequence.
            behind: Length of what other states hold already, from which this one continues: its tiles are left out.

        Raises:
            SkvError: There is no such sequence.
        """
        self._check_sequence(b)
        tensors = {key: self.tensor_state(b, key, behind) for key in self._tensors}
        notes = int(self.dropped[b]), int(self.chosen[b]), bool(self.second_rope[b])
        tokens = np.array(self.tokens[b], np.int32)
        return SequenceState(tokens, self.longest(b), tensors, *notes, self.states.of(b))

    @checked
    def restore(self, b: int, states: Sequence[SequenceState]) -> None:
        """Makes sequence ``b`` what it was when the last of ``states`` was taken; the others hold its earlier tiles.

        Raises:
            SkvError: The cache is too small for it, or of another model; nothing has changed.
        """
        self._check_sequence(b)
        if not states or any(set(x.tensors) != set(self._tensors) for x in states):
            got = f"{len(states)} states" if not states else "those of another model's cache"
            raise SkvError("cache: states to restore", got=got, expected="those of this model")
        state = states[-1]
        if self.capacity is not None and state.longest > self.capacity:
            raise SkvError(
                "cache: tokens to restore",
                got=state.longest,
                expected=f"at most its capacity of {self.capacity}",
                fix="Allocate the cache for a larger max_length.",
            )
        self.states.put(b, state.states)
        for key in self._tensors:
            self.restore_tensor(b, key, [x.tensors[key] for x in states], len(state.tokens) - state.dropped)
        self.note_restored(b, state.tokens.tolist(), state.longest, state.dropped, state.chosen)
        self.second_rope[b] = state.second_rope

    def restore_tensor(self, b: int, key: Key, states: Sequence[TensorState], length: int) -> None:
        """``restore`` for one tensor and ``length`` tokens in the buffers; ``note_restored`` follows after the last."""
        layout, _ = self._tensors[key]
        with self._block(b, key, write=True) as block:
            tiles = layout.tiles_in(block.shape[1])
            to, rows = parts(layout, block)
            end = layout.quantized_tokens(length) // layout.tile_tokens
            for state in states:
                stop = min(end, state.first + state.tiles.shape[1])
                kept = range(max(state.first, end - tiles), stop)
                if kept:
                    from_tiles = state.tiles[:, kept.start - state.first : kept.stop - state.first]
                    to[:, [tile % tiles for tile in kept]] = from_tiles
            rows[:] = states[-1].rows

    @checked
    def note_restored(self, b: int, tokens: Sequence[int], longest: int, dropped: int = 0, chosen: int = 0) -> None:
        """Notes what sequence ``b`` is after ``restore_tensor``; see ``SequenceState``."""
        self._check_sequence(b)
        self.tokens[b][:] = tokens
        self.lengths[b], self._longest[b] = len(tokens), longest
        self.dropped[b], self.chosen[b] = dropped, chosen
        self.queries.clear(b)

    @checked
    def load(self, b: int, key: Key) -> NDArray[np.float32]:
        """Reads back one tensor of sequence ``b``: ``[N_kv, held, D]``, see ``reference.load``."""
        self._check_sequence(b)
        self._check_tensor(*key)
        basis = self._bases().get(key[0]) if key[1] == TENSORS[0] else None
        with self._block(b, key) as block:
            return reference.load(self._tensors[key][0], block, int(self.held[b]), basis)[0]

    def become(self, other: Cache) -> None:
        """Takes over what another cache of as many sequences is, its buffers included; the other is of no use then."""
        assert other.batch == self.batch and not self.shared
        self._tensors, self.max_length = other._tensors, other.max_length
        for name in _BY_SEQUENCE:
            getattr(self, name)[:] = getattr(other, name)
        self.tokens = other.tokens
        self.queries.clear()
        self.__dict__.pop("capacity", None)
        self.bind(self.binding)

    def _check_tensor(self, layer: int, name: str) -> None:
        if (layer, name) not in self._tensors:
            raise SkvError("cache: tensor", got=(layer, name), expected=f"0 ... {len(self.layers) - 1}, key or value")

    def _check_sequence(self, b: int) -> None:
        """Refuses a sequence that the buffers do not have: its bytes would be another's, or nobody's."""
        if not 0 <= b < self.batch:
            raise SkvError("cache: sequence", got=b, expected=f"0 ... {self.batch - 1}")

    @contextmanager
    def _block(self, b: int, key: Key, *, write: bool = False) -> Iterator[Bytes]:
        """The bytes ``[N_kv, C]`` of one sequence: on a CPU those of the buffer itself, else a copy, written back."""
        self._check_sequence(b)
        _, buffer = self._tensors[key]
        shape = buffer.shape()
        heads, block_bytes = shape[1], math.prod(shape[2:])
        if self._where[0] == "cpu":
            raw = (ctypes.c_uint8 * (heads * block_bytes)).from_address(buffer.data_ptr() + b * heads * block_bytes)
            yield np.frombuffer(raw, np.uint8).reshape(heads, block_bytes)
            return
        whole = np.array(buffer.numpy())
        yield whole[b].reshape(heads, block_bytes)
        if write:
            buffer.update_inplace(whole)

    @checked
    def save(self, path: Path | str) -> None:
        """Writes what the cache holds to a file, complete or not at all, for ``Session.load_cache``.

        The file is a safetensors file: the tiles and full-precision rows of each sequence and tensor, the tokens, and
        the digests of the model, of its layouts, and of the file itself.

        Args:
            path: The file; one that is there is replaced.

        Raises:
            SkvError: It can't be written.
        """
        from skv_export.runtime import cache_file

        cache_file.save(self, path)
