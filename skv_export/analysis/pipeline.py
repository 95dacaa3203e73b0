"""`analyze`: from a checkpoint to scores side by side, and a recommendation. It writes nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from skv_export.analysis.allocation import DEFAULT_CHOICES, allocate_bits, allocate_bits_optimal
from skv_export.analysis.budget import (
    MAX_BATCH,
    MAX_CONTEXT,
    CacheBudget,
    Pair,
    check_choices,
    check_count,
    check_positive,
)
from skv_export.analysis.card import room_for_cache
from skv_export.analysis.confirmation import HeldOutText
from skv_export.analysis.geometry import geometry
from skv_export.analysis.norms import frobenius_norm, norms
from skv_export.analysis.recommend import (
    DEFAULTS,
    ESTIMATE_MARGIN,
    MEASURE,
    SCORES,
    confirmed,
    divergence_of,
    recommend,
    within_held_out,
    within_loss,
)
from skv_export.analysis.result import Allocation, Analysis, Recommendation
from skv_export.analysis.scores import LayerAnalysis, compare, find_flags
from skv_export.arguments import check_fields, checked
from skv_export.calibration.file import Calibration
from skv_export.checkpoints.attention_weights import AttentionConfig, AttentionReader, AttentionWeights
from skv_export.checkpoints.checkpoint import Checkpoint, Source
from skv_export.checkpoints.purpose import check_purpose
from skv_export.errors import SkvError
from skv_export.evaluation.text import CALIBRATION_TEXT, read_text
from skv_export.spec.key_basis import KeyBasis, can_be_calibrated
from skv_export.spec.layout import CacheLayout
from skv_export.spec.recipe import LayerConfig

if TYPE_CHECKING:
    from skv_export.analysis.measurement import Measurement
    from skv_export.checkpoints.pretrained import Placement

__all__ = [
    "Allocation",
    "Analysis",
    "MeasureOptions",
    "Recommendation",
    "Target",
    "allocate_bits",
    "allocate_bits_optimal",
    "analyze",
]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Target:
    """How large the cache may be, or how much it may lose: one of budget, memory and max_loss, or what K4V2 takes.

    Attributes:
        budget: Effective bits per element.
        memory: Bytes for the caches of the whole batch; with ``weights``, of the card that holds weights too.
        weights: Number format of the weights on that card.
        max_loss: Largest rise of perplexity, as a share: 0.005 is half a percent.
        context: Tokens at which the cache is counted; the model's longest, 32,768 at most, if not given.
        batch: Sequences.
        choices: Bit widths to choose from.
        pairs: The (key, value) bits that a layer may have; all pairs of ``choices`` if not given.

    Raises:
        SkvError: A value is out of range, or several say how large the cache may be.
    """

    budget: float | None = None
    memory: int | None = None
    weights: str | None = None
    max_loss: float | None = None
    context: int | None = None
    batch: int = 1
    choices: Sequence[int] = DEFAULT_CHOICES
    pairs: Sequence[Pair] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        limits = ("budget", "memory", "max_loss")
        for name in limits:
            check_positive(name, getattr(self, name))
        given = ["--" + name.replace("_", "-") for name in limits if getattr(self, name) is not None]
        if len(given) > 1:
            raise SkvError(" and ".join(given), got="both", expected="one of them")
        if self.weights is not None and self.memory is None:
            raise SkvError("--weights without --memory or --gpu", fix="Say how much memory holds weights and cache.")
        if self.context is not None:
            check_count("context", self.context, MAX_CONTEXT)
        check_count("batch", self.batch, MAX_BATCH)
        check_choices(self.choices, self.pairs)


@dataclass(frozen=True)
class MeasureOptions:
    """How to run the model.

    Attributes:
        text: Plain text to calibrate on; None = the shipped one.
        windows: Windows of it.
        window: Tokens in each; the model's context where that is shorter.
        kl: Measure the logits' KL divergence layer by layer instead of estimating it.
        state: File that makes the measurement resumable.
        ray: Address of a Ray cluster that measures windows side by side; not with ``kl``.
        confirm_windows: Windows of held-out text on which the allocation must beat the uniform pairs; 0 = none.
        device: Where the model runs: ``cpu``, ``cuda``, ``cuda:1``.
        dtype: Its number format: ``fp32``, ``fp16``, ``bf16``.
        device_map: accelerate's, such as ``auto``, in place of ``device``.

    Raises:
        SkvError: A count is out of range, or there is no such text.
    """

    text: Path | str | None = None
    windows: int = 2
    window: int = 1024
    kl: bool = False
    state: Path | None = None
    ray: str | None = None
    confirm_windows: int = 2
    device: str = "cpu"
    dtype: str = "fp32"
    device_map: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_count("windows", self.windows, MAX_CONTEXT)
        check_count("window", self.window, MAX_CONTEXT, 64)
        check_count("confirm_windows", self.confirm_windows, MAX_CONTEXT, 0)
        if self.kl and self.ray:
            raise SkvError("--kl and --ray", got="both", expected="one of them: --kl runs on this machine")
        read_text(self.text, CALIBRATION_TEXT)

    def placement(self) -> Placement:
        """Returns device and number format, checked."""
        from skv_export.checkpoints.pretrained import Placement

        return Placement(self.device, self.dtype, self.device_map)


@checked
def analyze(
    checkpoint: str | Path | Source,
    *,
    target: Target | None = None,
    base: LayerConfig | None = None,
    score: str | None = None,
    optimal: bool = False,
    measure: MeasureOptions | None = None,
    calibration: Calibration | str | Path | None = None,
    revision: str | None = None,
    as_causal_lm: bool = False,
    progress: Progress | None = None,
) -> Analysis:
    """Analyzes a checkpoint and recommends bits per layer.

    Args:
        checkpoint: A folder with safetensors, a GGUF file or a hub id.
        target: How large the cache may be; by default what the default pair takes.
        base: Granularities, sinks, recent tokens and tiles.
        score: What decides, one of ``recommend.SCORES``; by default the measurement, without one the measured defaults.
        optimal: Allocate by the norms with the optimum of the paper's objective instead of its greedy rule.
        measure: Run the model; None = weights only.
        calibration: Of keys, which the export will have: what ``skv-export calibrate`` wrote for this checkpoint.
        revision: Of a hub id.
        as_causal_lm: Take a classifier, reward or embedding model for the language model that it was made from.
        progress: Called after each step.

    Returns:
        Norms, scores and flags per layer, and the recommendation; ``to_recipe`` makes a recipe of it.

    Raises:
        SkvError: See ``checkpoint.resolve``; a target outside what the choices allow; a text that is missing or short.
    """
    target, decides = target or Target(), score or (MEASURE if measure else DEFAULTS)
    if decides not in SCORES or (decides == MEASURE and measure is None):
        usable = [name for name in SCORES if name != MEASURE or measure is not None]
        raise SkvError(f"--score {decides}", expected=" or ".join(usable), fix="Measure, or take another score.")
    opened = Checkpoint.open(checkpoint, revision=revision)
    if not as_causal_lm:
        check_purpose(opened.config.get("model_type"), opened.config.get("architectures"))
    reader = AttentionReader(opened)
    cache = CacheBudget.of(
        reader.config,
        base or LayerConfig(),
        choices=target.choices,
        pairs=target.pairs,
        context=target.context,
        batch=target.batch,
        bases=_bases(calibration, opened.source, base or LayerConfig()),
    )
    cache = _limited(cache, target, opened)
    layers = _read(reader, cache.base, progress)
    if measure is not None:
        from skv_export.checkpoints.model_config import context_length, load_config  # which loads transformers

        measure = replace(measure, window=min(measure.window, context_length(load_config(opened.source))))
    measurement = _measure(opened.source, cache, measure, progress) if measure else None

    def recommended(limited: CacheBudget) -> Recommendation:
        scores = compare(layers, limited, optimal, measurement)
        return recommend(decides, layers, limited, scores, find_flags(layers, scores), measurement)

    def within(loss: float) -> tuple[CacheBudget, Recommendation]:
        limited = replace(cache, limit=within_loss(cache, layers, loss, measurement))
        return limited, recommended(limited)

    if measure and decides == MEASURE and measure.confirm_windows:
        held_out = HeldOutText(opened.source, cache, measure, progress)
        if target.max_loss is not None:
            cache, found = within_held_out(target.max_loss, within, held_out.judge)
        else:
            found = recommended(cache)
            found = confirmed(found, held_out.judge(cache, found))
    elif target.max_loss is not None:
        cache, found = within(divergence_of(target.max_loss) / (ESTIMATE_MARGIN if measurement else 1.0))
    else:
        found = recommended(cache)
    scores = compare(layers, cache, optimal, measurement)
    return Analysis(
        source=opened.source,
        model=_name(opened),
        bytes_read=opened.bytes_read,
        tensor_bytes=reader.nbytes(),
        config=reader.config,
        budget=cache,
        layers=layers,
        scores=scores,
        flags=find_flags(layers, scores),
        recommendation=found,
        measurement=measurement,
    )


def _bases(
    calibration: Calibration | str | Path | None, source: Source, base: LayerConfig
) -> Mapping[int, KeyBasis] | None:
    if calibration is None:
        return None
    found = calibration if isinstance(calibration, Calibration) else Calibration.load(calibration)
    if not can_be_calibrated(CacheLayout.pair(replace(base, k_bits=4), 64)[0]):
        form = f"granularity {base.k_granularity}, rotation {base.k_rotation}"
        raise SkvError("calibrated keys", got=form, expected="granularity channel, rotation none")
    from skv_export.checkpoints.pretrained import download

    found.check(download(source))
    return found.bases


def _limited(cache: CacheBudget, target: Target, opened: Checkpoint) -> CacheBudget:
    memory = target.memory
    if target.weights is not None and memory is not None:
        memory = room_for_cache(memory, opened, target.weights, target.batch)
    limited = cache.limited(target.budget, memory)
    if target.max_loss is None:
        limited.check()
    else:
        divergence_of(target.max_loss)  # a share that is none is found out before anything runs
    return limited


def _name(opened: Checkpoint) -> str:
    source = opened.source
    if source.kind == "hub":
        return str(source.repo_id)
    return source.gguf_file or (source.path.resolve().name if source.path else str(opened.config.get("_name_or_path")))


def _read(reader: AttentionReader, base: LayerConfig, progress: Progress | None) -> tuple[LayerAnalysis, ...]:
    """Reads layer by layer, the next one while one is computed; no others stand in memory."""
    layers, count = [], reader.config.num_hidden_layers
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(reader.layer, 0)
        for index in range(count):
            weights = _widened(coming.result())
            if index + 1 < count:
                coming = ahead.submit(reader.layer, index + 1)
            layers.append(_analyze_layer(weights, reader.config, base))
            if progress:
                progress("reading layers", index + 1, count)
    return tuple(layers)


def _widened(raw: AttentionWeights) -> AttentionWeights:
    q, k, v = (np.asarray(part, np.float32) for part in (raw.q, raw.k, raw.v))
    return replace(raw, q=q, k=k, v=v)


def _analyze_layer(weights: AttentionWeights, config: AttentionConfig, base: LayerConfig) -> LayerAnalysis:
    index = weights.index
    q = frobenius_norm(weights.q, f"layer {index}: query projection")
    k = norms(weights.k, config.num_key_value_heads, f"layer {index}: key projection")
    v = norms(weights.v, config.num_key_value_heads, f"layer {index}: value projection")
    bias = float(np.linalg.norm(weights.k_bias)) if weights.k_bias is not None else 0.0
    return LayerAnalysis(index, q, k, v, geometry(weights, config, base), bias)


def _measure(source: Source, cache: CacheBudget, options: MeasureOptions, progress: Progress | None) -> Measurement:
    from skv_export.analysis.measurement import measure, ray_workers

    placement = options.placement()
    with contextlib.ExitStack() as running:
        workers = running.enter_context(ray_workers(options.ray, source, placement)) if options.ray else None
        return measure(
            source,
            read_text(options.text, CALIBRATION_TEXT),
            base=cache.base,
            choices=cache.choices,
            bases=cache.bases,
            windows=options.windows,
            window=options.window,
            kl=options.kl,
            state=options.state,
            progress=progress,
            placement=placement,
            workers=workers,
        )
