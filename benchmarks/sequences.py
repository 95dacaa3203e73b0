"""What sequences can share: the second turn of a long chat with and without what is kept of the first.

    python benchmarks/sequences.py prefix FOLDER [--tokens 6000] [--answer 64] [--rounds 3]

FOLDER is an exported model. Each figure is the median of the rounds; what is compared runs in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from skv_export import Session
from skv_export.evaluation.text import read_text

PREFIX_BYTES = 1 << 30


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def first_token(session: Session, prompt: list[int]) -> float:
    """Seconds until the first token of the answer to a prompt."""
    stream = session.stream([prompt], max_new_tokens=2)
    taken = seconds(lambda: next(stream))
    stream.close()
    return taken


def prefix(folder: str, tokens: int, answer: int, rounds: int) -> None:
    """Two turns of a chat; the second brings 40 new tokens."""
    plain = Session(folder)
    ids = plain.tokenizer.encode(read_text(None)).ids
    first, question = ids[:tokens], ids[tokens : tokens + 40]
    found: dict[str, list[float]] = {"first": [], "without": [], "with": []}
    for _ in range(rounds):
        session = Session(folder, prefix_bytes=PREFIX_BYTES)
        made: list[int] = []
        start = time.perf_counter()
        for row in session.stream([first], max_new_tokens=answer):
            if not made:
                found["first"].append(time.perf_counter() - start)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prefix")
    command.add_argument("folder")
    command.add_argument("--tokens", type=int, default=6000)
    command.add_argument("--answer", type=int, default=64)
    command.add_argument("--rounds", type=int, default=3)
    options = vars(parser.parse_args())
    {"prefix": prefix}[options.pop("command")](**options)


if __name__ == "__main__":
    main()
