"""Owns the graph level of verify: the exported graph, step by step, against PyTorch with the same quantized cache.

Both decode the same tokens with caches of their own, over at least two flushes. PyTorch's attention is the reference in
numpy, so a difference is the exporter's, the runtime's or a kernel's; when there is one, the caches say where it began.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedModel

from skv_export import twins
from skv_export.attention import SkvDecoder
from skv_export.cache import Cache
from skv_export.errors import SkvError
from skv_export.layout import Bytes, CacheLayout
from skv_export.model_config import LayerCache, ModelConfig
from skv_export.recipe import LayerConfig
from skv_export.reference import load
from skv_export.runtime import Session

STEPS_PAST_FLUSHES = 64
"""Steps after the second flush, at least."""
DIVERGED = 1e-2
"""A layer's newest keys or values that differ by more than this, relative to the largest, are not rounding."""


@dataclass(frozen=True)
class Tolerance:
    """Largest differences of logits.

    Attributes:
        exact: Of any logit, with a cache of 16 bits: two runtimes' rounding.
        median: Of all differences, with the recipe's bits.
        most: Of any logit, with the recipe's bits: a code flips where a key or value lies between two codes.
    """

    exact: float = 1e-3
    median: float = 2e-4
    most: float = 5e-2


@dataclass(frozen=True)
class Comparison:
    """One run of both, step by step.

    Attributes:
        prompt: Tokens of the first call.
        steps: Tokens decoded one by one after it.
        max_abs: Largest difference of any logit.
        median_abs: Median of all differences.
        worst_step: The step with the largest difference.
        argmax_agreement: Share of the steps with the same most likely token.
        contradictions: Steps whose most likely token is another although the reference's lead exceeds the difference.
        flips: Codes that differ at the end, per layer, keys and values together.
        codes: Codes at the end, in all layers.
        origin: Where the first difference beyond the tolerance came from; empty if there was none.
    """

    prompt: int
    steps: int
    max_abs: float
    median_abs: float
    worst_step: int
    argmax_agreement: float
    contradictions: tuple[int, ...]
    flips: tuple[int, ...]
    codes: int
    origin: str = ""

    def summary(self) -> str:
        """The differences in one line."""
        return (
            f"logits differ by {self.max_abs:.1e} at most (step {self.worst_step}), {self.median_abs:.1e} in the "
            f"median; most likely token the same in {self.argmax_agreement:.1%}"
        )


@dataclass(frozen=True)
class GraphResult:
    """What the graph level found.

    Attributes:
        quantized: With the recipe's bits.
        exact: With a cache of 16 bits; None where the recipe's bits are 16 already.
        failures: What is beyond the tolerance, a sentence each.
    """

    quantized: Comparison
    exact: Comparison | None
    failures: tuple[str, ...]

    def rows(self) -> list[str]:
        """The report's lines."""
        found = self.quantized
        rows = [f"prompt of {found.prompt} tokens, then {found.steps} steps over the flushes of the tiles"]
        rows.append(f"the recipe's bits: {found.summary()}")
        if self.exact is not None:
            rows.append(f"16 bits: {self.exact.summary()}")
        if found.codes:
            most = int(np.argmax(found.flips))
            where = f", most in layer {most} ({found.flips[most]})" if any(found.flips) else ""
            rows.append(f"{sum(found.flips)} of {found.codes:,} codes flipped{where}")
        return rows


class TorchDecoder:
    """The model in PyTorch with the reference as its attention, and a cache of its own, for one sequence."""

    def __init__(self, model: PreTrainedModel, config: ModelConfig, max_length: int) -> None:
        self.length = 0
        self.layers = config.layers
        self._decoder = SkvDecoder(model, [layer_config(layer) for layer in config.layers])
        self._past = [self._empty("key", max_length), self._empty("value", max_length)]

    def _empty(self, name: str, max_length: int) -> list[torch.Tensor]:
        return [
            torch.zeros((1, layer.num_key_value_heads, *getattr(layer, name).shape(max_length)), dtype=torch.uint8)
            for layer in self.layers
        ]

    def run(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Runs new tokens; returns the last one's logits, ``[vocab]``."""
        total = self.length + len(ids)
        positions = torch.arange(self.length, total)[None]
        mask = torch.ones((1, total), dtype=torch.int64)
        with torch.no_grad():
            logits, *self._past = self._decoder(torch.tensor([list(ids)]), mask, positions, *self._past)
        self.length = total
        return logits[0, -1].numpy()

    def data(self, layer: int, name: str) -> Bytes:
        """One tensor's bytes, ``[1, N_kv, rows, W]``."""
        return self._past[("key", "value").index(name)][layer].numpy()


def layer_config(layer: LayerCache) -> LayerConfig:
    """The options that make a layer's layouts."""
    values: dict[str, Any] = {}
    for letter, layout in (("k", layer.key), ("v", layer.value)):
        for name in ("bits", "granularity", "rotation", "group_size"):
            values[f"{letter}_{name}"] = getattr(layout, name)
    for name in ("num_sink_tokens", "recent_tokens", "tile_tokens", "recent_type"):
        values[name] = getattr(layer.key, name)
    return LayerConfig(**values)


def step_counts(layout: CacheLayout) -> tuple[int, int]:
    """Tokens of the prompt, which ends just before the first flush, and steps after it."""
    return layout.num_sink_tokens + layout.ring_tokens - 1, 2 * layout.tile_tokens + STEPS_PAST_FLUSHES


def check(
    model: PreTrainedModel,
    folder: Path,
    tokens: Sequence[int],
    *,
    execution_provider: str = "cpu",
    tolerance: Tolerance | None = None,
) -> GraphResult:
    """Compares the exported graph with PyTorch, first with a cache of 16 bits, then with the recipe's.

    Args:
        model: The original; its attention is the reference's meanwhile.
        folder: The export.
        tokens: As many as ``step_counts`` says.
        execution_provider: Of the exported graph.
        tolerance: Largest differences.
    """
    tolerance = tolerance or Tolerance()
    attention = model.config._attn_implementation
    try:
        session, exact = Session(folder, execution_provider=execution_provider), None
        if any(layout.bits != 16 for layer in session.config.layers for layout in (layer.key, layer.value)):
            twin = twins.unquantized(folder, execution_provider=execution_provider)
            exact = compare(model, twin, tokens, tolerance.exact, "graph, 16 bits")
            del twin  # its weights
        quantized = compare(model, session, tokens, tolerance.most if exact else tolerance.exact, "graph")
    finally:
        model.set_attn_implementation(attention)
    return judge(quantized, exact, tolerance)


def compare(model: PreTrainedModel, session: Session, tokens: Sequence[int], limit: float, label: str) -> Comparison:
    """Decodes ``tokens`` with both and compares every step.

    Args:
        model: The model in PyTorch; its attention is replaced by the reference.
        session: The exported graph.
        tokens: The prompt and then one token per step, as many as ``step_counts`` says.
        limit: A difference above this is traced to the layer it came from.
        label: Of the progress bar.
    """
    prompt, steps = step_counts(session.config.layers[0].key)
    if len(tokens) != prompt + steps:
        raise SkvError(f"{label}: tokens", got=len(tokens), expected=prompt + steps)
    decoder = TorchDecoder(model, session.config, len(tokens))
    cache = session.cache(1, len(tokens))
    track = _Track(limit)
    calls = [tokens[:prompt], *([token] for token in tokens[prompt:])]
    for step, ids in enumerate(tqdm(calls, unit="step", desc=label, disable=None)):
        reference = decoder.run(ids)
        exported = session.run([ids], None, None, cache)[0, -1]
        if track.add(step, reference, exported):
            track.origin = f"step {step}: {_origin(decoder, cache)}"
    flips = [_flips(layer, decoder, cache, i) for i, layer in enumerate(session.config.layers)]
    return track.result(prompt, steps, tuple(f for f, _ in flips), sum(n for _, n in flips))


@dataclass
class _Track:
    """The differences of the steps so far; step 0 is the prompt."""

    limit: float
    differences: list[NDArray[np.float32]] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    contradictions: list[int] = field(default_factory=list)
    origin: str = ""

    def add(self, step: int, reference: NDArray[np.float32], exported: NDArray[np.float32]) -> bool:
        """Adds a step; returns whether it is the first that is beyond the limit."""
        difference = np.abs(reference - exported)
        worst = float(difference.max())
        second, first = np.partition(reference, -2)[-2:]
        self.differences.append(difference)
        self.same.append(bool(reference.argmax() == exported.argmax()))
        if not self.same[-1] and not first - second <= worst:
            self.contradictions.append(step)
        return not self.origin and not worst <= self.limit  # a NaN is beyond every limit

    def result(self, prompt: int, steps: int, flips: tuple[int, ...], codes: int) -> Comparison:
        worst = [float(np.nan_to_num(d, nan=np.inf).max()) for d in self.differences]
        return Comparison(
            prompt=prompt,
            steps=steps,
            max_abs=max(worst),
            median_abs=float(np.median(np.concatenate(self.differences))),
            worst_step=int(np.argmax(worst)),
            argmax_agreement=float(np.mean(self.same)),
            contradictions=tuple(self.contradictions),
            flips=flips,
            codes=codes,
            origin=self.origin,
        )


def _origin(decoder: TorchDecoder, cache: Cache) -> str:
    """The first layer whose newest keys or values are not the reference's, and how far off they are."""
    for i, layer in enumerate(decoder.layers):
        for name, layout in (("key", layer.key), ("value", layer.value)):
            newest = [
                load(layout, holder.data(i, name)[0].reshape(layer.num_key_value_heads, -1), decoder.length)[0][:, -1]
                for holder in (decoder, cache)
            ]
            scale = float(np.abs(newest[0]).max()) or 1.0
            difference = float(np.abs(newest[0] - newest[1]).max()) / scale
            if not difference <= DIVERGED:
                before = f", or layer {i - 1} after its keys and values" if i else ""
                return f"layer {i}'s newest {name}s are off by {difference:.1%} of the largest: layer {i}{before}"
    return "every layer's newest keys and values agree: the last layer after them, or the output embedding"


def _flips(layer: LayerCache, decoder: TorchDecoder, cache: Cache, i: int) -> tuple[int, int]:
    """Codes of a layer that differ between the two caches, and codes in all."""
    flips = codes = 0
    for name, layout in (("key", layer.key), ("value", layer.value)):
        if layout.bits == 16:
            continue
        blocks = [h.data(i, name)[0].reshape(layer.num_key_value_heads, -1) for h in (decoder, cache)]
        held = min(layout.quantized_tokens(decoder.length) // layout.tile_tokens, layout.tiles_in(blocks[0].shape[1]))
        tiles = [b[:, : held * layout.tile_bytes].reshape(-1, layout.tile_bytes) for b in blocks]
        unpacked = [layout.unpack_tile(t)[0] for t in tiles]
        flips += int((unpacked[0] != unpacked[1]).sum())
        codes += unpacked[0].size
    return flips, codes


def judge(quantized: Comparison, exact: Comparison | None, tolerance: Tolerance) -> GraphResult:
    """Holds the comparisons against the tolerance."""
    failures = []
    if exact is not None:
        failures += _beyond("with 16 bits", exact, exact.max_abs, tolerance.exact, "largest")
        failures += _contradicted("with 16 bits", exact)
    limit = tolerance.exact if exact is None else tolerance.most
    failures += _beyond("with the recipe's bits", quantized, quantized.max_abs, limit, "largest")
    failures += _beyond("with the recipe's bits", quantized, quantized.median_abs, tolerance.median, "median")
    failures += _contradicted("with the recipe's bits", quantized)
    return GraphResult(quantized, exact, tuple(failures))


def _beyond(what: str, found: Comparison, value: float, limit: float, name: str) -> list[str]:
    if value <= limit:
        return []
    where = f" at step {found.worst_step}" if name == "largest" else ""
    begun = f"; began at {found.origin}" if found.origin else ""
    return [f"graph, {what}: the {name} logit difference is {value:.2e}{where}, expected at most {limit:.0e}{begun}"]


def _contradicted(what: str, found: Comparison) -> list[str]:
    steps = ", ".join(map(str, found.contradictions[:8]))
    if not found.contradictions:
        return []
    return [
        f"graph, {what}: another most likely token, though the reference's lead exceeds the difference: steps {steps}"
    ]
