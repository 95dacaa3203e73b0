"""What a checkpoint says it is: no command takes a classifier for a language model without a word."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import write_tokenizer

import skv_export
from skv_export.checkpoints.checkpoint import resolve
from skv_export.errors import SkvError
from skv_export.evaluation import comparison

OTHERS = ["LlamaForTokenClassification", "LlamaForSequenceClassification", "LlamaModel", "LlamaForQuestionAnswering"]


@pytest.mark.parametrize("name", OTHERS)
def test_analyze_and_quality_refuse_it(name: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")
    write_tokenizer(folder, 320)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
    with pytest.raises(SkvError, match=f"no language model.*{name}"):
        skv_export.analyze(folder)
    with pytest.raises(SkvError, match=f"no language model.*{name}"):
        comparison.load(resolve(folder))
    assert skv_export.analyze(folder, as_causal_lm=True).layers
