"""How commands end when something goes wrong: one message and an exit code, a traceback only with --debug.

1 = bad input or a failure, 2 = wrong usage (click's), 130 and 143 = interrupted by Ctrl-C and by a termination signal.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import importlib.metadata
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import click

from skv_export.errors import SkvError, missing_module
from skv_export.progress import set_quiet, silence_other_bars

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


_AS_PYTHON = warnings.formatwarning
_PACKAGE = Path(__file__).parents[1]


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of ours is for the user: one line, without the place in our code; another's is as Python has it."""
    if Path(filename).is_relative_to(_PACKAGE) and issubclass(category, RuntimeWarning):
        return f"Warning: {' '.join(str(message).split())}\n"
    return _AS_PYTHON(message, category, filename, lineno, line)


@contextlib.contextmanager
def guarded(debug: Callable[[], bool]) -> Iterator[None]:
    """Turns whatever a command raises into a message and an exit code; click's own exceptions pass.

    A termination signal ends the block as an exception does, so that what is half written is removed.

    Args:
        debug: Whether to show tracebacks; asked when there is one.
    """
    silence_other_bars()
    before, warnings.formatwarning = _on_terminate(_terminate), _format_warning
    try:
        yield
    except KeyboardInterrupt:
        # A second one would be a traceback of what libraries do at exit, of which this is the first.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
        click.echo("\nInterrupted.", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    except Exception as error:
        if isinstance(error, click.ClickException | click.exceptions.Exit | click.Abort) or _is_broken_pipe(error):
            raise
        if debug():
            traceback.print_exception(error)
        raise click.ClickException(message_of(error)) from error
    finally:
        _on_terminate(before)
        warnings.formatwarning = _AS_PYTHON
        set_quiet(False)


def run_guarded(function: Callable[[], None]) -> None:
    """Runs a command line that is not click's under the guard, and exits; ``--debug`` is taken from its arguments."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        with guarded(lambda: debug):
            function()
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)


def message_of(error: Exception) -> str:
    """What a user reads of an exception."""
    if isinstance(error, SkvError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return str(missing_module(error.name))
    if isinstance(error, OSError) and error.strerror:
        place = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
        return f"{place}{error.strerror}"
    if isinstance(error, MemoryError):
        return "not enough memory. Take a smaller --dtype, --context or --batch, or another machine."
    text = " ".join(str(error).split())
    short = text if len(text) <= 300 else text[:300] + "..."
    return (
        f"unexpected {type(error).__name__}: {short}. This is a fault of skv-export: please report it{_where()}, with "
        "what `skv-export doctor` prints and what --debug adds."
    )


def _where() -> str:
    """Where faults are reported: the package's project URL, if it has one."""
    try:
        urls = importlib.metadata.metadata("skv-export").get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    found = [url.partition(", ")[2] for url in urls if url.startswith("Issues, ")]
    return f" at {found[0]}" if found else ""


def _is_broken_pipe(error: Exception) -> bool:
    """Whether the reader of our output has gone (``| head``): click ends quietly then."""
    return isinstance(error, OSError) and error.errno == errno.EPIPE


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(TERMINATED)


def _on_terminate(handler: Any) -> Any:
    """Sets what a termination signal does; returns what it did before. Only the main thread can."""
    try:
        return signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)
    except ValueError:
        return None
