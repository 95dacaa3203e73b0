"""The command `skv-export analyze`: parses, calls `analyze`, prints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from skv_export.cli.choice import Choice
from skv_export.cli.options import OutputFile, placement_options, progress_options
from skv_export.progress import Progress
from skv_export.spec.recipe import GRANULARITIES, ROTATIONS, TILE_TOKENS, LayerConfig

_PATH = click.Path(path_type=Path, dir_okay=False)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class Size(click.ParamType[Any]):
    """A number with a binary unit: 32k, 2GiB, 512M."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Returns the number; what is no size fails with an example."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", str(value).strip().lower())
        if match is None:
            self.fail(f"{value!r} is no size such as 32k or 2GiB", param, ctx)
        return int(float(match[1]) * _UNITS[match[2]])


class Numbers(click.ParamType[Any]):
    """Integers separated by commas."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Returns the integers."""
        if isinstance(value, list):
            return value
        if not re.fullmatch(r"\d+(,\d+)*", str(value)):
            self.fail(f"{value!r} is no list such as 2,3,4,8", param, ctx)
        return [int(x) for x in str(value).split(",")]


class Pairs(click.ParamType[Any]):
    """Pairs of bits such as K4V2, separated by commas."""

    name = "pairs"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[tuple[int, int]]:
        """Returns (key, value) bits."""
        if isinstance(value, list):
            return value
        found = [re.fullmatch(r"k(\d+)v(\d+)", part.strip().lower()) for part in str(value).split(",")]
        if not all(found):
            self.fail(f"{value!r} is no list such as K4V2,K4V4", param, ctx)
        return [(int(m[1]), int(m[2])) for m in found if m]


@click.command(name="analyze")
@click.argument("checkpoint", required=False)
@click.option("--budget", type=float, help="Effective bits per element.  [default: what K4V2 takes]")
@click.option("--memory", type=Size(), help="Bytes for the caches of the whole batch instead, such as 2GiB.")
@click.option(
    "--context", type=Size(), help="Tokens at which the cache is counted.  [default: the model's, at most 32k]"
)
@click.option("--batch", type=int, default=1, show_default=True, help="Sequences.")
@click.option(
    "--choices", type=Numbers(), default="1,2,3,4,5,6,8", show_default=True, help="Bit widths to choose from."
)
@click.option("--pairs", type=Pairs(), help="Only these pairs per layer, such as K4V2,K4V4,K8V4.")
@click.option(
    "--optimal", is_flag=True, help="By the norms: the optimum of the paper's objective, not its greedy rule."
)
@click.option("--k-granularity", type=Choice(GRANULARITIES), help="Of keys.  [default: channel]")
@click.option("--v-granularity", type=Choice(GRANULARITIES), help="Of values.  [default: token]")
@click.option("--k-rotation", type=Choice(ROTATIONS), help="Of keys.  [default: none]")
@click.option("--v-rotation", type=Choice(ROTATIONS), help="Of values.  [default: hadamard]")
@click.option("--num-sink-tokens", type=int, help="First tokens kept in full precision.  [default: 4]")
@click.option("--recent-tokens", type=int, help="Last tokens kept in full precision.  [default: 64]")
@click.option("--tile-tokens", type=click.Choice(TILE_TOKENS), help="Tokens quantized together.  [default: 64]")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--measure", is_flag=True, help="Run the model on --text and measure every layer and bit pair.")
@click.option("--text", type=_PATH, help="Plain text to measure on.")
@click.option("--kl", is_flag=True, help="Measure the logits' KL divergence layer by layer (slow), not estimate it.")
@click.option("--windows", type=int, default=4, show_default=True, help="Windows of text.")
@click.option("--window", type=int, default=1024, show_default=True, help="Tokens in each.")
@click.option("--state", type=OutputFile(), help="File that makes a measurement resumable.")
@placement_options
@click.option("--report", type=OutputFile(), help="HTML page to write.")
@click.option("--plot", type=OutputFile(), help="PNG to write (extra `plots`).")
@click.option("--json", type=OutputFile(), help="JSON file to write.")
@click.option("--save", type=OutputFile(), help="Recipe to write; `skv-export model --recipe FILE` takes it.")
@progress_options
def analyze_command(checkpoint: str | None, **options: Any) -> None:
    """Say how CHECKPOINT's cache bits should be split between keys and values, layer by layer, and why.

    CHECKPOINT is a folder with safetensors, a GGUF file, or a hub id, of which only the attention's projections are
    read, through byte ranges; without it, the demo model (extra `demo`).

    \b
    skv-export analyze Qwen/Qwen3-0.6B --budget 3.25 --report report.html --save recipe.toml
    skv-export analyze ./model --memory 2GiB --context 32k --batch 8
    skv-export analyze ./model --measure --text book.txt --state measure.json
    """
    from skv_export.analysis.pipeline import analyze
    from skv_export.checkpoints.checkpoint import demo_checkpoint

    base = {f: options.pop(f) for f in LayerConfig.__dataclass_fields__ if f in options}
    layer = LayerConfig(**{key: value for key, value in base.items() if value is not None})
    with Progress() as progress:
        found = analyze(checkpoint or demo_checkpoint(), base=layer, progress=progress, **options)
    click.echo(summary(found))
    for name in ("report", "plot", "json", "save"):
        if options[name]:
            click.echo(f"wrote {options[name]}")


def summary(found: Any) -> str:
    """Returns the tables and reasons that the command prints."""
    read, all_bytes = found.bytes_read / 2**20, found.tensor_bytes / 2**20
    names = [score.name for score in found.scores]
    lines = [
        f"{found.model}: {len(found.layers)} layers, {found.config.num_attention_heads} heads, "
        f"{found.config.num_key_value_heads} KV heads of {found.config.head_dim}; "
        f"read {read:.1f} of {all_bytes:.1f} MiB",
        "",
        f"{'layer':>5} {'|K| F':>8} {'|V| F':>8} {'|K| 2':>8} {'|V| 2':>8}  "
        + "  ".join(f"{n[:10]:>10}" for n in names),
    ]
    disagree = {flag["layer"] for flag in found.flags if flag["flag"] == "scores_disagree"}
    for i, layer in enumerate(found.layers):
        norms = (layer.k.frobenius, layer.v.frobenius, layer.k.spectral, layer.v.spectral)
        bits = "  ".join(f"{f'K{s.bits[i][0]}V{s.bits[i][1]}':>10}" for s in found.scores)
        mark = "  <- scores disagree" if i in disagree else ""
        lines.append(f"{i:>5} " + " ".join(f"{x:>8.2f}" for x in norms) + f"  {bits}{mark}")
    r = found.recommendation
    lines += ["", f"expected loss, {r.loss_unit}, by {r.score}:"]
    for plan in (r.plan, r.uniform, *r.neighbours):
        lines.append(f"  {plan.name:<24} {plan.effective_bits:>6.2f} bits  {plan.loss:.3g}")
    megabytes = found.budget.memory(r.plan.bits) / 2**20
    size = f"{megabytes:.1f} MiB for {found.budget.batch} x {found.budget.context} tokens"
    lines += ["", f"recommended: {r.plan.name}, {size}", *(f"  - {reason}" for reason in r.reasons)]
    return "\n".join(lines)
