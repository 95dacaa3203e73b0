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
            text = (option.help or "").replace("%", "%%")
            shared: dict[str, Any] = {"dest": option.name, "default": None}
            if option.is_flag:
                parser.add_argument(*option.opts, action="store_const", const=True, help=text, **shared)
                if option.secondary_opts:
                    parser.add_argument(*option.secondary_opts, action="store_const", const=False, help=text, **shared)
            elif option.count:
                parser.add_argument(*option.opts, action="count", help=text, **shared)
            else:
                kind: dict[str, Any] = {"action": "append"} if option.multiple else {}
                if isinstance(option.type, click.Choice):
                    kind["choices"] = [str(choice) for choice in option.type.choices]
                parser.add_argument(*option.opts, help=text, **kind, **shared)

    def run(self) -> None:
        """Runs the command; errors are printed as `skv-export` prints them."""
        main.main(["model", *arguments(self.args)], prog_name="optimum-cli export skv")


def arguments(args: Namespace) -> list[str]:
    """The parsed arguments as `skv-export model` takes them."""
    given = [args.model, "--out", args.output]
    for option in _options():
        value, flag = getattr(args, str(option.name)), option.opts[-1]
        if value is None:
            continue
        if option.is_flag:
            given.append(flag if value else option.secondary_opts[0])
        elif option.count:
            given += [flag] * value
        else:
            for each in value if option.multiple else [value]:
                given += [flag, each]
    return given


def _options() -> list[click.Option]:
    found = [p for p in main.model.params if isinstance(p, click.Option)]
    return [option for option in found if option.name not in _POSITIONAL]
