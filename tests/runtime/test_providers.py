"""The execution providers: what is missing is said, and what falls back to the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_graph import Tiny

from skv_export.errors import SkvError
from skv_export.integrations.frozen_model import provider_of
from skv_export.runtime.providers import check_placement, device_of, preload
from skv_export.runtime.session import Session
from skv_export.spec.op import OP_NAME

pytestmark = pytest.mark.usefixtures("library")


def test_cuda_without_cuda_is_an_error_and_never_the_cpu(tmp_path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(SkvError, match=r"execution provider cuda.*onnxruntime"):
        Session(Tiny().write(tmp_path), execution_provider="cuda")
    with pytest.raises(SkvError, match="execution_provider; got tpu"):
        Session(tmp_path, execution_provider="tpu")


def test_the_number_of_a_gpu() -> None:
    assert [device_of(name) for name in ("cpu", "cuda", "cuda:0", "cuda:12")] == [
        ("cpu", 0), ("cuda", 0), ("cuda", 0), ("cuda", 12),
    ]  # fmt: skip
    for name in ("cpu:0", "cuda:", "cuda:-1", "cuda:x", "gpu"):
        with pytest.raises(SkvError, match=f"execution_provider; got {name}; expected cpu, cuda, or cuda:N"):
            device_of(name)
    assert [provider_of(place, "cpu") for place in (None, "auto", 0, 1, "cuda:1", {"": "cuda:0"})] == [
        "cpu", "cpu", "cuda", "cuda:1", "cuda:1", "cuda",
    ]  # fmt: skip


def placed(**nodes: Sequence[str]) -> SimpleNamespace:
    """A session whose nodes ONNX Runtime has given to providers."""
    parts = [
        SimpleNamespace(ep_name=f"{name.upper()}ExecutionProvider", get_nodes=lambda ops=ops: [*map(op_node, ops)])
        for name, ops in nodes.items()
    ]
    return SimpleNamespace(get_provider_graph_assignment_info=lambda: parts)


def op_node(op_type: str) -> SimpleNamespace:
    return SimpleNamespace(op_type=op_type)


def test_nodes_that_fall_back_to_the_cpu_are_said(recwarn: pytest.WarningsRecorder) -> None:
    check_placement(placed(cpu=["MatMul", OP_NAME]), "cpu", OP_NAME)
    check_placement(placed(cuda=[OP_NAME, "MatMul"], cpu=["Squeeze", "Sub"]), "cuda", OP_NAME)
    assert not recwarn.list
    with pytest.warns(RuntimeWarning, match="runs 2 MatMulNBits, 1 TopK on the CPU"):
        check_placement(placed(cuda=[OP_NAME], cpu=["MatMulNBits", "TopK", "MatMulNBits"]), "cuda", OP_NAME)
    with pytest.raises(SkvError, match=f"cuda: {OP_NAME}; got 1 nodes on the CPU"):
        check_placement(placed(cuda=["MatMul"], cpu=[OP_NAME]), "cuda", OP_NAME)


def test_cudas_libraries_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("loaded"))
    preload("cpu")
    assert capsys.readouterr() == ("", "")
    preload("cuda")
    assert capsys.readouterr() == ("", "loaded\n")  # standard output is generated text's
