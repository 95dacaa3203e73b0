"""The HTML report of a quality run: Pareto plot, loss by position, tables; one self-contained file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from skv_export.evaluation.charts import Chart, Line, figure, model_title, page, series
from skv_export.evaluation.comparison import BITS_CONTEXT, CandidateResult, ComparisonResult, pareto
from skv_export.evaluation.needle import DEPTHS, NeedleResult

_WIDTH, _HEIGHT = 680, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 90, 14, 40
_FLOOR = 1e-6
"""Smallest KL divergence drawn: below it is float32 noise."""


def html(result: ComparisonResult, retrieval: NeedleResult | None = None) -> str:
    """Returns the page."""
    first = result.rows[0]
    parts = [
        f"<h1>{escape(model_title(result.model))}</h1>",
        f"<p>What quantized caches lose: perplexity {first.ppl_reference:.3f} in full precision, {first.windows} "
        f"windows of {result.window} tokens, every token seeing the cache that decoding would have left.</p>",
        "<h2>Loss against bits</h2>",
        f"<div class=scroll>{scatter(result.rows)}</div>",
        f"<p class=note>Bits per element at {BITS_CONTEXT} tokens: codes, scales and full-precision tokens. The line "
        "is the Pareto front: nothing measured here has fewer bits and a smaller loss.</p>",
        _table(result.rows),
        _positions(result.rows),
        _needles(retrieval) if retrieval else "",
    ]
    return page(f"{model_title(result.model)}: quality per bit", parts)


def scatter(rows: Sequence[CandidateResult]) -> str:
    """Draws mean KL divergence, on a logarithmic axis, against effective bits; the front is a line."""
    losses = [max(row.kld_mean, _FLOOR) for row in rows]
    low, high = math.floor(math.log10(min(losses))), math.ceil(math.log10(max(losses)) + 1e-9)
    left, right = math.floor(min(r.effective_bits for r in rows)), math.ceil(max(r.effective_bits for r in rows) + 1e-9)

    def x(bits: float) -> float:
        return _LEFT + (bits - left) / max(1, right - left) * (_WIDTH - _LEFT - _RIGHT)

    def y(loss: float) -> float:
        return _TOP + (high - math.log10(max(loss, _FLOOR))) / max(1, high - low) * (_HEIGHT - _TOP - _BOTTOM)

    name = "KL divergence against effective bits"
    out = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}">']
    for power in range(low, high + 1):
        at = y(10.0**power)
        out.append(f'<line class=grid x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        out.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for bits in range(left, right + 1):
        out.append(f'<text x="{x(bits):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{bits}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    out.append(f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">bits per element</text>')
    turned = f"translate(12 {_HEIGHT / 2}) rotate(-90)"
    out.append(f'<text transform="{turned}" text-anchor="middle">mean KL divergence, nats per token</text>')
    front = pareto(rows)
    path = " ".join(f"{'L' if i else 'M'}{x(r.effective_bits):.1f} {y(r.kld_mean):.1f}" for i, r in enumerate(front))
    out.append(f'<path class="line k" d="{path}"/>')
    points = [(x(row.effective_bits), y(row.kld_mean)) for row in rows]
    for row, (at_x, at_y), label in zip(rows, points, place_labels([row.name for row in rows], points), strict=True):
        style = "series1" if row in front else "series6"
        title = f"{row.name}: {row.effective_bits:.3f} bits, KL divergence {row.kld_mean:.5f}"
        out.append(f'<circle class="{style}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="4" fill="none" stroke-width="2">')
        out.append(f"<title>{escape(title)}</title></circle>")
        if label is not None:
            out.append(f'<text x="{label[0]:.1f}" y="{label[1]:.1f}">{escape(row.name)}</text>')
    return "".join([*out, "</svg>"])


_LETTER, _LINE = 6.7, 13.0
"""Pixels of a letter and of a line, at 12 pixels a letter."""


def place_labels(names: Sequence[str], points: Sequence[tuple[float, float]]) -> list[tuple[float, float] | None]:
    """Returns where each point's name begins, none over another, over a point or outside; None where no place is left.

    Args:
        names: Of the points.
        points: In pixels.
    """
    taken = [(px - 5, py - 5, px + 5, py + 5) for px, py in points]
    found: list[tuple[float, float] | None] = []
    for name, (px, py) in zip(names, points, strict=True):
        width = _LETTER * len(name)
        near = [(px + 8, py + 4), (px - 8 - width, py + 4), (px + 6, py - 7), (px + 6, py + 16)]
        near += [
            (px - 6 - width, py - 7),
            (px - 6 - width, py + 16),
            (px - width / 2, py - 9),
            (px - width / 2, py + 19),
        ]
        place = next((at for at in near if _free(_box(at, width), taken)), None)
        if place is not None:
            taken.append(_box(place, width))
        found.append(place)
    return found


def _box(at: tuple[float, float], width: float) -> tuple[float, float, float, float]:
    """What a text takes: its baseline begins at ``at``."""
    return at[0], at[1] - _LINE + 3, at[0] + width, at[1] + 3


def _free(box: tuple[float, float, float, float], taken: Sequence[tuple[float, float, float, float]]) -> bool:
    inside = box[0] >= _LEFT and box[2] <= _WIDTH and box[1] >= 0 and box[3] <= _HEIGHT - _BOTTOM
    return inside and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken)


def _table(rows: Sequence[CandidateResult]) -> str:
    front = {row.name for row in pareto(rows)}
    ordered = sorted(rows, key=lambda row: row.effective_bits)
    head = ("configuration", "bits", "perplexity rises by", "±", "KLD mean", "p99", "max", "top-1")
    body = [
        (
            row.name + (" *" if row.name in front else ""),
            f"{row.effective_bits:.3f}",
            f"{row.ppl_change_percent:+.2f}%",
            f"{row.ppl_stderr_percent:.2f}",
            f"{row.kld_mean:.5f}",
            f"{row.kld_p99:.4f}",
            f"{row.kld_max:.3f}",
            f"{row.top1_agreement:.2%}",
        )
        for row in ordered
    ]
    best = [row.name in front for row in ordered]
    note = "Bold and *: on the Pareto front; ± is one standard error; KLD is the KL divergence in nats per token."
    return f"<h2>Figures</h2>{_html_table(head, body, best)}<p class=note>{note}</p>"


def _positions(rows: Sequence[CandidateResult]) -> str:
    shown = sorted(rows, key=lambda row: row.effective_bits)
    buckets = len(shown[0].ppl_change_by_position)
    lines = tuple(
        Line(row.name, range(1, buckets + 1), row.ppl_change_by_position, series(i)) for i, row in enumerate(shown)
    )
    label = f"part of the window, of {buckets}"
    chart = Chart("Loss by position", label, "increase of perplexity, %", lines, direct=True)
    body = [(line.name, *(f"{y:+.2f}%" for y in line.y if y is not None)) for line in lines]
    head = ("configuration", *map(str, range(1, buckets + 1)))
    return f"{figure(chart)}{_html_table(head, body)}"


def _needles(found: NeedleResult) -> str:
    head = ("tokens", "configuration", *(f"{depth:.0%}" for depth in DEPTHS), "nats")
    body = [(str(r.length), r.name, *(f"{x:.0%}" for x in r.found), f"{r.nll:.4f}") for r in found.rows]
    return f"<h2>Needles found, by depth</h2>{_html_table(head, body)}"


def _html_table(head: Sequence[str], body: Sequence[Sequence[str]], best: Sequence[bool] = ()) -> str:
    """A table; the rows that ``best`` marks are bold."""
    marks = [" class=best" if mark else "" for mark in best] or [""] * len(body)
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    rows = "".join(
        f"<tr{mark}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row, mark in zip(body, marks, strict=True)
    )
    return f"<div class=scroll><table class=plans><tr>{top}</tr>{rows}</table></div>"
