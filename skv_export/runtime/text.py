"""From prompt to text in one call, with figures of the run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skv_export.errors import SkvError
from skv_export.model_folder.output import check_file
from skv_export.runtime.cache import Cache
from skv_export.runtime.sampling import Sampling
from skv_export.runtime.session import Session
from skv_export.runtime.speculation import DraftModel, PromptLookup, Speculation


@dataclass
class Generation:
    """The result of ``generate_text``.

    Attributes:
        text: What was generated.
        prompt_tokens: Tokens of the prompt.
        tokens: Generated token ids.
        prefill_seconds: Until the first token.
        decode_seconds: From the first token to the last.
        cache_bytes: Bytes of the cache.
        stop_reason: ``eos`` (an end token), ``max_new_tokens``, or ``context`` (the model's context is full).
        guessed: Tokens guessed by speculative decoding.
        accepted: Those that were right.
    """

    text: str = ""
    prompt_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    cache_bytes: int = 0
    stop_reason: str = ""
    guessed: int = 0
    accepted: int = 0

    def summary(self) -> str:
        """One line of figures."""
        steps = len(self.tokens) - 1
        speed = f", {steps / self.decode_seconds:.1f} tokens/s" if steps > 0 and self.decode_seconds > 0 else ""
        guesses = f", {self.accepted} of {self.guessed} guesses right" if self.guessed else ""
        return (
            f"{self.prompt_tokens} prompt tokens in {self.prefill_seconds:.2f} s; "
            f"{len(self.tokens)} new{speed}{guesses}; "
            f"cache {self.cache_bytes / 2**20:.1f} MiB; stopped by {self.stop_reason}"
        )


def generate_text(
    folder: Path | str,
    prompt: str,
    *,
    on_text: Callable[[str], object] | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    execution_provider: str = "cpu",
    cuda_graph: bool = False,
    prompt_lookup: int = 0,
    draft: Path | str | None = None,
    draft_tokens: int = 4,
    load_cache: Path | str | None = None,
    save_cache: Path | str | None = None,
) -> Generation:
    """Continues a prompt.

    Args:
        folder: What ``skv-export model`` wrote.
        prompt: Text to continue; with ``chat``, what the user says.
        on_text: Called with each piece of text as it comes.
        max_new_tokens: Tokens to generate at most.
        temperature: 0 = greedy.
        top_k: Only the k most likely tokens; 0 = all.
        top_p: Only the most likely tokens that make up this probability.
        seed: Of the sampling.
        chat: Put the prompt into the model's chat template.
        execution_provider: ``cpu`` or ``cuda``.
        cuda_graph: Decode as a CUDA graph; see ``Session``.
        prompt_lookup: Tokens to guess from what the text said before, and to check in one call; 0 = none.
        draft: A smaller exported model with the same tokens that guesses instead.
        draft_tokens: Tokens that it guesses at most.
        load_cache: A saved cache to go on from: the prompt, which may be empty, follows what it holds.
        save_cache: Where to save the cache at the end, with all that was generated.

    Raises:
        SkvError: See ``Session`` and ``Session.load_cache``; or the prompt has no token.
    """
    from tokenizers.decoders import DecodeStream

    guesses = draft_tokens if draft is not None else prompt_lookup
    if draft is not None and prompt_lookup:
        raise SkvError("draft", got="prompt_lookup too", expected="one of the two")
    session = Session(
        folder, execution_provider=execution_provider, cuda_graph=cuda_graph, num_logits=max(guesses, 0) + 1
    )
    text = session.chat_prompt([{"role": "user", "content": prompt}]) if chat else prompt
    if save_cache is not None:
        check_file(save_cache)
    cache = None if load_cache is None else _loaded(session, load_cache)
    ids = session.tokenizer.encode(text, add_special_tokens=not chat and cache is None).ids if text else []
    if cache is not None and not ids and cache.tokens[0]:  # the last token again, for its logits
        ids = cache.tokens[0][-1:]
        cache.rewind(len(cache.tokens[0]) - 1)
    if not ids:
        raise SkvError("prompt: no tokens", got=repr(prompt), expected="some text")
    if cache is None:
        session.check_length(len(ids))
        cache = session.cache(1, min(len(ids) + max_new_tokens, session.config.context_length))
    result = Generation(prompt_tokens=len(ids), cache_bytes=cache.nbytes)
    decoder = DecodeStream(skip_special_tokens=True)
    sampling = Sampling(temperature, top_k, top_p, seed)
    start = now = time.perf_counter()
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling, "cache": cache}
    speculation = None
    if draft is not None:
        smaller = Session(draft, execution_provider=execution_provider)
        speculation = Speculation(session, DraftModel(smaller, draft_tokens, session.config.vocab_size))
    elif prompt_lookup:
        speculation = Speculation(session, PromptLookup(prompt_lookup))
    tokens = (
        speculation.stream(ids, **options) if speculation else (int(t) for (t,) in session.stream([ids], **options))
    )
    for token in tokens:
        now = time.perf_counter()
        result.prefill_seconds = result.prefill_seconds or now - start
        result.tokens.append(token)
        piece = decoder.step(session.tokenizer, token)
        if piece:
            result.text += piece
            if on_text is not None:
                on_text(piece)
    if speculation is not None:
        result.guessed, result.accepted = speculation.guessed, speculation.accepted
    result.decode_seconds = now - start - result.prefill_seconds
    if save_cache is not None:
        if cache.lengths[0] < cache.max_length:
            session.run([result.tokens[-1:]], None, None, cache)
        cache.save(save_cache)
    if result.tokens and result.tokens[-1] in session.config.eos_token_id:
        result.stop_reason = "eos"
    else:
        result.stop_reason = "max_new_tokens" if len(result.tokens) == max_new_tokens else "context"
    return result


def _loaded(session: Session, path: Path | str) -> Cache:
    """A saved cache of one sequence, with room up to the model's context."""
    cache = session.load_cache(path)
    if cache.batch != 1:
        raise SkvError(f"{path}: a cache of several sequences", got=cache.batch, expected=1)
    return cache
