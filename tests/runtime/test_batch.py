"""Batches that come and go: each sequence says what it says alone, whoever else is there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tiny_graph import CONTEXT, EXACT, SMALL, VOCAB, Tiny

from skv_export.errors import SkvError
from skv_export.runtime import batch as batch_module
from skv_export.runtime.batch import Batch, sequence_bytes, slots_that_fit
from skv_export.runtime.sampling import Sampling
from skv_export.runtime.session import Session

pytestmark = pytest.mark.usefixtures("library")

TOKENS = np.random.default_rng(3).integers(3, VOCAB, 400).tolist()
MODELS = {
    "exact": Tiny(EXACT),
    "window": Tiny(EXACT, windows=(40, 0)),
    "K4V2": Tiny(dataclasses.replace(SMALL, recent_type="float")),
    "all logits": Tiny(EXACT, all_logits=True),
}


@pytest.fixture(scope="module", params=MODELS)
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Session:
    return Session(MODELS[request.param].write(tmp_path_factory.mktemp("model"), eos_token_id=[7]))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return Session(Tiny(EXACT).write(tmp_path_factory.mktemp("one"), eos_token_id=[]))


def alone(
    session: Session, prompt: list[int], chunk: int, steps: int, sampling: Sampling | None, size: int
) -> list[int]:
    """What a sequence says by itself, its prompt in pieces."""
    cache = session.cache(1, size)
    pieces = [prompt[i : i + chunk] for i in range(0, len(prompt), chunk)]
    for piece in pieces[:-1]:
        session.run([piece], None, None, cache)
    stream = session.stream([pieces[-1]], max_new_tokens=steps, sampling=sampling, cache=cache)
    return [int(row[0]) for row in stream]


def finish(batch: Batch, made: dict[int, list[int]], reasons: dict[int, str]) -> None:
    """Steps until nothing is left."""
    while batch.running or batch.waiting:
        take(batch, made, reasons)


def take(batch: Batch, made: dict[int, list[int]], reasons: dict[int, str]) -> None:
    seen = set()
    for token in batch.step():
        assert token.sequence not in reasons and token.sequence not in seen
        seen.add(token.sequence)
        made.setdefault(token.sequence, []).append(token.token)
        if token.stop_reason:
            reasons[token.sequence] = token.stop_reason


@pytest.mark.parametrize("seed", range(3))
def test_random_arrivals_say_what_each_says_alone(session: Session, seed: int) -> None:
    rng = np.random.default_rng(seed)
    slots, chunk, size = int(rng.integers(1, 5)), int(rng.choice([7, 32, 200])), 160
    batch = session.batch(slots, max_length=size, prompt_chunk=chunk)
    asked, made, reasons, left = {}, dict[int, list[int]](), dict[int, str](), set()
    while len(asked) < 14:
        for _ in range(rng.integers(0, 3)):
            start, count = int(rng.integers(0, 240)), int(rng.choice([1, 5, 40, 130, 158]))
            sampling = Sampling(temperature=1.0, seed=len(asked)) if rng.random() < 0.3 else None
            steps = int(rng.integers(1, 40))
            number = batch.add(TOKENS[start : start + count], max_new_tokens=steps, sampling=sampling)
            asked[number] = TOKENS[start : start + count], steps, sampling
        if asked and rng.random() < 0.1:
            number = int(rng.choice(list(asked)))
            assert batch.remove(number) == (number not in reasons and number not in left)
            left |= {number} - reasons.keys()
        for _ in range(rng.integers(1, 8)):
            take(batch, made, reasons)
            assert batch.running <= slots
    finish(batch, made, reasons)
    assert reasons.keys() == asked.keys() - left and batch.step() == []
    for number, (prompt, steps, sampling) in asked.items():
        want = alone(session, prompt, chunk, steps, sampling, size)
        got = made.get(number, [])
        assert got == want[: len(got)] and (len(got) == len(want) or number in left)
        if number in reasons:
            ended = "eos" if want[-1] == 7 else "max_new_tokens" if len(want) == steps else "context"
            assert reasons[number] == ended
    assert {"max_new_tokens"} <= set(reasons.values())


def test_running_sequences_do_not_wait_for_a_long_prompt(one: Session) -> None:
    batch = one.batch(2, max_length=300, prompt_chunk=20)
    first = batch.add(TOKENS[:10], max_new_tokens=50)
    batch.step()
    second = batch.add(TOKENS[:200], max_new_tokens=5)
    for _ in range(9):  # of the ten pieces
        assert [token.sequence for token in batch.step()] == [first]
    assert [token.sequence for token in batch.step()] == [first, second]
    assert [token.sequence for token in batch.step()] == [first, second]
    assert (batch.running, batch.waiting) == (2, 0)


def test_a_batch_begins_from_what_is_kept(tmp_path: Path) -> None:
    folder = Tiny(EXACT).write(tmp_path, eos_token_id=[])
    session, plain = Session(folder, prefix_bytes=1 << 30), Session(folder)
    batch, store = session.batch(3, prompt_chunk=64), session.prefixes
    assert store is not None
    system, made, reasons = TOKENS[:150], dict[int, list[int]](), dict[int, str]()
    prompts = [[*system, *TOKENS[200 + 20 * i : 220 + 20 * i]] for i in range(5)]
    for prompt in prompts:
        batch.add(prompt, max_new_tokens=12)
    finish(batch, made, reasons)
    assert store.find([*system, 5])[0] is not None  # learnt from the second, used by the third
    assert list(made.values()) == [alone(plain, prompt, 64, 12, None, CONTEXT) for prompt in prompts]
    assert store.reused_tokens == 3 * 150 and store.prompt_tokens == 5 * 170
    again = batch.add([*prompts[0], *made[1], 9], max_new_tokens=3)
    reused = store.find([*prompts[0], *made[1], 9])[0]
    assert reused is not None and len(reused.tokens) == len(prompts[0]) + 11
    (chosen,) = batch.step()
    assert (chosen.sequence, chosen.cached_tokens) == (again, len(prompts[0]) + 11)
    made[again] = [chosen.token]
    finish(batch, made, reasons)
    assert made[again] == alone(plain, [*prompts[0], *made[1], 9], 64, 3, None, CONTEXT)


def test_a_call_runs_the_running_sequences_alone(one: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever leaves, the others close up: an empty slot takes no part in a call."""
    widths, run = list[int](), type(one.graph).run
    monkeypatch.setattr(
        type(one.graph), "run", lambda self, cache, ids, *rest: widths.append(len(ids)) or run(self, cache, ids, *rest)
    )
    batch, made, reasons = one.batch(4, max_length=200), dict[int, list[int]](), dict[int, str]()
    lengths = [3, 9, 5, 7]
    numbers = [batch.add(TOKENS[i : i + 20 + i], max_new_tokens=n) for i, n in enumerate(lengths)]
    for _ in range(4):
        take(batch, made, reasons)
    widths.clear()
    assert numbers[0] not in batch and all(number in batch for number in numbers[1:]) and batch.tokens > 60
    while batch.running:
        running = batch.running
        take(batch, made, reasons)
        assert widths.pop() == running and not widths
    assert batch.tokens == 23 and set(reasons) == set(numbers)  # the last prompt, in the prompts' own cache
    for i, (number, steps) in enumerate(zip(numbers, lengths, strict=True)):
        assert made[number] == alone(one, TOKENS[i : i + 20 + i], 512, steps, None, 200)


def test_an_observer_is_told_the_logits_of_its_sequence(one: Session) -> None:
    batch, seen = one.batch(2, max_length=200), list[tuple[int, int]]()
    batch.add(TOKENS[:30], max_new_tokens=6)
    watched = batch.add(
        TOKENS[5:40], max_new_tokens=6, observe=lambda logits, token: seen.append((int(logits.argmax()), token))
    )
    made, reasons = dict[int, list[int]](), dict[int, str]()
    finish(batch, made, reasons)
    assert seen == [(token, token) for token in made[watched]] and len(seen) == 6


def test_after_a_reset_nothing_is_left(one: Session) -> None:
    batch = one.batch(1, max_length=200)
    numbers = [batch.add(TOKENS[:20]) for _ in range(3)]
    batch.step()
    batch.reset()
    assert (batch.running, batch.waiting, batch.tokens) == (0, 0, 0) and not any(x in batch for x in numbers)
    number, made, reasons = batch.add(TOKENS[:20], max_new_tokens=5), dict[int, list[int]](), dict[int, str]()
    finish(batch, made, reasons)
    assert made[number] == alone(one, TOKENS[:20], 512, 5, None, 200)


def test_slots_that_fit_leave_half_of_the_memory(one: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = sum(one.cache(1, n).nbytes == sequence_bytes(one, n) for n in (1, 200, CONTEXT))
    assert caches == 3
    for memory, slots in ((2 * 6 * sequence_bytes(one, 200), 5), (1, 1), (1 << 60, 4096)):
        monkeypatch.setattr(batch_module, "_memory_bytes", lambda memory=memory: memory)
        assert slots_that_fit(one, 200) == slots


def test_a_call_that_fails_loses_only_what_runs(one: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, made, reasons = one.batch(2, max_length=200), dict[int, list[int]](), dict[int, str]()
    numbers = [batch.add(TOKENS[i : i + 20], max_new_tokens=6) for i in range(3)]
    take(batch, made, reasons)
    take(batch, made, reasons)
    with monkeypatch.context() as patch:
        patch.setattr(type(one.graph), "run", lambda self, cache, *_: cache.reset() or _fail())
        with pytest.raises(SkvError, match="the call failed"):
            batch.step()
    assert (batch.running, batch.waiting) == (0, 1)
    finish(batch, made, reasons)
    assert reasons == {numbers[2]: "max_new_tokens"}
    assert made[numbers[2]] == alone(one, TOKENS[2:22], 512, 6, None, 200)


def _fail() -> None:
    raise SkvError("ONNX Runtime: the call failed")


def test_what_can_not_be_is_said(one: Session) -> None:
    for slots in (0, 1.5, 1 << 20):
        with pytest.raises(SkvError, match="slots"):
            one.batch(slots)  # type: ignore[arg-type]
    with pytest.raises(SkvError, match="prompt_chunk"):
        one.batch(2, prompt_chunk=0)
    with pytest.raises(SkvError, match="max_length"):
        one.batch(2, max_length=CONTEXT + 1)
    batch = one.batch(2, max_length=50)
    for prompt in ([], [VOCAB], [5] * 51):
        with pytest.raises(SkvError, match=r"input_ids|prompt"):
            batch.add(prompt)
    with pytest.raises(SkvError, match="max_new_tokens"):
        batch.add([5], max_new_tokens=0)
    assert (batch.running, batch.waiting) == (0, 0) and not batch.remove(1)
    big = Session(one.folder, config=dataclasses.replace(one.config, context_length=1 << 24))
    with pytest.raises(SkvError, match=r"caches of 4097 sequences of 16777216 tokens.*GiB.*fewer slots"):
        big.batch(4096)
