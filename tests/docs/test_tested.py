"""A sample of what benchmarks/tested.py runs for docs/tested.md; the script runs all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tested
from tested import Row

from skv_export.evaluation.finished_steps import FinishedSteps

pytestmark = pytest.mark.usefixtures("library")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["mixtral", "phi", "opt"])
def test_an_architecture_without_settings_of_its_own_is_exact(model_type: str, tmp_path: Path) -> None:
    row = tested.architecture(tmp_path, model_type)
    assert (row.name, row.verdict) == (model_type, "exact")
    exact, quantized = row.differences
    assert exact < 1e-3 < quantized < 0.1 * row.size


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("deepseek_v32", "refused: multi-head latent attention"), ("mamba", "refused: a state-space model")],
)
def test_the_reason_of_a_refusal_is_the_exports(model_type: str, reason: str, tmp_path: Path) -> None:
    row = tested.architecture(tmp_path, model_type)
    assert row.verdict.startswith(reason) and row.differences == ()


@pytest.mark.parametrize("kind", ["F16", "Q4_0"])
def test_gguf(kind: str, tmp_path: Path) -> None:
    assert tested.gguf(tmp_path, kind).verdict == "exact"


def test_shards(tmp_path: Path) -> None:
    row = tested.safetensors(tmp_path, shard="150KB")
    assert row.verdict == "exact" and "shards" in row.name


def test_onnx(tmp_path: Path) -> None:
    assert tested.onnx_graph(tmp_path, "GroupQueryAttention").verdict == "exact"


def test_what_is_off_is_said() -> None:
    import numpy as np

    logits = np.zeros((2, 3), np.float32)
    row = Row.of("some", logits, [logits + np.float32(0.01), logits])
    assert row.verdict == "**differs**" and "1e-02" in row.markdown()


def test_what_is_done_is_kept_and_what_is_not_run_is_said(tmp_path: Path) -> None:
    state = tmp_path / "state.jsonl"
    calls = [("first", _exact), ("second", _die)]
    rows = tested._run_all(calls, FinishedSteps(state, "x"))
    assert [(row.name, row.verdict) for row in rows] == [("first", "exact"), ("second", "**crashed**")]
    again = tested._run_all([("first", _die), ("third", _die)], FinishedSteps(state, "x"), limit=0.0)
    assert [row.verdict for row in again] == ["exact", tested.NOT_RUN]
    page = tested.page(again, rows)
    assert "1 of the 2 causal language models of transformers were run; 1 of these export exactly" in page
    assert "1 of the 2 causal language models of transformers export exactly" in tested.page(rows, [])


def _exact(_: Path) -> Row:
    return Row("first", "exact", (1e-5, 1e-2), 8.0)


def test_a_process_that_dies_is_a_line_too() -> None:
    assert tested.run("some", _die).verdict == "**crashed**"


def _die(_: Path) -> Row:
    import os

    os._exit(1)
