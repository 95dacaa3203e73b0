"""Checkpoints: resolves a path or hub id, and reads its configuration and, lazily, its tensors.

Safetensors (one file or shards), GGUF, and hub ids over HTTP byte ranges. Pickles are refused: loading one runs code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy.typing as npt

from skv_export.checkpoints import adapter as adapter_module
from skv_export.checkpoints.gguf import read_gguf, shard_names
from skv_export.checkpoints.gguf_config import gguf_config
from skv_export.checkpoints.limits import check_claims
from skv_export.checkpoints.packed_entry import PackedEntry
from skv_export.checkpoints.packed_weights import unpack_checkpoint
from skv_export.checkpoints.tensor_files import COMMIT, LocalFile, RemoteFile, TensorEntry, read_header
from skv_export.errors import SkvError
from skv_export.paths import looks_like_path, to_path

logger = logging.getLogger(__name__)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_EXPORT = "skv_config.json"
"""The file that tells a folder that `model` wrote."""
MAX_JSON_BYTES = 64 << 20
MAX_SHARDS = 2048
_COMPARED_BYTES = 1 << 20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PICKLE_FIX = "Convert it: model.save_pretrained(FOLDER, safe_serialization=True)."


@dataclass(frozen=True)
class Source:
    """What a CHECKPOINT argument names.

    Attributes:
        kind: ``safetensors`` (a local folder), ``gguf`` (a local file) or ``hub``.
        path: The folder; for ``gguf`` the one that holds the file; for ``hub`` its folder in the local cache, or None.
        repo_id: Hub id, for ``hub``.
        revision: Branch, tag or commit that was asked for, for ``hub``.
        commit: What that is, once the hub or its cache has said.
        gguf_file: File name inside ``path``, for ``gguf``; the first one's, if the model is cut into several.
        adapter: Folder of a LoRA adapter that is merged into the weights as they are read.
    """

    kind: str
    path: Path | None = None
    repo_id: str | None = None
    revision: str | None = None
    commit: str | None = None
    gguf_file: str | None = None
    adapter: Path | None = None

    @property
    def pretrained(self) -> str:
        """What transformers' ``from_pretrained`` takes as its first argument."""
        return self.repo_id or str(self.path)

    @property
    def pinned(self) -> str | None:
        """The commit of a hub id; what was asked for where nobody has said which that is."""
        return self.commit or self.revision

    def __str__(self) -> str:
        if self.adapter is not None:
            return f"{replace(self, adapter=None)} with {self.adapter}"
        if self.kind == "hub":
            return f"{self.repo_id}@{self.pinned}"
        return str(self.path / self.gguf_file) if self.path and self.gguf_file else str(self.path)


def hub_endpoint() -> str | None:
    """The hub that HF_ENDPOINT names now; huggingface_hub itself reads it once, when it is imported."""
    return os.environ.get("HF_ENDPOINT") or None


def resolve(
    checkpoint: str | Path | Source,
    *,
    revision: str | None = None,
    adapter: str | Path | None = None,
    validate: bool = True,
) -> Source:
    """Says what ``checkpoint`` is, and checks the headers of its files before anything else reads them.

    Args:
        checkpoint: A folder with safetensors, a ``.gguf`` file, a folder with one, a hub id such as ``org/name``, or
            the folder of a LoRA adapter whose base model is a folder here.
        revision: Branch, tag or commit of a hub id; ``main`` if not given.
        adapter: Folder of a LoRA adapter, to be merged into the weights.
        validate: Whether to read and check every header (a few kilobytes per file).

    Raises:
        SkvError: Nothing there, a pickle, a missing shard, or a damaged header; the message names the file.
    """
    if isinstance(checkpoint, Source):
        source = checkpoint
    else:
        to_path(checkpoint, "checkpoint")  # what no file system holds is no hub id either
        source = _classify(str(checkpoint), revision)
        if revision is not None and source.kind != "hub":
            raise SkvError("--revision", got=str(source), expected="a hub id", fix="Leave it out.")
    if adapter is not None:
        folder = to_path(adapter, "adapter")
        adapter_module.read_config(folder)
        if source.kind == "gguf":
            raise SkvError(
                f"{source}: adapters are merged into safetensors",
                got="a GGUF file",
                fix="Pass the safetensors checkpoint that the adapter was trained on.",
            )
        source = replace(source, adapter=folder)
    if not validate:
        return source
    opened = Checkpoint(source)
    check_claims(opened.config_if_any(), opened.entries, str(opened.source))
    logger.info("%s: %s, %d tensors", opened.source, source.kind, len(opened.entries))
    return _from_cache(opened.source) if source.path is None else source


def _classify(text: str, revision: str | None) -> Source:
    path = to_path(text, "checkpoint")
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise _pickle(text)
    if path.is_dir():
        return _classify_folder(path)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return Source("gguf", path.parent, gguf_file=shard_names(path.name)[0])
        if path.suffix == ".safetensors":
            return _classify_folder(path.parent)
        raise SkvError(f"{path}: not a checkpoint", expected="a folder with safetensors, a .gguf file or a hub id")
    looks_local = looks_like_path(text) or path.suffix.lower() in (".gguf", ".safetensors", ".onnx")
    if looks_local or not _HUB_ID.fullmatch(text) or ".." in text or "--" in text:
        raise SkvError(
            f"checkpoint {text}: no such file or folder",
            expected="a folder with safetensors, a .gguf file or a hub id such as org/name",
            fix="Check the path.",
        )
    return _from_cache(Source("hub", repo_id=text, revision=revision or "main"))


def _from_cache(source: Source) -> Source:
    """A hub id with its folder in huggingface_hub's cache, if its weights are there too; else as it is."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(str(source.repo_id), "config.json", revision=source.pinned)
    if not isinstance(found, str):
        return source
    folder = Path(found).parent
    complete = all((folder / shard).is_file() for shard in Checkpoint(Source("safetensors", folder)).shards())
    commit = folder.name if COMMIT.fullmatch(folder.name) else source.commit
    return replace(source, path=folder, commit=commit) if complete else source


def _classify_folder(path: Path) -> Source:
    names = sorted(p.name for p in path.iterdir())
    weights = [name for name in names if name.endswith(".safetensors") and name != adapter_module.WEIGHTS]
    if adapter_module.CONFIG in names and not weights:
        return _base_of_adapter(path)
    if weights or INDEX in names:
        return Source("safetensors", path)
    ggufs = sorted({shard_names(name)[0] for name in names if name.lower().endswith(".gguf")})
    if len(ggufs) == 1:
        return Source("gguf", path, gguf_file=ggufs[0])
    if len(ggufs) > 1:
        raise SkvError(f"{path}: several GGUF files", got=", ".join(ggufs), fix="Pass the path of one of them.")
    refuse_exported(path)
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise _pickle(str(path / pickles[0]))
    raise SkvError(
        f"{path}: no checkpoint in this folder",
        got=", ".join(names[:8]) or "an empty folder",
        expected=f"{SINGLE}, or {INDEX} with its shards, or one .gguf file",
        fix="Pass the folder that holds config.json and the weights.",
    )


def _base_of_adapter(folder: Path) -> Source:
    """The base model of an adapter's folder, with the adapter; the base has to be a folder here."""
    base = adapter_module.base_of(folder)
    if not base or not Path(base).is_dir():
        raise SkvError(
            f"{folder}: an adapter of {base or 'a model that it does not name'}",
            expected="a model, or an adapter whose base model is a folder on this machine",
            fix=f"Pass the model and the adapter: skv-export model {base or 'MODEL'} --adapter {folder}",
        )
    source = _classify_folder(Path(base))
    if source.kind == "gguf" or source.adapter is not None:
        raise SkvError(f"{folder}: an adapter of {base}", expected="a base model in safetensors")
    return replace(source, adapter=folder)


def refuse_exported(folder: Path) -> None:
    """Raises SkvError if a folder is what an export wrote; the message names what it was made from."""
    if not (folder / _EXPORT).is_file():
        return
    try:
        found = Checkpoint(Source("safetensors", folder))._json(_EXPORT).get("source")
    except SkvError:
        found = None
    name = str(found.get("name") if isinstance(found, dict) else "a checkpoint")[:200]
    raise SkvError(
        f"{folder}: an exported folder, made from {name}",
        expected="the checkpoint that it was made from",
        fix=f"Pass {name}; `skv-export generate` and `skv-export verify` take this folder.",
    )


def plain_name(name: str) -> str:
    """Returns a tensor's name without what torch.compile puts before the names of a module that it wraps."""
    return name.replace("_orig_mod.", "")


def _pickle(name: str) -> SkvError:
    return SkvError(
        f"{name}: a pickle; loading one runs any code in it, so it is never read",
        expected="safetensors or GGUF",
        fix=_PICKLE_FIX,
    )


class Checkpoint:
    """A checkpoint whose tensors are read one by one.

    Attributes:
        source: What was opened; a hub id is one commit from the first answer on, so that it is no mix of two models.
        bytes_read: Bytes of tensors read so far.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.bytes_read = 0

    @classmethod
    def open(
        cls, checkpoint: str | Path | Source, *, revision: str | None = None, adapter: str | Path | None = None
    ) -> Checkpoint:
        """Opens a folder, GGUF file or hub id (see ``resolve``) and checks its headers."""
        opened = cls(resolve(checkpoint, revision=revision, adapter=adapter, validate=False))
        _ = opened.entries
        return opened

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's ``config.json``; for GGUF, what its metadata says, under the same names.

        Raises:
            SkvError: There is none; no valid JSON; or metadata that are not understood.
        """
        try:
            return self._config
        except FileNotFoundError as error:
            fix = "Put the model's config.json beside its weights."
            raise SkvError(f"{self.source}: no config.json", fix=fix) from error

    @cached_property
    def _config(self) -> dict[str, Any]:
        if self.source.kind == "gguf":
            return gguf_config(*self._gguf, str(self.source))
        return self._json("config.json")

    def config_if_any(self) -> dict[str, Any]:
        """The configuration; empty where there is none, which whoever needs it will say."""
        try:
            return self._config
        except FileNotFoundError:
            return {}

    @cached_property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Every tensor's place, by name, headers checked."""
        if self.source.kind == "gguf":
            return self._gguf[1]
        if self.source.adapter is None and self.source.path is not None:
            adapter_module.refuse_beside(self.source.path)
        shards = self.shards()
        with ThreadPoolExecutor(8) as pool:
            tables = list(pool.map(lambda shard: read_header(self._file(shard)), shards))
        merged: dict[str, TensorEntry] = {}
        for table in tables:
            twice = merged.keys() & table.keys()
            if twice:
                raise SkvError(
                    f"{self.source}: tensor {min(twice)!r} stands in two shards", fix="Download the checkpoint again."
                )
            merged |= table
        missing = sorted(name for name, shard in self._weight_map.items() if name not in merged)
        if missing:
            raise SkvError(
                f"{self.source}: {INDEX} lists tensors that are in no shard",
                got=", ".join(missing[:3]),
                fix="Download it again.",
            )
        plain = {plain_name(name): entry for name, entry in merged.items()}
        named = unpack_checkpoint(self.config_if_any(), plain, str(self.source))
        if self.source.adapter is None:
            return named
        if packed := [name for name, entry in named.items() if isinstance(entry, PackedEntry)]:
            raise SkvError(
                f"{self.source}: an adapter on quantized weights: adding it would round them again",
                got=", ".join(packed[:3]),
                expected="a base model in float weights",
                fix="Pass the full-precision checkpoint that the base was made from.",
            )
        return adapter_module.Adapter(self.source.adapter, str(self.config.get("model_type"))).merged(named)

    def revision(self) -> str:
        """Returns what tells this checkpoint from another of its name: of a hub id the revision, else its hash.

        The hash is that of the first file of weights, read whole.
        """
        if self.source.kind == "hub":
            return str(self.source.pinned)
        assert self.source.path
        first = self.source.gguf_file or self.shards()[0]
        files = [self.source.path / first]
        if self.source.adapter is not None:
            files.append(self.source.adapter / adapter_module.WEIGHTS)
        said = []
        for path in files:
            with path.open("rb") as file:
                said.append(f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()} of {path.name}")
        return ", ".join(said)

    def names(self) -> list[str]:
        """Returns the names of all tensors."""
        return list(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape without reading it."""
        return self._entry(name).shape

    def nbytes(self, name: str) -> int:
        """Returns the bytes a tensor takes in its file."""
        return self._entry(name).nbytes

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """Reads one tensor, read-only; bf16 and fp8 as ml_dtypes; GGUF as float32.

        Raises:
            SkvError: No such tensor, or the server fails.
        """
        entry = self._entry(name)
        self.bytes_read += entry.nbytes
        return entry.array()

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same numbers; reads no further than they do."""
        first, second = self._entry(name), self._entry(other)
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        if isinstance(first, PackedEntry):
            return bool((first.array() == second.array()).all())
        for start in range(0, first.nbytes, _COMPARED_BYTES):
            stop = min(start + _COMPARED_BYTES, first.nbytes)
            a, b = (entry.file.read(entry.start + start, entry.start + stop) for entry in (first, second))
            if a != b:
                return False
        return True

    def release(self, names: Iterable[str]) -> None:
        """Says that tensors are not needed any more; arrays that are still held stay valid."""
        for name in names:
            entry = self._entry(name)
            entry.file.release(entry.start, entry.stop)

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.entries:
            raise SkvError(
                f"{self.source}: no tensor {name!r}",
                got=f"{len(self.entries)} others",
                fix="Check config.json's model_type.",
            )
        return self.entries[name]

    @property
    def gguf_architecture(self) -> str:
        """llama.cpp's name of the architecture; empty for other files than GGUF."""
        return str(self._gguf[0].get("general.architecture", "")) if self.source.kind == "gguf" else ""

    @property
    def gguf_metadata(self) -> Mapping[str, Any]:
        """All metadata of a GGUF file; long lists, such as the vocabulary, are left out (None)."""
        return self._gguf[0]

    @cached_property
    def _gguf(self) -> tuple[dict[str, Any], Mapping[str, TensorEntry]]:
        assert self.source.path and self.source.gguf_file
        return read_gguf(self.source.path / self.source.gguf_file)

    @cached_property
    def _weight_map(self) -> dict[str, str]:
        """Tensor to shard, from the index; empty without one."""
        try:
            index = self._json(INDEX)
        except FileNotFoundError:
            return {}
        table = index.get("weight_map")
        safe = re.compile(r"[\w.-]+\.safetensors")
        if not isinstance(table, dict) or not all(isinstance(v, str) and safe.fullmatch(v) for v in table.values()):
            raise SkvError(
                f"{self.source}: {INDEX}: weight_map", expected="tensor names to names of .safetensors files beside it"
            )
        return table

    def shards(self) -> list[str]:
        """Returns the names of the safetensors files, from the index if there is one."""
        shards = sorted(set(self._weight_map.values())) or [self._single()]
        if len(shards) > MAX_SHARDS:
            raise SkvError(
                f"{self.source}: {INDEX}: too many shards", got=len(shards), expected=f"at most {MAX_SHARDS}"
            )
        return shards

    def _single(self) -> str:
        if self.source.path is None:
            return SINGLE
        found = sorted(p.name for p in self.source.path.glob("*.safetensors"))
        if SINGLE in found or len(found) != 1:
            found = [SINGLE]
        return found[0]

    def _file(self, name: str) -> LocalFile | RemoteFile:
        if self.source.path is None:
            try:
                return self._remote(name)
            except FileNotFoundError:
                raise self._absent(name) from None
        if not (self.source.path / name).is_file():
            raise self._absent(name)
        return LocalFile(self.source.path / name)

    def _remote(self, name: str) -> RemoteFile:
        from huggingface_hub import get_token, hf_hub_url, is_offline_mode

        assert self.source.repo_id
        if is_offline_mode():
            raise SkvError(
                f"{self.source}: no such folder, and not complete in the local cache of the hub",
                got="HF_HUB_OFFLINE is set",
                fix="Check the name, download the checkpoint first, or unset HF_HUB_OFFLINE.",
            )
        url = hf_hub_url(self.source.repo_id, name, revision=self.source.pinned, endpoint=hub_endpoint())
        token = get_token()
        file = RemoteFile(url, {"authorization": f"Bearer {token}"} if token else {}, f"{self.source}/{name}")
        self.source = replace(self.source, commit=file.commit or self.source.commit)
        return file

    def _absent(self, name: str) -> SkvError:
        if self.source.kind == "hub" and name == SINGLE:
            for pickle in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
                if self._exists(pickle):
                    return _pickle(f"{self.source}/{pickle}")
            return SkvError(
                f"{self.source}: no such repository, or no safetensors in it",
                expected=f"{SINGLE} or {INDEX}",
                fix="Check the name; for GGUF, download the file and pass its path.",
            )
        return SkvError(f"{self.source}/{name}: the file is missing", fix="Download the checkpoint completely.")

    def _exists(self, name: str) -> bool:
        try:
            self._remote(name)
        except FileNotFoundError:
            return False
        return True

    def _json(self, name: str) -> dict[str, Any]:
        """Reads a JSON object of the checkpoint; FileNotFoundError if an optional one is not there."""
        file: LocalFile | RemoteFile
        if self.source.path is None:
            file = self._remote(name)
        elif (self.source.path / name).is_file():
            file = LocalFile(self.source.path / name)
        else:
            raise FileNotFoundError(name)
        if file.size > MAX_JSON_BYTES:
            raise SkvError(f"{file.name}: too large", got=file.size, expected=f"at most {MAX_JSON_BYTES} bytes")
        try:
            value = json.loads(bytes(file.read(0, file.size)).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise SkvError(f"{file.name}: not valid JSON", got=str(error)[:200], fix="Download it again.") from error
        if not isinstance(value, dict):
            raise SkvError(f"{file.name}: no JSON object", got=type(value).__name__)
        return value
