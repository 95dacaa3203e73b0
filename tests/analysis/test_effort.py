"""What a measurement takes, and when there is none: said before it starts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from skv_export.analysis import effort, pipeline
from skv_export.analysis.pipeline import MeasureOptions
from skv_export.checkpoints.checkpoint import Checkpoint
from skv_export.cli.analyze import analyze_command


@pytest.fixture
def with_tokenizer(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny checkpoint that looks as if it could be run on text."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_more_windows_take_longer(with_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effort, "_speed", lambda: 1e9)
    opened = Checkpoint.open(with_tokenizer)
    one = effort.estimate(opened, MeasureOptions(windows=1, confirm_windows=0))
    four = effort.estimate(opened, MeasureOptions(windows=4, confirm_windows=0))
    confirmed = effort.estimate(opened, MeasureOptions(windows=1))
    assert four.seconds == pytest.approx(4 * one.seconds) and confirmed.seconds > one.seconds > 0
    assert "about" in one.line and "--no-measure" in one.line


def test_obstacles_are_named(
    with_tokenizer: Path, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no tokenizer" in effort.estimate(Checkpoint.open(tiny_checkpoint("llama")), MeasureOptions()).line
    monkeypatch.setattr(effort, "_available_bytes", lambda: 1.0)
    assert "memory needed" in effort.estimate(Checkpoint.open(with_tokenizer), MeasureOptions()).obstacle
    monkeypatch.setattr(effort.importlib.util, "find_spec", lambda name: None if name == "torch" else object())
    assert "torch not installed" in effort.estimate(Checkpoint.open(with_tokenizer), MeasureOptions()).obstacle


def test_the_command_keeps_to_weights_where_measuring_would_take_too_long(
    with_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effort, "_speed", lambda: 1.0)
    done = CliRunner().invoke(analyze_command, [str(with_tokenizer), "--context", "4k"])
    assert done.exit_code == 0, done.output
    assert "over half an hour" in done.output and "from weights alone" in done.output


def test_a_file_to_keep_it_in_asks_for_a_measurement(
    with_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is done must not depend on how busy the machine is: what is in the file may be all of it."""
    monkeypatch.setattr(effort, "_speed", lambda: 1.0)
    asked = []
    monkeypatch.setattr(pipeline, "_measure", lambda *arguments: asked.append(arguments) or None)
    command = [str(with_tokenizer), "--context", "4k", "--state", str(tmp_path / "state.jsonl")]
    CliRunner().invoke(analyze_command, command)
    assert len(asked) == 1
    done = CliRunner().invoke(analyze_command, [*command, "--no-measure"])
    assert done.exit_code == 0 and len(asked) == 1, done.output
    (with_tokenizer / "tokenizer.json").unlink()
    done = CliRunner().invoke(analyze_command, command)
    assert done.exit_code != 0 and str(done.exception).startswith("--state: the checkpoint has no tokenizer")


def test_the_fastest_of_several_products_is_the_machines_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 5.0, 5.0, 5.5, 5.5, 5.6, 6.0, 9.0, 9.0, 9.2, 9.2, 9.3, 9.3, 10.0, 10.0, 11.0])
    monkeypatch.setattr(effort.time, "perf_counter", lambda: next(times))
    assert effort._speed() == pytest.approx(2 * 768**3 / 0.1)


def test_a_measurement_that_was_asked_for_and_cannot_be_is_an_error(tiny_checkpoint: Callable[..., Path]) -> None:
    done = CliRunner().invoke(analyze_command, [str(tiny_checkpoint("llama")), "--measure"])
    assert done.exit_code != 0 and "the checkpoint has no tokenizer" in str(done.exception)


def test_a_card_answers_how_long_a_context_fits(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = str(tiny_checkpoint("llama"))
    done = CliRunner().invoke(analyze_command, [folder, "--gpu", "rtx4090", "--weights", "int4", "--batch", "8"])
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.output.splitlines()]
    rows = dict(line for line in lines if len(line) == 2 and line[0] in ("fp16", "int8"))
    assert int(rows["int8"].replace(",", "")) > int(rows["fp16"].replace(",", "")) > 1000
    assert "recommended " in done.output
    both = CliRunner().invoke(analyze_command, [folder, "--gpu", "rtx4090", "--memory", "2GiB"])
    assert both.exit_code != 0 and "--gpu and --memory" in str(both.exception)
