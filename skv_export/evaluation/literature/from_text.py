"""Caches with constants fitted to a calibration text: what each layer's attention sees on it, and what it matters."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from skv_export.errors import SkvError
from skv_export.evaluation.candidates import Candidate
from skv_export.evaluation.decode_simulation import (
    AttentionOptions,
    CacheFactory,
    FullCache,
    Simulation,
    simulated_logits,
)
from skv_export.evaluation.literature.rope import Rope, watched
from skv_export.evaluation.text import CALIBRATION_TEXT, cut_windows, read_text

WINDOWS, WINDOW_TOKENS = 8, 512
"""Of the calibration text, the shipped one that nothing is judged on."""


@dataclass
class Activations:
    """What one layer saw on the calibration text, all windows one after the other.

    Attributes:
        keys: ``[H, S, D]``, after RoPE.
        values: The same.
        key_gradients: Of the loss (the mean over a window of the next token's negative log-probability), per number.
        value_gradients: The same.
        queries: ``[H, D, D]``: second moments of the queries of each KV head.
        window: Tokens of each window.
        rope: Of one window; None = the layer has none.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_gradients: torch.Tensor
    value_gradients: torch.Tensor
    queries: torch.Tensor
    window: int
    rope: Rope | None

    def keys_before_rope(self) -> torch.Tensor:
        """Keys ``[H, S, D]`` as they are before RoPE."""
        windows = torch.split(self.keys, self.window, 1)
        return torch.cat([self.rope.undo(x) if self.rope else x for x in windows], 1)


Ropes = dict[int, Rope]
"""Each layer's RoPE on the text at hand."""
Fit = Callable[[dict[int, Activations], Ropes], CacheFactory]
"""Makes caches from what the layers saw; the RoPE of a text is there while the text runs."""
_SEEN: WeakKeyDictionary[PreTrainedModel, tuple[str, dict[int, Activations]]] = WeakKeyDictionary()
"""By model the digest of the last windows and what was seen, so that all candidates share one calibration."""


@dataclass(frozen=True)
class _Made:
    """A cache fitted to a model and windows.

    Attributes:
        model: Held, so that no other model takes its identity.
        windows: Their digest.
        simulation: The cache.
        ropes: What it looks at.
    """

    model: PreTrainedModel
    windows: str
    simulation: Simulation
    ropes: Ropes


@dataclass(frozen=True)
class FromText(Candidate):
    """A cache that is fitted to the calibration text, once per model and tokenizer.

    Attributes:
        fit: Makes it.
        windows: Of the calibration text, ``[W, S]``, put here by the last ``prepare``.
        made: By the model's identity; the last is that of the last run.
    """

    fit: Fit
    windows: list[torch.Tensor] = field(default_factory=list)
    made: dict[int, _Made] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, note: str, fit: Fit) -> FromText:
        """Returns the candidate of a method."""
        return cls(name, f"{name} ({note}) from {WINDOWS} windows of {WINDOW_TOKENS}", note, fit)

    def prepare(self, tokenizer: Any) -> None:
        """Cuts the calibration text."""
        text = read_text(None, CALIBRATION_TEXT)
        self.windows[:] = [torch.from_numpy(cut_windows(tokenizer, text, WINDOWS, WINDOW_TOKENS))]

    def logits(self, model: PreTrainedModel, ids: torch.Tensor, prompt: int = 0) -> torch.Tensor:
        """One forward pass; the first time, passes over the calibration text before it.

        Raises:
            SkvError: ``prepare`` was not called.
        """
        if not self.windows:
            raise SkvError(f"{self.name} has no calibration text", fix="Call prepare(tokenizer) first.")
        made, digest = self.made.pop(id(model), None), _digest(self.windows[0])
        if made is None or made.windows != digest:
            ropes: Ropes = {}
            made = _Made(model, digest, Simulation(self.fit(seen(model, self.windows[0]), ropes)), ropes)
        self.made[id(model)] = made
        with watched(model, made.ropes):
            return simulated_logits(model, ids, made.simulation)

    def effective_bits(self, context_length: int) -> float:
        """Over all layers, of the model that ran last."""
        return self._last.effective_bits(context_length)

    def quantizes(self, tokens: int) -> bool:
        """Whether any layer's cache does, of the model that ran last."""
        return self._last.quantizes(tokens)

    @property
    def _last(self) -> Simulation:
        return list(self.made.values())[-1].simulation


def seen(model: PreTrainedModel, windows: torch.Tensor) -> dict[int, Activations]:
    """Runs a model on windows ``[W, S]`` and returns what each layer's attention saw, gradients included.

    The gradients are those of each window's loss against its own tokens: their squares are the diagonal of the
    empirical Fisher information.
    """
    digest = _digest(windows)
    if model in _SEEN and _SEEN[model][0] == digest:
        return _SEEN[model][1]
    now: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def observe(layer: int, tensors: Any, options: AttentionOptions, output: torch.Tensor) -> None:
        now[layer] = tensors
        for x in tensors[1:]:
            x.retain_grad()

    simulation = Simulation(lambda *_: (FullCache(), FullCache()), observe)
    embed = model.get_input_embeddings()
    handle = embed.register_forward_hook(lambda module, args, output: output.requires_grad_())
    ropes: Ropes = {}
    parts: dict[int, list[list[torch.Tensor]]] = {}
    try:
        with torch.enable_grad(), _constant(model), watched(model, ropes):
            for ids in windows:
                logits = simulated_logits(model, ids, simulation)
                torch.autograd.backward(torch.nn.functional.cross_entropy(logits[:-1], ids[1:].to(logits.device)))
                for layer, (q, k, v) in now.items():
                    q = q.detach().reshape(len(k), -1, q.shape[-1])
                    moment = q.mT @ q / (q.shape[1] * len(windows))
                    parts.setdefault(layer, []).append([k.detach(), v.detach(), k.grad, v.grad, moment])  # type: ignore[list-item]
                now.clear()
    finally:
        handle.remove()
    found = {}
    for layer, of_windows in parts.items():
        *texts, moments = zip(*of_windows, strict=True)
        keys, values, key_gradients, value_gradients = (torch.cat(x, 1) for x in texts)
        moment, rope = torch.stack(moments).sum(0), ropes.get(layer)
        rope = rope and rope.checked(texts[0][-1])
        found[layer] = Activations(keys, values, key_gradients, value_gradients, moment, windows.shape[1], rope)
    _SEEN[model] = digest, found
    return found


def _digest(windows: torch.Tensor) -> str:
    return hashlib.sha256(f"{tuple(windows.shape)}".encode() + windows.numpy().tobytes()).hexdigest()


@contextmanager
def _constant(model: PreTrainedModel) -> Iterator[None]:
    """Weights take no gradients inside the block."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_()
