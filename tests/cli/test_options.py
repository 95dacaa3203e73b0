"""Every option of every command is checked before anything is opened: here nothing is there to be opened."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
import pytest
from click.testing import CliRunner

from skv_export.cli.main import main
from skv_export.cli.target import Share, Size

ABSENT = "./absent"
NUL, LONG = "a\0b", "x" * 300


def commands(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)
        else:
            yield (*path, name), command


def is_number(kind: Any) -> bool:
    return isinstance(kind, click.types.IntParamType | click.types.FloatParamType | Size | Share)


def numbers() -> Iterator[Any]:
    for path, command in commands(main):
        for option in command.params:
            if isinstance(option, click.Option) and is_number(option.type) and not option.count:
                integer = isinstance(option.type, click.types.IntParamType)
                for value in ("-1", "1.5", "x", "") if integer else ("nan", "inf", "x", ""):
                    yield pytest.param(path, option.opts[0], value, id=f"{' '.join(path)} {option.opts[0]}={value}")


def run(path: tuple[str, ...], *arguments: str) -> str:
    """What a command says that is to be refused; those with a required prompt get one."""
    needed = ["--prompt", "x"] if path == ("generate",) and "--prompt" not in arguments else []
    result = CliRunner().invoke(main, [*path, *arguments, *needed])
    assert result.exit_code in (1, 2), result.output
    assert "unexpected" not in result.output and "Traceback" not in result.output
    return result.output


@pytest.mark.parametrize(("path", "option", "value"), list(numbers()))
def test_numbers_out_of_range_are_refused_by_name_first(path: tuple[str, ...], option: str, value: str) -> None:
    said = run(path, *([] if path == ("bench", "attention") else [ABSENT]), option, value)
    assert option in said or option[2:].replace("-", "_") in said
    assert "absent" not in said.partition("Error")[2]


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        (("quality",), ["--configs", ","], "--configs and --baselines; got nothing"),
        (("quality",), ["--configs", "K4V2,K4V4,k4v2"], "K4V2 twice"),
        (("quality",), ["--configs", NUL], "--configs: a null character"),
        (("quality",), ["--configs", LONG], "--configs: too long"),
        (("quality",), ["--text", "/dev/null"], "/dev/null: not a regular file"),
        (("quality",), ["--needle-lengths", "12"], "--needle-lengths"),
        (("analyze",), ["--text", "/dev/null"], "/dev/null: not a regular file"),
        (("analyze",), ["--text", "absent.txt"], "text absent.txt: no such file"),
        (("analyze",), ["--choices", "7"], "bit choices; got"),
        (("analyze",), ["--pairs", "K4V9"], "bit choices; got"),
        (("analyze",), ["--batch", "9999999999"], "--batch"),
        (("analyze",), ["--context", "2T"], "--context"),
        (("analyze",), ["--memory", "0"], "--memory"),
        (("analyze",), ["--max-loss", "0%"], "--max-loss"),
        (("analyze",), ["--budget", "3", "--memory", "1GiB"], "--budget and --memory; got both"),
        (("analyze",), ["--weights", "int4"], "--weights without --memory or --gpu"),
        (("analyze",), ["--score", "measure", "--no-measure"], "--score measure; got --no-measure too"),
        (("model",), ["--budget", "3", "--text", "absent.txt"], "text absent.txt: no such file"),
        (("model",), ["--recipe", NUL], "recipe: a null character"),
        (("model",), ["--out", NUL], "--out: a null character"),
        (("model",), ["--out", LONG, "--dry-run"], "--out: too long"),
        (("calibrate",), ["--text", "absent.txt"], "text absent.txt: no such file"),
        (("calibrate",), ["--text", NUL], "--text: a null character"),
        (("verify",), ["--text", NUL], "--text: a null character"),
        (("bench", "model"), ["--against", LONG], "--against: too long"),
    ],
)
def test_values_that_make_no_sense_are_refused_first(path: tuple[str, ...], arguments: list[str], message: str) -> None:
    assert message in run(path, ABSENT, *arguments)


@pytest.mark.parametrize("name", [NUL, LONG, "~nobody-of-this-name/x"])
@pytest.mark.parametrize(
    "command", ["model", "quality", "analyze", "calibrate", "verify", "generate", "chat", "doctor", "bench model"]
)
def test_names_that_no_file_has_are_refused(command: str, name: str) -> None:
    said = run(tuple(command.split()), name)
    assert any(reason in said for reason in ("null character", "too long", "no such user"))


def test_a_mistyped_command_need_not_be_a_path() -> None:
    for name in (NUL, LONG):
        assert "No such command" in run((), name)
