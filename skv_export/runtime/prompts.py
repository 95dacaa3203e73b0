"""What turns text into a model's prompt: the tokenizer and the chat template of an exported folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skv_export.errors import SkvError
from skv_export.model_folder.names import CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from skv_export.model_folder.skv_config import read_json


def load_tokenizer(folder: Path | str) -> Any:
    """Reads the ``tokenizer.json`` of an exported folder into tokenizers' Tokenizer.

    Raises:
        SkvError: There is none.
    """
    from tokenizers import Tokenizer

    path = Path(folder) / TOKENIZER_FILE
    if not path.is_file():
        raise SkvError(f"{path}: no such file", fix="Pass token ids, or export with the checkpoint's tokenizer.")
    return Tokenizer.from_file(str(path))


def chat_prompt(folder: Path, messages: Sequence[Mapping[str, str]]) -> str:
    """Puts messages (``role``, ``content``) into the model's chat template.

    Raises:
        SkvError: The folder has no chat template.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    config = read_json(folder / TOKENIZER_CONFIG_FILE, fix="Export with the checkpoint's tokenizer.")
    file = folder / CHAT_TEMPLATE_FILE
    template = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if not isinstance(template, str):
        raise SkvError(f"{folder}: no chat template", fix="Leave --chat out.")
    special = {name: config.get(name) or "" for name in ("bos_token", "eos_token")}
    special = {name: x["content"] if isinstance(x, dict) else x for name, x in special.items()}
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **special)
