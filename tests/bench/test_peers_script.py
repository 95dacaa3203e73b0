"""benchmarks/peers.py: the tables of README.md and RESULTS.md are those of its figures."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "benchmarks" / "peers.json"


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peers", ROOT / "benchmarks" / "peers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_figures(peers: ModuleType, tmp_path: Path) -> None:
    originals = ROOT / "benchmarks" / "RESULTS.md", ROOT / "README.md"
    copies = [Path(shutil.copy(path, tmp_path / path.name)) for path in originals]
    peers.render(json.loads(FIGURES.read_text()), *copies)
    for original, copy in zip(originals, copies, strict=True):
        assert copy.read_text() == original.read_text(), f"python benchmarks/peers.py --render {FIGURES}"


def test_a_file_without_the_marks_is_left_as_it_is(peers: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing to replace")
    with pytest.raises(SystemExit, match=r"page\.md: no <!-- peers"):
        peers.render(json.loads(FIGURES.read_text()), page, page)
    assert page.read_text() == "nothing to replace"


def test_what_was_too_noisy_is_said(peers: ModuleType) -> None:
    figures = json.loads(FIGURES.read_text())
    for each in [*figures["attention"], figures["model"], figures["batch"]]:
        each["noise"] = ""
    assert "noisy" not in peers.conditions(figures)
    figures["model"]["noise"] = "Too noisy to read: all"
    assert "1 of its parts had times too noisy to read" in " ".join(peers.conditions(figures).split())


@pytest.fixture
def figures() -> dict[str, Any]:
    """Of all parts, with two numbers of sequences."""
    found = json.loads(FIGURES.read_text())
    row = {"name": "K4V2, int8 products", "context": 2048, "prefill_seconds": 4.0, "peak_bytes": 300 << 20}
    rows = [row | {"sequences": n, "tokens_per_s": 70.4 * n, "ms_median": 14.2} for n in (1, 8)]
    found["batch"] = {"noise": "", "rows": [*rows, *(each | {"name": "llama.cpp"} for each in rows)]}
    found["conditions"]["batch"] = dict(found["conditions"]["model"])
    for each in found["attention"]:
        each["read_gb_per_s"] = 20.0
    return found


def test_sequences_together_have_a_table(peers: ModuleType, figures: dict[str, Any], tmp_path: Path) -> None:
    assert peers.batch_table(figures).splitlines() == [
        "|  | 1 sequence, tokens/s | 8 sequences, tokens/s | prompts, s | peak MiB |",
        "| --- | --- | --- | --- | --- |",
        "| K4V2, int8 products | 70 | 563 | 4.0 / 4.0 | 300 / 300 |",
        "| llama.cpp | 70 | 563 | 4.0 / 4.0 | 300 / 300 |",
    ]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{peers.BEGIN}\n{peers.END}\nafter")
    peers.render(figures, page, Path(shutil.copy(page, tmp_path / "readme.md")))
    assert "Sequences of 2,048 tokens that decode together:\n\n|  | 1 sequence" in page.read_text()


def test_a_step_is_held_to_what_its_bytes_take(peers: ModuleType, figures: dict[str, Any]) -> None:
    figures["attention"][0]["rows"][0] |= {"bytes": 40_000_000, "ms_min": 4.0}
    line = peers.bound_table(figures).splitlines()[2]
    assert line == "| 32 / 8 / 128, 4,096 | 40.0 | 20.0 | 2.00 | 4.00 | 50% |"


def test_the_memorys_rate_is_that_of_all_threads(peers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((0.0, 4.0, 5.0, 7.0))
    monkeypatch.setitem(peers.CLOCKS, "wall", lambda: next(times))
    monkeypatch.setattr(peers, "READ_BYTES", 1 << 10)
    assert peers.read_rate(3, "wall", repetitions=2) == pytest.approx(3 * 1024 / 2 / 1e9), "the best of two passes"


def test_parts_that_were_measured_apart_say_how(peers: ModuleType, figures: dict[str, Any]) -> None:
    assert peers.conditions(figures).count("2 threads") == 1
    figures["conditions"]["batch"]["threads"] = 4
    figures["batch"]["noise"] = "Too noisy to read: llama.cpp"
    first, second = peers.conditions(figures).replace("\n\n", "|").replace("\n", " ").split("|")
    assert first.startswith("Attention, whole models, perplexity: ") and "2 threads" in first and "4 of its" in first
    assert second.startswith("Sequences together: ") and "4 threads" in second and "1 of its parts" in second


def test_a_part_that_is_not_measured_stays(peers: ModuleType, figures: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    file.write_text(json.dumps(figures))
    given = argparse.Namespace(json=file, threads=1, clock="cpu")
    found = peers.measure({"batch": lambda: {"noise": "", "rows": []}}, given)
    assert found == json.loads(file.read_text()) and found["batch"]["rows"] == []
    assert found["conditions"]["batch"]["clock"] == "cpu" and found["conditions"]["model"]["clock"] == "wall"
    assert {part: found[part] for part in ("attention", "model", "quality")} == {
        part: figures[part] for part in ("attention", "model", "quality")
    }


def test_unknown_parts_are_refused(peers: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["peers.py", "--only", "model,speed"])
    with pytest.raises(SystemExit):
        peers.main()
    assert "--only: speed; expected attention, model, batch, quality" in capsys.readouterr().err


def test_the_prompt_counts_for_perplexity(peers: ModuleType) -> None:
    import numpy as np

    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [1.0, 1.0, 1.0]]))
    assert peers.nll(logits, [0, 1, 0]) == pytest.approx(np.mean([np.log(4), np.log(8)]))
