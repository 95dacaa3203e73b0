"""The report: self-contained, escaped, every chart drawn from the analysis's own numbers; and the PNG."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from skv_export.analysis import html_report, pipeline
from skv_export.errors import SkvError
from skv_export.evaluation import charts


@pytest.fixture(scope="module")
def found(tiny_checkpoint: Callable[..., Path]) -> pipeline.Analysis:
    return pipeline.analyze(tiny_checkpoint("llama"), target=pipeline.Target(budget=5.0, context=4096))


class Balanced(HTMLParser):
    """Fails on a tag that is closed in the wrong order, and collects text and links."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_well_formed_and_needs_no_network(found: pipeline.Analysis) -> None:
    page = html_report.html(found)
    parser = Balanced()
    parser.feed(page)
    assert parser.open == [] and parser.links == []
    assert not re.search(r"https?:|url\(|@import|<script", page)
    assert "prefers-color-scheme: dark" in page and len(page) < 1 << 20
    text = " ".join(parser.text)
    for reason in found.recommendation.reasons:
        assert reason in text
    for chart in html_report.charts(found):
        assert chart.title in text


def test_the_strips_show_the_recommended_bits(found: pipeline.Analysis) -> None:
    page = html_report.html(found)
    for i, (k, v) in enumerate(found.recommendation.allocation.bits):
        assert f'title="layer {i}: keys {k} bits">{k}</span>' in page
        assert f'title="layer {i}: values {v} bits">{v}</span>' in page
    assert re.findall(r"<tr class=best><td>(.*?)</td>", page)[0] == "recommended"


def test_charts_hold_the_numbers_of_the_analysis(found: pipeline.Analysis) -> None:
    norms, balance, spectra, memory = html_report.charts(found)
    assert list(norms.lines[0].y) == [layer.k.frobenius for layer in found.layers]
    assert list(balance.lines[-1].y) == [layer.geometry.balance for layer in found.layers]
    assert all(line.y[0] == 1 and max(y for y in line.y if y is not None) == 1 for line in spectra.lines)
    ours = memory.lines[-1]
    at = list(ours.x).index(4096)
    assert ours.y[at] == found.budget.memory(found.recommendation.allocation.bits) / 2**20
    fp16 = next(line for line in memory.lines if line.name == "fp16")
    assert fp16.y[at] == 2 * 2 * 4096 * found.config.num_key_value_heads * found.config.head_dim * 2 / 2**20
    assert ours.y[-1] < fp16.y[-1]


def test_svg_is_xml_and_stays_inside_its_frame(found: pipeline.Analysis) -> None:
    for chart in html_report.charts(found):
        drawing = charts.svg(chart).replace("class=grid", 'class="grid"')
        root = ElementTree.fromstring(drawing)
        for path in root.iter("path"):
            numbers = [float(x) for x in re.findall(r"[\d.]+", path.attrib["d"])]
            assert all(0 <= x <= charts.WIDTH for x in numbers[::2])
            assert all(0 <= y <= charts.HEIGHT for y in numbers[1::2])


def test_a_line_breaks_where_a_value_is_missing() -> None:
    line = charts.Line("gap", [0, 1, 2, 3], [1.0, None, 2.0, float("nan")], "k")
    drawing = charts.svg(charts.Chart("t", "x", "y", (line,)))
    path = re.search(r' d="([^"]+)"', drawing)
    assert path is not None and path[1].count("M") == 2 and "L" not in path[1]
    empty = charts.svg(charts.Chart("t", "x", "y", (charts.Line("none", [0, 1], [None, None], "k"),)))
    assert "No score has a value here" in empty


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [(0, 29, False), (-3.2, 4.9, False), (0.26, 1, False), (5, 5, False), (512, 131072, True), (0.01, 300, True)],
)
def test_ticks_cover_the_range_with_round_numbers(low: float, high: float, log: bool) -> None:
    ticks = charts._ticks(low, high, log)
    assert ticks[0] <= low and len(ticks) <= 12
    assert log or ticks[-1] >= high
    assert all(len(f"{abs(t):.4g}".replace(".", "").strip("0")) <= 2 or log for t in ticks)


def test_hostile_names_are_text(found: pipeline.Analysis) -> None:
    page = html_report.html(dataclasses.replace(found, model="<script>alert(1)</script>"))
    assert "<script" not in page and "&lt;script&gt;" in page


def test_png(found: pipeline.Analysis, tmp_path: Path) -> None:
    html_report.png(found, tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 20_000


def test_png_without_matplotlib_says_how_to_get_it(
    found: pipeline.Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SkvError, match=r"pip install.*plots"):
        html_report.png(found, tmp_path / "a.png")
