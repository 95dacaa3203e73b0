"""Reports of an analysis: one self-contained HTML file (inline SVG, light and dark), and a PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from skv_export.analysis.result import Allocation, Analysis
from skv_export.errors import missing_module
from skv_export.evaluation.charts import Chart, Line, figure, model_title, page, series

_CONTEXTS = [1 << i for i in range(9, 18)]


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
        Line(score.name, index, score.balance, series(i))
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

    ours = [found.budget.memory(found.recommendation.allocation.bits, n) / 2**20 for n in contexts]
    return (
        Line("fp16", contexts, plain(2), "series6"),
        Line("int8", contexts, plain(1), "series3"),
        Line("recommendation", contexts, ours, "k"),
    )


def html(found: Analysis) -> str:
    """Returns the page."""
    r = found.recommendation
    memory = found.budget.memory(r.allocation.bits)
    full = found.budget.memory([(16, 16)] * len(found.layers))
    facts = [
        ("effective bits", f"{r.allocation.effective_bits:.2f}"),
        (f"cache, {found.budget.batch} × {found.budget.context:,} tokens", _size(memory)),
        ("of the fp16 cache", f"{100 * memory / full:.0f}%"),
        ("read", f"{_size(found.bytes_read)} of {_size(found.tensor_bytes)}"),
    ]
    parts = [
        f"<h1>{escape(model_title(found.model))}</h1>",
        f"<p>{len(found.layers)} layers, {found.config.num_attention_heads} heads, "
        f"{found.config.num_key_value_heads} KV heads of {found.config.head_dim}, "
        f"{escape(found.config.model_type)}</p>",
        "<dl class=facts>"
        + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
        + "</dl>",
        "<h2>Recommended bits</h2>",
        _strip(r.allocation),
        "<ul>" + "".join(f"<li>{escape(reason)}</li>" for reason in r.reasons) + "</ul>",
        _plans(found),
        *(figure(chart) for chart in charts(found)),
        "<h2>What each score asks for</h2>",
        *(f"<h3>{escape(s.name)}</h3>{_strip_bits(s.bits)}{_note(s.note)}" for s in found.scores),
        _flags(found),
    ]
    return page(f"{model_title(found.model)}: key and value bits", parts)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def _note(text: str) -> str:
    return f"<p class=note>{escape(text)}</p>" if text else ""


def _strip(allocation: Allocation) -> str:
    return _strip_bits(allocation.bits)


def _strip_bits(bits: Sequence[tuple[int, int]]) -> str:
    """A column for each layer, keys above values, the darker the more bits; a long model goes on below."""
    layers = [
        f"<div><span class=axis>{i if i % 5 == 0 else ''}</span>"
        + "".join(
            f'<span class="{name[0]}" style="--level:{min(width, 8) / 8:.3f}" title="layer {i}: {name} {width} bits">'
            f"{width}</span>"
            for name, width in zip(("keys", "values"), pair, strict=True)
        )
        + "</div>"
        for i, pair in enumerate(bits)
    ]
    names = "<div class=names><span class=axis>layer</span><span>keys</span><span>values</span></div>"
    return f"<div class=strip>{names}{''.join(layers)}</div>"


def _plans(found: Analysis) -> str:
    r = found.recommendation
    best = [("recommended", r.allocation), (f"best uniform pair: {r.uniform.name}", r.uniform)]
    rows = "".join(
        f"<tr{' class=best' if p is r.allocation else ''}><td>{escape(name)}</td><td>{p.effective_bits:.2f}</td>"
        f"<td>{_size(found.budget.memory(p.bits))}</td><td>{'' if p.loss is None else f'{p.loss:.3g}'}</td></tr>"
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


def png(found: Analysis, path: Path) -> None:
    """Draws the same charts with matplotlib.

    Raises:
        SkvError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise missing_module("matplotlib", "--plot") from error
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    colours = {"k": "#0072b2", "v": "#d55e00", "series1": "#0072b2", "series2": "#d55e00", "series3": "#009e73"}
    colours |= {"series4": "#cc79a7", "series5": "#e0b400", "series6": "#000000"}
    figure, axes = plt.subplots(2, 2, figsize=(12, 7.5), layout="constrained")
    figure.suptitle(f"{found.model}: {found.recommendation.allocation.effective_bits:.2f} effective bits recommended")
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
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)
