"""The native library as a file: what it exports, and that Python's mirror of its structures and sizes is right."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import native

from skv_export.native.library import SkvAttention, SkvLayout
from skv_export.spec.conformance import layout_cases


def test_layout_sizes_mirror_layout_py() -> None:
    out = (ctypes.c_int64 * 6)()
    for layout in layout_cases():
        for window, length in ((0, 0), (0, 1000), (100, 99), (100, 5000)):
            windowed = dataclasses.replace(layout, local_window_size=window)
            size = windowed.block_bytes(length)
            native.check(native.library().skv_layout_sizes(ctypes.byref(SkvLayout.of(windowed)), size, length, out))
            capacity = windowed.capacity(size)
            assert list(out) == [
                windowed.tile_bytes,
                windowed.row_bytes,
                windowed.full_rows,
                windowed.tiles_in(size),
                -1 if capacity is None else capacity,
                windowed.quantized_tokens(length),
            ], windowed


def test_the_struct_is_as_large_as_the_library_s() -> None:
    """kernels.h's SkvAttention, member by member, compiled: offsets would differ if library.py were out of step."""
    fields = [name for name, _ in SkvAttention._fields_]
    source = '#include <stdio.h>\n#include "kernels.h"\nint main(){' + "".join(
        f'printf("%zu ", offsetof(SkvAttention, {name}));' for name in fields
    )
    source += 'printf("%zu", sizeof(SkvAttention));}'
    folder = Path(native.__file__).parents[2] / "skv_export" / "native"
    binary = Path(os.environ.get("TMPDIR", "/tmp")) / f"skv_struct_{os.getpid()}"
    try:
        build = ["c++", "-x", "c++", "-std=c++17", "-I", str(folder), "-o", str(binary), "-"]
        subprocess.run(build, input=source, text=True, check=True)
        sizes = list(map(int, subprocess.run([str(binary)], capture_output=True, text=True, check=True).stdout.split()))
    finally:
        binary.unlink(missing_ok=True)
    assert sizes == [*(getattr(SkvAttention, name).offset for name in fields), ctypes.sizeof(SkvAttention)]


def test_the_library_exports_its_interface_and_nothing_else() -> None:
    command = ["nm", "-D", "--defined-only", native.library_path()]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[2::3]
    assert "skv_attention" in names
    assert [n for n in names if not n.startswith("skv_") and n != "RegisterCustomOps"] == []


def test_this_file_runs_without_torch() -> None:
    code = "import sys, native; native.library(); assert 'torch' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": str(Path(native.__file__).parent)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
