"""The command `skv-export bench`: parses, calls, and prints the results and the command that repeats them."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from skv_export.cli.options import PathOf, json_option, progress_options, say, write_json
from skv_export.provenance import versions
from skv_export.spec.recipe import BITS, LayerConfig

_JSON = json_option("the rows")
_THREADS = click.option(
    "--threads", default=0, show_default=True, type=click.IntRange(0), help="0 = the runtime's choice."
)
_CLOCK = click.option(
    "--clock",
    default="wall",
    show_default=True,
    type=click.Choice(["wall", "cpu"]),
    help="cpu = processor time: with --threads 1, for a machine that others use too.",
)


@click.group("bench")
def bench_command() -> None:
    """Time the attention op, or a whole exported model, against a baseline in the same run."""


@bench_command.command()
@click.option("--context", default=4096, show_default=True, type=click.IntRange(1), help="Tokens in the cache.")
@click.option("--num-heads", default=32, show_default=True, type=click.IntRange(1))
@click.option("--kv-num-heads", default=8, show_default=True, type=click.IntRange(1))
@click.option("--head-dim", default=128, show_default=True, type=click.IntRange(1))
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1))
@click.option("--k-bits", default=4, show_default=True, type=click.Choice(BITS))
@click.option("--v-bits", default=2, show_default=True, type=click.Choice(BITS))
@click.option(
    "--baseline",
    default="ort-gqa-fp32,ort-gqa-int8,ort-gqa-int8-vnni,ort-gqa-int4",
    show_default=True,
    help="Commas between; also ggml-f16, ggml-q8_0 and ggml-q4_0, which are llama.cpp's and need llama-cpp-python.",
)
@click.option("--calibrated", is_flag=True, help="Also with calibrated keys.")
@click.option("--repetitions", default=30, show_default=True, type=click.IntRange(1))
@_THREADS
@_CLOCK
@_JSON
@progress_options
def attention(
    k_bits: int,
    v_bits: int,
    baseline: str,
    repetitions: int,
    threads: int,
    clock: str,
    json_file: Path | None,
    calibrated: bool,
    **shape: int,
) -> None:
    """Time one decode step of one layer's attention, in turns with that of other runtimes.

    ort-gqa is ONNX Runtime's GroupQueryAttention: its float32 code is plain (SSE2), a weak baseline; int8-vnni, with a
    scale per tensor and rounded products, is its fastest.

    \b
    skv-export bench attention --context 32768 --num-heads 32 --kv-num-heads 8 --head-dim 128 --threads 2
    skv-export bench attention --baseline ort-gqa-int8-vnni,ggml-f16,ggml-q8_0,ggml-q4_0 --threads 2
    """
    from skv_export.bench import attention, noise
    from skv_export.bench.attention_candidates import AttentionShape

    rows = attention.bench_attention(
        AttentionShape(**shape),
        [LayerConfig(k_bits=k_bits, v_bits=v_bits)],
        baselines=[name for name in baseline.split(",") if name],
        threads=threads,
        repetitions=repetitions,
        clock=clock,
        calibrated=calibrated,
    )
    _print(attention.format_rows(rows), rows, noise.remark(rows), json_file)


@bench_command.command("model")
@click.argument("folder", type=PathOf("exported folder"))
@click.option(
    "--against",
    multiple=True,
    help="What takes turns with it, as often as you like: a folder of onnxruntime-genai's model builder, a GGUF file "
    "(llama.cpp), a checkpoint (transformers), another export; or NAME=PATH with NAME one of genai, llama.cpp, "
    "llama.cpp-q8_0, llama.cpp-q4_0, openvino, openvino-u8, openvino-u8-u4, transformers, transformers-quanto-4, "
    "transformers-hqq-4, skv.",
)
@click.option("--context", default="128,2048,7000", show_default=True, help="Prompt lengths, commas between.")
@click.option(
    "--sequences",
    default="1",
    show_default=True,
    help="How many sequences decode together, each with a prompt of its own, commas between.",
)
@click.option("--rounds", default=2, show_default=True, type=click.IntRange(1), help="Processes each, in turns.")
@click.option("--steps", default=32, show_default=True, type=click.IntRange(1), help="Decode steps per process.")
@_THREADS
@_CLOCK
@_JSON
@progress_options
def bench_model_command(
    folder: Path, against: tuple[str, ...], context: str, sequences: str, json_file: Path | None, **options: Any
) -> None:
    """Time prefill and decode of FOLDER, and its peak memory.

    A step decodes a token of each sequence; prefill lasts until the logits of all prompts are there.

    \b
    skv-export bench model smollm2 --against smollm2-genai --context 128,2048,7000
    skv-export bench model smollm2 --against llama.cpp-q4_0=model.gguf --against openvino-u8=model.gguf
    skv-export bench model smollm2 --against llama.cpp=model.gguf --sequences 1,2,4,8 --context 2000
    skv-export bench model smollm2-int4 --against smollm2-genai-int4 --threads 1 --clock cpu
    """
    from skv_export.bench import model, noise

    lengths = _numbers("--context", context, "lengths such as 128,2048")
    counts = _numbers("--sequences", sequences, "numbers such as 1,2,4,8")
    rows = model.bench_model(folder, against=against, context=lengths, sequences=counts, **options)
    _print(model.format_rows(rows), rows, noise.remark(rows), json_file)


def _numbers(option: str, text: str, expected: str) -> list[int]:
    from skv_export.errors import SkvError

    if not all(part.isdecimal() and int(part) > 0 for part in text.split(",")):
        raise SkvError(option, got=repr(text), expected=expected)
    return [int(part) for part in text.split(",")]


def _print(table: str, rows: Sequence[Any], noise: str, json_file: Path | None) -> None:
    command = "skv-export " + shlex.join(sys.argv[1:])
    say("\n\n".join(filter(None, [table, noise, f"Repeat with: {command}"])), json_file)
    figures = [dataclasses.asdict(row) for row in rows]
    write_json(json_file, {"command": command, "versions": versions(), "noise": noise, "rows": figures})
