"""What turns text into a model's prompt: the tokenizer and the chat template of an exported folder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skv_export.errors import SkvError
from skv_export.model_folder.names import (
    CHAT_TEMPLATE_FILE,
    CHAT_TEMPLATES_FOLDER,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)
from skv_export.model_folder.skv_config import read_json

TEMPLATE_SECONDS = 60
"""Longest that rendering a template may take, waiting for a busy machine included; it may compute for less."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning; templates read the first, some the second."""
_DEFAULT, _WITH_TOOLS = "default", "tool_use"
"""Names of templates where a model has several."""


def load_tokenizer(folder: Path | str) -> Any:
    """Reads the ``tokenizer.json`` of an exported folder into tokenizers' Tokenizer.

    Raises:
        SkvError: There is none, or it is damaged.
    """
    from tokenizers import Tokenizer

    path = Path(folder) / TOKENIZER_FILE
    if not path.is_file():
        raise SkvError(f"{path}: no such file", fix="Pass token ids, or export with the checkpoint's tokenizer.")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no other
        raise SkvError(f"{path}: no tokenizer", got=str(error)[:200], fix="Export the model again.") from error


def chat_prompt(
    folder: Path,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Puts messages into the model's chat template; the text is that of transformers' ``apply_chat_template``.

    The template is rendered in a process of its own, with Jinja's sandbox and limits of time and memory.

    Args:
        folder: The exported folder.
        messages: Each with ``role`` and, as a rule, ``content``.
        tools: JSON schemas of functions that the model may call.
        documents: With ``title`` and ``text``, for models that answer from documents.
        add_generation_prompt: End where the model's answer starts.
        variables: What else the template asks for, such as ``{"enable_thinking": False}``.

    Raises:
        SkvError: The folder has no chat template, the template refuses the messages (its own words are in the
            message), is faulty, or exceeds its limits.
    """
    if not messages:
        raise SkvError("chat messages", got="none", expected="at least one")
    template, special = _template(folder, with_tools=tools is not None)
    values = {
        **special,
        **(variables or {}),
        "messages": [_with_reasoning(message) for message in messages],
        "tools": tools,
        "documents": documents,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        request = json.dumps({"template": template, "values": values})
    except (TypeError, ValueError, RecursionError) as error:
        expected = "text, numbers, lists and dictionaries; a tool as its JSON schema"
        raise SkvError("chat messages and tools", got=str(error), expected=expected) from error
    answer = _render(folder, request)
    if "text" in answer:
        return answer["text"]
    if "refused" in answer:
        raise SkvError(f"{folder}: its chat template refuses these messages", got=answer["refused"])
    if "exceeded" in answer:
        raise SkvError(f"{folder}: its chat template exceeds {answer['exceeded']}", fix="Don't trust this model.")
    raise SkvError(f"{folder}: its chat template can't be rendered", got=answer["error"])


def _template(folder: Path, *, with_tools: bool) -> tuple[str, dict[str, str]]:
    """The template's text and the special tokens, as transformers' tokenizer would hold them."""
    config = read_json(folder / TOKENIZER_CONFIG_FILE, fix="Export with the checkpoint's tokenizer.")
    special = {name: config.get(name) for name in SPECIAL_TOKENS}
    special = {name: token.get("content") if isinstance(token, dict) else token for name, token in special.items()}
    files = {_DEFAULT: folder / CHAT_TEMPLATE_FILE}
    files |= {path.stem: path for path in sorted((folder / CHAT_TEMPLATES_FOLDER).glob("*.jinja"))}
    templates = {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}
    if not templates:
        given = config.get("chat_template")
        named = given if isinstance(given, list) else [{"name": _DEFAULT, "template": given}]
        templates = {t["name"]: t["template"] for t in named if isinstance(t, dict) and {"name", "template"} <= {*t}}
    found = templates.get(_DEFAULT)
    if with_tools and _WITH_TOOLS in templates:
        found = templates[_WITH_TOOLS]
    if not isinstance(found, str):
        raise SkvError(f"{folder}: no chat template", fix="Give it text instead of a chat (leave --chat out).")
    return found, {name: token for name, token in special.items() if isinstance(token, str)}


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under the names that templates read, if it has any."""
    if not isinstance(message, Mapping):
        raise SkvError("a chat message", got=type(message).__name__, expected="a dictionary with role and content")
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _render(folder: Path, request: str) -> dict[str, str]:
    """The answer of ``chat_template``, run as a program."""
    program = str(Path(__file__).with_name("chat_template.py"))
    command = [sys.executable, "-P", program]
    try:
        done = subprocess.run(command, input=request, capture_output=True, timeout=TEMPLATE_SECONDS, text=True,
                              encoding="utf-8", check=False)  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"exceeded": f"{TEMPLATE_SECONDS} seconds"}
    if done.returncode < 0:  # killed: by the limit of time, or in what its depth did to the interpreter
        return {"exceeded": "the time that it may compute"}
    if done.returncode > 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if last.startswith("MemoryError"):
            return {"exceeded": "its memory"}
        raise SkvError(
            f"{folder}: rendering its chat template failed",
            got=last,
            fix="Chat templates need jinja2, 3.1.6 or newer: pip install jinja2.",
        )
    answer: dict[str, str] = json.loads(done.stdout)
    return answer
