"""`skv-export model --weight-method`: weights fitted to a text on the way to an export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from skv_export.cli.options import Number, PathOf, say
from skv_export.errors import SkvError
from skv_export.progress import Progress
from skv_export.spec.recipe import AS_IS, WEIGHT_BITS, Recipe

if TYPE_CHECKING:
    from skv_export.checkpoints.checkpoint import Source

METHODS = ("qep", "gptq", "rsq", "awq", "rtn")
"""As ``quantization.pipeline`` has them, which loads torch."""
FITTED_OPTIONS = ("weight_method", "weight_text", "weight_bits_budget", "weight_cache", "head_bits")
"""Parameters that ``fitted_options`` adds."""


def fitted_options(command: Any) -> Any:
    """Adds the flags of weights that are fitted to a text."""
    options = [
        click.option(
            "--weight-method",
            type=click.Choice(METHODS),
            help="With --weights int4 or int8: fit the codes to a text, as `quantize` does. The quantized checkpoint "
            "stays beside the folder, as NAME-weights.  [default: round to the nearest]",
        ),
        click.option(
            "--weight-text",
            type=PathOf("--weight-text"),
            help="Text for --weight-method.  [default: shipped, on optics]",
        ),
        click.option(
            "--weight-bits-budget", type=Number(0), help="With --weight-method: bits per weight; see `quantize`."
        ),
        click.option("--head-bits", type=click.Choice(["8", "16"]), help="With --weight-method: of the embeddings."),
        click.option("--weight-cache", is_flag=True, help="With --weight-method: fit with the cache of this export."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def check_fitted(given: dict[str, Any], recipe: Recipe, calibration: Path | None, folder: Path) -> Path | None:
    """Checks the flags before any work.

    Returns:
        Where the quantized checkpoint goes; None if none is asked for.

    Raises:
        SkvError: Flags that do not go together.
    """
    if given["weight_method"] is None:
        if asked := [name for name in FITTED_OPTIONS if given[name]]:
            flags = " and ".join("--" + name.replace("_", "-") for name in asked)
            raise SkvError(f"{flags}: nothing is fitted", fix="Add --weight-method qep.")
        return None
    if recipe.weights not in WEIGHT_BITS:
        raise SkvError("--weight-method", got=f"--weights {recipe.weights or recipe.dtype}", expected="int4 or int8")
    if calibration is not None:
        raise SkvError(
            "--weight-method and --calibration",
            got="both",
            fix="Run `quantize`, then `calibrate` on what it writes, then `model --calibration`.",
        )
    return folder.with_name(f"{folder.name}-weights")


def fit_weights(
    source: str | Source,
    out: Path,
    given: dict[str, Any],
    recipe: Recipe,
    *,
    device: str,
    force: bool,
    json_file: Path | None,
) -> Recipe:
    """Writes the quantized checkpoint.

    Args:
        source: The float checkpoint.
        out: Folder to write.
        given: The flags of ``FITTED_OPTIONS``.
        recipe: Of the export.
        device: Where layers run.
        force: Replace ``out``.
        json_file: Where figures go, for messages.

    Returns:
        The recipe to export ``out`` with: its weights as they are.

    Raises:
        SkvError: It can't be quantized.
    """
    from skv_export.checkpoints.checkpoint import resolve
    from skv_export.evaluation.text import CALIBRATION_TEXT, read_text
    from skv_export.quantization.pipeline import Options, quantize
    from skv_export.quantization.solver import Form

    options = Options(
        method=given["weight_method"],
        form=Form(WEIGHT_BITS[recipe.weights]),
        head_bits=int(given["head_bits"] or 16),
        budget=given["weight_bits_budget"],
        cache=recipe if given["weight_cache"] else None,
    )
    prose = read_text(given["weight_text"], CALIBRATION_TEXT)
    checkpoint = resolve(source)
    with Progress() as shown:
        made = quantize(checkpoint, prose, out, options, device=device, force=force, progress=shown)
    said = f"{made.effective_bits:.3f} bits per weight with scales and zero points"
    say(f"{out}: {made.matrices} matrices by {options.method}, {said}", json_file)
    say(f"  `verify --checkpoint {out}` holds the export to it;", json_file)
    name = checkpoint.repo_id or str(replace(checkpoint, adapter=None))
    say(f"  `quality {name} --weights {out}` says what it costs", json_file)
    return recipe.with_options(weights=AS_IS)
