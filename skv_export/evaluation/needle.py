"""Needle retrieval: numbers are hidden at chosen depths of a long text, and the model is asked for them.

Decode style like all of `skv-export quality`: the text, the question and the answer each see the cache that a decoder
would have. The answer counts as found if the most likely token is the right one at each of its positions, that is, if
greedy decoding would produce it; so no decoding loop is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from skv_export.errors import SkvError
from skv_export.evaluation import metrics
from skv_export.evaluation.candidates import Candidate, Simulated
from skv_export.evaluation.decode_simulation import Simulation
from skv_export.evaluation.text import token_ids

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where the needle stands: shares of the text before it."""
TRIALS = 3
"""Needles per length and depth."""
NEEDLE = "\n\nThe secret number of the city of {city} is {number}. Remember it.\n\n"
QUESTION = (
    "\n\nQuestion: What is the secret number of the city of {city}?\nAnswer: The secret number of the city of {city} is"
)
CITIES = ("Lisbon", "Oslo", "Kyoto", "Lima", "Cairo", "Quebec", "Vienna", "Dakar")


@dataclass(frozen=True)
class NeedleRow:
    """One candidate at one length.

    Attributes:
        name: The candidate's; ``full precision`` for the unquantized model.
        length: Tokens before the answer.
        found: Share of needles found, by depth (``DEPTHS``).
        nll: Mean negative log-probability of the answer's tokens, in nats: moves before retrieval fails.
        trials: Needles per depth.
    """

    name: str
    length: int
    found: list[float]
    nll: float
    trials: int


@dataclass(frozen=True)
class NeedleResult:
    """All lengths and candidates."""

    rows: list[NeedleRow]

    def table(self) -> str:
        """A line per length and candidate."""
        width = max([13, *(len(row.name) for row in self.rows)])
        depths = "  ".join(f"{depth:>5.0%}" for depth in DEPTHS)
        trials = self.rows[0].trials
        lines = [
            f"Needles found, by depth in the text ({trials} per depth)",
            f"  tokens  {'configuration':{width}}  {depths}  nats per answer token",
        ]
        lines += [
            f"  {r.length:6}  {r.name:{width}}  {'  '.join(f'{x:>5.0%}' for x in r.found)}  {r.nll:.4f}"
            for r in self.rows
        ]
        return "\n".join(lines)


def parse_lengths(text: str) -> list[int]:
    """Reads ``--needle-lengths``.

    Raises:
        SkvError: Not numbers separated by commas, or too small.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() and int(part) >= 128 for part in parts):
        raise SkvError("--needle-lengths", got=text, expected="numbers of at least 128, separated by commas")
    return [int(part) for part in parts]


@torch.no_grad()
def run(
    loaded: tuple[PreTrainedModel, Any],
    candidates: Sequence[Candidate],
    text: str,
    *,
    lengths: Sequence[int],
    trials: int = TRIALS,
) -> NeedleResult:
    """Hides needles in a text and asks for them.

    Args:
        loaded: Model and tokenizer, from ``comparison.load``.
        candidates: What to measure beside full precision.
        text: The haystack; repeated if it is shorter than a length.
        lengths: Tokens of the whole prompt.
        trials: Needles per length and depth; their numbers and cities are the same for everybody.
    """
    model, tokenizer = loaded
    full = Simulated("full precision", "", "", Simulation.full_precision())
    everybody: list[Candidate] = [full, *candidates]
    for candidate in everybody:
        candidate.prepare(tokenizer)
    rows: list[NeedleRow] = []
    for length in lengths:
        prompts = [[make_prompt(tokenizer, text, length, depth, trial) for trial in range(trials)] for depth in DEPTHS]
        rows += [_row(c, model, length, prompts) for c in everybody]
    return NeedleResult(rows)


def make_prompt(tokenizer: Any, text: str, length: int, depth: float, trial: int) -> tuple[torch.Tensor, int]:
    """Returns the tokens of text, needle, question and answer, and how many of them are the answer."""
    rng = np.random.default_rng([length, round(100 * depth), trial])
    city, number = CITIES[rng.integers(len(CITIES))], str(rng.integers(10000, 100000))
    start = token_ids(tokenizer, "", add_special_tokens=True)

    def tokens(part: str) -> list[int]:
        return token_ids(tokenizer, part, add_special_tokens=False)

    needle, question = tokens(NEEDLE.format(city=city, number=number)), tokens(QUESTION.format(city=city))
    answer = tokens(" " + number)
    room = length - len(start) - len(needle) - len(question)
    if room < 0:
        raise SkvError("needle", got=f"{length} tokens", expected=f"at least {length - room}")
    hay = tokens(text)
    hay = (hay * (room // len(hay) + 1))[trial * 997 % max(1, len(hay) - room) :][:room]
    at = int(depth * room)
    return torch.tensor([*start, *hay[:at], *needle, *hay[at:], *question, *answer]), len(answer)


_Prompt = tuple[torch.Tensor, int]


def _row(candidate: Candidate, model: PreTrainedModel, length: int, prompts: list[list[_Prompt]]) -> NeedleRow:
    found, nll = [], []
    for of_depth in prompts:
        hits = []
        for ids, count in of_depth:
            rows = candidate.logits(model, ids, len(ids) - count)[-count - 1 : -1].log_softmax(-1)
            answer = ids[-count:].to(rows.device)
            hits.append(bool((rows.argmax(-1) == answer).all()))
            nll.append(metrics.nll(rows, answer).mean().item())
        found.append(float(np.mean(hits)))
    return NeedleRow(candidate.name, length, found, float(np.mean(nll)), len(prompts[0]))
