"""Fixtures that test files share: tiny checkpoints, the demo model, and its export."""

from __future__ import annotations

import fcntl
import logging
import os
import signal

# Tests run side by side: torch's threads would wait for each other's cores at every small operation.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import ROOT, make_tiny

# A shell's background job ignores SIGINT, and so would the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_trace_records() -> None:
    """pytest listens to loggers that don't propagate, and torch traces slowly while its trace logger is listened to."""
    logging.getLogger("torch.__trace").propagate = True


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function: ``tiny_checkpoint("llama")`` is the folder of a tiny model with random weights, made once."""
    made: dict[str, Path] = {}

    def make(arch: str, **overrides: Any) -> Path:
        key = f"{arch}-{sorted(overrides.items())}" if overrides else arch
        if key not in made:
            made[key] = make_tiny(tmp_path_factory.mktemp(arch) / arch, arch, **overrides)
        return made[key]

    return make


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The demo model's GGUF file."""
    from skv_export.checkpoints.demo_model import demo_checkpoint as find

    return find()


@pytest.fixture(scope="session")
def library() -> Path:
    """The native library."""
    from skv_export.native.library import library_path

    built = ROOT / "build" / "libskv_ops.so"
    if built.is_file():
        os.environ.setdefault("SKV_OPS_LIBRARY", str(built))
    return library_path()


@pytest.fixture(scope="session")
def demo_export(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, library: Path) -> Path:
    """The demo model, exported with the default recipe, once per run: pytest-xdist's processes share it."""
    from skv_export.export.pipeline import export_model

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out = shared / "demo" / "smollm2-k4v2"
    out.parent.mkdir(exist_ok=True)
    with (out.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if not out.is_dir():  # an export appears complete or not at all
            export_model(demo_checkpoint, out=out, progress=lambda phase, fraction: None)
    return out
