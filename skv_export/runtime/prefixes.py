"""Prompts that begin alike: what a cache held at the end of a prompt, kept by its tokens, so that the next prompt that
begins with them runs only what is new.

An entry is exactly what the cache was when a call ended; nothing is cut out of a longer one, for the full-precision
rows of earlier lengths are gone. So a hit is, byte for byte, a run whose calls end where the entries end. An entry
behind another one holds only the tiles that came after it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from skv_export.arguments import check
from skv_export.errors import SkvError
from skv_export.runtime.cache import Cache
from skv_export.runtime.cache_state import SequenceState

if TYPE_CHECKING:
    from skv_export.runtime.session import Session

MIN_SHARED = 64
"""Tokens that a prompt must share with an entry, beyond what is stored, for the place to be worth an entry itself."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """A stored beginning of sequences.

    Attributes:
        state: What the cache held, behind ``before``; and its tokens, from the first on.
        before: The entry that holds the tiles before.
        logits: ``[vocab_size]``, of the last token, where a prompt ended here.
    """

    state: SequenceState
    before: Prefix | None
    logits: NDArray[np.float32] | None

    @property
    def tokens(self) -> NDArray[np.int32]:
        """``[length]``."""
        return self.state.tokens

    @property
    def key(self) -> bytes:
        """The tokens, as the store looks them up."""
        return self.tokens.tobytes()

    @property
    def nbytes(self) -> int:
        """Bytes that the entry takes, those before it left out."""
        return self.tokens.nbytes + self.state.nbytes + (0 if self.logits is None else self.logits.nbytes)

    @property
    def chain(self) -> list[Prefix]:
        """The entries before, from the first on, and this one."""
        found: list[Prefix] = []
        entry: Prefix | None = self
        while entry is not None:
            found.append(entry)
            entry = entry.before
        return found[::-1]


class PrefixStore:
    """Beginnings of sequences, by their tokens; the least recently used go when the bytes are full.

    Args:
        max_bytes: Bytes of all entries together, at most.

    Attributes:
        max_bytes: As given.
        reused_tokens: Tokens of all prompts so far that did not have to run.
        prompt_tokens: Tokens of all prompts so far.
    """

    def __init__(self, max_bytes: int) -> None:
        check("prefix_bytes", max_bytes, int)
        if max_bytes < 1:
            raise SkvError("prefix_bytes", got=max_bytes, expected="a number of bytes, at least 1")
        self.max_bytes = max_bytes
        self.reused_tokens = self.prompt_tokens = 0
        # Oldest first. Whoever is used is used before what it stands behind: so the oldest has nothing behind it.
        self._entries: OrderedDict[bytes, Prefix] = OrderedDict()
        self._nbytes, self._lock = 0, threading.Lock()

    def __len__(self) -> int:
        """Returns the entries."""
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return self._nbytes

    def clear(self) -> None:
        """Forgets all entries."""
        with self._lock:
            self._entries.clear()
            self._nbytes = 0

    def find(self, tokens: Sequence[int], capacity: int | None = None, fresh: int = 0) -> tuple[Prefix | None, int]:
        """Looks for what is known of a prompt.

        Args:
            tokens: The prompt.
            capacity: Tokens that the cache to be filled can hold; None = any number.
            fresh: Last tokens of the prompt that the entry must not hold.

        Returns:
            The longest entry that the prompt begins with (one of the whole prompt only where its logits are known), and
            how many tokens the prompt has in common with any entry.
        """
        wanted = np.asarray(tokens, np.int32)
        best, shared = None, 0
        with self._lock:
            for entry in self._entries.values():
                both = min(len(wanted), len(entry.tokens))
                other = np.flatnonzero(wanted[:both] != entry.tokens[:both])
                common = int(other[0]) if other.size else both
                shared = max(shared, common)
                fits = capacity is None or entry.state.longest <= capacity
                fits = fits and len(entry.tokens) <= len(wanted) - fresh
                whole = common == len(entry.tokens) and (common < len(wanted) or entry.logits is not None)
                if whole and fits and (best is None or common > len(best.tokens)):
                    best = entry
            if best is not None:
                self._use(best)
        return best, shared

    def add(
        self, cache: Cache, b: int, before: Prefix | None = None, logits: NDArray[np.float32] | None = None
    ) -> Prefix | None:
        """Stores what a cache holds of sequence ``b``.

        Args:
            cache: The cache; it keeps what it has.
            b: The sequence.
            before: The entry that this sequence was restored from, or that was made of it last.
            logits: ``[vocab_size]``, of the last token.

        Returns:
            The entry; None where these tokens are stored already, are none, do not fit, or are not all in the cache.
        """
        key = np.array(cache.tokens[b], np.int32).tobytes()
        with self._lock:
            if not key or key in self._entries or cache.dropped[b]:
                return None
            if before is not None and self._entries.get(before.key) is not before:
                before = None  # it has gone meanwhile
            state = cache.state(b, len(before.tokens) if before else 0)
            entry = Prefix(state, before, None if logits is None else logits.copy())
            if sum(x.nbytes for x in entry.chain) > self.max_bytes:
                return None
            self._entries[key] = entry
            self._nbytes += entry.nbytes
            self._use(entry)
            while self._nbytes > self.max_bytes:
                _, oldest = self._entries.popitem(last=False)
                self._nbytes -= oldest.nbytes
            return entry

    def keep(self, cache: Cache, entries: Sequence[Prefix | None]) -> None:
        """Stores what the sequences of a cache hold, each behind its entry of ``prefill``, if it has one."""
        for b, entry in enumerate(entries):
            if entry is not None:
                self.add(cache, b, entry)

    def count(self, reused: int, prompt: int) -> None:
        """Counts a prompt: its tokens that did not have to run, and all of them."""
        self.reused_tokens += reused
        self.prompt_tokens += prompt

    def _use(self, entry: Prefix) -> None:
        for x in reversed(entry.chain):
            self._entries.move_to_end(x.key)

    def prefill(
        self, session: Session, cache: Cache, prompts: Sequence[Sequence[int]], fresh: int = 0
    ) -> tuple[NDArray[np.float32], list[Prefix | None]]:
        """Runs prompts in an empty cache, from the longest entries that they begin with, and stores them.

        A prompt that has more in common with an earlier one than is stored runs in two calls, so that the common part
        is stored too, for those to come.

        Args:
            session: Whose prompts they are.
            cache: Of as many sequences, empty.
            prompts: At least one token each.
            fresh: Last tokens of each prompt that run in any case.

        Returns:
            ``[B, vocab_size]``, the logits of each prompt's last token; and the entry of each, where it was stored.

        Raises:
            SkvError: A prompt is longer than the cache or the model's context; nothing has changed. Or see ``run``.
        """
        session.check_length(max(map(len, prompts)), cache.capacity)
        entries: list[Prefix | None] = []
        places = []
        for b, prompt in enumerate(prompts):
            entry, shared = self.find(prompt, cache.capacity, fresh)
            known = 0 if entry is None else len(entry.tokens)
            if entry is not None:
                cache.restore(b, [x.state for x in entry.chain])
            entries.append(entry)
            places.append(shared if known + MIN_SHARED <= shared < len(prompt) else known)
            self.count(known, len(prompt))
        for ends in (places, [len(prompt) for prompt in prompts]):
            rows = [prompt[len(held) : end] for prompt, held, end in zip(prompts, cache.tokens, ends, strict=True)]
            logits = session.append(rows, cache) if any(map(len, rows)) else None
            for b, row in enumerate(rows):
                if row and logits is not None:
                    entries[b] = self.add(cache, b, entries[b], logits[b])
        if logits is None:
            logits = np.empty((len(prompts), session.config.vocab_size), np.float32)
        for b, row in enumerate(rows):
            entry = entries[b]
            if not row and entry is not None and entry.logits is not None:
                logits[b] = entry.logits
        return logits, entries
