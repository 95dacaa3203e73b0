"""The command `skv-export analyze`: parse, call `analyze`, print and write."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from skv_export.analysis.card import WEIGHT_BITS
from skv_export.analysis.recommend import SCORES
from skv_export.cli.choice import Choice
from skv_export.cli.options import (
    OutputFile,
    PathOf,
    adapter_option,
    json_option,
    placement_options,
    progress_options,
    revision_option,
    say,
    write_json,
)
from skv_export.cli.target import Numbers, Pairs, target_options
from skv_export.errors import SkvError, require_module
from skv_export.progress import Progress
from skv_export.spec.recipe import AS_IS, GRANULARITIES, PARAMETER_BITS, ROTATIONS, TILE_TOKENS, LayerConfig

if TYPE_CHECKING:
    from skv_export.analysis.pipeline import MeasureOptions
    from skv_export.analysis.result import Analysis
    from skv_export.checkpoints.checkpoint import Checkpoint, Source


@click.command(name="analyze")
@click.argument("checkpoint", required=False)
@adapter_option
@target_options
@placement_options
@click.option(
    "--weights", type=Choice([AS_IS, *WEIGHT_BITS]), help="Format of weights that share --memory with the cache."
)
@click.option(
    "--choices", type=Numbers(), default="1,2,3,4,5,6,8", show_default=True, help="Bit widths to choose from."
)
@click.option("--pairs", type=Pairs(), help="Only these pairs per layer, such as K4V2,K4V4,K8V4.")
@click.option("--score", type=Choice(SCORES), help="What decides.  [default: measure, without it defaults]")
@click.option(
    "--optimal", is_flag=True, help="By the norms: the optimum of the paper's objective, not its greedy rule."
)
@click.option("--k-granularity", type=Choice(GRANULARITIES), help="Of keys.  [default: channel]")
@click.option("--v-granularity", type=Choice(GRANULARITIES), help="Of values.  [default: token]")
@click.option("--k-rotation", type=Choice(ROTATIONS), help="Of keys.  [default: none]")
@click.option("--v-rotation", type=Choice(ROTATIONS), help="Of values.  [default: hadamard]")
@click.option(
    "--k-parameter-bits", type=Choice(PARAMETER_BITS), help="Of keys' scales and offsets per channel.  [default: 16]"
)
@click.option("--v-parameter-bits", type=Choice(PARAMETER_BITS), help="The same for values.  [default: 16]")
@click.option("--num-sink-tokens", type=int, help="First tokens kept in full precision.  [default: 4]")
@click.option("--recent-tokens", type=int, help="Last tokens kept in full precision.  [default: 64]")
@click.option("--tile-tokens", type=Choice(TILE_TOKENS), help="Tokens quantized together.  [default: 64]")
@click.option(
    "--calibration",
    type=PathOf("--calibration"),
    help="What `calibrate` wrote for CHECKPOINT: bits for an export that has it, too.",
)
@revision_option
@click.option("--kl", is_flag=True, help="Measure the logits' KL divergence layer by layer (slow), not estimate it.")
@click.option("--report", type=OutputFile(), help="HTML page to write.")
@click.option("--plot", type=OutputFile(), help="PNG to write (extra `plots`).")
@json_option("the analysis")
@click.option("--save", type=OutputFile(), help="Recipe to write; `skv-export model --recipe FILE` takes it.")
@progress_options
def analyze_command(
    checkpoint: str | None,
    report: Path | None,
    plot: Path | None,
    json_file: Path | None,
    save: Path | None,
    **options: Any,
) -> None:
    """Say how CHECKPOINT's cache bits should be split between keys and values, layer by layer, and why.

    CHECKPOINT is a folder with safetensors, a GGUF file, or a hub id, of which only the attention's projections are
    read, through byte ranges; without it, the demo model (extra `demo`). Where the weights are at hand, the model is
    run on shipped text, and its recommendation must beat the uniform pairs on another text; else, and with
    --no-measure, the best uniform pair that fits is recommended.

    \b
    skv-export analyze ./Qwen3-0.6B --budget 3.25 --report report.html --save recipe.toml
    skv-export analyze ./model --memory 24GiB --weights int4 --context 128k --batch 8
    skv-export analyze ./model --gpu rtx4090                 # and how long a context fits
    skv-export analyze ./model --max-loss 0.5%
    skv-export analyze ./model --budget 3 --calibration calibration.safetensors
    """
    from skv_export.checkpoints.demo_model import demo_checkpoint

    if plot is not None:
        require_module("matplotlib", "--plot")
    base = {f: options.pop(f) for f in LayerConfig.__dataclass_fields__ if f in options}
    layer = LayerConfig(**{key: value for key, value in base.items() if value is not None})
    memory, gpu = options["memory"], options["gpu"]
    source = checkpoint or demo_checkpoint()
    found, room = run(source, layer, options)
    say(summary(found), json_file)
    if room:
        say(planner(found, room), json_file)
        say(spending(found, memory, gpu), json_file)
    from skv_export.model_folder.output import output_file, write_text

    write_json(json_file, _json(found))
    for path, content in ((save, _preset), (report, _html)):
        if path is not None:
            write_text(path, content(found))
            say(f"wrote {path}", json_file)
    if plot is not None:
        from skv_export.analysis import html_report

        with output_file(plot) as scratch:
            html_report.png(found, scratch)
        say(f"wrote {plot}", json_file)


MEASURE_OPTIONS = ("text", "windows", "window", "state", "ray", "kl", "device", "dtype", "device_map")
"""Parameters that say how the model is run."""


def run(
    checkpoint: str | Path | Source, base: LayerConfig, options: dict[str, Any], *, as_causal_lm: bool = False
) -> tuple[Analysis, int]:
    """Analyzes as the flags say; what `analyze` and `model --budget` share.

    Returns:
        The analysis, and the bytes that a card has left for the cache (0 where no card was named).
    """
    from skv_export.analysis.card import card_memory, room_for_cache, usual_weights
    from skv_export.analysis.pipeline import MeasureOptions, Target, analyze
    from skv_export.checkpoints.checkpoint import Checkpoint

    given = dict(options)
    revision = given.pop("revision", None)
    gpu, weights = given.pop("gpu", None), given.pop("weights", None)
    calibration = given.pop("calibration", None)
    if gpu:
        if given["memory"] is not None:
            raise SkvError("--gpu and --memory", got="both", expected="one of them")
        given["memory"] = card_memory(gpu)
    asked = given.pop("measure")
    measuring = {name: given.pop(name) for name in MEASURE_OPTIONS if name in given}
    if given.get("score") == "measure":
        if asked is False:
            raise SkvError("--score measure", got="--no-measure too", expected="one of them")
        asked = True
    measure: MeasureOptions | None = MeasureOptions(**measuring)  # checks, before any work
    sizes = {**given, "memory": None if gpu else given["memory"], "weights": None if gpu else weights}
    Target(**{field.name: sizes[field.name] for field in dataclasses.fields(Target) if field.name in sizes})
    if measuring.get("device", "cpu") != "cpu" or measuring.get("device_map"):
        MeasureOptions(**measuring).placement()  # a device that is not there is found out before any work
    room = 0
    opened = Checkpoint.open(checkpoint, revision=revision, adapter=given.pop("adapter", None))
    if gpu:
        weights = weights or usual_weights(opened, "fp16")
    if weights:
        room = room_for_cache(given["memory"], opened, weights, given["batch"]) if given["memory"] else 0
        if given["context"] is None and gpu:  # the question is how long a context fits, not which bits fill the card
            given["memory"] = weights = None
    if given.get("score") not in (None, "measure") and not asked:
        measure = None
    # A file to keep a measurement in asks for one: what is in it does not depend on how fast the machine is today.
    asking = "--measure" if asked else "--state" if asked is None and measuring.get("state") else ""
    measure = _measure_or_not(opened, measure if asked is not False else None, asking)
    rest = {name: given.pop(name) for name in ("score", "optimal") if name in given}
    target = Target(weights=weights, **given)
    with Progress() as progress:
        found = analyze(
            opened.source,
            target=target,
            base=base,
            measure=measure,
            calibration=calibration,
            as_causal_lm=as_causal_lm,
            progress=progress,
            **rest,
        )
    return found, room


def _measure_or_not(opened: Checkpoint, options: MeasureOptions | None, asked: str) -> MeasureOptions | None:
    """Says on stderr what a measurement will take, or why there is none; ``asked`` is the flag that asks for one."""
    from skv_export.analysis.effort import PATIENCE_SECONDS, estimate

    if options is None:
        return None
    effort = estimate(opened, options)
    if effort.obstacle and asked:
        raise SkvError(f"{asked}: {effort.obstacle}", fix="Leave it out, or see to that.")
    click.echo(effort.line, err=True)
    if effort.obstacle:
        return None
    if effort.seconds > PATIENCE_SECONDS and not asked:
        click.echo("that is over half an hour: from weights alone; --measure starts it all the same", err=True)
        return None
    return options


def planner(found: Analysis, room: int) -> str:
    """Returns how long a context fits into a card's memory, for three caches side by side."""
    from skv_export.analysis.card import context_table

    tokens = context_table(found.budget, found.recommendation.allocation.bits, room)
    longest = found.config.max_position_embeddings
    said = f", of which the model was made for {longest:,}" if longest else ""
    sequences = f"{found.budget.batch} sequences; tokens of each" if found.budget.batch > 1 else "one sequence; tokens"
    lines = [f"\n{room / 2**30:.1f} GiB for the cache of {sequences}{said}:"]
    lines += [f"  {name:<12} {count:>12,}" for name, count in tokens.items()]
    if longest and tokens["fp16"] >= longest:
        lines.append("In fp16 the model's whole context fits: nothing has to be quantized to have the room.")
    return "\n".join(lines)


def spending(found: Analysis, memory: int | None, gpu: str) -> str:
    """Returns what a card's memory holds, for each form of the weights: where a gigabyte is better spent.

    Args:
        found: The analysis of a checkpoint.
        memory: Bytes of the card; None = as ``gpu`` has.
        gpu: The card's name.
    """
    from skv_export.analysis.card import card_memory, splits
    from skv_export.checkpoints.checkpoint import Checkpoint

    memory = memory or card_memory(gpu)
    opened = Checkpoint.open(found.source)
    budget = found.budget
    lines = [
        f"\nWeights or cache: what {memory / 2**30:.1f} GiB hold, activations counted, with {budget.batch} x "
        f"{budget.context:,} tokens:",
        f"  {'weights':<8} {'GiB':>7} {'left GiB':>9}  {'best cache':<10} {'tokens with K4V2':>16}",
    ]
    for split in splits(opened, budget, memory):
        left = f"{split.room / 2**30:9.2f}" if split.room > 0 else f"{'none':>9}"
        weights = f"{split.weight_bytes / 2**30:7.2f}"
        lines.append(f"  {split.weights:<8} {weights} {left}  {split.cache or 'none':<10} {split.longest:>16,}")
    lines.append(
        "What each form loses: `skv-export quantize`, then `skv-export quality --configs ... --weights FOLDERS`."
    )
    return "\n".join(lines)


def _json(found: Analysis) -> str:
    return json.dumps(found.to_json(), indent=1) + "\n"


def _html(found: Analysis) -> str:
    from skv_export.analysis import html_report

    return html_report.html(found)


def _preset(found: Analysis) -> str:
    return found.to_preset("skv-export " + " ".join(map(shlex.quote, sys.argv[1:])))


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
    for a in (r.allocation, *((r.uniform,) if r.uniform.bits != r.allocation.bits else ()), *r.neighbours):
        loss = "" if a.loss is None else f"{a.loss:.3g}"
        lines.append(f"  {a.name:<24} {a.effective_bits:>6.2f} bits  {loss}")
    megabytes = found.budget.memory(r.allocation.bits) / 2**20
    size = f"{megabytes:.1f} MiB for {found.budget.batch} x {found.budget.context} tokens"
    lines += ["", f"recommended: {r.allocation.name}, {size}", *(f"  - {reason}" for reason in r.reasons)]
    return "\n".join(lines)
