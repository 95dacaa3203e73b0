"""The command `skv-lm-eval`: lm-eval's own command line with our model registered, its errors as messages."""

from __future__ import annotations

from skv_export.cli.guard import run_guarded
from skv_export.errors import SkvError


def main() -> None:
    """Runs lm-eval's command line; `--debug` shows the traceback of an error."""
    run_guarded(_run)


def _run() -> None:
    from skv_export.integrations.lm_eval import main as lm_eval_main

    try:
        lm_eval_main()
    except ValueError as error:  # lm-eval's way to refuse an argument
        raise SkvError(f"lm-eval: {error}") from error
