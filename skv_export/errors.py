"""SkvError, the exception that the package raises for bad input. Imports no other module of the package."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SkvError(Exception):
    """Bad input or an unmet requirement, said so that the reader can act on it.

    Args:
        what: What is wrong, naming the file, tensor, option or node.
        got: What was found there.
        expected: What would have been right.
        fix: What to do about it.
    """

    def __init__(self, what: str, *, got: object = None, expected: object = None, fix: str | None = None) -> None:
        self.what = what
        self.got = got
        self.expected = expected
        self.fix = fix
        details = [what]
        if got is not None:
            details.append(f"got {got}")
        if expected is not None:
            details.append(f"expected {expected}")
        message = "; ".join(details)
        super().__init__(f"{message}. {fix}" if fix else message)


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """Returns ``NAME: did you mean X?`` for the known name that is nearest to a mistyped one; None if none is near."""
    near = difflib.get_close_matches(name.lower(), list(known), n=1)
    return f"{name}: did you mean {near[0]}?" if near else None
