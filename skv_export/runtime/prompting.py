"""How every generated text begins: its prompts run, from what is kept of earlier ones, and are compacted if asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from skv_export.errors import SkvError
from skv_export.runtime import arrays, compaction
from skv_export.runtime.cache import Cache
from skv_export.runtime.graph import Int64, Logits
from skv_export.runtime.prefixes import Prefix
from skv_export.runtime.sampling import Sampler, Sampling, marked

if TYPE_CHECKING:
    from skv_export.runtime.session import Session

Observer = Callable[[Logits, Int64], object]
"""Told the logits of a step, ``[B, vocab_size]``, and the tokens that were chosen, ``[B]``."""


@runtime_checkable
class Drafter(Protocol):
    """Guesses how a text goes on."""

    num_tokens: int
    """Tokens that are guessed at most."""

    def __call__(self, tokens: Sequence[int], count: int) -> list[int]:
        """Returns at most ``count`` tokens that may follow ``tokens``."""


@dataclass(frozen=True)
class Begun:
    """Prompts that have run.

    Attributes:
        cache: Holds them.
        logits: ``[B, vocab_size]``, of each prompt's last token.
        choose: Chooses the next tokens, ``[B]``, from such logits; rows that are not active get the padding token.
    """

    cache: Cache
    logits: Logits
    choose: Callable[[Logits, NDArray[np.bool_]], Int64]


@contextmanager
def begun(
    session: Session,
    ids: Int64,
    new: NDArray[np.bool_],
    *,
    max_new_tokens: int,
    sampling: Sampling | None,
    cache: Cache | None,
    present: Sequence[Sequence[int]] | None,
    observe: Observer | None,
    keep_tokens: int | None,
    look_ahead: Drafter | None,
) -> Iterator[Begun]:
    """Runs prompts; when the block ends, the session keeps what the cache holds then, if it keeps anything.

    Args:
        session: The model.
        ids: ``[B, S]``, the prompts, checked.
        new: ``[B, S]``, which columns hold tokens.
        max_new_tokens: As in ``Session.stream``, like all that follow.
        sampling: See there.
        cache: See there.
        present: See there.
        observe: See there.
        keep_tokens: See there.
        look_ahead: See there.

    Raises:
        SkvError: See ``Session.stream``.
    """
    if cache is None:
        session.check_length(int(new.sum(axis=1).max(initial=0)))
        cache = session.cache(len(ids), min(ids.shape[1] + max_new_tokens, session.config.context_length))
    if keep_tokens is not None:
        compaction.check(session, keep_tokens)
    if look_ahead is not None:
        _check_look_ahead(session, cache, keep_tokens, look_ahead)
    held = [row[real].tolist() for row, real in zip(ids, new, strict=True)] if present is None else present
    if len(held) != len(ids):
        raise SkvError("present", got=f"{len(held)} sequences", expected=len(ids))
    sampler = Sampler(sampling or Sampling(), marked(session.config.vocab_size, held))

    def choose(logits: Logits, active: NDArray[np.bool_]) -> Int64:
        tokens = np.where(active, sampler(logits), session.pad_token_id)
        if observe is not None:
            observe(logits, tokens)
        return tokens

    fresh = 0 if keep_tokens is None else session.graph.score_window
    logits, entries = prefill(session, ids, new, cache, fresh)
    if keep_tokens is not None:
        _compact(session, cache, keep_tokens, look_ahead)
    try:
        yield Begun(cache, logits, choose)
    finally:  # also where the caller has had enough
        if session.prefixes is not None and entries:
            session.prefixes.keep(cache, entries)


def _compact(session: Session, cache: Cache, keep: int, look_ahead: Drafter | None) -> None:
    """Compacts a cache, for the queries of guesses at what follows too (SpecKV of arXiv 2506.08373)."""
    length = int(cache.lengths[0])
    guesses: list[int] = []
    if look_ahead is not None and cache.held[0] > keep:
        room = min(look_ahead.num_tokens, int(session.room(cache)[0]))
        guesses = look_ahead(cache.tokens[0], room) if room > 0 else []
        if guesses:
            session.append([guesses], cache)
    session.compact(cache, keep=keep + len(guesses))
    if cache.lengths[0] > length:  # a few tokens may come back from their codes
        cache.rewind(length)


def _check_look_ahead(session: Session, cache: Cache, keep_tokens: int | None, look_ahead: Drafter) -> None:
    if keep_tokens is None or cache.batch != 1:
        got = "no keep_tokens" if keep_tokens is None else f"{cache.batch} sequences"
        raise SkvError("look_ahead", got=got, expected="keep_tokens, and one sequence")
    if got := session.config.keeps_guesses:
        raise SkvError("look_ahead", got=got, expected="one that can take guesses back")
    most = min(layer.key.recent_tokens for layer in cache.layers)
    if look_ahead.num_tokens > most:
        raise SkvError(
            "look_ahead: tokens to guess",
            got=look_ahead.num_tokens,
            expected=f"at most {most}, the recent_tokens that can be taken back",
        )


def prefill(
    session: Session, ids: Int64, new: NDArray[np.bool_], cache: Cache, fresh: int = 0
) -> tuple[Logits, list[Prefix | None]]:
    """Runs prompts, from what is kept of earlier ones where the cache is empty, and keeps them.

    Args:
        session: The model.
        ids: ``[B, S]``, the prompts.
        new: ``[B, S]``, which columns hold tokens.
        cache: Of B sequences.
        fresh: Last tokens of each prompt that run in any case, for their queries.

    Returns:
        ``[B, vocab_size]``, the logits of each prompt's last token; and the stored entry of each, none of them where
        the store was not asked.

    Raises:
        SkvError: See ``Session.run``.
    """
    session.check_cache(cache)
    session.check_ids(ids, cache.batch)
    one_column = session.config.right_padded or session.graph.num_logits > 1
    may_pad = session.config.all_logits or not one_column or cache.batch == 1
    if session.prefixes is None or cache.lengths.any() or not may_pad or not new.any(axis=1).all():
        return arrays.last_logits(session.run_columns(ids, new, None, cache), new), []
    prompts = [row[at].tolist() for row, at in zip(ids, new, strict=True)]
    return session.prefixes.prefill(session, cache, prompts, fresh)


def until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens up to the first end token, included."""
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: stop + 1]
