"""Owns the pages that show an analysis: one self-contained HTML file (inline SVG, light and dark), and a PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path

from skv_export.analysis.pipeline import Analysis, Plan
from skv_export.errors import SkvError

WIDTH, HEIGHT = 680, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 22, 12, 38
_CONTEXTS = [1 << i for i in range(9, 18)]


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


def charts(found: Analysis) -> list[Chart]:
    """Returns the charts of an analysis."""
    index = [layer.index for layer in found.layers]
    norm_lines = (
        Line("keys, Frobenius", index, [x.k.frobenius for x in found.layers], "k"),
        Line("values, Frobenius", index, [x.v.frobenius for x in found.layers], "v"),
        Line("keys, spectral", index, [x.k.spectral for x in found.layers], "k dashed"),
        Line("values, spectral", index, [x.v.spectral for x in found.layers], "v dashed"),
    )
    balance = tuple(
        Line(score.name, index, score.balance, f"other{i + 1}")
        for i, score in enumerate(found.scores)
        if any(b is not None for b in score.balance)
    )
    middle = len(found.layers) // 2
    spectra: list[Line] = []
    for at, style in ((0, ""), (middle, "dashed"), (len(found.layers) - 1, "dotted")):
        layer = found.layers[at]
        for name, norms, colour in (("keys", layer.k, "k"), ("values", layer.v, "v")):
            top = [s / norms.spectral for s in norms.spectrum if norms.spectral]
            label = f"{name}, layer {at}"
            if label not in [line.name for line in spectra]:
                spectra.append(Line(label, range(1, len(top) + 1), top, f"{colour} {style}"))
    return [
        Chart(
            "Norms by layer",
            "layer",
            "norm",
            norm_lines,
            "Of the key and value projections. With a norm on keys after the projection, theirs say nothing.",
            log_y=True,
        ),
        Chart(
            "Balance by layer",
            "layer",
            "k_bits − v_bits",
            balance,
            "How many more bits each score would give keys than values: above 0, keys need more.",
        ),
        Chart(
            "Singular spectra",
            "singular value",
            "share of the largest",
            tuple(spectra),
            "The largest of the first, middle and last layer: a steep fall means that few directions matter.",
        ),
        Chart(
            "Memory against context",
            "tokens",
            "MiB",
            _memory_lines(found),
            f"The whole cache, scales and full-precision tokens included, batch {found.budget.batch}.",
            log_x=True,
            log_y=True,
        ),
    ]


def _memory_lines(found: Analysis) -> tuple[Line, ...]:
    contexts = sorted({*_CONTEXTS, found.budget.context})
    config = found.config
    per_token = 2 * config.num_key_value_heads * config.head_dim * found.budget.batch / 2**20

    def plain(width: int) -> list[float]:
        return [sum(min(n, w) if w else n for w in config.windows) * per_token * width for n in contexts]

    ours = [found.budget.memory(found.recommendation.plan.bits, n) / 2**20 for n in contexts]
    return (
        Line("fp16", contexts, plain(2), "other1"),
        Line("int8", contexts, plain(1), "other2"),
        Line("recommendation", contexts, ours, "k"),
    )


def html(found: Analysis) -> str:
    """Returns the page."""
    style = resources.files("skv_export").joinpath("data/report.css").read_text(encoding="utf-8")
    r = found.recommendation
    memory = found.budget.memory(r.plan.bits)
    full = found.budget.memory([(16, 16)] * len(found.layers))
    facts = [
        ("effective bits", f"{r.plan.effective_bits:.2f}"),
        (f"cache, {found.budget.batch} × {found.budget.context:,} tokens", _size(memory)),
        ("of the fp16 cache", f"{100 * memory / full:.0f}%"),
        ("read", f"{_size(found.bytes_read)} of {_size(found.tensor_bytes)}"),
    ]
    parts = [
        f"<h1>{escape(found.model)}</h1>",
        f"<p>{len(found.layers)} layers, {found.config.num_attention_heads} heads, "
        f"{found.config.num_key_value_heads} KV heads of {found.config.head_dim}, "
        f"{escape(found.config.model_type)}</p>",
        "<dl class=facts>"
        + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
        + "</dl>",
        "<h2>Recommended bits</h2>",
        _strip(r.plan),
        "<ul>" + "".join(f"<li>{escape(reason)}</li>" for reason in r.reasons) + "</ul>",
        _plans(found),
        *(_figure(chart) for chart in charts(found)),
        "<h2>What each score asks for</h2>",
        *(f"<h3>{escape(s.name)}</h3>{_strip_bits(s.bits)}{_note(s.note)}" for s in found.scores),
        _flags(found),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(found.model)}: key and value bits</title><style>{style}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def _note(text: str) -> str:
    return f"<p class=note>{escape(text)}</p>" if text else ""


def _strip(plan: Plan) -> str:
    return _strip_bits(plan.bits)


def _strip_bits(bits: Sequence[tuple[int, int]]) -> str:
    """Two rows of cells, keys and values, the darker the more bits."""
    rows = []
    for label, side in (("keys", 0), ("values", 1)):
        cells = "".join(
            f'<td class="{"kv"[side]}" style="--level:{min(pair[side], 8) / 8:.3f}" '
            f'title="layer {i}: {label} {pair[side]} bits">{pair[side]}</td>'
            for i, pair in enumerate(bits)
        )
        rows.append(f"<tr><th scope=row>{label}</th>{cells}</tr>")
    numbers = "".join(f"<td>{i if i % 5 == 0 else ''}</td>" for i in range(len(bits)))
    return (
        f"<div class=scroll><table class=strip>{''.join(rows)}<tr class=axis><th>layer</th>{numbers}</tr></table></div>"
    )


def _plans(found: Analysis) -> str:
    r = found.recommendation
    best = [("recommended", r.plan), (f"best uniform pair: {r.uniform.name}", r.uniform)]
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{p.effective_bits:.2f}</td><td>{_size(found.budget.memory(p.bits))}</td>"
        f"<td>{p.loss:.3g}</td></tr>"
        for name, p in [*best, *((p.name, p) for p in r.neighbours)]
    )
    head = "<tr><th>allocation</th><th>effective bits</th><th>memory</th><th>expected loss</th></tr>"
    return (
        f"<h2>Neighbours</h2><div class=scroll><table class=plans>{head}{rows}</table></div>"
        f"<p class=note>Loss: {escape(r.loss_unit)}, by the score {escape(r.score)}.</p>"
    )


def _flags(found: Analysis) -> str:
    items = "".join(f"<li>{escape(str(flag['text']))}</li>" for flag in found.flags)
    return f"<h2>Flags</h2><ul>{items}</ul>" if items else ""


def _figure(chart: Chart) -> str:
    legend = "".join(
        f'<li><svg width="22" height="8" aria-hidden="true"><line x1="0" x2="22" y1="4" y2="4" '
        f'class="line {line.style}"/></svg>{escape(line.name)}</li>'
        for line in chart.lines
    )
    return (
        f"<figure><h2>{escape(chart.title)}</h2>{svg(chart)}<ul class=legend>{legend}</ul>"
        f"<figcaption>{escape(chart.note)}</figcaption></figure>"
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


def png(found: Analysis, path: Path) -> None:
    """Draws the same charts with matplotlib.

    Raises:
        SkvError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise SkvError("--plot needs matplotlib", fix="pip install 'skv-export[plots]'") from error
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    colours = {"k": "#2a6fdb", "v": "#d9730d", "other1": "#6b7280", "other2": "#b4881d", "other3": "#2a6fdb"}
    colours |= {"other4": "#15857a", "other5": "#b0339b"}
    figure, axes = plt.subplots(2, 2, figsize=(12, 7.5), layout="constrained")
    figure.suptitle(f"{found.model}: {found.recommendation.plan.effective_bits:.2f} effective bits recommended")
    for axis, chart in zip(axes.flat, charts(found), strict=True):
        for line in chart.lines:
            first, _, rest = line.style.partition(" ")
            dash = {"dashed": "--", "dotted": ":"}.get(rest.strip(), "-")
            y = [math.nan if value is None else value for value in line.y]
            axis.plot(list(line.x), y, dash, color=colours[first], label=line.name)
        axis.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
        if chart.log_x:
            axis.set_xscale("log", base=2)
        if chart.log_y:
            axis.set_yscale("log", base=2)
        axis.grid(alpha=0.3)
        if chart.lines:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
