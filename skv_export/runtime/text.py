"""From prompt to text, piece by piece, with stop strings and figures of the run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skv_export.arguments import checked
from skv_export.errors import SkvError
from skv_export.model_folder.output import check_file
from skv_export.runtime.compaction import WINDOW
from skv_export.runtime.prompt_cache import PromptCache
from skv_export.runtime.prompt_compression import PromptCompressor
from skv_export.runtime.prompting import Drafter, Observer
from skv_export.runtime.sampling import Sampling
from skv_export.runtime.session import Session
from skv_export.runtime.speculation import DraftModel, PromptLookup, Speculation

logger = logging.getLogger(__name__)
REASONS = {
    "eos": "the model's end token",
    "stop": "a stop string",
    "max_new_tokens": "the limit of new tokens",
    "context": "the model's context, which is full",
    "interrupted": "an interrupt",
}
"""Why a text ends, by the name in ``Generation.stop_reason``."""
LOOK_AHEAD = 16
"""Tokens that a draft guesses for ``keep_tokens``."""


@dataclass
class Generation:
    """What was generated, and what it took.

    Attributes:
        text: What was generated, up to a stop string.
        prompt_tokens: Tokens of the prompt.
        cached_tokens: Those of them that were in the cache already.
        tokens: Generated token ids.
        given_tokens: Tokens of the prompt before a draft made it shorter; 0 = it did not.
        prefill_seconds: Until the first token, a draft's work included.
        decode_seconds: From the first token to the last.
        cache_bytes: Bytes of the cache, at the end.
        dropped_tokens: Tokens that the cache was compacted by.
        stop_reason: A name of ``REASONS``; empty while it goes on.
        guessed: Tokens guessed by speculative decoding.
        accepted: Those that were right.
    """

    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    given_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    cache_bytes: int = 0
    dropped_tokens: int = 0
    stop_reason: str = ""
    guessed: int = 0
    accepted: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding; None for fewer than two tokens."""
        steps = len(self.tokens) - 1
        return steps / self.decode_seconds if steps > 0 and self.decode_seconds > 0 else None

    def summary(self) -> str:
        """One line of figures."""
        speed = f", {self.tokens_per_second:.1f} tokens/s" if self.tokens_per_second else ""
        given = f" of {self.given_tokens}" if self.given_tokens else ""
        cached = f" ({self.cached_tokens} in the cache)" if self.cached_tokens else ""
        reason = REASONS.get(self.stop_reason, "nothing")
        dropped = f", {self.dropped_tokens} tokens left out" if self.dropped_tokens else ""
        guesses = f", {self.accepted} of {self.guessed} guesses right" if self.guessed else ""
        return (
            f"{self.prompt_tokens}{given} prompt tokens{cached} in {self.prefill_seconds:.2f} s; {len(self.tokens)} new"
            f"{speed}{guesses}; cache {self.cache_bytes / 2**20:.1f} MiB{dropped}; stopped by {reason}"
        )


class TextPieces:
    """Tokens to text: each piece as it is final, so one that could begin a stop string waits for what follows.

    Args:
        tokenizer: Of the session.
        stop: Strings that end the text, themselves left out.

    Attributes:
        stopped: Whether one of them has come.

    Raises:
        SkvError: An empty one.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        from tokenizers.decoders import DecodeStream

        if isinstance(stop, str) or not all(stop):
            raise SkvError("stop", got=repr(stop), expected="strings, none of them empty")
        self.stopped, self._stop, self._waiting = False, tuple(stop), ""
        self._tokenizer, self._decoder = tokenizer, DecodeStream(skip_special_tokens=True)

    def add(self, token: int) -> str:
        """Returns the text that is final with this token; often none."""
        self._waiting += self._decoder.step(self._tokenizer, token) or ""
        found = [at for at in map(self._waiting.find, self._stop) if at >= 0]
        self.stopped = bool(found)
        final = min(found) if found else len(self._waiting) - _overlap(self._waiting, self._stop)
        piece, self._waiting = self._waiting[:final], self._waiting[final:]
        return piece

    def rest(self) -> str:
        """Returns the text that waited, where no token follows."""
        piece, self._waiting = self._waiting, ""
        return piece


class TextStream:
    """Iterates over the pieces of a generated text; ``generation`` holds what has come so far.

    ``seconds_before`` is what was spent on the prompt before; it counts.

    Args:
        session: The model.
        prompts: The cache, which may hold the beginning of the prompt.
        prompt: The whole prompt, or its tokens.
        add_special_tokens: Whether the tokenizer adds its own.
        max_new_tokens: Tokens to generate at most.
        sampling: How a token is chosen; greedy if not given.
        stop: Strings that end the text, themselves left out.
        observe: Called with each token's logits and the token; see ``Session.stream``.
        goes_on: The prompt follows what the cache holds, and may be empty then, instead of being the whole of it.
        drafter: Guesses the next tokens; see ``Speculation``.
        keep_tokens: Leave out of the cache all but so many tokens once the prompt has run; see ``Session.compact``.
        look_ahead: Guesses what follows the prompt, for what is kept; see ``Session.stream``.

    Raises:
        SkvError: The prompt has no tokens or exceeds the model's context, or an empty stop string.
    """

    @checked
    def __init__(
        self,
        session: Session,
        prompts: PromptCache,
        prompt: str | Sequence[int],
        *,
        add_special_tokens: bool = True,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        observe: Observer | None = None,
        goes_on: bool = False,
        drafter: Drafter | None = None,
        keep_tokens: int | None = None,
        look_ahead: Drafter | None = None,
    ) -> None:
        self._session, self._prompts, self._text = session, prompts, TextPieces(session.tokenizer, stop)
        if goes_on and isinstance(prompt, str):
            new = prompts.go_on(prompt)
        else:
            new = prompts.begin(prompt, add_special_tokens=add_special_tokens)
        if not new:
            raise SkvError("prompt: no tokens", got=repr(prompt), expected="some text")
        held = len(prompts.tokens) - len(new)
        self.generation = Generation(
            prompt_tokens=len(prompts.tokens), cached_tokens=held, cache_bytes=prompts.cache.nbytes
        )
        self.seconds_before = 0.0
        self._max_new_tokens = max_new_tokens
        self._speculation = None if drafter is None else Speculation(session, drafter)
        self._tokens = (self._speculation or session).stream(
            [new],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            cache=prompts.cache,
            present=[prompts.tokens],
            observe=observe,
            keep_tokens=keep_tokens,
            look_ahead=look_ahead,
        )

    def __iter__(self) -> Generator[str, None, None]:
        """Yields each piece as it is final: one that could begin a stop string waits for what follows.

        However the iteration ends, ``generation`` and the cache's tokens say what has been generated: close the
        iterator where it is left early. An interrupt passes on.
        """
        result = self.generation
        try:
            yield from self._until_stopped()
        except (KeyboardInterrupt, GeneratorExit):
            result.stop_reason = "interrupted"
            raise
        finally:
            self._tokens.close()
            if self._speculation is not None:
                result.guessed, result.accepted = self._speculation.guessed, self._speculation.accepted
            cache = self._prompts.cache
            result.cache_bytes, result.dropped_tokens = cache.nbytes, int(cache.dropped[0])
            self._prompts.extend(result.tokens, result.text)
        if not result.stop_reason:
            ended = result.tokens and result.tokens[-1] in self._session.config.eos_token_id
            full = len(result.tokens) < self._max_new_tokens
            result.stop_reason = "eos" if ended else "context" if full else "max_new_tokens"
        logger.info("%s", result.summary())

    def _until_stopped(self) -> Iterator[str]:
        result, text = self.generation, self._text
        start = time.perf_counter()
        for (token,) in self._tokens:
            now = time.perf_counter()
            result.prefill_seconds = result.prefill_seconds or now - start + self.seconds_before
            result.decode_seconds = now - start + self.seconds_before - result.prefill_seconds
            result.tokens.append(int(token))
            if piece := text.add(int(token)):
                result.text += piece
                yield piece
            if text.stopped:
                result.stop_reason = "stop"
                return
        if piece := text.rest():
            result.text += piece
            yield piece

    def save_cache(self, path: Path | str) -> None:
        """Saves the cache, with all that was generated so far but an end token; see ``Cache.save``.

        Args:
            path: The file.
        """
        self._prompts.complete()
        self._prompts.cache.save(path)


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of a text that may be the beginning of a stop string."""
    longest = min(len(text), max(map(len, stops), default=1) - 1)
    return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)


@checked
def start_text(
    folder: Path | str,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    chat: bool = False,
    system: str | None = None,
    template_options: Mapping[str, Any] | None = None,
    execution_provider: str = "cpu",
    cuda_graph: bool = False,
    prompt_lookup: int = 0,
    draft: Path | str | None = None,
    draft_tokens: int = 4,
    load_cache: Path | str | None = None,
    keep_tokens: int | None = None,
    look_ahead: Path | str | None = None,
    compress_prompt: Path | str | int | None = None,
    keep: float = 0.25,
) -> TextStream:
    """Loads a model and begins to continue a prompt; the work is done as the result is iterated over.

    Args:
        folder: What ``skv-export model`` wrote.
        prompt: Text to continue; with ``chat``, what the user says.
        max_new_tokens: Tokens to generate at most.
        temperature: 0 = greedy.
        top_k: Only the k most likely tokens; 0 = all.
        top_p: Only the most likely tokens that make up this probability.
        min_p: Only tokens at least this probable, measured by the most probable one.
        repetition_penalty: Above 1: tokens that are there already become less likely.
        seed: Of the sampling.
        stop: Strings that end the text, themselves left out.
        chat: Put the prompt into the model's chat template.
        system: What the system says before the user, with ``chat``.
        template_options: What else the chat template asks for, such as ``{"enable_thinking": False}``.
        execution_provider: ``cpu`` or ``cuda``.
        cuda_graph: Decode as a CUDA graph; see ``Session``.
        prompt_lookup: Tokens to guess from what the text said before, and to check in one call; 0 = none.
        draft: A smaller exported model with the same tokens that guesses instead.
        draft_tokens: Tokens that it guesses at most.
        load_cache: A saved cache to go on from: the prompt, which may be empty, follows what it holds.
        keep_tokens: Leave out of the cache all but so many tokens once the prompt has run: those that its last tokens
            look at stay.
        look_ahead: With ``keep_tokens``: an exported model with the same tokens whose guess at what follows looks, too.
        compress_prompt: An exported model with the same tokens, or how many first layers of the model itself, that
            chooses which tokens of the prompt the model gets.
        keep: The share of them, with ``compress_prompt``.

    Raises:
        SkvError: See ``Session`` and ``Session.load_cache``; or the prompt has no token.
    """
    if not chat and (system is not None or template_options):
        raise SkvError("system and template_options", got="no chat", fix="They are the chat template's: add --chat.")
    sampling = Sampling(temperature, top_k, top_p, seed, min_p, repetition_penalty)
    if draft is not None and prompt_lookup:
        raise SkvError("draft", got="prompt_lookup too", expected="one of the two")
    guesses = prompt_lookup if draft is None else draft_tokens
    session = Session(
        folder,
        execution_provider=execution_provider,
        cuda_graph=cuda_graph,
        num_logits=max(guesses, 0) + 1,
        score_window=0 if keep_tokens is None else WINDOW + (0 if look_ahead is None else LOOK_AHEAD),
    )
    if chat:
        said = [{"role": "system", "content": system}] if system is not None else []
        messages = [*said, {"role": "user", "content": prompt}]
        prompt = session.chat_prompt(messages, **(template_options or {}))
    start, given = time.perf_counter(), 0
    tokens: Sequence[int] | None = None
    if load_cache is None:
        tokens = session.tokenizer.encode(prompt, add_special_tokens=not chat).ids
        if compress_prompt is not None:
            compressor = _compressor(session, compress_prompt)
            start, given = time.perf_counter(), len(tokens)
            tokens = compressor(tokens, keep)
        session.check_length(len(tokens))
        room = min(len(tokens) + max_new_tokens, session.config.context_length)
        prompts = PromptCache(session, max(room, 1))
    elif compress_prompt is not None:
        raise SkvError("compress_prompt", got="load_cache too", expected="one of the two")
    else:
        prompts = PromptCache(session, cache=session.load_cache(load_cache))
    spent = time.perf_counter() - start

    def guesser(folder: Path | str, num_tokens: int) -> Drafter:
        smaller = Session(folder, execution_provider=execution_provider)
        return DraftModel(smaller, num_tokens, session.config.vocab_size)

    lookup = PromptLookup(prompt_lookup) if prompt_lookup else None
    stream = TextStream(
        session,
        prompts,
        tokens if given and tokens is not None else prompt,
        add_special_tokens=not chat,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        goes_on=load_cache is not None,
        drafter=lookup if draft is None else guesser(draft, draft_tokens),
        keep_tokens=keep_tokens,
        look_ahead=None if look_ahead is None else guesser(look_ahead, LOOK_AHEAD),
    )
    if given:
        stream.seconds_before, stream.generation.given_tokens = spent, given
    return stream


def _compressor(session: Session, draft: Path | str | int) -> PromptCompressor:
    """What makes prompts shorter: a draft, or so many first layers of the model itself."""
    return PromptCompressor(
        session.folder if isinstance(draft, int) else draft,
        vocab_size=session.config.vocab_size,
        first_layers=draft if isinstance(draft, int) else None,
        execution_provider=session.execution_provider,
    )


def generate_text(
    folder: Path | str,
    prompt: str,
    *,
    on_text: Callable[[str], object] | None = None,
    save_cache: Path | str | None = None,
    **options: Any,
) -> Generation:
    """Continues a prompt to its end.

    Args:
        folder: What ``skv-export model`` wrote.
        prompt: Text to continue; with ``chat``, what the user says.
        on_text: Called with each piece of text as it comes.
        save_cache: Where to save the cache at the end; see ``TextStream.save_cache``.
        options: Those of ``start_text``.

    Raises:
        SkvError: See ``start_text``.
    """
    if save_cache is not None:
        check_file(save_cache)
    stream = start_text(folder, prompt, **options)
    for piece in stream:
        if on_text is not None:
            on_text(piece)
    if save_cache is not None:
        stream.save_cache(save_cache)
    return stream.generation
