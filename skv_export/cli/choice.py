"""A choice among names whose error suggests the nearest."""

from __future__ import annotations

from typing import Any

import click

from skv_export.errors import did_you_mean


class Choice(click.Choice[Any]):
    """click's choice; a mistyped name is answered with the nearest."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """Returns click's message, and the suggestion if a name is near."""
        message = super().get_invalid_choice_message(value, ctx)
        near = did_you_mean(str(value), map(str, self.choices))
        return f"{message} {near}" if near else message
