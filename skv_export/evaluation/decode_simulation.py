"""Simulates token-by-token decoding in one forward pass: every token sees the cache that a decoder would have.

Which tokens are quantized depends on the cache's length alone (docs/spec.md, Which token is where), and a tile's codes
on its own tokens alone. So what the query at position i would read from a cache of i tokens can be computed for all i
in one pass: quantize every tile once, then let each query see the quantized form of the tokens that have left for the
tiles, and the full-precision form of the others. The result is that of one call per token, up to the order of float32
sums; tests hold it to the reference op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AttentionInterface, PreTrainedModel

from skv_export.checkpoints.pretrained import input_device
from skv_export.checkpoints.shared_caches import cache_sources
from skv_export.errors import SkvError
from skv_export.spec.compaction import move_tokens
from skv_export.spec.key_basis import KeyBasis, can_be_calibrated
from skv_export.spec.layout import CacheLayout
from skv_export.spec.quantizer import decode_tile, encode_tile, rotate
from skv_export.spec.recipe import Recipe
from skv_export.spec.reference import stored

ATTENTION_NAME = "skv_simulated"
"""Name under which the hook is registered with transformers."""
BLOCK = 128
"""Queries handled together: bounds the scores held at once to ``[N, BLOCK, S]``."""


_LONG = 1 << 20
"""Tokens beside which those that stay exact do not count."""


class TensorCache(Protocol):
    """How a cache represents one tensor, keys or values, of one layer; everything in the model's own basis."""

    @property
    def num_sink_tokens(self) -> int:
        """First tokens, never quantized."""

    def quantized_tokens(self, length: int) -> int:
        """Tokens held in quantized form once ``length`` tokens are in the cache, counted after the sinks."""

    def exact(self, x: torch.Tensor) -> torch.Tensor:
        """``[H, S, D]`` as read back from the full-precision rows."""

    def quantized(self, x: torch.Tensor) -> torch.Tensor:
        """``[H, S, D]`` as read back from the quantized part; rows that never leave for it are not looked at."""

    def effective_bits(self, context_length: int) -> float:
        """Bits per element at this length, everything counted."""


@dataclass(frozen=True)
class LayoutCache:
    """Our own cache: the op's layout, through the reference's arithmetic.

    Attributes:
        layout: Of keys or values of one layer.
        round_recent: Whether the full-precision rows are rounded to ``recent_type``, as the op does; without it, what
            differs is the tiles' doing alone.
        basis: Of calibrated keys.
    """

    layout: CacheLayout
    round_recent: bool = True
    basis: KeyBasis | None = None

    @property
    def num_sink_tokens(self) -> int:
        """First tokens, never quantized."""
        return self.layout.num_sink_tokens

    def quantized_tokens(self, length: int) -> int:
        """As the layout says."""
        return self.layout.quantized_tokens(length)

    def exact(self, x: torch.Tensor) -> torch.Tensor:
        """Rounds to ``recent_type``, in the cache's basis."""
        if not self.round_recent:
            return x
        return self._to_model(stored(self.layout, x.detach().cpu().numpy()).astype(np.float32), x)

    def quantized(self, x: torch.Tensor) -> torch.Tensor:
        """Quantizes every full tile and reads it back."""
        layout = self.layout
        if self.basis is not None:
            self.basis.check(layout, x.shape[0])
        rows = stored(layout, x.detach().cpu().numpy())
        first, t = layout.num_sink_tokens, layout.tile_tokens
        tiles = max(0, (rows.shape[1] - first) // t)
        span = slice(first, first + tiles * t)
        out = rows.astype(np.float32)
        if tiles:
            content = rows[:, span].reshape(rows.shape[0], tiles, t, -1)
            read = decode_tile(layout, encode_tile(layout, content, self.basis), self.basis)
            out[:, span] = read.reshape(rows.shape[0], tiles * t, -1)
        return self._to_model(out, x)

    def moved(self, x: torch.Tensor, chosen: NDArray[np.int64]) -> torch.Tensor:
        """Tokens ``[H, count]`` of whole tiles of ``x``, counted after the sinks, once they are tiles of their own."""
        layout = self.layout
        rows = stored(layout, x.cpu().numpy())[:, layout.num_sink_tokens :]
        heads, t = len(rows), layout.tile_tokens
        content = rows[:, : rows.shape[1] // t * t].reshape(heads, -1, t, layout.padded_dim)
        tiles = move_tokens(layout, encode_tile(layout, content, self.basis), chosen, self.basis)
        read = decode_tile(layout, tiles, self.basis).reshape(heads, chosen.shape[1], layout.padded_dim)
        return self._to_model(read, x)

    def effective_bits(self, context_length: int) -> float:
        """All bytes of the block, over the tokens that a query can see: a sliding window has no use for more."""
        seen = min(context_length, self.layout.local_window_size or context_length)
        return self.layout.effective_bits(context_length) * context_length / seen

    def _to_model(self, rows: Any, like: torch.Tensor) -> torch.Tensor:
        """Rows in the model's basis; gradients pass to ``like``, which they stand for, as if nothing was rounded."""
        x = rotate(rows, self.layout.rotation_dim) if self.layout.rotation == "hadamard" else rows
        made = torch.from_numpy(np.ascontiguousarray(x[..., : self.layout.head_dim])).to(like.device)
        return like + (made - like.detach()) if like.requires_grad else made


@dataclass(frozen=True)
class FullCache:
    """The cache of the unquantized model: what a configuration is compared with."""

    num_sink_tokens: int = 0

    def quantized_tokens(self, length: int) -> int:
        """None."""
        return 0

    def exact(self, x: torch.Tensor) -> torch.Tensor:
        """As it is."""
        return x

    def quantized(self, x: torch.Tensor) -> torch.Tensor:
        """As it is."""
        return x

    def effective_bits(self, context_length: int) -> float:
        """As a float16 cache has."""
        return 16.0


States = tuple[torch.Tensor, torch.Tensor]
"""A tensor ``[N_kv, S, D]`` as read back from the full-precision rows, and from the quantized part."""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    caches: tuple[TensorCache, TensorCache],
    *,
    scale: float,
    softcap: float = 0.0,
    local_window_size: int = 0,
    head_sink: torch.Tensor | None = None,
    states: tuple[States, States] | None = None,
    first: int = 0,
) -> torch.Tensor:
    """Attention of one sequence, token by token through the caches, all tokens in one call.

    Args:
        query: ``[N, S, D]``, float32, after RoPE and QK norm.
        key: ``[N_kv, S, D]``.
        value: The same.
        caches: Of keys and of values.
        scale: Multiplies the scores.
        softcap: As the op's attribute.
        local_window_size: As the op's attribute.
        head_sink: ``[N]``.
        states: Keys and values as they are read back, each from the full-precision rows and from the quantized part;
            None = what ``caches`` make of them.
        first: First query that is answered; the rows of those before it mean nothing.

    Returns:
        ``[N, S, D]``.
    """
    heads, tokens, dim = key.shape
    grouped = (query * scale).reshape(heads, -1, tokens, dim)
    k_states, v_states = states or [(c.exact(x), c.quantized(x)) for c, x in zip(caches, (key, value), strict=True)]
    out = torch.empty_like(grouped)
    sink = None if head_sink is None else head_sink.float().reshape(heads, -1, 1, 1)
    for start in range(first, tokens, BLOCK):
        stop = min(start + BLOCK, tokens)
        q, own = grouped[:, :, start:stop], torch.arange(stop - start, device=query.device)
        # The query heads of a KV head share its rows: one product for all of them.
        folded = q.reshape(heads, -1, dim)
        k, k_late = _view(caches[0], *k_states, start, stop)
        v, v_late = _view(caches[1], *v_states, start, stop)
        scores = (folded @ k.mT).reshape(*q.shape[:3], -1)
        for columns, late, difference in k_late:
            scores[..., columns] += (folded @ difference.mT).reshape(*q.shape[:3], -1).mul_(late)
        scores[..., own, own + start] = (q * key[:, None, start:stop]).sum(-1)
        weights = weigh(scores, start, softcap, local_window_size, sink)
        block = (weights.flatten(1, 2) @ v).reshape(q.shape)
        for columns, late, difference in v_late:
            block += ((weights[..., columns] * late).flatten(1, 2) @ difference).view_as(block)
        block += weights[..., own, own + start, None] * (value - v_states[0])[:, None, start:stop]
        out[:, :, start:stop] = block
    return out.reshape(-1, tokens, dim)


def weigh(
    scores: torch.Tensor, start: int, softcap: float, local_window_size: int, sink: torch.Tensor | None
) -> torch.Tensor:
    """Scores ``[..., Q, S]`` of queries ``start ... start + Q - 1`` to the weights of the tokens that each sees.

    Args:
        scores: May be changed in place.
        start: First query.
        softcap: As in ``attend``.
        local_window_size: The same.
        sink: Of each head, ``[H, N, 1, 1]``.
    """
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    _mask(scores, start, local_window_size)
    if sink is None:
        return scores.softmax(-1)
    return torch.cat([scores, sink.expand(*scores.shape[:-1], 1)], -1).softmax(-1)[..., :-1]


def in_tiles(cache: TensorCache, tokens: int) -> torch.Tensor:
    """Returns ``[S, S]``: whether key j stands in a tile when query t is decoded, after t tokens were appended."""
    count = torch.tensor([cache.quantized_tokens(t) for t in range(tokens)])
    j = torch.arange(tokens) - cache.num_sink_tokens
    return (j >= 0)[None, :] & (j[None, :] < count[:, None])


def _mask(scores: torch.Tensor, start: int, window: int) -> None:
    """Hides the tokens after each query, and those that a sliding window has left behind, in place."""
    queries, columns = scores.shape[-2:]
    column = torch.arange(columns, device=scores.device)
    position = column[start : start + queries, None]
    scores[..., start:].masked_fill_(column[start:] > position, -torch.inf)
    if 0 < window < columns:
        scores.masked_fill_(column <= position - window, -torch.inf)


_Change = tuple[slice, torch.Tensor, torch.Tensor]


def _view(
    cache: TensorCache, exact: torch.Tensor, quantized: torch.Tensor, start: int, stop: int
) -> tuple[torch.Tensor, list[_Change]]:
    """What queries ``start ... stop-1`` see: tokens ``[H, stop, D]`` as the first of them does, and what changes later.

    A change is: columns, which queries see them quantized ``[queries, columns]``, and quantized minus exact.
    """
    sinks = cache.num_sink_tokens
    first, last = (sinks + cache.quantized_tokens(length) for length in (start, stop - 1))
    seen = exact[:, :stop].clone()
    seen[:, sinks:first] = quantized[:, sinks:first]
    if last == first:
        return seen, []
    ends = torch.tensor([sinks + cache.quantized_tokens(i) for i in range(start, stop)], device=exact.device)
    late = (torch.arange(first, last, device=exact.device)[None] < ends[:, None]).float()
    columns = slice(first, last)
    return seen, [(columns, late, quantized[:, columns] - exact[:, columns])]


# The Hugging Face hook.

CacheFactory = Callable[[int, int, int], tuple[TensorCache, TensorCache]]
"""Layer index, head_dim and sliding window (0 = none) to the caches of a layer's keys and values."""


class AttentionOptions(TypedDict):
    """What a layer's attention takes beside its tensors; see ``attend``."""

    scale: float
    softcap: float
    local_window_size: int
    head_sink: torch.Tensor | None


Observer = Callable[[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor], AttentionOptions, torch.Tensor], None]
"""Called with a layer's index, its query, key and value of one sequence, its options, and its output."""
_ACTIVE: ContextVar[Simulation | None] = ContextVar("skv_simulation", default=None)


class Simulation:
    """One configuration's caches, made when a layer is first seen.

    A model whose attention was replaced by ``ATTENTION_NAME`` runs inside ``with simulation.active()``.

    Args:
        make: Makes a layer's caches.
        observer: Told of every layer's attention.
        attend: Computes attention in place of ``attend``, with its arguments.
    """

    def __init__(
        self, make: CacheFactory, observer: Observer | None = None, attend: Callable[..., torch.Tensor] = attend
    ) -> None:
        self._make, self.observer, self.attend = make, observer, attend
        self._caches: dict[int, tuple[TensorCache, TensorCache]] = {}
        self._shapes: dict[int, tuple[int, int]] = {}

    @classmethod
    def full_precision(cls) -> Simulation:
        """Returns the simulation of the unquantized model."""
        return cls(lambda *_: (FullCache(), FullCache()))

    @classmethod
    def of_recipe(
        cls,
        recipe: Recipe,
        bases: Mapping[int, KeyBasis] | None = None,
        attend: Callable[..., torch.Tensor] = attend,
    ) -> Simulation:
        """Returns the simulation of our own cache with a recipe's options.

        Args:
            recipe: The options.
            bases: Of calibrated keys, by layer, where the recipe's form of keys can have one.
            attend: As in ``Simulation``.
        """

        def make(index: int, head_dim: int, window: int) -> tuple[TensorCache, TensorCache]:
            key, value = CacheLayout.pair(recipe.layer(index), head_dim, window)
            basis = bases.get(index) if bases and can_be_calibrated(key) else None
            return LayoutCache(key, basis=basis), LayoutCache(value)

        return cls(make, attend=attend)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Models that run inside the block have these caches."""
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    def layer(self, index: int, kv_num_heads: int, head_dim: int, window: int) -> tuple[TensorCache, TensorCache]:
        """Returns the caches of layer ``index``."""
        if index not in self._caches:
            self._caches[index] = self._make(index, head_dim, window)
            self._shapes[index] = kv_num_heads * head_dim, window
        return self._caches[index]

    def effective_bits(self, context_length: int) -> float:
        """Bits per element over all layers, keys and values, everything counted; after a window has been run.

        A layer with a sliding window has the elements of its window.
        """
        bits = total = 0.0
        for index, pair in self._caches.items():
            width, window = self._shapes[index]
            elements = width * min(context_length, window or context_length)
            bits += sum(elements * cache.effective_bits(context_length) for cache in pair)
            total += 2 * elements
        return bits / total

    def quantizes(self, tokens: int) -> bool:
        """Whether so many tokens are enough for some to be quantized, if any are meant to be; after a window."""
        caches = [cache for pair in self._caches.values() for cache in pair]
        meant = [cache for cache in caches if cache.effective_bits(_LONG) < FullCache().effective_bits(_LONG)]
        return not meant or any(cache.quantized_tokens(tokens) for cache in meant)


def _hook(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: ``[B, N, S, D]`` to ``[B, S, N, D]``; a row of the batch is a sequence."""
    simulation = _ACTIVE.get()
    if simulation is None:
        raise SkvError(f"{type(module).__name__}: no simulation is active", fix="Run the model in simulation.active().")
    if hasattr(module, "expand_kv"):
        raise SkvError(
            f"{type(module).__name__}: the simulation has no cache of latents",
            got="multi-head latent attention",
            expected="keys and values of each head",
            fix="Export the model: `skv-export verify` measures what its cache costs.",
        )
    layer: int = module.layer_idx  # type: ignore[assignment]
    owner = cache_sources(getattr(module, "config", None)).get(layer, layer)
    options: AttentionOptions = {
        "scale": float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        "softcap": float(softcap or 0.0),
        "local_window_size": int(sliding_window or 0),
        "head_sink": s_aux,
    }
    caches = simulation.layer(owner, key.shape[1], key.shape[-1], options["local_window_size"])
    rows = []
    for tensors in zip(query.float(), key.float(), value.float(), strict=True):
        rows.append(simulation.attend(*tensors, caches, **options))
        if simulation.observer is not None:
            simulation.observer(layer, tensors, options, rows[-1])
    return torch.stack(rows).transpose(1, 2).to(query.dtype), None


AttentionInterface.register(ATTENTION_NAME, _hook)


def simulated_logits(model: PreTrainedModel, ids: torch.Tensor, simulation: Simulation) -> torch.Tensor:
    """Float32 logits ``[S, vocab]`` of a window ``[S]`` with the caches of a simulation, in one forward pass."""
    with simulation.active():
        logits: torch.Tensor = model(ids[None].to(input_device(model)), use_cache=False).logits[0]
    return logits.float()
