"""Where the methods of the literature stand beside recipes: KL divergence against bits, on one text in one run.

    python benchmarks/literature.py --measure CHECKPOINT --name NAME [--calibration FILE] [--windows 8] [--first 4]
    python benchmarks/literature.py                          # draws docs/literature.svg and writes the tables anew

Windows of the shipped prose, scored behind a prompt of 256 tokens, as some methods are fitted to one. Measuring goes on
where it stopped (--state), and puts a model's figures in the place of those it had in benchmarks/literature.json.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from operator import itemgetter
from pathlib import Path
from typing import Any

from skv_export.calibration.file import Calibration
from skv_export.checkpoints.checkpoint import resolve
from skv_export.checkpoints.demo_model import demo_checkpoint
from skv_export.evaluation import candidates, comparison
from skv_export.evaluation.baselines import parse_baselines
from skv_export.evaluation.text import read_text
from skv_export.spec.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "benchmarks" / "literature.json"
OURS = "K2V2,K3V2,K4V2,K4V4"
THEIRS = (
    "kivi-k2v2,kivi-k4v2,kivi-k4v4,kvquant-k2v2,kvquant-k3v3,kvquant-k4v4,kvarn-k2v2,kvarn-k4v2,squat-k2v2,squat-k4v4,"
    "svdq-k2v2,svdq-k4v4,oscar-k2v2,oscar-k3v3,turboquant-k2v2,turboquant-k3v3,turboquant-k4v4,turboquant-prod-k4v4,"
    "rotatekv-k2v2,rotatekv-k4v4,rvq-k2v2,rvq-k3v3,polarquant-k3v3,polarquant-k4v4,decoquant-k2v2,decoquant-k4v4,"
    "alignedkv"
)
WINDOW, PROMPT = 1024, 256
BEGIN, END = "<!-- literature: written by benchmarks/literature.py -->", "<!-- end of literature -->"
SHOWN = (
    "name", "effective_bits", "ppl_change_percent", "ppl_stderr_percent", "kld_mean", "kld_stderr", "kld_p99",
    "top1_agreement", "windows",
)  # fmt: skip


def measure(given: argparse.Namespace) -> None:
    """Measures a model and keeps its figures."""

    def progress(name: str, done: int, total: int) -> None:
        print(f"{done}/{total} {name}", file=sys.stderr, flush=True)

    bases = Calibration.load(given.calibration).bases if given.calibration else None
    found = candidates.parse_configs(given.ours, Recipe(), bases) + parse_baselines(given.theirs)
    result = comparison.run(
        resolve(given.measure),
        found,
        read_text(None),
        windows=given.windows,
        window=WINDOW,
        first=given.first,
        prompt=PROMPT,
        state=given.state,
        progress=progress,
    )
    kept = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.is_file() else {}
    kept[given.name] = {
        "ppl": round(result.rows[0].ppl_reference, 3),
        "rows": [{key: _rounded(vars(row)[key]) for key in SHOWN} for row in result.rows],
    }
    FIGURES.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(result.table())


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


# Drawing.


LEGEND = {
    "ours": ("this project", "#0b5fa5"),
    "calibrated": ("this project, calibrated", "#56b4e9"),
    "kivi": ("KIVI", "#d55e00"),
    "kvquant": ("KVQuant", "#009e73"),
    "kvarn": ("KVarN", "#cc79a7"),
    "squat": ("SQuat", "#e69f00"),
    "svdq": ("SVDq", "#7a5230"),
    "oscar": ("OSCAR", "#5e3c99"),
    "rotatekv": ("RotateKV", "#b2182b"),
    "rvq": ("residual VQ", "#1fb5ad"),
    "polarquant": ("PolarQuant", "#8fbc2b"),
    "decoquant": ("DecoQuant", "#f781bf"),
    "turboquant": ("TurboQuant", "#777777"),
    "turboquant-prod": ("TurboQuant, prod", "#222222"),
}
"""Methods: what they are called in the figure, and their colour. AlignedKV stores 16 bits: it is in the table alone."""
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _GAP = 400, 300, 52, 26, 40, 14
STYLE = (
    "text{font:12px sans-serif;fill:#222}.small{font-size:11px;fill:#555}"
    ".grid{stroke:#ddd}.line{fill:none;stroke-width:1.5}"
)


def method(name: str) -> str:
    """What a row's name says of its method."""
    if name.startswith("K"):
        return "calibrated" if name.endswith(candidates.CALIBRATED) else "ours"
    return name.rpartition("-k")[0]


def svg(figures: dict[str, Any]) -> str:
    """KL divergence, on a logarithmic scale, against bits: a panel per model, a line per method."""
    figures = {
        name: {**model, "rows": [row for row in model["rows"] if method(row["name"]) in LEGEND]}
        for name, model in figures.items()
    }
    losses = [row["kld_mean"] for model in figures.values() for row in model["rows"]]
    decades = range(math.floor(math.log10(min(losses))), math.ceil(math.log10(max(losses))) + 1)
    shown = [key for key in LEGEND if any(method(r["name"]) == key for m in figures.values() for r in m["rows"])]
    width, height = _WIDTH * len(figures), _HEIGHT + 20 * math.ceil(len(shown) / 5) + 8
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        "<title>KL divergence against bits per element of the cache</title>",
        f'<style>{STYLE}</style><rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for i, (name, model) in enumerate(figures.items()):
        out += _panel(name, model["rows"], i * _WIDTH, decades)
    for i, key in enumerate(shown):
        x, y = _LEFT + 150 * (i % 5), _HEIGHT + 14 + 20 * (i // 5)
        title, colour = LEGEND[key]
        out.append(f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{colour}"/><text x="{x + 9}" y="{y}">{title}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def _panel(title: str, rows: list[dict[str, Any]], left: float, decades: range) -> list[str]:
    bits = [row["effective_bits"] for row in rows]
    low, high = math.floor(2 * min(bits)) / 2, math.ceil(2 * max(bits)) / 2
    start, stop, bottom = left + _LEFT, left + _WIDTH - _GAP, _HEIGHT - _BOTTOM

    def place(row: dict[str, Any]) -> tuple[float, float]:
        share = (math.log10(row["kld_mean"]) - decades[0]) / (decades[-1] - decades[0])
        return (
            round(start + (row["effective_bits"] - low) / (high - low) * (stop - start), 1),
            round(bottom - share * (bottom - _TOP), 1),
        )

    out = [f'<text x="{start}" y="{_TOP - 10}" font-weight="bold">{title}</text>']
    for decade in decades:
        y = round(bottom - (decade - decades[0]) / (decades[-1] - decades[0]) * (bottom - _TOP), 1)
        out.append(f'<line class="grid" x1="{start}" x2="{stop}" y1="{y}" y2="{y}"/>')
        out.append(f'<text class="small" x="{start - 6}" y="{y + 4}" text-anchor="end">{10.0**decade:g}</text>')
    for step in range(round(2 * low), round(2 * high) + 1):
        x = round(start + (step / 2 - low) / (high - low) * (stop - start), 1)
        out.append(f'<text class="small" x="{x}" y="{bottom + 16}" text-anchor="middle">{step / 2:g}</text>')
    middle = (start + stop) / 2
    out.append(f'<text x="{middle}" y="{bottom + 33}" text-anchor="middle">bits per element at 8k tokens</text>')
    if left == 0:
        turn = f"translate(12 {(_TOP + bottom) / 2}) rotate(-90)"
        out.append(f'<text transform="{turn}" text-anchor="middle">KL divergence, nats per token</text>')
    for key, (_, colour) in LEGEND.items():
        of_method = sorted((r for r in rows if method(r["name"]) == key), key=lambda r: r["effective_bits"])
        path = " ".join(f"{x},{y}" for x, y in map(place, of_method))
        if len(of_method) > 1:
            out.append(f'<polyline class="line" stroke="{colour}" points="{path}"/>')
        for row in of_method:
            x, y = place(row)
            out.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"><title>{row["name"]}</title></circle>')
    return out


def table(figures: dict[str, Any]) -> str:
    """All models side by side, the fewest bits of the first one first; on a Pareto front in bold."""
    names = list(figures)
    by_name = {name: {row["name"]: row for row in figures[name]["rows"]} for name in names}
    bits_and_loss = itemgetter("effective_bits", "kld_mean")
    fronts = {name: {row["name"] for row in comparison.pareto(figures[name]["rows"], bits_and_loss)} for name in names}
    head = " | ".join(f"{name}: bits | KLD | perplexity" for name in names)
    lines = [f"| | {head} |", "|---" * (1 + 3 * len(names)) + "|"]
    order: dict[str, float] = {}
    for name in names:
        for row in sorted(figures[name]["rows"], key=lambda row: row["effective_bits"]):
            order.setdefault(row["name"], row["effective_bits"])
    for row_name in sorted(order, key=lambda each: order[each]):
        cells = []
        for name in names:
            row = by_name[name].get(row_name)
            if row is None:
                cells += ["", "", ""]
                continue
            bold = "**" if row_name in fronts[name] else ""
            cells += [
                f"{row['effective_bits']:.2f}",
                f"{bold}{row['kld_mean']:.4f}{bold}" + (f" ± {row['kld_stderr']:.4f}" if row["windows"] > 1 else ""),
                f"{row['ppl_change_percent']:+.1f}%",
            ]
        lines.append(f"| {row_name} | {' | '.join(cells)} |")
    counts = ", ".join(f"{name} {windows_of(figures[name])} and {figures[name]['ppl']}" for name in names)
    return "\n".join([f"Windows measured, and their perplexity in full precision: {counts}.", "", *lines])


def windows_of(model: dict[str, Any]) -> int:
    """Windows of a model's rows."""
    return int(min(row["windows"] for row in model["rows"]))


def render(figures: dict[str, Any], drawing: Path, page: Path) -> None:
    """Writes the drawing, and the table between its marks of a page."""
    drawing.write_text(svg(figures), encoding="utf-8")
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{page}: no {BEGIN} ... {END}")
    page.write_text(f"{before}{BEGIN}\n\n{table(figures)}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Parses; measures, or draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", metavar="CHECKPOINT", nargs="?", const=str(demo_checkpoint()))
    parser.add_argument("--name", help="The model's, in tables and figures.")
    parser.add_argument("--calibration", type=Path, help="What `skv-export calibrate` wrote: recipes with it, too.")
    parser.add_argument("--ours", default=OURS)
    parser.add_argument("--theirs", default=THEIRS)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--first", type=int, help="Measure only the first so many of them.")
    parser.add_argument("--state", type=Path)
    given = parser.parse_args()
    if given.measure and not given.name:
        parser.error("--measure: --name says where the figures go")
    if given.measure:
        measure(given)
    render(
        json.loads(FIGURES.read_text(encoding="utf-8")),
        ROOT / "docs" / "literature.svg",
        ROOT / "benchmarks" / "RESULTS.md",
    )


if __name__ == "__main__":
    main()
