"""Options that several commands have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from skv_export.spec.recipe import DTYPES

Command = TypeVar("Command", bound=Callable[..., Any])


def placement_options(command: Command) -> Command:
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
