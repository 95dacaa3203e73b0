"""The options of an export: frozen dataclasses, read from TOML and written as resolved TOML.

A recipe key, a command-line flag and a dataclass field have the same name. The quantizer's options may differ per
layer: a recipe has defaults and a list of overrides, and ``Recipe.layer(i)`` gives the options of layer ``i``.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skv_export.arguments import brief, check_fields, checked
from skv_export.errors import SkvError, did_you_mean
from skv_export.paths import to_path

BITS = (1, 2, 3, 4, 5, 6, 8, 16)
"""Bit widths of keys and of values; 16 leaves a tensor unquantized."""
GRANULARITIES = ("channel", "token", "token_channel")
ROTATIONS = ("none", "hadamard")
PARAMETER_BITS = (16, 8)
TILE_TOKENS = (32, 64, 128)
RECENT_TYPES = ("float16", "float", "bfloat16")
DTYPES = ("fp32", "fp16", "bf16")
WEIGHT_BITS = {"int8": 8, "int4": 4}
AS_IS = "as-is"
"""Weights as the checkpoint holds them: what it quantized keeps its codes, the rest is of the ``dtype``."""
WEIGHTS = (AS_IS, *DTYPES, *WEIGHT_BITS)
ACCURACY_LEVELS = (0, 1, 4)
"""MatMulNBits' inner number format: float32 (1), int8, which rounds activations in blocks (4), or the usual one (0)."""
MAX_HEAD_DIM = 1024
GROUP_MULTIPLE = 32
"""Group sizes are multiples of it."""
MAX_KEPT_TOKENS = 4096
"""Most sinks, and most recent tokens."""

_CHOICES: dict[str, tuple[object, ...]] = {
    "k_bits": BITS,
    "v_bits": BITS,
    "k_granularity": GRANULARITIES,
    "v_granularity": GRANULARITIES,
    "k_rotation": ROTATIONS,
    "v_rotation": ROTATIONS,
    "k_parameter_bits": PARAMETER_BITS,
    "v_parameter_bits": PARAMETER_BITS,
    "tile_tokens": TILE_TOKENS,
    "recent_type": RECENT_TYPES,
    "dtype": DTYPES,
    "weights": WEIGHTS,
    "accuracy_level": ACCURACY_LEVELS,
}
_RANGES: dict[str, tuple[int, int]] = {
    "k_group_size": (0, MAX_HEAD_DIM),
    "v_group_size": (0, MAX_HEAD_DIM),
    "num_sink_tokens": (0, MAX_KEPT_TOKENS),
    "recent_tokens": (0, MAX_KEPT_TOKENS),
}
_SWITCHES = ("quantize_head", "quantize_embeddings")
MAX_RECIPE_BYTES = 1 << 20
MAX_LAYERS = 10_000
"""Of a model: none comes near."""


@dataclass(frozen=True)
class LayerConfig:
    """How one layer's keys and values are held in the cache (docs/spec.md, Attributes).

    Attributes:
        k_bits: Bits of a key's code; 16 = not quantized.
        v_bits: Bits of a value's code; 16 = not quantized.
        k_granularity: ``channel`` (scale and offset per channel and tile), ``token`` (scale per token and group) or
            ``token_channel`` (the same around the tile's mean, which is per channel).
        v_granularity: The same for values.
        k_rotation: ``none`` or ``hadamard``, on queries and keys after RoPE.
        v_rotation: ``none`` or ``hadamard``, on values; the output is rotated back.
        k_group_size: Channels that share a scale, not with ``channel``; 0 = 64 if that divides D, else 32.
        v_group_size: The same for values.
        k_parameter_bits: Bits of each scale and offset of ``channel``: 16 or 8; the other granularities have no choice.
        v_parameter_bits: The same for values.
        num_sink_tokens: First tokens kept in full precision.
        recent_tokens: Last tokens kept in full precision, at least.
        tile_tokens: Tokens quantized together.
        recent_type: Number format of the tokens kept in full precision.
    """

    k_bits: int = 4
    v_bits: int = 2
    k_granularity: str = "channel"
    v_granularity: str = "token"
    k_rotation: str = "none"
    v_rotation: str = "hadamard"
    k_group_size: int = 0
    v_group_size: int = 0
    k_parameter_bits: int = 16
    v_parameter_bits: int = 16
    num_sink_tokens: int = 4
    recent_tokens: int = 64
    tile_tokens: int = 64
    recent_type: str = "float16"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name))

    @property
    def name(self) -> str:
        """Short name of the bit pair, such as ``K4V2``."""
        return f"K{self.k_bits}V{self.v_bits}"


PER_LAYER_KEYS = tuple(f.name for f in dataclasses.fields(LayerConfig) if f.name[:2] in ("k_", "v_"))
"""Keys that a ``[[layers]]`` table may set; sinks, recent tokens and tiles are one for the whole model."""


_WEIGHT_KEYS = ("weights", "accuracy_level", *_SWITCHES)
_MODEL_KEYS = ("dtype", *_WEIGHT_KEYS, "description")


@dataclass(frozen=True)
class LayerOverride:
    """One ``[[layers]]`` table of a recipe: ``index`` names the layers, ``values`` what differs there."""

    index: tuple[int, ...]
    values: tuple[tuple[str, Any], ...]

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Recipe:
    """The options of an export: the model's cache, and its weights.

    Attributes:
        default: The options of every layer that no override names.
        overrides: Per-layer differences; where two name a layer, the later one wins.
        dtype: Number format of activations, and of weights that are not quantized: ``fp32``, ``fp16`` or ``bf16``.
        weights: Number format of weights: ``as-is``, ``int8``, ``int4``, or the same as ``dtype``; "" stands for
            ``as-is`` where the checkpoint holds quantized weights, else for ``dtype``.
        accuracy_level: MatMulNBits' own option for products with quantized weights: 4 rounds activations to 8 bits in
            blocks, 1 does not round them; 0 = 1 for weights as they come, 4 for ``int8`` and ``int4``.
        quantize_head: Whether the output embedding is among the weights in int8 or int4.
        quantize_embeddings: Whether the input embedding is.
        description: One line on what the recipe is for.
    """

    default: LayerConfig = dataclasses.field(default_factory=LayerConfig)
    overrides: tuple[LayerOverride, ...] = ()
    dtype: str = "fp32"
    weights: str = ""
    accuracy_level: int = 0
    quantize_head: bool = True
    quantize_embeddings: bool = False
    description: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        _check("dtype", self.dtype)
        if self.weights:
            _check("weights", self.weights)
        if self.weights in DTYPES and self.weights != self.dtype:
            raise SkvError(
                f"weights {self.weights} with dtype {self.dtype}",
                expected="one number format for both, or weights in int8 or int4",
                fix="Leave weights out: they are of the dtype then.",
            )
        for name in ("accuracy_level", *_SWITCHES):
            _check(name, getattr(self, name))
        for override in self.overrides:
            self._apply(override)

    def _apply(self, override: LayerOverride, base: LayerConfig | None = None) -> LayerConfig:
        return dataclasses.replace(base or self.default, **dict(override.values))

    @property
    def weight_bits(self) -> int:
        """Bits of a quantized weight; 0 where weights are numbers of ``dtype``."""
        return WEIGHT_BITS.get(self.weights, 0)

    @property
    def exact_products(self) -> bool:
        """Whether products with quantized weights do not round activations."""
        return self.accuracy_level == 1 or (self.accuracy_level == 0 and not self.weight_bits)

    @checked
    def layer(self, index: int) -> LayerConfig:
        """Returns the options that hold for layer ``index``."""
        config = self.default
        for override in self.overrides:
            if index in override.index:
                config = self._apply(override, config)
        return config

    @checked
    def layers(self, num_hidden_layers: int) -> tuple[LayerConfig, ...]:
        """Returns the options of every layer.

        Raises:
            SkvError: An override names a layer that the model does not have, or no model has so many.
        """
        if not 1 <= num_hidden_layers <= MAX_LAYERS:
            raise SkvError("num_hidden_layers", got=num_hidden_layers, expected=f"1 ... {MAX_LAYERS}")
        named = [i for override in self.overrides for i in override.index]
        outside = sorted({i for i in named if i >= num_hidden_layers})
        if outside:
            raise SkvError(
                "recipe: [[layers]] names layers that the model does not have",
                got=f"index {outside}",
                expected=f"0 ... {num_hidden_layers - 1}",
                fix="Use a recipe made for this model.",
            )
        return tuple(self.layer(i) for i in range(num_hidden_layers))

    def with_options(self, **options: Any) -> Recipe:
        """Returns the recipe with the given keys set for every layer; a flag wins over the recipe, overrides included.

        Raises:
            SkvError: Unknown key or a value outside its choices.
        """
        given = {key: value for key, value in options.items() if value is not None}
        own = _with_dtype({key: given.pop(key) for key in _MODEL_KEYS if key in given})
        _reject_unknown(given, [f.name for f in dataclasses.fields(LayerConfig)], "options")
        for key, value in given.items():
            _check(key, value)
        overrides = tuple(
            LayerOverride(o.index, tuple(item for item in o.values if item[0] not in given)) for o in self.overrides
        )
        if "dtype" in own and self.weights in DTYPES:
            own.setdefault("weights", own["dtype"])
        default = dataclasses.replace(self.default, **given)
        return dataclasses.replace(self, default=default, overrides=tuple(o for o in overrides if o.values), **own)

    @classmethod
    @checked
    def per_layer(cls, bits: list[tuple[int, int]], base: Recipe | None = None) -> Recipe:
        """Returns a recipe with bits of its own for each layer.

        Args:
            bits: ``(k_bits, v_bits)`` of each layer; the most frequent pair becomes the default.
            base: All other options; the default recipe if not given.

        Raises:
            SkvError: A bit width outside ``BITS``.
        """
        base = base or cls()
        if not bits:
            raise SkvError("per_layer: bits", got="none", expected="a pair for each layer")
        common = max(sorted(set(bits)), key=bits.count)
        rest = sorted(set(bits) - {common})
        return dataclasses.replace(
            base.with_options(k_bits=common[0], v_bits=common[1]),
            overrides=tuple(
                LayerOverride(
                    tuple(i for i, pair in enumerate(bits) if pair == other),
                    (("k_bits", other[0]), ("v_bits", other[1])),
                )
                for other in rest
            ),
        )

    @classmethod
    @checked
    def from_dict(cls, values: Mapping[str, Any], source: str = "recipe") -> Recipe:
        """Builds a recipe from parsed TOML.

        Args:
            values: The keys of a recipe; ``layers`` is a list of tables.
            source: What error messages call it.

        Raises:
            SkvError: Unknown key, wrong type, or a value outside its choices; the message names ``source`` and the key.
        """
        names = [f.name for f in dataclasses.fields(LayerConfig)]
        _reject_unknown(values, [*names, *_MODEL_KEYS, "layers"], source)
        tables = values.get("layers", [])
        if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
            raise SkvError(f"{source}: layers", got=type(tables).__name__, expected="an array of tables, [[layers]]")
        description = values.get("description", "")
        if not isinstance(description, str):
            raise SkvError(f"{source}: description", got=type(description).__name__, expected="a string")
        own = {key: values[key] for key in _MODEL_KEYS if key in values}
        default = {key: values[key] for key in names if key in values}
        for key, value in (own | default).items():
            _check(key, value, source)
        return cls(
            default=LayerConfig(**default),
            overrides=tuple(_override(table, f"{source}: [[layers]] {i}") for i, table in enumerate(tables, 1)),
            **_with_dtype(own),
        )

    @classmethod
    def find(cls, recipe: Path | str) -> Recipe:
        """Reads a recipe by what a user calls it: a TOML file, or the name of one that ships with the package.

        Raises:
            SkvError: There is neither, or see ``load``.
        """
        path = to_path(recipe, "recipe")
        return cls.load(path if path.exists() else shipped_recipes().get(str(recipe), path))

    @classmethod
    def load(cls, path: Path | str) -> Recipe:
        """Reads a recipe from a TOML file.

        Raises:
            SkvError: The file is missing, too large, no TOML, or not a recipe.
        """
        path = to_path(path, "recipe")
        if not path.is_file():
            near = did_you_mean(str(path), shipped_recipes())
            fix = f"{near or ''} `skv-export recipes` lists those of the package.".strip()
            raise SkvError(f"recipe {path}: no such file", fix=fix)
        size = path.stat().st_size
        if size > MAX_RECIPE_BYTES:
            raise SkvError(f"recipe {path}: too large", got=f"{size} bytes", expected=f"at most {MAX_RECIPE_BYTES}")
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, or a number of thousands of digits
            raise SkvError(f"recipe {path}: not valid TOML", got=str(error)[:200], fix="Correct the file.") from error
        return cls.from_dict(values, f"recipe {path}")

    def to_toml(self) -> str:
        """Returns the resolved recipe as TOML; ``Recipe.load`` of it gives an equal recipe."""
        lines = [f"description = {_toml(self.description)}"] if self.description else []
        lines.append(f"dtype = {_toml(self.dtype)}")
        keys = _WEIGHT_KEYS if self.weight_bits else _WEIGHT_KEYS[:2] if self.weights == AS_IS else _WEIGHT_KEYS[:1]
        lines += [f"{key} = {_toml(getattr(self, key))}" for key in keys if self.weights]
        lines += [f"{f.name} = {_toml(getattr(self.default, f.name))}" for f in dataclasses.fields(LayerConfig)]
        for override in self.overrides:
            lines += ["", "[[layers]]", f"index = {_toml(list(override.index))}"]
            lines += [f"{key} = {_toml(value)}" for key, value in override.values]
        return "\n".join(lines) + "\n"


def as_recipe(recipe: object) -> Recipe:
    """Returns what a caller gave as a recipe; the default one for None.

    Raises:
        SkvError: It is something else.
    """
    if recipe is None:
        return Recipe()
    if not isinstance(recipe, Recipe):
        fix = "Read a file with Recipe.load, or make one with Recipe.from_dict."
        raise SkvError("recipe", got=type(recipe).__name__, expected="a skv_export.Recipe", fix=fix)
    return recipe


def _with_dtype(given: dict[str, Any]) -> dict[str, Any]:
    """A ``weights`` that is also a ``dtype`` sets ``dtype``."""
    if isinstance(given.get("weights"), str) and given["weights"] in DTYPES:
        given.setdefault("dtype", given["weights"])
    return given


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return str(value)


def _override(table: Mapping[str, Any], source: str) -> LayerOverride:
    values = dict(table)
    index = values.pop("index", None)
    if isinstance(index, int) and not isinstance(index, bool):
        index = [index]
    valid = isinstance(index, list) and index and all(type(i) is int and i >= 0 for i in index)
    if not valid:
        raise SkvError(f"{source}: index", got=repr(index), expected="a layer number or a list of them")
    _reject_unknown(values, PER_LAYER_KEYS, source)
    for key, value in values.items():
        _check(key, value, source)
    return LayerOverride(tuple(index or ()), tuple(values.items()))


def _reject_unknown(values: Mapping[str, Any], known: Sequence[str], source: str) -> None:
    unknown = sorted(set(values) - set(known))
    if unknown:
        near = [found for key in unknown if (found := did_you_mean(key, known))]
        raise SkvError(
            f"{source}: unknown key{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}",
            expected=", ".join(known),
            fix=" ".join(near) or None,
        )


def _check(name: str, value: object, source: str = "") -> None:
    """Checks the value of a key; ``source`` is where it comes from."""
    what = f"{source}: {name}" if source else name
    if name in _CHOICES:
        choices = _CHOICES[name]
        if type(value) not in (int, str) or value not in choices:
            expected, near = ", ".join(map(str, choices)), None
            if isinstance(value, str):
                number = value in map(str, choices) and value not in choices
                near = "Write the number without quotes." if number else did_you_mean(value, map(str, choices))
            raise SkvError(what, got=brief(value), expected=f"one of {expected}", fix=near)
    elif name in _RANGES:
        low, high = _RANGES[name]
        if type(value) is not int or not low <= value <= high:
            raise SkvError(what, got=brief(value), expected=f"an integer from {low} to {high}")
        if name.endswith("group_size") and value % GROUP_MULTIPLE:
            expected = f"a multiple of {GROUP_MULTIPLE} (or 0 for the default)"
            raise SkvError(what, got=value, expected=expected, fix="Leave it out to have the usual one.")
    elif name in _SWITCHES and not isinstance(value, bool):
        raise SkvError(what, got=brief(value), expected="true or false")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that ship with the package, by name; those made for one model are named ``measured/MODEL-BITS``."""
    import skv_export

    roots = [Path(root) / "recipes" for root in skv_export.__path__] + [Path(__file__).parents[2] / "recipes"]
    return {
        path.relative_to(root).with_suffix("").as_posix(): path
        for root in reversed(roots)
        for path in (*root.glob("*.toml"), *root.glob("measured/*.toml"))
    }
