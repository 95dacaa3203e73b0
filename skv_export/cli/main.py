"""The command line: parses, calls, prints. A flag, a parameter and a recipe key have the same name."""

from __future__ import annotations

import dataclasses
import importlib
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from skv_export import __version__
from skv_export.cli.choice import Choice
from skv_export.cli.guard import guarded
from skv_export.cli.options import DEBUG, OutputFile, debug_option, placement_options, progress_options
from skv_export.cli.target import TARGET_OPTIONS, target_options
from skv_export.errors import SkvError, did_you_mean
from skv_export.spec.recipe import (
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

_Command = TypeVar("_Command", bound=Callable[..., Any])
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


_LAZY = {
    "analyze": "skv_export.cli.analyze:analyze_command",
    "bench": "skv_export.cli.bench:bench_command",
    "quality": "skv_export.cli.quality:quality_command",
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
        if self.get_command(ctx, first) is None and (Path(first).exists() or "/" in first):
            args = ["model", *args]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with guarded(lambda: bool(ctx.meta.get(DEBUG))):
            return super().invoke(ctx)


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
    "weights": (WEIGHTS, "Number format of weights; int8 and int4 in blocks of 32, the rest as --dtype."),
}
_SWITCHES = {
    "quantize_head": "Whether --weights int8 or int4 includes the output embedding.",
    "quantize_embeddings": "Whether --weights int8 or int4 includes the input embedding.",
}


def _recipe_options(command: _Command) -> _Command:
    """Adds --recipe and one flag per recipe key; the defaults shown are the recipe's."""
    defaults = {**dataclasses.asdict(LayerConfig()), "dtype": Recipe().dtype, "weights": "as --dtype"}
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
    if recipe is None:
        base = Recipe()
    else:
        path = Path(recipe)
        base = Recipe.load(path if path.exists() else shipped_recipes().get(recipe, path))
    return base.with_options(**options)


def _exported_model(command: _Command) -> _Command:
    """Adds the argument of commands that run an exported model: a folder, or the hub id of one, with its --revision."""
    command = click.option("--revision", help="Of a hub id: branch, tag or commit.  [default: main]")(command)
    return click.argument("folder")(command)


@main.command()
@click.argument("checkpoint", required=False)
@_recipe_options
@click.option("--auto", is_flag=True, help="Bits per layer as `analyze` recommends; so do the flags from --budget on.")
@target_options
@click.option("--device", default="cpu", show_default=True, help="Where PyTorch's model runs that is measured.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write.  [default: NAME-k4v2]")
@click.option("--force", is_flag=True, help="Replace the folder if it exists.")
@click.option(
    "--all-logits", is_flag=True, help="Logits of every position, for evaluation; default: of the last token."
)
@click.option("--as-causal-lm", is_flag=True, help="Export a classifier, reward or embedding model's layers anyway.")
@click.option("--copy-weights", is_flag=True, help="ONNX in: copy the weights instead of linking to them.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@progress_options
def model(
    checkpoint: str | None,
    recipe: str | None,
    auto: bool,
    out: Path | None,
    force: bool,
    all_logits: bool,
    as_causal_lm: bool,
    copy_weights: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Export CHECKPOINT to a folder that ONNX Runtime runs with a quantized KV cache.

    CHECKPOINT is a folder with safetensors, a GGUF file, or a hub id; without it, the demo model (extra `demo`). An
    ONNX file or folder with GroupQueryAttention, or Attention with a past, is rewritten, its weights untouched.

    \b
    skv-export model ./Qwen3-0.6B --k-bits 4 --v-bits 2 --out qwen3
    skv-export model ./Qwen3-0.6B --recipe qwen3 --dry-run
    skv-export model ./Qwen3-0.6B --budget 3.25          # or --auto, --gpu rtx4090 --context 128k, --max-loss 0.5%
    skv-export model model.gguf --k-bits 8 --v-bits 4 --dtype fp16
    skv-export model ./Qwen3-0.6B --k-bits 4 --v-bits 2 --weights int4
    skv-export model genai-folder/model.onnx --k-bits 4 --v-bits 4
    """
    from skv_export.model_folder.output import check_target

    target = {name: options.pop(name) for name in (*TARGET_OPTIONS, "device")}
    asked = auto or any(target[name] is not None for name in ("budget", "memory", "gpu", "max_loss"))
    resolved = _resolve_recipe(recipe, options)
    source = _checkpoint_or_demo(checkpoint)
    budget = target["budget"]
    bits = resolved.default.name if not asked else "auto" if budget is None else f"{budget:g}bits"
    folder = out or Path(default_name(source, bits))
    if not dry_run:
        check_target(folder, force=force)
    from skv_export.export import pipeline as export
    from skv_export.rewrite import pipeline as rewrite
    from skv_export.rewrite.source import is_onnx

    rewriting = is_onnx(source)
    if asked:
        resolved = _recommended(source, resolved, options, target, as_causal_lm)
    elif target["context"] is not None or target["measure"] is not None:
        raise SkvError("--context and --measure: nothing chooses bits", fix="Add --auto, or --budget and its like.")
    if rewriting and (all_logits or options["dtype"] or options["weights"]):
        raise SkvError(
            "--all-logits, --dtype and --weights",
            got="an ONNX model",
            fix="Leave them out: its weights stay as they are.",
        )
    if rewriting:
        plan: Any = rewrite.plan(source, resolved)
    else:
        plan = export.plan(source, resolved, as_causal_lm=as_causal_lm)
    click.echo(plan.table())
    if dry_run:
        return
    if rewriting:
        folder = rewrite.rewrite_model(source, out=folder, recipe=resolved, force=force, copy_weights=copy_weights)
    else:
        folder = export.export_model(
            source, out=folder, recipe=resolved, force=force, all_logits=all_logits, as_causal_lm=as_causal_lm
        )
    name = shlex.quote(f"./{folder}" if str(folder).startswith("-") else str(folder))
    click.echo(f"\nWritten to {folder}. Next:\n  skv-export verify {name}\n  skv-export generate {name} --prompt ...")


def default_name(source: str, bits: str) -> str:
    """The folder that `model` writes without --out: the checkpoint's whole name, dots included, and its bits."""
    path = Path(source).expanduser()
    if path.is_dir():
        name = path.resolve().name
    else:
        name = path.stem if path.suffix.lower() in (".gguf", ".onnx", ".safetensors") else path.name
    return f"{name.lstrip('-.')[:100] or 'model'}-{bits}".lower()


@main.command()
@_exported_model
@click.option("--checkpoint", help="What the folder was exported from.  [default: as recorded in it]")
@click.option(
    "--level",
    "levels",
    multiple=True,
    type=Choice(["op", "text", "graph", "quality"]),
    help="Only this level; may be given several times.  [default: all four]",
)
@click.option("--text", type=click.Path(path_type=Path), help="Text for all levels but op.  [default: shipped prose]")
@click.option("--json", "json_file", type=OutputFile(), help="Write the report as JSON.")
@click.option("--windows", default=8, show_default=True, type=click.IntRange(1), help="Quality: windows of text.")
@click.option("--window-tokens", default=1024, show_default=True, type=click.IntRange(16), help="Tokens of each.")
@click.option("--max-ppl-increase", default=0.05, show_default=True, type=float, help="Quality: fails above it.")
@click.option("--max-kld-mean", type=float, help="Quality: fails above it, in nats.")
@click.option("--max-kld-p99", type=float, help="Quality: fails above it, in nats.")
@click.option("--min-top1-agreement", type=click.FloatRange(0, 1), help="Quality: fails below it.")
@click.option("--execution-provider", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
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
    from skv_export.model_folder.output import write_text
    from skv_export.verification import run as runner
    from skv_export.verification.quality_level import Thresholds

    thresholds = Thresholds(max_ppl_increase, max_kld_mean, max_kld_p99, min_top1_agreement)
    levels = levels or runner.LEVELS
    local = hub.fetch(folder, revision=revision)
    report = runner.verify(local, checkpoint=checkpoint, levels=levels, thresholds=thresholds, **options)
    click.echo(report.table())
    if json_file:
        write_text(json_file, report.to_json())
    if not report.passed:
        sys.exit(1)


@main.command()
@_exported_model
@click.option("--prompt", required=True, help="Text to continue; - reads standard input.")
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="0 = greedy.")
@click.option("--top-k", default=0, show_default=True, type=click.IntRange(0), help="0 = all.")
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template.")
@click.option("--execution-provider", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
@click.option("--cuda-graph", is_flag=True, help="On a GPU: decode as one captured CUDA graph per token.")
@click.option(
    "--prompt-lookup", default=0, type=click.IntRange(0, 64), help="Guess so many tokens from the text so far."
)
@click.option("--draft", type=click.Path(path_type=Path), help="Guess with this smaller exported model.")
@click.option(
    "--draft-tokens", default=4, show_default=True, type=click.IntRange(1, 64), help="Tokens that it guesses."
)
@click.option("--load-cache", type=click.Path(path_type=Path), help="Go on from a saved cache; PROMPT may be empty.")
@click.option("--save-cache", type=OutputFile(), help="Save the cache at the end, with all that was generated.")
@debug_option
def generate(folder: str, revision: str | None, prompt: str, **options: Any) -> None:
    """Continue a prompt with the exported model, streaming; no torch involved.

    FOLDER is what `skv-export model` wrote, or the hub id of one that was pushed.

    \b
    skv-export generate smollm2 --prompt "The capital of France is"
    skv-export generate org/smollm2-k4v2 --prompt "The capital of France is"
    skv-export generate smollm2 --chat --prompt "Why is the sky blue?" --temperature 0.7 --top-p 0.9
    skv-export generate smollm2 --prompt - --save-cache book.cache < book.txt
    """
    from skv_export.model_folder import hub
    from skv_export.runtime.text import generate_text

    text = sys.stdin.read() if prompt == "-" else prompt
    local = hub.fetch(folder, revision=revision)
    result = generate_text(local, text, on_text=lambda piece: click.echo(piece, nl=False), **options)
    click.echo(f"\n{result.summary()}", err=True)


@main.command()
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--library-path", is_flag=True, help="Print only where the native library is.")
@debug_option
def doctor(folder: Path | None, library_path: bool) -> None:
    """Say what is installed, which kernels will run, what is missing and how to fix it.

    With FOLDER, which `skv-export model` wrote, also which kernels its layers take on a GPU.

    \b
    skv-export doctor
    skv-export doctor llama
    """
    from skv_export.cli import doctor as checks

    if library_path:
        from skv_export.native import library

        click.echo(library.library_path())
        return
    report = checks.diagnose(folder)
    click.echo(report.table())
    if not report.passed:
        sys.exit(1)


@main.command()
@click.argument("name", required=False)
@debug_option
def recipes(name: str | None) -> None:
    """List the recipes that ship with the package, or print one."""
    found = shipped_recipes()
    if name is None:
        width = max(map(len, found), default=0)
        for key, path in sorted(found.items()):
            click.echo(f"{key:{width}}  {Recipe.load(path).description}")
        return
    if name not in found:
        raise SkvError(f"recipe {name}: not shipped", expected=", ".join(sorted(found)), fix=did_you_mean(name, found))
    click.echo(found[name].read_text(encoding="utf-8"), nl=False)


def _recommended(
    source: str, recipe: Recipe, options: dict[str, Any], target: dict[str, Any], as_causal_lm: bool
) -> Recipe:
    """The recipe with the bits per layer that ``analyze`` recommends, saying why."""
    if options["k_bits"] or options["v_bits"]:
        raise SkvError(
            "--budget and --auto", got="--k-bits or --v-bits too", fix="Give one or the other: the budget chooses bits."
        )
    from skv_export.cli import analyze

    weights = recipe.weights or (recipe.dtype if target["gpu"] else None)
    found, _ = analyze.run(source, recipe.default, {**target, "weights": weights}, as_causal_lm=as_causal_lm)
    click.echo(f"{analyze.summary(found)}\n")
    return found.to_recipe(recipe)


def _checkpoint_or_demo(checkpoint: str | None) -> str:
    """The given checkpoint, or the demo model's GGUF file, saying so."""
    if checkpoint is not None:
        return checkpoint
    from skv_export.checkpoints.checkpoint import demo_checkpoint

    path = demo_checkpoint()
    click.echo(f"No CHECKPOINT given: the demo model, {path.name}\n")
    return str(path)
