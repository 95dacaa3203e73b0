"""The graph level of verify: the exported graph, step by step, against PyTorch with the same quantized cache.

PyTorch's attention is the reference in numpy, so a difference is the exporter's, the runtime's or a kernel's. Two runs:

- With the recipe's bits every step starts from the same bytes: what a step computes and what it writes are compared.
  (Two independent caches diverge: a key that rounds differently changes every later one, and 30 layers amplify a
  difference in the last bit to 1e-2.)
- With a cache that rounds nothing (16 bits, float32 rows) each keeps its own cache over all steps.

A rewritten graph is compared with its source in ONNX Runtime, in the second way alone (``check_source``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from skv_export import progress
from skv_export.arguments import check_fields
from skv_export.checkpoints.attention_patches import restore_attention
from skv_export.checkpoints.pretrained import input_device
from skv_export.errors import SkvError
from skv_export.export.decoder import SkvDecoder
from skv_export.model_folder.skv_config import LayerCache, ModelConfig
from skv_export.runtime.cache import Cache
from skv_export.runtime.session import Session
from skv_export.spec.layout import Bytes, CacheLayout
from skv_export.spec.op import options_of
from skv_export.spec.recipe import LayerConfig
from skv_export.verification import graph_variants
from skv_export.verification.router_margins import RouterMargins

if TYPE_CHECKING:
    from skv_export.verification.source_graph import SourceGraph

STEPS_PAST_FLUSHES = 64
"""Steps after the second flush, at least."""
NEAR_EXPERTS = 0.1
"""Two experts are near whose scores differ by less than this share of what keys and values may differ by."""
MOST_TIES = 0.1
"""Share of the steps that may differ because two experts were near to each other."""


@dataclass(frozen=True)
class Tolerance:
    """Tolerances of the graph level.

    Attributes:
        exact: Any logit, with a cache that rounds nothing.
        median: The median of all logit differences, with the recipe's bits.
        most: Any logit, with the recipe's bits.
        rows: Keys and values of a step, relative to the largest; but 4 units of ``recent_type`` in any case.
        flips: Share of a layer's bytes of codes and parameters that are written otherwise than by the reference: a
            code flips where the last bit of a key or value lies between two.
    """

    exact: float = 1e-3
    median: float = 2e-4
    most: float = 5e-2
    rows: float = 1e-3
    flips: float = 1e-3

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def of(cls, dtype: str) -> Tolerance:
        """Returns the tolerance of a number format; what float16 rounds, PyTorch computes in float32."""
        half = {"fp16": 1.0, "bf16": 8.0}.get(dtype)
        if half is None:
            return cls()
        return cls(exact=0.1 * half, median=0.02 * half, most=0.2 * half, rows=0.01 * half, flips=0.01 * half)


@dataclass(frozen=True)
class StepComparison:
    """One run of both, step by step; step 0 is the prompt.

    Attributes:
        prompt: Tokens of the first call.
        steps: Tokens decoded one by one after it.
        max_abs: Largest difference of any logit.
        median_abs: Median of all differences.
        worst_step: The step with the largest difference.
        argmax_agreement: Share of the steps with the same most likely token.
        contradictions: Steps whose most likely token is another although the reference's lead exceeds the difference.
        flips: Bytes of codes and parameters that were written otherwise, per layer.
        written: Bytes of codes and parameters that were written, per layer.
        rounded: Full-precision numbers that were written otherwise, in all layers.
        origin: Where the first difference beyond the tolerance came from; empty if there was none.
        states: Largest difference of a recurrent state after a step, relative to the state's largest number.
        ties: Steps that are left out: two experts were so near to each other that rounding chose between them.
    """

    prompt: int
    steps: int
    max_abs: float
    median_abs: float
    worst_step: int
    argmax_agreement: float
    contradictions: tuple[int, ...]
    flips: tuple[int, ...]
    written: tuple[int, ...]
    rounded: int
    origin: str = ""
    states: float = 0.0
    ties: tuple[int, ...] = ()

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
        exact: With a cache that rounds nothing.
        quantized: With the recipe's bits; None against a source graph, which has no such cache.
        failures: What is beyond the tolerance, a sentence each.
    """

    quantized: StepComparison | None
    exact: StepComparison
    failures: tuple[str, ...]

    @property
    def figures(self) -> StepComparison:
        """What the report's figures are of."""
        return self.quantized or self.exact

    def rows(self) -> list[str]:
        """The report's lines."""
        found = self.quantized
        if found is None:
            return [
                f"prompt of {self.exact.prompt} tokens, then {self.exact.steps} steps, against the source graph",
                f"nothing rounded: {self.exact.summary()}",
            ]
        where = f", most in layer {int(np.argmax(found.flips))}" if any(found.flips) else ""
        return [
            f"prompt of {found.prompt} tokens, then {found.steps} steps over the flushes of the tiles",
            f"the recipe's bits: {found.summary()}",
            f"nothing rounded: {self.exact.summary()}",
            f"cache: {sum(found.flips)} of {sum(found.written):,} bytes of codes flipped{where}; "
            f"{found.rounded} full-precision numbers rounded otherwise",
            *([f"recurrent states differ by {found.states:.1e} of their size at most"] if found.states else []),
            *([f"{len(found.ties)} steps left out: rounding chose between two experts"] if found.ties else []),
        ]


class TorchDecoder:
    """The model in PyTorch with the reference as its attention and its own cache, for one sequence.

    Attributes:
        margin: How near two experts were to each other in the last call, relative to the scores; infinite without any.
    """

    def __init__(self, model: PreTrainedModel, session: Session) -> None:
        self.length, self.margin = 0, math.inf
        self.layers = session.config.layers
        self._device = input_device(model)
        configs = [layer_config(layer) for layer in self.layers]
        given = dict(zip(session.config.by_index, configs, strict=True))
        self.states = session.config.states
        self._decoder = SkvDecoder(model, given, bases=session.bases, states=self.states)
        self._past: list[list[torch.Tensor]] = []

    def adopt(self, cache: Cache) -> None:
        """Copies the bytes of a runtime's cache of one sequence."""
        self._past = [
            [torch.from_numpy(cache.data(i, name)) for i in range(len(self.layers))] for name in ("key", "value")
        ]
        if self.states:
            found = cache.states.of(0)
            self._past.append([torch.from_numpy(found[x.layer, x.name])[None] for x in self.states])

    def run(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Runs new tokens; returns the last one's logits, ``[vocab]``."""
        total = self.length + len(ids)
        tokens = torch.tensor([list(ids)], device=self._device)
        positions = torch.arange(self.length, total, device=self._device)[None]
        mask = torch.ones((1, total), dtype=torch.int64, device=self._device)
        with torch.no_grad(), RouterMargins() as margins:
            logits, *self._past = self._decoder(tokens, mask, positions, *self._past)
        self.length, self.margin = total, margins.least
        return logits[0, -1].float().cpu().numpy()

    def data(self, layer: int, name: str) -> Bytes:
        """One tensor's bytes, ``[1, N_kv, rows, W]``."""
        return self._past[("key", "value").index(name)][layer].numpy()

    def state(self, number: int) -> NDArray[np.float32]:
        """One recurrent state, in the order of ``states``."""
        return self._past[2][number][0].numpy()


def layer_config(layer: LayerCache) -> LayerConfig:
    """The options that make a layer's layouts."""
    return LayerConfig(**options_of(layer.key, layer.value))


def step_counts(config: ModelConfig) -> tuple[int, int]:
    """Tokens of the prompt, which ends just before the first flush, and steps after it; fewer in a short context."""
    layout, context = config.layers[0].key, config.context_length
    prompt = min(layout.num_sink_tokens + layout.ring_tokens - 1, context // 2)
    return prompt, min(2 * layout.tile_tokens + STEPS_PAST_FLUSHES, context - prompt)


def check(
    model: PreTrainedModel,
    folder: Path,
    tokens: Sequence[int],
    *,
    execution_provider: str = "cpu",
    tolerance: Tolerance | None = None,
) -> GraphResult:
    """Compares the exported graph with PyTorch, with an unquantized cache and with the recipe's.

    Args:
        model: The original; its attention is the reference's meanwhile.
        folder: The export.
        tokens: As many as ``step_counts`` says.
        execution_provider: Of the exported graph.
        tolerance: What may differ; ``Tolerance.of`` the export's number format if not given.
    """
    tolerance = tolerance or Tolerance.of(ModelConfig.load(folder).dtype)
    attention = model.config._attn_implementation
    try:
        session = graph_variants.unquantized(folder, execution_provider=execution_provider)
        exact = compare_steps(model, session, tokens, tolerance.exact, tolerance.rows, same_cache=False)
        session = graph_variants.exact_products(folder, execution_provider=execution_provider)
        quantized = compare_steps(model, session, tokens, tolerance.most, tolerance.rows, same_cache=True)
    finally:
        restore_attention(model)
        model.set_attn_implementation(attention)
    return judge(quantized, exact, tolerance)


def check_source(
    source: SourceGraph,
    folder: Path,
    tokens: Sequence[int],
    *,
    execution_provider: str = "cpu",
    tolerance: Tolerance | None = None,
) -> GraphResult:
    """Compares a rewritten graph, with an unquantized cache, with the graph it was made from; see ``check``.

    Args:
        source: The source, with exact products.
        folder: The rewritten one.
        tokens: As many as ``step_counts`` says.
        execution_provider: Of the rewritten graph.
        tolerance: What may differ; ``Tolerance.of`` the source's number format if not given.
    """
    tolerance = tolerance or Tolerance.of(ModelConfig.load(folder).dtype)
    session = graph_variants.unquantized(folder, execution_provider=execution_provider)
    prompt, steps = step_counts(session.config)
    _check_count(tokens, prompt + steps)
    cache, track = session.cache(1, len(tokens)), _Track(tolerance.exact, tolerance.rows, 0)
    source.restart()
    calls = [tokens[:prompt], *([token] for token in tokens[prompt:])]
    for step, ids in enumerate(progress.track(calls, "graph, nothing rounded")):
        track.add_logits(step, source.run([ids])[0, -1], session.run([ids], None, None, cache)[0, -1])
    return judge(None, track.result(prompt, steps), tolerance)


def _check_count(tokens: Sequence[int], expected: int) -> None:
    if len(tokens) != expected:
        raise SkvError("graph: tokens", got=len(tokens), expected=expected)


def compare_steps(
    model: PreTrainedModel, session: Session, tokens: Sequence[int], limit: float, rows: float, *, same_cache: bool
) -> StepComparison:
    """Decodes ``tokens`` with both and compares every step.

    Args:
        model: The model in PyTorch; its attention is replaced by the reference.
        session: The exported graph.
        tokens: The prompt and then one token per step, as many as ``step_counts`` says.
        limit: A logit's difference above this is traced to the layer it came from.
        rows: Keys and values that differ by more than this, relative to the largest, are where it came from.
        same_cache: Every step starts from the exported graph's cache; else each has its own.
    """
    prompt, steps = step_counts(session.config)
    _check_count(tokens, prompt + steps)
    decoder, cache = TorchDecoder(model, session), session.cache(1, len(tokens))
    track = _Track(limit, rows, len(decoder.layers))
    calls = [tokens[:prompt], *([token] for token in tokens[prompt:])]
    label = "graph, the recipe's bits" if same_cache else "graph, nothing rounded"
    adopt = True  # unwritten bytes are the same then, whatever they are
    for step, ids in enumerate(progress.track(calls, label)):
        if adopt:
            decoder.adopt(cache)
        reference = decoder.run(ids)
        exported = session.run([ids], None, None, cache)[0, -1]
        if decoder.margin <= NEAR_EXPERTS * rows and track.differs(reference, exported, decoder, cache):
            track.ties.append(step)
            adopt = True  # what they hold of this step is not the same any more
            continue
        adopt = same_cache
        beyond = track.add_logits(step, reference, exported)
        if same_cache or (beyond and not track.origin):
            track.add_caches(step, decoder, cache)
        if beyond and not track.origin:
            track.origin = (
                f"step {step}: every layer's keys and values agree: the last layer after them, or the output embedding"
            )
    return track.result(prompt, steps)


@dataclass
class _Track:
    """The differences of the steps so far."""

    limit: float
    rows: float
    layers: int
    differences: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    same: list[bool] = field(default_factory=list)
    contradictions: list[int] = field(default_factory=list)
    rounded: int = 0
    origin: str = ""
    ties: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.flips, self.written, self.states = [0] * self.layers, [0] * self.layers, 0.0

    def differs(
        self, reference: NDArray[np.float32], exported: NDArray[np.float32], decoder: TorchDecoder, cache: Cache
    ) -> bool:
        """Whether a step's logits, or the keys and values that it wrote, are beyond the limits."""
        if not np.isfinite(exported).all():
            return False  # no other expert makes it so
        if np.abs(reference - exported).max() > self.limit:
            return True
        return any(off > self._most(layout) for _, _, layout, (_, _, off) in _written(decoder, cache))

    def add_logits(self, step: int, reference: NDArray[np.float32], exported: NDArray[np.float32]) -> bool:
        """Adds a step's logits; returns whether they are beyond the limit."""
        difference = np.nan_to_num(np.abs(reference - exported), nan=np.inf)
        worst = float(difference.max())
        second, first = np.partition(reference, -2)[-2:]
        self.differences[step] = difference
        self.same.append(bool(reference.argmax() == exported.argmax()))
        if not self.same[-1] and first - second > worst:
            self.contradictions.append(step)
        return worst > self.limit

    def add_caches(self, step: int, decoder: TorchDecoder, cache: Cache) -> None:
        """Adds what a step wrote, and records the first layer whose keys or values differ from the reference's."""
        for i, name, layout, (flips, rounded, off) in _written(decoder, cache):
            flushed = layout.quantized_tokens(decoder.length) > layout.quantized_tokens(int(decoder.length) - 1)
            self.written[i] += layout.tile_bytes * decoder.layers[i].num_key_value_heads * flushed
            self.flips[i] += flips
            self.rounded += rounded
            if off > self._most(layout) and not self.origin:
                before = f", or layer {i - 1} after its own" if i else ""
                self.origin = f"step {step}: layer {i}'s {name}s are off by {off:.1%}: layer {i}{before}"
        self.add_states(step, decoder, cache)

    def _most(self, layout: CacheLayout) -> float:
        """By how much keys and values may differ, relative to the largest."""
        return max(self.rows, 4 * _epsilon(layout))

    def add_states(self, step: int, decoder: TorchDecoder, cache: Cache) -> None:
        """Compares the recurrent states after a step, and records the first that differs as an origin."""
        found = cache.states.of(0)
        for number, given in enumerate(decoder.states):
            reference = decoder.state(number)
            off = float(np.nan_to_num(np.abs(reference - found[given.layer, given.name]), nan=np.inf).max())
            off /= float(np.abs(reference).max()) or 1.0
            self.states = max(self.states, off)
            if off > self.rows and not self.origin:
                self.origin = f"step {step}: the state {given.name} of layer {given.layer} is off by {off:.1%}"

    def result(self, prompt: int, steps: int) -> StepComparison:
        worst = {step: float(d.max()) for step, d in self.differences.items()} or {0: 0.0}
        return StepComparison(
            prompt=prompt,
            steps=steps,
            max_abs=max(worst.values()),
            median_abs=float(np.median(np.concatenate(list(self.differences.values()) or [np.zeros(1, np.float32)]))),
            worst_step=max(worst, key=lambda step: worst[step]),
            argmax_agreement=float(np.mean(self.same or [True])),
            contradictions=tuple(self.contradictions),
            flips=tuple(self.flips),
            written=tuple(self.written),
            rounded=self.rounded,
            origin=self.origin,
            states=self.states,
            ties=tuple(self.ties),
        )


def _written(decoder: TorchDecoder, cache: Cache) -> Iterator[tuple[int, str, CacheLayout, tuple[int, int, float]]]:
    """The layers' keys and values with their names and layouts, and how both hold them; see ``_differences``."""
    for i, layer in enumerate(decoder.layers):
        for name, layout in (("key", layer.key), ("value", layer.value)):
            blocks = [held.data(i, name).reshape(layer.num_key_value_heads, -1) for held in (decoder, cache)]
            yield i, name, layout, _differences(layout, *blocks)


def _epsilon(layout: CacheLayout) -> float:
    """Spacing of ``recent_type`` at 1."""
    return {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float": 2.0**-23}[layout.recent_type]


def _differences(layout: CacheLayout, reference: Bytes, exported: Bytes) -> tuple[int, int, float]:
    """The differences between two blocks ``[N_kv, C]``.

    Returns:
        Bytes of the tiles, numbers of the full-precision rows, and by how much the latter differ, relative to the
        largest number of the rows that do.
    """
    edge = reference.shape[1] - layout.full_rows * layout.row_bytes
    flips = int((reference[:, :edge] != exported[:, :edge]).sum()) if layout.bits != 16 else 0
    rows = [
        np.ascontiguousarray(x[:, edge:]).view(layout.recent_dtype).reshape(-1, layout.padded_dim)
        for x in (reference, exported)
    ]
    different = (rows[0].view(np.uint8) != rows[1].view(np.uint8)).any(axis=1)
    if not different.any():
        return flips, 0, 0.0
    one, other = (x[different].astype(np.float32) for x in rows)
    off = float(np.nan_to_num(np.abs(one - other), nan=np.inf).max())
    return flips, int((one != other).sum()), off / (float(np.abs(one).max()) or 1.0)


def judge(quantized: StepComparison | None, exact: StepComparison, tolerance: Tolerance) -> GraphResult:
    """Holds the comparisons against the tolerance."""
    failures = _beyond("nothing rounded", exact, exact.max_abs, tolerance.exact, "largest")
    failures += _contradicted("nothing rounded", exact)
    if quantized is None:
        return GraphResult(None, exact, tuple(failures))
    bits = "the recipe's bits"
    failures += _beyond(bits, quantized, quantized.max_abs, tolerance.most, "largest")
    failures += _beyond(bits, quantized, quantized.median_abs, tolerance.median, "median")
    failures += _contradicted(bits, quantized)
    for i, (flips, written) in enumerate(zip(quantized.flips, quantized.written, strict=True)):
        if flips > tolerance.flips * written:
            failures.append(f"graph, {bits}: layer {i} wrote {flips} of {written} bytes of codes otherwise")
    for run, found in (("nothing rounded", exact), (bits, quantized)):
        if len(found.ties) > MOST_TIES * (found.steps + 1):
            failures.append(f"graph, {run}: {len(found.ties)} of {found.steps + 1} steps differ where experts are near")
    if quantized.origin and not failures:
        failures.append(f"graph, {bits}: {quantized.origin}")
    return GraphResult(quantized, exact, tuple(failures))


def _beyond(what: str, found: StepComparison, value: float, limit: float, name: str) -> list[str]:
    if value <= limit:
        return []
    where = f" at step {found.worst_step}" if name == "largest" else ""
    begun = f"; began at {found.origin}" if found.origin else ""
    return [f"graph, {what}: the {name} logit difference is {value:.2e}{where}, expected at most {limit:.0e}{begun}"]


def _contradicted(what: str, found: StepComparison) -> list[str]:
    if not found.contradictions:
        return []
    steps = ", ".join(map(str, found.contradictions[:8]))
    return [
        f"graph, {what}: another most likely token, though the reference's lead exceeds the difference: steps {steps}"
    ]
