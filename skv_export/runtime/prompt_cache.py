"""A cache that remembers its text: a prompt that goes on from what it holds costs only what is new.

One text in one cache, in place: nothing is copied, and what differs at the end is taken back. ``prefixes.py`` keeps
copies, of many texts, for caches to come.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from skv_export.errors import SkvError
from skv_export.runtime.cache import Cache
from skv_export.runtime.session import Session

logger = logging.getLogger(__name__)


class PromptCache:
    """The cache of one sequence, the tokens in it, and their text.

    Args:
        session: The model.
        max_length: Most tokens; the model's context if not given.
        cache: One of a single sequence that holds something already; in place of a new one.

    Attributes:
        cache: The cache.
        tokens: Of the sequence so far. The last of them may not have been appended to the cache yet.
    """

    def __init__(self, session: Session, max_length: int | None = None, cache: Cache | None = None) -> None:
        self._session = session
        self.cache = session.cache(1, max_length) if cache is None else cache
        if self.cache.batch != 1:
            raise SkvError("cache: sequences", got=self.cache.batch, expected=1)
        self.tokens: list[int] = list(self.cache.tokens[0])
        # Of the tokens, where text and tokens are known to be the same.
        self._text: str | None = None if self.tokens else ""
        self._prompt = ""

    def begin(self, prompt: str | Sequence[int], *, add_special_tokens: bool = True) -> list[int]:
        """Makes the cache hold a beginning of a prompt: as much of it as it has already.

        Args:
            prompt: The whole text; or its tokens.
            add_special_tokens: Whether the tokenizer adds its own, such as one that begins a text.

        Returns:
            The tokens that are still to be run, at least one; none for an empty prompt.

        Raises:
            SkvError: The prompt is longer than the model's context or ``max_length``; nothing has changed.
        """
        wanted = self._encode(prompt, add_special_tokens) if isinstance(prompt, str) else list(prompt)
        common = self.cache.common(0, wanted)
        self._session.check_length(len(wanted) - (int(self.cache.dropped[0]) if common else 0), self.cache.max_length)
        # What an answer ends with may read otherwise in the next prompt: the few tokens are taken back.
        self.cache.rewind_to_common(0, wanted)
        logger.info("prompt of %d tokens: %d are in the cache", len(wanted), common)
        self.tokens, self._text = wanted, None
        self._prompt = prompt if isinstance(prompt, str) else ""
        return wanted[common:]

    def go_on(self, text: str) -> list[int]:
        """Makes a text follow what the cache holds.

        Args:
            text: The text; empty = the last token runs again, for what comes after it.

        Returns:
            The tokens that are still to be run, at least one; none where there is neither.

        Raises:
            SkvError: The model's context does not hold them all, or the last token can't be taken back.
        """
        new = self._session.tokenizer.encode(text, add_special_tokens=False).ids if text else self.tokens[-1:]
        if not text and new:
            self.cache.rewind(len(self.tokens) - 1)
            del self.tokens[-1]
        self._session.check_length(len(self.tokens) + len(new))
        self._session.check_length(len(self.tokens) + len(new) - int(self.cache.dropped[0]), self.cache.max_length)
        self.tokens, self._text = [*self.tokens, *new], None
        return new

    def complete(self) -> None:
        """Makes the cache hold exactly ``tokens``, as far as they fit.

        Raises:
            SkvError: See ``Session.run``.
        """
        held = int(self.cache.lengths[0])
        if held > len(self.tokens):  # guesses behind a stop string
            self.cache.rewind(len(self.tokens))
        missing = self.tokens[held : held + int(self._session.room(self.cache)[0])]
        if missing:
            self._session.run([missing], None, None, self.cache)

    def extend(self, tokens: list[int], text: str) -> None:
        """Notes what was generated after ``begin``'s prompt.

        Args:
            tokens: The generated tokens.
            text: Their text as it was given out, without special tokens.
        """
        if tokens and tokens[-1] in self._session.config.eos_token_id:
            tokens = tokens[:-1]  # never appended, and the next prompt has it where its template wants it
        self.tokens = self.tokens + tokens
        whole = self._session.tokenizer.decode(tokens, skip_special_tokens=False) == text
        self._text = self._prompt + text if whole and self._prompt else None

    def reset(self) -> None:
        """Forgets everything; the buffers stay."""
        self.cache.reset()
        self.tokens, self._text = [], ""

    def _encode(self, prompt: str, add_special_tokens: bool) -> list[int]:
        """The prompt's tokens; what goes on from our text goes on from our tokens.

        A text has many tokenizations, and a model's answer need not be the tokenizer's. Between the two stands a
        special token, where no tokenizer joins what is left and right of it.
        """
        tokenizer = self._session.tokenizer
        if self._text and prompt.startswith(self._text):
            rest = tokenizer.encode(prompt[len(self._text) :], add_special_tokens=False).ids
            added = tokenizer.get_added_tokens_decoder()
            if rest and rest[0] in added and added[rest[0]].special:
                return [*self.tokens, *rest]
        ids: list[int] = tokenizer.encode(prompt, add_special_tokens=add_special_tokens).ids
        return ids
