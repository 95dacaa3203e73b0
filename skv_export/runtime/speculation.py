"""Speculative decoding: guesses at the next tokens are checked in one call, and what is wrong is taken back.

What comes out is what decoding token by token gives, with any sampling. A call is never longer than the cache allows
(``Cache.draft_room``): its tokens must not see other tiles than they would one by one, and must leave no trace when
they are taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import numpy as np

from skv_export.arguments import check, checked
from skv_export.errors import SkvError
from skv_export.runtime import arrays
from skv_export.runtime.cache import Cache
from skv_export.runtime.graph import Int64, Logits
from skv_export.runtime.prompting import Drafter, Observer, begun
from skv_export.runtime.sampling import Sampling
from skv_export.runtime.session import Session

MAX_NGRAM = 3
"""Tokens at the end of a text that are looked for earlier in it, at most."""


class PromptLookup:
    """Guesses that a text goes on as it did where its last tokens stood before.

    Args:
        num_tokens: Tokens to guess at most.
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = _checked(num_tokens)

    def __call__(self, tokens: Sequence[int], count: int) -> list[int]:
        """Returns what followed the last occurrence of the longest ending, of up to 3 tokens, that occurs before."""
        text = np.asarray(tokens, np.int64)
        for n in range(min(MAX_NGRAM, len(text) - 1), 0, -1):
            starts = np.ones(len(text) - n, np.bool_)
            for i in range(n):
                starts &= text[i : len(text) - n + i] == text[len(text) - n + i]
            found = np.flatnonzero(starts)
            if found.size:
                start = int(found[-1]) + n
                return text[start : start + count].tolist()
        return []


class DraftModel:
    """Guesses with a smaller model, greedily.

    Args:
        session: The smaller model; it has the same tokens.
        num_tokens: Tokens to guess at most.
        vocab_size: Of the model whose text it is.

    Raises:
        SkvError: Another vocabulary.
    """

    def __init__(self, session: Session, num_tokens: int, vocab_size: int) -> None:
        if session.config.vocab_size != vocab_size:
            raise SkvError(
                f"{session.folder}: as a draft: vocab_size",
                got=session.config.vocab_size,
                expected=f"{vocab_size}, the model's",
                fix="A draft model must have the tokens of the model that it drafts for.",
            )
        self.num_tokens = _checked(num_tokens)
        self._session, self._cache = session, session.cache(1)

    def __call__(self, tokens: Sequence[int], count: int) -> list[int]:
        """Returns the smaller model's continuation; nothing where its context is full."""
        count = min(count, self._cache.max_length - len(tokens) + 1)
        if count < 1:
            return []
        # A token that comes back from its codes makes a guess worse, not the text.
        new, made = list(tokens[self._cache.rewind_to_common(0, tokens) :]), list[int]()
        while len(made) < count:
            logits = self._session.run([new], None, None, self._cache)
            made.append(int(logits[0, -1].argmax()))
            new = made[-1:]
        return made


class Speculation:
    """Generates one sequence with guesses.

    Args:
        session: The model, opened with ``num_logits`` above 1, or exported with all logits.
        drafter: Guesses.

    Attributes:
        guessed: Tokens guessed so far.
        accepted: Those that were right.
        calls: Calls of the model after the prompt.

    Raises:
        SkvError: The session returns the logits of one token only, or the model can't take guesses back.
    """

    def __init__(self, session: Session, drafter: Drafter) -> None:
        if got := session.config.keeps_guesses:
            raise SkvError(
                f"{session.folder}: speculative decoding",
                got=got,
                expected="one that can take guesses back",
                fix="Decode token by token.",
            )
        self.guessed = self.accepted = self.calls = 0
        self.session, self.drafter = session, drafter
        self._most = min(drafter.num_tokens, session.max_drafts)
        if self._most < 1:
            raise SkvError(
                "speculative decoding: logits of a call's last tokens",
                got="one token's",
                expected=f"those of {drafter.num_tokens + 1}",
                fix=f"Session(folder, num_logits={drafter.num_tokens + 1}), or export with --all-logits.",
            )

    @checked
    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        cache: Cache | None = None,
        present: Sequence[Sequence[int]] | None = None,
        observe: Observer | None = None,
        keep_tokens: int | None = None,
        look_ahead: Drafter | None = None,
    ) -> Generator[Int64, None, None]:
        """Generates token by token, as ``Session.stream`` does for one sequence.

        Args:
            prompts: The prompt, ``[1, S]``.
            max_new_tokens: Tokens to generate at most.
            sampling: How a token is chosen; greedy if not given.
            cache: Of one sequence; holds what came before. When the stream ends by itself, the last token has not been
                appended to it; when it is closed before, some may have been that were not yielded.
            present: As in ``Session.stream``.
            observe: As in ``Session.stream``.
            keep_tokens: As in ``Session.stream``.
            look_ahead: As in ``Session.stream``.

        Yields:
            ``[1]``, the next token.

        Raises:
            SkvError: Several sequences, or see ``Session.stream``.
        """
        session, ids = self.session, arrays.integers("prompts", prompts)
        session.check_ids(ids, 1)
        one = np.ones(1, np.bool_)
        with begun(
            session, ids, np.ones(ids.shape, np.bool_), max_new_tokens=max_new_tokens, sampling=sampling, cache=cache,
            present=present, observe=observe, keep_tokens=keep_tokens, look_ahead=look_ahead,
        ) as run:  # fmt: skip

            def choose(logits: Logits) -> int:
                return int(run.choose(logits[None], one)[0])

            new, count = [choose(run.logits[0])], 1
            while True:
                for token in new:
                    yield np.array([token], np.int64)
                ended = new[-1] in session.config.eos_token_id
                if ended or count >= max_new_tokens or session.room(run.cache)[0] <= 0:
                    return
                new = self._step(run.cache, new[-1], max_new_tokens - count, choose)
                count += len(new)

    def _step(self, cache: Cache, token: int, wanted: int, choose: Callable[[Logits], int]) -> list[int]:
        """One call: the last token and guesses behind it. Returns the tokens that follow; all but the last are held."""
        held = int(cache.lengths[0])
        room = min(self._most, wanted - 1, cache.draft_room(0))
        guesses = self.drafter([*cache.tokens[0], token], room) if room > 0 else []
        logits = self.session.run([[token, *guesses]], None, None, cache)[0, -1 - len(guesses) :]
        new: list[int] = []
        for row, guess in zip(logits, [*guesses, -1], strict=True):
            new.append(choose(row))
            if new[-1] != guess or guess in self.session.config.eos_token_id:
                break
        cache.rewind(held + len(new))
        self.calls += 1
        self.guessed += len(guesses)
        self.accepted += sum(a == b for a, b in zip(new, guesses, strict=False))
        return new


def _checked(num_tokens: int) -> int:
    check("tokens to guess", num_tokens, int)
    if num_tokens < 1:
        raise SkvError("tokens to guess", got=num_tokens, expected="at least 1")
    return num_tokens
