"""`optimum-cli export skv` is `skv-export model`: found by optimum, the same options, folder and errors."""

from __future__ import annotations

import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from tiny_models import ROOT

from skv_export.cli.main import model
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.runtime.session import Session
from skv_export.spec.recipe import Recipe

pytest.importorskip("optimum.commands", reason="optimum is not installed: pip install '.[optimum]'")

from skv_export.integrations.optimum import SkvExportCommand, arguments


def optimum_cli(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs optimum's own command line; in the source tree, where its namespace finds the registration."""
    start = [sys.executable, "-m", "optimum.commands.optimum_cli"]
    return subprocess.run([*start, *command], capture_output=True, text=True, check=False, cwd=ROOT)


def test_optimum_lists_it() -> None:
    listing = optimum_cli("export", "--help")
    assert listing.returncode == 0 and "skv" in listing.stdout, listing.stderr
    options = optimum_cli("export", "skv", "--help").stdout
    for option in model.params:
        shown = {word.strip(",") for word in options.split()}
        assert option.name == "checkpoint" or {*option.opts, *option.secondary_opts} <= shown | {"--out"}, option.name


OPTIONS = [option for option in model.params if isinstance(option, click.Option) and option.name != "out"]
VALUES = {
    "size": "32k", "share": "0.5%", "integer": "3", "float": "3.25", "float range": "3.25", "integer range": "64",
    "text": "some", "path": "x", "file": "figures.json",
}  # fmt: skip
"""What an option is given, by the name of its type."""


def lines(option: click.Option) -> list[list[str]]:
    """Every way to write an option."""
    if option.is_flag:
        return [[name] for name in (*option.opts, *option.secondary_opts)]
    if option.count:
        return [[name] * 2 for name in option.opts]
    kind = option.type
    values = [str(kind.choices[-1])] if isinstance(kind, click.Choice) else [VALUES[kind.name]]
    return [[name, *values] * (2 if option.multiple else 1) for name in option.opts]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_every_option_means_what_it_means_to_model(
    option: click.Option, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both command lines are parsed by `model` itself: its parameters, and what its callbacks were told, are equal."""
    monkeypatch.chdir(tmp_path)
    parser = ArgumentParser()
    SkvExportCommand.parse_args(parser)
    told: list[tuple[str, object]] = []
    for other in OPTIONS:
        if other.callback is not None:
            monkeypatch.setattr(other, "callback", lambda ctx, param, value: told.append((str(param.name), value)))
    for line in lines(option):
        found = []
        for given in (["llama", "--out", "out", *line], arguments(parser.parse_args(["llama", "out", *line]))):
            told.clear()
            context = model.make_context("model", list(given))
            found.append((context.params, sorted(told, key=str)))
        assert found[0] == found[1]
        assert arguments(parser.parse_args(["llama", "out", *line]))[3:], line


def test_nothing_is_handed_on_that_was_not_given() -> None:
    parser = ArgumentParser()
    SkvExportCommand.parse_args(parser)
    assert arguments(parser.parse_args(["llama", "out"])) == ["llama", "--out", "out"]


def test_it_exports(tiny_checkpoint: Callable[..., Path], library: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = optimum_cli("export", "skv", str(tiny_checkpoint("llama")), str(out), "--k-bits", "3", "--v-bits", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    layer = ModelConfig.load(out).layers[0]
    assert (layer.key.bits, layer.value.bits) == (3, 2)
    assert Recipe.load(out / "recipe.toml").default.name == "K3V2"
    assert len(Session(out).generate([[5, 6, 7]], max_new_tokens=4)[0]) <= 4


def test_what_can_not_be_exported_is_said_as_by_skv_export(tmp_path: Path) -> None:
    result = optimum_cli("export", "skv", str(tmp_path / "nothing"), str(tmp_path / "out"))
    assert result.returncode == 1
    assert "no such file or folder" in result.stderr and "Traceback" not in result.stderr
    assert optimum_cli("export", "skv", "x", "y", "--k-bits", "7").returncode == 2
