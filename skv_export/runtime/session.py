"""An exported folder, running: calls with new tokens, checked, and the loop that generates token by token.

Needs numpy, onnxruntime and tokenizers; no torch.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from skv_export.arguments import checked
from skv_export.errors import SkvError
from skv_export.model_folder.names import CALIBRATION_FILE
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.native.library import load_library
from skv_export.paths import to_path
from skv_export.runtime import arrays, cache_file, compaction, embeddings, rope_switch
from skv_export.runtime.batch import Batch
from skv_export.runtime.cache import MAX_BATCH, Cache
from skv_export.runtime.cache_state import load_bases
from skv_export.runtime.graph import Graph, Int64, Logits
from skv_export.runtime.prompting import Drafter, Observer, begun, until_end
from skv_export.runtime.prompts import chat_prompt, load_tokenizer
from skv_export.runtime.providers import device_of
from skv_export.runtime.queries import MAX_WINDOW
from skv_export.runtime.sampling import Sampling
from skv_export.spec.key_basis import KeyBasis

MAX_THREADS = 1024
MAX_LOGITS = 1024


class Session:
    """An exported folder, loaded into ONNX Runtime.

    Args:
        folder: What ``skv-export model`` wrote.
        execution_provider: ``cpu``, ``cuda``, or ``cuda:1`` for another GPU than the first; an error if it is not
            available, never a silent fallback.
        cuda_graph: On a GPU, capture decoding (one new token per sequence) as a CUDA graph per cache: one launch
            instead of hundreds a token.
        num_threads: Threads inside an op; 0 = ONNX Runtime's choice.
        spinning: Whether idle threads busy-wait for the next op; turn it off where torch's threads share the cores.
        model: The graph as bytes, in place of ``model.onnx``; its external data is the folder's (``verify`` uses it).
        config: The configuration that goes with ``model``.
        num_logits: Last tokens of a call whose logits are returned, for speculative decoding; such a session takes no
            padding. It needs the package onnx, unless the folder was exported with all logits.
        prefix_bytes: Memory for the beginnings of sequences that ``stream`` and ``generate`` have run, so that a prompt
            that begins like one of them runs only what is new; 0 = none is kept.
        score_window: Last tokens whose queries are kept for ``compact``; 0 = none. It needs the package onnx.

    Attributes:
        folder: The folder.
        config: Its ``skv_config.json``.
        execution_provider: As asked for.
        cuda_graph: As asked for.
        library: The native library.
        graph: The loaded graph.
        onnx: onnxruntime's InferenceSession.
        prefixes: The beginnings that are kept; None without ``prefix_bytes``.

    Raises:
        SkvError: A file is missing or damaged, or the provider or its kernels are not available.
    """

    @checked
    def __init__(
        self,
        folder: Path | str,
        *,
        execution_provider: str = "cpu",
        cuda_graph: bool = False,
        num_threads: int = 0,
        spinning: bool = True,
        model: bytes | None = None,
        config: ModelConfig | None = None,
        num_logits: int = 1,
        prefix_bytes: int = 0,
        score_window: int = 0,
    ) -> None:
        self.folder = to_path(folder, "exported folder")
        for name, number, least, most, what in (
            ("num_threads", num_threads, 0, MAX_THREADS, "; 0 = ONNX Runtime's choice"),
            ("num_logits", num_logits, 1, MAX_LOGITS, " tokens of a call"),
            ("score_window", score_window, 0, MAX_WINDOW, " tokens; 0 = none"),
        ):
            if not least <= number <= most:
                raise SkvError(name, got=number, expected=f"{least} ... {most}{what}")
        self.config = config or ModelConfig.load(self.folder)
        self.execution_provider = execution_provider
        if cuda_graph and device_of(execution_provider)[0] != "cuda":
            raise SkvError("cuda_graph", got=f"execution_provider {execution_provider}", expected="cuda")
        self.cuda_graph = cuda_graph
        self.prefixes = rope_switch.prefix_store(prefix_bytes, self.config)
        self.library = load_library()
        self.graph = Graph(
            self.folder,
            self.config,
            self.library,
            execution_provider=execution_provider,
            cuda_graph=cuda_graph,
            num_threads=num_threads,
            spinning=spinning,
            model=model,
            num_logits=num_logits,
            score_window=score_window,
        )
        self.onnx = self.graph.onnx

    @checked
    def cache(self, batch: int = 1, max_length: int | None = None) -> Cache:
        """Allocates a cache.

        Args:
            batch: Sequences.
            max_length: Tokens per sequence; the model's context length if not given.

        Returns:
            An empty cache, allocated where the execution provider computes.

        Raises:
            SkvError: More tokens than the model's context, or none.
        """
        wanted = self.config.context_length if max_length is None else max_length
        if not 1 <= batch <= MAX_BATCH:
            raise SkvError("batch", got=batch, expected=f"1 ... {MAX_BATCH} sequences")
        if not 1 <= wanted <= self.config.context_length:
            raise SkvError(
                "max_length", got=wanted, expected=f"1 ... {self.config.context_length}, the model's context"
            )
        return Cache(
            self.onnx, self.config.layers, batch, wanted, self.execution_provider, self.library,
            lambda: self.bases, lambda: cache_file.model_digest(self.folder), self.config.states, self.config.indices,
        )  # fmt: skip

    @checked
    def batch(self, slots: int, *, max_length: int | None = None, prompt_chunk: int = 512) -> Batch:
        """Returns a batch whose sequences come and go between steps.

        Args:
            slots: Sequences that run at the same time.
            max_length: Tokens of a sequence, prompt included; None = the model's context.
            prompt_chunk: Tokens of a prompt that run between two steps, at most. A prompt in pieces sees its earlier
                pieces as the cache holds them.

        Returns:
            The batch, empty.

        Raises:
            SkvError: A number out of its range, or the caches would not fit into the memory.
        """
        return Batch(self, slots, max_length, prompt_chunk)

    @checked
    def load_cache(self, path: Path | str, *, room: int | None = None) -> Cache:
        """Reads a cache that ``Cache.save`` wrote: going on with it is going on with the one that was saved.

        Args:
            path: The file.
            room: Tokens to append at most; None = up to the model's context.

        Returns:
            The cache, with buffers of its own.

        Raises:
            SkvError: The file is damaged, or no cache of this model; or there is not so much room in its context.
        """
        return cache_file.load(self, path, room)

    @checked
    def compact(self, cache: Cache, *, keep: int, room: int | None = None) -> None:
        """Leaves out of a cache, in place, the tokens that the last queries look at least; for the end of a prompt.

        Each KV head of each layer chooses for itself (docs/spec.md, Fewer tokens). Layers with a sliding window keep
        all that they see. New tokens go on with their positions.

        Args:
            cache: Just after the call whose last ``score_window`` queries count.
            keep: Most tokens that a sequence holds afterwards.
            room: Tokens to append later, at most, for which the new buffers are; None = as many as before.

        Raises:
            SkvError: ``keep`` is too small, the session has no ``score_window``, or the cache no queries of its last
                tokens; nothing has changed.
        """
        compaction.compact(self, cache, keep, room)

    @cached_property
    def bases(self) -> Mapping[int, KeyBasis]:
        """Constants of calibrated keys, by layer; see ``load_bases``."""
        return load_bases(self.folder / CALIBRATION_FILE, self.config.layers)

    @checked
    def run(
        self, input_ids: ArrayLike, attention_mask: ArrayLike | None, position_ids: ArrayLike | None, cache: Cache
    ) -> Logits:
        """Runs new tokens and appends them to the cache.

        Args:
            input_ids: ``[B, S]``, new tokens.
            attention_mask: ``[B, columns]``, 0 = padding, left or right; its last S columns are the new tokens', those
                before are the past's. None = the past as the cache holds it, and no padding among the new.
            position_ids: ``[B, S]``; None = as the mask says. With multimodal RoPE ``[3, B, S]``, too.
            cache: Of this session; holds B sequences.

        Returns:
            ``[B, 1, vocab_size]``, the logits of each sequence's last new token; ``[B, S, vocab_size]`` where the graph
            returns all. Rows of padding, or of a sequence without a new token, mean nothing.

        Raises:
            SkvError: The mask does not fit the cache, or the model's context or the cache's capacity would be passed
                (nothing is written); or ONNX Runtime fails (the cache is empty then).
        """
        ids = arrays.integers("input_ids", input_ids)
        self.check_cache(cache)
        self.check_ids(ids, cache.batch)
        new = np.ones(ids.shape, np.bool_)
        if attention_mask is not None:
            new = arrays.new_columns(attention_mask, ids.shape[1], cache.lengths)
        places = arrays.positions(position_ids, self.config.position_axes, new, self.config.context_length)
        return self.run_columns(ids, new, places, cache)

    @checked
    def run_embeds(
        self, inputs_embeds: ArrayLike, attention_mask: ArrayLike | None, position_ids: ArrayLike | None, cache: Cache
    ) -> Logits:
        """Runs embeddings in the place of tokens, such as a prompt with an image; see ``run``.

        Args:
            inputs_embeds: ``[B, S, hidden]``, what transformers calls so: scaled where the model scales them.
            attention_mask: As in ``run``.
            position_ids: As in ``run``.
            cache: As in ``run``.

        Returns:
            As ``run``.

        Raises:
            SkvError: The graph takes no embeddings, or see ``run``.
        """
        self.check_cache(cache)
        return embeddings.run(self, inputs_embeds, attention_mask, position_ids, cache)

    @checked
    def append(self, rows: Sequence[Sequence[int]], cache: Cache) -> Logits:
        """Runs new tokens, as many or few for each sequence, and appends them to the cache.

        Args:
            rows: The tokens of each sequence; none for one that rests.
            cache: As in ``run``.

        Returns:
            ``[B, vocab_size]``, the logits of each sequence's last new token; those of one that rests mean nothing.

        Raises:
            SkvError: See ``run``; or none has a token.
        """
        if len(rows) != cache.batch:
            raise SkvError("rows", got=f"{len(rows)} sequences", expected=f"{cache.batch}, the cache's")
        ids, mask = arrays.padded(rows, self.pad_token_id)
        self.check_cache(cache)
        self.check_ids(ids, cache.batch)
        return arrays.last_logits(self.run_columns(ids, mask, None, cache), mask)

    def run_columns(
        self, ids: Int64, new: NDArray[np.bool_], positions: Int64 | None, cache: Cache, embeds: Logits | None = None
    ) -> Logits:
        """``run`` with what ``check_cache`` and ``check_ids`` have checked.

        Args:
            ids: ``[B, S]``, the tokens.
            new: ``[B, S]``, which columns hold tokens.
            positions: ``[B, S]``; None = as they follow.
            cache: Changed in place.
            embeds: ``[B, S, hidden]``, in the place of the tokens.

        Returns:
            Logits, as ``run``.

        Raises:
            SkvError: See ``run``.
        """
        count = new.sum(axis=1)
        self.check_length(int((cache.lengths + count).max()))
        self.check_length(int((cache.held + count).max()), cache.capacity)
        if rope_switch.passes(cache, count, self.config.rope_switch):
            return rope_switch.run_anew(self, ids, new, cache)
        if positions is None:
            positions = np.where(new, cache.lengths[:, None] + new.cumsum(axis=1) - 1, 0)
        place = None
        if not self.config.all_logits and (self.config.right_padded or self.graph.num_logits > 1):
            arrays.check_unpadded(self.folder, new)
        if self.config.right_padded:
            place = np.argsort(~new, axis=1, kind="stable")
            ids, positions = (np.take_along_axis(x, place, axis=1) for x in (ids, positions))
            new = np.take_along_axis(new, place, axis=1)
        logits, queries = self.graph.run(cache, ids, new, positions, embeds)
        if queries:
            cache.queries.add(count, new.shape[1], queries, self.graph.score_window)
        held = ids if embeds is None else np.full_like(ids, arrays.NO_TOKEN)
        cache.advance([row[columns].tolist() for row, columns in zip(held, new, strict=True)])
        if place is not None and self.config.all_logits and not np.array_equal(place, np.sort(place, axis=1)):
            logits = np.take_along_axis(logits, np.argsort(place, axis=1)[:, :, None], axis=1)
        return logits

    @checked
    def check_length(self, length: int, capacity: int | None = None) -> None:
        """Refuses a sequence that is longer than the model's context, or than a cache's capacity.

        Args:
            length: Tokens of the sequence, past and new.
            capacity: Tokens that the cache holds; None = any number.

        Raises:
            SkvError: ``length`` exceeds one of the two.
        """
        context = self.config.context_length
        if length > context:
            raise SkvError(
                "total length",
                got=f"{length} tokens",
                expected=f"at most {context}, the model's context",
                fix="Make the prompt shorter.",
            )
        if capacity is not None and length > capacity:
            raise SkvError(
                "cache: total length",
                got=f"{length} tokens",
                expected=f"at most its capacity of {capacity}",
                fix="Allocate the cache for a larger max_length, or make the prompt shorter.",
            )

    @checked
    def room(self, cache: Cache) -> Int64:
        """Returns how many tokens each sequence of a cache can still take, ``[B]``."""
        return np.minimum(cache.max_length - cache.held, self.config.context_length - cache.lengths)

    def check_cache(self, cache: Cache) -> None:
        """Checks a cache.

        Raises:
            SkvError: It is not this session's.
        """
        if not isinstance(cache, Cache) or not cache.belongs_to(self.onnx):
            got = "that of another session" if isinstance(cache, Cache) else type(cache).__name__
            raise SkvError("cache", got=got, expected="one that this session's cache() made")

    def check_ids(self, ids: Int64, batch: int | None) -> None:
        """Checks tokens.

        Args:
            ids: ``[B, S]``, the tokens.
            batch: B; None = any number.

        Raises:
            SkvError: The shape is another one, or a token is outside the vocabulary.
        """
        arrays.check_ids(ids, batch, self.config.vocab_size)

    # The token loop.

    @checked
    def stream(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        cache: Cache | None = None,
        present: Sequence[Sequence[int]] | None = None,
        observe: Observer | None = None,
        keep_tokens: int | None = None,
        look_ahead: Drafter | None = None,
    ) -> Generator[Int64, None, None]:
        """Generates token by token.

        Args:
            input_ids: ``[B, S]``, the prompts.
            attention_mask: ``[B, S]``, 0 = padding, left or right.
            max_new_tokens: Tokens to generate at most. A sequence ends earlier with an end token, and where it holds
                the cache's max_length, which is the model's context at most.
            sampling: How a token is chosen; greedy if not given.
            cache: Holds what came before; a new one of the right size if not given. The last token that is yielded
                has not been appended to it.
            present: Tokens of each sequence that the penalty of repetition counts; those of ``input_ids`` if not given.
            observe: Called with the logits ``[B, vocab_size]`` of each step and the tokens ``[B]`` chosen from them.
            keep_tokens: Leave out all but so many tokens once the prompts have run; see ``compact``.
            look_ahead: Guesses what follows the prompt; these tokens' queries count too for what is kept.

        Yields:
            ``[B]``, the next token of each sequence; one that has ended gets the padding token.

        Raises:
            SkvError: See ``run``.
        """
        ids = arrays.integers("input_ids", input_ids)
        self.check_ids(ids, None if cache is None else cache.batch)
        new = np.ones(ids.shape, np.bool_) if attention_mask is None else arrays.mask("attention_mask", attention_mask)
        if max_new_tokens < 1:
            raise SkvError("max_new_tokens", got=max_new_tokens, expected="at least 1")
        if new.shape != ids.shape:
            raise SkvError("attention_mask: shape", got=list(new.shape), expected=list(ids.shape))
        with begun(
            self, ids, new, max_new_tokens=max_new_tokens, sampling=sampling, cache=cache, present=present,
            observe=observe, keep_tokens=keep_tokens, look_ahead=look_ahead,
        ) as run:  # fmt: skip
            logits, cache, active = run.logits, run.cache, np.ones(len(ids), np.bool_)
            for step in range(max_new_tokens):
                tokens = run.choose(logits, active)
                yield tokens
                active = active & ~np.isin(tokens, self.config.eos_token_id) & (self.room(cache) > 0)
                if not active.any() or step + 1 == max_new_tokens:
                    return
                # A finished sequence gets no more tokens: its column is padding.
                logits = self.run_columns(tokens[:, None], active[:, None], None, cache)[:, 0]

    @checked
    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 128, sampling: Sampling | None = None
    ) -> list[list[int]]:
        """Generates for a batch of prompts of any lengths.

        Args:
            prompts: Token ids of each prompt; at least one token each.
            max_new_tokens: Tokens to generate per prompt, at most.
            sampling: How a token is chosen; greedy if not given.

        Returns:
            The new token ids of each prompt, the end token included.

        Raises:
            SkvError: An empty prompt, or see ``run``.
        """
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise SkvError("prompts: an empty one", got=[len(p) for p in prompts], expected="at least one token each")
        ids, mask = arrays.padded(prompts, self.pad_token_id)
        steps = np.array(list(self.stream(ids, mask, max_new_tokens=max_new_tokens, sampling=sampling)))
        return [until_end(steps[:, row].tolist(), self.config.eos_token_id) for row in range(len(prompts))]

    @property
    def max_drafts(self) -> int:
        """Tokens that may follow the next one in a call, so that the logits of all are returned."""
        return self.config.context_length if self.config.all_logits else self.graph.num_logits - 1

    @property
    def pad_token_id(self) -> int:
        """The padding token: the model's own, else its first end token, else 0."""
        if self.config.pad_token_id is not None:
            return self.config.pad_token_id
        return self.config.eos_token_id[0] if self.config.eos_token_id else 0

    # Text.

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's ``tokenizer.json``, as tokenizers' Tokenizer; see ``load_tokenizer``."""
        return load_tokenizer(self.folder)

    @checked
    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Formats messages with the model's chat template, as transformers' ``apply_chat_template`` does.

        Args:
            messages: Each with ``role`` and, as a rule, ``content``.
            tools: JSON schemas of functions that the model may call.
            documents: With ``title`` and ``text``, for models that answer from documents.
            add_generation_prompt: End where the model's answer starts.
            variables: What else the template asks for, such as ``enable_thinking=False``.

        Returns:
            The prompt as text; its special tokens are in it, so that the tokenizer is to add none.

        Raises:
            SkvError: The folder has no chat template, the template refuses the messages (its own words are in the
                message), is faulty, or exceeds its limits.
        """
        return chat_prompt(
            self.folder,
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            variables=variables,
        )
