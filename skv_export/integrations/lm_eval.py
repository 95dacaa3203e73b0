"""The model `skv` of lm-eval: scores an exported folder decode style.

lm-eval (up to 0.4.13) has no plugin mechanism, so this module wraps its command line: ``skv-lm-eval --model skv
--model_args pretrained=FOLDER --tasks ...`` runs ``lm_eval`` with this model registered.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from skv_export.checkpoints.checkpoint import Source
from skv_export.checkpoints.pretrained import load_tokenizer
from skv_export.errors import SkvError, missing_module
from skv_export.model_folder import hub
from skv_export.runtime.sampling import Sampling
from skv_export.runtime.session import Session
from skv_export.verification import graph_variants
from skv_export.verification.quality_level import flush_edges

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as missing:
    raise missing_module(missing.name or "lm_eval", "skv-lm-eval") from missing

Score = tuple[float, bool]
"""Log-probability of a continuation, and whether greedy decoding would give it."""
_STEPS_BEHIND = 8
"""Tokens beyond a stop sequence's length in which it is looked for: one may hold no visible character."""


@register_model("skv")
class SkvLM(TemplateLM):  # type: ignore[misc]  # lm-eval is untyped
    """An exported folder behind lm-eval's interface.

    Args:
        pretrained: A folder that ``skv-export model`` wrote, or a hub id.
        revision: Branch, tag or commit of a hub id.
        execution_provider: ``cpu`` or ``cuda``.
        max_length: Most tokens of one sequence; the model's context length if not given.
        max_gen_toks: Tokens to generate where a task does not say.
        decode_style: Score every token against the cache that decoding token by token would have left. Without it,
            each text is one call: its tokens attend to each other exactly, and the quantized cache is never read.
        add_bos_token: Whether texts start with the tokenizer's special tokens; as it does by itself if not given.
        batch_size: Texts scored at once.
        max_batch_size: Ignored: the batch does not grow by itself.
        device: Ignored, as lm-eval sets it to ``cuda:0`` by itself: see ``execution_provider``.

    Raises:
        SkvError: See ``Session``.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: str,
        *,
        revision: str | None = None,
        execution_provider: str = "cpu",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        decode_style: bool = True,
        add_bos_token: bool | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        self.folder = hub.fetch(pretrained, revision=revision)
        self._provider = execution_provider
        self.scorer = graph_variants.all_logits(self.folder, execution_provider=self._provider)
        context = self.scorer.config.context_length
        self.max_length = context if max_length is None else int(max_length)
        if not 1 <= self.max_length <= context:
            raise SkvError("max_length", got=max_length, expected=f"1 ... {context}, the model's context")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise SkvError("batch_size", got=batch_size, expected="a number")
        self.batch_size = int(batch_size)
        self.max_gen_toks, self.decode_style, self.add_bos_token = int(max_gen_toks), decode_style, add_bos_token
        self.tokenizer = load_tokenizer(Source("safetensors", self.folder))

    @cached_property
    def generator(self) -> Session:
        """The session for generation; created on first use, because most tasks only score."""
        return Session(self.folder, execution_provider=self._provider)

    # Tokens and templates.

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        ends = self.scorer.config.eos_token_id
        return ends[0] if ends else self.scorer.pad_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        begin = self.scorer.config.bos_token_id
        return self.eot_token_id if begin is None else begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Returns a text's tokens; a text that starts with the first token already gets no second one."""
        add = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(self.tok_decode([self.prefix_token_id], False)):
            add = False
        ids: list[int] = self.tokenizer.encode(string, **({} if add is None else {"add_special_tokens": add}))
        return ids

    def tok_decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        """Returns the tokens' text."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's key in lm-eval's cache of requests."""
        return str(self.folder).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns messages in the model's chat template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    # Scoring.

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[Score]:
        scores: dict[int, Score] = {}
        # The longest first: texts of a batch have like lengths, and what does not fit shows at once.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        with tqdm(total=len(requests), desc="skv: scoring", disable=disable_tqdm) as bar:
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                texts = [self._cut(*requests[i][1:]) for i in chosen]
                for i, score in zip(chosen, self._score(texts), strict=True):
                    scores[i] = score
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
                bar.update(len(chosen))
        return [scores[i] for i in range(len(requests))]

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], int]:
        """A text's tokens, its last ``max_length + 1``, and how many of them are scored."""
        if len(continuation) > self.max_length:
            raise SkvError(
                "lm-eval: a continuation is longer than max_length", got=len(continuation), expected=self.max_length
            )
        return (context + continuation)[-(self.max_length + 1) :], len(continuation)

    def _score(self, texts: list[tuple[list[int], int]]) -> list[Score]:
        """Scores the last tokens of each text; the batch is padded on the right."""
        lengths = np.array([len(tokens) - 1 for tokens, _ in texts])  # the last one is only predicted
        width = int(lengths.max())
        ids = np.full((len(texts), width), self.scorer.pad_token_id, np.int64)
        for row, (tokens, _) in enumerate(texts):
            ids[row, : lengths[row]] = tokens[:-1]
        total, greedy = np.zeros(len(texts)), np.ones(len(texts), np.bool_)
        for start, end, logits in self._calls(ids, lengths):
            for row, (tokens, scored) in enumerate(texts):
                places = range(max(start, lengths[row] - scored), min(end, lengths[row]))
                if not places:
                    continue
                targets = np.array(tokens[places.start + 1 : places.stop + 1])
                rows = logits[row, places.start - start : places.stop - start].astype(np.float64)
                greedy[row] &= bool((rows.argmax(-1) == targets).all())
                rows -= rows.max(-1, keepdims=True)
                chosen = rows[np.arange(len(targets)), targets]
                total[row] += float((chosen - np.log(np.exp(rows).sum(-1))).sum())
        return [(float(score), bool(same)) for score, same in zip(total, greedy, strict=True)]

    def _calls(
        self, ids: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """Runs a padded batch call by call; yields each call's columns and logits ``[B, columns, vocab]``."""
        width = ids.shape[1]
        edges = flush_edges(self.scorer.config.layers[0].key, width) if self.decode_style else [width]
        cache = self.scorer.cache(len(ids), width)
        mask = np.arange(width) < lengths[:, None]
        for start, end in zip([0, *edges], edges, strict=False):
            yield start, end, self.scorer.run(ids[:, start:end], mask[:, :end], None, cache)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Scores whole texts, window by window; each token once."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for i, (text,) in enumerate(request.args for request in requests):
            tokens = self.tok_encode(text, add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (score, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[i] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # Generation.

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues texts, one by one, up to a stop sequence."""
        texts = []
        for request in tqdm(requests, desc="skv: generating", disable=disable_tqdm):
            context, given = request.args
            options: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
            texts.append(self._generate(context, **options))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _generate(
        self,
        context: str,
        *,
        until: list[str],
        max_gen_toks: int,
        do_sample: bool = False,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        **others: Any,
    ) -> str:
        if others:
            raise SkvError("lm-eval: generation options", got=sorted(others), expected="temperature, top_k, top_p")
        room = self.max_length - max_gen_toks
        if room < 1:
            raise SkvError("lm-eval: max_gen_toks", got=max_gen_toks, expected=f"less than {self.max_length}")
        prompt = self.tok_encode(context)[-room:]
        sampling = Sampling(temperature if do_sample else 0.0, top_k, top_p)
        stops = [stop for stop in until if stop]
        recent = max(map(len, stops), default=0) + _STEPS_BEHIND
        tokens: list[int] = []
        for (token,) in self.generator.stream([prompt], max_new_tokens=max_gen_toks, sampling=sampling):
            if int(token) in self.generator.config.eos_token_id:
                break
            tokens.append(int(token))
            # Special tokens count here: some tasks stop at one.
            if any(stop in self.tok_decode(tokens[-recent:], skip_special_tokens=False) for stop in stops):
                break
        text = self.tok_decode(tokens)
        return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def main() -> None:
    """Runs lm-eval's command line."""
    cli_evaluate()


if __name__ == "__main__":
    main()
