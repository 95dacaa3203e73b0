"""Reports as pages: colours that everyone tells apart, labels that do not collide, sizes that a phone shows."""

from __future__ import annotations

import itertools
import re
from importlib import resources

import numpy as np
import pytest
from numpy.typing import NDArray

import skv_export
from skv_export.evaluation import charts
from skv_export.evaluation.charts import Chart, Line, figure, model_title, page, series, spread_labels
from skv_export.evaluation.html_report import _LETTER, _box, place_labels

CSS = resources.files("skv_export").joinpath("data/report.css").read_text(encoding="utf-8")
SEEN = {
    "as most people": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    # Machado, Oliveira, Fernandes: A physiologically-based model for simulation of color vision deficiency, 2009.
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(colour: str, seen: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIELAB of an sRGB colour, as an eye sees it."""
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    xyz = np.array(to_xyz) @ np.clip(seen @ linear, 0, 1) / [0.95047, 1.0, 1.08883]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eye", SEEN)
@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_every_eye_tells_the_colours_apart(scheme: int, eye: str) -> None:
    blocks = re.findall(r":root \{(.*?)\}", CSS, flags=re.DOTALL)
    colours = dict(re.findall(r"--(series\d|ground|k|v): (#[0-9a-f]{6})", blocks[scheme]))
    seen = np.array(SEEN[eye], np.float64)
    lines = [lab(colours[f"series{i}"], seen) for i in range(1, charts._COLOURS + 1)]
    for a, b in itertools.combinations(lines, 2):
        assert np.linalg.norm(a - b) > 12
    for line in (*lines, lab(colours["k"], seen), lab(colours["v"], seen)):
        assert np.linalg.norm(line - lab(colours["ground"], seen)) > 25
    assert np.linalg.norm(lab(colours["k"], seen) - lab(colours["v"], seen)) > 25


def test_eighteen_lines_have_styles_of_their_own() -> None:
    assert len({series(i) for i in range(18)}) == 18
    for name in {style.partition(" ")[0] for style in map(series, range(18))}:
        assert f"svg .{name} {{ stroke: var(--{name}); }}" in CSS and CSS.count(f"--{name}: #") == 2


def test_no_text_is_below_eleven_pixels_where_a_chart_is_narrowest() -> None:
    sizes = {int(size) for size in re.findall(r"font(?:-size)?: (\d+)px", CSS)}
    assert min(sizes) >= 11
    (narrowest,) = re.findall(r"\.chart \{[^}]*min-width: (\d+)px", CSS)
    (letters,) = re.findall(r"svg text \{[^}]*font-size: (\d+)px", CSS)
    assert int(letters) * int(narrowest) / charts.WIDTH >= 11
    assert re.search(r"\.strip \{[^}]*flex-wrap: wrap", CSS)  # a strip goes on below, and is never cut


@pytest.mark.parametrize("wanted", [[50, 50, 50], [10, 12, 200, 201], [240, 241, 242, 243], [0, 100, 50], [5]])
def test_labels_are_spread_in_their_order(wanted: list[float]) -> None:
    placed = spread_labels(wanted, 10, 240)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    assert all(placed[b] - placed[a] >= 14 - 1e-9 for a, b in itertools.pairwise(order))
    assert min(placed) >= 10 and max(placed) <= 240
    assert spread_labels([20, 100, 180], 10, 240) == [20, 100, 180]


def test_names_of_points_cover_neither_each_other_nor_points() -> None:
    rng = np.random.default_rng(5)
    points = [(float(x), float(y)) for x, y in zip(rng.uniform(80, 560, 24), rng.uniform(30, 340, 24), strict=True)]
    points += [(300.0, 200.0)] * 4
    names = [f"K{i}V{i}" for i in range(len(points))]
    places = place_labels(names, points)
    assert sum(place is not None for place in places) >= 20 and places[0] is not None
    boxes = [_box(place, _LETTER * len(name)) for name, place in zip(names, places, strict=True) if place is not None]
    dots = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    for a, b in (*itertools.combinations(boxes, 2), *itertools.product(boxes, dots)):
        assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


def test_a_chart_has_a_title_a_legend_and_names_at_its_lines() -> None:
    lines = tuple(Line(f"line <{i}>", [1, 2], [float(i), i + 1.0], series(i)) for i in range(8))
    drawn = figure(Chart("A & B", "x", "y", lines, "A note.", direct=True))
    assert "<h2>A &amp; B</h2>" in drawn and "A note." in drawn
    for i in range(8):
        assert drawn.count(f"line &lt;{i}&gt;") == 3  # the path's title, the name at its end, the legend
    heights = [float(y) for y in re.findall(r'<text x="[\d.]+" y="([\d.]+)">line', drawn)]
    assert len(heights) == 8
    assert all(abs(a - b) >= 13.8 for a, b in itertools.combinations(heights, 2))


def test_every_page_says_when_by_what_and_with_which_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/skv-export", "quality", "a <b>", "--report", "x.html"])
    made = page("t", ["body"])
    assert re.search(r"<footer>\d{4}-\d\d-\d\d; skv-export " + re.escape(skv_export.__version__), made)
    assert "<code>skv-export quality &#x27;a &lt;b&gt;&#x27; --report x.html</code>" in made
    monkeypatch.setattr("sys.argv", ["/usr/bin/pytest"])
    assert "<code>" not in page("t", [])


@pytest.mark.parametrize(
    ("model", "title"),
    [("/a/b/Qwen3-0.6B", "Qwen3-0.6B"), ("./m/x.gguf", "x.gguf"), ("org/name", "org/name"), ("name", "name")],
)
def test_a_title_is_a_name_not_a_path(model: str, title: str) -> None:
    assert model_title(model) == title
