"""The C++ example: built against ONNX Runtime's headers, it gives the tokens of the Python runtime."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from tiny_graph import SMALL, VOCAB, Tiny
from tiny_models import HYBRID, ROOT

from skv_export.export.pipeline import export_model
from skv_export.runtime.session import Session

SOURCES = ROOT / "examples" / "cpp"
HEADERS = (os.environ.get("SKV_ORT_HEADERS"), "/usr/include/onnxruntime", "/usr/local/include/onnxruntime")
PROMPT = [int(token) for token in np.random.default_rng(2).integers(3, VOCAB, 75)]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with CMake, as docs/deploy.md says, and linked with the library of the onnxruntime wheel."""
    headers = [folder for folder in HEADERS if folder and (Path(folder) / "onnxruntime_cxx_api.h").is_file()]
    if not headers:
        pytest.skip("no ONNX Runtime headers: set SKV_ORT_HEADERS to the folder of onnxruntime_cxx_api.h")
    root = tmp_path_factory.mktemp("onnxruntime")
    (root / "lib").mkdir()
    (shared,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):  # the names that linkers and loaders look for
        (root / "lib" / name).symlink_to(shared)
    (root / "include").symlink_to(headers[0])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # cmake may be the environment's
    for command in (["-S", str(SOURCES), "-B", str(root / "build"), f"-DONNXRUNTIME_ROOT={root}"],
                    ["--build", str(root / "build")]):  # fmt: skip
        cmake = shutil.which("cmake", path=path) or "cmake"
        result = subprocess.run([cmake, *command], capture_output=True, text=True, check=False)
        assert result.returncode == 0 and "warning" not in result.stderr, result.stdout + result.stderr
    return root / "build" / "skv_generate"


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "tiny", [Tiny(SMALL), Tiny(SMALL, windows=(0, 40)), Tiny(SMALL, all_logits=True)], ids=["full", "window", "all"]
)
def test_it_gives_the_runtimes_tokens(program: Path, tiny: Tiny, library: Path, tmp_path: Path) -> None:
    """Across several flushes of the cache, and the wrap of a window's ring."""
    folder = tiny.write(tmp_path / "model", eos_token_id=[])
    result = run(program, folder, library, 150, *PROMPT)
    assert result.returncode == 0, result.stderr
    made = [int(token) for token in result.stdout.split()]
    assert [made] == Session(folder).generate([PROMPT], max_new_tokens=150) and len(made) == 150


@pytest.mark.slow
def test_it_keeps_the_states_of_a_hybrid_model(
    program: Path, library: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint("falcon_h1", **HYBRID["falcon_h1"])
    folder = export_model(source, out=tmp_path / "model", progress=lambda *_: None)
    prompt = [token % 317 + 3 for token in PROMPT]
    result = run(program, folder, library, 40, *prompt)
    assert result.returncode == 0, result.stderr
    made = [int(token) for token in result.stdout.split()]
    assert [made] == Session(folder).generate([prompt], max_new_tokens=40)


def test_it_stops_at_an_end_token(program: Path, library: Path, tmp_path: Path) -> None:
    free = Session(Tiny(SMALL).write(tmp_path / "free", eos_token_id=[])).generate([PROMPT], max_new_tokens=20)[0]
    folder = Tiny(SMALL).write(tmp_path / "model", eos_token_id=[VOCAB - 1, free[7]])
    made = [int(token) for token in run(program, folder, library, 20, *PROMPT).stdout.split()]
    assert made == free[: free.index(free[7]) + 1]


def test_mistakes_are_said(program: Path, library: Path, tmp_path: Path) -> None:
    folder = Tiny(SMALL).write(tmp_path / "model")
    cases = {
        "no such folder": ((tmp_path / "nothing", library, 5, 1), "skv_config.json: can't be read"),
        "not a library": ((folder, folder / "model.onnx", 5, 1), "error: "),
        "no token": ((folder, library, 5, VOCAB), f"token {VOCAB}: expected 0 ... {VOCAB - 1}"),
        "too long": ((folder, library, 600, 1), "context of 512"),
        "no tokens": ((folder, library, 0, 1), "MAX_NEW_TOKENS: expected at least 1"),
        "no number": ((folder, library, "five", 1), "not a number"),
    }
    for name, (arguments, said) in cases.items():
        result = run(program, *arguments)
        assert result.returncode == 1 and said in result.stderr, (name, result.stderr)
    assert run(program, folder, library, 5).returncode == 2
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    text = (damaged / "skv_config.json").read_text()
    for broken in (text[: len(text) // 2], text.replace('"full_rows"', '"rows"'), "[" * 100):
        (damaged / "skv_config.json").write_text(broken)
        result = run(program, damaged, library, 5, 1)
        assert result.returncode == 1 and "error: JSON: " in result.stderr
