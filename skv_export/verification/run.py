"""`verify`: checks on four levels that an exported folder computes what PyTorch computes, and reports.

``op``: the library against the reference, case by case (``op_level.py``). ``text``: texts of the untouched model in
transformers and of the export (``text_level.py``). ``graph``: the exported graph against PyTorch with the same cache
(``graph_level.py``). ``quality``: against the unquantized model (``quality_level.py``). torch waits until needed.
A rewritten folder is held against its source graph instead (``source_graph.py``).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from skv_export.arguments import checked
from skv_export.checkpoints.checkpoint import Source, resolve
from skv_export.checkpoints.demo_model import demo_checkpoint
from skv_export.errors import SkvError
from skv_export.evaluation.text import cut_windows, read_text
from skv_export.model_folder.skv_config import ModelConfig, describe
from skv_export.paths import to_path
from skv_export.provenance import versions
from skv_export.runtime.prompts import load_tokenizer
from skv_export.spec.recipe import WEIGHT_BITS
from skv_export.verification.op_level import OpResult, check_op

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from skv_export.checkpoints.pretrained import Placement
    from skv_export.verification.graph_level import GraphResult, Tolerance
    from skv_export.verification.quality_level import QualityResult, Thresholds
    from skv_export.verification.text_level import TextResult

LEVELS = ("op", "text", "graph", "quality")
STEPPED_TOKENS = 2048
"""Tokens of the quality level, at most, where a graph returns the last position's logits alone: a call for each."""
WINDOWS, WINDOW_TOKENS = 8, 1024
"""Default size of the quality level: about a minute for a model of 135 million parameters on two cores."""

# The report.


@dataclass(frozen=True)
class Report:
    """What verify found; a level that was not asked for is None.

    Attributes:
        folder: What was verified.
        checkpoint: Against what; empty where no level needed it.
        op: The op level.
        graph: The graph level.
        quality: The quality level.
        text: The text level.
        skipped: Levels that were asked for but can't be run on this folder, with the reason.
        thresholds: Of the quality level, and the tolerance of the graph level, by name.
    """

    folder: Path
    checkpoint: str = ""
    op: OpResult | None = None
    graph: GraphResult | None = None
    quality: QualityResult | None = None
    text: TextResult | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)
    thresholds: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def failures(self) -> tuple[str, ...]:
        """What failed in any level, a sentence each."""
        return tuple(
            f for level in (self.op, self.text, self.graph, self.quality) if level is not None for f in level.failures
        )

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """The report's figures; None where a level was not run."""
        graph, quality = self.graph and self.graph.figures, self.quality
        return {
            "passed": self.passed,
            "verdict": self.verdict,
            "failures": list(self.failures),
            "model": describe(self.folder),
            "checkpoint": self.checkpoint,
            "versions": versions(),
            "thresholds": dict(self.thresholds),
            "op": self.op and not self.op.failures,
            "text": self.text and not self.text.failures,
            "graph": {
                "max_abs_logit_diff": graph and graph.max_abs,
                "steps": graph and graph.steps,
                "argmax_agreement": graph and graph.argmax_agreement,
            },
            "quality": {
                name: quality and getattr(quality, name)
                for name in ("ppl_reference", "ppl_exported", "kld_mean", "kld_p99", "top1_agreement", "effective_bits")
            },
        }

    def to_json(self) -> str:
        """``to_dict`` as JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @property
    def _levels(self) -> list[tuple[str, Any]]:
        return [(name, getattr(self, name)) for name in LEVELS]

    @property
    def verdict(self) -> str:
        """PASS or FAIL, and what that means, in a sentence."""
        run = [name for name, level in self._levels if level is not None]
        failed = [name for name, level in self._levels if level is not None and level.failures]
        against = f" what {self.checkpoint} computes" if self.checkpoint else " what the specification says"
        levels = f"level{'s' if len(run) > 1 else ''} {', '.join(run)}"
        if not failed:
            return f"PASS: {self.folder} computes{against}, within the tolerances ({levels})."
        where = f"level{'s' if len(failed) > 1 else ''} {', '.join(failed)}"
        if failed == ["quality"]:
            return f"FAIL: {self.folder} computes what it should, but its cache costs more quality than allowed."
        return f"FAIL: {self.folder} does not compute{against} ({where}; what failed is listed below)."

    def table(self) -> str:
        """The report as text: the verdict, a line or two per level, then what failed."""
        lines = [self.verdict]
        for name, level in self._levels:
            if name in self.skipped:
                lines.append(f"skip  {name:7}  {self.skipped[name]}")
            if level is None:
                continue
            mark = "FAIL" if level.failures else "ok"
            first, *rest = level.rows()
            lines += [f"{mark:4}  {name:7}  {first}", *(f"{'':15}{row}" for row in rest)]
        return "\n".join([*lines, *(f"  {failure}" for failure in self.failures)])


# The run.


@checked
def verify(
    folder: Path | str,
    *,
    checkpoint: str | Path | None = None,
    adapter: str | Path | None = None,
    levels: Sequence[str] = LEVELS,
    text: Path | str | None = None,
    execution_provider: str = "cpu",
    device: str = "cpu",
    dtype: str = "fp32",
    device_map: str | None = None,
    windows: int = WINDOWS,
    window_tokens: int = WINDOW_TOKENS,
    tolerance: Tolerance | None = None,
    thresholds: Thresholds | None = None,
) -> Report:
    """Verifies an exported folder.

    Args:
        folder: What ``skv-export model`` wrote.
        checkpoint: What it was exported from; as recorded in the folder if not given. A folder that was rewritten from
            an ONNX graph is held against that graph, in ONNX Runtime, without PyTorch's model; the level ``text`` is
            skipped then.
        adapter: The LoRA adapter that was merged into the checkpoint's weights, if one was.
        levels: Of ``op``, ``text``, ``graph``, ``quality``.
        text: File to take tokens from; the shipped prose if not given.
        execution_provider: ``cpu`` or ``cuda``, of the op and of the exported graph.
        device: Where PyTorch runs the original: ``cpu``, ``cuda``, ``cuda:1``.
        dtype: What PyTorch computes in: ``fp32``, ``fp16``, ``bf16``.
        device_map: accelerate's, such as ``auto``, in place of ``device``.
        windows: Windows of text in the quality level.
        window_tokens: Tokens of each.
        tolerance: Of the graph level.
        thresholds: Of the quality level.

    Returns:
        The results of the levels; ``passed`` and ``failures`` sum them up.

    Raises:
        SkvError: The folder, checkpoint or text can't be used. A level that fails is in the report instead.
    """
    unknown = sorted(set(levels) - set(LEVELS))
    if unknown or not levels:
        raise SkvError("verify: level", got=", ".join(unknown) or "none", expected=", ".join(LEVELS))
    prose, folder = read_text(text), to_path(folder, "exported folder")
    config = ModelConfig.load(folder)
    report = Report(folder, thresholds=_thresholds(thresholds, tolerance or config.dtype, levels))
    op_only = set(levels) == {"op"}
    graph = None if op_only else _source_graph(config, checkpoint)
    placement = None if op_only or graph is not None else _placement(device, dtype, device_map)
    if "op" in levels:
        report = dataclasses.replace(report, op=check_op(execution_provider=execution_provider))
    if op_only:
        return report
    work = _Levels(report, config, levels, prose, execution_provider, windows, window_tokens, tolerance, thresholds)
    if placement is None:
        assert graph is not None
        return work.against_graph(graph)
    return work.against_torch(_source(config, checkpoint, adapter), placement)


def _thresholds(
    thresholds: Thresholds | None, tolerance: Tolerance | str, levels: Sequence[str]
) -> dict[str, float | None]:
    """The limits that the levels will be held to; a tolerance may be that of a number format."""
    found: dict[str, float | None] = {}
    if "graph" in levels:
        from skv_export.verification.graph_level import Tolerance

        held_to = Tolerance.of(tolerance) if isinstance(tolerance, str) else tolerance
        found |= {f"graph_{name}": value for name, value in dataclasses.asdict(held_to).items()}
    if "quality" in levels:
        from skv_export.verification.quality_level import Thresholds

        found |= dataclasses.asdict(thresholds or Thresholds())
    return found


@dataclass(frozen=True)
class _Levels:
    """The levels beyond ``op``, as ``verify`` was asked for them."""

    report: Report
    config: ModelConfig
    levels: Sequence[str]
    prose: str
    execution_provider: str
    windows: int
    window_tokens: int
    tolerance: Tolerance | None
    thresholds: Thresholds | None

    def against_torch(self, source: Source, placement: Placement) -> Report:
        """Holds the folder against a checkpoint in PyTorch."""
        from skv_export.export import weight_quantization
        from skv_export.verification import graph_level, graph_variants, quality_level

        folder, config, provider = self.report.folder, self.config, self.execution_provider
        load_tokenizer(folder)  # a folder without one is refused before a model is loaded
        report = dataclasses.replace(self.report, checkpoint=str(source))
        if "text" in self.levels:
            found = _text_level(folder, config, source, self.prose, placement, provider)
            report = dataclasses.replace(report, text=found)
        if not set(self.levels) & {"graph", "quality"}:
            return report
        model = load_original(source, config, placement)
        if "graph" in self.levels:
            tokens = self._graph_tokens()
            with weight_quantization.rounded(model, graph_variants.quantized_weights(folder), config):
                graph = graph_level.check(model, folder, tokens, execution_provider=provider, tolerance=self.tolerance)
            report = dataclasses.replace(report, graph=graph)
        if "quality" in self.levels:
            session = graph_variants.all_logits(folder, execution_provider=provider)
            reference = quality_level.TorchReference(model)
            quality = quality_level.measure(reference, session, self._quality_windows(), thresholds=self.thresholds)
            report = dataclasses.replace(report, quality=quality)
        return report

    def against_graph(self, path: Path) -> Report:
        """Holds a rewritten folder against the graph that it was made from."""
        from skv_export.verification import graph_level, graph_variants, quality_level
        from skv_export.verification.source_graph import SourceGraph

        folder, provider = self.report.folder, self.execution_provider
        report = dataclasses.replace(self.report, checkpoint=str(path))
        if "text" in self.levels:
            reason = "needs the model in PyTorch; this folder is held against its source graph"
            if not set(self.levels) & {"graph", "quality"}:
                raise SkvError(f"verify: level text {reason}", fix="Pass the levels graph and quality.")
            report = dataclasses.replace(report, skipped={"text": reason})
        if "graph" in self.levels:
            source, tokens = SourceGraph(path, exact_products=True), self._graph_tokens()
            graph = graph_level.check_source(
                source, folder, tokens, execution_provider=provider, tolerance=self.tolerance
            )
            report = dataclasses.replace(report, graph=graph)
        if "quality" in self.levels:
            session = graph_variants.plain(folder, execution_provider=provider)
            windows = self._quality_windows(None if self.config.all_logits else STEPPED_TOKENS)
            quality = quality_level.measure(SourceGraph(path), session, windows, thresholds=self.thresholds)
            report = dataclasses.replace(report, quality=quality)
        return report

    def _graph_tokens(self) -> list[int]:
        from skv_export.verification import graph_level

        count = sum(graph_level.step_counts(self.config))
        (tokens,) = cut_windows(load_tokenizer(self.report.folder), self.prose, 1, count).tolist()
        return tokens

    def _quality_windows(self, most: int | None = None) -> NDArray[np.int64]:
        """Windows of text, ``[windows, length]``, of at most so many tokens together."""
        length, count = min(self.window_tokens, self.config.context_length), self.windows
        if most is not None:
            length = min(length, most)
            count = min(count, most // length)
        return cut_windows(load_tokenizer(self.report.folder), self.prose, count, length)


def _source_graph(config: ModelConfig, checkpoint: str | Path | None) -> Path | None:
    """The graph that a rewritten folder is held against; None for all others."""
    if config.source.get("kind") != "onnx":
        return None
    from skv_export.verification.source_graph import find_source

    return find_source(config, checkpoint)


def _source(config: ModelConfig, checkpoint: str | Path | None, adapter: str | Path | None) -> Source:
    """The given checkpoint, or the one recorded in the folder: a hub id, or the demo's file; with its adapter."""
    kind, name = (str(config.source.get(key)) for key in ("kind", "name"))
    if checkpoint is not None:
        source = resolve(checkpoint, adapter=adapter)
    elif kind == "hub":
        source = resolve(name, revision=config.source.get("revision"), adapter=adapter)
    elif kind == "gguf" and (demo := demo_checkpoint()).name == name:
        source = resolve(demo, adapter=adapter)
    else:
        raise SkvError(
            "verify: checkpoint",
            got=f"none; the folder was made from {name}, on some disk",
            fix="Pass its path: --checkpoint.",
        )
    merged = config.source.get("adapter")
    if bool(merged) != (source.adapter is not None):
        raise SkvError(
            "verify: adapter",
            got=str(source.adapter) if source.adapter else "none",
            expected=f"{merged}, which was merged into the weights" if merged else "none: the export has none",
            fix="Pass its folder: --adapter." if merged else "Leave it out.",
        )
    return source


def _text_level(
    folder: Path, config: ModelConfig, source: Source, prose: str, placement: Placement, execution_provider: str
) -> TextResult:
    """Runs the text level; the untouched model's weights are rounded as the export's were, and nothing else is done."""
    from skv_export.checkpoints import pretrained
    from skv_export.export import weight_quantization
    from skv_export.verification import graph_variants, text_level

    _check_same_model(source, config)
    tokenizer, model = pretrained.load_tokenizer(source), pretrained.load_untouched(source, placement)
    if _stored(config, placement) != placement.dtype and placement.device_map is None:
        model.to(pretrained.DTYPES[config.dtype]).to(placement.torch_dtype)  # type: ignore[arg-type]
    with weight_quantization.rounded(model, graph_variants.quantized_weights(folder), config):
        return text_level.check(model, tokenizer, folder, prose, execution_provider=execution_provider)


def _placement(device: str, dtype: str, device_map: str | None) -> Placement:
    from skv_export.checkpoints.pretrained import Placement

    return Placement(device, dtype, device_map)


def load_original(source: Source, config: ModelConfig, placement: Placement) -> PreTrainedModel:
    """Loads the original into PyTorch: the weights as they were exported, the arithmetic as ``placement`` says.

    Raises:
        SkvError: It is another model than the folder's, or can't be loaded whole.
    """
    from skv_export.checkpoints import pretrained
    from skv_export.export.supported import prepare_model

    given = _check_same_model(source, config)
    if placement.device_map is not None and placement.dtype != config.dtype:
        raise SkvError(
            f"verify: device_map={placement.device_map} with dtype={placement.dtype}",
            expected=f"the export's dtype, {config.dtype}: a model that is spread out can't be converted",
            fix=f"Pass --dtype {config.dtype}, or --device instead of --device-map.",
        )
    model = pretrained.load_model(source, given, dataclasses.replace(placement, dtype=_stored(config, placement)))
    prepare_model(model)
    return model if model.dtype == placement.torch_dtype else model.to(placement.torch_dtype)  # type: ignore[arg-type]


def _stored(config: ModelConfig, placement: Placement) -> str:
    """The number format to load a checkpoint's weights in: exact ones where ``rounded`` is to round them."""
    return placement.dtype if config.weights in WEIGHT_BITS and placement.dtype == "fp32" else config.dtype


def _check_same_model(source: Source, config: ModelConfig) -> PreTrainedConfig:
    """Returns a checkpoint's configuration; refuses another model than the folder's."""
    from skv_export.checkpoints.model_config import load_config
    from skv_export.checkpoints.shared_caches import count_caches

    given = load_config(source)
    text = given.get_text_config()
    found = {"model_type": given.model_type, "vocab_size": text.vocab_size, "layers": count_caches(text)}
    layers = config.num_hidden_layers or len(config.layers)
    expected = {"model_type": config.model_type, "vocab_size": config.vocab_size, "layers": layers}
    if found != expected:
        raise SkvError(f"{source}: not what the folder was exported from", got=found, expected=expected)
    return given
