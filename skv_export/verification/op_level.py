"""The op level of verify: the library against the reference, case by case."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from skv_export.native.library import Library, load_library
from skv_export.progress import track
from skv_export.runtime.providers import open_session
from skv_export.spec.conformance import Case, Inputs, Outcome, expected_of, make_inputs, op_cases
from skv_export.spec.key_basis import INPUTS, MATRICES
from skv_export.spec.op import OP_NAME, LayerAttention, attention_node, one_node_model


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
            error, problems = _differences(case, expected, run_case(case, inputs))
            failures += [f"op, {runner}, {case.name}: {problem}" for problem in problems]
            if not error <= worst:
                worst, worst_case = error, f"{case.name}, {runner}"
    by = " and by ".join(f"the {name}" if name == "kernels" else name for name in runners)
    where = "" if execution_provider == "cpu" else f" on {execution_provider}"
    return OpResult(len(cases), worst, worst_case, tuple(failures), by + where)


def _differences(case: Case, expected: Outcome, outcome: Outcome) -> tuple[float, list[str]]:
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
        head_sink=i.head_sink, query_seqlens=i.query_seqlens, key_basis=i.key_basis,
    )  # fmt: skip


def _op(library: Library, execution_provider: str, case: Case, i: Inputs) -> Outcome:
    """The same through a model of one node."""
    import onnxruntime as ort

    floats = {name: getattr(i, name).astype(case.dtype) for name in ("query", "key", "value")}
    feeds = floats | {"past_key": i.past_key, "past_value": i.past_value, "seqlens_k": i.seqlens_k}
    feeds["total_sequence_length"] = np.array(i.seqlens_k.max() + 1, np.int32)
    if i.head_sink is not None:
        feeds["head_sink"] = i.head_sink.astype(case.dtype)
    if i.query_seqlens is not None:
        feeds["query_seqlens"] = i.query_seqlens
    if i.key_basis is not None:
        feeds |= {name: getattr(i.key_basis, field) for name, field in zip(INPUTS, MATRICES, strict=True)}
    options = ort.SessionOptions()
    node = attention_node(list(feeds), LayerAttention(case.params, case.layouts).attributes())
    model = one_node_model(node, {name: (x.dtype, x.shape) for name, x in feeds.items()})
    session = open_session(model, options, execution_provider, library, op_type=OP_NAME)
    output, present_key, present_value = session.run(None, feeds)
    return output, present_key, present_value
