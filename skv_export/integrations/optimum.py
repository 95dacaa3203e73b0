"""The command `optimum-cli export skv MODEL OUT`: `skv-export model` with the same options.

optimum finds it through `optimum/commands/register/register_skv.py`, and imports it whenever its command line starts:
nothing heavy is imported here.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

import click
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from skv_export.cli import main

_POSITIONAL = ("checkpoint", "out")


class SkvExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum is untyped
    """Exports a model to ONNX Runtime with a quantized KV cache."""

    COMMAND = CommandInfo("skv", help="Export to ONNX Runtime with a KV cache quantized for K and V separately.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declares what `skv-export model` takes; ``None`` where an option is not given."""
        parser.add_argument("model", help="Folder with safetensors, GGUF file, or hub id.")
        parser.add_argument("output", help="Folder to write.")
        for option in _options():
            kind: dict[str, Any] = {"action": "store_const", "const": True} if option.is_flag else {}
            if isinstance(option.type, click.Choice):
                kind = {"choices": [str(choice) for choice in option.type.choices]}
            text = (option.help or "").replace("%", "%%")
            parser.add_argument(*option.opts[:1], dest=option.name, default=None, help=text, **kind)

    def run(self) -> None:
        """Runs the command; errors are printed as `skv-export` prints them."""
        main.main(["model", *arguments(self.args)], prog_name="optimum-cli export skv")


def arguments(args: Namespace) -> list[str]:
    """The parsed arguments as `skv-export model` takes them."""
    given = [args.model, "--out", args.output]
    for option in _options():
        value = getattr(args, str(option.name))
        if value is not None:
            given += [option.opts[0]] if option.is_flag else [option.opts[0], value]
    return given


def _options() -> list[click.Option]:
    found = [p for p in main.model.params if isinstance(p, click.Option)]
    return [option for option in found if option.name not in _POSITIONAL]
