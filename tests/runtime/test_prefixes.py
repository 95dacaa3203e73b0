"""Prompts that begin alike run only what is new, and what they give is what a run with the same calls gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_graph import CONTEXT, EXACT, KV_HEADS, SMALL, VOCAB, Tiny

from skv_export.errors import SkvError
from skv_export.runtime.cache import Cache
from skv_export.runtime.prefixes import MIN_SHARED, PrefixStore
from skv_export.runtime.session import Session
from skv_export.spec import reference

pytestmark = pytest.mark.usefixtures("library")

RNG = np.random.default_rng(3)
TOKENS = RNG.integers(3, VOCAB, 400).tolist()
MODELS = {
    "full": Tiny(SMALL),
    "window": Tiny(SMALL, windows=(40, 0)),
    "all windows": Tiny(EXACT, windows=(40, 70)),
    "all logits": Tiny(SMALL, all_logits=True),
}
PLENTY = 1 << 30


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS[request.param].write(tmp_path_factory.mktemp("model"), eos_token_id=[])


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Tiny(SMALL).write(tmp_path_factory.mktemp("one"), eos_token_id=[])


def stored(session: Session) -> PrefixStore:
    assert session.prefixes is not None
    return session.prefixes


def content(cache: Cache, b: int = 0) -> list[np.ndarray]:
    """What the next token of a sequence sees, of every tensor, by the reference's reading of the bytes."""
    found, length = [], int(cache.lengths[b])
    for i, layer in enumerate(cache.layers):
        for name, layout in (("key", layer.key), ("value", layer.value)):
            block = cache.data(i, name)[b].reshape(KV_HEADS, -1)
            x, held = reference.load(layout, block, length)
            if layer.local_window_size:
                held[: max(0, length - layer.local_window_size + 1)] = False
            found.append(x[:, held])
    return found


def by_hand(session: Session, calls: list[list[int]], steps: int) -> tuple[Cache, list[int]]:
    """The prompt in these calls, then greedy steps; the last token is not appended, as in ``stream``."""
    cache, made = session.cache(1), []
    for call in calls:
        logits = session.run([call], None, None, cache)
    for step in range(steps):
        made.append(int(logits[0, -1].argmax()))
        if step + 1 < steps:
            logits = session.run([made[-1:]], None, None, cache)
    return cache, made


def streamed(session: Session, prompt: list[int], steps: int) -> tuple[Cache, list[int]]:
    cache = session.cache(1)
    return cache, [int(row[0]) for row in session.stream([prompt], max_new_tokens=steps, cache=cache)]


def same(one: tuple[Cache, list[int]], other: tuple[Cache, list[int]]) -> bool:
    return (
        one[1] == other[1]
        and one[0].tokens == other[0].tokens
        and one[0].longest(0) == other[0].longest(0)
        and all(map(np.array_equal, content(one[0]), content(other[0])))
    )


def test_the_turns_of_a_chat_are_a_run_with_the_same_calls(folder: Path) -> None:
    session, plain = Session(folder, prefix_bytes=PLENTY), Session(folder)
    calls, prompt = [TOKENS[:70]], TOKENS[:70]
    for turn in range(4):
        got, want = streamed(session, prompt, 20), by_hand(plain, calls, 20)
        assert same(got, want), turn
        more = TOKENS[100 + 31 * turn : 131 + 31 * turn]
        # The last token of an answer has not been appended: it comes with the next turn's.
        calls = [*calls, *[[token] for token in want[1][:-1]], [want[1][-1], *more]]
        prompt = [*prompt, *want[1], *more]
    assert stored(session).reused_tokens == sum(70 + 51 * turn - 32 for turn in (1, 2, 3))
    assert stored(session).prompt_tokens == sum(70 + 51 * turn for turn in range(4))


def test_the_same_prompt_again_runs_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(folder, prefix_bytes=PLENTY)
    first = streamed(session, TOKENS[:90], 12)
    monkeypatch.setattr(Session, "append", lambda *_: pytest.fail("the prompt was run again"))
    assert same(streamed(session, TOKENS[:90], 12), first)


def test_a_beginning_that_two_prompts_share_is_learnt_from_the_second_and_used_by_the_third(folder: Path) -> None:
    session, plain = Session(folder, prefix_bytes=PLENTY), Session(folder)
    system, users = TOKENS[:110], [TOKENS[200:230], TOKENS[240:260], TOKENS[270:330]]
    prompts = [[*system, *user] for user in users]
    assert same(streamed(session, prompts[0], 9), by_hand(plain, [prompts[0]], 9))
    for prompt, user, reused in zip(prompts[1:], users[1:], (0, len(system)), strict=True):
        assert same(streamed(session, prompt, 9), by_hand(plain, [system, user], 9))
        assert stored(session).reused_tokens == reused
    few = [*TOKENS[: MIN_SHARED - 1], *TOKENS[300:340]]  # not worth a call of its own
    assert same(streamed(session, few, 9), by_hand(plain, [few], 9))


def test_a_batch_begins_from_different_entries(folder: Path) -> None:
    session, plain = Session(folder, prefix_bytes=PLENTY), Session(folder)
    prompts = [TOKENS[:80], [*TOKENS[:80], *TOKENS[100:115]], TOKENS[200:233], TOKENS[:80]]
    session.generate(prompts[:1], max_new_tokens=1)
    made = session.generate(prompts, max_new_tokens=15)
    assert stored(session).reused_tokens == 240
    calls = [[prompts[0]], [prompts[0], TOKENS[100:115]], [prompts[2]], [prompts[0]]]
    assert made == [by_hand(plain, x, 15)[1] for x in calls]


def test_a_caller_who_stops_leaves_what_was_run(one: Path) -> None:
    session = Session(one, prefix_bytes=PLENTY)
    stream = session.stream([TOKENS[:70]], max_new_tokens=50)
    made = [int(next(stream)[0]) for _ in range(10)]
    stream.close()
    entry, shared = stored(session).find([*TOKENS[:70], *made])
    assert entry is not None and len(entry.tokens) == shared == 79


def test_bytes_are_bounded_and_the_least_recently_used_go_first(one: Path) -> None:
    session = Session(one, prefix_bytes=PLENTY)
    size = {}
    for start in (0, 150):
        session.generate([TOKENS[start : start + 100]], max_new_tokens=1)
        size[start] = stored(session).nbytes
    assert size[150] == 2 * size[0]
    session = Session(one, prefix_bytes=int(3.5 * size[0]))
    for start in (0, 50, 100, 0, 150):  # the fourth is a hit: the second is the oldest then
        session.generate([TOKENS[start : start + 100]], max_new_tokens=1)
    assert stored(session).nbytes == 3 * size[0] and len(stored(session)) == 3
    kept = [stored(session).find(TOKENS[start : start + 101])[0] is not None for start in (0, 50, 100, 150)]
    assert kept == [True, False, True, True]


def test_what_stands_behind_an_entry_goes_before_it(one: Path) -> None:
    session = Session(one, prefix_bytes=PLENTY)
    plain, prompt = Session(one), TOKENS[:120]
    streamed(session, prompt, 40)
    both = stored(session).nbytes
    alone = Session(one, prefix_bytes=PLENTY)
    streamed(alone, prompt, 1)
    first = stored(alone).nbytes
    assert both < 1.8 * first  # the second entry has only the tiles that are its own
    small = Session(one, prefix_bytes=both + 100)
    streamed(small, prompt, 40)
    streamed(small, TOKENS[200:230], 1)
    entry, _ = stored(small).find([*prompt, 5])
    assert entry is not None and len(entry.tokens) == 120
    got = streamed(small, [*prompt, *TOKENS[300:320]], 9)
    assert same(got, by_hand(plain, [prompt, TOKENS[300:320]], 9))


def test_what_is_larger_than_the_store_is_run_and_not_kept(one: Path) -> None:
    session = Session(one, prefix_bytes=1000)
    assert streamed(session, TOKENS[:90], 9)[1] == by_hand(Session(one), [TOKENS[:90]], 9)[1]
    assert len(stored(session)) == stored(session).nbytes == 0


def test_a_cache_in_use_and_a_small_one_are_left_alone(one: Path) -> None:
    session, plain = Session(one, prefix_bytes=PLENTY), Session(one)
    streamed(session, TOKENS[:100], 100)
    caches = [x.cache(1) for x in (session, plain)]
    texts = []
    for x, cache in zip((session, plain), caches, strict=True):
        x.run([TOKENS[5:15]], None, None, cache)
        texts.append([int(row[0]) for row in x.stream([TOKENS[:120]], max_new_tokens=9, cache=cache)])
    assert texts[0] == texts[1]
    small = session.cache(1, 60)
    with pytest.raises(SkvError, match="its capacity"):
        list(session.stream([TOKENS[:120]], cache=small))
    assert small.lengths.tolist() == [0]
    with pytest.raises(SkvError, match="context"):
        list(session.stream([TOKENS[:100] + [5] * CONTEXT]))
    for wrong in (-1, 1.5, "1G"):
        with pytest.raises(SkvError, match="prefix_bytes"):
            Session(one, prefix_bytes=wrong)  # type: ignore[arg-type]


def test_random_prompts_are_runs_with_calls_that_end_where_entries_end(one: Path) -> None:
    """Prompts out of a few pieces, a store that is nearly always full: each is what the calls it names give."""
    session, plain = Session(one, prefix_bytes=1 << 20), Session(one)
    rng = np.random.default_rng(1)
    pieces = [TOKENS[i : i + n] for i, n in ((0, 80), (100, 70), (200, 30), (300, 66))]
    calls: list[list[int]] = []
    whole = Session.append

    def append(self: Session, rows: list[list[int]], cache: Cache) -> np.ndarray:
        calls.extend(rows)
        return whole(self, rows, cache)

    hits = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "append", append)
        known: dict[tuple[int, ...], list[list[int]]] = {}  # tokens -> the calls that made them
        for _ in range(40):
            prompt = [token for i in rng.integers(0, 4, rng.integers(1, 5)) for token in pieces[i]]
            entry, _ = stored(session).find(prompt)
            before = known[tuple(entry.tokens.tolist())] if entry else []
            hits += entry is not None
            calls.clear()
            cache, made = streamed(session, prompt, 8)
            ran = [*before, *[list(call) for call in calls]]
            assert [token for call in ran for token in call] == prompt
            assert same((cache, made), by_hand(plain, ran, 8))
            for n in range(len(before), len(ran) + 1):
                known[tuple(token for call in ran[:n] for token in call)] = ran[:n]
            known[tuple(cache.tokens[0])] = [*ran, *[[token] for token in made[:-1]]]
            assert stored(session).nbytes <= 1 << 20
    assert hits > 10
