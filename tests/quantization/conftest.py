"""Tiny models with tokenizers: what is quantized here reads a text."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import write_tokenizer


@pytest.fixture(scope="session")
def checkpoint(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function: the tiny model of an architecture with a tokenizer beside it, in a folder of its own."""
    made: dict[str, Path] = {}

    def make(arch: str) -> Path:
        if arch not in made:
            made[arch] = tmp_path_factory.mktemp("with-tokenizer") / arch
            shutil.copytree(tiny_checkpoint(arch), made[arch])
            write_tokenizer(made[arch], 320)
        return made[arch]

    return make
