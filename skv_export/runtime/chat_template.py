"""Renders a chat template as transformers does. Run as a program, so that a hostile template harms only its process.

Templates come with the model, from anybody. Jinja's sandbox keeps them from Python's internals, not from looping for
ever or filling the memory, so ``prompts`` runs this file in a process of its own, with limits that the system enforces.
It imports jinja2 and the standard library alone: a start takes a twentieth of a second.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_CPU_SECONDS = 5
MAX_MEMORY_BYTES = 512 << 20
MAX_PROMPT_CHARACTERS = 16 << 20
TOO_LARGE = "its memory"
"""What an answer says was exceeded, if it was not the time."""


class RefusedError(jinja2.TemplateError):
    """The template itself says that it can't render these messages (``raise_exception``)."""


class _Generation(Extension):
    """``{% generation %} ... {% endgeneration %}``, which marks what a model writes: only training asks where."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A block of a call, not its bare body: what is set inside stays inside, as with transformers.
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    @staticmethod
    def _body(caller: Any) -> str:
        return caller()


class _Namespace(Namespace):
    """Jinja's namespace without names that begin with an underscore."""

    def __init__(*args: Any, **values: Any) -> None:
        self, args = args[0], args[1:]
        attributes = dict(*args, **values)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace: a name with an underscore first: {name!r}")


class _Dict:
    """``dict`` for templates: it makes dictionaries, and has none of the class's attributes."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is; jinja's own filter escapes what HTML would take for markup."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise RefusedError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def environment() -> ImmutableSandboxedEnvironment:
    """Returns an environment with the extensions, filters and functions that transformers gives its templates."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _tojson
    made.globals.update(raise_exception=_refuse, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace)
    return made


def answer(template: str, values: Mapping[str, Any]) -> dict[str, str]:
    """Renders a template.

    Returns:
        ``text``; or ``refused``, the template's own message; or ``exceeded``; or ``error``, what is wrong with it.
    """
    try:
        text = environment().from_string(template).render(**values)
    except RefusedError as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"exceeded": TOO_LARGE}
    except Exception as error:  # noqa: BLE001  # a template can raise what Python can
        line = getattr(error, "lineno", None)
        return {"error": f"{type(error).__name__}: {error}" + (f" (line {line})" if line else "")}
    return {"text": text} if len(text) <= MAX_PROMPT_CHARACTERS else {"exceeded": TOO_LARGE}


def main() -> None:
    """Reads ``{"template": ..., "values": {...}}`` from standard input and writes the answer to standard output."""
    try:
        import resource
    except ImportError:  # Windows: the caller's limit of time is the only one
        resource = None  # type: ignore[assignment]
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_SECONDS, MAX_CPU_SECONDS))
    request = json.load(sys.stdin)
    json.dump(answer(request["template"], request["values"]), sys.stdout)


if __name__ == "__main__":
    main()
