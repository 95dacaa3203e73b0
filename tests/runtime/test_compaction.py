"""A compacted cache goes on as if each head had never seen what it left out; what caches can do, it can do too."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from plain_tiny import Plain
from tiny_graph import CONTEXT, EXACT, SMALL, VOCAB, Tiny

from skv_export.cli.main import main
from skv_export.errors import SkvError
from skv_export.runtime.cache import Cache
from skv_export.runtime.compaction import WINDOW
from skv_export.runtime.session import Session
from skv_export.runtime.speculation import PromptLookup, Speculation
from skv_export.runtime.text import generate_text

pytestmark = pytest.mark.usefixtures("library")

TOKENS = np.random.default_rng(3).integers(3, VOCAB, 400).tolist()
PROMPT, KEEP = TOKENS[:300], 130
MODELS = {
    "exact": Tiny(EXACT),
    "exact window": Tiny(EXACT, windows=(40, 0)),
    "exact windows": Tiny(EXACT, windows=(40, 70)),
    "K4V2": Tiny(SMALL),
    "K4V2 window": Tiny(SMALL, windows=(0, 60)),
    "token_channel": Tiny(dataclasses.replace(SMALL, k_granularity="token_channel", v_granularity="channel")),
}


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def session(name: str, tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = MODELS[name].write(tmp_path_factory.mktemp("model"), eos_token_id=[])
    return Session(folder, score_window=WINDOW, num_logits=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Tiny(SMALL).write_all(tmp_path_factory.mktemp("one"), eos_token_id=[])


def compacted(session: Session, prompt: list[int] = PROMPT, keep: int = KEEP, **options: int) -> Cache:
    cache = session.cache()
    session.run([prompt], None, None, cache)
    session.compact(cache, keep=keep, **options)
    return cache


def steps(session: Session, cache: Cache, tokens: list[int] = TOKENS[300:360]) -> np.ndarray:
    return np.concatenate([session.run([[token]] * cache.batch, None, None, cache)[:, -1:] for token in tokens], axis=1)


@pytest.mark.parametrize("name", ["exact", "exact window", "exact windows"], indirect=True)
def test_it_goes_on_as_a_model_that_never_saw_what_was_left_out(session: Session, name: str) -> None:
    plain = Plain(MODELS[name])
    for token in PROMPT:
        plain.step(token)
    cache = compacted(session)
    # 300 tokens: 2 sinks, 8 tiles of 32 up to 258, 42 recent. 6 tiles' worth go, so that 2 tiles stay: the last one
    # whole, and one of chosen tokens.
    assert cache.dropped.tolist() == [192] and cache.held.tolist() == [108] and cache.lengths.tolist() == [300]
    plain.forget(last_tile=2 + 7 * 32, count=32, window=WINDOW)
    got = steps(session, cache)[0]
    wanted = np.array([plain.step(token) for token in TOKENS[300:360]])
    np.testing.assert_allclose(got, wanted, atol=2e-3)
    if name != "exact windows":  # there nothing that is seen is left out
        whole = session.cache()
        session.run([PROMPT], None, None, whole)
        assert np.abs(steps(session, whole)[0] - wanted).max() > 0.1


class Known:
    """Guesses what it was told."""

    num_tokens = 16

    def __call__(self, tokens: list[int], count: int) -> list[int]:
        return TOKENS[380:396][:count]


@pytest.mark.parametrize("name", ["exact", "exact window"], indirect=True)
def test_the_queries_of_guesses_count_and_the_guesses_go(name: str, tmp_path: Path) -> None:
    folder = MODELS[name].write(tmp_path, eos_token_id=[])
    session = Session(folder, score_window=WINDOW + 16)
    plain = Plain(MODELS[name])
    logits = [plain.step(token) for token in PROMPT]
    for token in Known()(PROMPT, 16):
        plain.step(token)
    # 316 tokens: 9 tiles up to 290; to hold 130 at most, 6 tiles' worth go: 2 chosen, and the last one.
    plain.forget(last_tile=2 + 8 * 32, count=64, window=WINDOW + 16)
    plain.take_back(16)
    cache, seen = session.cache(), []
    stream = session.stream(
        [PROMPT], max_new_tokens=12, cache=cache, keep_tokens=KEEP, look_ahead=Known(),
        observe=lambda step, _: seen.append(step[0]),
    )  # fmt: skip
    tokens = [int(token) for (token,) in stream]
    assert cache.lengths.tolist() == [311] and cache.dropped.tolist() == [192]
    wanted = [logits[-1], *(plain.step(token) for token in tokens[:-1])]
    np.testing.assert_allclose(seen, wanted, atol=2e-3)


def test_guesses_need_a_cache_that_takes_them_back(folder: Path) -> None:
    session = Session(folder, score_window=WINDOW)
    with pytest.raises(SkvError, match="keep_tokens, and one sequence"):
        next(session.stream([PROMPT], look_ahead=Known()))
    guesses = Known()
    guesses.num_tokens = 17
    with pytest.raises(SkvError, match="at most 16, the recent_tokens"):
        next(session.stream([PROMPT], keep_tokens=KEEP, look_ahead=guesses))
    short = [int(t) for (t,) in session.stream([PROMPT[:90]], max_new_tokens=5, keep_tokens=KEEP, look_ahead=Known())]
    assert short == [int(t) for (t,) in session.stream([PROMPT[:90]], max_new_tokens=5)]


def test_the_buffers_are_smaller_and_the_text_is_known(session: Session) -> None:
    cache = session.cache(max_length=400)
    session.run([PROMPT], None, None, cache)
    before = cache.nbytes
    session.compact(cache, keep=KEEP, room=20)
    assert cache.nbytes < before and cache.tokens == [PROMPT]
    assert session.room(cache).tolist() == [20]
    steps(session, cache, TOKENS[300:320])
    assert session.room(cache).tolist() == [0] and cache.lengths.tolist() == [320]


def test_a_short_sequence_stays_as_it_is(session: Session) -> None:
    cache, whole = compacted(session, PROMPT[:KEEP]), session.cache()
    session.run([PROMPT[:KEEP]], None, None, whole)
    assert cache.dropped.tolist() == [0]
    assert np.array_equal(steps(session, cache), steps(session, whole))


def test_a_prompt_in_pieces_and_a_second_compaction(session: Session) -> None:
    cache = session.cache()
    for start, end in ((0, 150), (150, 290), (290, 300)):  # the last queries come of two calls
        session.run([PROMPT[start:end]], None, None, cache)
    session.compact(cache, keep=KEEP)
    steps(session, cache, TOKENS[300:360])
    session.compact(cache, keep=KEEP)
    assert cache.lengths.tolist() == [360] and cache.held[0] <= KEEP
    assert np.isfinite(steps(session, cache, TOKENS[360:])).all()


def test_each_sequence_of_a_batch_chooses_for_itself(session: Session) -> None:
    rows = [PROMPT, TOKENS[50:350]]
    cache = session.cache(2)
    session.run(rows, None, None, cache)
    session.compact(cache, keep=KEEP)
    got = steps(session, cache)
    for b, row in enumerate(rows):
        np.testing.assert_allclose(got[b], steps(session, compacted(session, row))[0], atol=2e-3)


def test_lengths_that_differ_are_compacted_each_from_its_own_call(session: Session) -> None:
    cache = session.cache(2)
    session.append([PROMPT, []], cache)
    session.append([[], TOKENS[:90]], cache)
    session.compact(cache, keep=KEEP)
    assert cache.dropped.tolist() == [192, 0]
    got = steps(session, cache)
    np.testing.assert_allclose(got[0], steps(session, compacted(session))[0], atol=2e-3)


def test_it_can_be_taken_back_within_the_recent_tokens(session: Session, name: str) -> None:
    cache, other = compacted(session), compacted(session)
    wanted = steps(session, other)
    steps(session, cache, TOKENS[:10])
    cache.rewind(300)
    got = steps(session, cache)
    np.testing.assert_allclose(got, wanted, atol=2e-3 if name.startswith("exact") else 0.5)
    for _ in range(20):  # never into what was chosen
        floor = cache.rewind_floor(0)
        cache.rewind(floor)
    if not all(MODELS[name].windows):
        assert floor - int(cache.dropped[0]) >= int(cache.chosen[0]) > 0
        with pytest.raises(SkvError, match="rewind of sequence 0"):
            cache.rewind(floor - 1)
    cache.rewind(0)
    assert cache.dropped.tolist() == [0] and cache.held.tolist() == [0]
    session.run([PROMPT[:50]], None, None, cache)


def test_saved_and_loaded_and_copied_it_goes_on_alike(session: Session, tmp_path: Path) -> None:
    cache = compacted(session)
    cache.save(tmp_path / "cache")
    loaded, twins = session.load_cache(tmp_path / "cache", room=60), cache.fork(2)
    assert loaded.dropped.tolist() == [192] and loaded.tokens == [PROMPT]
    wanted = steps(session, cache)
    assert np.array_equal(steps(session, loaded), wanted)
    np.testing.assert_allclose(steps(session, twins)[1], wanted[0], atol=2e-3)
    restored = session.cache(2)
    restored.restore(1, [compacted(session).state(0)])
    restored.reorder([1, 1])
    np.testing.assert_allclose(steps(session, restored)[0], wanted[0], atol=2e-3)


def test_guesses_after_it_change_nothing(session: Session) -> None:
    prompt = (TOKENS[:40] * 8)[:300]
    plain = [int(t) for (t,) in session.stream([prompt], max_new_tokens=40, keep_tokens=KEEP)]
    guided = Speculation(session, PromptLookup(4))
    assert [int(t) for (t,) in guided.stream([prompt], max_new_tokens=40, keep_tokens=KEEP)] == plain


def test_streams_end_at_the_context(session: Session) -> None:
    prompt = (TOKENS * 2)[: CONTEXT - 3]
    assert len(list(session.stream([prompt], max_new_tokens=50, keep_tokens=KEEP))) == 4


def test_a_compacted_cache_is_no_prefix_of_others(folder: Path) -> None:
    session = Session(folder, score_window=WINDOW, prefix_bytes=1 << 30)
    assert session.prefixes is not None
    alone = Session(folder, score_window=WINDOW).stream([PROMPT], max_new_tokens=5, keep_tokens=KEEP)
    made = [int(t) for (t,) in session.stream([PROMPT], max_new_tokens=5, keep_tokens=KEEP)]
    assert made == [int(t) for (t,) in alone] and len(session.prefixes) == 1  # the whole prompt, before
    longer, whole = [*PROMPT, *made, 5], session.cache()
    for call in (PROMPT, [*made, 5]):
        logits = session.run([call], None, None, whole)
    assert next(session.stream([longer], max_new_tokens=1))[0] == logits[0, -1].argmax()
    assert session.prefixes.reused_tokens == len(PROMPT)


def test_a_prompt_that_is_known_runs_its_last_queries_again(folder: Path) -> None:
    session = Session(folder, score_window=WINDOW, prefix_bytes=1 << 30)
    assert session.prefixes is not None
    for _ in session.stream([PROMPT[:250]], max_new_tokens=1):
        pass
    for _ in range(2):  # the second time, all of it is known
        cache = session.cache()
        made = [int(t) for (t,) in session.stream([PROMPT], max_new_tokens=5, keep_tokens=KEEP, cache=cache)]
        assert cache.dropped.tolist() == [192]
    assert session.prefixes.reused_tokens == 500
    by_hand = session.cache()
    for call in (PROMPT[:250], PROMPT[250:]):
        session.run([call], None, None, by_hand)
    session.compact(by_hand, keep=KEEP)
    steps(session, by_hand, made[:4])
    assert np.array_equal(steps(session, cache), steps(session, by_hand))


def test_what_can_not_be_compacted_is_refused_and_unchanged(folder: Path) -> None:
    session = Session(folder, score_window=WINDOW)
    cache = session.cache()
    session.run([PROMPT], None, None, cache)
    for keep in (81, -1, 0):
        with pytest.raises(SkvError, match=r"tokens to keep; got .*; expected at least 82"):
            session.compact(cache, keep=keep)
    with pytest.raises(SkvError, match="keep; got None"):
        session.compact(cache, keep=None)  # type: ignore[arg-type]
    with pytest.raises(SkvError, match="room"):
        session.compact(cache, keep=100, room=CONTEXT)
    with pytest.raises(SkvError, match="another session"):
        session.compact(Session(folder).cache(), keep=100)
    cache.rewind(299)
    with pytest.raises(SkvError, match="queries of the last tokens"):
        session.compact(cache, keep=100)
    padded = session.cache(2)
    session.append([PROMPT, PROMPT[:200]], padded)
    with pytest.raises(SkvError, match="queries of the last tokens of sequence 1"):
        session.compact(padded, keep=100)
    assert cache.lengths.tolist() == [299] and cache.dropped.tolist() == [0] and not padded.dropped.any()
    plain = Session(folder)
    with pytest.raises(SkvError, match="score_window"):
        plain.compact(plain.cache(), keep=100)
    with pytest.raises(SkvError, match="score_window"):
        Session(folder, score_window=-1)


def test_generate_keeps_so_many_tokens(folder: Path, tmp_path: Path) -> None:
    prompt = "The quick brown fox jumps over the lazy dog. " * 8
    whole = generate_text(folder, prompt, max_new_tokens=20)
    few = generate_text(folder, prompt, max_new_tokens=20, keep_tokens=100, save_cache=tmp_path / "few.cache")
    assert few.dropped_tokens > 200 and few.cache_bytes < whole.cache_bytes / 1.5
    assert f"{few.dropped_tokens} tokens left out" in few.summary()
    on = generate_text(folder, "", max_new_tokens=5, load_cache=tmp_path / "few.cache")
    longer = generate_text(folder, prompt, max_new_tokens=25, keep_tokens=100)
    assert few.tokens + on.tokens == longer.tokens
    run = CliRunner().invoke(main, ["generate", str(folder), "--prompt", prompt, "--keep-tokens", "7"])
    assert run.exit_code == 1 and "expected at least 82" in run.output


def test_a_cache_that_shares_its_buffers_is_not_compacted(folder: Path) -> None:
    session = Session(folder, score_window=WINDOW)
    cache = session.cache(2)
    session.run([PROMPT, TOKENS[50:350]], None, None, cache)
    part = cache.first(1)
    for one in (cache, part):
        with pytest.raises(SkvError, match="shares its buffers"):
            session.compact(one, keep=KEEP)
    alone = part.fork(1)  # the part's queries are the whole's
    session.compact(alone, keep=KEEP)
    np.testing.assert_allclose(steps(session, alone), steps(session, compacted(session)), atol=2e-3)
    session.run([TOKENS[:40]], None, None, part)
    assert len(cache.queries.last(0, 8)[0]) == 8 and cache.lengths.tolist() == [340, 300]
    part.rewind(330)
    assert not cache.queries.last(0, 8) and cache.queries.last(1, 8)
