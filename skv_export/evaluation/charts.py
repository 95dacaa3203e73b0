"""Parts of HTML reports: line charts as inline SVG, and the self-contained page around them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path

from skv_export.paths import looks_like_path
from skv_export.provenance import command, today, versions

WIDTH, HEIGHT = 680, 260
"""Of a chart, in pixels."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 22, 12, 38
_LABEL_HEIGHT, _LETTER = 14, 6.7
"""Of a label of 12 pixels, with its distance to the next; a letter's width at most, on average."""
_COLOURS = 6
_DASHES = ("", " dashed", " dotted")


def series(i: int) -> str:
    """Returns the style of the i-th of many lines: six colours that colour-blind readers tell apart, then dashes."""
    return f"series{i % _COLOURS + 1}{_DASHES[i // _COLOURS % len(_DASHES)]}"


@dataclass(frozen=True)
class Line:
    """One line of a chart; ``style`` is CSS classes: k, v or one of ``series``, and dashed or dotted."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    style: str


@dataclass(frozen=True)
class Chart:
    """A line chart's data, drawn as SVG or by matplotlib; ``direct``: each line's name stands at its end."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    note: str = ""
    log_x: bool = False
    log_y: bool = False
    direct: bool = False


def page(title: str, parts: Iterable[str]) -> str:
    """Returns an HTML page that needs no other file, light or dark as the reader's system is.

    Args:
        title: Of the window; plain text.
        parts: The body, piece by piece, in HTML.
    """
    style = resources.files("skv_export").joinpath("data/report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><main>{''.join(parts)}{_footer()}</main></body></html>\n"
    )


def model_title(model: str) -> str:
    """Returns a model's name for a title: the last part of a path, a hub id as it is."""
    return Path(model).name if looks_like_path(model) or Path(model).exists() else model


def _footer() -> str:
    """When, with what and by which command the page was made."""
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    by = f"<br>Made by <code>{escape(command())}</code>" if command() else ""
    return f"<footer>{today()}; {escape(made)}{by}</footer>"


def figure(chart: Chart) -> str:
    """Returns a chart with its title, a legend, and its note; on a narrow screen it can be moved, not shrunk."""
    legend = "".join(
        f'<li><svg width="22" height="8" aria-hidden="true"><line x1="0" x2="22" y1="4" y2="4" '
        f'class="line {line.style}"/></svg>{escape(line.name)}</li>'
        for line in chart.lines
    )
    note = f"<figcaption>{escape(chart.note)}</figcaption>" if chart.note else ""
    drawing = f"<div class=scroll>{svg(chart)}</div><ul class=legend>{legend}</ul>"
    return f"<figure><h2>{escape(chart.title)}</h2>{drawing}{note}</figure>"


def spread_labels(wanted: Sequence[float], low: float, high: float, height: float = _LABEL_HEIGHT) -> list[float]:
    """Returns where labels stand so that none covers another: near where they are wanted, in the same order.

    Args:
        wanted: The middle of each, in pixels.
        low: Where the first may be.
        high: Where the last may be, if there is room for all.
        height: Of a label.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    at = low
    for i in order:  # downwards, then back up from the end: what was pushed out comes in again
        placed[i] = at = max(wanted[i], at)
        at += height
    at = max(high, low + height * (len(wanted) - 1))
    for i in reversed(order):
        placed[i] = at = min(placed[i], at)
        at -= height
    return placed


def svg(chart: Chart) -> str:
    """Draws a chart; lines are interrupted where a value is missing."""
    xs = [x for line in chart.lines for x in line.x]
    ys = [
        y for line in chart.lines for y in line.y if y is not None and math.isfinite(y) and (y > 0 or not chart.log_y)
    ]
    if not xs or not ys:
        return "<p class=note>No score has a value here.</p>"
    x_ticks, y_ticks = _ticks(min(xs), max(xs), chart.log_x), _ticks(min(ys), max(ys), chart.log_y)
    right = _RIGHT + (_LETTER * max(len(line.name) for line in chart.lines) + 8 if chart.direct else 0)
    x_scale = _scale(min(xs), max(xs), _LEFT, WIDTH - right, chart.log_x)
    y_scale = _scale(min(ys + y_ticks), max(ys + y_ticks), HEIGHT - _BOTTOM, _TOP, chart.log_y)
    name = escape(chart.title, quote=True)
    out = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">']
    for tick in y_ticks:
        y = y_scale(tick)
        out.append(f'<line class=grid x1="{_LEFT}" x2="{WIDTH - right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_label(tick)}</text>')
    for tick in (t for t in x_ticks if min(xs) <= t <= max(xs)):
        out.append(
            f'<text x="{x_scale(tick):.1f}" y="{HEIGHT - _BOTTOM + 18}" text-anchor="middle">{_label(tick)}</text>'
        )
    middle = (_LEFT + WIDTH - right) / 2
    out.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(chart.x_label)}</text>')
    turned = f"translate(12 {HEIGHT / 2}) rotate(-90)"
    out.append(f'<text transform="{turned}" text-anchor="middle">{escape(chart.y_label)}</text>')
    for line in chart.lines:
        out += _path(line, x_scale, y_scale, chart.log_y)
    if chart.direct:
        ends = [(line, [y for y in line.y if y is not None and math.isfinite(y)]) for line in chart.lines]
        named = [(line, y_scale(y[-1])) for line, y in ends if y and (y[-1] > 0 or not chart.log_y)]
        places = spread_labels([y for _, y in named], _TOP, HEIGHT - _BOTTOM)
        for (line, _), y in zip(named, places, strict=True):
            out.append(f'<text x="{WIDTH - right + 8:.1f}" y="{y + 4:.1f}">{escape(line.name)}</text>')
    return "".join([*out, "</svg>"])


def _path(line: Line, x_scale: _Scale, y_scale: _Scale, log_y: bool) -> list[str]:
    points: list[str] = []
    pen = "M"
    for x, y in zip(line.x, line.y, strict=True):
        if y is None or not math.isfinite(y) or (log_y and y <= 0):
            pen = "M"
            continue
        points.append(f"{pen}{x_scale(x):.1f} {y_scale(y):.1f}")
        pen = "L"
    return [f'<path class="line {line.style}" d="{"".join(points)}"><title>{escape(line.name)}</title></path>']


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    stop: float
    log: bool

    def __call__(self, value: float) -> float:
        share = (self._on(value) - self._on(self.low)) / ((self._on(self.high) - self._on(self.low)) or 1.0)
        return self.start + share * (self.stop - self.start)

    def _on(self, value: float) -> float:
        return math.log2(value) if self.log else value


def _scale(low: float, high: float, start: float, stop: float, log: bool) -> _Scale:
    return _Scale(low, high, start, stop, log)


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Returns about five round numbers around a range."""
    if log:
        first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
        stride = max(1, math.ceil((last - first) / 6))
        return [2.0**i for i in range(first, last + 1, stride)]
    raw = (high - low) / 5 or 1.0
    power = float(10.0 ** math.floor(math.log10(raw)))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
    if low >= 0 and high <= 512 and float(low).is_integer() and float(high).is_integer() and high - low > 1:
        step = max(1.0, float(round(step)))
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _label(value: float) -> str:
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:g}k"
    return f"{value:.4g}".replace("-", "−")
