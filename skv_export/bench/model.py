"""Times a whole exported model, alone or in turns with other runtimes of the same model.

Each measurement runs in its own process, so that its peak memory is its own: load, prefill prompts of ``context``
tokens, decode all sequences together. The candidates take turns, case by case and round by round.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from skv_export.bench import model_peers
from skv_export.bench.model_peers import Job, Run
from skv_export.bench.noise import CLOCKS, spread
from skv_export.errors import SkvError
from skv_export.progress import track

CONTEXTS = (128, 2048, 7000)
DECODE_STEPS = 32
Case = tuple[int, int]
"""Sequences, and tokens of each prompt."""


@dataclass(frozen=True)
class ModelRow:
    """One candidate with so many sequences at one context, over all rounds.

    Attributes:
        name: Of the candidate: ``skv``, or as ``--against`` has it.
        sequences: That decode together.
        context: Tokens of each prompt.
        prefill_seconds: Until the logits of all prompts are there; median.
        ms_median: Milliseconds per step, which decodes a token of each sequence; median over steps and rounds.
        ms_min: The fastest step.
        ms_max: The slowest step.
        tokens_per_s: Of all sequences: ``sequences`` * 1000 / ``ms_median``.
        peak_bytes: Largest of the rounds.
        speedup: Decode, the median of each other candidate over this one's.
        spread: Of the steps' times; see ``noise.spread``.
    """

    name: str
    sequences: int
    context: int
    prefill_seconds: float
    ms_median: float
    ms_min: float
    ms_max: float
    tokens_per_s: float
    peak_bytes: int
    speedup: dict[str, float]
    spread: float


def bench_model(
    folder: Path | str,
    *,
    against: Sequence[Path | str] | Path | str | None = None,
    context: Sequence[int] = CONTEXTS,
    sequences: Sequence[int] = (1,),
    threads: int = 0,
    rounds: int = 2,
    steps: int = DECODE_STEPS,
    clock: str = "wall",
) -> list[ModelRow]:
    """Times prefill and decode.

    Args:
        folder: What ``skv-export model`` wrote.
        against: Other candidates, each ``NAME=PATH`` with a name of ``model_peers.PEERS``, or a path alone: a folder of
            onnxruntime-genai's model builder, a GGUF file for llama.cpp, a checkpoint for transformers, another export.
        context: Prompt lengths.
        sequences: How many decode together, each with a prompt of its own.
        threads: Threads inside an op; 0 = the runtime's choice.
        rounds: Processes per candidate, context and number of sequences, in turns.
        steps: Decode steps per process.
        clock: ``wall``, or ``cpu`` = the processor time of all threads: with one thread, what other processes take does
            not count.

    Raises:
        SkvError: A candidate that can't be run, or not with so many sequences, or whose process failed; the message
            carries the end of what it said.
    """
    if not sequences or min(sequences) < 1:
        raise SkvError("bench: sequences", got=list(sequences), expected="numbers of at least 1")
    if clock not in CLOCKS:
        raise SkvError("bench: clock", got=clock, expected=" or ".join(CLOCKS))
    others = [against] if isinstance(against, (str, Path)) else list(against or ())
    subjects = {"skv": ("skv", str(folder))}
    for text in others:
        name, path = model_peers.parse(str(text))
        label = name if name not in subjects else f"{name} {path.name}"
        if label in subjects:
            raise SkvError("bench: the same candidate twice", got=str(text), expected="each once")
        model_peers.check_sequences(name, max(sequences))
        subjects[label] = name, str(path)
    runs: dict[Case, dict[str, list[Run]]] = {case: {} for case in itertools.product(sequences, context)}
    for (count, length), _, label in track(list(itertools.product(runs, range(rounds), subjects)), "bench"):
        job = Job(*subjects[label], length, threads, steps, clock, count)
        runs[count, length].setdefault(label, []).append(_in_a_process(job))
    return [_row(label, case, done) for case, done in runs.items() for label in done]


def _in_a_process(job: Job) -> Run:
    # -P: this package, whatever lies in the folder that the command was given in.
    command = [sys.executable, "-P", "-m", "skv_export.bench.model", json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        of = f" of {job.sequences} sequences" if job.sequences > 1 else ""
        raise SkvError(
            f"bench: the run of {job.name} at {job.context} tokens{of} failed",
            got=(done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1],
        )
    values = json.loads(done.stdout.splitlines()[-1])
    values["tokens"] = tuple(map(tuple, values["tokens"]))
    return Run(**values | {"decode_ms": tuple(values["decode_ms"])})


def _median(runs: Sequence[Run]) -> float:
    return float(np.median([ms for run in runs for ms in run.decode_ms]))


def _row(name: str, case: Case, done: Mapping[str, Sequence[Run]]) -> ModelRow:
    sequences, context = case
    steps = [ms for run in done[name] for ms in run.decode_ms]
    median = _median(done[name])
    return ModelRow(
        name=name,
        sequences=sequences,
        context=context,
        prefill_seconds=float(np.median([run.prefill_seconds for run in done[name]])),
        ms_median=median,
        ms_min=min(steps),
        ms_max=max(steps),
        tokens_per_s=sequences * 1e3 / median,
        peak_bytes=max(run.peak_bytes for run in done[name]),
        speedup={who: _median(runs) / median for who, runs in done.items() if who != name},
        spread=spread(steps),
    )


def format_rows(rows: Sequence[ModelRow]) -> str:
    """The rows as a table in Markdown; the ratio is that of the exported folder to each other candidate."""
    several = any(row.sequences > 1 for row in rows)
    titles = ["context", "", "prefill s", "ms per step", "min", "max", "tokens/s", "peak MiB", "skv is faster by"]
    lines = [["sequences"] * several + titles]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        numbers = [f"{x:.1f}" for x in (row.ms_median, row.ms_min, row.ms_max, row.tokens_per_s)]
        ratio = f"{1 / row.speedup['skv']:.2f}x" if "skv" in row.speedup else ""
        peak = f"{row.peak_bytes / 2**20:.0f}"
        head = [str(row.sequences)] * several + [f"{row.context:,}", row.name]
        lines.append([*head, f"{row.prefill_seconds:.2f}", *numbers, peak, ratio])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(job: dict[str, Any]) -> None:
    """Runs one measurement in this process and prints it as JSON."""
    print(json.dumps(asdict(model_peers.measure(Job(**job)))))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
