"""Arguments of the Python API, held to their annotations: a wrong type is one clear error, not a failure further in.

Imports nothing of ours but the error, and no numpy: numbers of numpy are recognized by the abstract classes of the
standard library, classes that are imported for type checkers alone by their names.
"""

from __future__ import annotations

import builtins
import collections.abc
import dataclasses
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from skv_export.errors import SkvError

P = ParamSpec("P")
R = TypeVar("R")
SHOWN = 60
"""Characters of a wrong value that a message shows."""
_WORDS: dict[Any, str] = {
    int: "a whole number", float: "a number", bool: "True or False", str: "a text", type(None): "None",
    Path: "a pathlib.Path",
}  # fmt: skip
_UNCHECKED = {"ArrayLike"}
"""Types of whatever numpy makes an array of: who takes one checks the array."""


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function of the API: an argument that does not fit its annotation raises SkvError, which names it.

    What annotations can't say (ranges, names of choices, shapes) remains the function's to check.
    """
    signature = inspect.signature(function)
    hints = functools.cache(functools.partial(_hints, function))

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(*args, **kwargs).arguments  # a TypeError of Python's own where names do not fit
        for name, value in given.items():
            if name in hints() and signature.parameters[name].kind not in _VARIABLE:
                check(name, value, hints()[name])
        return function(*args, **kwargs)

    return call


_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def check_fields(instance: Any) -> None:
    """Checks the fields of a dataclass against their annotations; for its ``__post_init__``.

    Raises:
        SkvError: One does not fit; the message names it.
    """
    kind: Any = type(instance)
    hints = _class_hints(kind)
    for field in dataclasses.fields(instance):
        check(field.name, getattr(instance, field.name), hints[field.name])


def check(name: str, value: object, hint: Any) -> None:
    """Checks a value against an annotation.

    Args:
        name: What the message calls it.
        value: The value.
        hint: The annotation, evaluated. ``int`` and ``float`` take numpy's numbers too, never a bool, and ``float``
            no NaN; a sequence is any that has a length and an order, but no text.

    Raises:
        SkvError: It does not fit.
    """
    if not _fits(value, hint):
        raise SkvError(name, got=shown(value), expected=_words(hint), fix=_loader(hint))


def brief(value: object) -> str:
    """Returns a value in a few characters, for a message."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001  a stranger's __repr__
        return f"<{type(value).__name__}>"
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def shown(value: object) -> str:
    """Returns a value with its type, in a few characters, for a message."""
    return brief(value) if value is None or isinstance(value, bool) else f"{type(value).__name__} {brief(value)}"


class _ByName:
    """Stands for a class that is imported for type checkers alone."""

    def __class_getitem__(cls, item: Any) -> type[_ByName]:
        return cls


class _Scope(dict[str, Any]):
    """The names of a module, and a stand-in for those that it imports for type checkers alone."""

    def __init__(self, names: Mapping[str, Any]) -> None:
        super().__init__(dict.fromkeys(_UNCHECKED, Any))
        self._names = names

    def __missing__(self, name: str) -> Any:
        if name in self._names or hasattr(builtins, name):
            raise KeyError(name)  # found where Python looks next
        return type(name, (_ByName,), {})


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    inner: Any = inspect.unwrap(function)  # its module is where the names are, not a decorator's
    return typing.get_type_hints(inner, localns=_Scope(inner.__globals__))


@functools.cache
def _class_hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls, localns=_Scope(vars(sys.modules[cls.__module__])))


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is object:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if hint in _NUMBERS:
        return _NUMBERS[hint](value)
    kind = origin or hint
    if kind is collections.abc.Callable:
        return callable(value)
    if not inspect.isclass(kind):
        return True
    if getattr(kind, "_is_protocol", False):
        return not getattr(kind, "_is_runtime_protocol", False) or isinstance(value, kind)
    if issubclass(kind, _ByName):
        return any(base.__name__ == kind.__name__ for base in type(value).__mro__)
    if kind in (Sequence, list, tuple):
        return _is_sequence(value) and all(_fits(item, wanted) for item, wanted in _items(value, kind, parts))
    return isinstance(value, kind)


def _is_bool(value: object) -> bool:
    """Whether it is Python's or numpy's True or False."""
    return isinstance(value, bool) or (type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"))


_NUMBERS: dict[Any, Callable[[Any], bool]] = {
    bool: _is_bool,
    int: lambda value: isinstance(value, Integral) and not _is_bool(value),
    float: lambda value: isinstance(value, Real) and not _is_bool(value) and bool(value == value),
}


def _is_sequence(value: Any) -> bool:
    """Whether it has a length and an order and is no text; numpy's arrays do, torch's tensors, too."""
    ordered = hasattr(value, "__len__") and hasattr(value, "__getitem__") and not inspect.isclass(value)
    return ordered and not isinstance(value, str | bytes | bytearray | Mapping) and getattr(value, "ndim", 1) > 0


def _items(value: Any, kind: Any, parts: tuple[Any, ...]) -> Iterator[tuple[Any, Any]]:
    """The items of a sequence, each with the annotation that holds for it."""
    if kind is tuple and parts and parts[-1] is not Ellipsis:
        yield from zip(value, parts, strict=True) if len(value) == len(parts) else [(None, int)]
    elif parts:
        yield from ((item, parts[0]) for item in value)


def _loader(hint: Any) -> str | None:
    """How an object of a class that an annotation names is read from a file, if it is."""
    classes = [c for c in (typing.get_args(hint) or (hint,)) if inspect.isclass(c) and hasattr(c, "load")]
    return f"Read a file with {classes[0].__name__}.load." if classes else None


def _words(hint: Any) -> str:
    """An annotation in words."""
    parts = typing.get_args(hint)
    kind = typing.get_origin(hint) or hint
    if kind in (typing.Union, types.UnionType):
        if {str, Path} <= set(parts):
            parts = ("a path, as str or pathlib.Path", *(p for p in parts if p not in (str, Path)))
        return " or ".join(p if isinstance(p, str) else _words(p) for p in parts)
    if kind in _WORDS:
        return _WORDS[kind]
    if kind is collections.abc.Callable:
        return "a function"
    if kind is tuple and parts and parts[-1] is not Ellipsis:
        return f"a tuple of {len(parts)}"
    if kind in (Sequence, list, tuple):
        inner = {int: "whole numbers", float: "numbers", str: "texts"}.get(parts[0]) if parts else None
        return f"a list of {inner}" if inner else "a list" + (f", each {_words(parts[0])}" if parts else "")
    if kind is collections.abc.Mapping or kind is dict:
        return "a dict"
    return getattr(kind, "__name__", str(kind))
