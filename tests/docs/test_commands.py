"""Every command in README, docs and help texts is understood by the command line, options and values included."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from tiny_models import ROOT

from skv_export.cli.main import main

PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])


def commands_of(text: str) -> list[str]:
    """The lines of code that run skv-export, continued lines joined, comments left out."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return re.findall(r"^    (?:\$ )?(skv-export .*)$", joined, flags=re.MULTILINE)


def understood(line: str) -> None:
    """Parses a command line as the command would, and runs nothing.

    Raises:
        click.UsageError: It is none.
    """
    words = shlex.split(line, comments=True)[1:]
    command: click.Command = main
    context = main.make_context("skv-export", list(words))
    while isinstance(command, click.Group):
        rest = [*context._protected_args, *context.args]
        if not rest:
            return
        name, found, left = command.resolve_command(context, rest)
        assert found is not None
        command, context = found, found.make_context(name, left, parent=context)


COMMANDS = [(page.name, line) for page in PAGES for line in commands_of(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page}: {line[:60]}" for page, line in COMMANDS])
def test_commands_of_the_pages_are_understood(
    page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    understood(line)


def test_examples_in_help_texts_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = 0
    context = click.Context(main)
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        for each in (command, *(command.commands.values() if isinstance(command, click.Group) else ())):
            for line in re.findall(r"^\s*(skv-export .*)$", each.help or "", flags=re.MULTILINE):
                understood(line)
                found += 1
    assert found > 20 and len(COMMANDS) > 20


def test_what_is_not_understood_is_found() -> None:
    for line in ("skv-export model x --no-such", "skv-export generate", "skv-export verify x --level nothing"):
        with pytest.raises(click.UsageError):
            understood(line)


def test_messages_that_the_troubleshooting_names_are_in_the_code() -> None:
    text = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    table = text.partition("## When something goes wrong")[2].partition("## Words")[0]
    sources = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "skv_export").rglob("*.py"))
    messages = [m for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for m in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 12
    for message in messages:
        for part in re.split(r"\s*\.\.\.\s*", message):
            assert part.strip(" ;:,") in sources, message
