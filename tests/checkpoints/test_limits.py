"""What a configuration may claim: counts of at least one, and of no more than the files hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from skv_export.checkpoints.checkpoint import resolve
from skv_export.errors import SkvError


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_hidden_layers", 0, "at least 1"),
        ("num_attention_heads", -4, "at least 1"),
        ("num_key_value_heads", 0, "at least 1"),
        ("max_position_embeddings", 0, "at least 1"),
        ("vocab_size", 0, "at least 1"),
        ("vocab_size", 10**12, "as the tensors in its files have it"),
        ("num_hidden_layers", 10**6, "as the tensors in its files have it"),
        ("max_position_embeddings", 10**15, "at most 1,099,511,627,776$|at most 1,099,511,627,776[.;]"),
        ("head_dim", 0, "at least 1"),
        ("intermediate_size", -1, "at least 1"),
        ("sliding_window", -1, "at least 0"),
        ("eos_token_id", 10**30, "at most 2,147,483,647"),
        ("eos_token_id", [2, 10**30], "at most 2,147,483,647"),
        ("pad_token_id", -2, "at least -1"),
        ("rms_norm_eps", float("nan"), "a finite number"),
        ("rms_norm_eps", float("inf"), "a finite number"),
        ("rope_theta", 0, "a finite number"),
        ("attention_multiplier", float("nan"), "a number"),
    ],
)
def test_claims_are_compared_with_the_files(
    name: str, value: int, expected: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(SkvError, match=f"{name} in its configuration.*({expected})"):
        resolve(folder)
