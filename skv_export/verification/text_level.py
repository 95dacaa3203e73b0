"""The text level of verify: the untouched model as a user calls it against the export as a user calls it, text to text.

The other levels feed both sides the same tokens and positions, so what both get wrong alike does not show. Here each
side has a loader, a tokenizer, positions and an end of its own: transformers' Auto classes with ``generate`` on the
checkpoint, ``SkvForCausalLM.generate`` and ``Session.generate`` on the folder; greedy, prompt by prompt and as a padded
batch. The export's cache rounds nothing here (``graph_variants.unquantized``), so the tokens must be equal; they may
part where the reference's two best tokens are closer together than the tolerance, and are not compared after that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from skv_export.checkpoints.checkpoint import Source
from skv_export.checkpoints.pretrained import input_device, load_tokenizer
from skv_export.errors import SkvError
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.runtime.session import Session
from skv_export.verification import graph_variants
from skv_export.verification.graph_level import Tolerance

PROMPT_WORDS = (7, 24, 90)
"""Words of each prompt; the shorter ones are padded in the batch."""
NEW_TOKENS = 16
SAMPLE = "The capital of France is Paris.\n  def f(x):\n\treturn x + 1  # naïve café, 東京, 🙂 12345\n"
"""A text beside the prompts that the tokenizers must agree on."""


@dataclass(frozen=True)
class TextResult:
    """What the text level found.

    Attributes:
        prompts: Prompts that were continued, each alone and in a batch.
        tokens: Tokens of the export that were compared with the reference's.
        near_ties: Continuations that part where the reference's best tokens are closer than the tolerance.
        failures: What differs, a sentence each.
    """

    prompts: int
    tokens: int
    near_ties: int
    failures: tuple[str, ...]

    def rows(self) -> list[str]:
        """The report's lines."""
        found = "tokens equal" if not self.failures else f"{len(self.failures)} differences"
        parted = f"; {self.near_ties} part at a near-tie, the rest is not compared" if self.near_ties else ""
        return [
            f"{self.prompts} prompts, alone and as a padded batch, against the model as transformers runs it",
            f"{self.tokens} tokens compared: {found}{parted}",
        ]


@dataclass(frozen=True)
class Continuation:
    """What the untouched model makes of one prompt.

    Attributes:
        prompt: Tokens of the prompt, without padding.
        tokens: New tokens, the end token included.
        lead: By how much the best token's score exceeds every token's, ``[new tokens, vocabulary]``.
        text: The new tokens' text.
    """

    prompt: list[int]
    tokens: list[int]
    lead: Tensor
    text: str


def check(
    model: PreTrainedModel,
    tokenizer: Any,
    folder: Path,
    text: str,
    *,
    execution_provider: str = "cpu",
    tolerance: float | None = None,
) -> TextResult:
    """Compares continuations of prompts that are cut out of a text.

    Args:
        model: The untouched model (``pretrained.load_untouched``), its weights as they were exported.
        tokenizer: The checkpoint's.
        folder: The export.
        text: Where prompts are taken from.
        execution_provider: Of the exported graph.
        tolerance: Of a logit; ``Tolerance.of`` the export's number format if not given.

    Raises:
        SkvError: The text is too short, or the context has no room for a prompt.
    """
    config = ModelConfig.load(folder)
    prompts = _prompts(text, tokenizer, config.context_length)
    session = graph_variants.unquantized(folder, execution_provider=execution_provider)
    findings = _Findings(2 * (Tolerance.of(config.dtype).exact if tolerance is None else tolerance))
    _pad_left(tokenizer)
    runs = [[prompt] for prompt in prompts]
    # Where RoPE depends on the length, transformers takes the longest sequence's for the whole batch.
    if len(prompts) > 1 and not (config.rope_switch or config.dynamic_rope):
        runs.append(prompts)
    expected = [continue_texts(model, tokenizer, run) for run in runs]
    if (folder / "config.json").is_file():  # else the folder is a rewritten graph's, for other runtimes
        exported = load_tokenizer(Source("safetensors", folder))
        _pad_left(exported)
        findings.tokenizers("AutoTokenizer", tokenizer, [*prompts, SAMPLE], lambda t: list(exported(t).input_ids))
        skv = _skv_model(session)
        for run, reference in zip(runs, expected, strict=True):
            got = continue_texts(skv, exported, run)
            findings.compare("SkvForCausalLM.generate", run, reference, [(c.tokens, c.text) for c in got])
    raw = session.tokenizer
    findings.tokenizers("Session.tokenizer", tokenizer, [*prompts, SAMPLE], lambda t: list(raw.encode(t).ids))
    if plain := _plain(model.generation_config):
        expected = [continue_texts(model, tokenizer, run, **plain) for run in runs]
    for run, reference in zip(runs, expected, strict=True):
        new = session.generate([raw.encode(prompt).ids for prompt in run], max_new_tokens=NEW_TOKENS)
        findings.compare("Session.generate", run, reference, [(ids, raw.decode(ids)) for ids in new])
    return TextResult(len(prompts), findings.tokens, findings.near_ties, tuple(findings.failures))


def _prompts(text: str, tokenizer: Any, context_length: int) -> list[str]:
    """Cuts prompts of ``PROMPT_WORDS`` words out of a text, one after the other, as far as the context has room."""
    words = text.split()
    prompts, start = [], 0
    for count in PROMPT_WORDS:
        prompt = " ".join(words[start : start + count])
        start += count
        if prompt and len(tokenizer(prompt).input_ids) + NEW_TOKENS <= context_length:
            prompts.append(prompt)
    if not prompts:
        raise SkvError("text level: no prompt fits", got=f"a context of {context_length} tokens, {len(words)} words")
    return prompts


def _pad_left(tokenizer: Any) -> None:
    """What users set before they generate in batches."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)


def _skv_model(session: Session) -> Any:
    import skv_export  # the package's public name: the class stands in a package above this one

    return skv_export.SkvForCausalLM.from_session(session)


def _plain(given: GenerationConfig | None) -> dict[str, Any]:
    """What makes ``generate`` pick the best token whatever the checkpoint's defaults: Session has no penalties."""
    penalties = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": None, "min_length": 0}
    return {name: value for name, value in penalties.items() if getattr(given, name, None) not in (None, value)}


@torch.no_grad()
def continue_texts(model: Any, tokenizer: Any, prompts: Sequence[str], **options: Any) -> list[Continuation]:
    """Continues prompts as a user of transformers does: ``generate`` with its defaults, but greedy."""
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=len(prompts) > 1)
    device = input_device(model) if isinstance(model, PreTrainedModel) else model.device
    inputs = {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}
    made = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    width = inputs["input_ids"].shape[1]
    scores = torch.stack(made.scores, 1).float().cpu()
    lead = scores.amax(-1, keepdim=True) - scores
    ends = _ends(model.generation_config)
    found = []
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        new = made.sequences[row, width:].tolist()
        stop = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
        prompt = ids[mask.bool()].tolist()
        text = tokenizer.decode(new[:stop], skip_special_tokens=True)
        found.append(Continuation(prompt, new[:stop], lead[row], text))
    return found


def _ends(config: GenerationConfig) -> set[int]:
    given = config.eos_token_id
    return set(given if isinstance(given, list | tuple) else () if given is None else [given])


@dataclass
class _Findings:
    """The comparison so far; ``margin`` is the lead of a token below which runtimes may choose another."""

    margin: float
    tokens: int = 0
    near_ties: int = 0
    failures: list[str] = field(default_factory=list)

    def tokenizers(self, name: str, reference: Any, texts: Sequence[str], encode: Any) -> None:
        """Notes the first text that the export's tokenizer reads otherwise."""
        for text in texts:
            expected, got = list(reference(text).input_ids), encode(text)
            if got != expected:
                self.failures.append(
                    f"text, {name}: {_short(text)} becomes {len(got)} tokens {_ids(got)}, with the checkpoint's "
                    f"tokenizer {len(expected)}: {_ids(expected)}"
                )
                return

    def compare(
        self, name: str, prompts: Sequence[str], expected: Sequence[Continuation], got: Sequence[tuple[list[int], str]]
    ) -> None:
        """Notes continuations that differ, unless they part at a near-tie."""
        where = "alone" if len(prompts) == 1 else f"in a padded batch of {len(prompts)}"
        for prompt, reference, (tokens, text) in zip(prompts, expected, got, strict=True):
            same = next((i for i, (a, b) in enumerate(zip(reference.tokens, tokens)) if a != b), None)  # noqa: B905
            if same is None and len(reference.tokens) == len(tokens):
                self.tokens += len(tokens)
                if text != reference.text:
                    self.failures.append(
                        f"text, {name}: the same tokens become {_short(text)}, not {_short(reference.text)}"
                    )
                continue
            at = min(len(reference.tokens), len(tokens)) if same is None else same
            self.tokens += at
            lead = float(reference.lead[at, tokens[at]]) if same is not None else float("inf")
            if lead < self.margin:
                self.near_ties += 1
                continue
            self.failures.append(
                f"text, {name}: {_short(prompt)} {where} becomes {_short(text)} {_ids(tokens)}, the checkpoint's model "
                f"makes it {_short(reference.text)} {_ids(reference.tokens)}; they part at token {at}"
                + (f", where the reference's lead is {lead:.2g}" if same is not None else "")
            )


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _ids(tokens: Sequence[int]) -> str:
    return f"[{', '.join(map(str, tokens[:12]))}{', ...' if len(tokens) > 12 else ''}]"
