"""Writes the output folder, complete or not at all, and the files that come from the checkpoint.

Everything is written into a folder beside the target, synced to disk, and renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skv_export.checkpoints.checkpoint import Source
from skv_export.errors import SkvError
from skv_export.model_folder.genai_config import genai_config
from skv_export.model_folder.names import (
    GENAI_CONFIG_FILE,
    LIBRARY_FILE,
    RECIPE_FILE,
    SKV_CONFIG_FILE,
)
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.native.library import library_path
from skv_export.spec.recipe import Recipe

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig

RESERVE_BYTES = 64 << 20
"""Room for the graph, configurations and tokenizer, on top of the weights."""


@contextlib.contextmanager
def output_folder(out: Path, weight_bytes: int, *, force: bool = False) -> Iterator[Path]:
    """Yields a folder to write into; it becomes ``out`` when the block ends and is removed if it fails.

    What a killed run left behind is removed by the next one for the same ``out``.

    Args:
        out: The target.
        weight_bytes: What the largest file will take; checked against the free space first.
        force: Replace ``out`` if it exists: the old folder stays whole until the new one is.

    Raises:
        SkvError: ``out`` exists or is being written, its parent can't be written to, or the disk is (or gets) full.
    """
    temporary = out.parent / f".{out.name}.part"
    check_target(out, 0, force=force)
    try:
        with _locked(temporary):
            _empty(temporary)
            check_target(out, weight_bytes, force=force)
            try:
                yield temporary
                _sync(temporary)
                _swap(temporary, out)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise SkvError(
            f"{out}: can't be written", got=str(error), fix="Free some space or choose another --out."
        ) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Creates a folder and locks it against other processes while the block runs."""
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise SkvError(
            f"{folder}: another process is writing it", fix="Wait for it to end, or choose another --out."
        ) from error
    finally:
        os.close(descriptor)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def check_target(out: Path, weight_bytes: int, *, force: bool = False) -> None:
    """Raises SkvError if ``out`` can't be written, before anything long starts; makes its parent folder."""
    if out.exists() or out.is_symlink():
        if not force:
            raise SkvError(f"{out}: exists already", fix="Use --force to replace it, or choose another --out.")
        if out.is_symlink() or not out.is_dir() or not (any(out.glob(SKV_CONFIG_FILE)) or not any(out.iterdir())):
            raise SkvError(
                f"{out}: not a folder written by skv_export, so --force does not replace it",
                fix="Choose another --out.",
            )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
    except OSError as error:
        raise SkvError(f"{out}: its parent can't be written to", got=str(error), fix="Choose another --out.") from error
    needed = weight_bytes + RESERVE_BYTES
    if free < needed:
        raise SkvError(
            f"{out}: not enough space on the disk",
            got=f"{free >> 20} MiB free",
            expected=f"{needed >> 20} MiB",
            fix="Free some space, choose another --out, or a smaller --dtype.",
        )


def _sync(folder: Path) -> None:
    for path in [*sorted(p for p in folder.rglob("*") if p.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(new: Path, out: Path) -> None:
    """Renames ``new`` to ``out``; an old ``out`` is moved aside first, and back if that fails."""
    if not out.exists():
        new.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
    try:
        out.rename(old / "old")
        try:
            new.rename(out)
        except OSError:
            (old / "old").rename(out)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def generation_config(source: Source, config: PreTrainedConfig) -> GenerationConfig:
    """Returns the generation settings of a checkpoint on this disk; derived from its configuration if there are none.

    Raises:
        SkvError: It says so in a way that transformers can't read.
    """
    from transformers import GenerationConfig

    if source.path is None or not (source.path / "generation_config.json").is_file() or source.gguf_file:
        return GenerationConfig.from_model_config(config)
    try:
        return GenerationConfig.from_pretrained(source.path, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise SkvError(
            f"{source}: generation_config.json", got=str(error)[:300], fix="Correct or remove it."
        ) from error


def write_configs(
    folder: Path,
    recipe: Recipe,
    config: ModelConfig,
    hidden_size: int,
    inputs: Sequence[str],
    genai_base: Mapping[str, Any],
) -> None:
    """Writes what a runtime reads beside the graph: the recipe, both configurations, and the native library.

    Args:
        folder: The folder being written.
        recipe: As resolved.
        config: The content of ``skv_config.json``.
        hidden_size: Channels of the hidden state.
        inputs: Names of the graph's inputs.
        genai_base: What ``genai_config.json`` says that is not ours to say.
    """
    (folder / RECIPE_FILE).write_text(recipe.to_toml(), encoding="utf-8")
    write_json(folder / SKV_CONFIG_FILE, config.to_dict(hidden_size))
    write_json(folder / GENAI_CONFIG_FILE, genai_config(config, hidden_size, inputs, genai_base))
    shutil.copyfile(library_path(), folder / LIBRARY_FILE)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def digest(source: Source, config: PreTrainedConfig) -> str:
    """SHA-256 that identifies a checkpoint: of ``config.json``, or of the first MiB (the metadata) of a GGUF file."""
    name = source.gguf_file or "config.json"
    if source.path is not None and (source.path / name).is_file():
        with (source.path / name).open("rb") as file:
            return hashlib.sha256(file.read(1 << 20)).hexdigest()
    text = json.dumps(config.to_diff_dict(), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
