"""The command `skv-export calibrate`: parses, calls, prints; torch is imported only when it runs."""

from __future__ import annotations

from pathlib import Path

import click

from skv_export.cli.options import OutputFile, PathOf, adapter_option, device_option, progress_options, revision_option
from skv_export.progress import Progress

_ADVICE = (
    "These keys need fewer bits: on two models K3V3 lost half of what K4V2 loses without calibration, in as many bits, "
    "and K3V2 about as much in half a bit less (docs/defaults.md). `model --budget 3 --calibration FILE` chooses bits "
    "per layer for them, `quality --calibration FILE` says what they lose."
)


@click.command("calibrate")
@click.argument("checkpoint", required=False)
@adapter_option
@click.option("--text", type=PathOf("--text"), help="Text to read, UTF-8.  [default: shipped, on optics]")
@click.option(
    "--windows", default=16, show_default=True, type=click.IntRange(1), help="Windows of text; fewer if it has no more."
)
@click.option("--window", default=1024, show_default=True, type=click.IntRange(128), help="Tokens per window.")
@revision_option
@click.option("--out", default="calibration.safetensors", show_default=True, type=OutputFile(), help="File to write.")
@click.option("--state", type=OutputFile(), help="Keep finished layers here; go on from them.")
@device_option
@progress_options
def calibrate_command(
    checkpoint: str | None,
    adapter: Path | None,
    text: Path | None,
    windows: int,
    window: int,
    revision: str | None,
    out: Path,
    state: Path | None,
    device: str,
) -> None:
    """Measure how CHECKPOINT's queries read its keys, so that keys of few bits lose less.

    The model reads some text, forward passes only, one layer in memory at a time; per layer a basis for keys follows in
    which every channel matters alike. `quality` shows what it is worth, on other text. CHECKPOINT is a folder with
    safetensors, a GGUF file, or a hub id; without it, the demo model.

    \b
    skv-export calibrate ./Qwen3-0.6B --out qwen3.safetensors
    skv-export calibrate ./Qwen3-8B --state qwen3.state --device cuda    # goes on where it was interrupted
    skv-export quality ./Qwen3-0.6B --configs K3V2,K2V2 --calibration qwen3.safetensors
    """
    from skv_export.checkpoints.checkpoint import resolve
    from skv_export.checkpoints.demo_model import demo_checkpoint
    from skv_export.checkpoints.pretrained import Placement
    from skv_export.evaluation.text import CALIBRATION_TEXT, read_text
    from skv_export.quantization.key_calibration import calibrate

    Placement(device)
    prose = read_text(text, CALIBRATION_TEXT)
    source = resolve(checkpoint or demo_checkpoint(), revision=revision, adapter=adapter)
    with Progress() as shown:
        found = calibrate(source, prose, windows=windows, window=window, device=device, state=state, progress=shown)
    found.save(out)
    heads = sorted({basis.key.shape[0] for basis in found.bases.values()})
    click.echo(
        f"{source}: {len(found.bases)} layers of {' or '.join(map(str, heads))} KV heads, measured on "
        f"{found.about['tokens']} tokens\nwrote {out}\n{_ADVICE}"
    )
