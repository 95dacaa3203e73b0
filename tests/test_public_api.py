"""``import skv_export``: its names, what it does not load, and the docstrings of what it gives."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tiny_models import ROOT

import skv_export

NAMES = {"Recipe", "Session", "SkvError", "SkvForCausalLM", "analyze", "export_model", "verify"}
HEAVY = ("torch", "transformers", "onnxruntime", "onnx", "numpy")


def public_callables() -> Iterator[tuple[str, Callable[..., Any]]]:
    """The public functions, and the public methods that our public classes define."""
    for name in sorted(NAMES):
        value = getattr(skv_export, name)
        if inspect.isclass(value):
            for method, member in vars(value).items():
                function = getattr(member, "__func__", member)  # of a classmethod
                refuses = "NoReturn" in str(getattr(function, "__annotations__", {}).get("return"))
                if not method.startswith("_") and inspect.isfunction(function) and not refuses:
                    yield f"{name}.{method}", function
        else:
            yield name, value


def sections(doc: str) -> dict[str, str]:
    """The sections of a Google-style docstring by title."""
    parts = re.split(r"^(Args|Attributes|Returns|Yields|Raises):\n", inspect.cleandoc(doc), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def entries(section: str) -> list[str]:
    return re.findall(r"^    (\w+): \S", section, flags=re.MULTILINE)


CALLABLES = dict(public_callables())
SELF_EXPLANATORY = 1
"""A function with so few arguments may name them in its summary."""


def test_names() -> None:
    assert set(skv_export.__all__) == NAMES | {"__version__"}
    assert set(dir(skv_export)) >= NAMES
    for name in NAMES:
        assert getattr(skv_export, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = skv_export.nothing  # type: ignore[attr-defined]


def test_typed() -> None:
    assert (ROOT / "skv_export" / "py.typed").is_file()


def test_importing_loads_nothing_heavy() -> None:
    code = f"import sys, skv_export; print(*[name for name in {HEAVY} if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.split() == []


@pytest.mark.parametrize(
    ("name", "unneeded"),
    [
        ("SkvError", {"torch", "transformers", "onnxruntime", "onnx", "numpy"}),
        ("Recipe", {"torch", "transformers", "onnxruntime", "onnx"}),
        ("Session", {"torch", "transformers", "onnx"}),
        ("analyze", {"torch", "transformers", "onnxruntime", "onnx"}),
        ("verify", {"torch", "transformers"}),
    ],
)
def test_a_name_loads_only_what_it_needs(name: str, unneeded: set[str]) -> None:
    code = f"import sys; from skv_export import {name}; print(*[name for name in {HEAVY} if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(output.split()) & unneeded == set()


@pytest.mark.parametrize("name", CALLABLES)
def test_docstrings_are_complete(name: str) -> None:
    """Every argument under Args, what is returned under Returns (or in a one-line summary), errors under Raises."""
    function = CALLABLES[name]
    assert function.__doc__, name
    parts = sections(function.__doc__)
    arguments = [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]
    if "Args" in parts or len(arguments) > SELF_EXPLANATORY:
        assert entries(parts.get("Args", "")) == [a for a in arguments if not a.startswith("_")]
    summary = inspect.cleandoc(function.__doc__).split("\n\n")[0]
    annotation = inspect.signature(function).return_annotation
    if annotation not in ("None", None, inspect.Signature.empty):
        assert {"Returns", "Yields"} & set(parts) or re.match(r"(Return|Load|Read|Build)s? ", summary), summary
    if "raise SkvError" in inspect.getsource(function):
        assert "SkvError" in parts.get("Raises", "")


@pytest.mark.parametrize("name", sorted(n for n in NAMES if n[0].isupper()))
def test_classes_say_what_they_hold(name: str) -> None:
    parts = sections(getattr(skv_export, name).__doc__)
    assert entries(parts.get("Args", "") + parts.get("Attributes", ""))
