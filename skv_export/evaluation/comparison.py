"""`skv-export quality`: compares cache configurations with full precision, on one text in one run.

Every window of text is predicted once by the unquantized model and once by each candidate, decode style. Differences
are taken position by position, so the standard error of a change is that of the difference, which is far below those of
the two perplexities.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from skv_export.arguments import check
from skv_export.checkpoints.checkpoint import Checkpoint, Source
from skv_export.checkpoints.model_config import check_window, load_config
from skv_export.checkpoints.pretrained import Placement, load_model, load_tokenizer, replace_attention
from skv_export.checkpoints.purpose import check_purpose
from skv_export.errors import SkvError
from skv_export.evaluation import metrics
from skv_export.evaluation.candidates import Candidate, check_names
from skv_export.evaluation.decode_simulation import ATTENTION_NAME, Simulation, simulated_logits
from skv_export.evaluation.finished_steps import FinishedSteps
from skv_export.evaluation.free_running import FreeResult
from skv_export.evaluation.needle import NeedleResult
from skv_export.evaluation.ray_workers import RayWorkers
from skv_export.evaluation.text import cut_windows

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done and steps in all."""
POSITION_BUCKETS = 8
"""Parts of a window for perplexity by position."""
BITS_CONTEXT = 8192
"""Context at which effective bits are stated."""
_CHUNK = 128
"""Positions whose log-probabilities are compared at once: bounds the memory with large vocabularies."""


@dataclass(frozen=True)
class CandidateResult:
    """One candidate's figures.

    Attributes:
        name: The candidate's.
        note: What it is.
        effective_bits: Bits per element at ``BITS_CONTEXT`` tokens: codes, parameters, full-precision tokens.
        ppl: Perplexity.
        ppl_reference: Of the unquantized model, on the same positions.
        ppl_change_percent: ``100 * (ppl / ppl_reference - 1)``.
        ppl_stderr_percent: Its standard error over windows; 0 with one window.
        kld_mean: Mean KL divergence from the unquantized model, in nats per token.
        kld_stderr: Its standard error over windows.
        kld_p99: 99th percentile over positions.
        kld_max: Largest.
        top1_agreement: Share of positions where both models' most likely token is the same.
        ppl_change_by_position: Percent, for equal parts of the window from its start to its end.
        kld_by_part: Mean KL divergence of those parts, window after window: what two rows are compared by in pairs.
        windows: Windows measured.
        positions: Predictions scored.
    """

    name: str
    note: str
    effective_bits: float
    ppl: float
    ppl_reference: float
    ppl_change_percent: float
    ppl_stderr_percent: float
    kld_mean: float
    kld_stderr: float
    kld_p99: float
    kld_max: float
    top1_agreement: float
    ppl_change_by_position: list[float]
    kld_by_part: list[float]
    windows: int
    positions: int


@dataclass(frozen=True)
class ComparisonResult:
    """A finished run.

    Attributes:
        model: What was measured.
        text: SHA-256 of the text, its first 16 digits.
        window: Tokens per window.
        rows: One per candidate, as asked for.
        prompt: Tokens of each window that were not scored.
    """

    model: str
    text: str
    window: int
    rows: list[CandidateResult]
    prompt: int = 0

    def to_json(self, retrieval: NeedleResult | None = None, free: FreeResult | None = None) -> str:
        """Everything, as JSON."""
        content: dict[str, Any] = {
            "model": self.model,
            "text_sha256": self.text,
            "window": self.window,
            "prompt": self.prompt,
            "effective_bits_at": BITS_CONTEXT,
            "rows": [vars(row) for row in self.rows],
        }
        if retrieval:
            content["needles"] = [vars(row) for row in retrieval.rows]
        if free:
            content["generate"] = [vars(row) for row in free.rows]
        return json.dumps(content, indent=1) + "\n"

    def table(self) -> str:
        """A line per candidate, fewest bits first; ``*`` marks the Pareto front."""
        front = {row.name for row in pareto(self.rows)}
        width = max([13, *(len(row.name) for row in self.rows)])
        first = self.rows[0]
        behind = f", scored behind a prompt of {self.prompt}" if self.prompt else ""
        lines = [
            f"{self.model}: perplexity {first.ppl_reference:.3f} in full precision; {first.windows} windows of "
            f"{self.window} tokens{behind}; bits per element at {BITS_CONTEXT} tokens, everything counted",
            f"  {'configuration':{width}}  {'bits':>6}  {'perplexity':>16}  "
            f"{'KLD mean':>8}  {'p99':>7}  {'max':>6}  top-1",
        ]
        for row in sorted(self.rows, key=lambda row: row.effective_bits):
            change = f"{row.ppl_change_percent:+.2f}% ±{row.ppl_stderr_percent:.2f}"
            lines.append(
                f"{'*' if row.name in front else ' '} {row.name:{width}}  {row.effective_bits:6.3f}  {change:>16}  "
                f"{row.kld_mean:8.5f}  {row.kld_p99:7.4f}  {row.kld_max:6.3f}  {row.top1_agreement:.2%}"
            )
        return "\n".join(lines)


_Row = TypeVar("_Row")


def pareto(
    rows: Sequence[_Row], key: Callable[[_Row], tuple[float, float]] = attrgetter("effective_bits", "kld_mean")
) -> list[_Row]:
    """Rows that no other row beats in both bits and mean KL divergence, fewest bits first.

    Args:
        rows: Of a table.
        key: A row's bits and divergence.
    """
    front: list[_Row] = []
    for row in sorted(rows, key=key):
        if not front or key(row)[1] < key(front[-1])[1]:
            front.append(row)
    return front


# The model and its text.


def load(source: Source, placement: Placement | None = None) -> tuple[PreTrainedModel, Any]:
    """Loads a checkpoint with simulated attention, and its tokenizer.

    Args:
        source: The checkpoint.
        placement: Device and number format; float32 on the CPU if not given.

    Raises:
        SkvError: It is no language model, can't be loaded whole, or does not take transformers' AttentionInterface.
    """
    config = Checkpoint.open(source).config
    check_purpose(config.get("model_type"), config.get("architectures"))
    tokenizer, model = load_tokenizer(source), load_model(source, placement=placement)
    replace_attention(model, ATTENTION_NAME)
    return model, tokenizer


def ray_workers(address: str, source: Source, placement: Placement | None = None) -> RayWorkers[PreTrainedModel]:
    """Returns workers that measure windows of this checkpoint; see ``RayWorkers``."""
    return RayWorkers(address, lambda there: load(source, there)[0], placement)


# Measuring.


@dataclass(frozen=True)
class _Window:
    """One candidate on one window.

    Attributes:
        nll: ``[S - 1]``, of the candidate, in nats.
        nll_reference: ``[S - 1]``.
        divergence: ``[S - 1]``, in nats.
        agreement: Share of positions.
        bits: Effective bits.
    """

    nll: NDArray[np.float32]
    nll_reference: NDArray[np.float32]
    divergence: NDArray[np.float32]
    agreement: float
    bits: float

    def to_json(self) -> dict[str, Any]:
        lists = {name: [float(f"{x:.9g}") for x in getattr(self, name)] for name in _ARRAYS}
        return {**lists, "agreement": self.agreement, "bits": self.bits}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> _Window:
        arrays = {name: np.array(values[name], np.float32) for name in _ARRAYS}
        return cls(**arrays, agreement=values["agreement"], bits=values["bits"])


_ARRAYS = ("nll", "nll_reference", "divergence")


def _score(reference: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor, bits: float, prompt: int) -> _Window:
    """Scores a candidate's logits ``[S, vocab]`` behind a prompt against log-probabilities of the unquantized model."""
    parts: list[torch.Tensor] = []
    ids = ids.to(logits.device)
    for start in range(max(prompt - 1, 0), len(ids) - 1, _CHUNK):
        rows = slice(start, min(start + _CHUNK, len(ids) - 1))
        p, q = reference[rows], logits[rows].log_softmax(-1)
        targets = ids[rows.start + 1 : rows.stop + 1]
        divergence = metrics.kl_divergence(p, q).clamp(min=0)
        agreement = metrics.top1_agreement(p, q).float()
        parts.append(torch.stack([metrics.nll(q, targets), metrics.nll(p, targets), divergence, agreement]))
    nll, nll_reference, divergence, agreement = torch.cat(parts, 1).cpu().numpy()
    return _Window(nll, nll_reference, divergence, float(agreement.mean()), bits)


@torch.no_grad()
def run(
    source: Source,
    candidates: Sequence[Candidate],
    text: str,
    *,
    windows: int = 16,
    window: int = 1024,
    first: int | None = None,
    prompt: int = 0,
    state: Path | None = None,
    progress: Progress | None = None,
    loaded: tuple[PreTrainedModel, Any] | None = None,
    workers: RayWorkers[PreTrainedModel] | None = None,
) -> ComparisonResult:
    """Measures every candidate on the same windows of a text.

    Args:
        source: The checkpoint.
        candidates: What to compare with full precision.
        text: What to predict.
        windows: Windows of text; fewer if the text has no more.
        window: Tokens per window.
        first: Measure only so many of these windows, 1 or more; ``state`` lets the others be added later.
        prompt: First tokens of each window that are a prompt: only what follows is scored. Caches that are compacted
            are so at its end.
        state: File of finished windows; what it holds of this model and text is not measured again.
        progress: Called after each window of each candidate.
        loaded: The model and tokenizer, if they are loaded already.
        workers: Measure there, windows side by side, and load no model here.

    Raises:
        SkvError: The text is too short, a window longer than the model's context, two candidates have one name, or
            ``state`` is no state file.
    """
    check_names(candidates)
    check("state", state, Path | None)
    check("first", first, int | None)
    if first is not None and first < 1:
        raise SkvError("first", got=first, expected="at least 1 window")
    check_window(load_config(source) if loaded is None else loaded[0].config, window)
    measured: Callable[[list[_Job]], Iterable[tuple[int, Iterable[_Window]]]]
    if workers is None:
        model, tokenizer = loaded or load(source)
        dtype = model.dtype
        measured = functools.partial(_measured_here, model)
    else:
        tokenizer, dtype = load_tokenizer(source), workers.placement.torch_dtype
        measured = functools.partial(workers.map, _all_scores)
    for candidate in candidates:
        candidate.prepare(tokenizer)
    cut = torch.from_numpy(cut_windows(tokenizer, text, windows, window))
    digest = hashlib.sha256(cut.numpy().tobytes()).hexdigest()[:16]
    number_format = "" if dtype == torch.float32 else f":{dtype}"
    behind = f":behind {prompt}" if prompt else ""
    done = FinishedSteps(state, f"{source}:{digest}{number_format}{behind}")
    cut = cut[:first]
    tick = progress or (lambda *_: None)
    jobs = [_Job(i, ids, [c for c in candidates if _step(c, i) not in done], prompt) for i, ids in enumerate(cut)]
    jobs = [job for job in jobs if job.candidates]
    total = len(cut) * len(candidates)
    finished = total - sum(len(job.candidates) for job in jobs)
    for number, scores in measured(jobs):
        for candidate, scored in zip(jobs[number].candidates, scores, strict=True):
            done.save(_step(candidate, jobs[number].window), scored.to_json())
            finished += 1
            tick(candidate.name, finished, total)
    text_hash = hashlib.sha256(text.encode()).hexdigest()[:16]
    rows = [_result(c, [_Window.from_json(done[_step(c, i)]) for i in range(len(cut))]) for c in candidates]
    return ComparisonResult(str(source), text_hash, window, rows, prompt)


@dataclass(frozen=True)
class _Job:
    """What is to be measured on one window.

    Attributes:
        window: Its number.
        ids: ``[S]``.
        candidates: Those that are missing.
        prompt: First tokens that are not scored.
    """

    window: int
    ids: torch.Tensor
    candidates: list[Candidate]
    prompt: int


@torch.no_grad()
def _scores(model: PreTrainedModel, job: _Job) -> Iterator[_Window]:
    """Scores each candidate of a job, in order."""
    reference = simulated_logits(model, job.ids, Simulation.full_precision()).log_softmax(-1)
    for candidate in job.candidates:
        logits = candidate.logits(model, job.ids, job.prompt)
        if not candidate.quantizes(len(job.ids) - 2):  # what the last query that is scored sees
            raise SkvError(
                f"{candidate.name}: window",
                got=f"{len(job.ids)} tokens, of which none is quantized",
                expected="more than stay exact: sinks, recent tokens and a tile",
                fix="Raise --window or lower --recent-tokens.",
            )
        yield _score(reference, logits, job.ids, candidate.effective_bits(BITS_CONTEXT), job.prompt)


def _all_scores(model: PreTrainedModel, job: _Job) -> list[_Window]:
    return [*_scores(model, job)]


def _measured_here(model: PreTrainedModel, jobs: list[_Job]) -> Iterator[tuple[int, Iterable[_Window]]]:
    """Each job's number and its scores, which are computed as they are asked for."""
    for number, job in enumerate(jobs):
        yield number, _scores(model, job)


def _step(candidate: Candidate, window: int) -> str:
    return f"{candidate.key} window {window}"


def _result(candidate: Candidate, windows: list[_Window]) -> CandidateResult:
    nll, reference, divergence = (np.stack([getattr(w, name) for w in windows]).astype(np.float64) for name in _ARRAYS)
    change = nll - reference
    ratio = math.exp(change.mean())
    parts = np.array_split(np.arange(change.shape[1]), POSITION_BUCKETS)
    return CandidateResult(
        name=candidate.name,
        note=candidate.note,
        effective_bits=windows[0].bits,
        ppl=metrics.perplexity(nll),
        ppl_reference=metrics.perplexity(reference),
        ppl_change_percent=100 * (ratio - 1),
        ppl_stderr_percent=100 * ratio * metrics.standard_error(change.mean(1)),
        kld_mean=float(divergence.mean()),
        kld_stderr=metrics.standard_error(divergence.mean(1)),
        kld_p99=float(np.quantile(divergence, 0.99)),
        kld_max=float(divergence.max()),
        top1_agreement=float(np.mean([w.agreement for w in windows])),
        ppl_change_by_position=[100 * math.expm1(change[:, part].mean()) for part in parts],
        kld_by_part=[float(window[part].mean()) for window in divergence for part in parts],
        windows=len(windows),
        positions=divergence.size,
    )
