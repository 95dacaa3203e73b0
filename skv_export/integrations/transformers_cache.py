"""SkvCache: the runtime's cache behind transformers' ``Cache`` interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import Cache as TransformersCache
from transformers.generation.candidate_generator import CandidateGenerator

from skv_export.arguments import checked
from skv_export.errors import SkvError
from skv_export.runtime.arrays import integers
from skv_export.runtime.cache import MAX_BATCH, Cache
from skv_export.runtime.prefixes import Prefix
from skv_export.runtime.prompting import prefill
from skv_export.runtime.session import Session


def _refused(name: str, reason: str) -> Callable[..., NoReturn]:
    """A method of transformers' Cache that is not supported."""

    def method(self: SkvCache, *_: Any, **__: Any) -> NoReturn:
        raise SkvError(f"SkvCache.{name}: not supported", got="a call", expected=f"none: {reason}")

    method.__name__, method.__doc__ = name, f"Not supported: {reason}.\n\nRaises:\n    SkvError: Always."
    return method


class SkvCache(TransformersCache):
    """A runtime's cache as transformers counts it: in columns, padding included.

    What transformers' Cache can do, this one does, or raises: keys and values themselves stay in the runtime's buffers,
    and no method falls back on transformers' list of layers, which is empty.

    Attributes:
        cache: The runtime's cache, which counts tokens.
        held: ``[B, columns]``, which columns so far hold tokens.
    """

    def __init__(self, cache: Cache) -> None:
        super().__init__(layers=[])
        self.cache = cache
        self.held: NDArray[np.bool_] = np.zeros((cache.batch, 0), np.bool_)
        self._entries: list[Prefix | None] = []

    def __repr__(self) -> str:
        return f"SkvCache(batch={self.cache.batch}, columns={self.columns}, max_length={self.cache.max_length})"

    def __len__(self) -> int:
        """Returns the layers with keys and values."""
        return len(self.cache.layers)

    @property
    def columns(self) -> int:
        """Columns of the attention mask so far."""
        return self.held.shape[1]

    def begins(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> int:
        """Returns how many of the columns that ``generate`` was given are the cache's: all that it has, or none.

        Args:
            input_ids: ``[B, columns]``, all tokens so far or the new ones only.
            attention_mask: Of all tokens so far; transformers leaves out one without padding.
        """
        if attention_mask is not None:
            return self.columns if attention_mask.shape[1] == input_ids.shape[1] else 0
        return self.columns if input_ids[:, : self.columns].tolist() == self.cache.tokens else 0

    def append_columns(self, held: NDArray[np.bool_]) -> None:
        """Notes the columns of a call, ``[B, new columns]``: which hold tokens."""
        self.held = np.concatenate([self.held, held], axis=1)

    def prefill(self, session: Session, ids: NDArray[np.int64], new: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Runs prompts in the empty cache, from what the session keeps of earlier ones.

        Args:
            session: Of the cache.
            ids: ``[B, S]``, the prompts.
            new: ``[B, S]``, which columns hold tokens.

        Returns:
            ``[B, vocab_size]``, the logits of each prompt's last token.
        """
        logits, self._entries = prefill(session, ids, new, self.cache)
        return logits

    def keep(self, session: Session) -> None:
        """Adds what the cache holds to what the session keeps, where its sequences are those of ``prefill`` still."""
        if session.prefixes is not None and len(self._entries) == self.cache.batch:
            session.prefixes.keep(self.cache, self._entries)

    # Lengths.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the columns so far, the same for every layer."""
        return self.columns

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Returns the column of the next new token."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Returns the tokens that a sequence can hold."""
        return self.cache.max_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Returns columns and first column of the mask of a call; the runtime applies windows."""
        return self.columns + query_length, 0

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return self.cache.batch

    @property
    def is_initialized(self) -> bool:
        """True: the buffers are there from the start."""
        return True

    @property
    def is_compileable(self) -> bool:
        """False: there is no torch code to compile."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Whether ``crop`` is exact: only without quantization, because tokens may be restored from their codes."""
        return not self.cache.recurrent and all(layer.key.bits == layer.value.bits == 16 for layer in self.cache.layers)

    @property
    def is_sliding(self) -> list[bool]:
        """Which layers have a sliding window."""
        return [layer.local_window_size > 0 for layer in self.cache.layers]

    @property
    def is_linear(self) -> list[bool]:
        """False for every layer with a cache; recurrent layers are not counted."""
        return [False] * len(self)

    @property
    def is_dummy(self) -> list[bool]:
        """False for every layer: all have a cache."""
        return [False] * len(self)

    # Changes.

    def reset(self) -> None:
        """Forgets every token; the buffers stay."""
        self.cache.reset()
        self.held = self.held[:, :0]
        self._entries = []

    @checked
    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last columns back; see ``runtime.Cache.rewind`` for how far and how exactly.

        Args:
            tokens_to_remove: Negative: as many columns go. Positive: so many stay, as in older transformers.

        Raises:
            SkvError: More columns than there are, or too far back; nothing has changed.
        """
        kept = tokens_to_remove if tokens_to_remove > 0 else self.columns + tokens_to_remove
        if kept < 0:
            raise SkvError("SkvCache.crop: columns", got=tokens_to_remove, expected=f"-{self.columns} ... 0")
        if kept < self.columns:
            self.cache.rewind(self.cache.lengths - self.held[:, kept:].sum(axis=1))
            self.held = self.held[:, :kept]

    def activate_past_recording(self) -> None:
        """Does nothing: transformers' layers must be prepared for ``crop``, ours need not."""

    def is_recording_past(self, layer_idx: int = 0) -> bool:
        """Returns True: recent tokens can be taken back at any time."""
        return True

    @checked
    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorders the sequences' caches for beam search, in place; the batch keeps its size."""
        order = beam_idx.cpu().numpy()
        self.cache.reorder(order)
        self._entries = []
        self.held = self.held[order]

    @checked
    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these sequences, in this order, in new buffers; a boolean mask does too."""
        chosen = indices.cpu().numpy()
        if chosen.dtype == np.bool_ and chosen.shape == (self.cache.batch,):
            chosen = np.flatnonzero(chosen)
        order = integers("SkvCache: indices", chosen)
        self.cache = self.cache.select(order)
        self._entries = []
        self.held = self.held[order]

    @checked
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Makes ``repeats`` copies of each sequence, side by side, in new buffers."""
        if not 1 <= repeats <= MAX_BATCH:
            raise SkvError("SkvCache.batch_repeat_interleave: repeats", got=repeats, expected=f"1 ... {MAX_BATCH}")
        self.batch_select_indices(torch.arange(self.cache.batch).repeat_interleave(repeats))

    def __copy__(self) -> SkvCache:
        """Returns a copy with buffers of its own: two caches must not append to one buffer."""
        twin = SkvCache(self.cache.select(np.arange(self.cache.batch)))
        twin.held = self.held
        return twin

    def __deepcopy__(self, _: dict[int, Any]) -> SkvCache:
        return self.__copy__()

    # What only caches that hold torch's tensors can do.

    update = _refused("update", "the exported graph appends keys and values itself")
    update_indexer = _refused("update_indexer", "there is no sparse attention")
    early_initialization = _refused("early_initialization", "the buffers are there from the start")
    prefetch = _refused("prefetch", "the buffers stay where the model computes")
    offload = _refused("offload", "the buffers stay where the model computes")
    has_previous_state = _refused("has_previous_state", "the exported graph keeps recurrent states itself")
    get_conv_state = _refused("get_conv_state", "the exported graph keeps recurrent states itself")
    get_recurrent_state = _refused("get_recurrent_state", "the exported graph keeps recurrent states itself")
    update_conv_state = _refused("update_conv_state", "the exported graph keeps recurrent states itself")
    update_recurrent_state = _refused("update_recurrent_state", "the exported graph keeps recurrent states itself")


class Candidates(CandidateGenerator):
    """Another generator's guesses, as many as a cache allows in one call; none in the first, which has the prompt.

    Args:
        inner: Generates the guesses.
        state: The model's cache.
        most: Guesses that a call can check.
    """

    def __init__(self, inner: CandidateGenerator, state: SkvCache, most: int) -> None:
        self._inner, self._state, self._most = inner, state, most
        self._first = True
        self.requires_model_outputs = inner.requires_model_outputs

    def get_candidates(self, input_ids: torch.LongTensor, *arguments: Any, **options: Any) -> tuple[Any, Any]:
        """Returns the tokens so far with guesses behind them, and the guesses' logits where there are any.

        Args:
            input_ids: ``[1, columns]``, the tokens so far.
            arguments: As the inner generator takes them.
            options: The same.
        """
        room = 0 if self._first else min(self._most, self._state.cache.draft_room(0))
        self._first = False
        if room == 0:
            return input_ids, None
        guessed, logits = self._inner.get_candidates(input_ids, *arguments, **options)
        kept = min(room, guessed.shape[1] - input_ids.shape[1])
        if kept == 0:
            return input_ids, None
        return guessed[:, : input_ids.shape[1] + kept], None if logits is None else logits[:, :kept]

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> None:
        """Tells the inner generator how many of its guesses were right.

        Args:
            input_ids: ``[1, columns]``, the tokens so far.
            scores: ``[1, guesses + 1, vocab_size]``, the model's.
            num_matches: Guesses that were right.
        """
        if scores.shape[1] > 1:  # there were guesses
            self._inner.update_candidate_strategy(input_ids, scores, num_matches)
