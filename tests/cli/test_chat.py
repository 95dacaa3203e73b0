"""The command `chat`: turns on one cache, its commands, and a terminal with Ctrl-C."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from stalling import stalling
from tiny_graph import EXACT, Tiny

from skv_export.cli.main import main
from skv_export.errors import SkvError
from skv_export.runtime.conversation import Conversation
from skv_export.runtime.session import Session

pytestmark = pytest.mark.usefixtures("library")
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'forbidden' %}{{ raise_exception('Not that.') }}{% endif %}"
    "[{{ m.role[0] }}: {{ m.content }}]{% endfor %}{% if add_generation_prompt %}[a: {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Tiny(EXACT).write_all(tmp_path_factory.mktemp("tiny"), eos_token_id=[])
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def answer(session: Session, messages: list[dict[str, str]], count: int = 8) -> str:
    """What the model says to messages, from nothing."""
    (tokens,) = session.generate([session.tokenizer.encode(session.chat_prompt(messages)).ids], max_new_tokens=count)
    return session.tokenizer.decode(tokens)


def chat(folder: Path, *lines: str, flags: tuple[str, ...] = ()) -> Any:
    arguments = ["chat", str(folder), "--max-new-tokens", "8", *flags]
    return CliRunner().invoke(main, arguments, input="".join(line + "\n" for line in lines))


def test_every_answer_knows_what_was_said(folder: Path) -> None:
    session = Session(folder)
    result = chat(folder, "Hello", "", "How are you?", flags=("--system", "Be kind."))
    assert result.exit_code == 0, result.output
    messages = [{"role": "system", "content": "Be kind."}]
    for question, said in zip(("Hello", "How are you?"), result.stdout.splitlines(), strict=True):
        messages.append({"role": "user", "content": question})
        assert said == answer(session, messages)
        messages.append({"role": "assistant", "content": said})
    assert result.stderr.count("Cut at 8 tokens") == 2


def test_only_what_is_new_runs_through_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, counts = Session(folder), []
    run = session.graph.run

    def counted(cache: Any, ids: Any, *rest: Any) -> Any:
        counts.append(ids.shape[1])
        return run(cache, ids, *rest)

    monkeypatch.setattr(session.graph, "run", counted)
    conversation = Conversation(session, system="Be kind.")
    first = "".join(conversation.say("Hello", max_new_tokens=8))
    assert counts == [len("[s: Be kind.][u: Hello][a: "), *[1] * 7]
    counts.clear()
    assert len("".join(conversation.say("Again", max_new_tokens=8))) == 8
    assert counts == [len(first[-1:] + "][u: Again][a: "), *[1] * 7]
    conversation.reset()
    counts.clear()
    assert "".join(conversation.say("Hello", max_new_tokens=8)) == first
    assert counts[0] == len("[s: Be kind.][u: Hello][a: ")


def test_commands(folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    result = chat(
        folder, "Hello", "/stats", f"/save {saved}", "/reset", "/stats", "/system Be brief.", "Hello", "/sats", "/save",
        f"/save {tmp_path}/none/x", "/help", "/exit", "never said",
    )  # fmt: skip
    session = Session(folder)
    first, second = result.stdout.splitlines()
    hello = {"role": "user", "content": "Hello"}
    assert first == answer(session, [hello])
    assert second == answer(session, [{"role": "system", "content": "Be brief."}, hello])
    assert json.loads(saved.read_text()) == {"messages": [hello, {"role": "assistant", "content": first}]}
    held = len("[u: Hello][a: ") + 7
    for said in (
        f"2 messages; {held} of 512 tokens in the cache", "last answer: 14 prompt tokens", "2 messages written to",
        "Forgotten.", "0 messages; 0 of 512 tokens", "/sats: no such command. sats: did you mean stats?",
        "/save: no file", "its folder does not exist", "/reset         forget what was said",
    ):  # fmt: skip
        assert said in result.stderr, said


def test_lines_can_go_on_and_begin_with_a_slash(folder: Path) -> None:
    session = Session(folder)
    one, two = chat(folder, "//etc\\", "is a", flags=()).stdout, chat(folder, "a\\", "b").stdout
    assert one.rstrip("\n") == answer(session, [{"role": "user", "content": "/etc\nis a"}])
    assert two.rstrip("\n") == answer(session, [{"role": "user", "content": "a\nb"}])


def test_what_cannot_be_said_changes_nothing(folder: Path) -> None:
    session = Session(folder)
    result = chat(folder, "forbidden", "x" * 600, "Hello")
    assert result.exit_code == 0
    assert result.stdout.rstrip("\n") == answer(session, [{"role": "user", "content": "Hello"}])
    assert "refuses these messages; got Not that." in result.stderr and "the model's context" in result.stderr


def test_a_full_context_is_said(folder: Path) -> None:
    result = chat(folder, "x" * 480, flags=("--max-new-tokens", "100"))
    assert "The context is full: /reset begins again." in result.stderr
    assert "at most its capacity of 40" in chat(folder, "x" * 60, flags=("--max-length", "40")).stderr


def test_a_model_without_a_template_is_refused_before_a_word(tmp_path: Path) -> None:
    result = chat(Tiny().write_all(tmp_path), "Hello")
    assert result.exit_code == 1 and "no chat template" in result.output


def test_an_answer_that_is_broken_off_is_kept_as_far_as_it_came(folder: Path) -> None:
    session = Session(folder)
    conversation = Conversation(session)
    pieces = conversation.say("Hello", max_new_tokens=50)
    begun = next(pieces) + next(pieces)
    pieces.close()
    assert conversation.messages == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": begun}]
    assert conversation.last is not None and conversation.last.stop_reason == "interrupted"
    following = [*conversation.messages, {"role": "user", "content": "Go on"}]
    assert "".join(conversation.say("Go on", max_new_tokens=8)) == answer(session, following)
    with pytest.raises(SkvError):
        list(conversation.say("forbidden"))
    assert len(conversation.messages) == 4


class Terminal:
    """A command in a pseudo-terminal."""

    def __init__(self, *command: str) -> None:
        self.master, slave = pty.openpty()
        options: dict[str, Any] = {"stdin": slave, "stdout": slave, "stderr": slave, "start_new_session": True}
        self.process = subprocess.Popen(command, **options, preexec_fn=lambda: _take(slave))
        os.close(slave)
        self.seen = ""

    def wait_for(self, text: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.master], [], [], max(0, end - time.monotonic()))
            assert ready, self.seen
            self.seen += os.read(self.master, 4096).decode(errors="replace")
        self.seen = self.seen.partition(text)[2]

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def interrupt_until(self, text: str, seconds: float = 60) -> None:
        """Ctrl-C until `text` is seen: a line editor that has just written its prompt may miss the first."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            self.type("\x03")
            while text not in self.seen and select.select([self.master], [], [], 1)[0]:
                self.seen += os.read(self.master, 4096).decode(errors="replace")
        self.seen = self.seen.partition(text)[2]


def _take(terminal: int) -> None:
    """Makes a terminal the one whose Ctrl-C a process gets."""
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


def test_in_a_terminal_ctrl_c_ends_the_answer_and_ctrl_d_the_conversation(folder: Path) -> None:
    terminal = Terminal(sys.executable, "-c", stalling(5, "(ready)"), "chat", str(folder), "--max-new-tokens", "400")
    try:
        terminal.wait_for("Ctrl-D ends.")
        terminal.wait_for("> ")
        terminal.type("Hello\n")
        terminal.wait_for("(ready)")
        terminal.type("\x03")
        terminal.wait_for("> ")
        terminal.type("/stats\n")
        terminal.wait_for("2 messages; ")
        terminal.wait_for("stopped by an interrupt")
        terminal.wait_for("> ")
        terminal.interrupt_until("/exit ends the conversation.")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.master)
