"""Parts of HTML reports: line charts as inline SVG, and the self-contained page around them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources

WIDTH, HEIGHT = 680, 260
"""Of a chart, in pixels."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 22, 12, 38


@dataclass(frozen=True)
class Line:
    """One line of a chart; ``style`` is a CSS class (k, v, other1 ..., dashed)."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    style: str


@dataclass(frozen=True)
class Chart:
    """A line chart's data, drawn as SVG or by matplotlib."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    note: str = ""
    log_x: bool = False
    log_y: bool = False


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
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def svg(chart: Chart) -> str:
    """Draws a chart; lines are interrupted where a value is missing."""
    xs = [x for line in chart.lines for x in line.x]
    ys = [
        y for line in chart.lines for y in line.y if y is not None and math.isfinite(y) and (y > 0 or not chart.log_y)
    ]
    if not xs or not ys:
        return "<p class=note>No score has a value here.</p>"
    x_ticks, y_ticks = _ticks(min(xs), max(xs), chart.log_x), _ticks(min(ys), max(ys), chart.log_y)
    x_scale = _scale(min(xs), max(xs), _LEFT, WIDTH - _RIGHT, chart.log_x)
    y_scale = _scale(min(ys + y_ticks), max(ys + y_ticks), HEIGHT - _BOTTOM, _TOP, chart.log_y)
    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title, quote=True)}">']
    for tick in y_ticks:
        y = y_scale(tick)
        out.append(f'<line class=grid x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_label(tick)}</text>')
    for tick in (t for t in x_ticks if min(xs) <= t <= max(xs)):
        out.append(
            f'<text x="{x_scale(tick):.1f}" y="{HEIGHT - _BOTTOM + 18}" text-anchor="middle">{_label(tick)}</text>'
        )
    middle = (_LEFT + WIDTH) / 2
    out.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(chart.x_label)}</text>')
    turned = f"translate(12 {HEIGHT / 2}) rotate(-90)"
    out.append(f'<text transform="{turned}" text-anchor="middle">{escape(chart.y_label)}</text>')
    for line in chart.lines:
        out += _path(line, x_scale, y_scale, chart.log_y)
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
