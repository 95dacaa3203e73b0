"""Runs a model for `analyze --measure`: records the inputs of each layer's attention, and simulates its quantized
cache.

A query sees the sinks and the recent tokens exactly, and the tiles that had been flushed before it quantized, by the
reference quantizer: one pass over a window shows what token-by-token decoding would see.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface

from skv_export.checkpoints.checkpoint import Source
from skv_export.checkpoints.pretrained import Placement, input_device, load_model, load_tokenizer, replace_attention
from skv_export.errors import SkvError
from skv_export.spec import quantizer, reference
from skv_export.spec.layout import CacheLayout
from skv_export.spec.recipe import LayerConfig

EXACT = 16
"""Bits that leave a tensor as it is."""
_INSTANCES = itertools.count()


@dataclass(frozen=True)
class LayerTraffic:
    """What one layer's attention saw in one window.

    Attributes:
        q: ``[N, S, D]``, after RoPE and QK norm.
        k: ``[N_kv, S, D]``.
        v: The same.
        scale: Multiplies the scores.
        softcap: 0 = none.
        window: Sliding window; 0 = none.
        sink: ``[N]`` or None.
        gradient: ``[N, S, D]``, of the log-probability of a sampled continuation with respect to the output.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    softcap: float
    window: int
    sink: Tensor | None
    gradient: Tensor | None = None

    @property
    def seen(self) -> Tensor:
        """``[S, S]``: which keys each query sees."""
        i = torch.arange(self.q.shape[1], device=self.q.device)
        distance = i[:, None] - i[None, :]
        return (distance >= 0) & (distance < self.window) if self.window else distance >= 0

    def scores(self, k: Tensor, rows: slice = slice(None)) -> Tensor:
        """Returns logits ``[N, rows, S]`` for keys ``[N_kv, S, D]``, not masked."""
        s = (self.q[:, rows] @ grouped(k, self.q.shape[0]).mT) * self.scale
        return self.softcap * torch.tanh(s / self.softcap) if self.softcap else s

    def weights(self, scores: Tensor, seen: Tensor) -> Tensor:
        """Returns the softmax of logits over the keys that are seen, the sink taking its share."""
        scores = scores.masked_fill(~seen, -torch.inf)
        if self.sink is None:
            return scores.softmax(-1)
        sink = self.sink[:, None, None].expand(*scores.shape[:2], 1)
        return torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]

    def attend(self, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        """Returns ``[N, S, D]`` for any number of keys and values ``[N_kv, M, D]``, masked by ``seen`` ``[S, M]``."""
        if self.softcap or self.sink is not None:
            return self.weights(self.scores(k), seen) @ grouped(v, self.q.shape[0])
        return torch.nn.functional.scaled_dot_product_attention(
            self.q[None], k[None], v[None], attn_mask=seen, scale=self.scale, enable_gqa=True
        )[0]


def grouped(x: Tensor, heads: int) -> Tensor:
    """Repeats ``[N_kv, ...]`` for the query heads that share each head: ``[N, ...]``."""
    return x.repeat_interleave(heads // x.shape[0], dim=0)


def flushed(layout: CacheLayout, tokens: int) -> Tensor:
    """Returns ``[S, S]``: whether key j stands in a tile when query t is decoded, after t tokens were appended."""
    count = torch.tensor([layout.quantized_tokens(t) for t in range(tokens)])
    j = torch.arange(tokens) - layout.num_sink_tokens
    return (j >= 0)[None, :] & (j[None, :] < count[:, None])


def quantized(layout: CacheLayout, x: Tensor) -> Tensor:
    """Returns keys or values ``[N_kv, S, D]`` as the cache gives them back, every complete tile quantized."""
    t, sinks = layout.tile_tokens, layout.num_sink_tokens
    tiles = max(0, (x.shape[1] - sinks) // t)
    if layout.bits == EXACT or not tiles:
        return x
    y = reference.stored(layout, x.cpu().numpy()).astype(np.float32)
    span = slice(sinks, sinks + tiles * t)
    content = y[:, span].reshape(y.shape[0], tiles, t, -1)
    y[:, span] = quantizer.dequantize(layout, *quantizer.quantize(layout, content)).reshape(y.shape[0], tiles * t, -1)
    if layout.rotation == "hadamard":
        y = quantizer.rotate(y, layout.rotation_dim)
    return torch.from_numpy(np.ascontiguousarray(y[..., : layout.head_dim])).to(x.device)


class DecodeModel:
    """A Hugging Face model whose attention can hold its keys and values as a quantized cache would.

    Attributes:
        bits: Per layer the cache's options; a layer that is not named is exact.
    """

    def __init__(self, source: Source, placement: Placement | None = None) -> None:
        name = f"skv_measure_{next(_INSTANCES)}"  # transformers' registry is global; each model has its own entry
        AttentionInterface.register(name, self._attend)
        self.tokenizer = load_tokenizer(source)
        self.model: Any = load_model(source, placement=placement)
        replace_attention(self.model, name)
        self.bits: dict[int, LayerConfig] = {}
        self._record: dict[int, tuple[LayerTraffic, Tensor]] | None = None

    def windows(self, text: str, window: int, count: int) -> list[Tensor]:
        """Cuts ``count`` windows of ``window`` tokens out of a text, evenly spread.

        Raises:
            SkvError: The text is shorter than one window.
        """
        ids = self.tokenizer(text, return_tensors="pt").input_ids[0]
        if len(ids) < window:
            raise SkvError(
                "text: too short", got=f"{len(ids)} tokens", expected=f"at least {window}", fix="Pass a longer --text."
            )
        count = min(count, len(ids) // window)
        step = (len(ids) - window) // max(1, count - 1) if count > 1 else 0
        return [ids[i * step :][:window] for i in range(count)]

    @torch.no_grad()
    def log_probs(self, ids: Tensor) -> Tensor:
        """Returns ``[S, vocabulary]`` log-probabilities of the next token, with ``self.bits`` in force."""
        ids = ids.to(input_device(self.model))
        return self.model(ids[None], use_cache=False).logits[0].float().log_softmax(-1).cpu()

    def perplexity(self, windows: Sequence[Tensor]) -> float:
        """Perplexity over windows, with ``self.bits`` in force."""
        losses = [-self.log_probs(w)[:-1].gather(1, w[1:, None]).mean().item() for w in windows]
        return math.exp(sum(losses) / len(losses))

    def traffic(self, ids: Tensor, seed: int = 0) -> list[LayerTraffic]:
        """Runs one window and returns what every layer's attention saw, with gradients of a sampled continuation.

        The gradient's square is an unbiased sample of the Fisher information, which is the second derivative of the KL
        divergence of the logits (docs/theory.md, "What a layer's error costs").
        """
        self._record = {}
        embedded = self.model.get_input_embeddings()(ids[None].to(input_device(self.model))).requires_grad_()
        try:
            logits = self.model(inputs_embeds=embedded, use_cache=False).logits[0].float()
            generator = torch.Generator().manual_seed(seed)
            sample = torch.multinomial(logits.detach().cpu().softmax(-1), 1, generator=generator)[:, 0]
            loss = torch.nn.functional.cross_entropy(logits, sample.to(logits.device), reduction="sum")
            record = [self._record[i] for i in sorted(self._record)]
            gradients = torch.autograd.grad(loss, [output for _, output in record])
        finally:
            self._record = None
        return [replace(t, gradient=g.float().cpu()) for (t, _), g in zip(record, gradients, strict=True)]

    def _attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        sliding_window: int | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """The attention function that transformers calls: ``[1, heads, S, D]`` in, ``[1, S, N, D]`` out."""
        layer = int(module.layer_idx)
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        sink = None if s_aux is None else s_aux.float()
        q, k, v = query[0].float(), key[0].float(), value[0].float()
        live = LayerTraffic(q, k, v, scale, softcap or 0.0, sliding_window or 0, sink)
        config = self.bits.get(layer)
        output = decode_output(live, config) if config else live.attend(live.k, live.v, live.seen)
        if self._record is not None:
            q, k, v = (x.detach().cpu() for x in (live.q, live.k, live.v))
            self._record[layer] = (replace(live, q=q, k=k, v=v, sink=None if sink is None else sink.cpu()), output)
        return output.transpose(0, 1)[None].contiguous().to(query.dtype), None


def decode_output(live: LayerTraffic, config: LayerConfig) -> Tensor:
    """Attention output ``[N, S, D]`` with the cache of ``config``, decode style.

    One softmax over twice the keys: each position takes part as it is or as its tile gives it back, never as both.
    """
    k_layout, v_layout = CacheLayout.pair(config, live.q.shape[-1], live.window)
    far, seen = flushed(k_layout, live.q.shape[1]).to(live.q.device), live.seen
    k = torch.cat([live.k, quantized(k_layout, live.k)], dim=1)
    v = torch.cat([live.v, quantized(v_layout, live.v)], dim=1)
    return live.attend(k, v, torch.cat([seen & ~far, seen & far], dim=1))
