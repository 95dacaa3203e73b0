"""`analyze --measure`, the part of analyze that uses torch: measures on text what each bit pair costs in each layer."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skv_export.analysis.attention_capture import EXACT, DecodeModel, LayerActivations, grouped, tensor_cache
from skv_export.analysis.geometry import MIDRISE_ERROR, REFERENCE_BITS, grid_error
from skv_export.checkpoints.checkpoint import Source
from skv_export.checkpoints.pretrained import Placement, load_tokenizer
from skv_export.errors import SkvError
from skv_export.evaluation.decode_simulation import in_tiles
from skv_export.evaluation.finished_steps import FinishedSteps
from skv_export.evaluation.metrics import kl_divergence
from skv_export.evaluation.ray_workers import RayWorkers
from skv_export.evaluation.text import cut_windows
from skv_export.spec import reference
from skv_export.spec.key_basis import KeyBasis
from skv_export.spec.layout import CacheLayout
from skv_export.spec.recipe import LayerConfig

METHOD = "windows start as a text does, a query's loss saturates"
"""What was measured; a state of something else belongs to another run."""
Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done and steps in all."""


@dataclass(frozen=True)
class Tables:
    """Errors of one layer, summed over queries; indices follow ``options(choices)`` for keys, then values.

    Attributes:
        output: ``[K, V]``, squared error of the attention output.
        fisher: ``[K, V]``, half the squared change of a sampled log-probability, head by head: ``x`` nats at a query
            count ``1 - exp(-x)``, as the second-order form says nothing beyond (docs/theory.md).
        energy: Squared output.
        first_order_k: ``[K]``, squared error of the output as the theory gives it from these activations.
        first_order_v: ``[V]``.
        queries: Queries summed over.
    """

    output: list[list[float]]
    fisher: list[list[float]]
    energy: float
    first_order_k: list[float]
    first_order_v: list[float]
    queries: int


def options(choices: Sequence[int]) -> list[int]:
    """Bit widths measured: the choices, and exact."""
    return [*sorted(set(choices) - {EXACT}), EXACT]


@torch.no_grad()
def layer_tables(
    seen: LayerActivations, base: LayerConfig, choices: Sequence[int], basis: KeyBasis | None = None
) -> Tables:
    """Computes the errors of every bit pair of one layer from one window's activations.

    The errors of keys and of values are added up as vectors; their product, second order, is left out. With a ``basis``
    keys are calibrated, but for what the theory says of them, which is of keys as they are.
    """
    widths = options(choices)
    n, tokens, d = seen.q.shape
    layouts = [CacheLayout.pair(replace(base, k_bits=b, v_bits=b), d, seen.window) for b in widths]
    rows = slice(_first_row(layouts[0][0], tokens), None)
    far, visible = in_tiles(tensor_cache(layouts[0][0]), tokens)[rows], seen.seen[rows]
    v = grouped(seen.v, n)
    exact_scores = seen.scores(seen.k, rows)
    p = seen.weights(exact_scores, visible)
    exact = p @ v
    v_change = torch.cat([tensor_cache(v_layout).quantized(seen.v) - seen.v for _, v_layout in layouts], dim=-1)
    value_parts = ((p * far) @ grouped(v_change, n)).reshape(n, -1, len(widths), d).movedim(2, 0)
    gradient = seen.gradient[:, rows] if seen.gradient is not None else torch.zeros_like(exact)
    output, fisher = [], []
    for k_layout, _ in layouts:
        delta = value_parts
        if k_layout.bits != EXACT:
            scores = torch.where(far, seen.scores(tensor_cache(k_layout, basis).quantized(seen.k), rows), exact_scores)
            delta = value_parts + (seen.weights(scores, visible) @ v - exact)
        output.append(delta.pow(2).sum((1, 2, 3), dtype=torch.float64).tolist())
        divergence = (delta * gradient).sum(-1).pow(2).sum(1, dtype=torch.float64) / 2
        fisher.append((-torch.expm1(-divergence)).sum(-1).tolist())
    energy = exact.pow(2).sum(dtype=torch.float64).item()
    first_k, first_v = first_order(seen, [k for k, _ in layouts], [v for _, v in layouts], rows)
    return Tables(output, fisher, energy, first_k, first_v, exact.shape[1])


def _first_row(layout: CacheLayout, tokens: int) -> int:
    first = layout.num_sink_tokens + layout.recent_tokens + layout.tile_tokens
    if first >= tokens:
        raise SkvError(
            "window: nothing would be quantized in it",
            got=f"{tokens} tokens",
            expected=f"more than {first} (sinks, recent tokens and one tile)",
            fix="Raise --window or lower --recent-tokens.",
        )
    return first


@torch.no_grad()
def first_order(
    seen: LayerActivations, k_layouts: Sequence[CacheLayout], v_layouts: Sequence[CacheLayout], rows: slice
) -> tuple[list[float], list[float]]:
    """The score `geometry` from activations: squared output error per key and value width (docs/theory.md, equation 3).

    Key errors are taken as independent from token to token, with the variance that their layout's arithmetic implies;
    ``sum_j p_j^2 |v_j - o|^2 Var(logit_j)`` for keys, ``sum_j p_j^2 Var(v_j)`` for values.
    """
    n, tokens, _ = seen.q.shape
    far = in_tiles(tensor_cache(k_layouts[0]), tokens)[rows]
    scores = seen.scores(seen.k, rows)
    p = seen.weights(scores, seen.seen[rows])
    v = grouped(seen.v, n)
    o = p @ v
    v_square = v.pow(2).sum(-1)
    distance2 = v_square[:, None] - 2 * (o @ v.mT) + o.pow(2).sum(-1, keepdim=True)
    slope = (1 - (scores / seen.softcap).pow(2)) if seen.softcap else torch.ones(())
    weight = (p * far * slope * seen.scale).pow(2)
    q_square = seen.q[:, rows].pow(2)
    k_errors, v_errors = [], []
    for k_layout, v_layout in zip(k_layouts, v_layouts, strict=True):
        k_variance = grouped(expected_error(k_layout, seen.k), n)
        k_errors.append((weight * distance2 * (q_square @ k_variance.mT)).double().sum().item())
        v_variance = grouped(expected_error(v_layout, seen.v), n).sum(-1)
        v_errors.append(((p * far).pow(2) @ v_variance[..., None]).double().sum().item())
    return k_errors, v_errors


def _around_tile_means(layout: CacheLayout, y: Tensor) -> Tensor:
    """``[H, S, D]`` less the mean per channel of each tile; what stands in no tile stays."""
    t, sinks = layout.tile_tokens, layout.num_sink_tokens
    span = slice(sinks, sinks + max(0, (y.shape[1] - sinks) // t) * t)
    tiles = y[:, span].reshape(y.shape[0], -1, t, y.shape[2])
    centred = y.clone()
    centred[:, span] = (tiles - tiles.mean(2, keepdim=True)).reshape(centred[:, span].shape)
    return centred


def expected_error(layout: CacheLayout, x: Tensor) -> Tensor:
    """Variance ``[H, S, D]`` of the quantizer's error, channel by channel, by its arithmetic and not by quantizing."""
    if layout.bits == EXACT:
        return torch.zeros_like(x)
    y = torch.from_numpy(reference.prepare(layout, x.numpy()))
    if layout.granularity == "token_channel":
        y = _around_tile_means(layout, y)
    if layout.granularity != "channel":
        variance = _block_mean(y.pow(2), layout.group_size) * MIDRISE_ERROR[layout.bits]
    else:
        t, sinks = layout.tile_tokens, layout.num_sink_tokens
        tiles = max(0, (x.shape[1] - sinks) // t)
        span = slice(sinks, sinks + tiles * t)
        content = y[:, span].reshape(y.shape[0], tiles, t, -1)
        squared = (content.amax(2) - content.amin(2)) ** 2
        variance = torch.zeros_like(y)
        variance[:, span] = (squared * grid_error(layout.bits, t)).repeat_interleave(t, dim=1)
    if layout.rotation == "hadamard":
        variance = _block_mean(variance, layout.rotation_dim)
    return variance[..., : layout.head_dim]


def _block_mean(x: Tensor, size: int) -> Tensor:
    """Replaces each block of the last axis by its mean."""
    blocks = x.reshape(*x.shape[:-1], -1, size)
    return blocks.mean(-1, keepdim=True).expand_as(blocks).reshape(x.shape)


@dataclass(frozen=True)
class Measurement:
    """Measured errors of every layer and bit pair; widths as ``options(choices)`` gives them.

    Attributes:
        widths: Bit widths of both axes, 16 = exact last.
        output_error: ``[L, K, V]``, squared error of the attention output over its energy.
        loss: ``[L, K, V]``, expected KL divergence of the logits in nats per token, with that layer alone quantized.
        geometry_k: ``[L, K]``, output error that the theory predicts from the activations.
        geometry_v: ``[L, V]``.
        tokens: Tokens run.
        direct: Whether ``loss`` was measured layer by layer (``kl``) or follows from the Fisher information.
    """

    widths: tuple[int, ...]
    output_error: np.ndarray[Any, np.dtype[np.float64]]
    loss: np.ndarray[Any, np.dtype[np.float64]]
    geometry_k: np.ndarray[Any, np.dtype[np.float64]]
    geometry_v: np.ndarray[Any, np.dtype[np.float64]]
    tokens: int
    direct: bool

    def tables(self, pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Returns losses ``[L, pairs]`` by score: what the theory predicts from activations, and what was measured."""
        k = [self.widths.index(b) for b, _ in pairs]
        v = [self.widths.index(b) for _, b in pairs]
        predicted = self.geometry_k[:, k] + self.geometry_v[:, v]
        return {"geometry_activations": predicted, "measure": self.loss[:, k, v]}

    def balances(self) -> dict[str, list[float | None]]:
        """Returns the extra bits that keys need, per layer, by the same scores.

        None without 4 among the widths, and for a layer that loses nothing: one whose window is all in full precision.
        """
        nothing: list[float | None] = [None] * len(self.loss)
        if REFERENCE_BITS not in self.widths:
            return {"geometry_activations": nothing, "measure": nothing}
        b, exact = self.widths.index(REFERENCE_BITS), len(self.widths) - 1
        predicted = zip(self.geometry_k[:, b], self.geometry_v[:, b], strict=True)
        measured = zip(self.output_error[:, b, exact], self.output_error[:, exact, b], strict=True)
        return {
            name: [float(np.log2(k / v)) / 2 if k > 0 and v > 0 else None for k, v in errors]
            for name, errors in (("geometry_activations", predicted), ("measure", measured))
        }


def measure(
    source: Source,
    text: str,
    *,
    base: LayerConfig,
    choices: Sequence[int],
    bases: Mapping[int, KeyBasis] | None = None,
    windows: int = 4,
    window: int = 1024,
    kl: bool = False,
    state: Path | None = None,
    progress: Progress | None = None,
    placement: Placement | None = None,
    model: DecodeModel | None = None,
    workers: RayWorkers[DecodeModel] | None = None,
) -> Measurement:
    """Runs the model on text and measures every layer and bit pair.

    Args:
        source: The checkpoint.
        text: What to run it on.
        base: Granularities, sinks, recent tokens and tiles.
        choices: Bit widths.
        bases: Of calibrated keys, by layer.
        windows: Windows of text.
        window: Tokens in each.
        kl: Also quantize each layer alone and compare logits; ``2 * choices`` forward passes per layer and window.
        state: File that keeps what was done, so that an interrupted run goes on where it stopped.
        progress: Called after each step.
        placement: Device and number format of the model; float32 on the CPU if not given.
        model: A model already loaded.
        workers: Measure there, windows side by side, and load no model here; not with ``kl``.

    Raises:
        SkvError: The text is too short, or ``state`` belongs to another run.
    """
    key = [METHOD, str(source), hashlib.sha256(text.encode()).hexdigest(), repr(base), list(choices), windows, window]
    if placement not in (None, Placement()):
        key.append(repr(placement))
    bases = bases or {}
    key += [f"layer {layer}: {basis.digest}" for layer, basis in sorted(bases.items())]
    done = FinishedSteps(state, hashlib.sha256(json.dumps(key).encode()).hexdigest(), exclusive=True)
    complete = not kl and "windows" in done and all(f"window {i}" in done for i in range(done["windows"]))
    parts: list[Tensor] = []
    tick = progress or (lambda *_: None)
    if not complete:  # else the model need not even be loaded
        if workers is None:
            decoder = model or DecodeModel(source, placement)
            parts = decoder.windows(text, window, windows)
        else:
            parts = list(torch.from_numpy(cut_windows(load_tokenizer(source), text, windows, window)))
        if "windows" not in done:
            done.save("windows", len(parts))
    count = done["windows"]
    missing = [i for i in range(len(parts)) if f"window {i}" not in done]
    if workers is not None:
        jobs = [(i, parts[i], base, choices, bases) for i in missing]
        for finished, (number, tables) in enumerate(workers.map(lambda theirs, job: [*_tables(theirs, *job)], jobs)):
            done.save(f"window {missing[number]}", tables)
            tick("measuring windows", count - len(missing) + finished + 1, count)
    else:
        for i in missing:
            tables = []
            for table in _tables(decoder, i, parts[i], base, choices, bases):
                tables.append(table)
                tick("measuring layers", i * decoder.layers + len(tables), count * decoder.layers)
            done.save(f"window {i}", tables)
    result = _combine([done[f"window {i}"] for i in range(count)], options(choices), window * count)
    if not kl:
        return result
    decoder.bases = bases
    loss = _direct_loss(decoder, parts, base, options(choices), len(result.loss), done, tick)
    return replace(result, loss=loss, direct=True)


def ray_workers(address: str, source: Source, placement: Placement | None = None) -> RayWorkers[DecodeModel]:
    """Returns workers that measure windows of this checkpoint; see ``RayWorkers``."""
    return RayWorkers(address, lambda there: DecodeModel(source, there), placement)


def _tables(
    decoder: DecodeModel,
    number: int,
    ids: Tensor,
    base: LayerConfig,
    choices: Sequence[int],
    bases: Mapping[int, KeyBasis],
) -> Iterator[dict[str, Any]]:
    """A window's tables, layer by layer."""
    for layer, seen in enumerate(decoder.capture(ids, seed=number)):
        yield vars(layer_tables(seen, base, choices, bases.get(layer)))


def _combine(windows: list[list[dict[str, Any]]], widths: list[int], tokens: int) -> Measurement:
    def total(name: str) -> Any:
        return np.sum([[np.asarray(layer[name], np.float64) for layer in layers] for layers in windows], axis=0)

    energy, queries = total("energy"), total("queries")
    return Measurement(
        widths=tuple(widths),
        output_error=total("output") / energy[:, None, None],
        loss=total("fisher") / queries[:, None, None],
        geometry_k=total("first_order_k") / energy[:, None],
        geometry_v=total("first_order_v") / energy[:, None],
        tokens=tokens,
        direct=False,
    )


def _direct_loss(
    decoder: DecodeModel,
    parts: list[Tensor],
    base: LayerConfig,
    widths: list[int],
    layers: int,
    done: FinishedSteps,
    tick: Progress,
) -> Any:
    """``[L, K, V]``: KL divergence with one tensor of one layer quantized; keys' and values' added up."""
    pairs = [*((b, EXACT) for b in widths[:-1]), *((EXACT, b) for b in widths[:-1])]
    loss = np.zeros((layers, len(widths), len(widths)))
    exact: list[Tensor] = []
    for layer, (i, pair) in itertools.product(range(layers), enumerate(pairs)):
        step = f"layer {layer} {pair}"
        if step not in done:
            exact = exact or [decoder.log_probs(ids) for ids in parts]
            decoder.bits = {layer: replace(base, k_bits=pair[0], v_bits=pair[1])}
            first = base.num_sink_tokens + base.recent_tokens + base.tile_tokens
            divergence = [
                kl_divergence(e, decoder.log_probs(ids))[first:].mean().item()
                for e, ids in zip(exact, parts, strict=True)
            ]
            decoder.bits = {}
            done.save(step, sum(divergence) / len(parts))
        tick("quantizing one layer at a time", layer * len(pairs) + i + 1, layers * len(pairs))
        half = len(widths) - 1
        if i < half:
            loss[layer, i, :] += done[step]
        else:
            loss[layer, :, i - half] += done[step]
    return loss
