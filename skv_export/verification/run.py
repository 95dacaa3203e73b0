"""`verify`: checks on three levels that an exported folder computes what PyTorch computes, and reports.

``op``: the library against the reference, case by case. ``graph``: the exported graph against PyTorch with the same
quantized cache and weights (``graph_level.py``). ``quality``: against the unquantized model (``quality_level.py``).
torch is imported only for the last two.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from skv_export.checkpoints.checkpoint import Source, demo_checkpoint, resolve
from skv_export.errors import SkvError
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.native.library import Library, load_library
from skv_export.progress import track
from skv_export.runtime.prompts import load_tokenizer
from skv_export.runtime.providers import open_session
from skv_export.spec.conformance import Case, Inputs, Outcome, expected_of, make_inputs, op_cases
from skv_export.spec.op import OP_NAME, LayerAttention, attention_node, one_node_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from skv_export.checkpoints.pretrained import Placement
    from skv_export.verification.graph_level import GraphResult, Tolerance
    from skv_export.verification.quality_level import QualityResult, Thresholds

LEVELS = ("op", "graph", "quality")
WINDOWS, WINDOW_TOKENS = 8, 1024
"""Default size of the quality level: about a minute for a model of 135 million parameters on two cores."""

# The op level.


@dataclass(frozen=True)
class OpResult:
    """What the op level found.

    Attributes:
        cases: Cases that were run.
        worst: Largest difference of an attention output, relative to its case's tolerance.
        worst_case: Where that was.
        failures: Cases whose bytes differ or whose attention is beyond the tolerance, a sentence each.
        runners: What each case went through.
    """

    cases: int
    worst: float
    worst_case: str
    failures: tuple[str, ...]
    runners: str = "the kernels and by ONNX Runtime"

    def rows(self) -> list[str]:
        """The report's lines."""
        found = "bytes equal" if not self.failures else f"{len(self.failures)} failures"
        return [
            f"{self.cases} cases, by {self.runners}: {found}",
            f"attention: at most {self.worst:.0%} of the tolerance ({self.worst_case})",
        ]


def check_op(
    cases: Sequence[Case] | None = None, library: Library | None = None, execution_provider: str = "cpu"
) -> OpResult:
    """Runs every case through the library, directly and as ONNX Runtime's op, and compares with the reference.

    Args:
        cases: ``op_cases()`` if not given.
        library: The native library.
        execution_provider: ``cpu`` or ``cuda``; on a GPU the cases run in ONNX Runtime alone, and in float16 too, which
            takes other kernels than float32.
    """
    library = library or load_library()
    worst, worst_case, failures = 0.0, "", []
    cases = list(op_cases() if cases is None else cases)
    runners: dict[str, Callable[[Case, Inputs], Outcome]] = {
        "kernels": functools.partial(_kernels, library),
        "ONNX Runtime": functools.partial(_op, library, execution_provider),
    }
    if execution_provider != "cpu":
        del runners["kernels"]
        cases += [dataclasses.replace(case, dtype="float16") for case in cases if case.dtype == "float32"]
    for case in track(cases, "op"):
        inputs = make_inputs(case)
        expected = expected_of(case, inputs)
        for runner, run_case in runners.items():
            error, problems = _compare(case, expected, run_case(case, inputs))
            failures += [f"op, {runner}, {case.name}: {problem}" for problem in problems]
            if not error <= worst:
                worst, worst_case = error, f"{case.name}, {runner}"
    by = " and by ".join(f"the {name}" if name == "kernels" else name for name in runners)
    where = "" if execution_provider == "cpu" else f" on {execution_provider}"
    return OpResult(len(cases), worst, worst_case, tuple(failures), by + where)


def _compare(case: Case, expected: Outcome, outcome: Outcome) -> tuple[float, list[str]]:
    """The attention's difference relative to the tolerance, and what is wrong."""
    problems = []
    for name, want, got in zip(("key", "value"), expected[1:], outcome[1:], strict=True):
        wrong = np.argwhere(want != got)
        if len(wrong):
            b, head, row, column = wrong[0]
            at = f"sequence {b}, head {head}, byte {row * want.shape[3] + column} of {want[0, 0].size}"
            problems.append(f"{len(wrong)} bytes of the {name} cache differ, the first in {at}")
    largest = float(np.abs(expected[0]).max()) or 1.0
    error = float(np.abs(outcome[0].astype(np.float32) - expected[0]).max()) / largest / case.tolerance
    if not error <= 1:
        problems.append(
            f"attention is off by {error * case.tolerance:.1e} of the largest output, expected {case.tolerance:.0e}"
        )
    return (error if np.isfinite(error) else np.inf), problems


def _kernels(library: Library, case: Case, i: Inputs) -> Outcome:
    return library.attention(
        case.params, case.layouts, i.query.astype(case.dtype), i.key, i.value, i.past_key, i.past_value, i.seqlens_k,
        head_sink=i.head_sink, query_seqlens=i.query_seqlens,
    )  # fmt: skip


def _op(library: Library, execution_provider: str, case: Case, i: Inputs) -> Outcome:
    """The same through a one-node model."""
    import onnxruntime as ort

    floats = {name: getattr(i, name).astype(case.dtype) for name in ("query", "key", "value")}
    feeds = floats | {"past_key": i.past_key, "past_value": i.past_value, "seqlens_k": i.seqlens_k}
    feeds["total_sequence_length"] = np.array(i.seqlens_k.max() + 1, np.int32)
    if i.head_sink is not None:
        feeds["head_sink"] = i.head_sink.astype(case.dtype)
    if i.query_seqlens is not None:
        feeds["query_seqlens"] = i.query_seqlens
    options = ort.SessionOptions()
    node = attention_node(list(feeds), LayerAttention(case.params, case.layouts).attributes())
    model = one_node_model(node, {name: (x.dtype, x.shape) for name, x in feeds.items()})
    session = open_session(model, options, execution_provider, library, op_type=OP_NAME)
    output, present_key, present_value = session.run(None, feeds)
    return output, present_key, present_value


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
    """

    folder: Path
    checkpoint: str = ""
    op: OpResult | None = None
    graph: GraphResult | None = None
    quality: QualityResult | None = None

    @property
    def failures(self) -> tuple[str, ...]:
        """What failed in any level, a sentence each."""
        return tuple(f for level in (self.op, self.graph, self.quality) if level is not None for f in level.failures)

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """The report's figures; None where a level was not run."""
        graph, quality = self.graph and self.graph.quantized, self.quality
        return {
            "passed": self.passed,
            "op": self.op and not self.op.failures,
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

    def table(self) -> str:
        """The report as text: a line or two per level, then what failed."""
        lines = [f"{self.folder}" + (f" against {self.checkpoint}" if self.checkpoint else "")]
        for name, level in (("op", self.op), ("graph", self.graph), ("quality", self.quality)):
            if level is None:
                continue
            mark = "FAIL" if level.failures else "ok"
            first, *rest = level.rows()
            lines += [f"{mark:4}  {name:7}  {first}", *(f"{'':15}{row}" for row in rest)]
        return "\n".join([*lines, *(f"  {failure}" for failure in self.failures)])


# The run.


def verify(
    folder: Path | str,
    *,
    checkpoint: str | Path | None = None,
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
        checkpoint: What it was exported from; as recorded in the folder if not given.
        levels: Of ``op``, ``graph``, ``quality``.
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
    folder = Path(folder)
    config = ModelConfig.load(folder)
    report = Report(folder)
    placement = _placement(device, dtype, device_map) if set(levels) & {"graph", "quality"} else None
    if "op" in levels:
        report = dataclasses.replace(report, op=check_op(execution_provider=execution_provider))
    if placement is None:
        return report
    from skv_export.export import weight_quantization
    from skv_export.verification import graph_level, graph_variants, quality_level

    source = _source(config, checkpoint)
    model = load_original(source, config, placement)
    prose, tokenizer = quality_level.read_text(text), load_tokenizer(folder)
    report = dataclasses.replace(report, checkpoint=str(source))
    if "graph" in levels:
        count = sum(graph_level.step_counts(config.layers[0].key))
        (tokens,) = quality_level.text_windows(tokenizer, prose, 1, count).tolist()
        with weight_quantization.rounded(model, graph_variants.quantized_weights(folder), config):
            graph = graph_level.check(model, folder, tokens, execution_provider=execution_provider, tolerance=tolerance)
        report = dataclasses.replace(report, graph=graph)
    if "quality" in levels:
        length = min(window_tokens, config.context_length)
        cut = quality_level.text_windows(tokenizer, prose, windows, length)
        session = graph_variants.all_logits(folder, execution_provider=execution_provider)
        report = dataclasses.replace(report, quality=quality_level.measure(model, session, cut, thresholds=thresholds))
    return report


def _source(config: ModelConfig, checkpoint: str | Path | None) -> Source:
    """The given checkpoint, or the one recorded in the folder: a hub id, or the demo's file."""
    if checkpoint is not None:
        return resolve(checkpoint)
    kind, name = (str(config.source.get(key)) for key in ("kind", "name"))
    if kind == "hub":
        return resolve(name, revision=config.source.get("revision"))
    if kind == "gguf" and (demo := demo_checkpoint()).name == name:
        return resolve(demo)
    raise SkvError(
        "verify: checkpoint",
        got=f"none; the folder was made from {name}, on some disk",
        fix="Pass its path: --checkpoint.",
    )


def _placement(device: str, dtype: str, device_map: str | None) -> Placement:
    from skv_export.checkpoints.pretrained import Placement

    return Placement(device, dtype, device_map)


def load_original(source: Source, config: ModelConfig, placement: Placement) -> PreTrainedModel:
    """Loads the original into PyTorch: the weights as they were exported, the arithmetic as ``placement`` says.

    Raises:
        SkvError: It is another model than the folder's, or can't be loaded whole.
    """
    from skv_export.checkpoints import pretrained
    from skv_export.checkpoints.model_config import load_config
    from skv_export.export.supported import prepare_model

    given = load_config(source)
    found = {"model_type": given.model_type, "vocab_size": given.vocab_size, "layers": given.num_hidden_layers}
    expected = {"model_type": config.model_type, "vocab_size": config.vocab_size, "layers": len(config.layers)}
    if found != expected:
        raise SkvError(f"{source}: not what the folder was exported from", got=found, expected=expected)
    if placement.device_map is not None and placement.dtype != config.dtype:
        raise SkvError(
            f"verify: device_map={placement.device_map} with dtype={placement.dtype}",
            expected=f"the export's dtype, {config.dtype}: a model that is spread out can't be converted",
            fix=f"Pass --dtype {config.dtype}, or --device instead of --device-map.",
        )
    model = pretrained.load_model(source, given, dataclasses.replace(placement, dtype=config.dtype))
    prepare_model(model)
    return model if placement.dtype == config.dtype else model.to(placement.torch_dtype)  # type: ignore[arg-type]
