"""benchmarks/peers.py: the tables of README.md and RESULTS.md are those of its figures."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

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
    for each in [*figures["attention"], figures["model"]]:
        each["noise"] = ""
    assert "noisy" not in peers.conditions(figures)
    figures["model"]["noise"] = "Too noisy to read: all"
    assert "1 of its parts had times too noisy to read" in peers.conditions(figures)


def test_the_prompt_counts_for_perplexity(peers: ModuleType) -> None:
    import numpy as np

    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [1.0, 1.0, 1.0]]))
    assert peers.nll(logits, [0, 1, 0]) == pytest.approx(np.mean([np.log(4), np.log(8)]))
