"""Long synthetic tasks with fewer tokens: what a compacted cache, a look ahead and a shorter prompt cost and save.

    python benchmarks/long_tasks.py FOLDER [--tokens 2000] [--questions 6] [--keep-tokens 512,256] [--layers 16]
        [--keep 0.25,0.125]

Facts to be found, recalled and retrieved among others stand at a random depth of the shipped prose, the question at its
end; all is seeded. FOLDER is an exported model; it answers greedily: from its whole cache; compacted (SnapKV);
compacted with its own guess at the answer looking too (SpecKV with the model as its own draft, an upper bound; the
draft's time is not counted); from a prompt that its first layers made shorter (SpecPC); and from the prompt's ends
alone, equally short, for comparison. Seconds until the first token are processor time of one thread, medians. Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np

from skv_export import Session
from skv_export.evaluation.free_running import TASKS, Task, wilson
from skv_export.evaluation.needle import CITIES, NEEDLE, QUESTION
from skv_export.evaluation.text import read_text
from skv_export.runtime.cache import Cache
from skv_export.runtime.compaction import WINDOW
from skv_export.runtime.prompt_compression import FRONT, PromptCompressor
from skv_export.runtime.text import LOOK_AHEAD


def hidden(rng: np.random.Generator) -> Task:
    """A number of five digits, of a city."""
    city, number = CITIES[rng.integers(len(CITIES))], str(rng.integers(10000, 100000))
    return Task(NEEDLE.format(city=city, number=number), QUESTION.format(city=city), f" {number}")


LONG: dict[str, Callable[[np.random.Generator], Task]] = {
    "needle": hidden,
    "recall": TASKS["recall"],
    "retrieval": TASKS["retrieval"],
}


def questions(session: Session, tokens: int, count: int) -> Iterator[tuple[str, list[int], list[int]]]:
    """Task, prompt and answer, as tokens."""

    def encode(text: str) -> list[int]:
        return session.tokenizer.encode(text, add_special_tokens=False).ids

    prose = encode(read_text(None))
    for task in LONG:
        for seed in range(count):
            rng = np.random.default_rng([seed, *task.encode()])
            made = LONG[task](rng)
            given, asked = encode("\n\n" + made.given), encode(made.asked)
            room = tokens - len(given) - len(asked)
            start = int(rng.integers(0, len(prose) - room))
            at = int(rng.integers(0, room - WINDOW))
            filler = prose[start : start + room]
            yield task, [*filler[:at], *given, *filler[at:], *asked], encode(made.answer)


def greedy(session: Session, cache: Cache, logits: np.ndarray, count: int) -> list[int]:
    """The next ``count`` tokens."""
    made = [int(logits.argmax())]
    while len(made) < count:
        made.append(int(session.append([made[-1:]], cache)[0].argmax()))
    return made


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--questions", type=int, default=6, help="Of each task.")
    parser.add_argument("--keep-tokens", default="512,256")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--keep", default="0.25,0.125")
    given = parser.parse_args()
    session = Session(given.folder, num_threads=1, score_window=WINDOW)
    ahead = Session(given.folder, num_threads=1, score_window=WINDOW + LOOK_AHEAD)
    compress = PromptCompressor(
        given.folder, vocab_size=session.config.vocab_size, first_layers=given.layers, num_threads=1
    )
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    seconds: dict[str, list[float]] = defaultdict(list)
    sizes: dict[str, int] = {}

    def note(kind: str, task: str, made: list[int], answer: list[int], spent: float, cache: Cache) -> None:
        right[kind][task].append(made == answer)
        seconds[kind].append(spent)
        sizes[kind] = cache.nbytes

    for task, prompt, answer in questions(session, given.tokens, given.questions):
        room = len(answer) + LOOK_AHEAD

        def prefilled(model: Session, tokens: list[int], room: int = room) -> tuple[Cache, np.ndarray, float]:
            cache, start = model.cache(1, len(tokens) + room), time.process_time()
            logits = model.append([tokens], cache)[0]
            return cache, logits, time.process_time() - start

        keeps = list(map(int, given.keep_tokens.split(",")))
        cache, logits, before = prefilled(session, prompt)
        for keep in keeps:
            twin, start = cache.fork(1), time.process_time()
            session.compact(twin, keep=keep, room=room)
            spent = before + time.process_time() - start
            note(f"compacted to {keep}", task, greedy(session, twin, logits, len(answer)), answer, spent, twin)
        made = greedy(session, cache, logits, max(len(answer), LOOK_AHEAD))
        note("whole", task, made[: len(answer)], answer, before, cache)
        cache, logits, before = prefilled(ahead, prompt)
        for keep in keeps:
            twin, start = cache.fork(1), time.process_time()
            ahead.append([made[:LOOK_AHEAD]], twin)
            ahead.compact(twin, keep=keep, room=room)
            twin.rewind(len(prompt))
            spent = before + time.process_time() - start
            kind = f"compacted to {keep}, looking ahead"
            note(kind, task, greedy(ahead, twin, logits, len(answer)), answer, spent, twin)
        for keep in map(float, given.keep.split(",")):
            start = time.process_time()
            few = compress(prompt, keep)
            before = time.process_time() - start
            cache, logits, spent = prefilled(session, few)
            made = greedy(session, cache, logits, len(answer))
            note(f"{keep:.1%} of the prompt, by {given.layers} layers", task, made, answer, before + spent, cache)
            ends = [*prompt[:FRONT], *prompt[len(prompt) - len(few) + FRONT :]]
            cache, logits, spent = prefilled(session, ends)
            note(f"{keep:.1%} of the prompt, its ends", task, greedy(session, cache, logits, len(answer)), answer,
                 spent, cache)  # fmt: skip
    print(f"| {given.tokens} tokens | {' | '.join(LONG)} | right (95% interval) | first token after | cache |")
    print("|---|" + "---|" * (len(LONG) + 3))
    for kind in sorted(right, key=lambda kind: (kind != "whole", list(right).index(kind))):
        hits = [hit for task in LONG for hit in right[kind][task]]
        low, high = wilson(sum(hits), len(hits))
        cells = [f"{sum(right[kind][task])} of {len(right[kind][task])}" for task in LONG]
        print(f"| {kind} | {' | '.join(cells)} | {np.mean(hits):.0%} ({low:.0%}-{high:.0%}) | "
              f"{statistics.median(seconds[kind]):.2f} s | {sizes[kind] / 2**20:.1f} MiB |")  # fmt: skip


if __name__ == "__main__":
    main()
