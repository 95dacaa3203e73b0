"""Times a whole exported model, alone or in turns with an onnxruntime-genai export of the same model.

Each measurement runs in its own process, so that its peak memory is its own: load, prefill a prompt of ``context``
tokens, decode. The candidates take turns, context by context and round by round.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from skv_export.bench.attention import CLOCKS
from skv_export.bench.noise import spread
from skv_export.errors import SkvError
from skv_export.model_folder.names import GENAI_CONFIG_FILE
from skv_export.progress import track

CONTEXTS = (128, 2048, 7000)
DECODE_STEPS = 32


@dataclass(frozen=True)
class Run:
    """One process's measurement.

    Attributes:
        prefill_seconds: From the prompt to its logits, by the clock that was asked for, as is ``decode_ms``.
        decode_ms: Milliseconds of each decode step.
        peak_bytes: Peak resident memory of the process, weights and imports included.
    """

    prefill_seconds: float
    decode_ms: tuple[float, ...]
    peak_bytes: int


@dataclass(frozen=True)
class ModelRow:
    """One candidate at one context, over all rounds.

    Attributes:
        name: ``skv`` or ``genai``.
        context: Tokens of the prompt.
        prefill_seconds: Median.
        ms_median: Milliseconds per decoded token, median over steps and rounds.
        ms_min: The fastest step.
        ms_max: The slowest step.
        tokens_per_s: 1000 / ``ms_median``.
        peak_bytes: Largest of the rounds.
        speedup: Decode, the other candidate's median over this one's; None without another.
        spread: Of the steps' times; see ``noise.spread``.
    """

    name: str
    context: int
    prefill_seconds: float
    ms_median: float
    ms_min: float
    ms_max: float
    tokens_per_s: float
    peak_bytes: int
    speedup: float | None
    spread: float


def bench_model(
    folder: Path | str,
    *,
    against: Path | str | None = None,
    context: Sequence[int] = CONTEXTS,
    threads: int = 0,
    rounds: int = 2,
    steps: int = DECODE_STEPS,
    clock: str = "wall",
) -> list[ModelRow]:
    """Times prefill and decode.

    Args:
        folder: What ``skv-export model`` wrote.
        against: A folder that onnxruntime-genai's model builder wrote, whatever its weights are stored in; needs the
            package onnxruntime-genai.
        context: Prompt lengths.
        threads: Threads inside an op; 0 = the runtime's choice.
        rounds: Processes per candidate and context, in turns.
        steps: Decode steps per process.
        clock: ``wall``, or ``cpu`` = the processor time of all threads: with one thread, what other processes take does
            not count.

    Raises:
        SkvError: A process failed; the message carries the end of what it said.
    """
    if clock not in CLOCKS:
        raise SkvError("bench: clock", got=clock, expected=" or ".join(CLOCKS))
    subjects = {"skv": str(folder)} | ({"genai": str(against)} if against is not None else {})
    runs: dict[tuple[int, str], list[Run]] = {}
    turns = [(length, name) for length in context for _ in range(rounds) for name in subjects]
    for length, name in track(turns, "bench"):
        job = {"name": name, "folder": subjects[name], "context": length, "threads": threads, "steps": steps}
        job["clock"] = clock
        runs.setdefault((length, name), []).append(_in_a_process(job))
    medians = {key: _median(each) for key, each in runs.items()}
    return [_row(name, length, each, medians) for (length, name), each in runs.items()]


def _in_a_process(job: dict[str, Any]) -> Run:
    # -P: this package, whatever lies in the folder that the command was given in.
    command = [sys.executable, "-P", "-m", "skv_export.bench.model", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SkvError(
            f"bench: the run of {job['name']} at {job['context']} tokens failed",
            got=(done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1],
            fix="pip install onnxruntime-genai, for --against." if job["name"] == "genai" else None,
        )
    values = json.loads(done.stdout.splitlines()[-1])
    return Run(values["prefill_seconds"], tuple(values["decode_ms"]), values["peak_bytes"])


def _median(runs: Sequence[Run]) -> float:
    return float(np.median([ms for run in runs for ms in run.decode_ms]))


def _row(name: str, length: int, runs: Sequence[Run], medians: dict[tuple[int, str], float]) -> ModelRow:
    steps = [ms for run in runs for ms in run.decode_ms]
    median = medians[length, name]
    others = [other for (at, who), other in medians.items() if at == length and who != name]
    return ModelRow(
        name=name,
        context=length,
        prefill_seconds=float(np.median([run.prefill_seconds for run in runs])),
        ms_median=median,
        ms_min=min(steps),
        ms_max=max(steps),
        tokens_per_s=1e3 / median,
        peak_bytes=max(run.peak_bytes for run in runs),
        speedup=others[0] / median if others else None,
        spread=spread(steps),
    )


def format_rows(rows: Sequence[ModelRow]) -> str:
    """The rows as a table in Markdown."""
    lines = [["context", "", "prefill s", "ms per token", "min", "max", "tokens/s", "peak MiB", "decode speedup"]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        numbers = [f"{x:.1f}" for x in (row.ms_median, row.ms_min, row.ms_max, row.tokens_per_s)]
        ratio = f"{row.speedup:.2f}x" if row.speedup else ""
        peak = f"{row.peak_bytes / 2**20:.0f}"
        lines.append([f"{row.context:,}", row.name, f"{row.prefill_seconds:.2f}", *numbers, peak, ratio])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# The measured process.


def _measure(prefill: Callable[[], None], step: Callable[[], None], steps: int, clock: str) -> Run:
    now = CLOCKS[clock]
    start = now()
    prefill()
    prefill_seconds = now() - start
    step()  # the first one sizes the runtime's buffers for a single token
    taken = []
    for _ in range(steps):
        start = now()
        step()
        taken.append(1e3 * (now() - start))
    return Run(prefill_seconds, tuple(taken), _peak_bytes())


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    if found is None:
        raise SkvError("bench: peak memory", got="no VmHWM in /proc/self/status", fix="Measure on Linux.")
    return int(found[1]) * 1024


def _skv(folder: str, context: int, threads: int, steps: int, clock: str) -> Run:
    from skv_export.runtime.session import Session

    session = Session(folder, num_threads=threads)
    cache = session.cache(1, context + steps + 2)
    pending: Any = np.random.default_rng(0).integers(0, session.config.vocab_size, context)

    def call() -> None:
        nonlocal pending
        pending = [session.run([pending], None, None, cache)[0, -1].argmax()]

    return _measure(call, call, steps, clock)


def _genai(folder: str, context: int, threads: int, steps: int, clock: str) -> Run:
    import onnxruntime_genai as og

    config = og.Config(folder)
    if threads:
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=context + steps + 2, do_sample=False)
    generator = og.Generator(model, params)
    vocab_size = json.loads((Path(folder) / GENAI_CONFIG_FILE).read_text(encoding="utf-8"))["model"]["vocab_size"]
    tokens = np.random.default_rng(0).integers(0, vocab_size, context).astype(np.int32)

    def prefill() -> None:
        generator.append_tokens(tokens)
        generator.generate_next_token()

    return _measure(prefill, generator.generate_next_token, steps, clock)


def main(job: dict[str, Any]) -> None:
    """Runs one measurement in this process and prints it as JSON."""
    name = job.pop("name")
    print(json.dumps(asdict((_skv if name == "skv" else _genai)(**job))))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
