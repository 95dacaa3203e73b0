"""The runtimes that a whole model is timed against: how they are named, and that they run."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_graph import Tiny

from skv_export.bench import model, model_peers
from skv_export.bench.model_peers import Job, parse
from skv_export.checkpoints.demo_model import demo_checkpoint
from skv_export.errors import SkvError


def _made(folder: Path, *files: str) -> Path:
    folder.mkdir()
    for name in files:
        (folder / name).write_text("{}")
    return folder


def test_what_a_path_holds_tells_who_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    exported = _made(tmp_path / "a", "skv_config.json", "genai_config.json", "config.json")
    built = _made(tmp_path / "b", "genai_config.json", "config.json")
    checkpoint = _made(tmp_path / "c", "config.json")
    file = tmp_path / "d=e.gguf"
    file.write_bytes(b"GGUF")
    found = [parse(str(path))[0] for path in (exported, built, checkpoint, file)]
    assert found == ["skv", "genai", "transformers", "llama.cpp"]
    assert parse(f"openvino-u8={file}") == ("openvino-u8", file)


def test_what_can_not_be_timed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = _made(tmp_path / "empty")
    for text, message in (
        (str(tmp_path / "missing"), "bench: what to time; got .*missing"),
        ("genai=nowhere", "bench: what to time; got genai=nowhere"),
        (f"tensorrt={empty}", "the name of a runtime; got tensorrt; expected skv, genai, llama.cpp"),
        (str(empty), "bench: what runs it"),
    ):
        with pytest.raises(SkvError, match=message):
            parse(text)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SkvError, match=r"openvino-u8 is not installed.*pip install openvino-genai"):
        parse(f"openvino-u8={empty}")


def test_two_exports_take_turns(tmp_path: Path) -> None:
    one, two = (Tiny().write(tmp_path / name) for name in ("one", "two"))
    rows = model.bench_model(one, against=[two], context=(8,), threads=1, rounds=1, steps=2)
    assert [row.name for row in rows] == ["skv", "skv two"]
    assert rows[1].speedup == {"skv": pytest.approx(rows[0].ms_median / rows[1].ms_median)}
    table = model.format_rows(rows).splitlines()
    assert table[-1].endswith(f"{rows[1].ms_median / rows[0].ms_median:.2f}x |") and table[-2].endswith("|  |")
    with pytest.raises(SkvError, match="the same candidate twice"):
        model.bench_model(one, against=[two, two], context=(8,), rounds=1)


def test_the_first_step_is_not_a_measurement() -> None:
    run = model_peers._run([10.0, 12.0, 99.0, 99.5, 100.25])
    assert run.prefill_seconds == 2 and run.decode_ms == (500.0, 750.0)


@pytest.mark.skipif("SKV_LLAMA_CPP" not in os.environ, reason="SKV_LLAMA_CPP is not set: no llama.cpp")
def test_llama_cpp_runs_a_gguf_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.environ["SKV_LLAMA_CPP"])
    run = model._in_a_process(
        Job("llama.cpp-q4_0", str(demo_checkpoint()), context=16, threads=1, steps=2, clock="cpu")
    )
    assert run.prefill_seconds > 0 and len(run.decode_ms) == 2 and min(run.decode_ms) > 0
    assert run.peak_bytes > demo_checkpoint().stat().st_size


def test_transformers_runs_a_checkpoint(tiny_checkpoint: Callable[..., Path]) -> None:
    job = Job("transformers", str(tiny_checkpoint("llama")), context=16, threads=1, steps=2, clock="cpu")
    run = model._in_a_process(job)
    assert run.prefill_seconds > 0 and len(run.decode_ms) == 2 and run.peak_bytes > 50 << 20
