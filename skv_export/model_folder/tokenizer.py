"""The tokenizer's files of an exported folder: what is read raw there gives the ids that transformers gives.

Runtimes read ``tokenizer.json`` as it is. transformers does not: truncation and padding in it belong to training, and
other files may say that texts start with a token. So every export compares the two on a spread of texts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from skv_export.checkpoints.checkpoint import Source
from skv_export.checkpoints.tokenizer import TOKENIZER_FILES, load_tokenizer, unreadable
from skv_export.errors import SkvError
from skv_export.model_folder.names import (
    CHAT_TEMPLATE_FILE,
    CHAT_TEMPLATES_FOLDER,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)

_PROSE = "The capital of France is Paris.\n  def f(x):\n\treturn x + 1  # naïve café, 東京, 🙂 12345\n"
TEXTS = (
    "",
    " ",
    "\n\n \t  x   y\r\n",
    "Hello, world!  It's 1234567890 o'clock, isn't it? I'LL go.",
    "for (int i = 0; i < n; ++i) { a[i] *= 0x1F; }  // {{x}} <b>&amp;</b> \\n",
    "naïve café — Ünïcödé, ПРИВЕТ мир, 東京タワー, हिन्दी, العربية, 한국어, 🙂👩‍👩‍👧‍👦🇫🇷",
    "e\u0301 \u00e9 ﬁ ① \u00a0\u200b\u2028 \ufeff\x00\x7f",
    " leading and trailing ",
    _PROSE * 40,
)
"""What both readings of a tokenizer are compared on; special tokens come on top, and the last is long."""


def write_tokenizer(source: Source, folder: Path) -> bool:
    """Writes the tokenizer's files.

    A local folder's files are copied, ``tokenizer.json`` without truncation and padding. Where they hold none, where it
    gives other ids than transformers, and for GGUF files, transformers writes them.

    Args:
        source: A checkpoint on this disk.
        folder: Where the files go.

    Returns:
        Whether the checkpoint has a tokenizer.

    Raises:
        SkvError: It can't be loaded or used, or what was written does not give the ids that it gives.
    """
    original = load_tokenizer(source)
    if original is None:
        return False
    try:
        _write(original, source, folder)
    except (SkvError, OSError):
        raise
    except Exception as error:  # it was loaded, and fails where it is used: with a length that is a text, say
        raise unreadable(source, error) from error
    return True


def _write(original: Any, source: Source, folder: Path) -> None:
    if source.kind != "gguf" and source.path is not None:
        for name in TOKENIZER_FILES:
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, folder / name)
        _strip(folder)
    if not (folder / TOKENIZER_FILE).is_file() or difference(original, folder):
        original.save_pretrained(folder)
        _strip(folder)
        if not (folder / TOKENIZER_FILE).is_file():
            fix = "Use a checkpoint with a fast tokenizer."
            raise SkvError(f"{source}: its tokenizer can't be written as tokenizer.json", fix=fix)
        if found := difference(original, folder):
            text, got, expected = found
            raise SkvError(
                f"{source}: tokenizer.json gives other ids than transformers' tokenizer, for {text!r}",
                got=got,
                expected=expected,
                fix="Save the tokenizer again with a current transformers.",
            )
    _write_chat(original, folder)


def difference(original: Any, folder: Path) -> tuple[str, list[int], list[int]] | None:
    """Compares a folder's ``tokenizer.json``, read raw, with transformers' tokenizer.

    Returns:
        The text where they differ, and the ids of both from there on; None if they agree.
    """
    written = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    for text in _texts(original):
        for special in (True, False):
            expected = original(text, add_special_tokens=special, verbose=False)["input_ids"]
            got = written.encode(text, add_special_tokens=special).ids
            if got != expected:
                pairs = zip(got, expected, strict=False)
                at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(got), len(expected)))
                return text[:40], got[at : at + 8], expected[at : at + 8]
    return None


def _texts(original: Any) -> Iterator[str]:
    yield from TEXTS
    for token in sorted({*original.all_special_tokens, *original.get_added_vocab()})[:64]:
        yield f"a{token} b {token}\n{token}"


def _strip(folder: Path) -> None:
    """Removes truncation and padding from ``tokenizer.json``: they are settings of a training batch."""
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("truncation") or values.get("padding"):
        values.update(truncation=None, padding=None)
        path.write_text(json.dumps(values, ensure_ascii=False, indent=2), encoding="utf-8")


def _write_chat(original: Any, folder: Path) -> None:
    """Writes what a chat needs to the places that runtimes read: special tokens and templates."""
    path = folder / TOKENIZER_CONFIG_FILE
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    values = dict(before)
    for name in SPECIAL_TOKENS:
        token = getattr(original, name, None)
        given = values.get(name)
        if token is not None and (given.get("content") if isinstance(given, dict) else given) != token:
            values[name] = token
    if values != before:
        path.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    template = original.chat_template
    if isinstance(template, dict):
        others = {name: text for name, text in template.items() if name != "default" and name.isidentifier()}
        for name, text in others.items():  # an identifier leads to no other folder
            (folder / CHAT_TEMPLATES_FOLDER).mkdir(exist_ok=True)
            (folder / CHAT_TEMPLATES_FOLDER / f"{name}.jinja").write_text(text, encoding="utf-8")
        template = template.get("default")
    if template and not (folder / CHAT_TEMPLATE_FILE).is_file() and values.get("chat_template") != template:
        (folder / CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")
