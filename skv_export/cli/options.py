"""Options that several commands have in common; files to write are checked before any work."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from skv_export.progress import set_quiet
from skv_export.spec.recipe import DTYPES

DEBUG = "skv_export.debug"
"""Key of --debug in a click context's ``meta``, which all of a command line's contexts share."""
_Command = TypeVar("_Command", bound=Callable[..., Any])


class Number(click.FloatRange):
    """A finite number in a range: click's own ranges let a NaN pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Returns the number."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is no finite number", param, ctx)
        return number


class PathOf(click.ParamType[Any]):
    """A path, of which nothing but its name is checked while the command line is read.

    Args:
        what: What it is, for the message.
    """

    name = "path"

    def __init__(self, what: str) -> None:
        self._what = what

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Returns the path, ``~`` expanded.

        Raises:
            SkvError: No file system could hold such a name.
        """
        from skv_export.paths import to_path

        return to_path(value, self._what)


class OutputFile(click.ParamType[Any]):
    """A file to write: its place is checked while the command line is read; an old one is replaced at the end."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Returns the path.

        Raises:
            SkvError: It can't be written.
        """
        from skv_export.model_folder.output import check_file

        return check_file(value)


def debug_option(command: _Command) -> _Command:
    """Adds --debug."""

    def remember(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        ctx.meta[DEBUG] = value or ctx.meta.get(DEBUG, False)

    text = "Show the traceback of an error."
    return click.option("--debug", is_flag=True, expose_value=False, is_eager=True, callback=remember, help=text)(
        command
    )


def progress_options(command: _Command) -> _Command:
    """Adds --quiet and --debug, for commands that show their progress."""

    def remember(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        set_quiet(value)

    text = "Show no progress on standard error."
    quiet = click.option("--quiet", is_flag=True, expose_value=False, callback=remember, help=text)
    return quiet(debug_option(command))


def placement_options(command: _Command) -> _Command:
    """Adds --device, --dtype and --device-map: where PyTorch runs the checkpoint's model, and how it computes."""
    options = (
        click.option("--device", default="cpu", show_default=True, help="Of PyTorch's model: cpu, cuda, cuda:1, ..."),
        click.option(
            "--dtype", default="fp32", show_default=True, type=click.Choice(DTYPES), help="Of PyTorch's model."
        ),
        click.option(
            "--device-map", help="Instead of --device: auto spreads PyTorch's model over GPUs, memory and disk."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command
