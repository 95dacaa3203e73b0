"""The command `skv-transformers`: transformers' own command line, where exported folders are models like others."""

from __future__ import annotations

import contextlib
from importlib import import_module
from typing import Any

from skv_export.cli.guard import run_guarded
from skv_export.errors import require_module
from skv_export.integrations.auto_model import add_class


def main() -> None:
    """Runs transformers' command line; `--debug` shows the traceback of an error."""
    run_guarded(_run)


def _run() -> None:
    require_module("transformers", "export")
    from transformers import AutoModelForCausalLM
    from transformers.cli.transformers import main as transformers_main

    with contextlib.suppress(ImportError):  # without what a server needs; `serve` says so itself
        model_manager: Any = import_module("transformers.cli.serving.model_manager")
        # The module that its command line was loaded with need not be the one that is imported now.
        add_class(model_manager.transformers, AutoModelForCausalLM)
    run: Any = transformers_main
    run()
