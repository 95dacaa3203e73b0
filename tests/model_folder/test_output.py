"""The output folder and files: complete or not at all, and nothing replaced that isn't ours."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from skv_export.errors import SkvError
from skv_export.model_folder import output
from skv_export.model_folder.output import (
    MANIFEST_FILE,
    check_file,
    check_target,
    output_file,
    output_folder,
    write_text,
)

FILES = {"skv_config.json": '{"format_version": 1}', "model.onnx": "graph", "weights/0.bin": "numbers"}


def export(out: Path, *, force: bool = False, text: str = "") -> Path:
    with output_folder(out, 0, force=force) as folder:
        for name, content in FILES.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content + text)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def unlisted(out: Path) -> Path:
    """An export from before the list of files."""
    export(out)
    (out / MANIFEST_FILE).unlink()
    shutil.rmtree(out / "weights")
    return out


def test_a_folder_lists_its_files_and_nothing_else_is_left(tmp_path: Path) -> None:
    out = export(tmp_path / "deep" / "out")
    sizes = json.loads((out / MANIFEST_FILE).read_text())["files"]
    assert sizes == {name: len(content) for name, content in FILES.items()}
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    umask = os.umask(0)
    os.umask(umask)
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask


def test_an_existing_folder_is_kept_unless_forced(tmp_path: Path) -> None:
    out = export(tmp_path / "out")
    before = contents(out)
    with pytest.raises(SkvError, match=r"exists already.*--force"):
        export(out, text="2")
    assert contents(out) == before
    (out / "skv_config.json").write_text('{"format_version": 1, "edited": true}')
    export(out, force=True, text="2")
    assert (out / "model.onnx").read_text() == "graph2"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("exchange", [True, False])
def test_where_folders_cannot_be_exchanged_they_are_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(output, "_exchange", lambda a, b: False)
    out = export(tmp_path / "out")
    export(out, force=True, text="2")
    assert (out / "model.onnx").read_text() == "graph2" and [p.name for p in tmp_path.iterdir()] == ["out"]


def add(path: str) -> object:
    def change(out: Path) -> None:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text("precious")

    return change


def grow(out: Path) -> None:
    (out / "model.onnx").write_text("graph with something of the user's in it")


def link(out: Path) -> None:
    (out / "model.onnx").unlink()
    (out / "model.onnx").symlink_to(out.parent / "elsewhere")


def link_folder(out: Path) -> None:
    shutil.rmtree(out / "weights", ignore_errors=True)
    (out / "weights").symlink_to(out.parent)


def damage_list(out: Path) -> None:
    (out / MANIFEST_FILE).write_text("[")


FOREIGN = {
    "a file": (add("thesis.txt"), "thesis.txt"),
    "a hidden folder": (add(".ssh/id_ed25519"), r"\.ssh/"),
    "a file among ours": (add("weights/mine.bin"), "weights/mine.bin"),
    "a file that changed": (grow, r"model.onnx \(40 bytes, 5 when it was written\)"),
    "a link": (link, "model.onnx"),
    "a link to a folder": (link_folder, "weights/"),
    "a damaged list": (damage_list, "model.onnx"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_force_replaces_no_folder_with_anything_foreign(tmp_path: Path, name: str) -> None:
    out = export(tmp_path / "out")
    change, named = FOREIGN[name]
    change(out)
    before = contents(out)
    with pytest.raises(SkvError, match=rf"no export wrote.*got .*{named}"):
        export(out, force=True)
    assert contents(out) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["a file", "a hidden folder", "a link to a folder"])
def test_a_folder_from_before_the_list_is_known_by_its_names(tmp_path: Path, name: str) -> None:
    out = unlisted(tmp_path / "out")
    FOREIGN[name][0](out)
    before = contents(out)
    with pytest.raises(SkvError, match="no export wrote"):
        export(out, force=True)
    assert contents(out) == before
    export(unlisted(tmp_path / "other"), force=True, text="2")
    assert (tmp_path / "other" / "model.onnx").read_text() == "graph2"


def test_a_home_folder_is_never_replaced(tmp_path: Path) -> None:
    for name, entry in {"config a folder": "skv_config.json/x", "config beside": "skv_config.json"}.items():
        home = tmp_path / name
        (home / ".ssh").mkdir(parents=True)
        (home / ".ssh" / "id").write_text("precious")
        (home / entry).parent.mkdir(exist_ok=True)
        (home / entry).write_text('{"format_version": 1}')
        before = contents(home)
        with pytest.raises(SkvError, match="no export wrote"):
            export(home, force=True)
        assert contents(home) == before
    only_folder = tmp_path / "only"
    (only_folder / "skv_config.json").mkdir(parents=True)
    with pytest.raises(SkvError, match="no export wrote"):
        export(only_folder, force=True)


def test_an_empty_folder_is_replaced_a_file_and_a_link_are_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    export(tmp_path / "empty", force=True)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("file", "link"):
        with pytest.raises(SkvError, match=f"a {name}"):
            export(tmp_path / name, force=True)
    assert (tmp_path / "file").read_text() == "mine" and (tmp_path / "link").is_symlink()


def test_what_comes_into_the_folder_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = export(tmp_path / "out")
    with pytest.raises(SkvError, match=r"no export wrote.*got thesis.txt"), output_folder(out, 0, force=True):
        (out / "thesis.txt").write_text("precious")
    assert (out / "thesis.txt").read_text() == "precious"

    (out / "thesis.txt").unlink()
    replace = output._replace

    def late(new: Path, target: Path, aside: Path) -> Path:
        (target / "thesis.txt").write_text("precious")
        return replace(new, target, aside)

    monkeypatch.setattr(output, "_replace", late)
    with pytest.raises(SkvError, match=r"no export wrote.*got thesis.txt"):
        export(out, force=True, text="2")
    assert (out / "thesis.txt").read_text() == "precious" and (out / "model.onnx").read_text() == "graph"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = export(tmp_path / "out")
    before = contents(out)
    with pytest.raises(SkvError, match=r"can't be written.*No space left"), output_folder(out, 0, force=True):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(SkvError, match=r"no-such-checkpoint: can't be read"), output_folder(out, 0, force=True):
        Path("/no-such-checkpoint").read_text()
    monkeypatch.setattr(output, "_exchange", lambda a, b: False)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(errno.EACCES, "denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(SkvError, match="denied"):
        export(out, force=True, text="2")
    assert contents(out) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


# Temporary folders: planted ones, and what kills leave.


def test_planted_links_are_not_followed(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "precious").write_text("x")
    (home / "skv-export").write_text("out")
    for name in (".out.part", ".out.abcdefgh.part"):
        (tmp_path / name).symlink_to(home)
    export(tmp_path / "out")
    assert (home / "precious").read_text() == "x"
    assert (tmp_path / ".out.abcdefgh.part").is_symlink()


@pytest.mark.parametrize("marker", ["", "other"])
def test_folders_without_our_marker_stay(tmp_path: Path, marker: str) -> None:
    planted = tmp_path / ".out.abcdefgh.part"
    planted.mkdir(mode=0o700)
    (planted / "precious").write_text("x")
    if marker:
        (planted / "skv-export").write_text(marker)
    export(tmp_path / "out")
    assert (planted / "precious").read_text() == "x"


def test_a_folder_that_others_can_enter_stays(tmp_path: Path) -> None:
    planted = tmp_path / ".out.abcdefgh.part"
    planted.mkdir()
    planted.chmod(0o755)
    (planted / "skv-export").write_text("out")
    export(tmp_path / "out")
    assert planted.is_dir()


def test_leftovers_are_removed_without_following_links_and_a_running_export_is_not_disturbed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    left = tmp_path / ".out.abcdefgh.part"
    (left / "new").mkdir(parents=True)
    left.chmod(0o700)
    (left / "skv-export").write_text("out")
    (left / "new" / "link").symlink_to(tmp_path / "precious")
    out = tmp_path / "out"
    with output_folder(out, 0) as new:
        assert not left.exists() and new.parent.stat().st_mode & 0o777 == 0o700
        with pytest.raises(SkvError, match="another process is writing"), output_folder(out, 0):
            raise AssertionError("two at once")
        (new / "skv_config.json").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "precious"]
    assert (tmp_path / "precious" / "file").read_text() == "x"


def test_a_folder_that_was_moved_aside_comes_back(tmp_path: Path) -> None:
    left = tmp_path / ".out.abcdefgh.part"
    left.mkdir(mode=0o700)
    (left / "skv-export").write_text("out")
    export(left / "old")
    before = contents(left / "old")
    with pytest.raises(SkvError, match="exists already"):
        export(tmp_path / "out")
    assert contents(tmp_path / "out") == before and not left.exists()


_LOOP = """
import sys
from pathlib import Path
from typing import Any
from skv_export.model_folder.output import output_folder
count = 0
while True:
    with output_folder(Path(sys.argv[1]), 0, force=True) as folder:
        for name in ("a.json", "model.onnx"):
            (folder / name).write_text("x" * 4096)
        (folder / "skv_config.json").write_text('{"format_version": 1}')
    count += 1
    if count == 1:
        print("ready", flush=True)
"""


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_kills_at_any_time_leave_a_whole_folder(tmp_path: Path, kill: signal.Signals) -> None:
    out = tmp_path / "out"
    for attempt in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", _LOOP, str(out)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(0.002 * attempt + 0.001)
            process.send_signal(kill)
        assert {name: len(text) for name, text in contents(out).items() if name != MANIFEST_FILE} == {
            "a.json": 4096, "model.onnx": 4096, "skv_config.json": 21,
        }  # fmt: skip
    with output_folder(out, 0, force=True) as folder:
        (folder / "skv_config.json").write_text("{}")
    # A kill between two calls of the system may leave an empty folder without a marker, which nobody claims.
    assert not [path for path in tmp_path.rglob("*") if not path.is_relative_to(out) and any(path.iterdir())]


def test_a_second_interrupt_waits_for_the_clean_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove, seen = shutil.rmtree, []

    def interrupted(path: Path, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        remove(path, **options)
        seen.append(path)

    monkeypatch.setattr(shutil, "rmtree", interrupted)

    def write() -> None:
        with output_folder(tmp_path / "out", 0) as folder:
            (folder / "half").write_text("x")
            raise KeyboardInterrupt("the first")

    with pytest.raises(KeyboardInterrupt) as caught:
        write()
    assert len(seen) == 3 and list(tmp_path.iterdir()) == []
    assert str(caught.value.__context__) == "the first"  # the second arrived, late
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# What is found out before any work.


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 256, "too long"),
        ("a\0b", "null character"),
        ("file/out", "can't be written"),
        ("", "got ''"),
    ],
)
def test_names_that_cannot_be_written(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SkvError, match=message):
        check_target(f"{tmp_path}/{name}" if name else "")
    with pytest.raises(SkvError, match=message if name != "file/out" else "folder does not exist"):
        check_file(f"{tmp_path}/{name}" if name else "")


def test_places_where_nobody_can_write() -> None:
    for check in (check_target, check_file):
        with pytest.raises(SkvError, match="can't be written"):
            check("/proc/out")


def test_long_names_that_a_file_system_takes_work(tmp_path: Path) -> None:
    assert export(tmp_path / ("é" * 127)).is_dir()
    write_text(tmp_path / ("x" * 250 + ".json"), "text")
    assert (tmp_path / ("x" * 250 + ".json")).read_text() == "text"


# Single files.


def test_a_file_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    file, link = tmp_path / "report.json", tmp_path / "link"
    link.symlink_to(file)
    write_text(link, "one")
    with pytest.raises(ZeroDivisionError), output_file(file) as scratch:
        scratch.write_text(str(1 / 0))
    assert file.read_text() == "one" and link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "report.json"]
    with pytest.raises(SkvError, match="a folder"):
        check_file(tmp_path)
    with pytest.raises(SkvError, match="its folder does not exist"):
        check_file(tmp_path / "none" / "report.json")
    write_text("/dev/null", "gone")
    assert not Path("/dev/null").is_file()
