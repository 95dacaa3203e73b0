"""LoRA adapters as peft writes them, merged into a checkpoint's tensors as those are read: rows by rows, in float32.

``W' = W + s B A`` with ``s = alpha / r``, or ``alpha / sqrt(r)`` (rank-stabilized, arXiv 2312.03732); DoRA scales each
output's row to its own magnitude, ``m (W + s B A) / |W + s B A|`` (arXiv 2402.09353). Tensors that were trained whole
(``modules_to_save``, biases) take the place of the checkpoint's. What an adapter says beyond that is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skv_export.checkpoints.tensor_files import LocalFile, TensorEntry, read_header
from skv_export.errors import SkvError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_MAX_CONFIG_BYTES = 1 << 20
_MERGE = "Merge it with peft (merge_and_unload), save the model, and export that."
_USED = {
    "alpha_pattern", "bias", "ensure_weight_tying", "fan_in_fan_out", "init_lora_weights", "lora_alpha",
    "modules_to_save", "peft_type", "r", "rank_pattern", "use_dora", "use_rslora",
}  # fmt: skip
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
"""Which modules have an adapter, and how it was trained: the file's tensors say the first, and the second is past."""
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "true", "false")
"""Ways to begin that leave the base model's weights as they are; the others change them."""
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt")
"""Architectures whose projections are stored ``[in, out]`` (Conv1D)."""
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.default)?(\.weight)?"
)
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_HEADS = ("lm_head.weight", "embed_out.weight")
_Matrix = NDArray[np.float32]


def base_of(folder: Path) -> str:
    """Returns the base model that an adapter names; "" if it names none."""
    return str(read_config(folder).get("base_model_name_or_path") or "")


def refuse_beside(folder: Path) -> None:
    """Refuses a model's folder with an adapter that was not asked for: transformers would add it, with peft."""
    if not (folder / CONFIG).is_file():
        return
    kind, base = read_config(folder).get("peft_type", "of peft"), base_of(folder) or "its base model"
    raise SkvError(
        f"{folder}: {CONFIG}: an adapter ({kind}) of {base}",
        expected="a model alone, or --adapter",
        fix=f"Pass --adapter {folder} to merge it into the weights, or remove {CONFIG} to export the model without it.",
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Reads an adapter's configuration.

    Raises:
        SkvError: Missing, too large, or no JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise SkvError(f"{folder}: no {CONFIG}", expected="a folder that peft's save_pretrained wrote")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise SkvError(f"{path}: too large", got=path.stat().st_size, expected=f"at most {_MAX_CONFIG_BYTES} bytes")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SkvError(f"{path}: not valid JSON", got=str(error)[:200]) from error
    if not isinstance(values, dict):
        raise SkvError(f"{path}: no JSON object", got=type(values).__name__)
    return values


@dataclass
class _Parts:
    """An adapter's tensors for one module, by the part's name."""

    module: str
    tensors: dict[str, TensorEntry] = field(default_factory=dict)


class Adapter:
    """An adapter in a folder.

    Args:
        folder: What peft's ``save_pretrained`` wrote.
        model_type: The base model's.

    Raises:
        SkvError: No LoRA, a pickle, or options whose arithmetic is not known here.
    """

    def __init__(self, folder: Path, model_type: str) -> None:
        self.folder, self._transposed = folder, model_type in _TRANSPOSED
        self._config = read_config(folder)
        self._check_config()
        if not (folder / WEIGHTS).is_file():
            pickle = (folder / _PICKLE).is_file()
            raise SkvError(
                f"{folder}: " + (f"{_PICKLE} is a pickle; loading one runs any code in it" if pickle else "no weights"),
                expected=WEIGHTS,
                fix="Save the adapter with peft's save_pretrained(FOLDER), which writes safetensors.",
            )
        self._modules: dict[str, _Parts] = {}
        self._whole: dict[str, TensorEntry] = {}
        for name, entry in read_header(LocalFile(folder / WEIGHTS)).items():
            plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            plain = re.sub(r"\.modules_to_save(\.default)?\.", ".", plain)
            if match := _PART.fullmatch(plain):
                module = match["module"]
                self._modules.setdefault(module, _Parts(module)).tensors[match["part"]] = entry
            elif "lora_" in plain:
                raise self._unknown(f"tensor {name}")
            else:
                self._whole[plain] = entry
        if not self._modules and not self._whole:
            raise SkvError(f"{folder}/{WEIGHTS}: no tensors in it")

    def merged(self, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
        """Returns a checkpoint's tensors with the adapter in them; none is read before it is asked for.

        Raises:
            SkvError: The adapter is another model's: a tensor has no counterpart, or another shape.
        """
        made = dict(entries)
        self._separate_head(made)
        for name, entry in self._whole.items():
            known = self._find(made, name, required=not name.endswith(_HEADS))
            if known in made and made[known].shape != entry.shape:
                raise self._misfit(name, entry.shape, made[known].shape)
            made[known] = entry
        for module, parts in self._modules.items():
            name = self._find(made, f"{module}.weight", required=True)
            weight = self._weight(made[name], parts)
            made[name] = TensorEntry(name, "F32", weight.shape, weight, 0, weight.size)
        return made

    def _separate_head(self, made: dict[str, TensorEntry]) -> None:
        """Gives a tied output embedding, which stands in no file, a tensor of its own if one of the two changes."""
        changed = [*self._whole, *(f"{module}.weight" for module in self._modules)]
        embeddings = [name for name in made if name.endswith(_EMBEDDINGS)]
        touched = any(name.endswith((*_HEADS, *_EMBEDDINGS)) for name in changed)
        if not touched or len(embeddings) != 1 or any(name.endswith(_HEADS) for name in made):
            return
        if not self._config.get("ensure_weight_tying"):
            head = next((name for name in changed if name.endswith(_HEADS)), _HEADS[0])
            made[head] = made[embeddings[0]]

    def _weight(self, base: TensorEntry, parts: _Parts) -> MergedWeight:
        found = {part.replace("embedding_", ""): entry for part, entry in parts.tensors.items()}
        embedding = "lora_embedding_A" in parts.tensors
        dora = bool(self._config.get("use_dora"))
        wanted = {"lora_A", "lora_B", *(["lora_magnitude_vector"] if dora else [])}
        if found.keys() != wanted:
            raise SkvError(
                f"{self.folder}/{WEIGHTS}: {parts.module}",
                got=", ".join(sorted(found)),
                expected=", ".join(sorted(wanted)),
                fix="Save the adapter again.",
            )
        if dora and embedding:
            raise self._unknown("use_dora on an embedding")
        a, b = found["lora_A"], found["lora_B"]
        transposed = embedding or self._transposed
        shape = base.shape[::-1] if transposed else base.shape
        rank = self._pattern("rank_pattern", parts.module, self._config.get("r"))
        if len(base.shape) != 2 or not base.dtype.startswith(("F", "BF")):
            raise self._misfit(parts.module, (b.shape[0], a.shape[-1]), base.shape)
        if a.shape != (rank, shape[1]) or b.shape != (shape[0], rank):
            raise self._misfit(parts.module, (b.shape[:1], a.shape), (shape[0], (rank, shape[1])))
        alpha = self._pattern("alpha_pattern", parts.module, self._config.get("lora_alpha"))
        scale = alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
        magnitude = found.get("lora_magnitude_vector")
        if magnitude is not None and math.prod(magnitude.shape) != shape[0]:
            raise self._misfit(f"{parts.module}.lora_magnitude_vector", magnitude.shape, (shape[0],))
        return MergedWeight(base, a, b, scale, transposed, magnitude)

    def _pattern(self, option: str, module: str, default: Any) -> Any:
        """The value of a module: of the first pattern that its name ends with, as peft has it, or the default."""
        given = self._config.get(option) or {}
        value = next((v for key, v in given.items() if re.match(rf"(.*\.)?({key})$", module)), default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise SkvError(
                f"{self.folder}/{CONFIG}: {option}, r or lora_alpha", got=repr(value)[:50], expected="above 0"
            )
        return value

    def _find(self, entries: Mapping[str, TensorEntry], name: str, *, required: bool) -> str:
        """The checkpoint's name of a tensor: the same, or one of them without the other's prefix."""
        if name in entries:
            return name
        near = [other for other in entries if other.endswith(f".{name}") or name.endswith(f".{other}")]
        if len(near) == 1:
            return near[0]
        if required:
            raise SkvError(
                f"{self.folder}: an adapter of another model: the checkpoint has no tensor {name}",
                got=f"{len(entries)} others, such as {', '.join(sorted(entries)[:2])}",
                fix="Pass the model that it was made for.",
            )
        return name

    def _misfit(self, name: str, got: object, expected: object) -> SkvError:
        return SkvError(
            f"{self.folder}: an adapter of another model: {name}",
            got=f"shapes {got}",
            expected=f"{expected}, in full precision",
            fix="Pass the model that it was made for, in full precision.",
        )

    def _unknown(self, what: str) -> SkvError:
        return SkvError(f"{self.folder}: an adapter that can't be merged here: {what}", fix=_MERGE)

    def _check_config(self) -> None:
        config = self._config
        if str(config.get("peft_type")).upper() != "LORA":
            raise self._unknown(f"peft_type {config.get('peft_type')!r}; only LORA is known")
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = config.get(name) or {}
            if not isinstance(patterns, dict) or not all(_is_simple(key) for key in patterns):
                got = repr(patterns)[:100]
                raise SkvError(
                    f"{self.folder}/{CONFIG}: {name}", got=got, expected="names of modules, or simple patterns"
                )
        if config.get("init_lora_weights") not in _PLAIN_INITS:
            raise self._unknown(f"init_lora_weights {config['init_lora_weights']!r} changed the base model's weights")
        others = [name for name, value in config.items() if value and name not in _USED | _HARMLESS]
        if others:
            raise self._unknown(", ".join(sorted(others)))


def _is_simple(pattern: str) -> bool:
    """Whether a regular expression can be tried on a name without its taking for ever."""
    if not re.fullmatch(r"[\w.^$\\|()*-]{1,300}", pattern) or ")*" in pattern or pattern.count("*") > 3:
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


class MergedWeight:
    """A matrix with its adapter, as a file of float32 whose rows are computed when they are read.

    Args:
        base: ``[out, in]``; ``[in, out]`` if ``transposed``.
        a: ``[r, in]``.
        b: ``[out, r]``.
        scale: Of the product.
        transposed: Whether the base is stored with its inputs first, as embeddings are.
        magnitude: DoRA's, of ``out`` numbers.
    """

    def __init__(
        self,
        base: TensorEntry,
        a: TensorEntry,
        b: TensorEntry,
        scale: float,
        transposed: bool,
        magnitude: TensorEntry | None,
    ) -> None:
        self.name, self.shape = f"{base.file.name}: {base.name} with its adapter", base.shape
        self.size = math.prod(base.shape) * 4
        self._base, self._a, self._b, self._scale = base, a, b, scale
        self._transposed, self._magnitude = transposed, magnitude

    def read(self, start: int, stop: int) -> memoryview:
        """Returns bytes ``start ... stop - 1`` of the merged matrix."""
        width = 4 * self.shape[1]
        first, last = start // width, -(-stop // width)
        rows = self._rows(first, last)
        if self._magnitude is not None:
            factors = self._factors
            rows *= factors if self._transposed else factors[first:last, None]
        return memoryview(rows.view(np.uint8).reshape(-1).data)[
            start - first * width : stop - first * width
        ].toreadonly()

    def release(self, start: int, stop: int) -> None:
        """Nothing is kept."""

    def _rows(self, first: int, last: int) -> _Matrix:
        """Rows of ``W + s B A`` as they are stored."""
        item = self._base.nbytes // self._base.shape[0]
        where = self._base.start + first * item, self._base.start + last * item
        stored = TensorEntry(self._base.name, self._base.dtype, (last - first, self.shape[1]), self._base.file, *where)
        a, b = (entry.array().astype(np.float32) for entry in (self._a, self._b))
        product = a[:, first:last].T @ b.T if self._transposed else b[first:last] @ a
        return np.ascontiguousarray(stored.array().astype(np.float32) + np.float32(self._scale) * product)

    @cached_property
    def _factors(self) -> _Matrix:
        """Magnitude over the norm of each output."""
        assert self._magnitude is not None
        count = self.shape[1] if self._transposed else self.shape[0]
        squares = np.zeros(count)
        for first in range(0, self.shape[0], 1024):
            rows = self._rows(first, min(first + 1024, self.shape[0])).astype(np.float64) ** 2
            if self._transposed:
                squares += rows.sum(0)
            else:
                squares[first : first + len(rows)] = rows.sum(1)
        magnitude = self._magnitude.array().astype(np.float64).reshape(-1)
        factors: _Matrix = (magnitude / np.sqrt(squares)).astype(np.float32)
        return factors
