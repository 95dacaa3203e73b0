"""A batch whose sequences come and go between steps.

A step chooses the next token of every running sequence in one call, then runs one piece of one waiting prompt, in a
cache of its own, so that nobody waits for a long prompt; a finished prompt moves into a slot. What a sequence says does
not depend on the others: it is what it says alone, its prompt in the same pieces.

The running sequences are always in the first slots, and a call runs these alone: an empty slot costs nothing.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from skv_export.arguments import checked
from skv_export.errors import SkvError
from skv_export.runtime import arrays
from skv_export.runtime.prefixes import MIN_SHARED, Prefix
from skv_export.runtime.sampling import Sampler, Sampling, marked
from skv_export.spec.layout import cache_bytes

if TYPE_CHECKING:
    from skv_export.runtime.session import Session

MAX_SLOTS = 4096


@dataclass(frozen=True)
class Token:
    """A token that a step has chosen.

    Attributes:
        sequence: The number that ``Batch.add`` returned.
        token: The token.
        stop_reason: Why it is the sequence's last: ``eos``, ``max_new_tokens``, ``context`` (its slot is full); else
            empty.
        cached_tokens: Of the sequence's prompt, those that were kept from earlier ones and did not run.
    """

    sequence: int
    token: int
    stop_reason: str = ""
    cached_tokens: int = 0


Observer = Callable[[NDArray[np.float32], int], object]
"""Told the logits ``[vocab_size]`` of a step and the token that was chosen from them."""


@dataclass
class _Sequence:
    number: int
    prompt: list[int]
    max_new_tokens: int
    choose: Sampler
    observe: Observer | None
    made: list[int] = field(default_factory=list)
    entry: Prefix | None = None
    shared: int = 0
    cached: int = 0


class Batch:
    """Slots for sequences; see ``Session.batch``.

    Args:
        session: The model.
        slots: Sequences that run at the same time.
        max_length: Tokens of a sequence, prompt included; None = the model's context.
        prompt_chunk: Tokens of a prompt that run in one call, at most.

    Raises:
        SkvError: A number out of its range, or the caches would not fit into the memory.
    """

    @checked
    def __init__(self, session: Session, slots: int, max_length: int | None = None, prompt_chunk: int = 512) -> None:
        if not 1 <= slots <= MAX_SLOTS:
            raise SkvError("slots", got=slots, expected=f"1 ... {MAX_SLOTS}")
        if prompt_chunk < 1:
            raise SkvError("prompt_chunk", got=prompt_chunk, expected="at least 1 token")
        self._session, self._chunk = session, prompt_chunk
        _check_memory(session, slots + 1, max_length)
        self._prompt_cache = session.cache(1, max_length)
        self._cache = session.cache(slots, max_length)
        self._parts = {slots: self._cache}  # its first sequences, by how many
        self._slots: list[_Sequence] = []  # those that run, in the cache's first places
        self._waiting: deque[_Sequence] = deque()
        self._filling: _Sequence | None = None
        self._count = 0

    @property
    def running(self) -> int:
        """Sequences in slots."""
        return len(self._slots)

    @property
    def waiting(self) -> int:
        """Sequences whose prompts have not run, or not to their end."""
        return len(self._waiting) + (self._filling is not None)

    @property
    def tokens(self) -> int:
        """Tokens that the caches hold."""
        return int(self._cache.lengths.sum() + self._prompt_cache.lengths.sum())

    @checked
    def __contains__(self, sequence: int) -> bool:
        """Whether a sequence runs or waits."""
        return any(x.number == sequence for x in (*self._slots, *self._waiting, self._filling) if x is not None)

    @checked
    def add(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        observe: Observer | None = None,
    ) -> int:
        """Lets a sequence join; it waits for a slot where none is free.

        Args:
            prompt: At least one token.
            max_new_tokens: Tokens to generate at most.
            sampling: How a token is chosen; greedy if not given.
            observe: Called in ``step`` with each token of this sequence, before it is returned.

        Returns:
            A number that names the sequence.

        Raises:
            SkvError: No or unknown tokens, more than a slot holds, or nothing to generate.
        """
        self._session.check_ids(arrays.integers("prompt", [prompt]), 1)
        if len(prompt) > self._cache.max_length:
            raise SkvError(
                "prompt", got=f"{len(prompt)} tokens", expected=f"at most {self._cache.max_length}, a slot's max_length"
            )
        if max_new_tokens < 1:
            raise SkvError("max_new_tokens", got=max_new_tokens, expected="at least 1")
        self._count += 1
        ids = [int(token) for token in prompt]
        choose = Sampler(sampling or Sampling(), marked(self._session.config.vocab_size, [ids]))
        self._waiting.append(_Sequence(self._count, ids, max_new_tokens, choose, observe))
        return self._count

    @checked
    def remove(self, sequence: int) -> bool:
        """Lets a sequence leave before its end; returns whether it was there."""
        for waiting in self._waiting:
            if waiting.number == sequence:
                self._waiting.remove(waiting)
                return True
        if self._filling is not None and self._filling.number == sequence:
            self._filling = None
            return True
        for slot, running in enumerate(self._slots):
            if running.number == sequence:
                self._leave(slot)
                return True
        return False

    def reset(self) -> None:
        """Lets all leave, and forgets what the caches hold: also where a call ended nobody knows how."""
        self._slots, self._filling = [], None
        self._waiting.clear()
        self._cache.reset()
        self._prompt_cache.reset()

    def step(self) -> list[Token]:
        """Runs one call for all running sequences, and one piece of a waiting prompt.

        Returns:
            The tokens chosen, at most one of each sequence; none where nothing runs or waits.

        Raises:
            SkvError: A call failed; sequences whose cache it emptied have left.
        """
        return [*self._decode(), *self._prefill()]

    def _decode(self) -> list[Token]:
        if not self._slots:
            return []
        cache = self._parts.get(self.running) or self._parts.setdefault(self.running, self._cache.first(self.running))
        try:
            logits = self._session.append([x.made[-1:] for x in self._slots], cache)
        except SkvError:
            # A call that ONNX Runtime fails in empties the cache.
            self._slots = [x for slot, x in enumerate(self._slots) if cache.lengths[slot]]
            raise
        found = [self._chosen(x, logits[slot], int(cache.lengths[slot])) for slot, x in enumerate(self._slots)]
        for slot in reversed(range(len(found))):
            if found[slot].stop_reason:
                self._leave(slot)
        return found

    def _prefill(self) -> list[Token]:
        cache, store = self._prompt_cache, self._session.prefixes
        if self._filling is None:
            if not self._waiting or self.running == self._cache.batch:
                return []
            self._filling = sequence = self._waiting.popleft()
            cache.reset()
            if store is not None:
                sequence.entry, shared = store.find(sequence.prompt, cache.capacity)
                if sequence.entry is not None:
                    cache.restore(0, [x.state for x in sequence.entry.chain])
                sequence.cached = int(cache.lengths[0])
                store.count(sequence.cached, len(sequence.prompt))
                sequence.shared = shared if cache.lengths[0] + MIN_SHARED <= shared else 0
        sequence = self._filling
        done, end = int(cache.lengths[0]), len(sequence.prompt)
        if sequence.entry is not None and done == end and sequence.entry.logits is not None:
            logits = sequence.entry.logits
        else:
            stop = min(done + self._chunk, end)
            if done < sequence.shared < stop:
                stop = sequence.shared
            try:
                logits = self._session.append([sequence.prompt[done:stop]], cache)[0]
            except SkvError:
                self._filling = None
                raise
            if store is not None and stop in (sequence.shared, end):
                sequence.entry = store.add(cache, 0, sequence.entry, logits)
            if stop < end:
                return []
        self._filling = None
        chosen = self._chosen(sequence, logits, end)
        if not chosen.stop_reason:
            self._cache.restore(self.running, [cache.state(0)])
            self._slots.append(sequence)
        return [chosen]

    def _chosen(self, sequence: _Sequence, logits: NDArray[np.float32], held: int) -> Token:
        """Chooses a sequence's next token; ``held`` are in its cache."""
        token = int(sequence.choose(logits[None])[0])
        sequence.made.append(token)
        if sequence.observe is not None:
            sequence.observe(logits, token)
        reason = ""
        if token in self._session.config.eos_token_id:
            reason = "eos"
        elif len(sequence.made) == sequence.max_new_tokens:
            reason = "max_new_tokens"
        elif held >= self._cache.max_length:
            reason = "context"
        return Token(sequence.number, token, reason, sequence.cached)

    def _leave(self, slot: int) -> None:
        """Empties a slot; the last running sequence moves into it."""
        sequence, last = self._slots[slot], self._slots.pop()
        if sequence.entry is not None and self._session.prefixes is not None:
            self._session.prefixes.add(self._cache, slot, sequence.entry)
        if last is not sequence:
            self._cache.restore(slot, [self._cache.state(self.running)])
            self._slots[slot] = last
        lengths = self._cache.lengths.copy()
        lengths[self.running] = 0
        self._cache.rewind(lengths)


def sequence_bytes(session: Session, max_length: int | None = None) -> int:
    """Bytes of a cache of one sequence, recurrent states included.

    Args:
        session: The model.
        max_length: Tokens that it holds; None = the model's context.
    """
    layers = session.config.layers
    length = session.config.context_length if max_length is None else max_length
    caches = cache_bytes([(x.key, x.value) for x in layers], [x.num_key_value_heads for x in layers], length)
    return caches + session.config.state_bytes


def slots_that_fit(session: Session, max_length: int | None = None) -> int:
    """How many slots' caches half of the machine's memory holds, the one for prompts taken off; at least one."""
    return max(1, min(MAX_SLOTS, _memory_bytes() // 2 // sequence_bytes(session, max_length) - 1))


def _memory_bytes() -> int:
    """The machine's memory."""
    if sys.platform == "win32":
        import ctypes

        status = (ctypes.c_uint64 * 8)(64)  # MEMORYSTATUSEX: its size and the load, 32 bits each; the memory; and more
        ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return int(status[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_memory(session: Session, sequences: int, max_length: int | None) -> None:
    """Refuses caches that the machine's memory can't hold: the system grants them, and fails when they fill."""
    length = session.config.context_length if max_length is None else max_length
    needed = sequences * sequence_bytes(session, max_length)
    memory = _memory_bytes()
    if session.execution_provider == "cpu" and needed > memory:
        raise SkvError(
            f"batch: caches of {sequences} sequences of {length} tokens (one of them for prompts)",
            got=f"{needed / 2**30:.1f} GiB",
            expected=f"at most the machine's memory of {memory / 2**30:.1f} GiB",
            fix="Take fewer slots, or a smaller max_length.",
        )
