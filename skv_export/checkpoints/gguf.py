"""Reads GGUF files: metadata, and tensors dequantized to float32; a model may be split into several files.

The layout is ggml's: magic, version, counts, key-value pairs, tensor table, aligned data. Everything read is
bounds-checked; the quantized blocks themselves are decoded by the ``gguf`` package.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from skv_export.checkpoints.block_weights import BlockMatrix, check_numbers
from skv_export.checkpoints.gguf_blocks import FORMATS, GgufMatrix
from skv_export.checkpoints.tensor_files import MAX_TENSORS, LocalFile, TensorEntry, split_rows, stamp
from skv_export.errors import SkvError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_ARRAY = 1 << 24
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


class GgufEntry(TensorEntry):
    """A tensor of a GGUF file; ``dtype`` is ggml's name of its block format."""

    def blocks(self) -> BlockMatrix | None:
        """As ``TensorEntry`` says; its rows are still in the file's order."""
        return GgufMatrix(self, None, False) if self.dtype in FORMATS and len(self.shape) == 2 else None

    def row_blocks(self, nbytes: int) -> Iterator[npt.NDArray[Any]]:
        """As ``TensorEntry`` says; it is dequantized at once."""
        return split_rows(self.array(), nbytes)

    def array(self) -> npt.NDArray[Any]:
        """Returns the tensor as float32 (a copy).

        Raises:
            SkvError: Its format is one that the package ``gguf`` can't decode, or a number in it is none.
        """
        from gguf import GGMLQuantizationType, quants

        kind = GGMLQuantizationType[self.dtype]
        data = np.frombuffer(self.file.read(self.start, self.stop), np.uint8)
        plain = {"F32": np.float32, "F16": np.float16, "F64": np.float64}.get(self.dtype)
        if plain is not None:
            return data.view(plain).astype(np.float32).reshape(self.shape)
        rows = data.reshape(math.prod(self.shape[:-1]), -1)
        try:
            decoded = np.asarray(quants.dequantize(rows, kind), np.float32)
        except NotImplementedError as error:
            raise SkvError(
                f"tensor {self.name!r}: its blocks are of a format that can't be decoded",
                got=self.dtype,
                expected="a format that llama.cpp writes weights in, such as Q4_K or Q8_0",
                fix="Quantize the model again, or use the safetensors checkpoint.",
            ) from error
        check_numbers(self.name, "weights", decoded)
        return decoded.reshape(self.shape)


def shard_names(name: str) -> list[str]:
    """Returns the names of all files of a model that is cut into several, first one first; or ``name`` alone."""
    match = _SHARD.fullmatch(name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]):
        return [name]
    suffix = name[-len(".gguf") :]
    return [f"{match['stem']}-{i + 1:05d}-of-{match['count']}{suffix}" for i in range(int(match["count"]))]


def read_gguf(path: Path) -> tuple[dict[str, Any], Mapping[str, TensorEntry]]:
    """Returns the metadata and the tensors' places: of one file, or of a model whose first file ``path`` is.

    Raises:
        SkvError: A file is missing, not GGUF, truncated, or has a table that contradicts the file's size; the package
            ``gguf`` is missing.
    """
    names = shard_names(path.name)
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise SkvError(
            f"{path}: the model is cut into {len(names)} files, and some are missing",
            got=", ".join(missing[:3]),
            fix="Put all of them into one folder.",
        )
    metadata, entries = _read_file(path.parent / names[0])
    if (count := metadata.get("split.count", 1)) != len(names):
        raise SkvError(f"{path}: split.count", got=count, expected=f"{len(names)}, by the file's name")
    for name in names[1:]:
        _, more = _read_file(path.parent / name)
        if twice := entries.keys() & more.keys():
            raise SkvError(f"{path}: tensor {min(twice)!r} stands in two files")
        entries |= more
    total = metadata.get("split.tensors.count", len(entries))
    if total != len(entries):
        raise SkvError(f"{path}: tensors of all files", got=len(entries), expected=f"{total} (split.tensors.count)")
    return metadata, entries


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    """Metadata and tensors of one file, parsed once for each of its states: an export asks for them many times."""
    metadata, entries = _parsed(path, stamp(path.stat()))
    return dict(metadata), dict(entries)


@lru_cache(maxsize=8)
def _parsed(path: Path, _state: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    reader = _Reader(LocalFile(path))
    if bytes(reader.take(4)) != b"GGUF":
        raise reader.error("no GGUF magic", bytes(reader.file.read(0, 4)), "b'GGUF'")
    version = reader.scalar("I")
    if version not in (2, 3):
        raise reader.error("GGUF version", version, "2 or 3, little-endian")
    tensors, pairs = reader.scalar("Q"), reader.scalar("Q")
    if max(tensors, pairs) > MAX_TENSORS:
        raise reader.error("counts of tensors and keys", (tensors, pairs), f"at most {MAX_TENSORS}")
    metadata = {reader.string(): reader.value(reader.scalar("I")) for _ in range(pairs)}
    infos = [reader.tensor_info() for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise reader.error("general.alignment", alignment, "a small power of two")
    base = -(-reader.position // alignment) * alignment
    entries: dict[str, TensorEntry] = {info[0]: _entry(reader, *info, base) for info in infos}
    if len(entries) != len(infos):
        raise reader.error("tensor names", "one name twice", "unique names")
    return metadata, entries


class _Reader:
    def __init__(self, file: LocalFile) -> None:
        self.file = file
        self.position = 0

    def error(self, what: str, got: object, expected: object) -> SkvError:
        fix = "The file is damaged or not GGUF: download it again."
        return SkvError(f"{self.file.name}: {what}", got=got, expected=expected, fix=fix)

    def take(self, count: int) -> memoryview:
        stop = self.position + count
        if stop > self.file.size:
            raise self.error("the header is truncated", f"{self.file.size} bytes", f"at least {stop}")
        data = self.file.read(self.position, stop)
        self.position = stop
        return data

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        try:
            return bytes(self.take(self.scalar("Q"))).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error("a string is not UTF-8", str(error), "UTF-8") from error

    def value(self, kind: int) -> Any:
        """Reads one value; arrays longer than a layer list (the vocabulary) are skipped and come back as None."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.error("type of a metadata value", kind, f"0 ... {max(_SCALARS)}")
        item, count = self.scalar("I"), self.scalar("Q")
        if count > _MAX_ARRAY or (item not in _SCALARS and item != _STRING):
            raise self.error(
                "a metadata array", f"{count} items of type {item}", f"at most {_MAX_ARRAY} scalars or strings"
            )
        if item == _STRING:
            self._skip_strings(count)
            return None
        code = _SCALARS[item]
        data = self.take(count * struct.calcsize("<" + code))
        return list(struct.unpack(f"<{count}{code}", data)) if count <= 4096 else None

    def _skip_strings(self, count: int) -> None:
        """Steps over strings without decoding them: a vocabulary has some hundred thousand."""
        data, position, size = self.file.read(0, self.file.size), self.position, self.file.size
        length = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if position + 8 > size:
                break
            position += 8 + length(data, position)[0]
        else:
            if position <= size:
                self.position = position
                return
        raise self.error("the header is truncated", f"{size} bytes", f"at least {max(position, size + 1)}")

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Returns name, shape (rows first), ggml type and offset in the data."""
        name, dims = self.string(), self.scalar("I")
        if not 1 <= dims <= 4:
            raise self.error(f"tensor {name!r}: dimensions", dims, "1 ... 4")
        shape = tuple(reversed([self.scalar("Q") for _ in range(dims)]))
        return name, shape, self.scalar("I"), self.scalar("Q")


def _entry(reader: _Reader, name: str, shape: tuple[int, ...], kind: int, offset: int, base: int) -> GgufEntry:
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise SkvError("reading GGUF needs the package gguf", fix="pip install gguf") from error
    try:
        dtype = GGMLQuantizationType(kind)
    except ValueError as error:
        raise reader.error(f"tensor {name!r}: type", kind, "a ggml type") from error
    block, size = GGML_QUANT_SIZES[dtype]
    if shape[-1] % block or math.prod(shape) > 1 << 48:
        raise reader.error(f"tensor {name!r}: shape", shape, f"rows of a multiple of {block} elements ({dtype.name})")
    start = base + offset
    stop = start + math.prod(shape) // block * size
    if stop > reader.file.size:
        raise reader.error(
            f"tensor {name!r}: bytes {start}-{stop}", f"a file of {reader.file.size} bytes", "data within the file"
        )
    return GgufEntry(name, dtype.name, shape, reader.file, start, stop)
