"""The notebook, executed from top to bottom on a tiny model; its own first cell takes the demo model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import ROOT, make_tiny, write_tokenizer

from skv_export import Session

pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install '.[dev]'")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install '.[dev]'")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install '.[dev]'")

NOTEBOOK = ROOT / "examples" / "notebook" / "first_steps.ipynb"


def printed(cell: dict[str, object]) -> str:
    return "".join(output.get("text", "") for output in cell["outputs"])  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, library: Path) -> None:
    checkpoint = make_tiny(tmp_path / "tiny", "llama", max_position_embeddings=1024)
    write_tokenizer(checkpoint, 96)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert first.source.startswith("CHECKPOINT = None") and 'OUT = "demo-model"' in first.source
    first.source = f"CHECKPOINT = {str(checkpoint)!r}\nOUT = {str(tmp_path / 'out')!r}"
    client = nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(output.output_type != "error" for cell in code for output in cell.outputs)
    assert json.loads((tmp_path / "out" / "skv_config.json").read_text())["layers"]
    session = Session(tmp_path / "out")
    (tokens,) = session.generate([session.tokenizer.encode("The capital of France is").ids], max_new_tokens=20)
    assert printed(code[2]) == "".join(session.tokenizer.decode([token]) for token in tokens) != ""
    assert "x smaller" in printed(code[3])
    assert printed(code[4]).startswith("Once upon a time")


def test_it_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
