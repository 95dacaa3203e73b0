"""Output for users: a folder or a file appears complete or not at all, and nothing that isn't ours is replaced.

A folder is written into a private one beside the target, synced to disk, and exchanged with the target in one step. It
carries ``skv_files.json``, the list of its own files with their sizes: ``--force`` replaces a folder whose every entry
is on its list, and touches no other. Text files (``.json``, ``.jinja``, ``.toml``, ``.txt``, ``.md``) may have been
edited since; a file of another kind must have the size on the list. A folder from before the list is known by the names
that exports gave their files.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import logging
import os
import secrets
import shutil
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

from skv_export.errors import SkvError
from skv_export.model_folder.names import MANIFEST_FILE, SKV_CONFIG_FILE
from skv_export.model_folder.skv_config import read_json
from skv_export.native.library import FILE_NAMES
from skv_export.paths import to_path

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)
RESERVE_BYTES = 64 << 20
"""Room for the graph, configurations and tokenizer, on top of the weights."""
_UNLISTED = {
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "config.json", "genai_config.json",
    "generation_config.json", *FILE_NAMES.values(), "merges.txt", "model.onnx", "model.onnx.data", "recipe.toml",
    "skv_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "vocab.json", "vocab.txt",
}  # fmt: skip
"""What a folder without a list may hold."""
_EDITABLE = (".json", ".jinja", ".toml", ".txt", ".md")
_MARKER, _NEW, _OLD = "skv-export", "new", "old"
"""In the private folder: who it belongs to, what is being written, and what is about to be replaced."""
_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)  # Windows has none


# Folders.


@contextlib.contextmanager
def output_folder(out: Path, weight_bytes: int, *, force: bool = False) -> Iterator[Path]:
    """Gives a folder to write into that becomes ``out`` when the block ends, and vanishes if it fails.

    What a killed run left behind is removed by the next one for the same ``out``.

    Args:
        out: The target.
        weight_bytes: What the largest file will take; checked against the free space first.
        force: Replace ``out`` if it is an export: the old folder stays whole until the new one is.

    Raises:
        SkvError: ``out`` exists or is being written, its parent can't be written to, or the disk is (or gets) full.
    """
    target = check_target(out, weight_bytes, force=force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _private_folder(target) as private:
            new = private / _NEW
            new.mkdir()
            yield new
            _write_manifest(new)
            _sync(new)
            _publish(new, target, private / _OLD, force=force)
            logger.info("%s: written", target)
    except OSError as error:
        inside = error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(target.parent)
        place = target if inside else error.filename
        fix = "Free some space or choose another --out." if inside else "Check that it is there and can be read."
        what = f"{place}: can't be written" if inside else f"{place}: can't be read"
        raise SkvError(what, got=error.strerror or str(error), fix=fix) from error


def check_target(out: Path | str, weight_bytes: int = 0, *, force: bool = False) -> Path:
    """Checks that ``out`` can be written, before anything long starts; changes nothing.

    Returns:
        The absolute path; its last part is not followed if it is a link.

    Raises:
        SkvError: It exists (with ``force``: and holds what no export wrote), or its disk can't take it.
    """
    if sys.platform == "win32":
        raise SkvError(
            f"{out}: folders are not written on Windows", expected="Linux or macOS", fix="Export there, or in WSL."
        )
    given = to_path(out, "output folder")
    target = given.resolve() if given.name in ("", "..") else given.parent.resolve() / given.name
    if os.path.lexists(target):
        _check_replaceable(target)
        if not force:
            raise SkvError(f"{out}: exists already", fix="Use --force to replace it, or choose another --out.")
    place = next(folder for folder in target.parents if os.path.lexists(folder))
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".skv-", dir=place))  # what os.access says of root is not always so
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise SkvError(
            f"{out}: can't be written", got=f"{place}: {error.strerror}", fix="Choose another --out."
        ) from error
    needed = weight_bytes + RESERVE_BYTES
    if free < needed:
        raise SkvError(
            f"{out}: not enough space on the disk",
            got=f"{free >> 20} MiB free",
            expected=f"{needed >> 20} MiB",
            fix="Free some space, choose another --out, or a smaller --dtype.",
        )
    return target


def _check_replaceable(folder: Path) -> None:
    """Raises SkvError unless every entry of a folder was written by an export; an empty folder is fine."""
    if folder.is_symlink() or not folder.is_dir():
        foreign = ["a link" if folder.is_symlink() else "a file"]
    else:
        foreign = _foreign(folder)
    if foreign:
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        raise SkvError(
            f"{folder}: exists already, and holds what no export wrote, so --force does not replace it",
            got=", ".join(foreign[:5]) + more,
            expected="the files of an exported folder and no others",
            fix="Choose another --out, or move these away.",
        )


def _foreign(folder: Path) -> list[str]:
    """What in a folder is not on its list of files, sorted; links count as foreign wherever they lead."""
    listed = _listed(folder)
    parents = {str(parent) for name in listed for parent in Path(name).parents}
    found = []
    for place, folders, files in os.walk(folder):
        inside = Path(place).relative_to(folder)
        for name in list(folders):
            path = str(inside / name)
            if path not in parents or (folder / path).is_symlink():
                found.append(f"{path}/")
                folders.remove(name)
        for name in files:
            path = str(inside / name)
            status = (folder / path).lstat()
            if path not in listed or not stat.S_ISREG(status.st_mode):
                found.append(path)
            elif listed[path] not in (None, status.st_size) and not path.endswith(_EDITABLE):
                found.append(f"{path} ({status.st_size} bytes, {listed[path]} when it was written)")
    return sorted(found)


def _listed(folder: Path) -> Mapping[str, int | None]:
    """An exported folder's files and their sizes (None = unknown); nothing if it is none."""
    manifest, config = folder / MANIFEST_FILE, folder / SKV_CONFIG_FILE
    try:
        if manifest.is_file() and not manifest.is_symlink():
            sizes = read_json(manifest, fix="").get("files")
            return {**sizes, MANIFEST_FILE: None} if isinstance(sizes, dict) else {}
        if config.is_file() and "format_version" in read_json(config, fix=""):
            return dict.fromkeys(_UNLISTED)
    except SkvError:  # damaged: then nothing says that its files are ours
        return {}
    return {}


def _write_manifest(folder: Path) -> None:
    files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    files.pop(MANIFEST_FILE, None)  # of the folder that this one is a copy of
    text = json.dumps({"files": dict(sorted(files.items()))}, indent=2, ensure_ascii=False)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def _private_folder(target: Path) -> Iterator[Path]:
    """Makes a folder beside ``target`` that only this user can enter, holds it against others, and removes it."""
    private = Path(tempfile.mkdtemp(prefix=_prefix(target), suffix=".part", dir=target.parent))
    descriptor = os.open(private, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # a process that looks whether we are alive may hold it for a moment
        (private / _MARKER).write_text(target.name, encoding="utf-8")
        for path in sorted(target.parent.iterdir()):
            if path != private and path.name.startswith(_prefix(target)) and path.name.endswith(".part"):
                _reclaim(path, target)
        yield private
    finally:
        # Where the name leads elsewhere by now, there is nothing of ours to remove.
        with _uninterrupted():
            if os.path.lexists(private) and os.path.samestat(private.lstat(), os.fstat(descriptor)):
                _remove_private(private)
            os.close(descriptor)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Puts signals off that would end a clean-up of milliseconds half-way; they arrive at its end."""
    if threading.current_thread() is not threading.main_thread():  # no other gets signals, or may set their handlers
        yield
        return
    put_off: list[int] = []

    def later(number: int, _: FrameType | None) -> None:
        put_off.append(number)

    before = {number: signal.signal(number, later) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if put_off:
            signal.raise_signal(put_off[0])


def _remove_private(private: Path) -> None:
    """Removes a private folder, its marker last, so that what a kill leaves of it is known; follows no link."""
    for path in (private / _NEW, private / _OLD, private):
        shutil.rmtree(path, ignore_errors=True)


def _prefix(target: Path) -> str:
    return f".{target.name[:40]}."


def _reclaim(path: Path, target: Path) -> None:
    """Removes what a killed run for ``target`` left, if it is this user's; what it had moved aside goes back.

    Raises:
        SkvError: The run is still going on.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # a link, a file, or somebody else's
        return
    try:
        status = os.fstat(descriptor)
        private = status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == 0o700
        if not private or _marker(descriptor) != target.name:
            return  # an empty one may be of a run that has just begun
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (path / _OLD).is_dir() and not os.path.lexists(target):
            (path / _OLD).rename(target)
        _remove_private(path)
    except BlockingIOError as error:
        raise SkvError(
            f"{target}: another process is writing it", fix="Wait for it to end, or choose another --out."
        ) from error
    finally:
        os.close(descriptor)


def _marker(folder: int) -> str:
    """What the marker of a private folder says; "" without one."""
    try:
        descriptor = os.open(_MARKER, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
    except OSError:
        return ""
    with open(descriptor, encoding="utf-8", errors="replace") as file:
        return file.read(4096)


def _sync(folder: Path) -> None:
    for path in [*sorted(folder.rglob("*"), reverse=True), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _publish(new: Path, target: Path, aside: Path, *, force: bool) -> None:
    """Puts ``new`` in the place of ``target``; the old folder ends up in the private one, which is removed."""
    if not os.path.lexists(target):
        new.rename(target)
    elif not force:  # it has come since the first check
        raise SkvError(f"{target}: exists already", fix="Use --force to replace it, or choose another --out.")
    else:
        _check_replaceable(target)
        _check_moved(_replace(new, target, aside), target)
    _sync_names(target.parent)


def _replace(new: Path, target: Path, aside: Path) -> Path:
    """Puts ``new`` in the place of ``target``; returns where the old folder is now."""
    if _exchange(new, target):
        return new
    target.rename(aside)
    try:
        new.rename(target)
    except OSError:
        aside.rename(target)
        raise
    return aside


def _check_moved(old: Path, target: Path) -> None:
    """Gives the old folder its place again if something came into it meanwhile; the new one is lost then."""
    try:
        _check_replaceable(old)
    except SkvError:
        shutil.rmtree(target)
        old.rename(target)
        raise


def _sync_names(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)  # there only files come here
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(a: Path, b: Path) -> bool:
    """Exchanges two folders in one step, so that a kill finds the one or the other; False where that can't be done."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):  # an old kernel, or a file system without it
        return False
    raise OSError(code, os.strerror(code), str(b))


# Single files.


def check_file(path: Path | str) -> Path:
    """Checks that a file can be written, before anything long starts; an old one is kept until then.

    Returns:
        The path, ``~`` expanded.

    Raises:
        SkvError: A folder stands there, its own folder is missing, or can't be written to.
    """
    given = to_path(path, "output file")
    target = given.resolve()
    if target.is_dir():
        raise SkvError(f"{path}: a folder", expected="the name of a file to write")
    if not target.parent.is_dir():
        raise SkvError(f"{path}: its folder does not exist", got=str(target.parent), fix="Make the folder first.")
    try:
        if _is_device(target):
            target.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise SkvError(f"{path}: can't be written", got=error.strerror, fix="Choose another place.") from error
    return given


@contextlib.contextmanager
def output_file(path: Path | str) -> Iterator[Path]:
    """Gives a file to write that takes the place of ``path`` when the block ends, and vanishes if it fails.

    A file given by name is replaced, as every command-line tool does; through a link, what the link leads to.

    Raises:
        SkvError: See ``check_file``; or the disk gets full.
    """
    target = check_file(path).resolve()
    if _is_device(target):
        yield target
        return
    scratch = target.with_name(f".{target.stem[:40]}.{secrets.token_hex(8)}{target.suffix[:40]}")
    try:
        os.close(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW, 0o666))
        yield scratch
        _sync_names(scratch)
        scratch.replace(target)
    except OSError as error:
        raise SkvError(
            f"{path}: can't be written", got=error.strerror or str(error), fix="Free some space or choose another."
        ) from error
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Writes a text file in UTF-8, complete or not at all; see ``output_file``."""
    with output_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def _is_device(path: Path) -> bool:
    """Whether a path is a pipe, a terminal or the like: it is written to, not replaced."""
    return path.exists() and not path.is_file()
