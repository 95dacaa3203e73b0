"""A checkpoint's tokenizer as transformers has it; a GGUF file's with the split of words that the file names.

Code of a checkpoint's own is never run, and what can't be loaded is said before any weight is read.
"""

from __future__ import annotations

from typing import Any

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from skv_export.checkpoints.checkpoint import Checkpoint, Source
from skv_export.errors import SkvError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "vocab.txt",
)
_VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt")
_NO_TOKENIZER = (None, "none", "no_vocab")
_GPT2_SPLITS = ("gpt-2", "olmo", "phi-2", "mpt")
"""Names of llama.cpp's for GPT-2's split of words, which a byte-level BPE has in transformers anyway."""
_DIGIT_SPLITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
"""The same, with every digit by itself; transformers does not know these names and would join digits."""


def load_tokenizer(source: Source) -> Any:
    """Loads a checkpoint's tokenizer, or returns None if it has none.

    Args:
        source: A checkpoint on this disk.

    Raises:
        SkvError: It has one that transformers can't load, or a GGUF file's names a split that is not known.
    """
    if source.kind == "gguf":
        return _load_gguf(source)
    if source.path is None or not any((source.path / name).is_file() for name in _VOCABULARIES):
        return None
    try:
        return AutoTokenizer.from_pretrained(source.path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises whatever its code meets, tokenizers Exception itself
        raise unreadable(source, error) from error


def unreadable(source: Source, error: Exception) -> SkvError:
    """Returns the error for a tokenizer that transformers can't load, or can't use.

    Args:
        source: The checkpoint.
        error: What was raised.
    """
    got = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    fix = "Remove its files to export without a tokenizer, or save it with transformers: it then has a tokenizer.json."
    if source.path and source.gguf_file is None and not (source.path / "tokenizer.json").is_file():
        fix = "It has no tokenizer.json: convert it with transformers (needs sentencepiece or tiktoken) and save it."
    return SkvError(f"{source}: transformers can't load its tokenizer", got=got, fix=fix)


def _load_gguf(source: Source) -> Any:
    metadata = Checkpoint(source).gguf_metadata
    kind = metadata.get("tokenizer.ggml.model")
    if kind in _NO_TOKENIZER:
        return None
    missing = [
        key
        for key in ("tokenizer.ggml.tokens", *(("tokenizer.ggml.merges",) if kind == "gpt2" else ()))
        if key not in metadata
    ]
    if missing:
        raise SkvError(
            f"{source}: its tokenizer ({kind}) is not whole", got=f"no {', '.join(missing)}", fix="Convert it again."
        )
    split = metadata.get("tokenizer.ggml.pre")
    if kind == "gpt2" and split not in (*_GPT2_SPLITS, *_DIGIT_SPLITS, *_known_to_transformers()):
        raise SkvError(
            f"{source}: tokenizer.ggml.pre: how this tokenizer splits words is not known",
            got=repr(split),
            fix="Use the safetensors checkpoint, or convert it with a current llama.cpp.",
        )
    try:
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(source.path), gguf_file=source.gguf_file)
    except Exception as error:
        raise unreadable(source, error) from error
    if kind == "gpt2" and split in _DIGIT_SPLITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def _known_to_transformers() -> tuple[str, ...]:
    """Returns the names of splits that this version of transformers has."""
    try:
        from transformers.integrations.gguf import gguf_tokenizer_mapping
    except ImportError:  # before 5.23 or so: it splits as GPT-2 does, whatever the file says
        return ()
    return tuple(gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS)
