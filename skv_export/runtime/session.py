"""Runs an exported folder: the session, its calls, the token loop, and generation of text.

Needs numpy, onnxruntime and tokenizers; no torch.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import ArrayLike, NDArray

from skv_export.errors import SkvError
from skv_export.model_folder.names import (
    ATTENTION_MASK,
    CHAT_TEMPLATE_FILE,
    INPUT_IDS,
    LOGITS,
    MODEL_FILE,
    SKV_CONFIG_FILE,
    TENSORS,
    TOKEN_INPUTS,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    past_name,
)
from skv_export.model_folder.skv_config import ModelConfig, read_json
from skv_export.native.library import Library, library_path, load_library
from skv_export.runtime.cache import Cache
from skv_export.runtime.cuda_graph import DecodeGraph, uncaptured
from skv_export.runtime.providers import brief, check_kernels, load_error, open_session, ort_errors
from skv_export.runtime.sampling import Sampler, Sampling
from skv_export.spec.op import OP_NAME

__all__ = [
    "Cache", "Generation", "Library", "ModelConfig", "Sampling", "Session", "generate_text", "last_logits",
    "library_path", "load_library", "load_tokenizer",
]  # fmt: skip

Int64 = NDArray[np.int64]
Logits = NDArray[np.float32]


# The session.


class Session:
    """An exported folder, loaded into ONNX Runtime.

    Args:
        folder: What ``skv-export model`` wrote.
        execution_provider: ``cpu`` or ``cuda``; an error if it is not available, never a silent fallback.
        cuda_graph: On a GPU, capture decoding (one new token per sequence) as a CUDA graph per cache: one launch
            instead of hundreds a token.
        num_threads: Threads inside an op; 0 = ONNX Runtime's choice.
        spinning: Whether idle threads busy-wait for the next op; turn it off where torch's threads share the cores.
        model: The graph as bytes, in place of ``model.onnx``; its external data is the folder's (``verify`` uses it).
        config: The configuration that goes with ``model``.

    Attributes:
        folder: The folder.
        config: Its ``skv_config.json``.
        execution_provider: As asked for.
        cuda_graph: As asked for.
        library: The native library.
        onnx: onnxruntime's InferenceSession.

    Raises:
        SkvError: A file is missing or damaged, or the provider or its kernels are not available.
    """

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
    ) -> None:
        self.folder = Path(folder)
        self.config = config or ModelConfig.load(self.folder)
        self.execution_provider = execution_provider
        if cuda_graph and execution_provider != "cuda":
            raise SkvError("cuda_graph", got=f"execution_provider {execution_provider}", expected="cuda")
        self.cuda_graph = cuda_graph
        self._graphs: WeakKeyDictionary[Cache, DecodeGraph] = WeakKeyDictionary()
        self._graph_numbers = itertools.count(1)
        self.library = load_library()
        self.onnx = self._load(model, num_threads, spinning)
        self._check_graph()

    def _load(self, model: bytes | None, num_threads: int, spinning: bool) -> Any:
        import onnxruntime as ort

        path = self.folder / MODEL_FILE
        if model is None and not path.is_file():
            raise SkvError(f"{path}: no such file", fix="Export the model with `skv-export model`.")
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.folder))
        try:
            session = open_session(
                str(path) if model is None else model, options, self.execution_provider, self.library,
                op_type=OP_NAME, cuda_graph=self.cuda_graph,
            )  # fmt: skip
        except ort_errors() as error:
            raise load_error(path, error) from error
        check_kernels(self.config, self.execution_provider, self.library)
        return session

    def _check_graph(self) -> None:
        """The graph and skv_config.json must describe the same caches."""
        inputs = {x.name: x.shape for x in self.onnx.get_inputs()}
        for i, layer in enumerate(self.config.layers):
            for name, layout in zip(TENSORS, (layer.key, layer.value), strict=True):
                shape = inputs.pop(past_name(i, name), None)
                # A width may be open, for runtimes that allocate keys and values alike: then it has no number.
                width = layout.width if shape is None or not isinstance(shape[3], int) else shape[3]
                if shape is None or shape[1] != layer.num_key_value_heads or width != layout.width:
                    raise SkvError(
                        f"{self.folder}: {MODEL_FILE} and {SKV_CONFIG_FILE} do not belong together: layer {i}, {name}",
                        got=shape and shape[1:],
                        expected=[layer.num_key_value_heads, "rows", layout.width],
                        fix="Export the model again.",
                    )
        self._inputs = tuple(name for name in TOKEN_INPUTS if name in inputs)
        if set(inputs) - set(TOKEN_INPUTS) or not set(TOKEN_INPUTS[:2]) <= set(inputs):
            raise SkvError(
                f"{self.folder}: {MODEL_FILE}: inputs",
                got=sorted(inputs),
                expected=f"{', '.join(TOKEN_INPUTS)} and the caches",
                fix="Export the model again.",
            )

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
        if not 1 <= wanted <= self.config.context_length:
            raise SkvError(
                "max_length", got=wanted, expected=f"1 ... {self.config.context_length}, the model's context"
            )
        return Cache(self.onnx, self.config.layers, batch, wanted, self.execution_provider, self.library)

    def run(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None,
        position_ids: ArrayLike | None,
        cache: Cache,
    ) -> Logits:
        """Runs new tokens and appends them to the cache.

        Args:
            input_ids: ``[B, S]``, new tokens.
            attention_mask: ``[B, columns]``, 0 = padding, left or right; its last S columns are the new tokens', those
                before are the past's. None = the past as the cache holds it, and no padding among the new.
            position_ids: ``[B, S]``; None = as the mask says.
            cache: Of this session; holds B sequences.

        Returns:
            ``[B, 1, vocab_size]``, the logits of each sequence's last new token; ``[B, S, vocab_size]`` where the graph
            returns all. Rows of padding, or of a sequence without a new token, mean nothing.

        Raises:
            SkvError: The mask does not fit the cache, or the model's context or the cache's capacity would be passed
                (nothing is written); or ONNX Runtime fails (the cache is empty then).
        """
        ids = np.ascontiguousarray(input_ids, np.int64)
        new = self._new_tokens(ids, attention_mask, cache)
        lengths = cache.lengths + new.sum(axis=1)
        self.check_length(int(lengths.max()), cache.capacity)
        if position_ids is None:
            positions = np.where(new, cache.lengths[:, None] + new.cumsum(axis=1) - 1, 0)
        else:
            positions = np.broadcast_to(np.asarray(position_ids, np.int64), ids.shape)
        place = None
        if self.config.right_padded:
            self._check_last(new)
            place = np.argsort(~new, axis=1, kind="stable")
            ids, positions, new = (np.take_along_axis(x, place, axis=1) for x in (ids, positions, new))
        # The graph takes lengths from the mask's sums, so the shortest mask with these sums is equivalent.
        mask = self._mask(cache, new).astype(np.int64)
        logits = np.empty((*ids.shape, self.config.vocab_size), np.float32)
        if not self.config.all_logits:
            logits = logits[:, :1]
        logits = np.ascontiguousarray(logits)
        inputs = dict(zip(TOKEN_INPUTS, (ids, mask, positions), strict=True))
        self._run_bound(cache, {name: inputs[name] for name in self._inputs}, logits)
        cache.advance(lengths)
        if place is not None and self.config.all_logits and not np.array_equal(place, np.sort(place, axis=1)):
            logits = np.take_along_axis(logits, np.argsort(place, axis=1)[:, :, None], axis=1)
        return logits

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

    def _check_last(self, new: NDArray[np.bool_]) -> None:
        """A graph that returns the logits of its last column alone has none for a shorter sequence of the batch."""
        tokens = new.sum(axis=1)
        if not self.config.all_logits and ((tokens > 0) & (tokens < new.shape[1])).any():
            raise SkvError(
                f"{self.folder}: it returns the logits of the last column only, so its batches can't be padded",
                got=f"{tokens.tolist()} new tokens",
                expected="as many for each sequence",
                fix="Run the sequences one by one, or rewrite a model that returns all logits.",
            )

    def _new_tokens(self, ids: Int64, attention_mask: ArrayLike | None, cache: Cache) -> NDArray[np.bool_]:
        """Which of the new columns hold tokens, ``[B, S]``, after checking the mask against the cache."""
        if ids.ndim != 2 or ids.shape[0] != cache.batch or ids.shape[1] < 1:
            raise SkvError("input_ids: shape", got=list(ids.shape), expected=f"[{cache.batch}, at least 1]")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            outside = sorted({int(i) for i in ids.flat if not 0 <= i < self.config.vocab_size})
            raise SkvError("input_ids: no such token", got=outside[:4], expected=f"0 ... {self.config.vocab_size - 1}")
        if attention_mask is None:
            return np.ones(ids.shape, np.bool_)
        mask = np.asarray(attention_mask) != 0
        columns = ids.shape[1]
        if mask.ndim != 2 or mask.shape[0] != cache.batch or mask.shape[1] < columns:
            raise SkvError(
                "attention_mask: shape", got=list(mask.shape), expected=f"[{cache.batch}, past columns + {columns}]"
            )
        past = mask[:, :-columns].sum(axis=1)
        if not np.array_equal(past, cache.lengths):
            raise SkvError(
                "attention_mask: its columns before the new tokens do not count what the cache holds",
                got=past.tolist(),
                expected=cache.lengths.tolist(),
                fix="Pass the mask of all tokens so far, or none.",
            )
        return mask[:, -columns:]

    def _run_bound(self, cache: Cache, inputs: Mapping[str, NDArray[Any]], logits: Logits) -> None:
        import onnxruntime as ort

        if self.cuda_graph and inputs[INPUT_IDS].shape[1] == 1 and self._replay(cache, inputs, logits):
            return
        values = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x)) for name, x in inputs.items()}
        for name, value in values.items():
            cache.binding.bind_ortvalue_input(name, value)
        cache.binding.bind_ortvalue_output(LOGITS, ort.OrtValue.ortvalue_from_numpy(logits))
        try:
            self.onnx.run_with_iobinding(cache.binding, uncaptured() if self.cuda_graph else None)
        except ort_errors() as error:
            cache.reset()  # some layers may have appended already
            raise SkvError("ONNX Runtime: the call failed, and the cache has been emptied", got=brief(error)) from error

    def _replay(self, cache: Cache, inputs: Mapping[str, NDArray[Any]], logits: Logits) -> bool:
        """Runs a step of decoding as a graph; False where the mask has more columns than the graph's."""
        graph = self._graphs.get(cache)
        if graph is None:
            number = next(self._graph_numbers)
            graph = DecodeGraph(self.onnx, cache, self._inputs, self.config.vocab_size, number)
            self._graphs[cache] = graph
        if inputs[ATTENTION_MASK].shape[1] > graph.columns:
            return False
        try:
            logits[:] = graph.run(inputs)
        except ort_errors() as error:
            cache.reset()
            raise SkvError("ONNX Runtime: the call failed, and the cache has been emptied", got=brief(error)) from error
        return True

    # The token loop.

    def stream(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        cache: Cache | None = None,
    ) -> Iterator[Int64]:
        """Generates token by token.

        Args:
            input_ids: ``[B, S]``, the prompts.
            attention_mask: ``[B, S]``, 0 = padding, left or right.
            max_new_tokens: Tokens to generate at most. A sequence ends earlier with an end token, and where it holds
                the cache's max_length, which is the model's context at most.
            sampling: How a token is chosen; greedy if not given.
            cache: Holds what came before; a new one of the right size if not given. The last token that is yielded
                has not been appended to it.

        Yields:
            ``[B]``, the next token of each sequence; one that has ended gets the padding token.

        Raises:
            SkvError: See ``run``.
        """
        ids = np.asarray(input_ids, np.int64)
        new = np.ones(ids.shape, np.bool_) if attention_mask is None else np.asarray(attention_mask) != 0
        if cache is None:
            self.check_length(int(new.sum(axis=1).max(initial=0)))
            cache = self.cache(len(ids), min(ids.shape[1] + max_new_tokens, self.config.context_length))
        choose = Sampler(sampling or Sampling())
        logits = last_logits(self.run(ids, self._mask(cache, new), None, cache), new)
        active = np.ones(len(ids), np.bool_)
        for step in range(max_new_tokens):
            tokens = np.where(active, choose(logits), self.pad_token_id)
            yield tokens
            active = active & ~np.isin(tokens, self.config.eos_token_id) & (cache.lengths < cache.max_length)
            if not active.any() or step + 1 == max_new_tokens:
                return
            # A finished sequence gets no more tokens: its column is padding.
            logits = self.run(tokens[:, None], self._mask(cache, active[:, None]), None, cache)[:, 0]

    @staticmethod
    def _mask(cache: Cache, new: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """A mask of what the cache holds, then the new columns."""
        past = np.arange(cache.lengths.max())[None, :] < cache.lengths[:, None]
        return np.concatenate([past, new], axis=1)

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
        width = max(map(len, prompts))
        ids = np.full((len(prompts), width), self.pad_token_id, np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
        steps = np.array(list(self.stream(ids, mask, max_new_tokens=max_new_tokens, sampling=sampling)))
        return [_until(steps[:, row].tolist(), self.config.eos_token_id) for row in range(len(prompts))]

    @property
    def pad_token_id(self) -> int:
        """What stands in the columns of padding: the model's token for it, else its first end token, else 0."""
        if self.config.pad_token_id is not None:
            return self.config.pad_token_id
        return self.config.eos_token_id[0] if self.config.eos_token_id else 0

    # Text.

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's ``tokenizer.json``, as tokenizers' Tokenizer; see ``load_tokenizer``."""
        return load_tokenizer(self.folder)

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Formats messages with the model's chat template.

        Args:
            messages: Each with ``role`` and ``content``.

        Returns:
            The prompt as text, up to where the model's answer starts.

        Raises:
            SkvError: The folder has no chat template.
        """
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        config = read_json(self.folder / TOKENIZER_CONFIG_FILE, fix="Export with the checkpoint's tokenizer.")
        file = self.folder / CHAT_TEMPLATE_FILE
        template = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
        if not isinstance(template, str):
            raise SkvError(f"{self.folder}: no chat template", fix="Leave --chat out.")
        special = {name: config.get(name) or "" for name in ("bos_token", "eos_token")}
        special = {name: x["content"] if isinstance(x, dict) else x for name, x in special.items()}
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **special)


def load_tokenizer(folder: Path | str) -> Any:
    """Reads the ``tokenizer.json`` of an exported folder into tokenizers' Tokenizer.

    Raises:
        SkvError: There is none.
    """
    from tokenizers import Tokenizer

    path = Path(folder) / TOKENIZER_FILE
    if not path.is_file():
        raise SkvError(f"{path}: no such file", fix="Pass token ids, or export with the checkpoint's tokenizer.")
    return Tokenizer.from_file(str(path))


def last_logits(logits: Logits, new: NDArray[np.bool_]) -> Logits:
    """The logits of each sequence's last new token, ``[B, vocab_size]``.

    Args:
        logits: What ``Session.run`` returned: of the last token alone, or of all columns.
        new: ``[B, S]``, which columns hold tokens.
    """
    if logits.shape[1] == 1:
        return logits[:, 0]
    ends = np.where(new, np.arange(new.shape[1]), -1).max(axis=1)
    return logits[np.arange(len(logits)), ends]


# One call from prompt to text.


@dataclass
class Generation:
    """What ``generate_text`` did.

    Attributes:
        text: What was generated.
        prompt_tokens: Tokens of the prompt.
        tokens: Generated token ids.
        prefill_seconds: Until the first token.
        decode_seconds: From the first token to the last.
        cache_bytes: Bytes of the cache.
        stop_reason: ``eos`` (an end token), ``max_new_tokens``, or ``context`` (the model's context is full).
    """

    text: str = ""
    prompt_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    cache_bytes: int = 0
    stop_reason: str = ""

    def summary(self) -> str:
        """One line of figures."""
        steps = len(self.tokens) - 1
        speed = f", {steps / self.decode_seconds:.1f} tokens/s" if steps > 0 and self.decode_seconds > 0 else ""
        return (
            f"{self.prompt_tokens} prompt tokens in {self.prefill_seconds:.2f} s; {len(self.tokens)} new{speed}; "
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

    Raises:
        SkvError: See ``Session``; or the prompt has no token.
    """
    from tokenizers.decoders import DecodeStream

    session = Session(folder, execution_provider=execution_provider, cuda_graph=cuda_graph)
    text = session.chat_prompt([{"role": "user", "content": prompt}]) if chat else prompt
    ids = session.tokenizer.encode(text, add_special_tokens=not chat).ids
    if not ids:
        raise SkvError("prompt: no tokens", got=repr(prompt), expected="some text")
    session.check_length(len(ids))
    cache = session.cache(1, min(len(ids) + max_new_tokens, session.config.context_length))
    result = Generation(prompt_tokens=len(ids), cache_bytes=cache.nbytes)
    decoder = DecodeStream(skip_special_tokens=True)
    sampling = Sampling(temperature, top_k, top_p, seed)
    start = now = time.perf_counter()
    for (token,) in session.stream([ids], max_new_tokens=max_new_tokens, sampling=sampling, cache=cache):
        now = time.perf_counter()
        result.prefill_seconds = result.prefill_seconds or now - start
        result.tokens.append(int(token))
        piece = decoder.step(session.tokenizer, int(token))
        if piece:
            result.text += piece
            if on_text is not None:
                on_text(piece)
    result.decode_seconds = now - start - result.prefill_seconds
    if result.tokens and result.tokens[-1] in session.config.eos_token_id:
        result.stop_reason = "eos"
    else:
        result.stop_reason = "max_new_tokens" if len(result.tokens) == max_new_tokens else "context"
    return result


def _until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens up to the first end token, included."""
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: stop + 1]
