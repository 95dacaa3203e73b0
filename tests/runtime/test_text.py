"""Text piece by piece: stop strings, why it ends, interrupts, and caches that know what they hold."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from tiny_graph import EXACT, SMALL, Tiny
from tokenizers import AddedToken, Tokenizer, decoders, models

from skv_export.errors import SkvError
from skv_export.runtime.prompt_cache import PromptCache
from skv_export.runtime.sampling import Sampling
from skv_export.runtime.session import Session
from skv_export.runtime.text import TextStream, generate_text

pytestmark = pytest.mark.usefixtures("library")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Tiny().write_all(tmp_path_factory.mktemp("tiny"), eos_token_id=[])


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return Session(Tiny(EXACT).write_all(tmp_path_factory.mktemp("exact"), eos_token_id=[]))


@pytest.mark.parametrize(("start", "length"), [(0, 1), (3, 2), (7, 5), (38, 2)])
def test_a_text_ends_before_a_stop_string(folder: Path, start: int, length: int) -> None:
    whole = generate_text(folder, "Anne", max_new_tokens=40).text
    stop, pieces = whole[start : start + length], []
    result = generate_text(folder, "Anne", max_new_tokens=40, stop=["never", stop], on_text=pieces.append)
    assert result.text == "".join(pieces) == whole[: whole.index(stop)]
    assert result.stop_reason == "stop" and "stopped by a stop string" in result.summary()
    assert len(result.tokens) == whole.index(stop) + length  # a token a character: none is generated in vain


def test_the_first_of_several_stop_strings_ends_the_text(folder: Path) -> None:
    whole = generate_text(folder, "Anne", max_new_tokens=40).text
    stops = [whole[9:12], whole[6:8], whole[:2] + "\0"]
    first = min(whole.index(stop) for stop in stops[:2])
    assert generate_text(folder, "Anne", max_new_tokens=40, stop=stops).text == whole[:first]


def test_what_could_begin_a_stop_string_comes_after_all_if_it_does_not(folder: Path) -> None:
    whole = generate_text(folder, "Anne", max_new_tokens=12).text
    pieces: list[str] = []
    stop = whole[-3:] + "\0"
    result = generate_text(folder, "Anne", max_new_tokens=12, stop=[stop], on_text=pieces.append)
    assert result.text == "".join(pieces) == whole and result.stop_reason == "max_new_tokens"
    assert len(pieces[-1]) == 3


@pytest.mark.parametrize("stop", [[""], "abc"])
def test_stop_strings_that_are_none_are_refused(folder: Path, stop: Any) -> None:
    with pytest.raises(SkvError, match=r"stop; got .*expected (strings, none of them empty|a list of texts)"):
        generate_text(folder, "Anne", stop=stop)


def test_options_of_a_template_need_a_chat(folder: Path) -> None:
    with pytest.raises(SkvError, match="add --chat"):
        generate_text(folder, "Anne", system="Be brief.")


def test_an_interrupt_keeps_what_has_come(folder: Path) -> None:
    session = Session(folder)
    stream = TextStream(session, PromptCache(session), "Anne", max_new_tokens=40)
    pieces = iter(stream)
    first = list(itertools.islice(pieces, 3))
    with pytest.raises(KeyboardInterrupt):
        pieces.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    result = stream.generation
    assert (result.stop_reason, result.text, len(result.tokens)) == ("interrupted", "".join(first), 3)
    assert result.summary().endswith("stopped by an interrupt") and "3 new" in result.summary()


# Caches that know what they hold.


class Turns:
    """Runs prompts through one cache and counts the tokens that each took."""

    def __init__(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        self.session, self.prompts, self.run_tokens = session, PromptCache(session), 0
        run = session.graph.run

        def counted(cache: Any, ids: Any, *rest: Any) -> Any:
            self.run_tokens += ids.shape[1]
            return run(cache, ids, *rest)

        monkeypatch.setattr(session.graph, "run", counted)

    def say(self, prompt: str, count: int = 6, **options: Any) -> tuple[str, int]:
        """The text, and how many tokens ran beyond those that were generated."""
        self.run_tokens = 0
        stream = TextStream(self.session, self.prompts, prompt, max_new_tokens=count, **options)
        text = "".join(stream)
        return text, self.run_tokens - (len(stream.generation.tokens) - 1)


def alone(session: Session, prompt: str, count: int = 6, **options: Any) -> str:
    return "".join(TextStream(session, PromptCache(session), prompt, max_new_tokens=count, **options))


def test_a_prompt_that_goes_on_costs_what_is_new(exact: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(exact, monkeypatch)
    first, cost = turns.say("Anne Elliot was")
    assert cost == len("Anne Elliot was") and first == alone(exact, "Anne Elliot was")
    whole = "Anne Elliot was" + first + " then"
    second, cost = turns.say(whole)
    assert second == alone(exact, whole)
    assert cost == 1 + len(" then")  # the last token of the answer had not been appended
    third, cost = turns.say(whole + second)
    assert third == alone(exact, whole + second) and cost == 1


def test_what_differs_is_taken_back(exact: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(exact, monkeypatch)
    turns.say("Anne Elliot was", 4)
    text, cost = turns.say("Anne Elliot is not")
    assert text == alone(exact, "Anne Elliot is not") and cost == len("is not")
    again, cost = turns.say("Anne Elliot is not")  # the same prompt needs its last token's logits
    assert again == text and cost == 1
    other, cost = turns.say("Quite another")
    assert other == alone(exact, "Quite another") and cost == len("Quite another")


def test_beyond_what_a_quantized_cache_takes_back_the_prompt_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(Tiny(SMALL).write_all(tmp_path, eos_token_id=[]))
    turns = Turns(session, monkeypatch)
    long = "Half an hour later " * 12
    turns.say(long)
    changed = long[:40] + "!" + long[41:]
    text, cost = turns.say(changed)
    assert text == alone(session, changed) and cost == len(changed)
    text, cost = turns.say(long[:40])
    assert text == alone(session, long[:40])


def test_a_stopped_and_a_sampled_answer_go_on_too(exact: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(exact, monkeypatch)
    stop = alone(exact, "Sir Walter", 10)[4:6]
    first, _ = turns.say("Sir Walter", 10, stop=[stop])
    prompt = "Sir Walter" + first + ". And"
    assert turns.say(prompt)[0] == alone(exact, prompt)
    sampling = Sampling(temperature=1.0, seed=5)
    text, _ = turns.say(prompt, sampling=sampling)
    assert text == alone(exact, prompt, sampling=sampling)


def test_an_answer_that_the_tokenizer_would_cut_otherwise_is_not_run_again(
    exact: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model writes two letters one by one that its tokenizer joins; between turns stands a special token."""
    prompt = exact.tokenizer.encode("Anne").ids
    answer = [int(t[0]) for t in exact.stream([prompt], max_new_tokens=6)]
    letters = {i: text for text, i in exact.tokenizer.get_vocab().items()}
    joined, end = max(set(letters) - {*answer, *prompt}), min(set(letters) - {*answer, *prompt, 0})
    pair = letters[answer[2]] + letters[answer[3]]
    vocabulary = {letters[i]: i for i in letters if i not in (joined, end)} | {pair: joined}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(letters[answer[2]], letters[answer[3]])]))
    tokenizer.decoder = decoders.Fuse()
    session = Session(Tiny(EXACT).write_all(tmp_path, eos_token_id=[]))
    session.tokenizer = tokenizer  # type: ignore[misc]  # a cached property
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    turns = Turns(session, monkeypatch)
    text, _ = turns.say("Anne")
    assert joined in tokenizer.encode(text).ids and joined not in turns.prompts.tokens
    special = tokenizer.token_to_id("<end>")
    new = turns.prompts.begin("Anne" + text + "<end>Bob")
    assert new == [answer[-1], special, *tokenizer.encode("Bob").ids]
    assert turns.prompts.tokens == [*prompt, *answer, *new[1:]]


def test_reset_forgets_everything(exact: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(exact, monkeypatch)
    turns.say("Anne")
    turns.prompts.reset()
    assert turns.say("Anne")[1] == 4


def test_an_end_token_stands_where_the_template_wants_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Session(Tiny(EXACT).write_all(tmp_path / "plain", eos_token_id=[]))
    first = [int(t[0]) for t in plain.stream([plain.tokenizer.encode("Anne").ids], max_new_tokens=6)]
    end = next(token for i, token in enumerate(first[1:], 1) if token not in first[:i])
    session = Session(Tiny(EXACT).write_all(tmp_path / "ends", eos_token_id=[end]))
    turns = Turns(session, monkeypatch)
    text, _ = turns.say("Anne", 20)
    assert len(text) == first.index(end) + 1  # the test's tokenizer has no special tokens: the end is a character
    prompt = "Anne" + text + "Bob"
    assert turns.say(prompt)[0] == alone(session, prompt)
