"""Speculative decoding gives what decoding token by token gives, whatever is guessed, over every boundary."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_graph import CONTEXT, EXACT, SMALL, VOCAB, Tiny

from skv_export.cli.main import main
from skv_export.errors import SkvError
from skv_export.runtime.sampling import Sampling
from skv_export.runtime.session import Session
from skv_export.runtime.speculation import DraftModel, PromptLookup, Speculation
from skv_export.runtime.text import generate_text

pytestmark = pytest.mark.usefixtures("library")

TOKENS = np.random.default_rng(3).integers(3, VOCAB, 400).tolist()
FLIPPED = 6e-2  # within a call tokens see each other before rounding to float16, so that a code may be another one
MODELS = {
    "K4V2": Tiny(SMALL),
    "window": Tiny(SMALL, windows=(40, 0)),
    "all windows": Tiny(SMALL, windows=(40, 70)),
    "no sinks": Tiny(dataclasses.replace(SMALL, num_sink_tokens=0, recent_tokens=9)),
    "no recent": Tiny(dataclasses.replace(SMALL, recent_tokens=0)),
    "token_channel": Tiny(dataclasses.replace(SMALL, k_granularity="token_channel", v_bits=3, recent_type="float")),
    "exact": Tiny(EXACT),
    "all logits": Tiny(SMALL, all_logits=True),
}


@pytest.fixture(scope="module", params=MODELS)
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = MODELS[request.param].write(tmp_path_factory.mktemp("model"), eos_token_id=[])
    return Session(folder, num_logits=9)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Tiny(SMALL).write(tmp_path_factory.mktemp("one"), eos_token_id=[])


class Oracle:
    """Knows the text, and is wrong at random: what it guesses are right tokens up to a wrong one."""

    num_tokens = 8

    def __init__(self, text: list[int], seed: int) -> None:
        self.text, self.rng = text, np.random.default_rng(seed)

    def __call__(self, tokens: Sequence[int], count: int) -> list[int]:
        if list(tokens) != self.text[: len(tokens)]:
            return []
        guess = self.text[len(tokens) : len(tokens) + count]
        if guess and self.rng.random() < 0.7:
            at = int(self.rng.integers(len(guess)))
            guess[at] = (guess[at] + 1) % VOCAB
        return guess[: int(self.rng.integers(0, count + 1))] if self.rng.random() < 0.3 else guess


def said(stream: Iterator[np.ndarray]) -> list[int]:
    return [int(row[0]) for row in stream]


def plain(session: Session, prompt: list[int], steps: int, sampling: Sampling | None = None) -> list[int]:
    return [int(row[0]) for row in session.stream([prompt], max_new_tokens=steps, sampling=sampling)]


def margin(session: Session, prompt: list[int], text: list[int], step: int) -> float:
    """How far ahead of the second best the token of a step is, decoded one by one."""
    cache = session.cache(1)
    logits = session.run([prompt], None, None, cache)
    for token in text[:step]:
        logits = session.run([[token]], None, None, cache)
    best = np.sort(logits[0, -1])
    return float(best[-1] - best[-2])


@pytest.mark.parametrize("seed", range(4))
def test_any_guesses_give_the_same_tokens_and_the_same_cache(session: Session, seed: int) -> None:
    start = 20 * seed
    prompt = TOKENS[start : start + 15 + 23 * seed]
    text = plain(session, prompt, 200)
    guided = Speculation(session, Oracle([*prompt, *text], seed))
    cache = session.cache(1)
    made = []
    for token in said(guided.stream([prompt], max_new_tokens=200, cache=cache)):
        if token != text[len(made)]:  # a tie, as far as float16 can tell: what follows is another text
            assert margin(session, prompt, text, len(made)) < FLIPPED
            return
        made.append(token)
    assert made == text and cache.tokens[0] == [*prompt, *text[:-1]]
    if min(layer.key.recent_tokens for layer in session.config.layers):
        assert guided.accepted > 60 and guided.calls < 150
    # What is left behind is what one by one leaves: the next 40 tokens see the same.
    straight = session.cache(1)
    assert [int(row[0]) for row in session.stream([prompt], max_new_tokens=200, cache=straight)] == text
    for token in TOKENS[:40]:
        got, want = (session.run([[token]], None, None, x)[0, -1] for x in (cache, straight))
        assert np.abs(got - want).max() < (2e-4 if session.config.layers[0].key.bits == 16 else FLIPPED)


def test_sampling_draws_the_same_tokens(one: Path) -> None:
    session = Session(one, num_logits=9)
    for seed in range(4):
        sampling = Sampling(temperature=0.8, top_k=20, top_p=0.95, seed=seed)
        made = plain(session, TOKENS[:30], 80, sampling)
        guided = Speculation(session, Oracle([*TOKENS[:30], *made], seed))
        assert said(guided.stream([TOKENS[:30]], max_new_tokens=80, sampling=sampling)) == made
        assert guided.accepted > 20


def test_text_that_repeats_is_looked_up() -> None:
    lookup = PromptLookup(4)
    text = [5, 6, 7, 8, 9, 10, 11, 6, 7]
    assert lookup(text, 4) == [8, 9, 10, 11]
    assert lookup(text, 2) == [8, 9]
    assert lookup([1, 2, 9, 2, 8, 1, 2], 3) == [9, 2, 8]  # the longer ending goes before the later one
    assert lookup([3, 4, 5], 4) == lookup([3], 4) == []
    assert lookup([7, 7, 7], 4) == [7]


def test_a_model_that_drafts_for_itself_is_always_right(session: Session) -> None:
    if not min(layer.key.recent_tokens for layer in session.config.layers):
        pytest.skip("without recent tokens nothing can be taken back")
    drafter = DraftModel(session, 4, VOCAB)
    guided = Speculation(session, drafter)
    for prompt in (TOKENS[:40], TOKENS[100:120]):  # the second: the draft's cache starts again
        assert said(guided.stream([prompt], max_new_tokens=100)) == plain(session, prompt, 100)
    assert guided.accepted > 0.9 * guided.guessed and guided.calls < 70


def test_another_model_drafts(one: Path, tmp_path: Path) -> None:
    small = Tiny(dataclasses.replace(SMALL, k_bits=1, v_bits=1), windows=(40, 40))
    other = Session(small.write(tmp_path, eos_token_id=[]))
    session = Session(one, num_logits=4)
    guided = Speculation(session, DraftModel(other, 8, VOCAB))
    assert said(guided.stream([TOKENS[:40]], max_new_tokens=200)) == plain(session, TOKENS[:40], 200)
    assert 0 < guided.accepted < guided.guessed <= 3 * guided.calls


def test_generation_ends_where_it_would(tmp_path: Path, one: Path) -> None:
    free = plain(Session(one), TOKENS[:30], 40)
    end = free[25]
    session = Session(Tiny().write(tmp_path, eos_token_id=[end]), num_logits=9)
    stopped = free[: free.index(end) + 1]
    for seed in range(5):
        guided = Speculation(session, Oracle([*TOKENS[:30], *free], seed))
        cache = session.cache(1)
        assert said(guided.stream([TOKENS[:30]], max_new_tokens=40, cache=cache)) == stopped
        assert cache.tokens[0] == [*TOKENS[:30], *stopped[:-1]]
    endless = Session(one, num_logits=9)
    for size in (31, 38, 45):
        cache = endless.cache(1, size)
        guided = Speculation(endless, Oracle([*TOKENS[:30], *free], 1))
        made = said(guided.stream([TOKENS[:30]], max_new_tokens=40, cache=cache))
        assert made == free[: size - 30 + 1] and cache.lengths[0] == size
    long = (TOKENS + TOKENS)[: CONTEXT - 3]
    assert len(list(Speculation(endless, PromptLookup(8)).stream([long], max_new_tokens=40))) == 4


def test_logits_of_the_last_tokens_are_those_of_all(one: Path, tmp_path: Path) -> None:
    every = Session(Tiny(SMALL, all_logits=True).write(tmp_path))
    some = Session(one, num_logits=5)
    caches = every.cache(2), some.cache(2)
    for columns in (70, 3, 5, 1):
        ids = np.array([TOKENS[:columns], TOKENS[100 : 100 + columns]])
        want, got = (x.run(ids, None, None, cache) for x, cache in zip((every, some), caches, strict=True))
        assert got.shape == (2, min(columns, 5), VOCAB)
        assert np.abs(want[:, -5:] - got).max() < 1e-5


def test_what_can_not_be_is_said(one: Path, tmp_path: Path) -> None:
    with pytest.raises(SkvError, match=r"one token's; expected those of 5\. Session\(folder, num_logits=5\)"):
        Speculation(Session(one), PromptLookup(4))
    session = Session(one, num_logits=5)
    with pytest.raises(SkvError, match="can't be padded"):
        session.generate([[5, 6], [7]])
    assert session.generate([[5, 6], [8, 7]], max_new_tokens=3)
    with pytest.raises(SkvError, match=r"input_ids|cache"):
        list(Speculation(session, PromptLookup(4)).stream([[5]], cache=session.cache(2)))
    with pytest.raises(SkvError, match="tokens to guess"):
        PromptLookup(0)
    with pytest.raises(SkvError, match="vocab_size; got 96; expected 97"):
        DraftModel(session, 4, VOCAB + 1)
    for wrong in (0, 1.5, 1 << 20):
        with pytest.raises(SkvError, match="num_logits"):
            Session(one, num_logits=wrong)  # type: ignore[arg-type]
    with pytest.raises(SkvError, match="total length"):
        list(Speculation(session, PromptLookup(4)).stream([[5] * (CONTEXT + 1)]))


def test_the_command_writes_the_same_text_with_guesses(tmp_path: Path) -> None:
    folder = Tiny(EXACT).write_all(tmp_path / "model", eos_token_id=[])
    text = generate_text(folder, "Anne Elliot, Anne Elliot", max_new_tokens=90).text
    for options in (["--prompt-lookup", "4"], ["--draft", str(folder), "--draft-tokens", "3"]):
        command = ["generate", str(folder), "--prompt", "Anne Elliot, Anne Elliot", "--max-new-tokens", "90", *options]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
        assert result.stdout.rstrip("\n") == text and "guesses right" in result.stderr
    with pytest.raises(SkvError, match="draft; got prompt_lookup too"):
        generate_text(folder, "Anne", prompt_lookup=4, draft=folder)
