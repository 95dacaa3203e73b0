"""The command line: parses, calls, prints. A flag, a parameter and a recipe key have the same name."""

from __future__ import annotations

import dataclasses
import importlib
import shlex
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from skv_export import __version__
from skv_export.cli.choice import Choice
from skv_export.cli.fitted_weights import FITTED_OPTIONS, check_fitted, fit_weights, fitted_options
from skv_export.cli.guard import guarded
from skv_export.cli.options import (
    DEBUG,
    Number,
    PathOf,
    Provider,
    adapter_option,
    debug_option,
    default_name,
    exported_model,
    json_option,
    placement_options,
    progress_options,
    revision_option,
    say,
    write_json,
)
from skv_export.cli.target import TARGET_OPTIONS, target_options
from skv_export.errors import SkvError, did_you_mean
from skv_export.paths import is_onnx
from skv_export.spec.recipe import (
    ACCURACY_LEVELS,
    BITS,
    DTYPES,
    GRANULARITIES,
    PARAMETER_BITS,
    RECENT_TYPES,
    ROTATIONS,
    TILE_TOKENS,
    WEIGHTS,
    LayerConfig,
    Recipe,
    shipped_recipes,
)

if TYPE_CHECKING:
    from skv_export.checkpoints.checkpoint import Source

_Command = TypeVar("_Command", bound=Callable[..., Any])
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


_LAZY = {
    "analyze": "skv_export.cli.analyze:analyze_command",
    "bench": "skv_export.cli.bench:bench_command",
    "calibrate": "skv_export.cli.calibrate:calibrate_command",
    "chat": "skv_export.cli.chat:chat_command",
    "generate": "skv_export.cli.generate:generate_command",
    "quality": "skv_export.cli.quality:quality_command",
    "quantize": "skv_export.cli.quantize:quantize_command",
    "serve": "skv_export.cli.serve:serve_command",
}


class _Group(click.Group):
    """Loads a subcommand's module when it is asked for; takes `skv-export DIR ...` for `skv-export model DIR ...`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_LAZY])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _LAZY:
            module, _, attribute = _LAZY[cmd_name].partition(":")
            command: click.Command = getattr(importlib.import_module(module), attribute)
            return command
        return super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        first = args[0]
        if self.get_command(ctx, first) is None and ("/" in first or _exists(first)):
            args = ["model", *args]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with guarded(lambda: bool(ctx.meta.get(DEBUG))):
            return super().invoke(ctx)


def _exists(name: str) -> bool:
    """Whether there is a file or folder of this name; a mistyped command need not be one that could be."""
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False


@click.group(cls=_Group, context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="skv-export")
@debug_option
def main() -> None:
    """Export language models to ONNX Runtime with a KV cache quantized separately for keys and values.

    \b
    skv-export model --k-bits 4 --v-bits 2 --out demo-model     # the demo model; or name a CHECKPOINT
    skv-export verify demo-model
    skv-export generate demo-model --prompt "The capital of France is"

    `skv-export CHECKPOINT ...` is short for `skv-export model CHECKPOINT ...`.
    """


_RECIPE_OPTIONS: dict[str, tuple[Any, str]] = {
    "k_bits": (BITS, "Bits of a key; 16 = not quantized."),
    "v_bits": (BITS, "Bits of a value; 16 = not quantized."),
    "k_granularity": (
        GRANULARITIES,
        "What shares a key's scale: a channel of a tile, or a group of a token's channels.",
    ),
    "v_granularity": (GRANULARITIES, "The same for values."),
    "k_rotation": (ROTATIONS, "Rotate queries and keys after RoPE."),
    "v_rotation": (ROTATIONS, "Rotate values, and the output back."),
    "k_group_size": (int, "Channels that share a scale with granularity token; 0 = 64, or 32 for odd head sizes."),
    "v_group_size": (int, "The same for values."),
    "k_parameter_bits": (PARAMETER_BITS, "Bits of each scale and offset with granularity channel."),
    "v_parameter_bits": (PARAMETER_BITS, "The same for values."),
    "num_sink_tokens": (int, "First tokens kept in full precision."),
    "recent_tokens": (int, "Last tokens kept in full precision, at least."),
    "tile_tokens": (TILE_TOKENS, "Tokens quantized together."),
    "recent_type": (RECENT_TYPES, "Number format of the tokens kept in full precision."),
    "dtype": (DTYPES, "Number format of activations, and of weights that are not quantized."),
    "weights": (
        WEIGHTS,
        "Number format of weights; as-is: as the checkpoint quantized them; int8 and int4 in blocks of 32.",
    ),
    "accuracy_level": (
        ACCURACY_LEVELS,
        "Products with quantized weights: 4 rounds activations to int8, 1 does not; 0 = 1 for as-is, else 4.",
    ),
}
_SWITCHES = {
    "quantize_head": "Whether --weights int8 or int4 includes the output embedding.",
    "quantize_embeddings": "Whether --weights int8 or int4 includes the input embedding.",
}


def _recipe_options(command: _Command) -> _Command:
    """Adds --recipe and one flag per recipe key; the defaults shown are the recipe's."""
    defaults = {
        **dataclasses.asdict(LayerConfig()),
        "dtype": Recipe().dtype,
        "weights": "as-is if quantized, else --dtype",
        "accuracy_level": Recipe().accuracy_level,
    }
    for key, text in reversed(_SWITCHES.items()):
        names = "--{0}/--no-{0}".format(key.replace("_", "-"))
        help_text = f"{text}  [default: {'yes' if getattr(Recipe(), key) else 'no'}]"
        command = click.option(names, key, default=None, help=help_text)(command)
    for key, (choices, text) in reversed(_RECIPE_OPTIONS.items()):
        kind = choices if choices is int else Choice(choices)
        help_text = f"{text}  [default: {defaults[key]}]"
        command = click.option("--" + key.replace("_", "-"), key, type=kind, default=None, help=help_text)(command)
    option = click.option(
        "--recipe", metavar="FILE", help="TOML file, or the name of one that ships with the package; flags win over it."
    )
    return option(command)


def _resolve_recipe(recipe: str | None, options: dict[str, Any]) -> Recipe:
    """The recipe of --recipe (a file, or a shipped name) with the flags on top."""
    base = Recipe() if recipe is None else Recipe.find(recipe)
    return base.with_options(**options)


@main.command()
@click.argument("checkpoint", required=False)
@_recipe_options
@click.option("--auto", is_flag=True, help="Bits per layer as `analyze` recommends; so do the flags from --budget on.")
@target_options
@fitted_options
@click.option(
    "--device", default="cpu", show_default=True, help="Where PyTorch's model runs that is measured or fitted."
)
@click.option(
    "--calibration", type=PathOf("--calibration"), help="What `calibrate` wrote for this checkpoint: keys lose less."
)
@click.option("--out", type=PathOf("--out"), help="Folder to write.  [default: NAME-k4v2]")
@click.option("--force", is_flag=True, help="Replace the folder if it exists.")
@click.option(
    "--all-logits", is_flag=True, help="Logits of every position, for evaluation; default: of the last token."
)
@click.option("--as-causal-lm", is_flag=True, help="Export a classifier, reward or embedding model's layers anyway.")
@click.option(
    "--inputs-embeds/--no-inputs-embeds",
    default=None,
    help="The graph takes embeddings in the place of tokens, too.  [default: of vision-language models]",
)
@adapter_option
@revision_option
@click.option("--copy-weights", is_flag=True, help="ONNX in: copy the weights instead of linking to them.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@json_option("the plan")
@progress_options
def model(
    checkpoint: str | None,
    recipe: str | None,
    auto: bool,
    calibration: Path | None,
    out: Path | None,
    force: bool,
    all_logits: bool,
    as_causal_lm: bool,
    inputs_embeds: bool | None,
    adapter: Path | None,
    revision: str | None,
    copy_weights: bool,
    dry_run: bool,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Export CHECKPOINT to a folder that ONNX Runtime runs with a quantized KV cache.

    CHECKPOINT is a folder with safetensors, a GGUF file, or a hub id; without it, the demo model (extra `demo`); a LoRA
    folder whose base model is a folder here, too. An ONNX file or folder with GroupQueryAttention, or Attention with a
    past, is rewritten, its weights untouched.

    \b
    skv-export model ./Qwen3-0.6B --k-bits 4 --v-bits 2 --out qwen3
    skv-export model ./Qwen3-0.6B --recipe qwen3 --dry-run
    skv-export model ./Qwen3-0.6B --budget 3.25          # or --auto, --gpu rtx4090 --context 128k, --max-loss 0.5%
    skv-export model ./Qwen3-0.6B --adapter ./my-lora    # merged into the weights
    skv-export model model.gguf --k-bits 8 --v-bits 4 --dtype fp16
    skv-export model ./Qwen3-0.6B --k-bits 4 --v-bits 2 --weights int4 --weight-method qep
    skv-export model ./Qwen3-0.6B --auto --calibration calibration.safetensors
    skv-export model genai-folder/model.onnx --k-bits 4 --v-bits 4
    """
    from skv_export.calibration.file import Calibration
    from skv_export.checkpoints.checkpoint import resolve
    from skv_export.model_folder.output import check_target

    target = {name: options.pop(name) for name in (*TARGET_OPTIONS, "device")}
    fitted = {name: options.pop(name) for name in FITTED_OPTIONS}
    asked = auto or any(target[name] is not None for name in ("budget", "memory", "gpu", "max_loss"))
    resolved = _resolve_recipe(recipe, options)
    source = _checkpoint_or_demo(checkpoint, json_file)
    budget = target["budget"]
    bits = resolved.default.name if not asked else "auto" if budget is None else f"{budget:g}bits"
    folder = out or Path(default_name(source, bits))
    quantized = check_fitted(fitted, resolved, calibration, folder)
    for path in (folder, quantized) if not dry_run else ():
        if path is not None:
            check_target(path, force=force)
    rewriting = is_onnx(source)
    if rewriting and calibration is not None:
        raise SkvError("--calibration", got="an ONNX model", fix="Export the checkpoint itself, or leave it out.")
    if rewriting and (all_logits or options["dtype"] or options["weights"] or adapter or revision or inputs_embeds):
        raise SkvError(
            "--all-logits, --dtype, --weights, --adapter, --revision and --inputs-embeds",
            got="an ONNX model",
            fix="Leave them out: its weights stay as they are.",
        )
    calibrated = None if calibration is None else Calibration.load(calibration)
    opened: str | Source = source
    if asked:
        target |= {"adapter": adapter, "revision": revision, "calibration": calibrated}
        resolved, opened = _recommended(source, resolved, options, target, as_causal_lm, json_file)
    elif target["context"] is not None or target["measure"] is not None:
        raise SkvError("--context and --measure: nothing chooses bits", fix="Add --auto, or --budget and its like.")
    if not rewriting:  # before torch is loaded: what is wrong with it shows at once
        opened = resolve(opened, revision=revision, adapter=adapter)
    if quantized is not None and not dry_run:
        resolved = fit_weights(
            opened, quantized, fitted, resolved, device=target["device"], force=force, json_file=json_file
        )
        source, adapter = str(quantized), None
        opened = resolve(source)
    planned: Any
    if rewriting:
        from skv_export.rewrite.pipeline import Rewrite

        planned = Rewrite.read(source, resolved)
        chosen = {"copy_weights": copy_weights}
    else:
        from skv_export.export.pipeline import Export

        planned = Export.read(
            opened, resolved, as_causal_lm=as_causal_lm, calibration=calibrated, inputs_embeds=inputs_embeds
        )
        chosen = {"all_logits": all_logits}
    say(planned.plan.table(), json_file)
    if json_file:
        write_json(json_file, planned.plan.to_dict())
    if dry_run:
        return
    folder = planned.write(folder, force=force, **chosen)
    name = f"./{folder}" if str(folder).startswith("-") else str(folder)
    verify = ["skv-export", "verify", name]
    recorded = rewriting or (checkpoint is None and quantized is None) or not Path(source).exists()
    if not recorded:  # a folder names a hub id, the demo model and a source graph itself
        verify += ["--checkpoint", source]
    if adapter is not None:
        verify += ["--adapter", str(adapter)]
    generate = shlex.join(["skv-export", "generate", name])
    say(f"\nWritten to {folder}. Next:\n  {shlex.join(verify)}\n  {generate} --prompt ...", json_file)


@main.command()
@exported_model
@click.option("--checkpoint", help="What the folder was exported from.  [default: as recorded in it]")
@adapter_option
@click.option(
    "--level",
    "levels",
    multiple=True,
    type=Choice(["op", "text", "graph", "quality"]),
    help="Only this level; may be given several times.  [default: all four]",
)
@click.option("--text", type=PathOf("--text"), help="Text for all levels but op.  [default: shipped prose]")
@json_option("the report")
@click.option("--windows", default=8, show_default=True, type=click.IntRange(1), help="Quality: windows of text.")
@click.option("--window-tokens", default=1024, show_default=True, type=click.IntRange(16), help="Tokens of each.")
@click.option("--max-ppl-increase", default=0.05, show_default=True, type=Number(-1), help="Quality: fails above it.")
@click.option("--max-kld-mean", type=Number(0), help="Quality: fails above it, in nats.")
@click.option("--max-kld-p99", type=Number(0), help="Quality: fails above it, in nats.")
@click.option("--min-top1-agreement", type=Number(0, 1), help="Quality: fails below it.")
@click.option("--execution-provider", default="cpu", show_default=True, type=Provider())
@placement_options
@progress_options
def verify(
    folder: str,
    revision: str | None,
    checkpoint: str | None,
    json_file: Path | None,
    levels: tuple[str, ...],
    max_ppl_increase: float,
    max_kld_mean: float | None,
    max_kld_p99: float | None,
    min_top1_agreement: float | None,
    **options: Any,
) -> None:
    """Check that FOLDER computes what PyTorch computes, and measure what quantization costs.

    FOLDER is what `skv-export model` wrote, or the hub id of one that was pushed.

    \b
    op       the library against the reference: bytes equal, attention within tolerance
    text     greedy texts of the untouched model in transformers and of the export, tokenizers and padding included
    graph    decode step by step against PyTorch with the same quantized cache
    quality  perplexity, KL divergence, top-1 agreement against the unquantized model

    A folder rewritten from an ONNX graph is compared with that graph in ONNX Runtime instead, on all levels but text.

    Exits with 1 when a level fails.
    """
    from skv_export.model_folder import hub
    from skv_export.verification import run as runner
    from skv_export.verification.quality_level import Thresholds

    thresholds = Thresholds(max_ppl_increase, max_kld_mean, max_kld_p99, min_top1_agreement)
    levels = levels or runner.LEVELS
    local = hub.fetch(folder, revision=revision)
    report = runner.verify(local, checkpoint=checkpoint, levels=levels, thresholds=thresholds, **options)
    say(report.table(), json_file)
    write_json(json_file, report.to_json())
    if not report.passed:
        sys.exit(1)


@main.command()
@click.argument("folder", required=False, type=PathOf("exported folder"))
@click.option(
    "--cuda-arch",
    type=click.IntRange(80),
    multiple=True,
    metavar="ARCH",
    help="Compile FOLDER's kernels that are not built in for such GPUs (90 = compute capability 9.0); needs none.",
)
@click.option("--library-path", is_flag=True, help="Print only where the native library is.")
@json_option("the report")
@debug_option
def doctor(folder: Path | None, cuda_arch: tuple[int, ...], library_path: bool, json_file: Path | None) -> None:
    """Say what is installed, which kernels will run, what is missing and how to fix it.

    With FOLDER, which `skv-export model` wrote, also which kernels its layers take on a GPU, and where they come from.

    \b
    skv-export doctor
    skv-export doctor llama
    skv-export doctor llama --cuda-arch 90
    """
    from skv_export.cli import doctor as checks

    if library_path:
        from skv_export.native import library

        click.echo(library.library_path())
        return
    report = checks.diagnose(folder, cuda_arch)
    say(report.table(), json_file)
    write_json(json_file, report.to_dict())
    if not report.passed:
        sys.exit(1)


@main.command()
@click.argument("name", required=False)
@json_option("the recipes, or the one")
@debug_option
def recipes(name: str | None, json_file: Path | None) -> None:
    """List the recipes that ship with the package, or print one."""
    found = shipped_recipes()
    if name is not None and name not in found:
        raise SkvError(f"recipe {name}: not shipped", expected=", ".join(sorted(found)), fix=did_you_mean(name, found))
    wanted = {key: Recipe.load(found[key]) for key in ([name] if name else sorted(found))}
    width = max(map(len, wanted), default=0)
    for key, recipe in wanted.items():
        text = found[key].read_text(encoding="utf-8").rstrip("\n") if name else f"{key:{width}}  {recipe.description}"
        say(text, json_file)
    options = [{"name": key, **tomllib.loads(recipe.to_toml())} for key, recipe in wanted.items()]
    write_json(json_file, options[0] if name else options)


def _recommended(
    source: str,
    recipe: Recipe,
    options: dict[str, Any],
    target: dict[str, Any],
    as_causal_lm: bool,
    json_file: Path | None,
) -> tuple[Recipe, Source]:
    """The recipe with the bits per layer that ``analyze`` recommends, saying why, and the commit that it looked at."""
    if options["k_bits"] or options["v_bits"]:
        raise SkvError(
            "--budget and --auto", got="--k-bits or --v-bits too", fix="Give one or the other: the budget chooses bits."
        )
    from skv_export.analysis.card import usual_weights
    from skv_export.checkpoints.checkpoint import Checkpoint
    from skv_export.cli import analyze

    on_a_card = target["gpu"] or target["memory"]  # which the weights share with the cache
    weights = None
    if on_a_card:
        opened = Checkpoint.open(source, revision=target["revision"], adapter=target["adapter"])
        weights = recipe.weights or usual_weights(opened, recipe.dtype)
    found, _ = analyze.run(source, recipe.default, {**target, "weights": weights}, as_causal_lm=as_causal_lm)
    say(f"{analyze.summary(found)}\n", json_file)
    return found.to_recipe(recipe), found.source


def _checkpoint_or_demo(checkpoint: str | None, json_file: Path | None = None) -> str:
    """The given checkpoint, or the demo model's GGUF file, saying so."""
    if checkpoint is not None:
        return checkpoint
    from skv_export.checkpoints.demo_model import demo_checkpoint

    path = demo_checkpoint()
    say(f"No CHECKPOINT given: the demo model, {path.name}\n", json_file)
    return str(path)
