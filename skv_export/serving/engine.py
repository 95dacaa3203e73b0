"""One model, one worker: requests wait in a bounded queue, run one after the other, and can be given up at any time."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skv_export.errors import SkvError
from skv_export.runtime.prompt_cache import PromptCache
from skv_export.runtime.sampling import Sampling
from skv_export.runtime.session import Session
from skv_export.runtime.text import Generation, TextStream

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What is to be generated.

    Attributes:
        prompt: Text to continue; or None, with ``messages``.
        messages: Of a chat.
        tools: JSON schemas, for the chat template.
        template_options: What else the template asks for.
        max_new_tokens: At most; None = as many as the context holds.
        sampling: How tokens are chosen.
        stop: Strings that end the text.
        top_logprobs: Most likely tokens to report at each step; None = no log-probabilities at all.
    """

    prompt: str | None = None
    messages: Sequence[Mapping[str, Any]] = ()
    tools: Sequence[Mapping[str, Any]] | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True)
class Token:
    """A generated token; ``top`` are the most likely ones, likeliest first, as (id, log-probability)."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """A piece of text, and the tokens since the last piece, if their log-probabilities are wanted."""

    text: str
    tokens: tuple[Token, ...] = ()


Event = Piece | Generation | Exception
"""A piece, the figures at the end, or what went wrong; one of the latter two comes last."""


class Job:
    """A request in the queue or running."""

    def __init__(self, request: Request, deliver: Callable[[Event], object]) -> None:
        self.request, self.deliver = request, deliver
        self.submitted = time.monotonic()
        self._given_up = threading.Event()

    def give_up(self) -> None:
        """Ends the job at the next token; nothing more is delivered."""
        self._given_up.set()

    @property
    def given_up(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._given_up.is_set()


class BusyError(Exception):
    """The queue is full."""


class Engine:
    """Runs requests through one model.

    Args:
        session: The model.
        queue_size: Requests that may wait.
        max_length: Most tokens of one sequence; the model's context if not given.

    Attributes:
        session: As given.
        max_length: Most tokens of one sequence.
        running: Whether a request runs.
    """

    def __init__(self, session: Session, *, queue_size: int = 16, max_length: int | None = None) -> None:
        self.session, self.running = session, False
        self.prompts = PromptCache(session, max_length)
        self.max_length = self.prompts.cache.max_length
        self._jobs: queue.Queue[Job | None] = queue.Queue(queue_size)
        self._current: Job | None = None
        self._stopping = False
        self._worker = threading.Thread(target=self._work, name="skv-serve", daemon=True)
        self._worker.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._jobs.qsize()

    @property
    def alive(self) -> bool:
        """Whether requests are worked on."""
        return self._worker.is_alive() and not self._stopping

    def submit(self, request: Request, deliver: Callable[[Event], object]) -> Job:
        """Puts a request into the queue.

        Args:
            request: What to generate.
            deliver: Called with each event, in the worker's thread; what it raises gives the job up.

        Raises:
            BusyError: The queue is full.
        """
        job = Job(request, deliver)
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise BusyError from None
        return job

    def stop(self) -> None:
        """Gives up what runs and what waits, and ends the worker."""
        self._stopping = True
        with contextlib.suppress(queue.Empty):
            while True:
                if (job := self._jobs.get_nowait()) is not None:
                    job.give_up()
        if (current := self._current) is not None:
            current.give_up()
        self._jobs.put(None)
        self._worker.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if job.given_up:
                continue
            self._current, self.running = job, True
            try:
                self._run(job)
            except Exception as error:  # whatever it is, its client hears of it and the next one runs
                if not isinstance(error, SkvError):
                    logger.exception("a request failed")
                    self.prompts.reset()
                with contextlib.suppress(Exception):  # the client may be gone, too
                    job.deliver(error)
            finally:
                self._current, self.running = None, False

    def _run(self, job: Job) -> None:
        request, found = job.request, list[Token]()
        prompt = request.prompt
        if prompt is None:
            prompt = self.session.chat_prompt(request.messages, tools=request.tools, **request.template_options)

        def observe(logits: NDArray[np.float32], tokens: NDArray[np.int64]) -> None:
            if request.top_logprobs is not None:
                found.append(_token(logits[0], int(tokens[0]), request.top_logprobs))

        stream = TextStream(
            self.session,
            self.prompts,
            prompt,
            add_special_tokens=request.prompt is not None,
            max_new_tokens=self.max_length if request.max_new_tokens is None else request.max_new_tokens,
            sampling=request.sampling,
            stop=request.stop,
            observe=observe,
        )
        with contextlib.closing(iter(stream)) as pieces:
            for text in pieces:
                if job.given_up:
                    logger.info("given up after %d tokens", len(stream.generation.tokens))
                    return
                job.deliver(Piece(text, tuple(found)))
                found.clear()
        if found:
            job.deliver(Piece("", tuple(found)))
        job.deliver(stream.generation)


def _token(logits: NDArray[np.float32], chosen: int, top: int) -> Token:
    """A token's natural log-probability under the model, before temperature and cuts, and the likeliest ones'."""
    wide = logits.astype(np.float64)
    logprobs = wide - wide.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    best = np.argsort(-logprobs, kind="stable")[:top]
    return Token(chosen, float(logprobs[chosen]), tuple((int(i), float(logprobs[i])) for i in best))
