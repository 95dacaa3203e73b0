"""Options that several commands have in common; files to write are checked before any work."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from skv_export.progress import set_quiet
from skv_export.spec.recipe import DTYPES

DEBUG = "skv_export.debug"
"""Key of --debug in a click context's ``meta``, which all of a command line's contexts share."""
STDOUT = Path("-")
"""``--json -``: the figures go to standard output, and what is printed otherwise to standard error."""
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


class Provider(click.ParamType[Any]):
    """An execution provider: ``cpu``, ``cuda``, or ``cuda:N`` for the N-th GPU."""

    name = "cpu|cuda|cuda:N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns the name."""
        from skv_export.errors import SkvError
        from skv_export.runtime.providers import device_of

        try:
            device_of(value)
        except SkvError:
            self.fail(f"{value!r} is not one of cpu, cuda, cuda:N", param, ctx)
        return str(value)


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


def revision_option(command: _Command) -> _Command:
    """Adds ``--revision``."""
    return click.option("--revision", help="Branch, tag or commit of a hub id.  [default: main]")(command)


def adapter_option(command: _Command) -> _Command:
    """Adds --adapter."""
    text = "Folder of a LoRA adapter (peft) to merge into CHECKPOINT's weights."
    return click.option("--adapter", type=PathOf("--adapter"), help=text)(command)


def default_name(source: str, bits: str) -> str:
    """The folder that a command writes without --out: the checkpoint's whole name, dots included, and its bits."""
    from skv_export.paths import to_path

    path = to_path(source, "checkpoint")
    if path.is_dir():
        name = path.resolve().name
    else:
        name = path.stem if path.suffix.lower() in (".gguf", ".onnx", ".safetensors") else path.name
    return f"{name.lstrip('-.')[:100] or 'model'}-{bits}".lower()


class JsonFile(OutputFile):
    """An ``OutputFile``, or ``-`` for standard output."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Returns the path, or ``STDOUT``.

        Raises:
            SkvError: It can't be written.
        """
        return STDOUT if str(value) == "-" else super().convert(value, param, ctx)


def json_option(what: str) -> Callable[[_Command], _Command]:
    """Adds --json, parameter ``json_file``: a file for ``what``, or standard output."""
    return click.option("--json", "json_file", type=JsonFile(), help=f"Write {what} as JSON; - is standard output.")


def say(text: str, json_file: Path | None = None) -> None:
    """Prints a line on standard output, or on standard error where that is the JSON's."""
    click.echo(text, err=json_file == STDOUT)


def write_json(json_file: Path | None, values: Any) -> None:
    """Writes figures where --json wants them, if it is given; ``values`` may be JSON's text already."""
    if json_file is None:
        return
    text = values if isinstance(values, str) else json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    if json_file == STDOUT:
        click.echo(text, nl=False)
        return
    from skv_export.model_folder.output import write_text

    write_text(json_file, text)


def debug_option(command: _Command) -> _Command:
    """Adds --debug and --verbose."""

    def remember(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        ctx.meta[DEBUG] = value or ctx.meta.get(DEBUG, False)

    def log(ctx: click.Context, param: click.Parameter, value: int) -> None:
        if value:
            ctx.with_resource(_log_to_stderr(logging.INFO if value == 1 else logging.DEBUG))

    debug = click.option(
        "--debug", is_flag=True, expose_value=False, is_eager=True, callback=remember, help="Show an error's traceback."
    )
    text = "Log what is done to standard error; -vv logs more."
    verbose = click.option("-v", "--verbose", count=True, expose_value=False, is_eager=True, callback=log, help=text)
    return verbose(debug(command))


@contextlib.contextmanager
def _log_to_stderr(level: int) -> Iterator[None]:
    """Shows what the package logs, while a command runs; an application sets up the logger ``skv_export`` itself."""
    logger, handler = logging.getLogger("skv_export"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def exported_model(command: _Command) -> _Command:
    """Adds the argument of commands that run an exported model: a folder, or the hub id of one, with its --revision."""
    return click.argument("folder")(revision_option(command))


class TemplateOption(click.ParamType[Any]):
    """``NAME=VALUE`` for a chat template; the value is JSON, or a string where it is none."""

    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        """Returns name and value."""
        if isinstance(value, tuple):
            return value
        name, sign, text = str(value).partition("=")
        if not (sign and name.isidentifier()):
            self.fail(f"{value!r} is no option such as enable_thinking=false", param, ctx)
        try:
            return name, json.loads(text)
        except ValueError:
            return name, text


def sampling_options(command: _Command) -> _Command:
    """Adds what commands that generate have in common: how tokens are chosen, when it ends, where it runs."""
    options = (
        click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(1)),
        click.option("--temperature", default=0.0, show_default=True, type=Number(0), help="0 = greedy."),
        click.option("--top-k", default=0, show_default=True, type=click.IntRange(0), help="0 = all."),
        click.option("--top-p", default=1.0, show_default=True, type=Number(0, 1, min_open=True)),
        click.option(
            "--min-p", default=0.0, show_default=True, type=Number(0, 1),
            help="Only tokens at least this probable, measured by the most probable one.",
        ),
        click.option(
            "--repetition-penalty", default=1.0, show_default=True, type=Number(0, min_open=True),
            help="Above 1: what is there already becomes less likely.",
        ),
        click.option("--seed", default=0, show_default=True, type=click.IntRange(0)),
        click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times."),
        click.option("--system", help="What the system says first, in the model's chat template."),
        click.option(
            "--template-option", "template_options", multiple=True, type=TemplateOption(),
            help="For the chat template: enable_thinking=false; may be given several times.",
        ),
        click.option("--execution-provider", default="cpu", show_default=True, type=Provider()),
        click.option("--cuda-graph", is_flag=True, help="On a GPU: decode as one captured CUDA graph per token."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def progress_options(command: _Command) -> _Command:
    """Adds --quiet and --debug, for commands that show their progress."""

    def remember(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        set_quiet(value)

    text = "Show no progress on standard error."
    quiet = click.option("--quiet", is_flag=True, expose_value=False, callback=remember, help=text)
    return quiet(debug_option(command))


def device_option(command: _Command) -> _Command:
    """Adds --device: where a model runs layer by layer."""
    text = "Where the layers run: cpu, cuda, cuda:1, ..."
    return click.option("--device", default="cpu", show_default=True, help=text)(command)


def ray_option(command: _Command) -> _Command:
    """Adds --ray: machines that measure windows side by side."""
    text = "Ray cluster that measures windows side by side (extra `ray`): auto, HOST:PORT, ray://HOST:PORT; or local."
    return click.option("--ray", metavar="ADDRESS", help=text)(command)


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
