"""A conversation with an exported chat model: its messages, and one cache that holds all of it."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from skv_export.runtime.prompt_cache import PromptCache
from skv_export.runtime.session import Session
from skv_export.runtime.text import Generation, TextStream


class Conversation:
    """Messages between a user and the model, of which only the new ones run through the model.

    Args:
        session: The model; its folder has a chat template.
        system: What the system says first, if anything.
        max_length: Most tokens of the whole conversation; the model's context if not given.
        template_options: What else the chat template asks for.

    Attributes:
        system: As given; a change counts from the next message on.
        messages: Of user and assistant so far, each with ``role`` and ``content``.
        prompts: The cache.
        last: Figures of the last answer; None before the first.
    """

    def __init__(
        self,
        session: Session,
        *,
        system: str | None = None,
        max_length: int | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.system, self.messages, self.last = system, list[dict[str, str]](), None
        self.prompts = PromptCache(session, max_length)
        self._session, self._template_options = session, dict(template_options or {})

    last: Generation | None

    def all_messages(self) -> list[dict[str, str]]:
        """Returns the messages, the system's first."""
        return [*([] if self.system is None else [{"role": "system", "content": self.system}]), *self.messages]

    def say(self, text: str, **options: Any) -> Generator[str, None, None]:
        """Says something to the model.

        Args:
            text: What the user says.
            options: Those of ``TextStream``: max_new_tokens, sampling, stop.

        Yields:
            The answer, piece by piece. Once it ends, or the iteration is closed, question and answer are among the
            messages; what was not answered at all is not.

        Raises:
            SkvError: The conversation is longer than the context, or its template refuses it; nothing has changed.
        """
        question = {"role": "user", "content": text}
        prompt = self._session.chat_prompt([*self.all_messages(), question], **self._template_options)
        stream = TextStream(self._session, self.prompts, prompt, add_special_tokens=False, **options)
        try:
            yield from stream
        finally:
            if stream.generation.tokens:
                self.messages += [question, {"role": "assistant", "content": stream.generation.text}]
                self.last = stream.generation

    def reset(self) -> None:
        """Forgets what was said, but not what the system says."""
        self.messages.clear()
        self.prompts.reset()
        self.last = None
