"""A cache as a file: written complete or not at all, and checked before it is believed.

The file is in the safetensors format. Sequence ``b`` has the tensors ``b.tokens`` (int32) and, for each layer and name,
``b.LAYER.key.tiles`` ``[N_kv, tiles, tile_bytes]`` and ``b.LAYER.key.rows`` ``[N_kv, R * row_bytes]`` (bytes, as
docs/spec.md lays them out); for each recurrent state ``b.state.LAYER.NAME`` (float32). The metadata says which model
and which layouts they are of, how long the sequences are, and has the SHA-256 of the whole file with zeros in the
digest's place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from skv_export.checkpoints.tensor_files import LocalFile, TensorEntry, read_header, read_metadata
from skv_export.errors import SkvError
from skv_export.model_folder.names import CALIBRATION_FILE, DATA_FILE, MODEL_FILE, TENSORS
from skv_export.model_folder.output import output_file
from skv_export.model_folder.skv_config import LayerCache
from skv_export.paths import to_path
from skv_export.runtime import arrays
from skv_export.runtime.cache import Cache
from skv_export.runtime.cache_state import Key, TensorState, held_tiles
from skv_export.spec.layout import LAYOUT_VERSION, CacheLayout
from skv_export.spec.state import LayerState

if TYPE_CHECKING:
    from skv_export.runtime.session import Session

FORMAT = "skv_cache"
FORMAT_VERSION = "1"
MAX_SEQUENCES = 1 << 16
_NO_DIGEST = "0" * 64
_SAMPLES, _SAMPLE_BYTES = 256, 4096
_BLOCK_BYTES = 1 << 20
_FIX = "Save the cache again, with this model."


def model_digest(folder: Path) -> str:
    """Returns what tells a folder's model from others: SHA-256 over its graph and evenly spaced samples of its weights.

    Args:
        folder: The exported folder.
    """
    digest = hashlib.sha256((folder / MODEL_FILE).read_bytes())
    if (folder / CALIBRATION_FILE).is_file():
        digest.update((folder / CALIBRATION_FILE).read_bytes())
    weights = folder / DATA_FILE
    if weights.is_file():
        size = weights.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with weights.open("rb") as file:
            for i in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def layouts_digest(layers: Iterable[LayerCache]) -> str:
    """Returns the SHA-256 of all layers' layouts and heads."""
    text = json.dumps([dataclasses.asdict(layer) for layer in layers], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def save(cache: Cache, path: Path | str) -> None:
    """Writes a cache; see ``Cache.save``."""
    sizes = [
        _Sizes(len(tokens), cache.longest(b), int(cache.dropped[b]), int(cache.chosen[b]))
        for b, tokens in enumerate(cache.tokens)
    ]
    metadata = _metadata(cache, sizes)
    table = _table(cache.layers, cache.recurrent, cache.max_length, sizes)
    header = _header(table, metadata)
    digest = hashlib.sha256(header)
    with output_file(path) as scratch, scratch.open("wb") as file:
        file.write(header)
        for data in _payload(cache):
            digest.update(data)
            file.write(data)
        file.seek(0)
        file.write(header.replace(_NO_DIGEST.encode(), digest.hexdigest().encode(), 1))


def load(session: Session, path: Path | str, room: int | None = None) -> Cache:
    """Reads a cache; see ``Session.load_cache``."""
    source, context = to_path(path, "saved cache"), session.config.context_length
    if not source.is_file():
        raise SkvError(f"{source}: no such file", expected="what cache.save wrote")
    if room is not None and room < 0:
        raise SkvError("load_cache: room", got=room, expected="a number of tokens, or None")
    layers = session.config.layers
    try:
        file = LocalFile(source)
        entries, metadata = read_header(file), read_metadata(file)
        sizes, max_length = _checked(source, metadata, context)
        _check_model(source, metadata, session)
        table = _table(layers, session.config.states, max_length, sizes)
        found = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
        if found != table:
            odd = next(name for name in (table | found) if table.get(name) != found.get(name))
            raise _damaged(source, f"tensor {odd}", found.get(odd), table.get(odd))
        _check_digest(source, file, metadata["sha256"])
        length, held = max(x.length for x in sizes), max(x.held for x in sizes)
        wanted = context - length + held if room is None else held + room
        if wanted - held > context - length:
            raise SkvError(f"{source}: room behind {length} tokens", got=room, expected=context - length)
        cache = session.cache(len(sizes), max(wanted, *(x.longest for x in sizes), 1))
        _fill(cache, entries, sizes)
    except OSError as error:
        raise SkvError(f"{source}: can't be read", got=error.strerror or str(error)) from error
    if switch := session.config.rope_switch:
        cache.second_rope[:] = [cache.longest(b) > switch for b in range(cache.batch)]
    least = arrays.NO_TOKEN if session.config.inputs_embeds else 0
    unknown = [token for row in cache.tokens for token in row if not least <= token < session.config.vocab_size]
    if unknown:
        raise _damaged(source, "tokens", unknown[:4], f"0 ... {session.config.vocab_size - 1}")
    return cache


def _check_model(source: Path, metadata: dict[str, str], session: Session) -> None:
    ours = {"model": model_digest(session.folder), "layouts": layouts_digest(session.config.layers)}
    for name, what in (("layouts", "other layouts"), ("model", "another model")):
        if metadata[name] != ours[name]:
            raise SkvError(
                f"{source}: a cache of {what}", got=f"digest {metadata[name][:12]}", expected=ours[name][:12], fix=_FIX
            )


class _Sizes(NamedTuple):
    """A sequence's tokens, the most in its buffers so far, and those that were left out and chosen; see ``Cache``."""

    length: int
    longest: int
    dropped: int
    chosen: int

    @property
    def held(self) -> int:
        return self.length - self.dropped

    @property
    def possible(self) -> bool:
        return 0 <= self.chosen <= self.held <= self.longest and (self.dropped > 0 or self.chosen == 0)


_LISTS = {"lengths": "length", "longest": "longest", "dropped": "dropped", "chosen": "chosen"}
"""Lists in the metadata, and what of each sequence they hold."""


def _metadata(cache: Cache, sizes: Sequence[_Sizes]) -> dict[str, str]:
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "layout_version": str(LAYOUT_VERSION),
        "model": cache.model(),
        "layouts": layouts_digest(cache.layers),
        **{name: json.dumps([getattr(x, field) for x in sizes]) for name, field in _LISTS.items()},
        "max_length": str(cache.max_length),
        "sha256": _NO_DIGEST,
    }


def _checked(source: Path, metadata: dict[str, str], context: int) -> tuple[list[_Sizes], int]:
    """The sequences' sizes and max_length out of the metadata, all of them possible."""
    if metadata.get("format") != FORMAT:
        raise SkvError(f"{source}: no saved cache", got=metadata.get("format"), expected=f"format {FORMAT}")
    for name, version in (("format_version", FORMAT_VERSION), ("layout_version", str(LAYOUT_VERSION))):
        if metadata.get(name) != version:
            raise SkvError(f"{source}: {name}", got=metadata.get(name), expected=version, fix=_FIX)
    missing = {"model", "layouts", "max_length", "sha256", *_LISTS} - metadata.keys()
    if missing:
        raise _damaged(source, "metadata", f"no {', '.join(sorted(missing))}", "all of them")
    try:
        lists = [json.loads(metadata[name]) for name in _LISTS]
        max_length = int(metadata["max_length"])
        numbers = [n for numbers in lists for n in numbers]
        sizes = [_Sizes(*numbers) for numbers in zip(*lists, strict=True)]
        possible = (
            all(type(n) is int and 0 <= n <= context for n in numbers)
            and all(x.possible for x in sizes)
            and 1 <= len(sizes) <= MAX_SEQUENCES
            and 1 <= max_length <= context
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise _damaged(source, "metadata", str(error)[:100], "lengths") from error
    if not possible:
        raise _damaged(source, "lengths", str(numbers)[:100], f"as many of each, and at most {context} tokens")
    return sizes, max_length


def _table(
    layers: Sequence[LayerCache], states: Sequence[LayerState], max_length: int, sizes: Sequence[_Sizes]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of a file, in order: name -> type and shape."""
    table: dict[str, tuple[str, tuple[int, ...]]] = {}
    for b, size in enumerate(sizes):
        table[f"{b}.tokens"] = "I32", (size.length,)
        for i, layer in enumerate(layers):
            for name, layout in zip(TENSORS, (layer.key, layer.value), strict=True):
                heads, tiles = layer.num_key_value_heads, len(_held(layout, max_length, size))
                table[f"{b}.{i}.{name}.tiles"] = "U8", (heads, tiles, layout.tile_bytes)
                table[f"{b}.{i}.{name}.rows"] = "U8", (heads, layout.full_rows * layout.row_bytes)
        for state in states:
            table[f"{b}.state.{state.layer}.{state.name}"] = "F32", state.shape
    return table


def _held(layout: CacheLayout, max_length: int, size: _Sizes) -> range:
    return held_tiles(layout, math.prod(layout.shape(max_length)), size.held, size.longest)


def _header(table: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, (dtype, shape) in table.items():
        size = math.prod(shape) * (1 if dtype == "U8" else 4)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _payload(cache: Cache) -> Iterable[bytes | memoryview]:
    for b, tokens in enumerate(cache.tokens):
        yield np.array(tokens, "<i4").tobytes()
        for key in _keys(cache):
            state = cache.tensor_state(b, key)
            yield np.ascontiguousarray(state.tiles).reshape(-1).data
            yield state.rows.reshape(-1).data
        states = cache.states.of(b)
        yield from (states[x.layer, x.name].astype("<f4").tobytes() for x in cache.recurrent)


def _keys(cache: Cache) -> list[Key]:
    return [(i, name) for i in range(len(cache.layers)) for name in TENSORS]


def _check_digest(source: Path, file: LocalFile, given: str) -> None:
    digest, header = hashlib.sha256(), 8 + int.from_bytes(file.read(0, 8), "little")
    digest.update(bytes(file.read(0, header)).replace(given.encode(), _NO_DIGEST.encode(), 1))
    for start in range(header, file.size, _BLOCK_BYTES):
        digest.update(file.read(start, min(start + _BLOCK_BYTES, file.size)))
    if digest.hexdigest() != given:
        raise _damaged(source, "SHA-256", digest.hexdigest()[:12], given[:12])


def _fill(cache: Cache, entries: dict[str, TensorEntry], sizes: Sequence[_Sizes]) -> None:
    """Reads the tensors into the cache's buffers, one at a time."""
    for b, size in enumerate(sizes):
        for key in _keys(cache):
            tiles, rows = (entries[f"{b}.{key[0]}.{key[1]}.{part}"].array() for part in ("tiles", "rows"))
            layer = cache.layers[key[0]]
            layout = layer.key if key[1] == TENSORS[0] else layer.value
            first = layout.quantized_tokens(size.held) // layout.tile_tokens - tiles.shape[1]
            cache.restore_tensor(b, key, [TensorState(first, tiles, rows)], size.held)
        tokens = entries[f"{b}.tokens"].array().tolist()
        cache.note_restored(b, tokens, size.longest, size.dropped, size.chosen)
        keys = [(x.layer, x.name) for x in cache.recurrent]
        cache.states.put(b, {key: entries[f"{b}.state.{key[0]}.{key[1]}"].array() for key in keys})


def _damaged(source: Path, what: str, got: object, expected: object) -> SkvError:
    return SkvError(f"{source}: damaged: {what}", got=got, expected=expected, fix=_FIX)
