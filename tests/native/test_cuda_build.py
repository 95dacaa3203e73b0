"""Which CUDA kernels a build has: none on a machine without a GPU, those of its cards where there are some."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tiny_models import ROOT

pytestmark = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("nvcc") is None, reason="cmake or nvcc is not installed"
)


def configured(folder: Path, nvidia_smi: str, *options: str) -> str:
    """What cmake says of the CUDA kernels of a wheel, on a machine whose nvidia-smi is this script."""
    tool = folder / "bin" / "nvidia-smi"
    tool.parent.mkdir(parents=True)
    tool.write_text(f"#!/bin/sh\n{nvidia_smi}\n")
    tool.chmod(0o755)
    environment = os.environ | {"PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}
    wheel = ["-DSKBUILD=2", f"-DSKBUILD_METADATA_DIR={folder}"]  # as scikit-build-core calls it
    command = ["cmake", "-S", str(ROOT), "-B", str(folder / "build"), *wheel, *options]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in output.splitlines() if "CUDA kernels" in line]
    return line


@pytest.mark.parametrize("nvidia_smi", ["exit 9", "echo No devices were found", "true"])
def test_a_machine_without_a_gpu_builds_none(nvidia_smi: str, tmp_path: Path) -> None:
    assert "not built (nvidia-smi names no GPU" in configured(tmp_path, nvidia_smi)


def test_a_machine_with_gpus_builds_for_them(tmp_path: Path) -> None:
    line = configured(tmp_path, "echo 8.9; echo 9.0; echo 8.9; echo 12.0")
    assert "sm_89 sm_90 sm_120," in line


def test_asked_for_it_builds_for_all_and_for_those_named(tmp_path: Path) -> None:
    assert "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120," in configured(tmp_path / "all", "exit 9", "-DSKV_CUDA=on")
    named = configured(tmp_path / "one", "echo 8.9", "-DSKV_CUDA=on", "-DSKV_CUDA_ARCHITECTURES=90")
    assert "sm_90," in named and "sm_89" not in named
