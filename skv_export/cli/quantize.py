"""The command `skv-export quantize`: parses, calls, prints; torch is imported only when it runs."""

from __future__ import annotations

from pathlib import Path

import click

from skv_export.cli.options import (
    Number,
    PathOf,
    adapter_option,
    default_name,
    device_option,
    json_option,
    progress_options,
    revision_option,
    say,
    write_json,
)
from skv_export.progress import Progress


@click.command("quantize")
@click.argument("checkpoint", required=False)
@adapter_option
@click.option(
    "--method",
    type=click.Choice(["qep", "rsq", "gptq", "awq", "rtn"]),
    default="qep",
    show_default=True,
    help="qep: each matrix makes up for the errors before it; gptq: for its own; rsq: GPTQ with tokens weighed by "
    "attention; awq: to the nearest with scales in the norms; rtn: without.",
)
@click.option("--bits", type=click.Choice(["4", "8"]), default="4", show_default=True, help="Bits of a weight.")
@click.option(
    "--group-size",
    type=click.Choice(["16", "32", "64", "128"]),
    default="32",
    show_default=True,
    help="Inputs that share a scale.",
)
@click.option(
    "--head-bits",
    type=click.Choice(["8", "16"]),
    default="16",
    show_default=True,
    help="Bits of the embeddings: 16 leaves them as they are.",
)
@click.option(
    "--weight-bits-budget",
    type=Number(0),
    help="Bits per weight, scales and zero points included: the matrices that need it most get 8.  [default: alike]",
)
@click.option("--text", type=PathOf("--text"), help="Text to read, UTF-8.  [default: shipped, on optics]")
@click.option("--windows", default=16, show_default=True, type=click.IntRange(1), help="Windows of text.")
@click.option("--window", default=1024, show_default=True, type=click.IntRange(64), help="Tokens per window.")
@click.option(
    "--cache", help="Recipe, a file or a shipped name, of the cache that the layers have meanwhile.  [default: exact]"
)
@click.option("--rotate", is_flag=True, help="Turn the residual stream first: no channel is much larger than others.")
@click.option(
    "--norm-tweaking", is_flag=True, help="Move each layer's norms until its output is distributed as it was."
)
@revision_option
@click.option("--out", type=PathOf("--out"), help="Folder to write.  [default: NAME-METHOD-int4]")
@click.option("--force", is_flag=True, help="Replace --out if this tool wrote it.")
@device_option
@json_option("the figures")
@progress_options
def quantize_command(
    checkpoint: str | None,
    adapter: Path | None,
    method: str,
    bits: str,
    group_size: str,
    head_bits: str,
    weight_bits_budget: float | None,
    text: Path | None,
    windows: int,
    window: int,
    cache: str | None,
    rotate: bool,
    norm_tweaking: bool,
    revision: str | None,
    out: Path | None,
    force: bool,
    device: str,
    json_file: Path | None,
) -> None:
    """Quantize CHECKPOINT's weights to 4 or 8 bits by what its layers read in a text.

    Writes a checkpoint in the compressed-tensors format, which `model` exports as it is and `quality` compares. One
    layer is in memory at a time. CHECKPOINT is a folder with safetensors, a GGUF file, or a hub id; without it, the
    demo model.

    \b
    skv-export quantize ./Qwen3-0.6B --out qwen3-int4
    skv-export quantize ./Qwen3-0.6B --weight-bits-budget 5.5 --out qwen3-int4
    skv-export model qwen3-int4 --k-bits 4 --v-bits 2
    """
    from skv_export.checkpoints.checkpoint import resolve
    from skv_export.checkpoints.demo_model import demo_checkpoint
    from skv_export.checkpoints.pretrained import Placement
    from skv_export.evaluation.text import CALIBRATION_TEXT, read_text
    from skv_export.quantization.pipeline import Options, quantize
    from skv_export.quantization.sensitivity import WIDE_BITS
    from skv_export.quantization.solver import Form
    from skv_export.spec.recipe import Recipe

    Placement(device)
    options = Options(
        method=method,
        form=Form(int(bits), int(group_size)),
        windows=windows,
        window=window,
        head_bits=int(head_bits),
        budget=weight_bits_budget,
        cache=None if cache is None else Recipe.find(cache),
        rotate=rotate,
        norm_tweaking=norm_tweaking,
    )
    prose = read_text(text, CALIBRATION_TEXT)
    source = resolve(checkpoint or demo_checkpoint(), revision=revision, adapter=adapter)
    target = out or Path(default_name(str(checkpoint or source), f"{method}-int{bits}"))
    with Progress() as shown:
        made = quantize(source, prose, target, options, device=device, force=force, progress=shown)
    counts = (made.matrices - len(made.wide), bits), (len(made.wide), WIDE_BITS)
    parts = " and ".join(f"{count} matrices in {width} bits" for count, width in counts if count)
    said = f"{made.effective_bits:.3f} bits per weight with scales and zero points"
    say(f"{source}: {parts} by {method}: {said}", json_file)
    for name, reason in made.plain.items():
        say(f"  {name} stays as it is: {reason}", json_file)
    say(f"wrote {target} ({made.nbytes / 2**20:,.1f} MiB)", json_file)
    write_json(json_file, {"out": str(target), **vars(made)})
