"""Writes the files of an exported folder that come from the checkpoint."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skv_export.checkpoints import adapter
from skv_export.checkpoints.checkpoint import Source
from skv_export.errors import SkvError
from skv_export.model_folder.card import model_card
from skv_export.model_folder.genai_config import genai_config
from skv_export.model_folder.names import (
    CARD_FILE,
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
    *,
    licence: str = "",
) -> None:
    """Writes what stands beside the graph: the recipe, both configurations, the card, and the native library.

    Args:
        folder: The folder being written.
        recipe: As resolved.
        config: The content of ``skv_config.json``.
        hidden_size: Channels of the hidden state.
        inputs: Names of the graph's inputs.
        genai_base: What ``genai_config.json`` says that is not ours to say.
        licence: The checkpoint's, if known.
    """
    (folder / RECIPE_FILE).write_text(recipe.to_toml(), encoding="utf-8")
    write_json(folder / SKV_CONFIG_FILE, config.to_dict(hidden_size))
    if config.position_axes == 1:  # onnxruntime-genai gives a text model positions [B, S]
        write_json(folder / GENAI_CONFIG_FILE, genai_config(config, hidden_size, inputs, genai_base))
    card = model_card(config, ".", licence=licence, evidence=recipe.description)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    shutil.copyfile(library_path(), folder / LIBRARY_FILE)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def digest(source: Source, config: PreTrainedConfig) -> str:
    """SHA-256 that identifies a checkpoint: of ``config.json``, or of the first MiB (the metadata) of a GGUF file.

    With an adapter, of its configuration and weights as well.
    """
    name = source.gguf_file or "config.json"
    if source.path is not None and (source.path / name).is_file():
        with (source.path / name).open("rb") as file:
            found = hashlib.sha256(file.read(1 << 20))
        for path in [source.adapter / x for x in (adapter.CONFIG, adapter.WEIGHTS)] if source.adapter else []:
            found.update(path.read_bytes())
        return found.hexdigest()
    text = json.dumps(config.to_diff_dict(), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
