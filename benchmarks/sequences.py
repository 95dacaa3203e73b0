"""What sequences can save: the second turn of a long chat from what is kept of the first; guesses at the next tokens;
slots that sequences share; what sharing the tiles of one prefix would save.

    python benchmarks/sequences.py prefix FOLDER [--tokens 6000] [--answer 64] [--rounds 3]
    python benchmarks/sequences.py speculation FOLDER [--steps 200] [--guesses 8] [--rounds 3]
    python benchmarks/sequences.py sharing FOLDER [--tokens 6000] [--sequences 8] [--answer 256] [--rounds 5]
    python benchmarks/sequences.py batch FOLDER [--slots 1,2,4,8] [--sequences 16]

FOLDER is an exported model. Each figure is the median of the rounds; what is compared runs in turns. Times are
processor time of one thread, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from skv_export import Session
from skv_export.evaluation.text import read_text
from skv_export.runtime.speculation import PromptLookup, Speculation

PREFIX_BYTES = 1 << 30


def seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def first_token(session: Session, prompt: list[int]) -> float:
    """Seconds until the first token of the answer to a prompt."""
    stream = session.stream([prompt], max_new_tokens=2)
    taken = seconds(lambda: next(stream))
    stream.close()
    return taken


def prefix(folder: str, tokens: int, answer: int, rounds: int) -> None:
    """Two turns of a chat; the second brings 40 new tokens."""
    plain = Session(folder, num_threads=1)
    ids = plain.tokenizer.encode(read_text(None)).ids
    first, question = ids[:tokens], ids[tokens : tokens + 40]
    found: dict[str, list[float]] = {"first": [], "without": [], "with": []}
    for _ in range(rounds):
        session = Session(folder, num_threads=1, prefix_bytes=PREFIX_BYTES)
        made: list[int] = []
        start = time.process_time()
        for row in session.stream([first], max_new_tokens=answer):
            if not made:
                found["first"].append(time.process_time() - start)
            made.append(int(row[0]))
        second = [*first, *made, *question]
        found["with"].append(first_token(session, second))
        found["without"].append(first_token(plain, second))
        store = session.prefixes
        assert store is not None
        kept = f"{len(store)} entries of {store.nbytes / 2**20:.1f} MiB; {store.reused_tokens} tokens of it did not run"
    middle = {name: statistics.median(values) for name, values in found.items()}
    print(f"first turn, {tokens} tokens: first token after {middle['first']:.2f} s")
    print(
        f"second turn, {len(second)} tokens: {middle['without']:.2f} s without a store, {middle['with']:.3f} s with it"
    )
    print(f"{middle['without'] / middle['with']:.0f}x; {kept}")


def speculation(folder: str, steps: int, guesses: int, rounds: int) -> None:
    """Greedy decoding with and without prompt lookup: a text that is to be copied, and one that is to be gone on."""
    plain, session = Session(folder, num_threads=1), Session(folder, num_threads=1, num_logits=guesses + 1)
    text = " ".join(read_text(None).split())[2000:4500]
    prompts = {
        "copy": session.chat_prompt([{"role": "user", "content": f"Repeat this text word for word:\n\n{text}"}]),
        "go on": text,
    }
    for name, prompt in prompts.items():
        ids = session.tokenizer.encode(prompt, add_special_tokens=name != "copy").ids
        speeds: dict[str, list[float]] = {"plain": [], "guesses": []}
        for _ in range(rounds):
            made: dict[str, list[int]] = {}
            guided = Speculation(session, PromptLookup(guesses))
            streams = {
                "plain": (int(row[0]) for row in plain.stream([ids], max_new_tokens=steps)),
                "guesses": (int(row[0]) for row in guided.stream([ids], max_new_tokens=steps)),
            }
            for kind, stream in streams.items():
                made[kind] = [next(stream)]
                start = time.process_time()
                made[kind] += list(stream)
                speeds[kind].append((len(made[kind]) - 1) / (time.process_time() - start))
        same = next((i for i, (a, b) in enumerate(zip(*made.values(), strict=False)) if a != b), len(made["plain"]))
        ratio = statistics.median(b / a for a, b in zip(*speeds.values(), strict=True))
        print(
            f"{name}: {len(ids)} + {len(made['plain'])} tokens: "
            f"{statistics.median(speeds['plain']):.1f} tokens/s plain, "
            f"{statistics.median(speeds['guesses']):.1f} with {guesses} guesses: {ratio:.2f}x; "
            f"{guided.accepted} of {guided.guessed} right, {guided.calls} calls; {same} tokens alike"
        )


def batch(folder: str, slots: str, sequences: int, rounds: int) -> None:
    """Prompts of 100 to 400 tokens with answers of 20 to 80, all there from the start; one by one, and in slots."""
    session, rng = Session(folder, num_threads=1), random.Random(0)
    ids = session.tokenizer.encode(read_text(None)).ids
    asked = [
        (ids[start : start + rng.randint(100, 400)], rng.randint(20, 80))
        for start in rng.sample(range(len(ids) - 400), sequences)
    ]

    def one_by_one() -> int:
        return sum(len(list(session.stream([prompt], max_new_tokens=steps))) for prompt, steps in asked)

    def in_slots(count: int) -> int:
        running, made = session.batch(count, max_length=512), 0
        for prompt, steps in asked:
            running.add(prompt, max_new_tokens=steps)
        while running.running or running.waiting:
            made += len(running.step())
        return made

    kinds = {"one by one": one_by_one}
    kinds |= {f"{count} slots": partial(in_slots, count) for count in map(int, slots.split(","))}
    speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, call in kinds.items():
            start = time.process_time()
            speeds[kind].append(call() / (time.process_time() - start))
    first = statistics.median(speeds["one by one"])
    for kind, values in speeds.items():
        speed = statistics.median(values)
        print(f"{kind}: {speed:.1f} tokens/s, prompts included: {speed / first:.2f}x")


def sharing(folder: str, tokens: int, sequences: int, answer: int, rounds: int) -> None:
    """Copies of one prefix, each with an answer of its own: bytes as they are, and if the prefix's tiles were one."""
    session = Session(folder, num_threads=1)
    ids = session.tokenizer.encode(read_text(None)).ids
    caches, steps = {}, dict[str, list[float]]()
    for name, length in (("long", tokens), ("short", 128)):
        one = session.cache(1, tokens + answer)
        session.run([ids[:length]], None, None, one)
        if name == "long":
            states = one.state(0).tensors.values()
            tiles, rows = sum(x.tiles.nbytes for x in states), sum(x.rows.nbytes for x in states)
            taken = seconds(partial(one.fork, sequences))
        caches[name], steps[name] = one.fork(sequences), []
    own = sequences * (rows + tiles * answer // tokens)
    copied, shared, held = (x / 2**20 for x in (sequences * tiles + own, tiles + own, sequences * rows))
    print(f"{sequences} sequences behind {tokens} tokens, {answer} of their own: {copied:.1f} MiB with copies, made in")
    print(f"{taken:.3f} s; {shared:.1f} MiB with the prefix shared; {held:.1f} MiB of both are full-precision rows")
    for _ in range(rounds):
        for name, cache in caches.items():
            start = time.process_time()
            for token in ids[tokens : tokens + 4]:
                session.run([[token]] * sequences, None, None, cache)
            steps[name].append((time.process_time() - start) / 4)
    long, short = (statistics.median(steps[name]) for name in ("long", "short"))
    print(f"a step of all takes {1000 * long:.0f} ms, behind 128 tokens {1000 * short:.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prefix")
    command.add_argument("folder")
    command.add_argument("--tokens", type=int, default=6000)
    command.add_argument("--answer", type=int, default=64)
    command.add_argument("--rounds", type=int, default=3)
    command = commands.add_parser("speculation")
    command.add_argument("folder")
    command.add_argument("--steps", type=int, default=200)
    command.add_argument("--guesses", type=int, default=8)
    command.add_argument("--rounds", type=int, default=3)
    command = commands.add_parser("sharing")
    command.add_argument("folder")
    command.add_argument("--tokens", type=int, default=6000)
    command.add_argument("--sequences", type=int, default=8)
    command.add_argument("--answer", type=int, default=256)
    command.add_argument("--rounds", type=int, default=5)
    command = commands.add_parser("batch")
    command.add_argument("folder")
    command.add_argument("--slots", default="1,2,4,8")
    command.add_argument("--sequences", type=int, default=16)
    command.add_argument("--rounds", type=int, default=1)
    options = vars(parser.parse_args())
    known = {"prefix": prefix, "speculation": speculation, "sharing": sharing, "batch": batch}
    known[options.pop("command")](**options)


if __name__ == "__main__":
    main()
