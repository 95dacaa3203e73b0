"""The command `skv-export generate`: parses, calls, prints the text as it comes."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from skv_export.cli.guard import INTERRUPTED
from skv_export.cli.options import (
    STDOUT,
    Number,
    OutputFile,
    PathOf,
    debug_option,
    exported_model,
    json_option,
    sampling_options,
    write_json,
)


class _Draft(PathOf):
    """An exported folder, or a number of layers."""

    name = "draft"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Returns the path, or the number."""
        return int(value) if str(value).isdecimal() else super().convert(value, param, ctx)


DRAFT = _Draft("draft model")


@click.command("generate")
@exported_model
@click.option("--prompt", required=True, help="Text to continue; - reads standard input.")
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template.")
@sampling_options
@click.option(
    "--prompt-lookup", default=0, type=click.IntRange(0, 64), help="Guess so many tokens from the text so far."
)
@click.option("--draft", type=PathOf("draft model"), help="Guess with this smaller exported model.")
@click.option("--draft-tokens", default=4, show_default=True, type=click.IntRange(1, 64), help="Tokens it guesses.")
@click.option(
    "--keep-tokens",
    type=click.IntRange(1),
    help="Keep only so many tokens of the prompt in the cache: those that its last tokens look at.",
)
@click.option(
    "--look-ahead",
    type=PathOf("draft model"),
    help="With --keep-tokens: this smaller exported model's guess at what follows looks, too.",
)
@click.option(
    "--compress-prompt",
    metavar="DRAFT",
    type=DRAFT,
    help="Make the prompt shorter: this smaller exported model, or so many first layers of the model itself, chooses.",
)
@click.option(
    "--keep",
    default=0.25,
    show_default=True,
    type=Number(0, 1, min_open=True),
    help="Share of the prompt, with --compress-prompt.",
)
@click.option("--load-cache", type=PathOf("saved cache"), help="Go on from a saved cache; PROMPT may be empty.")
@click.option("--save-cache", type=OutputFile(), help="Save the cache at the end, with all that was generated.")
@json_option("text and figures")
@debug_option
def generate_command(
    folder: str,
    revision: str | None,
    prompt: str,
    template_options: tuple[tuple[str, Any], ...],
    save_cache: Path | None,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Continue a prompt with the exported model, streaming; no torch involved.

    FOLDER is what `skv-export model` wrote, or the hub id of one that was pushed. Ctrl-C ends the text; what was
    generated so far counts, and the exit code is 130.

    \b
    skv-export generate demo-model --prompt "The capital of France is"
    skv-export generate org/smollm2-k4v2 --prompt "The capital of France is"
    skv-export generate demo-model --chat --prompt "Why is the sky blue?" --temperature 0.7 --top-p 0.9
    skv-export generate demo-model --prompt "$(cat book.txt)" --save-cache book.cache
    skv-export generate demo-model --prompt "$(cat book.txt)" --keep-tokens 1024
    skv-export generate demo-model --prompt "$(cat book.txt)" --compress-prompt 12 --keep 0.25
    skv-export generate demo-model --prompt "One, two," --stop ten --stop "\\n" --json -
    """
    from skv_export.model_folder import hub
    from skv_export.model_folder.skv_config import describe
    from skv_export.provenance import versions
    from skv_export.runtime.text import start_text

    text = sys.stdin.read() if prompt == "-" else prompt
    local = hub.fetch(folder, revision=revision)
    stream = start_text(local, text, template_options=dict(template_options), **options)
    result, code = stream.generation, 0
    with contextlib.closing(iter(stream)) as pieces:
        try:
            for piece in pieces:
                click.echo(piece, nl=False, err=json_file == STDOUT)
        except KeyboardInterrupt:
            code = INTERRUPTED
    if save_cache is not None:
        stream.save_cache(save_cache)
    click.echo(f"\n{result.summary()}", err=True)
    figures = {**dataclasses.asdict(result), "tokens_per_second": result.tokens_per_second}
    write_json(json_file, {"prompt": text, **figures, "model": describe(local), "versions": versions()})
    if code:
        raise click.exceptions.Exit(code)
