"""What each layer's attention sees when a model runs on text, and the model with caches of chosen bits per layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skv_export.checkpoints.checkpoint import Source
from skv_export.checkpoints.pretrained import Placement, input_device, load_model, load_tokenizer, replace_attention
from skv_export.evaluation.decode_simulation import (
    ATTENTION_NAME,
    AttentionOptions,
    FullCache,
    LayoutCache,
    Simulation,
    TensorCache,
    attend,
    simulated_logits,
)
from skv_export.evaluation.text import cut_windows
from skv_export.spec.key_basis import KeyBasis
from skv_export.spec.layout import CacheLayout
from skv_export.spec.recipe import LayerConfig

EXACT = 16
"""Bits that leave a tensor as it is."""


@dataclass(frozen=True)
class LayerActivations:
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
        i = torch.arange(self.q.shape[1])
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

    def output(self, config: LayerConfig | None = None) -> Tensor:
        """Returns the attention's output ``[N, S, D]`` with the cache of ``config``, decode style; None = exact."""
        options: AttentionOptions = {
            "scale": self.scale,
            "softcap": self.softcap,
            "local_window_size": self.window,
            "head_sink": self.sink,
        }
        return attend(self.q, self.k, self.v, layer_caches(config, self.q.shape[-1], self.window), **options)


def grouped(x: Tensor, heads: int) -> Tensor:
    """Repeats ``[N_kv, ...]`` for the query heads that share each head: ``[N, ...]``."""
    return x.repeat_interleave(heads // x.shape[0], dim=0)


def tensor_cache(layout: CacheLayout, basis: KeyBasis | None = None) -> TensorCache:
    """Returns the cache of one tensor that is to be measured: tiles quantized, everything else as it is.

    Args:
        layout: Of keys or values.
        basis: Of calibrated keys.
    """
    if layout.bits == EXACT:
        return FullCache(layout.num_sink_tokens)
    return LayoutCache(layout, round_recent=False, basis=basis)


def layer_caches(
    config: LayerConfig | None, head_dim: int, window: int, basis: KeyBasis | None = None
) -> tuple[TensorCache, TensorCache]:
    """Returns the caches of a layer's keys and values; None = exact."""
    if config is None:
        return FullCache(), FullCache()
    key, value = CacheLayout.pair(config, head_dim, window)
    return tensor_cache(key, basis), tensor_cache(value)


class DecodeModel:
    """A Hugging Face model whose attention can hold its keys and values as a quantized cache would.

    Attributes:
        bits: Per layer the cache's options; a layer that is not named is exact.
        bases: Per layer the basis of calibrated keys.
    """

    def __init__(self, source: Source, placement: Placement | None = None) -> None:
        self.tokenizer = load_tokenizer(source)
        self.model: Any = load_model(source, placement=placement)
        replace_attention(self.model, ATTENTION_NAME)
        self.bits: dict[int, LayerConfig] = {}
        self.bases: Mapping[int, KeyBasis] = {}

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    def windows(self, text: str, window: int, count: int) -> list[Tensor]:
        """Cuts ``count`` windows of ``window`` tokens out of a text, as the text that judges is cut.

        Each starts as the tokenizer starts a text: Gemma without its first token is a model out of its mind, whose
        layers lose a hundred times what they lose with it.

        Raises:
            SkvError: The text is shorter than one window.
        """
        return list(torch.from_numpy(cut_windows(self.tokenizer, text, count, window)))

    @torch.no_grad()
    def log_probs(self, ids: Tensor) -> Tensor:
        """Returns ``[S, vocabulary]`` log-probabilities of the next token, with ``self.bits`` in force."""

        def caches(layer: int, dim: int, window: int) -> tuple[TensorCache, TensorCache]:
            return layer_caches(self.bits.get(layer), dim, window, self.bases.get(layer))

        simulation = Simulation(caches)
        return simulated_logits(self.model, ids, simulation).log_softmax(-1).cpu()

    def capture(self, ids: Tensor, seed: int = 0) -> list[LayerActivations]:
        """Runs one window and returns what every layer's attention saw, with gradients of a sampled continuation.

        The gradient's square is an unbiased sample of the Fisher information, which is the second derivative of the KL
        divergence of the logits (docs/theory.md, "What a layer's error costs").
        """
        calls: dict[int, tuple[tuple[Tensor, ...], AttentionOptions, Tensor]] = {}

        def observe(layer: int, tensors: tuple[Tensor, ...], options: AttentionOptions, output: Tensor) -> None:
            calls[layer] = tuple(x.detach().cpu() for x in tensors), options, output

        embedded = self.model.get_input_embeddings()(ids[None].to(input_device(self.model))).requires_grad_()
        with Simulation(lambda *_: (FullCache(), FullCache()), observe).active():
            logits = self.model(inputs_embeds=embedded, use_cache=False).logits[0].float()
        generator = torch.Generator().manual_seed(seed)
        sample = torch.multinomial(logits.detach().cpu().softmax(-1), 1, generator=generator)[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, sample.to(logits.device), reduction="sum")
        ordered = [calls[i] for i in sorted(calls)]
        gradients = torch.autograd.grad(loss, [output for _, _, output in ordered])
        return [
            _activations(tensors, options, gradient.cpu())
            for (tensors, options, _), gradient in zip(ordered, gradients, strict=True)
        ]


def _activations(tensors: tuple[Tensor, ...], options: AttentionOptions, gradient: Tensor) -> LayerActivations:
    q, k, v = tensors
    sink = options["head_sink"]
    return LayerActivations(
        q,
        k,
        v,
        options["scale"],
        options["softcap"],
        options["local_window_size"],
        None if sink is None else sink.detach().float().cpu(),
        gradient,
    )
