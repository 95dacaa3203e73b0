"""Paths as users give them, checked before the system sees them; imports nothing of ours but the error."""

from __future__ import annotations

import os
from pathlib import Path

from skv_export.errors import SkvError

MAX_NAME_BYTES = 255
"""Of one part of a path: the limit of every common file system."""
MAX_PATH_BYTES = 4095


def looks_like_path(text: str) -> bool:
    """Whether a name that is not there is meant as a path, not as a hub id such as ``org/name``.

    A path starts with ``.``, ``/`` or ``~``, ends with a slash, has several, or begins with a folder that is here.
    """
    first, slash, _ = text.partition(os.sep)
    return (
        text.startswith((".", "/", "~"))
        or text.endswith(os.sep)
        or text.count("/") > 1
        or bool(slash and os.path.isdir(first))
    )


def to_path(value: object, what: str) -> Path:
    """Returns ``value`` as a path, ``~`` expanded.

    Args:
        value: A string or a Path.
        what: What it is, for the message.

    Raises:
        SkvError: It is something else, or no file system could hold such a name.
    """
    if not isinstance(value, str | Path) or not str(value):
        got = repr(value)[:100] if isinstance(value, str) else type(value).__name__
        raise SkvError(what, got=got, expected="a path, as str or pathlib.Path")
    text = str(value)
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError as error:
        raise SkvError(f"{what}: not a file name", got=ascii(text)[:100]) from error
    if b"\0" in encoded:
        raise SkvError(f"{what}: a null character in it", got=ascii(text)[:100], fix="Check the path.")
    longest = max(map(len, encoded.split(os.fsencode(os.sep))))
    if longest > MAX_NAME_BYTES or len(encoded) > MAX_PATH_BYTES:
        raise SkvError(
            f"{what}: too long for a file name",
            got=f"{text[:40]}... ({longest} bytes)",
            expected=f"at most {MAX_NAME_BYTES} bytes between two slashes",
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise SkvError(f"{what}: no such user", got=text[:100], fix="Write the path out.") from error


def is_onnx(source: str | Path) -> bool:
    """Whether a path names an ONNX model: a ``.onnx`` file, or a folder with one and without safetensors or GGUF."""
    path = to_path(source, "checkpoint")
    if not path.is_dir():
        return path.suffix == ".onnx"
    if any(path.glob("*.safetensors")) or any(path.glob("*.gguf")):
        return False
    return any(path.glob("*.onnx")) or any(path.glob("onnx/*.onnx"))
