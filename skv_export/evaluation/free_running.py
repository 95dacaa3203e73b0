"""Free running: when greedy texts with a quantized cache leave the exact ones, and answers to small closed tasks.

Perplexity is measured on given text, which hides drift. Greedy decoding with a candidate's cache writes the exact
model's text up to the first token where, given the exact text so far, its most likely token is another: so one pass
over a prompt and its exact continuation tells when they part, and no decoding loop is needed. In the same way an answer
is right where the most likely token is the right one at each of its positions.

Decode style like all of `skv-export quality`: prompt tokens too see the cache that a decoder would have, which costs
more than a prompt in one call does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from skv_export.checkpoints.pretrained import input_device, own_attention
from skv_export.evaluation.candidates import Candidate, Simulated
from skv_export.evaluation.decode_simulation import Simulation
from skv_export.evaluation.text import cut_windows, token_ids

PROMPT_TOKENS, NEW_TOKENS = 384, 128
"""Of a text to be continued: enough that its greater part stands in tiles; and of its continuation."""
FILLER_TOKENS = 256
"""Of prose between what a task says and what it asks."""
_CITIES = ("Lisbon", "Oslo", "Kyoto", "Lima", "Cairo", "Quebec", "Vienna", "Dakar", "Perth", "Riga", "Quito", "Turin")
_WORDS = (
    "river",
    "stone",
    "lamp",
    "orange",
    "winter",
    "paper",
    "silver",
    "garden",
    "window",
    "music",
    "bread",
    "cloud",
)

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done and steps in all."""


@dataclass(frozen=True)
class Task:
    """A question with one right answer.

    Attributes:
        given: What stands before the filler.
        asked: What stands after it, up to the answer.
        answer: As the model has to write it, the blank before it included.
    """

    given: str
    asked: str
    answer: str


def arithmetic(rng: np.random.Generator) -> Task:
    """A sum of two-digit numbers, after twenty examples."""
    pairs = rng.integers(10, 100, (21, 2)).tolist()
    lines = [f"{a} + {b} = {a + b}" for a, b in pairs]
    a, b = pairs[-1]
    return Task("", "\n".join(lines[:-1]) + f"\n{a} + {b} =", f" {a + b}")


def copying(rng: np.random.Generator) -> Task:
    """Six words that are to be repeated after the filler."""
    words = " ".join(rng.choice(_WORDS, 6, replace=False))
    return Task(f"The password is: {words}.\n\n", "\n\nI repeat: the password is:", f" {words}")


def retrieval(rng: np.random.Generator) -> Task:
    """One of twelve numbers, each of a city."""
    codes = dict(zip(rng.permutation(_CITIES), rng.integers(1000, 10000, len(_CITIES)), strict=True))
    city = str(rng.choice(_CITIES))
    facts = " ".join(f"The code of {name} is {code}." for name, code in codes.items())
    asked = f"\n\nQuestion: What is the code of {city}?\nAnswer: The code of {city} is"
    return Task(facts + "\n\n", asked, f" {codes[city]}")


def recall(rng: np.random.Generator) -> Task:
    """A number of twelve digits."""
    number = "".join(map(str, rng.integers(0, 10, 12)))
    return Task(f"The number to remember is {number}.\n\n", "\n\nThe number to remember is", f" {number}")


TASKS: dict[str, Callable[[np.random.Generator], Task]] = {
    "arithmetic": arithmetic,
    "copying": copying,
    "retrieval": retrieval,
    "recall": recall,
}


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Returns the 95% score interval of a share (Wilson, JASA 22, 1927); meaningful for few trials, and at 0 and 1."""
    z = 1.959963984540054
    share, spread = successes / trials, z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / trials / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class FreeRow:
    """One candidate.

    Attributes:
        name: The candidate's; ``full precision`` for the unquantized model.
        parted: Tokens of each continuation before it left the exact one; ``NEW_TOKENS`` = it never did.
        right: Answers that were right, by task.
        trials: Questions per task.
    """

    name: str
    parted: list[int]
    right: dict[str, int]
    trials: int

    @property
    def whole(self) -> int:
        """Continuations that never left the exact one."""
        return sum(count == NEW_TOKENS for count in self.parted)


@dataclass(frozen=True)
class FreeResult:
    """All candidates, full precision first."""

    rows: list[FreeRow]

    def table(self) -> str:
        """A line per candidate, shares with their 95% intervals."""
        width = max([13, *(len(row.name) for row in self.rows)])
        first = self.rows[0]
        lines = [
            f"Greedy continuations of {NEW_TOKENS} tokens: when {len(first.parted)} of them leave the exact model's; "
            f"and {first.trials} questions per task, shares right (95% intervals)",
            f"  {'configuration':{width}}  median  whole{' ' * 11}" + "".join(f"  {task:16}" for task in TASKS),
        ]
        for row in self.rows:
            shares = [_share(row.whole, len(row.parted)), *(_share(row.right[task], row.trials) for task in TASKS)]
            cells = "  ".join(f"{share:16}" for share in shares).rstrip()
            lines.append(f"  {row.name:{width}}  {np.median(row.parted):6.0f}  {cells}")
        return "\n".join(lines)


def _share(successes: int, trials: int) -> str:
    low, high = wilson(successes, trials)
    return f"{successes / trials:.0%} ({low:.0%}-{high:.0%})"


@torch.no_grad()
def run(
    loaded: tuple[PreTrainedModel, Any],
    candidates: Sequence[Candidate],
    text: str,
    count: int,
    progress: Progress | None = None,
) -> FreeResult:
    """Continues prompts and asks questions.

    Args:
        loaded: Model and tokenizer, from ``comparison.load``.
        candidates: What to measure beside full precision.
        text: Prompts are windows of it, and so is the filler of tasks.
        count: Prompts, fewer if the text has no more; and questions per task.
        progress: Called after each candidate, and each exact continuation.

    Raises:
        SkvError: The text does not fill one prompt.
    """
    model, tokenizer = loaded
    tick = progress or (lambda *_: None)
    windows = torch.from_numpy(cut_windows(tokenizer, text, count, PROMPT_TOKENS))
    whole = []
    for i, prompt in enumerate(windows):
        whole.append(continued(model, prompt, NEW_TOKENS))
        tick("exact continuations", i + 1, len(windows))
    questions = {task: [make_question(tokenizer, text, task, seed) for seed in range(count)] for task in TASKS}
    full = Simulated("full precision", "", "", Simulation.full_precision())
    rows = []
    for i, candidate in enumerate([full, *candidates]):
        candidate.prepare(tokenizer)
        parted = [parting(candidate, model, ids, PROMPT_TOKENS) for ids in whole]
        right = {
            task: sum(parting(candidate, model, ids, start) == len(ids) - start for ids, start in asked)
            for task, asked in questions.items()
        }
        rows.append(FreeRow(candidate.name, parted, right, count))
        tick("running free", i + 1, len(candidates) + 1)
    return FreeResult(rows)


def continued(model: PreTrainedModel, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """Returns a prompt ``[S]`` with ``count`` tokens of the unquantized model's, each the most likely one."""
    cache, ids = DynamicCache(config=model.config), prompt.to(input_device(model))
    new, whole = ids, [ids]
    with own_attention(model):
        for _ in range(count):
            new = model(new[None], past_key_values=cache, use_cache=True).logits[0, -1].argmax(-1, keepdim=True)
            new = new.to(ids.device)
            whole.append(new)
    return torch.cat(whole).cpu()


def parting(candidate: Candidate, model: PreTrainedModel, ids: torch.Tensor, start: int) -> int:
    """Returns how many tokens from ``start`` on a candidate would write itself, before the first that differs."""
    predicted = candidate.logits(model, ids, start)[start - 1 : -1].argmax(-1).cpu()
    same = predicted == ids[start:]
    return len(same) if bool(same.all()) else int((~same).int().argmax())


def make_question(tokenizer: Any, text: str, task: str, seed: int) -> tuple[torch.Tensor, int]:
    """Returns the tokens of a task's text, filler, question and answer, and where the answer starts."""
    made = TASKS[task](np.random.default_rng([seed, *task.encode()]))

    def tokens(part: str) -> list[int]:
        return token_ids(tokenizer, part, add_special_tokens=False)

    filler = tokens(text)
    filler = filler[seed * 997 % max(1, len(filler) - FILLER_TOKENS) :][:FILLER_TOKENS]
    before = [*token_ids(tokenizer, "", add_special_tokens=True), *tokens(made.given), *filler, *tokens(made.asked)]
    return torch.tensor([*before, *tokens(made.answer)]), len(before)
