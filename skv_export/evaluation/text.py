"""Texts to measure on: the shipped one or a file's, and windows of tokens cut out of it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skv_export.arguments import check
from skv_export.errors import SkvError
from skv_export.paths import to_path

SHIPPED_TEXT = "persuasion.txt"
CALIBRATION_TEXT = "opticks.txt"
"""Two different works, both shipped: the first only judges, the second is what options and constants may be fitted to.
"""
MAX_TEXT_BYTES = 64 << 20
MIN_WINDOW = 2
"""Tokens of text in a window: one that is predicted, and one before it."""


def read_text(path: Path | str | None, shipped: str = SHIPPED_TEXT) -> str:
    """Reads the text to measure on; a shipped one if not given.

    Raises:
        SkvError: Missing, no regular file, too large, empty, or not UTF-8.
    """
    if path is None:
        return (resources.files("skv_export") / "data" / shipped).read_text(encoding="utf-8")
    path = to_path(path, "text")
    if not path.is_file():
        raise SkvError(f"text {path}: " + ("not a regular file" if path.exists() else "no such file"))
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise SkvError(
            f"text {path}: too large", got=f"{path.stat().st_size} bytes", expected=f"at most {MAX_TEXT_BYTES}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SkvError(f"text {path}: not UTF-8", got=str(error)) from error
    if not text.strip():
        raise SkvError(f"text {path}: nothing in it", expected="prose, a few thousand words")
    return text


def token_ids(tokenizer: Any, text: str, *, add_special_tokens: bool) -> list[int]:
    """Tokenizes with transformers' tokenizer, or with tokenizers' Tokenizer."""
    encoded = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return list(getattr(encoded, "ids", encoded))


def cut_windows(tokenizer: Any, text: str, count: int, length: int) -> NDArray[np.int64]:
    """Cuts windows out of a text, evenly spread, not overlapping; each starts with what the tokenizer puts before one.

    Args:
        tokenizer: transformers' tokenizer, or tokenizers' Tokenizer.
        text: The text.
        count: Windows; fewer if the text has no more.
        length: Tokens per window.

    Returns:
        ``[windows, length]``.

    Raises:
        SkvError: The text does not fill one window.
    """
    check("text", text, str)
    check("windows", count, int)
    check("window", length, int)
    if count < 1:
        raise SkvError("windows", got=count, expected="at least 1")
    start = token_ids(tokenizer, "", add_special_tokens=True)
    ids = token_ids(tokenizer, text, add_special_tokens=False)
    body = length - len(start)
    if body < MIN_WINDOW:
        raise SkvError("window", got=f"{length} tokens", expected=f"at least {MIN_WINDOW + len(start)}")
    count = min(count, len(ids) // body)
    if count < 1:
        raise SkvError(
            "text: too short", got=f"{len(ids)} tokens", expected=f"at least {body}", fix="Pass a longer text."
        )
    places = np.linspace(0, len(ids) - body, count).astype(int)
    return np.array([[*start, *ids[place : place + body]] for place in places], np.int64)
