"""Calibration files: what is written is read, and what is damaged, foreign or hostile is an error that says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from skv_export.calibration.file import FORMAT, Calibration, entries_of, fingerprint
from skv_export.checkpoints.checkpoint import resolve
from skv_export.errors import SkvError
from skv_export.spec.conformance import make_basis
from skv_export.spec.key_basis import INPUTS, MATRICES


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Calibration]:
    calibration = Calibration({0: make_basis(2, 32, 32), 3: make_basis(1, 64, 64, 1)}, "f" * 64, {"tokens": "9"})
    path = tmp_path / "x.safetensors"
    calibration.save(path)
    return path, calibration


def test_what_is_written_is_read(written: tuple[Path, Calibration]) -> None:
    path, calibration = written
    read = Calibration.load(path)
    assert read.checkpoint == calibration.checkpoint and read.about["tokens"] == "9"
    assert list(read.bases) == [0, 3]
    for layer, basis in calibration.bases.items():
        for name in MATRICES:
            assert np.array_equal(getattr(read.bases[layer], name), getattr(basis, name))
        assert read.bases[layer].digest == basis.digest


def test_the_entries_say_where_the_ops_inputs_stand_in_the_file(written: tuple[Path, Calibration]) -> None:
    path, calibration = written
    raw = path.read_bytes()
    for layer, entries in entries_of(path).items():
        for name, matrix in zip(INPUTS, MATRICES, strict=True):
            entry = entries[name]
            held = np.frombuffer(raw[entry.start : entry.stop], np.float32).reshape(entry.shape)
            assert np.array_equal(held, getattr(calibration.bases[layer], matrix))


def remade(path: Path, change: Callable[[dict[str, np.ndarray], dict[str, str]], Any]) -> None:
    tensors, about = load_file(path), {"format": FORMAT, "version": "1", "checkpoint": "f" * 64}
    change(tensors, about)
    save_file(tensors, path, about)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, a: t.pop("layers.3.key_basis"), "layer 3; got key_feedback, query_basis"),
        (lambda t, a: t.update({"layers.x.key_basis": np.zeros(1, np.float32)}), "tensor 'layers.x.key_basis'"),
        (lambda t, a: t.update({"layers.99999.key_basis": np.zeros((1, 1, 1), np.float32)}), "layers.99999"),
        (lambda t, a: t.update({"layers.0.key_basis": np.zeros((2, 32, 32))}), "layers.0.key_basis; got F64"),
        (lambda t, a: t.update({"layers.0.key_basis": np.zeros((2, 32, 31), np.float32)}), r"got F32 \[2, 32, 31\]"),
        (lambda t, a: t.update({"layers.0.key_feedback": np.zeros((1, 32, 32), np.float32)}), "feedback"),
        (lambda t, a: t["layers.0.query_basis"].fill(np.nan), "not finite"),
        (lambda t, a: t["layers.0.query_basis"].fill(1), "layer 0: query_basis is not key_basis' inverse"),
        (lambda t, a: t.clear(), "no layer"),
        (lambda t, a: a.update(version="2"), "expected skv-calibration 1"),
        (lambda t, a: a.pop("format"), "not a calibration"),
        (lambda t, a: a.pop("checkpoint"), "not a calibration"),
    ],
)
def test_a_file_that_is_none_is_an_error(
    written: tuple[Path, Calibration], change: Callable[..., Any], message: str
) -> None:
    remade(written[0], change)
    with pytest.raises(SkvError, match=message):
        Calibration.load(written[0])


def test_cut_and_foreign_files_are_errors(written: tuple[Path, Calibration], tmp_path: Path) -> None:
    path, _ = written
    whole = path.read_bytes()
    for size in (0, 4, 20, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(SkvError, match=path.name):
            Calibration.load(path)
    header = json.dumps({"__metadata__": {"format": 3}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(SkvError, match="metadata"):
        Calibration.load(path)
    with pytest.raises(SkvError, match="no such file"):
        Calibration.load(tmp_path / "none.safetensors")


def test_a_failed_write_leaves_the_old_file(written: tuple[Path, Calibration], monkeypatch: pytest.MonkeyPatch) -> None:
    path, calibration = written
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(SkvError, match="No space left"):
        calibration.save(path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_fingerprint_tells_a_tuned_checkpoint_from_its_base(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = resolve(tiny_checkpoint("llama"))
    assert base.path is not None
    (tmp_path / "tuned").mkdir()
    for file in base.path.iterdir():
        (tmp_path / "tuned" / file.name).write_bytes(file.read_bytes())
    assert fingerprint(resolve(tmp_path / "tuned")) == fingerprint(base)
    weights = tmp_path / "tuned" / "model.safetensors"
    tensors = load_file(weights)
    name = next(n for n in tensors if "k_proj" in n)
    tensors[name] = tensors[name] + np.float32(1e-3)
    save_file(tensors, weights, {"format": "pt"})
    tuned = resolve(tmp_path / "tuned")
    with pytest.raises(SkvError, match="made for another checkpoint"):
        Calibration({0: make_basis(1, 32, 32)}, fingerprint(base), {}).check(tuned)
