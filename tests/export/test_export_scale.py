"""The benchmark of exports at scale: its checkpoints are real ones, and its figures are those of the process."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_models import ROOT
from transformers import AutoModelForCausalLM

from skv_export.checkpoints.checkpoint import Checkpoint

MIB = 1 << 20


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("export_scale", ROOT / "benchmarks" / "export_scale.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.SHAPES, "tiny", bench.Shape(64, 96, 2, 4, 2, 32, 320))


@pytest.mark.usefixtures("tiny")
def test_checkpoints_are_whole(bench: ModuleType, tmp_path: Path) -> None:
    """Several shards; transformers misses nothing, and its model computes numbers."""
    shape = bench.SHAPES["tiny"]
    bench.make(tmp_path / "tiny", shape, shard_bytes=40_000)
    assert len(list((tmp_path / "tiny").glob("*.safetensors"))) > 2
    assert {k: v.shape for k, v in Checkpoint.open(tmp_path / "tiny").entries.items()} == shape.tensors()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny", output_loading_info=True)
    assert model.dtype == torch.bfloat16 and not info["missing_keys"] and not info["unexpected_keys"]
    weights = model.model.layers[1].mlp.down_proj.weight.detach().float()
    assert abs(float(weights.std()) * 96**0.5 - 1) < 0.05 and abs(float(weights.mean())) < 0.01
    assert bool(model(torch.arange(9)[None]).logits.isfinite().all())


def test_shapes_have_the_parameters_of_their_names(bench: ModuleType) -> None:
    billions = {name: bench.size_of_weights(shape) / 2e9 for name, shape in bench.SHAPES.items()}
    assert billions["1.1b"] == pytest.approx(1.1, rel=0.01) and billions["8b"] == pytest.approx(8.03, rel=0.01)
    assert [bench.SHAPES[f"layers-{n}"].num_hidden_layers for n in (16, 32, 80)] == [16, 32, 80]


def test_a_process_is_measured(bench: ModuleType) -> None:
    held = bytearray(600 * MIB)  # of this process, the parent: it must not count
    held[::4096] = bytes(len(held) // 4096)
    code = "import time; x = bytearray(300 << 20); x[::4096] = bytes(len(x[::4096])); time.sleep(0.3)"
    run = bench.measured([sys.executable, "-c", code])
    assert 300 * MIB < run.anonymous <= run.peak < 500 * MIB
    assert run.seconds > 0.3 and 0.02 < run.cpu_seconds < run.seconds
    with pytest.raises(SystemExit, match="exit code 3\nno room"):
        bench.measured([sys.executable, "-c", "import sys; print('no room'); sys.exit(3)"])


@pytest.mark.usefixtures("tiny")
def test_a_row_per_shape_and_options(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = "import shutil, sys; shutil.copytree(sys.argv[1], sys.argv[3])"
    monkeypatch.setattr(bench, "EXPORT", [sys.executable, "-c", copy])
    head, *rows = bench.scale(["tiny"], ["", "--weights int4"], tmp_path)
    assert [row.split(" | ")[1] for row in rows] == ["defaults", "--weights int4"]
    assert {row.count("|") for row in rows} == {head.splitlines()[0].count("|")}
    assert not list(tmp_path.iterdir())
