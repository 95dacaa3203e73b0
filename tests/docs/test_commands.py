"""Every command in README, docs and help texts is understood by the command line, options and values included; those of
the pages run, too, on a tiny model."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from source_graphs import SourceGraph
from tiny_models import ROOT, make_tiny, write_tokenizer

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


# They run, too: on a tiny model, page by page, each with what the ones before it have left.

PARSED = {
    "serve": "it does not end; tests/serving runs it",
    "--execution-provider cuda": "it needs a GPU",
    "--cuda-arch 90": "it needs a library with the CUDA kernels; tests/cuda/test_nvrtc.py compiles with one",
    "--level op": "tests/docs/test_readme.py runs it, on the demo model",
    "--compress-prompt 16": "it names more layers than the tiny model has; tests/runtime runs others",
    "--ray auto": "it needs a cluster; tests/evaluation/test_ray_workers.py has one",
}
"""Commands that are parsed alone, by what is in them, and why."""
QUICKER = {
    "analyze": ["--windows", "1", "--window", "192", "--choices", "2,4"],
    "calibrate": ["--windows", "1", "--window", "128"],
    "quality": ["--windows", "1", "--window", "480"],
    "quantize": ["--windows", "1", "--window", "64", "--force"],
    "model": ["--force"],
    "verify": ["--windows", "1", "--window-tokens", "160", "--max-ppl-increase", "9", "--checkpoint", "CHECKPOINT"],
}
"""What is added, so that a run is short, and may be repeated. The tiny model is noise, whose quality means nothing."""
WITHOUT_CHECKPOINT = ("analyze", "calibrate", "model", "quality")
"""Commands that take the demo model where none is given: here a CHECKPOINT is."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the pages' commands name."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install '.[dev]'")
    from transformers import AutoModelForCausalLM

    from skv_export.export.pipeline import export_model

    folder = tmp_path_factory.mktemp("stage")
    checkpoint = make_tiny(folder / "CHECKPOINT", "llama", max_position_embeddings=1 << 17)
    write_tokenizer(checkpoint, 96)
    (checkpoint / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}[")
    export_model(checkpoint, out=folder / "demo-model", progress=lambda phase, fraction: None)
    for name in ("DIR", "SMALLER"):
        shutil.copytree(folder / "demo-model", folder / name)
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])
    for name in ("LORA", "FOLDER"):
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), config).save_pretrained(folder / name)
    SourceGraph().write(folder / "genai")
    return folder


def runnable(line: str) -> list[str] | None:
    """The words of a command as they run on the stage; None where it is parsed alone."""
    if any(f" {part} " in f"{line.partition('#')[0]} " for part in PARSED):
        return None
    words = shlex.split(line, comments=True)[1:]
    if words[0] in WITHOUT_CHECKPOINT and (len(words) == 1 or words[1].startswith("-")):
        words.insert(1, "CHECKPOINT")
    return [*words, *QUICKER.get(words[0], ())]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page.read_text())], ids=lambda page: page.name)
def test_commands_of_a_page_run(
    page: Path, stage: Path, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(stage, tmp_path, dirs_exist_ok=True, copy_function=os.link)
    monkeypatch.chdir(tmp_path)
    ran = 0
    for line in commands_of(page.read_text(encoding="utf-8")):
        words = runnable(line)
        if words is not None:
            done = CliRunner().invoke(main, words, input="Hello\n" if words[0] == "chat" else None)
            assert done.exit_code == 0, (line, words, done.output, done.exception)
            ran += 1
    assert ran


def test_what_is_parsed_alone_is_on_a_page() -> None:
    for part in PARSED:
        assert any(f" {part} " in f"{line} " for _, line in COMMANDS), part
    assert sum(runnable(line) is None for _, line in COMMANDS) <= 12
