"""Flags that say how large the cache may be, shared by `analyze` and `model`; and their types."""

from __future__ import annotations

import re
from typing import Any

import click

from skv_export.cli.options import Number, OutputFile, PathOf, ray_option

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class Size(click.ParamType[Any]):
    """A number with a binary unit: 32k, 2GiB, 512M."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Returns the number; what is no size fails with an example."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", str(value).strip().lower())
        if match is None:
            self.fail(f"{value!r} is no size such as 32k or 2GiB", param, ctx)
        size = int(float(match[1]) * _UNITS[match[2]])
        if not 0 < size < 1 << 62:
            self.fail(f"{value!r} is no size that anything has", param, ctx)
        return size


class Numbers(click.ParamType[Any]):
    """Integers separated by commas."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Returns the integers."""
        if isinstance(value, list):
            return value
        if not re.fullmatch(r"\d+(,\d+)*", str(value)):
            self.fail(f"{value!r} is no list such as 2,3,4,8", param, ctx)
        return [int(x) for x in str(value).split(",")]


class Pairs(click.ParamType[Any]):
    """Pairs of bits such as K4V2, separated by commas."""

    name = "pairs"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[tuple[int, int]]:
        """Returns (key, value) bits."""
        if isinstance(value, list):
            return value
        found = [re.fullmatch(r"k(\d+)v(\d+)", part.strip().lower()) for part in str(value).split(",")]
        if not all(found):
            self.fail(f"{value!r} is no list such as K4V2,K4V4", param, ctx)
        return [(int(m[1]), int(m[2])) for m in found if m]


class Share(click.ParamType[Any]):
    """A share: 0.5% or 0.005."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Returns the number."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", str(value).strip())
        if match is None:
            self.fail(f"{value!r} is no share such as 0.5%", param, ctx)
        return float(match[1]) / (100 if match[2] else 1)


TARGET_OPTIONS = (
    "budget", "memory", "gpu", "max_loss", "context", "batch", "measure", "text", "windows", "window", "state", "ray"
)  # fmt: skip
"""Parameters that ``target_options`` adds."""


def target_options(command: Any) -> Any:
    """Adds the flags that say how large the cache may be and how it is measured, the same for `analyze` and `model`."""
    options = [
        click.option(
            "--budget", type=Number(0, min_open=True), help="Effective bits per element.  [default: what K4V2 takes]"
        ),
        click.option(
            "--memory", type=Size(), help="Bytes for the caches of the whole batch; with --weights, of the whole card."
        ),
        click.option("--gpu", help="The card's memory by its name, such as rtx4090.  [with --weights fp16]"),
        click.option("--max-loss", type=Share(), help="The fewest bits with which perplexity rises by less: 0.5%."),
        click.option(
            "--context", type=Size(), help="Tokens at which the cache is counted.  [default: the model's, at most 32k]"
        ),
        click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences."),
        click.option(
            "--measure/--no-measure",
            default=None,
            help="Run the model, or not.  [default: where its weights are at hand and it takes half an hour at most]",
        ),
        click.option("--text", type=PathOf("--text"), help="Plain text to measure on.  [default: shipped prose]"),
        click.option(
            "--windows", type=click.IntRange(1), default=2, show_default=True, help="Windows of text to measure on."
        ),
        click.option("--window", type=click.IntRange(64), default=1024, show_default=True, help="Tokens in each."),
        click.option("--state", type=OutputFile(), help="File that makes a measurement resumable; asks for one."),
    ]
    command = ray_option(command)
    for option in reversed(options):
        command = option(command)
    return command
