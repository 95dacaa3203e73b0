"""A calibration in a file: safetensors with three matrices per layer, tied to the checkpoint that they were made for.

The tensors ``layers.N.key_basis``, ``layers.N.query_basis`` and ``layers.N.key_feedback``, float32 ``[N_kv, D, D]``,
are the op's inputs of these names; an exported graph refers to the file's bytes as they are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from skv_export.checkpoints.checkpoint import Checkpoint, Source
from skv_export.checkpoints.tensor_files import LocalFile, TensorEntry, read_header, read_metadata
from skv_export.errors import SkvError
from skv_export.model_folder.output import output_file
from skv_export.paths import to_path
from skv_export.spec.key_basis import INPUTS, MATRICES, KeyBasis
from skv_export.spec.recipe import MAX_HEAD_DIM, MAX_LAYERS

FORMAT, VERSION = "skv-calibration", "1"
_SAMPLE_BYTES = 4096
_NAME = re.compile(r"layers\.(0|[1-9]\d{0,5})\.(\w+)")
_FIX = "Make it again with `skv-export calibrate`."
_INVERSE_TOLERANCE = 1e-2
"""Of ``key @ query^T``, which is the identity but for float32's rounding."""


@dataclass(frozen=True)
class Calibration:
    """Constants of a model's layers.

    Attributes:
        bases: By layer.
        checkpoint: Fingerprint of the checkpoint.
        about: What they were measured on, for readers.
    """

    bases: Mapping[int, KeyBasis]
    checkpoint: str
    about: Mapping[str, str]

    def check(self, source: Source) -> None:
        """Raises SkvError unless these are the constants of this checkpoint, whose files must be on this disk."""
        found = fingerprint(source)
        if found != self.checkpoint:
            raise SkvError(
                f"calibration: made for another checkpoint than {source}",
                got=f"fingerprint {self.checkpoint[:16]}",
                expected=found[:16],
                fix="Run `skv-export calibrate` on this one.",
            )

    def save(self, path: Path | str) -> None:
        """Writes the file, complete or not at all."""
        from safetensors.numpy import save_file

        tensors = {
            f"layers.{layer}.{name}": np.ascontiguousarray(getattr(basis, field))
            for layer, basis in self.bases.items()
            for name, field in zip(INPUTS, MATRICES, strict=True)
        }
        about = {**self.about, "format": FORMAT, "version": VERSION, "checkpoint": self.checkpoint}
        with output_file(path) as scratch:
            save_file(tensors, scratch, about)

    @classmethod
    def load(cls, path: Path | str) -> Calibration:
        """Reads a file.

        Raises:
            SkvError: Missing, damaged, of another version, or no calibration; the message says which tensor is wrong.
        """
        place = to_path(path, "calibration")
        entries, about = _open(place)
        bases = {}
        for layer, matrices in _by_layer(place, entries).items():
            basis = KeyBasis(*(matrices[name].array() for name in INPUTS))
            product = basis.key @ basis.query.swapaxes(-1, -2)
            if not np.abs(product - np.eye(product.shape[-1], dtype=np.float32)).max() < _INVERSE_TOLERANCE:
                raise SkvError(f"{place}: layer {layer}: query_basis is not key_basis' inverse, transposed", fix=_FIX)
            bases[layer] = basis
        return cls(bases, about.pop("checkpoint"), about)


def entries_of(path: Path) -> dict[int, dict[str, TensorEntry]]:
    """Where a file's matrices stand: by layer, then by the op's names of its inputs.

    Raises:
        SkvError: See ``Calibration.load``.
    """
    return _by_layer(path, _open(path)[0])


def fingerprint(source: Source) -> str:
    """SHA-256 of every tensor's name, type, shape and first bytes: tells a model from one that was tuned further."""
    hashed = hashlib.sha256()
    for name, entry in sorted(Checkpoint.open(source).entries.items()):
        hashed.update(f"{name} {entry.dtype} {entry.shape}".encode())
        hashed.update(entry.file.read(entry.start, min(entry.stop, entry.start + _SAMPLE_BYTES)))
    return hashed.hexdigest()


def _open(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    if not path.is_file():
        raise SkvError(f"calibration {path}: no such file", fix=_FIX)
    file = LocalFile(path)
    entries, about = read_header(file), read_metadata(file)
    given: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    if {name: about.get(name) for name in given} != given or "checkpoint" not in about:
        got = f"{about.get('format', 'no format')} {about.get('version', '')}".strip()
        raise SkvError(f"{path}: not a calibration of this version", got=got, expected=f"{FORMAT} {VERSION}", fix=_FIX)
    return entries, about


def _by_layer(path: Path, entries: Mapping[str, TensorEntry]) -> dict[int, dict[str, TensorEntry]]:
    layers: dict[int, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        match = _NAME.fullmatch(name)
        if match is None or match[2] not in INPUTS or int(match[1]) >= MAX_LAYERS:
            raise SkvError(
                f"{path}: tensor {name[:80]!r}", expected=f"layers.N. and one of {', '.join(INPUTS)}", fix=_FIX
            )
        square = len(entry.shape) == 3 and entry.shape[1] == entry.shape[2]
        if entry.dtype != "F32" or not square or not 1 <= entry.shape[1] <= MAX_HEAD_DIM or entry.shape[0] < 1:
            got, expected = f"{entry.dtype} {list(entry.shape)}", f"F32 [N_kv, D, D], D of 1 ... {MAX_HEAD_DIM}"
            raise SkvError(f"{path}: tensor {name}", got=got, expected=expected, fix=_FIX)
        layers.setdefault(int(match[1]), {})[match[2]] = entry
    for layer, matrices in layers.items():
        if set(matrices) != set(INPUTS):
            raise SkvError(
                f"{path}: layer {layer}", got=", ".join(sorted(matrices)), expected=", ".join(INPUTS), fix=_FIX
            )
    if not layers:
        raise SkvError(f"{path}: no layer in it", fix=_FIX)
    return dict(sorted(layers.items()))
