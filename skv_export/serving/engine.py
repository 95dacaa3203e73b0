"""One model, some slots: requests wait in a bounded queue, run side by side, and can be given up at any time.

Two threads. One makes tokens of a request as soon as a slot is free for it: chat templates are rendered in a process of
their own, which nobody who is being answered should wait for. The other runs the model.
"""

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
from skv_export.runtime import batch
from skv_export.runtime.sampling import Sampling
from skv_export.runtime.session import Session
from skv_export.runtime.text import Generation, TextPieces

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
        session: The model. With ``prefix_bytes``, prompts begin from what earlier ones and their answers left.
        slots: Requests that run at the same time.
        queue_size: Requests that may wait.
        max_length: Most tokens of one sequence; the model's context if not given.
        prompt_chunk: Tokens of a prompt that run between two tokens of the others, at most.

    Attributes:
        session: As given.
        slots: As given.
        max_length: Most tokens of one sequence.
        slot_bytes: Bytes of a slot's cache.

    Raises:
        SkvError: See ``Session.batch``.
    """

    def __init__(
        self,
        session: Session,
        *,
        slots: int = 1,
        queue_size: int = 16,
        max_length: int | None = None,
        prompt_chunk: int = 512,
    ) -> None:
        self.session, self.slots = session, slots
        self.max_length = session.config.context_length if max_length is None else max_length
        self._batch = session.batch(slots, max_length=max_length, prompt_chunk=prompt_chunk)
        self.slot_bytes = batch.sequence_bytes(session, max_length)
        self._jobs: queue.Queue[Job | None] = queue.Queue(queue_size)
        self._ready: queue.SimpleQueue[_Run | None] = queue.SimpleQueue()
        self._places = threading.Semaphore(slots)
        self._active: set[Job] = set()  # what has a place; the two threads add and remove
        self._stopping = False
        self._threads = [
            threading.Thread(target=target, name=f"skv-serve-{target.__name__}", daemon=True)
            for target in (self._prepare, self._work)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._jobs.qsize()

    @property
    def running(self) -> int:
        """Requests that have a slot, or are being made ready for it."""
        return len(self._active)

    @property
    def held_tokens(self) -> int:
        """Tokens in the slots' caches."""
        return self._batch.tokens

    @property
    def kept_bytes(self) -> int:
        """Bytes kept for prompts that begin like earlier ones."""
        return 0 if self.session.prefixes is None else self.session.prefixes.nbytes

    @property
    def alive(self) -> bool:
        """Whether requests are worked on."""
        return all(thread.is_alive() for thread in self._threads) and not self._stopping

    def submit(self, request: Request, deliver: Callable[[Event], object]) -> Job:
        """Puts a request into the queue.

        Args:
            request: What to generate.
            deliver: Called with each event, in a thread of the engine's; what it raises gives the job up.

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
        """Gives up what runs and what waits, and ends the threads."""
        self._stopping = True
        with contextlib.suppress(queue.Empty):
            while True:
                if (job := self._jobs.get_nowait()) is not None:
                    job.give_up()
        for job in list(self._active):
            job.give_up()
        self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    # From the queue to tokens.

    def _prepare(self) -> None:
        while True:
            self._places.acquire()
            job = self._jobs.get()
            if job is None:
                self._ready.put(None)
                return
            self._active.add(job)
            try:
                run = None if job.given_up or self._stopping else _Run(job, self._tokens(job.request), self)
            except Exception as error:  # noqa: BLE001  # whatever it is, its client hears of it
                self._failed(job, error)
                run = None
            if run is None:
                self._leave(job)
            else:
                self._ready.put(run)

    def _tokens(self, request: Request) -> list[int]:
        """A request's prompt as tokens.

        Raises:
            SkvError: It has none, or more than a slot holds; or see ``Session.chat_prompt``.
        """
        prompt = request.prompt
        if prompt is None:
            prompt = self.session.chat_prompt(request.messages, tools=request.tools, **request.template_options)
        tokens: list[int] = self.session.tokenizer.encode(prompt, add_special_tokens=request.prompt is not None).ids
        if not tokens:
            raise SkvError("prompt: no tokens", got=repr(prompt), expected="some text")
        self.session.check_length(len(tokens), self.max_length)
        return tokens

    # From tokens to text.

    def _work(self) -> None:
        runs: dict[int, _Run] = {}
        while self._take_in(runs):
            try:
                for chosen in self._batch.step():
                    if runs[chosen.sequence].take(chosen):
                        self._end(runs, chosen.sequence)
            except Exception as error:  # noqa: BLE001  # its clients hear of it and the next ones run
                lost = [number for number in runs if number not in self._batch]
                if not isinstance(error, SkvError) or not lost:
                    self._batch.reset()
                    lost = list(runs)
                for number in lost:
                    self._failed(runs[number].job, error)
                    self._end(runs, number)
            for number in [number for number, run in runs.items() if run.job.given_up]:
                logger.info("given up after %d tokens", len(runs[number].generation.tokens))
                self._end(runs, number)

    def _take_in(self, runs: dict[int, _Run]) -> bool:
        """Puts what is ready into the batch, waiting where nothing runs; returns False at the end."""
        while True:
            try:
                run = self._ready.get(block=not runs)
            except queue.Empty:
                return True
            if run is None:
                return False
            try:
                runs[run.join(self._batch)] = run
            except Exception as error:  # noqa: BLE001  # its client hears of it
                self._failed(run.job, error)
                self._leave(run.job)

    def _end(self, runs: dict[int, _Run], number: int) -> None:
        self._batch.remove(number)
        self._leave(runs.pop(number).job)

    def _leave(self, job: Job) -> None:
        self._active.discard(job)
        self._places.release()

    def _failed(self, job: Job, error: Exception) -> None:
        if not isinstance(error, SkvError):
            logger.error("a request failed", exc_info=error)
        with contextlib.suppress(Exception):  # the client may be gone, too
            job.deliver(error)


class _Run:
    """A request in a slot: its text so far."""

    def __init__(self, job: Job, prompt: list[int], engine: Engine) -> None:
        self.job, self._prompt, self._engine = job, prompt, engine
        self._text = TextPieces(engine.session.tokenizer, job.request.stop)
        self._found: list[Token] = []
        self._start = 0.0
        self.generation = Generation(prompt_tokens=len(prompt), cache_bytes=engine.slot_bytes)

    def join(self, slots: batch.Batch) -> int:
        """Puts the prompt into the batch; returns its number there."""
        self._start = time.perf_counter()
        request = self.job.request
        count = self._engine.max_length if request.max_new_tokens is None else request.max_new_tokens
        observe = None if request.top_logprobs is None else self._observe
        return slots.add(self._prompt, max_new_tokens=count, sampling=request.sampling, observe=observe)

    def _observe(self, logits: NDArray[np.float32], token: int) -> None:
        self._found.append(_token(logits, token, self.job.request.top_logprobs or 0))

    def take(self, chosen: batch.Token) -> bool:
        """Delivers what is final with a token; returns whether it is the last one, or nobody wants more."""
        now, result = time.perf_counter() - self._start, self.generation
        result.prefill_seconds = result.prefill_seconds or now
        result.decode_seconds = now - result.prefill_seconds
        result.cached_tokens = chosen.cached_tokens
        result.tokens.append(chosen.token)
        piece = self._text.add(chosen.token)
        result.stop_reason = "stop" if self._text.stopped else chosen.stop_reason
        if result.stop_reason and not self._text.stopped:
            piece += self._text.rest()
        result.text += piece
        if self.job.given_up:
            return True
        try:
            if piece or (result.stop_reason and self._found):
                self.job.deliver(Piece(piece, tuple(self._found)))
                self._found.clear()
            if result.stop_reason:
                logger.info("%s", result.summary())
                self.job.deliver(result)
        except Exception:  # noqa: BLE001  # whatever became of the client, the others go on
            self.job.give_up()
        return bool(result.stop_reason) or self.job.given_up


def _token(logits: NDArray[np.float32], chosen: int, top: int) -> Token:
    """A token's natural log-probability under the model, before temperature and cuts, and the likeliest ones'."""
    wide = logits.astype(np.float64)
    logprobs = wide - wide.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    best = np.argsort(-logprobs, kind="stable")[:top]
    return Token(chosen, float(logprobs[chosen]), tuple((int(i), float(logprobs[i])) for i in best))
