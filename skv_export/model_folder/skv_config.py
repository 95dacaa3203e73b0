"""``skv_config.json``, the description of an exported folder: reading with checks, and writing."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skv_export import __version__
from skv_export.errors import SkvError
from skv_export.model_folder.names import RECIPE_FILE, SKV_CONFIG_FILE
from skv_export.paths import to_path
from skv_export.spec.key_basis import can_be_calibrated
from skv_export.spec.layout import CacheLayout
from skv_export.spec.op import LayerAttention
from skv_export.spec.recipe import LayerConfig, Recipe
from skv_export.spec.state import MAX_LAYER, LayerState

FORMAT_VERSION = 1
"""Version of ``skv_config.json``."""
MAX_JSON_BYTES = 64 << 20
MAX_VOCAB = 1 << 24
MAX_CONTEXT = 1 << 28
MAX_HEADS = 1 << 16
MAX_HEAD_DIM = 1024
MAX_HIDDEN = 1 << 20


@dataclass(frozen=True)
class LayerCache:
    """One layer's cache.

    Attributes:
        num_attention_heads: N.
        num_key_value_heads: N_kv.
        local_window_size: Tokens a query sees, itself included; 0 = all.
        key: Layout of the keys.
        value: Layout of the values.
        calibrated: Whether tiles of keys have a basis of their own; ``CALIBRATION_FILE`` holds it.
    """

    num_attention_heads: int
    num_key_value_heads: int
    local_window_size: int
    key: CacheLayout
    value: CacheLayout
    calibrated: bool = False

    @classmethod
    def of(cls, layer: LayerAttention, calibrated: bool = False) -> LayerCache:
        """Returns the cache of a layer's attention."""
        params = layer.params
        return cls(params.num_heads, params.kv_num_heads, params.local_window_size, *layer.layouts, calibrated)


@dataclass(frozen=True)
class ModelConfig:
    """``skv_config.json``: what a runtime must know to hold the cache and to stop.

    Attributes:
        model_type: Architecture, by Hugging Face's name.
        dtype: Number format of activations: ``fp32``, ``fp16`` or ``bf16``.
        vocab_size: Columns of the logits.
        context_length: Tokens that the model was trained for.
        bos_token_id: First token, if the model has one.
        eos_token_id: Tokens that end a sequence.
        pad_token_id: Token that fills finished sequences.
        all_logits: The graph returns every position's logits, not only the last one's.
        source: What the folder was exported from: ``kind``, ``name``, ``revision``, ``sha256``.
        layers: The cache of each layer that has one.
        right_padded: The graph takes padding on the right only (a rewritten one); else on either side.
        weights: ``int8`` or ``int4`` where the export quantized weights; else "".
        quantize_head: Whether the output embedding is among them.
        quantize_embeddings: Whether the input embedding is.
        inputs_embeds: Channels of the embeddings that the graph takes in place of tokens; 0 = it takes none.
        position_axes: Positions of a token: 3 with multimodal RoPE, whose ``position_ids`` are ``[3, B, S]``; else 1.
        rope_switch: The longest sequence that has longrope's first set of frequencies: beyond it a sequence runs anew;
            0 = there is one set.
        dynamic_rope: RoPE's frequencies grow with the length (dynamic NTK): a key has those of the call it came in.
        indices: Numbers in the model of ``layers``, rising; empty = from 0 on.
        num_hidden_layers: Layers with a cache or a state of their own; 0 = as many as ``layers``.
        states: Recurrent states of the layers that have them.
    """

    model_type: str
    dtype: str
    vocab_size: int
    context_length: int
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]
    pad_token_id: int | None
    all_logits: bool
    source: Mapping[str, Any]
    layers: tuple[LayerCache, ...]
    right_padded: bool = False
    weights: str = ""
    quantize_head: bool = True
    quantize_embeddings: bool = False
    inputs_embeds: int = 0
    position_axes: int = 1
    rope_switch: int = 0
    dynamic_rope: bool = False
    indices: tuple[int, ...] = ()
    num_hidden_layers: int = 0
    states: tuple[LayerState, ...] = ()

    @property
    def by_index(self) -> dict[int, LayerCache]:
        """``layers`` by their numbers in the model, which are those in the names of the graph's inputs and outputs."""
        return dict(zip(self.indices or range(len(self.layers)), self.layers, strict=True))

    @property
    def keeps_guesses(self) -> str:
        """Why tokens that are taken back leave something behind; "" = they don't."""
        if self.states:
            return "a model with recurrent layers"
        if self.dynamic_rope or self.rope_switch:
            return "a model whose RoPE depends on the length: keys keep the frequencies of the call they came in"
        return ""

    @property
    def state_bytes(self) -> int:
        """Bytes of one sequence's recurrent states, whatever its length."""
        return sum(state.nbytes for state in self.states)

    @property
    def bits(self) -> str:
        """The layers' bits in a word: ``K4V2``, or ``K4V2 (28 layers), K8V4 (2)``."""
        counts = Counter(f"K{layer.key.bits}V{layer.value.bits}" for layer in self.layers)
        if len(counts) == 1:
            return next(iter(counts))
        (first, count), *rest = counts.most_common()
        return ", ".join([f"{first} ({count} layers)", *(f"{name} ({number})" for name, number in rest)])

    @classmethod
    def load(cls, folder: Path | str) -> ModelConfig:
        """Reads ``skv_config.json`` of an exported folder.

        Raises:
            SkvError: Missing, damaged, or of another version; the message names the file and the key.
        """
        path = to_path(folder, "exported folder") / SKV_CONFIG_FILE
        values = read_json(path, fix="Export the model with `skv-export model`.")
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise SkvError(
                f"{path}: format_version",
                got=repr(version),
                expected=FORMAT_VERSION,
                fix=f"Export again, or install skv_export {values.get('skv_version', 'of the version that wrote it')}.",
            )
        try:
            layers = tuple(_layer_cache(layer) for layer in values["layers"])
            states = tuple(LayerState(x["layer"], x["name"], tuple(x["shape"])) for x in values.get("states", ()))
            count = _number(values, "num_hidden_layers", 1, MAX_LAYER)
            indices = tuple(_number({"layer": i, **x}, "layer", 0, count - 1) for i, x in enumerate(values["layers"]))
            if (not states and len(layers) != count) or sorted({*indices}) != [*indices]:
                raise ValueError(f"{len(layers)} layers listed, num_hidden_layers is {count}")
            if values["logits"] not in ("last", "all"):
                raise ValueError(f"logits is {values['logits']!r}, neither 'last' nor 'all'")
            if values.get("padding", "any") not in ("any", "right"):
                raise ValueError(f"padding is {values['padding']!r}, neither 'any' nor 'right'")
            eos = values["eos_token_id"]
            ends = [] if eos is None else eos if isinstance(eos, list) else [eos]
            return cls(
                model_type=_text(values, "model_type"),
                dtype=_text(values, "dtype"),
                vocab_size=_number(values, "vocab_size", 1, MAX_VOCAB),
                context_length=_number(values, "context_length", 1, MAX_CONTEXT),
                bos_token_id=_token(values["bos_token_id"]),
                eos_token_id=tuple(token for token in map(_token, ends) if token is not None),
                pad_token_id=_token(values["pad_token_id"]),
                all_logits=values["logits"] == "all",
                source=dict(values["source"]),
                layers=layers,
                right_padded=values.get("padding") == "right",
                weights=_text({"weights": "", **values}, "weights"),
                quantize_head=bool(values.get("quantize_head", True)),
                quantize_embeddings=bool(values.get("quantize_embeddings", False)),
                inputs_embeds=_number({"inputs_embeds": 0, **values}, "inputs_embeds", 0, MAX_HIDDEN),
                position_axes=_number({"position_axes": 1, **values}, "position_axes", 1, 3),
                rope_switch=_number({"rope_switch": 0, **values}, "rope_switch", 0, MAX_CONTEXT),
                dynamic_rope=bool(values.get("dynamic_rope", False)),
                indices=indices,
                num_hidden_layers=count,
                states=states,
            )
        except (AttributeError, KeyError, TypeError, ValueError, SkvError) as error:
            got = f"no key {error}" if isinstance(error, KeyError) else str(error)
            raise SkvError(f"{path}: damaged", got=got, fix="Export the model again.") from error

    def to_dict(self, hidden_size: int) -> dict[str, Any]:
        """Returns the content of ``skv_config.json``; ``load`` gives an equal configuration.

        Args:
            hidden_size: Channels of the hidden state: for readers, the runtime does not need it.
        """
        values = dataclasses.asdict(self)
        del values["all_logits"], values["right_padded"], values["indices"]
        for written, (i, layer) in zip(values["layers"], self.by_index.items(), strict=True):
            written["layer"] = i
            written["key"], written["value"] = layout_entry(layer.key), layout_entry(layer.value)
        return {
            "format_version": FORMAT_VERSION,
            "skv_version": __version__,
            **values,
            "hidden_size": hidden_size,
            "num_hidden_layers": self.num_hidden_layers or len(self.layers),
            "logits": "all" if self.all_logits else "last",
            "padding": "right" if self.right_padded else "any",
        }


def describe(folder: Path | str) -> dict[str, Any]:
    """Returns what a report says of an exported model: its folder, source, bits and recipe.

    Raises:
        SkvError: It is none, or damaged.
    """
    folder = to_path(folder, "exported folder")
    config, recipe = ModelConfig.load(folder), folder / RECIPE_FILE
    options = tomllib.loads(Recipe.load(recipe).to_toml()) if recipe.is_file() else None
    return {
        "folder": str(folder),
        "model_type": config.model_type,
        "source": dict(config.source),
        "bits": config.bits,
        "recipe": options,
    }


def _layer_cache(values: Mapping[str, Any]) -> LayerCache:
    names = ("num_attention_heads", "num_key_value_heads")
    heads, kv_heads = (_number(values, name, 1, MAX_HEADS) for name in names)
    if heads % kv_heads:
        raise ValueError(f"{heads} attention heads on {kv_heads} key-value heads")
    window = _number(values, "local_window_size", 0, MAX_CONTEXT)
    key, value = (_layout(values[name], name, window) for name in ("key", "value"))
    calibrated = values.get("calibrated", False)
    if type(calibrated) is not bool or (calibrated and not can_be_calibrated(key)):
        raise ValueError(f"calibrated is {str(calibrated)[:50]}, of keys that can't be")
    return LayerCache(heads, kv_heads, window, key, value, calibrated)


def layout_entry(layout: CacheLayout) -> dict[str, Any]:
    """The entry of one cache tensor in ``skv_config.json``: the layout's fields, and the rule of its shape."""
    return {**dataclasses.asdict(layout), "shape": layout.shape_rule()}


def _layout(values: Mapping[str, Any], tensor: str, window: int) -> CacheLayout:
    """Reads one cache tensor's layout: it must be one that a recipe gives, so the recipe's checks are its own."""
    fields = dict(values)
    shape = fields.pop("shape")
    names = {field.name for field in dataclasses.fields(CacheLayout)}
    if fields.keys() != names:
        raise ValueError(f"{tensor}: {', '.join(sorted(fields.keys() ^ names))} is missing or unknown")
    per_tensor = ("bits", "granularity", "rotation", "group_size", "parameter_bits")
    common = ("num_sink_tokens", "recent_tokens", "tile_tokens", "recent_type")
    options = {f"{tensor[0]}_{name}": fields[name] for name in per_tensor} | {name: fields[name] for name in common}
    head_dim = _number(fields, "head_dim", 1, MAX_HEAD_DIM)
    layout = CacheLayout.pair(LayerConfig(**options), head_dim, window)[tensor == "value"]
    for name, expected in dataclasses.asdict(layout).items():
        if fields[name] != expected or type(fields[name]) is not type(expected):
            raise ValueError(f"{tensor}: {name} is {fields[name]!r}, expected {expected!r}")
    if shape != layout.shape_rule():  # the graph's buffers would be of another size than the runtime's
        raise ValueError(f"{tensor}: shape is {shape}, expected {layout.shape_rule()}")
    return layout


def _number(values: Mapping[str, Any], name: str, low: int, high: int) -> int:
    value = values[name]
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} is {str(value)[:50]}, expected an integer from {low} to {high}")
    return value


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values[name]
    if not isinstance(value, str):
        raise ValueError(f"{name} is {str(value)[:50]}, expected a string")
    return value


def _token(value: Any) -> int | None:
    if value is not None and (type(value) is not int or not -MAX_VOCAB <= value < MAX_VOCAB):
        raise ValueError(f"a token id is {str(value)[:50]}, expected an integer")
    return value


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        SkvError: Missing, too large, not JSON, or no object; ``fix`` is what the message tells to do.
    """
    if not path.is_file():
        raise SkvError(f"{path}: no such file", expected="a folder written by skv_export", fix=fix)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise SkvError(f"{path}: too large", got=f"{path.stat().st_size} bytes", expected=f"at most {MAX_JSON_BYTES}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SkvError(f"{path}: not valid JSON", got=str(error)[:200], fix=fix) from error
    if not isinstance(values, dict):
        raise SkvError(f"{path}: no JSON object", got=type(values).__name__, fix=fix)
    return values
