"""benchmarks/literature.py: table and drawing are those of its figures."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import literature
import pytest

ROOT = Path(__file__).resolve().parents[2]
FIGURES = json.loads(literature.FIGURES.read_text())


def test_the_table_and_the_drawing_are_those_of_the_figures(tmp_path: Path) -> None:
    page = Path(shutil.copy(ROOT / "benchmarks" / "RESULTS.md", tmp_path / "RESULTS.md"))
    literature.render(FIGURES, tmp_path / "literature.svg", page)
    again = "python benchmarks/literature.py"
    assert page.read_text() == (ROOT / "benchmarks" / "RESULTS.md").read_text(), again
    assert (tmp_path / "literature.svg").read_text() == (ROOT / "docs" / "literature.svg").read_text(), again


def test_every_row_is_a_point_inside_its_panel() -> None:
    drawing = ET.fromstring(literature.svg(FIGURES))
    _, _, width, height = map(float, drawing.attrib["viewBox"].split())
    points = [p for p in drawing.iter("{http://www.w3.org/2000/svg}circle") if len(p)]
    names = [p[0].text for p in points]
    shown = [row["name"] for model in FIGURES.values() for row in model["rows"]]
    assert sorted(names) == sorted(name for name in shown if literature.method(name) in literature.LEGEND)
    assert all(0 < float(p.attrib["cx"]) < width and 0 < float(p.attrib["cy"]) < height for p in points)


def test_bold_is_what_nothing_beats() -> None:
    rows = [
        {
            "name": name,
            "effective_bits": bits,
            "kld_mean": loss,
            "kld_stderr": 0.0,
            "ppl_change_percent": 1.0,
            "windows": 2,
        }
        for name, bits, loss in (("K2V2", 2.5, 0.1), ("kivi-k2v2", 3.0, 0.2), ("K4V4", 4.5, 0.01))
    ]
    shown = literature.table({"tiny": {"ppl": 10.0, "rows": rows}})
    assert "| K2V2 | 2.50 | **0.1000**" in shown and "| kivi-k2v2 | 3.00 | 0.2000 ±" in shown
    assert shown.startswith("Windows measured, and their perplexity in full precision: tiny 2 and 10.0.")


def test_a_page_without_the_marks_is_left_as_it_is(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing to replace")
    with pytest.raises(SystemExit, match="no <!-- literature"):
        literature.render(FIGURES, tmp_path / "literature.svg", page)
    assert page.read_text() == "nothing to replace"


def test_a_measurement_without_a_name_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(literature, "measure", lambda _: pytest.fail("measured"))
    monkeypatch.setattr("sys.argv", ["literature.py", "--measure", "somewhere"])
    with pytest.raises(SystemExit):
        literature.main()
    assert "--name says where the figures go" in capsys.readouterr().err
