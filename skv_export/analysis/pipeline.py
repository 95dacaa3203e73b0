"""`analyze`: computes the scores of a checkpoint and recommends bits per layer, as a recipe."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from skv_export.analysis.allocation import DEFAULT_CHOICES, allocate_bits, allocate_bits_optimal
from skv_export.analysis.budget import CacheBudget, Pair
from skv_export.analysis.geometry import geometry
from skv_export.analysis.norms import norms
from skv_export.analysis.scores import WEAK_CORRELATION, LayerAnalysis, Score, compare, find_flags, loss_tables
from skv_export.checkpoints.attention_weights import AttentionConfig, AttentionReader
from skv_export.checkpoints.checkpoint import Checkpoint, Source, resolve
from skv_export.errors import SkvError, require_module
from skv_export.model_folder.output import check_file, output_file, write_text
from skv_export.spec.recipe import LayerConfig, Recipe

if TYPE_CHECKING:
    from skv_export.analysis.measurement import Measurement
    from skv_export.checkpoints.pretrained import Placement

__all__ = ["Analysis", "allocate_bits", "allocate_bits_optimal", "analyze"]

Progress = Callable[[str, int, int], None]
_BLOCK_ROWS = 1024


@dataclass(frozen=True)
class Plan:
    """One allocation, with what it costs and what it is expected to lose.

    Attributes:
        name: ``K4V2`` for a uniform pair, else what it is.
        bits: ``(k_bits, v_bits)`` per layer.
        effective_bits: All bytes of the cache per element, in bits.
        loss: Expected loss, in the unit of the recommendation's score.
    """

    name: str
    bits: tuple[Pair, ...]
    effective_bits: float
    loss: float


@dataclass(frozen=True)
class Recommendation:
    """What to export with.

    Attributes:
        plan: The allocation to use.
        uniform: The best pair that is the same in every layer.
        neighbours: Allocations with a little less and a little more memory, and other uniform pairs.
        score: Name of the score that judged.
        loss_unit: What ``Plan.loss`` counts.
        reasons: Plain sentences.
    """

    plan: Plan
    uniform: Plan
    neighbours: tuple[Plan, ...]
    score: str
    loss_unit: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Analysis:
    """Everything that `analyze` found; ``to_json`` and ``to_recipe`` are its outputs.

    Attributes:
        model: What was analyzed.
        bytes_read: Bytes of tensors that were read.
        tensor_bytes: Bytes of all tensors that hold queries, keys, values and their norms.
        config: The attention's sizes.
        budget: The memory model: context, batch and the bits allowed.
        layers: Per layer.
        scores: Side by side.
        flags: ``layer`` (None = the model), ``flag`` and ``text``.
        recommendation: What to export with.
        measurement: What `--measure` found; None without it.
    """

    model: str
    bytes_read: int
    tensor_bytes: int
    config: AttentionConfig
    budget: CacheBudget
    layers: tuple[LayerAnalysis, ...]
    scores: tuple[Score, ...]
    flags: tuple[Mapping[str, Any], ...]
    recommendation: Recommendation
    measurement: Measurement | None = None

    def to_recipe(self, recipe: Recipe | None = None) -> Recipe:
        """Returns the recommendation as a recipe for `model`; ``recipe`` gives what has nothing to do with bits."""
        plan = self.recommendation.plan
        recipe = Recipe.per_layer(list(plan.bits), recipe or Recipe(default=self.budget.base))
        description = f"{self.model}: {plan.effective_bits:.2f} effective bits at {self.budget.context} tokens"
        return replace(recipe, description=f"{description}, by {self.recommendation.score}")

    def to_json(self) -> dict[str, Any]:
        """Returns plain data: the keys of `--json`."""
        by_layer = {score.name: score for score in self.scores}
        layers = [
            {
                "index": layer.index,
                "k_frobenius": layer.k.frobenius,
                "v_frobenius": layer.v.frobenius,
                "q_frobenius": layer.q.frobenius,
                "k_spectral": layer.k.spectral,
                "v_spectral": layer.v.spectral,
                "q_spectral": layer.q.spectral,
                "k_stable_rank": layer.k.stable_rank,
                "v_stable_rank": layer.v.stable_rank,
                "k_spectrum": list(layer.k.spectrum),
                "v_spectrum": list(layer.v.spectrum),
                "k_head_frobenius": list(layer.k.head_frobenius),
                "v_head_frobenius": list(layer.v.head_frobenius),
                "k_head_spectral": list(layer.k.head_spectral),
                "v_head_spectral": list(layer.v.head_spectral),
                "k_bias": layer.k_bias,
                "k_error": {str(b): e for b, e in layer.geometry.k_error.items()},
                "v_error": {str(b): e for b, e in layer.geometry.v_error.items()},
                "scores": {
                    name: {"k_bits": s.bits[i][0], "v_bits": s.bits[i][1], "balance": s.balance[i]}
                    for name, s in by_layer.items()
                },
            }
            for i, layer in enumerate(self.layers)
        ]
        r = self.recommendation
        return {
            "model": self.model,
            "bytes_read": self.bytes_read,
            "tensor_bytes": self.tensor_bytes,
            "context": self.budget.context,
            "batch": self.budget.batch,
            "layers": layers,
            "notes": {s.name: s.note for s in self.scores if s.note},
            "flags": list(self.flags),
            "recommendation": {
                "k_bits": [k for k, _ in r.plan.bits],
                "v_bits": [v for _, v in r.plan.bits],
                "effective_bits": r.plan.effective_bits,
                "memory_bytes": self.budget.memory(r.plan.bits),
                "score": r.score,
                "loss": r.plan.loss,
                "loss_unit": r.loss_unit,
                "uniform": _plan_json(r.uniform),
                "neighbours": [_plan_json(p) for p in r.neighbours],
                "reasons": list(r.reasons),
            },
        }


def _plan_json(plan: Plan) -> dict[str, Any]:
    return {
        "name": plan.name,
        "k_bits": [k for k, _ in plan.bits],
        "v_bits": [v for _, v in plan.bits],
        "effective_bits": plan.effective_bits,
        "loss": plan.loss,
    }


def analyze(
    checkpoint: str | Path | Source,
    *,
    budget: float | None = None,
    memory: int | None = None,
    context: int | None = None,
    batch: int = 1,
    choices: Sequence[int] = DEFAULT_CHOICES,
    pairs: Sequence[Pair] | None = None,
    optimal: bool = False,
    base: LayerConfig | None = None,
    revision: str | None = None,
    measure: bool = False,
    text: Path | str | None = None,
    kl: bool = False,
    windows: int = 4,
    window: int = 1024,
    state: Path | None = None,
    device: str = "cpu",
    dtype: str = "fp32",
    device_map: str | None = None,
    report: Path | None = None,
    json: Path | None = None,
    plot: Path | None = None,
    save: Path | None = None,
    progress: Progress | None = None,
) -> Analysis:
    """Analyzes a checkpoint and recommends bits per layer.

    Args:
        checkpoint: A folder with safetensors, a GGUF file or a hub id.
        budget: Effective bits per element; by default what the default pair takes.
        memory: Bytes for the cache of ``batch`` sequences instead.
        context: Tokens at which the cache is counted; the model's longest, 32,768 at most, if not given.
        batch: Sequences.
        choices: Bit widths to choose from.
        pairs: The (key, value) bits that a layer may have; all pairs of ``choices`` if not given.
        optimal: Allocate by the norms with the optimum of the paper's objective instead of its greedy rule.
        base: Granularities, sinks, recent tokens and tiles.
        revision: Of a hub id.
        measure: Also run the model on ``text``.
        text: A file.
        kl: Measure the logits' KL divergence layer by layer instead of estimating it.
        windows: Windows of text.
        window: Tokens in each.
        state: File that makes a measurement resumable.
        device: Where the model runs that is measured: ``cpu``, ``cuda``, ``cuda:1``.
        dtype: Its number format: ``fp32``, ``fp16``, ``bf16``.
        device_map: accelerate's, such as ``auto``, in place of ``device``.
        report: HTML page to write.
        json: JSON file to write.
        plot: PNG file to write.
        save: Recipe to write.
        progress: Called after each step.

    Returns:
        Norms, scores and flags per layer, and the recommendation; ``to_recipe`` makes a recipe of it.

    Raises:
        SkvError: See ``checkpoint.resolve``; a budget outside what the choices allow; measure without a text.
    """
    if measure and text is None:
        raise SkvError(
            "--measure needs a text to run the model on",
            fix="Pass --text FILE, a few thousand words like those to come.",
        )
    for file in (report, json, plot, save, state):
        if file is not None:
            check_file(file)
    if plot is not None:
        require_module("matplotlib", "--plot")
    placement = _placement(device, dtype, device_map) if measure else None
    source = resolve(checkpoint, revision=revision)
    opened = Checkpoint(source)
    reader = AttentionReader(opened)
    cache = CacheBudget.of(
        reader.config, base or LayerConfig(), choices=choices, pairs=pairs, context=context, batch=batch
    ).limited(budget, memory)
    cache.check()
    layers = _read(reader, cache.base, progress)
    measurement = (
        _measure(source, str(text), cache, kl, windows, window, state, progress, placement) if measure else None
    )
    scores = compare(layers, cache, optimal, measurement)
    flags = find_flags(layers, scores)
    analysis = Analysis(
        model=_name(source, opened.config),
        bytes_read=opened.bytes_read,
        tensor_bytes=reader.nbytes(),
        config=reader.config,
        budget=cache,
        layers=layers,
        scores=scores,
        flags=flags,
        recommendation=_recommend(layers, cache, scores, flags, measurement),
        measurement=measurement,
    )
    _write(analysis, report, json, plot, save)
    return analysis


def _name(source: Source, config: Mapping[str, Any]) -> str:
    if source.kind == "hub":
        return str(source.repo_id)
    return source.gguf_file or (source.path.resolve().name if source.path else str(config.get("_name_or_path")))


def _read(reader: AttentionReader, base: LayerConfig, progress: Progress | None) -> tuple[LayerAnalysis, ...]:
    """Reads layer by layer; one layer's projections stand in memory at a time."""
    layers = []
    for index in range(reader.config.num_hidden_layers):
        layers.append(_read_layer(reader, index, base))
        if progress:
            progress("reading layers", index + 1, reader.config.num_hidden_layers)
    return tuple(layers)


def _read_layer(reader: AttentionReader, index: int, base: LayerConfig) -> LayerAnalysis:
    config, raw = reader.config, reader.layer(index)

    def widen(part: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """float32 by blocks of rows, so that the mapped pages of the file never stand in memory all at once."""
        wide = np.empty(part.shape, np.float32)
        for start in range(0, len(part), _BLOCK_ROWS):
            wide[start : start + _BLOCK_ROWS] = part[start : start + _BLOCK_ROWS]
            reader.checkpoint.release(raw.names)
        return wide

    weights = replace(raw, q=widen(raw.q), k=widen(raw.k), v=widen(raw.v))
    q = norms(weights.q, config.num_attention_heads, f"layer {index}: query projection")
    k = norms(weights.k, config.num_key_value_heads, f"layer {index}: key projection")
    v = norms(weights.v, config.num_key_value_heads, f"layer {index}: value projection")
    bias = float(np.linalg.norm(weights.k_bias)) if weights.k_bias is not None else 0.0
    return LayerAnalysis(index, q, k, v, geometry(weights, config, base), bias)


def _measure(
    source: Source,
    text: str,
    cache: CacheBudget,
    kl: bool,
    windows: int,
    window: int,
    state: Path | None,
    progress: Progress | None,
    placement: Placement | None,
) -> Measurement:
    from skv_export.analysis.measurement import measure

    path = Path(text)
    if not path.is_file():
        raise SkvError(f"text {path}: no such file", fix="Pass a plain text file.")
    content = path.read_text(encoding="utf-8", errors="replace")
    widths = sorted({b for pair in cache.pairs for b in pair})
    return measure(
        source,
        content,
        base=cache.base,
        choices=widths,
        windows=windows,
        window=window,
        kl=kl,
        state=state,
        progress=progress,
        placement=placement,
    )


def _placement(device: str, dtype: str, device_map: str | None) -> Placement:
    from skv_export.checkpoints.pretrained import Placement

    return Placement(device, dtype, device_map)


def _recommend(
    layers: Sequence[LayerAnalysis],
    cache: CacheBudget,
    scores: Sequence[Score],
    flags: Sequence[Mapping[str, Any]],
    measurement: Measurement | None,
) -> Recommendation:
    name, table = list(loss_tables(layers, cache, measurement).items())[-1]
    unit = "nats of KL divergence per token" if name == "measure" else "relative squared error of the attention output"
    scale = 1.0 if name == "measure" else 1 / len(layers)

    def plan(label: str, bits: Sequence[Pair]) -> Plan:
        loss = sum(table[i, cache.pairs.index(pair)] for i, pair in enumerate(bits)) * scale
        return Plan(label, tuple(bits), cache.effective_bits(bits), float(loss))

    uniforms = [plan(f"K{k}V{v}", [(k, v)] * len(layers)) for k, v in cache.pairs]
    fitting = [p for p in uniforms if cache.fits(p.bits)]
    best = plan("per layer", cache.best(table))
    # Where no uniform pair fits, the cheapest one stands in, so that the reader sees what it would take.
    uniform = (
        min(fitting, key=lambda p: (p.loss, p.effective_bits))
        if fitting
        else min(uniforms, key=lambda p: p.effective_bits)
    )
    neighbours = []
    for step in (-0.5, -0.25, 0.25, 0.5):
        near = cache.limited(best.effective_bits + step, None)
        if near.feasible:
            neighbours.append(plan(f"per layer, {step:+g} bits", near.best(table)))
    close = sorted(uniforms, key=lambda p: abs(p.effective_bits - best.effective_bits))[:12]
    neighbours += sorted((p for p in close if p.name != uniform.name), key=lambda p: p.loss)[:4]
    reasons = _reasons(cache, name, best, uniform, bool(fitting), flags, measurement)
    return Recommendation(best, uniform, tuple(neighbours), name, unit, reasons)


def _reasons(
    cache: CacheBudget,
    score: str,
    best: Plan,
    uniform: Plan,
    fits: bool,
    flags: Sequence[Mapping[str, Any]],
    measurement: Measurement | None,
) -> tuple[str, ...]:
    k_mean, v_mean = np.mean(best.bits, axis=0)
    reasons = [
        f"{best.effective_bits:.2f} effective bits at {cache.context} tokens, scales and full-precision tokens counted",
        f"keys get {k_mean:.2f} bits, values {v_mean:.2f}, on average",
    ]
    if not fits:
        reasons.append(f"no uniform pair fits; the cheapest, {uniform.name}, takes {uniform.effective_bits:.2f}")
    elif best.loss < uniform.loss:
        reasons.append(
            f"expected loss {best.loss:.3g} against {uniform.loss:.3g} for the best uniform pair, {uniform.name}"
        )
    if measurement is not None:
        how = "measured layer by layer" if measurement.direct else "measured"
        reasons.append(f"{how} on {measurement.tokens} tokens of text")
    else:
        reasons.append(f"{score}: {WEAK_CORRELATION}")
    for flag in flags:
        if flag["layer"] is None:
            reasons.append(flag["text"])
        elif flag["flag"] == "k_bias":
            k, v = best.bits[flag["layer"]]
            reasons.append(f"{flag['text']}: {k} bits for its keys, {v} for its values")
    disagree = [str(f["layer"]) for f in flags if f["flag"] == "scores_disagree"]
    if disagree:
        reasons.append(f"the paper's norms ask for something else by more than a bit in layers {', '.join(disagree)}")
    return tuple(reasons)


def _write(analysis: Analysis, report: Path | None, json: Path | None, plot: Path | None, save: Path | None) -> None:
    if json is not None:
        write_text(json, json_module.dumps(analysis.to_json(), indent=1) + "\n")
    if save is not None:
        write_text(save, analysis.to_recipe().to_toml())
    if report is not None or plot is not None:
        from skv_export.analysis import html_report as pages

        if report is not None:
            write_text(report, pages.html(analysis))
        if plot is not None:
            with output_file(plot) as scratch:
                pages.png(analysis, scratch)
