"""The plan of a folder: what an export or a rewrite would write, as figures and as text."""

from __future__ import annotations

import dataclasses
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from skv_export.checkpoints.block_weights import BlockMatrix
from skv_export.checkpoints.checkpoint import Source
from skv_export.model_folder.genai_config import advice
from skv_export.provenance import versions
from skv_export.spec.layout import cache_bytes
from skv_export.spec.op import LayerAttention
from skv_export.spec.recipe import LayerConfig, Recipe
from skv_export.spec.state import LayerState

PARAMETER_BITS = {"fp32": 32, "fp16": 16, "bf16": 16}
"""Bits of a block's scale and offset, by the ``dtype``."""
PLAN_LENGTHS = (4096, 32768, 131072)
"""Lengths at which a plan compares the cache with an fp16 one, where the model's context holds them."""


@dataclass(frozen=True)
class Plan:
    """What an export would write.

    Attributes:
        source: The checkpoint, or the ONNX model.
        recipe: The options.
        model_type: Hugging Face's name of the architecture.
        layers: Attention of each layer that has a cache, as the graph will have it.
        weight_bytes: Size of the weights as the recipe wants them, tied ones once.
        context_length: Tokens that the model can attend to.
        calibrated: Layers whose keys are calibrated.
        held: Matrices that are stored as the checkpoint quantized them, by the parameters' names.
        readers: Further layers, which read the cache of one of ``layers``.
        inputs_embeds: Channels of the embeddings that the graph takes in place of tokens; 0 = it takes none.
        position_axes: Positions of a token.
        latent: The cache holds latents, which an fp16 cache has once and this one as keys and as values.
        indices: Numbers of ``layers`` in the model; empty = from 0 on.
        num_hidden_layers: Layers with a cache or a state of their own; 0 = as many as ``layers``.
        states: Of recurrent layers, for each sequence.
    """

    source: Source
    recipe: Recipe
    model_type: str
    layers: tuple[LayerAttention, ...]
    weight_bytes: int
    context_length: int
    calibrated: frozenset[int] = frozenset()
    held: Mapping[str, BlockMatrix] = field(default_factory=dict)
    readers: int = 0
    inputs_embeds: int = 0
    position_axes: int = 1
    latent: bool = False
    indices: tuple[int, ...] = ()
    num_hidden_layers: int = 0
    states: tuple[LayerState, ...] = ()

    @property
    def by_index(self) -> dict[int, LayerAttention]:
        """Attention by the layer's number in the model."""
        return dict(zip(self.indices or range(len(self.layers)), self.layers, strict=True))

    @property
    def state_bytes(self) -> int:
        """Bytes of one sequence's recurrent states, whatever its length."""
        return sum(state.nbytes for state in self.states)

    @property
    def configs(self) -> list[LayerConfig]:
        """The recipe's options for ``layers``."""
        configs = self.recipe.layers(self.num_hidden_layers or len(self.layers))
        return [configs[i] for i in self.by_index]

    def cache_bytes(self, length: int) -> int:
        """Returns the bytes that the cache of one sequence of ``length`` tokens takes, recurrent states included."""
        caches = cache_bytes(
            [layer.layouts for layer in self.layers], [layer.params.kv_num_heads for layer in self.layers], length
        )
        return caches + self.state_bytes

    def half_cache_bytes(self, length: int) -> int:
        """Returns what an fp16 cache takes that keeps every token in every layer; recurrent states are the same."""
        copies = 1 if self.latent else 2
        caches = (copies * 2 * length * x.params.kv_num_heads * x.layouts[0].head_dim for x in self.layers)
        return sum(caches) + self.state_bytes

    @property
    def bytes_per_token(self) -> float:
        """Bytes by which one more token makes the cache larger, sliding windows aside."""
        full = [layer for layer in self.layers if not layer.params.local_window_size] or self.layers
        return sum(
            layer.params.kv_num_heads * layout.tile_bytes / layout.tile_tokens
            for layer in full
            for layout in layer.layouts
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths to compare at: none is beyond the model's context, which is one of them if it is short."""
        within = tuple(length for length in PLAN_LENGTHS if length <= self.context_length)
        return within if self.context_length >= PLAN_LENGTHS[-1] else tuple(sorted({*within, self.context_length}))

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as data."""
        return {
            "source": str(self.source),
            "model_type": self.model_type,
            "context_length": self.context_length,
            "recipe": tomllib.loads(self.recipe.to_toml()),
            "layers": [
                {
                    "layer": i,
                    "num_attention_heads": layer.params.num_heads,
                    "num_key_value_heads": layer.params.kv_num_heads,
                    "local_window_size": layer.params.local_window_size,
                    "key": dataclasses.asdict(layer.layouts[0]),
                    "value": dataclasses.asdict(layer.layouts[1]),
                }
                for i, layer in self.by_index.items()
            ],
            "layers_without_cache": self.readers,
            "states": [dataclasses.asdict(state) for state in self.states],
            "state_bytes": self.state_bytes,
            "weight_bytes": self.weight_bytes,
            "bytes_per_token": self.bytes_per_token,
            "cache": [
                {"tokens": n, "bytes": self.cache_bytes(n), "fp16_bytes": self.half_cache_bytes(n)}
                for n in self.lengths
            ],
            "versions": versions(),
        }

    def table(self) -> str:
        """Returns the plan as text."""
        count = (self.num_hidden_layers or len(self.layers)) + self.readers
        lines = [
            f"{self.source}: {self.model_type}, {count} layers, context {self.context_length:,}",
            self._weights_row(),
            "",
        ]
        lines += [f"  {row}" for row in self._layer_rows()]
        if self.readers:
            first = count - self.readers
            lines.append(f"  layers {first}-{count - 1}: read the cache of the last layer of their kind above")
        if self.states:
            others = len({state.layer for state in self.states})
            lines.append(
                f"  and {others} layer{'s' * (others > 1)} with a recurrent state: {_size(self.state_bytes)} per "
                "sequence, in full precision, whatever its length"
            )
        lines += ["", f"cache: {self.bytes_per_token:,.0f} bytes per token and sequence"]
        for length in self.lengths:
            ours, half = self.cache_bytes(length), self.half_cache_bytes(length)
            ratio = f"{half / ours:.1f}x smaller"
            lines.append(f"  {length:>7,} tokens: {_size(ours):>9} instead of {_size(half):>9} in fp16, {ratio}")
        pairs = [layer.layouts for layer in self.layers]
        if self.inputs_embeds:
            axes = f", positions [{self.position_axes}, B, S]" if self.position_axes > 1 else ""
            lines.append(f"takes embeddings [B, S, {self.inputs_embeds}] in the place of tokens, too{axes}")
        said = advice(self.configs, pairs, self.context_length)
        if self.position_axes > 1:
            said = "onnxruntime-genai: does not run this folder: a token has several positions."
        return "\n".join([*lines, "", said])

    def _weights_row(self) -> str:
        recipe = self.recipe
        if self.held:
            counts = Counter(matrix.format.stored(recipe.exact_products) for matrix in self.held.values())
            kinds = ", ".join(
                f"{count} {form.name} ({form.weight_bits(PARAMETER_BITS[recipe.dtype]):.3g} bits)"
                for form, count in counts.most_common()
            )
            return f"weights: as they come: {kinds}; the rest in {recipe.dtype}, {_size(self.weight_bytes)}"
        if not recipe.weight_bits:
            return f"weights: {recipe.dtype}, {_size(self.weight_bytes)}"
        kept = [
            *(["the output embedding"] if not recipe.quantize_head else []),
            *(["the input embedding"] if not recipe.quantize_embeddings else []),
        ]
        rest = f" but for {' and '.join(kept)}" if kept else ""
        return f"weights: matrices in {recipe.weights}{rest}, the rest in {recipe.dtype}, {_size(self.weight_bytes)}"

    def _layer_rows(self) -> list[str]:
        """One line for each run of equal layers."""
        rows: list[tuple[list[int], str]] = []
        for place, (i, layer) in enumerate(self.by_index.items()):
            key, value = layer.layouts
            params = layer.params
            window = f", window {params.local_window_size}" if params.local_window_size else ""
            form = f"{key.granularity}, calibrated" if place in self.calibrated else key.granularity
            text = (
                f"K{key.bits}V{value.bits}, {params.num_heads} query heads on {params.kv_num_heads}, "
                f"head_dim {key.head_dim}{window}, keys per {form}, values per {value.granularity}, "
                f"first {key.num_sink_tokens} and last {key.recent_tokens} tokens exact"
            )
            if rows and rows[-1][1] == text:
                rows[-1][0].append(i)
            else:
                rows.append(([i], text))
        return [f"layer{'s' * (len(numbers) > 1)} {_numbers(numbers)}: {text}" for numbers, text in rows]


def _numbers(rising: list[int]) -> str:
    """``0-3``, or ``3, 7, 11`` where there are others between."""
    dense = len(rising) > 1 and rising[-1] - rising[0] == len(rising) - 1
    return f"{rising[0]}-{rising[-1]}" if dense else ", ".join(map(str, rising))


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
