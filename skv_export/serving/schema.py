"""The bodies of requests, as OpenAI's clients send them; what has no meaning here is refused by name."""

from __future__ import annotations

import secrets
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from skv_export.errors import SkvError
from skv_export.runtime.sampling import Sampling
from skv_export.serving.engine import Request

MAX_STOPS = 16


class StreamOptions(BaseModel):
    """``stream_options``."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class Common(BaseModel):
    """What both endpoints take; ``top_k``, ``min_p`` and ``repetition_penalty`` go beyond OpenAI's."""

    model_config = ConfigDict(extra="forbid")
    model: str
    temperature: float | None = Field(1.0, ge=0, le=100)
    top_p: float | None = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    stop: str | list[str] | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: Literal[1] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    def sampling(self) -> Sampling:
        """How tokens are chosen; without a seed, by one that nobody knows."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=secrets.randbits(62) if self.seed is None else self.seed,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )

    def stops(self) -> tuple[str, ...]:
        """The strings that end the text."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(given) > MAX_STOPS:
            raise SkvError("stop", got=f"{len(given)} strings", expected=f"at most {MAX_STOPS}")
        return tuple(given)


class Message(BaseModel):
    """A message; the content is text, or parts of text."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[dict[str, Any]] | None = None

    def plain(self) -> dict[str, Any]:
        """The message as templates take it.

        Raises:
            SkvError: A part that is no text.
        """
        values = self.model_dump(exclude_none=True)
        if isinstance(self.content, list):
            kinds = sorted({str(part.get("type")) for part in self.content} - {"text"})
            if kinds:
                raise SkvError("messages: content", got=", ".join(kinds), expected="text: the model has no other input")
            values["content"] = "".join(str(part.get("text", "")) for part in self.content)
        return values


class ChatBody(Common):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    def request(self) -> Request:
        """What to generate."""
        return Request(
            messages=[message.plain() for message in self.messages],
            tools=self.tools,
            template_options=self.chat_template_kwargs,
            max_new_tokens=self.max_completion_tokens or self.max_tokens,
            sampling=self.sampling(),
            stop=self.stops(),
            top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


class CompletionBody(Common):
    """``POST /v1/completions``."""

    prompt: str | list[str]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    def request(self) -> Request:
        """What to generate; OpenAI's default is 16 tokens."""
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if len(prompts) != 1:
            raise SkvError("prompt", got=f"{len(prompts)} texts", expected="one a request")
        return Request(
            prompt=prompts[0],
            max_new_tokens=self.max_tokens or 16,
            sampling=self.sampling(),
            stop=self.stops(),
            top_logprobs=self.logprobs,
        )
