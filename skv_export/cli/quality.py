"""The command `skv-export quality`: parses, calls, prints; torch is imported only when it runs."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from skv_export.cli.options import (
    OutputFile,
    PathOf,
    adapter_option,
    json_option,
    placement_options,
    progress_options,
    ray_option,
    revision_option,
    say,
    write_json,
)
from skv_export.errors import SkvError
from skv_export.progress import Progress
from skv_export.spec.recipe import LayerConfig, Recipe

DEFAULT_CONFIGS = "K8V8,K4V4,K4V3,K3V4,K4V2,K3V3,K2V4,K3V2,K2V2"


@click.command("quality")
@click.argument("checkpoint", required=False)
@adapter_option
@revision_option
@click.option("--text", type=PathOf("--text"), help="Text to predict, UTF-8.  [default: shipped prose]")
@click.option(
    "--configs",
    default=DEFAULT_CONFIGS,
    show_default=True,
    help="Bit pairs, recipe files or patterns, shipped recipes; separated by commas.",
)
@click.option(
    "--baselines",
    default="",
    help="Other caches in the same run: kivi, kvquant, kvarn, squat, svdq, oscar, rotatekv, rvq, polarquant, "
    "decoquant, alignedkv, turboquant, turboquant-prod, hf-quanto, hf-hqq; or with bits: kivi-k4v2, hf-hqq-8.",
)
@click.option(
    "--calibration", type=PathOf("--calibration"), help="What `calibrate` wrote: recipes with it, beside without."
)
@click.option(
    "--weights",
    metavar="FOLDERS",
    help="Other forms of CHECKPOINT's weights, such as `quantize` writes, separated by commas: each cache on each of "
    "them, against CHECKPOINT itself, with the bytes of both.",
)
@click.option("--windows", default=16, show_default=True, type=click.IntRange(1), help="Windows of text.")
@click.option("--window", default=1024, show_default=True, type=click.IntRange(64), help="Tokens per window.")
@click.option("--recent-tokens", type=int, help="Of the bit pairs.  [default: as `model`]")
@click.option("--num-sink-tokens", type=int, help="Of the bit pairs.  [default: as `model`]")
@click.option(
    "--keep-tokens",
    default="",
    help="Each configuration again with a cache compacted to so many tokens in the middle of each window, and at the "
    "end of prompts: 256,384. Windows are scored from there on.",
)
@click.option("--needles", is_flag=True, help="Also retrieve numbers hidden in long texts, by depth.")
@click.option("--needle-lengths", default="1024,2048", show_default=True, help="Tokens of those texts.")
@click.option(
    "--generate",
    metavar="N",
    type=click.IntRange(1),
    help="Also continue N prompts greedily, and ask N questions of each of four small tasks.",
)
@click.option("--state", type=OutputFile(), help="Keep finished windows here; go on from them.")
@ray_option
@click.option("--report", type=OutputFile(), help="Write the table and the Pareto plot as HTML.")
@json_option("the figures")
@placement_options
@progress_options
def quality_command(
    checkpoint: str | None,
    adapter: Path | None,
    revision: str | None,
    text: Path | None,
    configs: str,
    baselines: str,
    calibration: Path | None,
    weights: str | None,
    windows: int,
    window: int,
    recent_tokens: int | None,
    num_sink_tokens: int | None,
    keep_tokens: str,
    needles: bool,
    needle_lengths: str,
    generate: int | None,
    state: Path | None,
    ray: str | None,
    report: Path | None,
    json_file: Path | None,
    device: str,
    dtype: str,
    device_map: str | None,
) -> None:
    """Measure what quantized caches lose on CHECKPOINT: perplexity, KL divergence, agreement, bits.

    Decode style: every token sees the cache that decoding token by token would have left. CHECKPOINT is a folder with
    safetensors, a GGUF file, or a hub id; without it, the demo model.

    \b
    skv-export quality ./Qwen3-0.6B --configs K4V4,K4V2,K3V3 --text book.txt
    skv-export quality ./Qwen3-0.6B --configs 'recipes/*.toml' --baselines kivi,hf-quanto --report quality.html
    skv-export quality ./Qwen3-0.6B --configs K3V2,K2V2 --calibration calibration.safetensors
    skv-export quality ./Qwen3-0.6B --configs K8V8,K4V2,K2V2 --keep-tokens 256,512 --window 2048 --needles
    skv-export quality ./Qwen3-0.6B --configs K16V16,K4V2 --weights qwen3-int4
    """
    from skv_export.calibration.file import Calibration
    from skv_export.checkpoints.checkpoint import resolve
    from skv_export.checkpoints.demo_model import demo_checkpoint
    from skv_export.checkpoints.pretrained import Placement, download
    from skv_export.evaluation import candidates, comparison, free_running, needle
    from skv_export.evaluation.baselines import parse_baselines
    from skv_export.evaluation.html_report import html
    from skv_export.evaluation.text import read_text
    from skv_export.model_folder.output import write_text
    from skv_export.quantization.comparison import bytes_table, load_forms

    placement = Placement(device, dtype, device_map)
    base = Recipe(LayerConfig()).with_options(recent_tokens=recent_tokens, num_sink_tokens=num_sink_tokens)
    calibrated = None if calibration is None else Calibration.load(calibration)
    bases = None if calibrated is None else calibrated.bases
    keep = candidates.parse_keep(keep_tokens)
    wanted = [*candidates.parse_configs(configs, base, bases, keep), *parse_baselines(baselines)]
    candidates.check_names(wanted)
    lengths = needle.parse_lengths(needle_lengths)
    asked = {"--weights": weights, "--needles": needles, "--generate": generate}
    if ray and (here := [name for name, value in asked.items() if value]):
        got = f"{', '.join(here)} too"
        raise SkvError("--ray", got=got, expected="windows of text alone", fix="Run these without it.")
    prose = read_text(text)
    source = resolve(checkpoint or demo_checkpoint(), revision=revision, adapter=adapter)
    if calibrated is not None:
        calibrated.check(download(source))
    with Progress() as shown, contextlib.ExitStack() as running:

        def progress(name: str, done: int, total: int) -> None:
            shown("measuring windows of text", done, total)

        workers = running.enter_context(comparison.ray_workers(ray, source, placement)) if ray else None
        shown("loading the model")
        loaded = None if workers else comparison.load(source, placement)
        forms = load_forms(source, loaded[0], weights, placement) if loaded else []
        wanted += [candidates.OnOtherWeights.of(c, f.label, f.digest, f.model) for f in forms for c in wanted]
        candidates.check_names(wanted)
        result = comparison.run(
            source, wanted, prose, windows=windows, window=window, prompt=window // 2 if keep else 0, state=state,
            progress=progress, loaded=loaded, workers=workers,
        )  # fmt: skip
    say(result.table(), json_file)
    if forms:
        say("\n" + bytes_table(source, forms, result), json_file)
    retrieval = needle.run(loaded, wanted, prose, lengths=lengths) if needles and loaded else None
    if retrieval:
        say("\n" + retrieval.table(), json_file)
    free = None
    if generate is not None and loaded:
        with Progress() as shown:
            free = free_running.run(loaded, wanted, prose, generate, shown)
        say("\n" + free.table(), json_file)
    write_json(json_file, result.to_json(retrieval, free))
    if report:
        write_text(report, html(result, retrieval))
