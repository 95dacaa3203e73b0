"""Reads tensors from files without loading the files: local files, HTTP ranges, and safetensors headers.

A header is untrusted input: its offsets, shapes and dtypes are checked against the file before any data is read.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from skv_export.checkpoints.block_weights import BlockMatrix
from skv_export.errors import SkvError

MAX_HEADER_BYTES = 100_000_000
"""Largest header that safetensors allows."""
MAX_TENSORS = 1_000_000
ATTEMPTS = 5
"""Requests for one byte range before giving up; each resumes where the last one broke off."""
TIMEOUT_S = 30.0
_FIRST_READ = 1 << 17
COMMIT = re.compile(r"[0-9a-f]{40}")
"""How git names one."""
_COMMIT_HEADER = "X-Repo-Commit"
_BLOCK_BYTES = 1 << 20

DTYPES: Mapping[str, npt.DTypeLike] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class ByteSource(Protocol):
    """Random access to the bytes of one file, near or far."""

    name: str
    size: int

    def read(self, start: int, stop: int) -> memoryview:
        """Returns bytes ``start ... stop - 1``."""

    def release(self, start: int, stop: int) -> None:
        """Says that these bytes are not needed any more."""


Stamp = tuple[int, int, int]
"""What tells one state of a file from another: inode, size, and time of the last change in nanoseconds."""


def stamp(found: os.stat_result) -> Stamp:
    """Returns the state of a file."""
    return found.st_ino, found.st_size, found.st_mtime_ns


class LocalFile:
    """A file on disk, read rather than mapped: where a mapped file becomes shorter, the process would be killed.

    Raises:
        SkvError: The file is empty; later, that it is not any more what it was when it was opened.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path, self._stamp = path, stamp(path.stat())
        self.size = self._stamp[1]
        self._block = 0, memoryview(b"")  # where it starts, and its bytes: one value, as threads may read at once
        if self.size == 0:
            raise SkvError(f"{path}: the file is empty", fix="Download it again.")

    def read(self, start: int, stop: int) -> memoryview:
        """Returns bytes ``start ... stop - 1``, read-only; small pieces come out of a block that is read once."""
        if stop - start > _BLOCK_BYTES // 4:
            return self._read(start, stop)
        first, block = self._block
        if not first <= start <= stop <= first + len(block):
            first, block = self._block = start, self._read(start, min(start + _BLOCK_BYTES, self.size))
        return block[start - first : stop - first]

    def _read(self, start: int, stop: int) -> memoryview:
        data = np.empty(stop - start, np.uint8)
        rest = data.data
        with self._path.open("rb", buffering=0) as file:
            if stamp(os.fstat(file.fileno())) != self._stamp:
                raise self._changed()
            while rest:
                count = os.preadv(file.fileno(), [rest], stop - len(rest))
                if count == 0:
                    raise self._changed()
                rest = rest[count:]
        return data.data.toreadonly()

    def _changed(self) -> SkvError:
        return SkvError(
            f"{self.name}: the file was changed while it was read",
            expected=f"the {self.size} bytes that it had",
            fix="Run again when nothing writes to it.",
        )

    def release(self, start: int, stop: int) -> None:
        """Nothing is kept."""


class RemoteFile:
    """A file behind HTTP, read by byte ranges through huggingface_hub's session (its proxies, tokens and redirects).

    Attributes:
        commit: Of the repository that the file came from, as the hub says it; empty where it does not.

    Raises:
        SkvError: The server has no such file, ignores ranges, or keeps dropping the connection.
        FileNotFoundError: The server answers 404.
    """

    def __init__(self, url: str, headers: Mapping[str, str], name: str) -> None:
        self.name = name
        self._url = url
        self._headers = dict(headers)
        self.commit = ""
        self.size = -1
        self._head = bytes(self._fetch(0, _FIRST_READ))

    def read(self, start: int, stop: int) -> memoryview:
        """Returns bytes ``start ... stop - 1``; the first ones, fetched with the size, are not fetched again."""
        if stop <= len(self._head):
            return memoryview(self._head)[start:stop]
        return memoryview(self._fetch(start, stop))

    def release(self, start: int, stop: int) -> None:
        """Nothing is kept."""

    def _fetch(self, start: int, stop: int) -> bytearray:
        from huggingface_hub import get_session

        # Which HTTP library the session comes from depends on huggingface_hub's version (httpx, httpx2).
        transport_error = importlib.import_module(type(get_session()).__module__.partition(".")[0]).TransportError
        data = bytearray()
        reason = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(min(0.1 * 4.0**attempt, 8.0))
            try:
                reason = self._stream(get_session(), start, stop, data)
            except transport_error as error:
                reason = f"{type(error).__name__}: {error}"
                if self.size < 0 and type(error).__name__ == "ConnectError":  # nobody is there: no use in waiting
                    raise SkvError(
                        f"{self.name}: the hub can't be reached",
                        got=str(error),
                        fix="A folder is meant? Check its path. Else check the connection and HF_ENDPOINT.",
                    ) from error
            if not reason and len(data) >= min(stop, self.size) - start:
                return data
            reason = reason or f"{len(data)} of {stop - start} bytes"
        raise SkvError(
            f"{self.name}: reading bytes {start}-{stop - 1} failed {ATTEMPTS} times",
            got=reason,
            expected="an answer with these bytes",
            fix="Check the connection and HF_ENDPOINT, or download the checkpoint and pass its folder.",
        )

    def _stream(self, session: Any, start: int, stop: int, data: bytearray) -> str:
        """Appends what the server sends to ``data``; returns why it is worth another try, or nothing."""
        headers = {**self._headers, "Range": f"bytes={start + len(data)}-{stop - 1}", "Accept-Encoding": "identity"}
        with session.stream("GET", self._url, headers=headers, timeout=TIMEOUT_S) as response:
            status = response.status_code
            if status == 404:
                raise FileNotFoundError(self.name)
            if status in (408, 429) or status >= 500:
                return f"HTTP status {status}"
            if status == 200:
                raise SkvError(
                    f"{self.name}: the server ignores byte ranges",
                    got="HTTP status 200 with the whole file",
                    expected="206 with the bytes asked for",
                    fix="Download the checkpoint and pass its folder.",
                )
            if status != 206:
                fix = (
                    "Check the name and the access token (`hf auth login`)."
                    if status in (401, 403)
                    else "Check HF_ENDPOINT."
                )
                raise SkvError(f"{self.name}: the server refuses", got=f"HTTP status {status}", expected="206", fix=fix)
            match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != start + len(data):
                raise SkvError(
                    f"{self.name}: the server sent another range",
                    got=response.headers.get("Content-Range"),
                    expected=f"bytes {start + len(data)}-{stop - 1}",
                    fix="Download the checkpoint and pass its folder.",
                )
            self.size = int(match[3])
            # A large file is another server's, to which the hub redirects.
            said = [answer.headers.get(_COMMIT_HEADER, "") for answer in (*response.history, response)]
            self.commit = next((name for name in said if COMMIT.fullmatch(name)), "")
            for chunk in response.iter_raw():
                data += chunk
                if len(data) > stop - start:
                    raise SkvError(f"{self.name}: the server sent too much", got=len(data), expected=stop - start)
        return ""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor stands: ``file[start:stop]`` holds ``shape`` elements of ``dtype`` (its safetensors name)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: ByteSource
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.stop - self.start

    def blocks(self) -> BlockMatrix | None:
        """Returns the tensor as its checkpoint quantized it, if it did and a graph can hold it so."""
        return None

    def array(self) -> npt.NDArray[Any]:
        """Returns the tensor, read-only."""
        return np.frombuffer(self.file.read(self.start, self.stop), dtype=DTYPES[self.dtype]).reshape(self.shape)

    def row_blocks(self, nbytes: int) -> Iterator[npt.NDArray[Any]]:
        """Reads the tensor in blocks of rows of about so many bytes, or of one row; they are read-only."""
        row_bytes = max(1, self.nbytes // max(1, self.shape[0]))
        step = max(1, nbytes // row_bytes) * row_bytes
        for start in range(self.start, self.stop, step):
            data = self.file.read(start, min(start + step, self.stop))
            yield np.frombuffer(data, DTYPES[self.dtype]).reshape(-1, *self.shape[1:])


def split_rows(array: npt.NDArray[Any], nbytes: int) -> Iterator[npt.NDArray[Any]]:
    """Returns an array in blocks of rows of about so many bytes, or of one row."""
    step = max(1, nbytes // max(1, array[:1].nbytes))
    return (array[i : i + step] for i in range(0, len(array), step))


def read_header(file: ByteSource) -> dict[str, TensorEntry]:
    """Parses and checks the header of one safetensors file.

    Raises:
        SkvError: Truncated, not JSON, or an entry that contradicts itself, another one or the file's size.
    """
    header, base = _parse_header(file)
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, value, base) for name, value in header.items()}
    _check_coverage(file, entries, base)
    return entries


def read_metadata(file: ByteSource) -> dict[str, str]:
    """What the header of a safetensors file says beside its tensors: texts by name.

    Raises:
        SkvError: See ``read_header``; or it is no table of texts.
    """
    metadata = _parse_header(file)[0].get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(file, "the header's metadata", repr(metadata)[:100], "texts by name")
    return metadata


def _parse_header(file: ByteSource) -> tuple[dict[str, Any], int]:
    """The JSON of a header, and where the tensors' bytes begin."""
    length = int.from_bytes(file.read(0, 8), "little") if file.size >= 8 else -1
    if not 2 <= length <= min(MAX_HEADER_BYTES, file.size - 8):
        raise _bad(
            file, "the header's length is wrong", length, f"2 ... {min(MAX_HEADER_BYTES, max(file.size - 8, 0))}"
        )
    text = bytes(file.read(8, 8 + length))
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise _bad(file, "the header is not valid JSON", str(error)[:200], "a JSON object") from error
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise _bad(file, "the header is no table of tensors", type(header).__name__, "a JSON object")
    return header, 8 + length


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _entry(file: ByteSource, name: str, value: object, base: int) -> TensorEntry:
    what = f"tensor {name!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _bad(file, what, repr(value)[:100], "dtype, shape, data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _bad(file, f"{what}: dtype", repr(dtype)[:50], f"one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
        raise _bad(file, f"{what}: shape", repr(shape)[:100], "at most 8 sizes of at least 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise _bad(file, f"{what}: data_offsets", repr(offsets)[:100], "two integers")
    start, stop = base + offsets[0], base + offsets[1]
    if not base <= start <= stop <= file.size:
        raise _bad(
            file, f"{what}: data_offsets", offsets, f"0 <= start <= stop <= {file.size - base}, the bytes in the file"
        )
    nbytes = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if stop - start != nbytes:
        raise _bad(file, f"{what}: {dtype} {shape} takes {nbytes} bytes", f"data_offsets of {stop - start}", nbytes)
    return TensorEntry(name, dtype, tuple(shape), file, start, stop)


def _check_coverage(file: ByteSource, entries: Mapping[str, TensorEntry], base: int) -> None:
    position, before = base, "the header"
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.stop)):
        if entry.start != position:
            how = "overlaps" if entry.start < position else "leaves a gap after"
            raise _bad(file, f"tensor {entry.name!r} {how} {before}", f"offset {entry.start - base}", position - base)
        position, before = entry.stop, repr(entry.name)
    if position != file.size:
        raise _bad(file, "bytes after the last tensor", file.size - position, 0)


def _bad(file: ByteSource, what: str, got: object, expected: object) -> SkvError:
    fix = "The file is damaged or not safetensors: download it again."
    return SkvError(f"{file.name}: {what}", got=got, expected=expected, fix=fix)
