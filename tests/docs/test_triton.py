"""examples/triton: the model repository is what Triton's own schema and the graph say; no server runs here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from tiny_graph import Tiny
from tiny_models import ROOT

from skv_export.runtime.session import Session

SCRIPT = ROOT / "examples" / "triton" / "model_repository.py"
TYPES = {"TYPE_INT64": "tensor(int64)", "TYPE_FP32": "tensor(float)", "TYPE_UINT8": "tensor(uint8)"}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, check=False
    )


def parsed(path: Path) -> Any:
    """config.pbtxt by Triton's schema."""
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient is not installed")
    from google.protobuf import text_format

    return text_format.Parse(path.read_text(), schema.ModelConfig())


@pytest.mark.parametrize("all_logits", [False, True])
def test_a_sequence_of_requests_generates_what_a_session_does(tmp_path: Path, library: Path, all_logits: bool) -> None:
    """What Triton does with implicit state is done by hand: zeros first, then what the request before left."""
    folder = Tiny(all_logits=all_logits).write(tmp_path / "tiny")
    made = run(folder, tmp_path / "models", "--max-length", "150")
    assert made.returncode == 0, made.stderr
    model = tmp_path / "models" / "tiny"
    found = parsed(model / "config.pbtxt")
    assert (found.name, found.backend, found.max_batch_size) == ("tiny", "onnxruntime", 1)
    (op_library,) = found.model_operations.op_library_filename
    options = ort.SessionOptions()
    options.register_custom_ops_library(op_library)
    graph = ort.InferenceSession(model / "1" / "model.onnx", options, providers=["CPUExecutionProvider"])

    schema = type(found.input[0]).DESCRIPTOR.fields_by_name["data_type"].enum_type
    states = found.sequence_batching.state
    named = {x.name: (x.data_type, list(x.dims)) for x in (*found.input, *found.output)}
    named |= {x.input_name: (x.data_type, list(x.dims)) for x in states}
    named |= {x.output_name: (x.data_type, list(x.dims)) for x in states}
    ends = [*graph.get_inputs(), *graph.get_outputs()]
    assert set(named) == {end.name for end in ends}
    for end in ends:
        dtype, dims = named[end.name]
        assert TYPES[schema.values_by_number[dtype].name] == end.type and len(dims) == len(end.shape) - 1
        assert all(a == b for a, b in zip(dims, end.shape[1:], strict=True) if isinstance(b, int) and a != -1)

    prompt, held = list(range(5, 95)), {x.input_name: np.zeros([1, *x.initial_state[0].dims], np.uint8) for x in states}
    new, tokens, length = prompt, [], 0
    for _ in range(30):
        length += len(new)
        feeds = {
            "input_ids": np.array([new]),
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(length - len(new), length)[None],
        }
        out = dict(zip((end.name for end in graph.get_outputs()), graph.run(None, feeds | held), strict=True))
        held = {x.input_name: out[x.output_name] for x in states}
        new = [int(out["logits"][0, -1].argmax())]
        tokens += new
    session = Session(folder)
    assert tokens == [int(t[0]) for t in session.stream([prompt], max_new_tokens=30, cache=session.cache(1, 150))]


def test_what_cannot_be_written_is_said(tmp_path: Path, library: Path) -> None:
    folder = Tiny().write(tmp_path / "tiny")
    assert "--max-length" in run(folder, tmp_path / "models", "--max-length", "0").stderr
    assert run(folder, tmp_path / "models", "--max-length", "100").returncode == 0
    again = run(folder, tmp_path / "models", "--max-length", "100")
    assert again.returncode == 1 and "exists already" in again.stderr
    assert "skv_config.json" in run(tmp_path, tmp_path / "models").stderr
