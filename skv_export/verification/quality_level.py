"""The quality level of verify: what the quantized cache loses against the unquantized model.

Both models predict the same windows of a text. The exported one runs decode style: every token sees the cache that
token-by-token decoding would have left. Calls that end at each flush of a tile give the same (``flush_edges``).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel

from skv_export.arguments import check_fields
from skv_export.checkpoints.pretrained import input_device
from skv_export.errors import SkvError
from skv_export.evaluation import metrics
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.progress import Progress
from skv_export.runtime.session import Session
from skv_export.spec.layout import CacheLayout

LOGIT_BYTES = 256 << 20
"""Logits held at once, at most: what a call's batch is limited by."""


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of the quality level; None = not checked.

    Attributes:
        max_ppl_increase: Perplexity over the original's, minus 1.
        max_kld_mean: Mean KL divergence, in nats.
        max_kld_p99: Its 99th percentile.
        min_top1_agreement: Share of positions where both models' most likely token is the same.
    """

    max_ppl_increase: float | None = 0.05
    max_kld_mean: float | None = None
    max_kld_p99: float | None = None
    min_top1_agreement: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class QualityResult:
    """What the quality level measured.

    Attributes:
        ppl_reference: Perplexity of the unquantized model.
        ppl_exported: Perplexity of the exported one.
        kld_mean: Mean over the positions of KL(reference || exported), in nats.
        kld_p99: 99th percentile of the same.
        top1_agreement: Share of positions where both models' most likely token is the same.
        effective_bits: All bytes of the cache at ``window`` tokens, per element.
        window: Tokens per window.
        positions: Predictions that were scored.
        failures: What missed its threshold, a sentence each.
    """

    ppl_reference: float
    ppl_exported: float
    kld_mean: float
    kld_p99: float
    top1_agreement: float
    effective_bits: float
    window: int
    positions: int
    failures: tuple[str, ...] = ()

    @property
    def ppl_increase(self) -> float:
        """Perplexity over the original's, minus 1."""
        return self.ppl_exported / self.ppl_reference - 1

    def rows(self) -> list[str]:
        """The report's lines."""
        return [
            f"perplexity {self.ppl_reference:.3f} -> {self.ppl_exported:.3f} ({self.ppl_increase:+.2%}), "
            f"top-1 agreement {self.top1_agreement:.2%}",
            f"KL divergence {self.kld_mean:.4f} in the mean, {self.kld_p99:.4f} at the 99th percentile",
            f"{self.effective_bits:.2f} bits per element at {self.window} tokens; {self.positions} predictions scored",
        ]

    def against(self, limits: Thresholds) -> tuple[str, ...]:
        """Returns a sentence for each figure beyond its threshold."""
        checks = [
            ("perplexity increase", self.ppl_increase, limits.max_ppl_increase, 1),
            ("mean KL divergence", self.kld_mean, limits.max_kld_mean, 1),
            ("99th percentile of the KL divergence", self.kld_p99, limits.max_kld_p99, 1),
            ("top-1 agreement", self.top1_agreement, limits.min_top1_agreement, -1),
        ]
        return tuple(
            f"quality: {name} is {value:.4f}, expected {'at most' if sign > 0 else 'at least'} {limit}"
            for name, value, limit, sign in checks
            if limit is not None and not sign * value <= sign * limit
        )


def flush_edges(layout: CacheLayout, length: int) -> list[int]:
    """Chunk boundaries at which chunked prefill equals token-by-token decoding of ``length`` tokens.

    A tile is flushed when the total reaches ``s + w + i * T``. Between two such lengths the tiles do not change, and
    every later token is exact in both: in one call as a new token, one by one as a recent one. (The recent rows are
    rounded to ``recent_type``, which new tokens are not: with ``float`` the two are the same.)
    """
    first = layout.num_sink_tokens + layout.ring_tokens
    return [*range(first, length, layout.tile_tokens), length]


def effective_bits(config: ModelConfig, length: int) -> float:
    """Bits per element of a cache of ``length`` tokens: codes, parameters and full-precision tokens."""
    bits, elements = 0.0, 0.0
    for layer in config.layers:
        for layout in (layer.key, layer.value):
            bits += layer.num_key_value_heads * 8 * layout.block_bytes(length)
            elements += layer.num_key_value_heads * length * layout.head_dim
    return bits / elements


@dataclass
class _Scores:
    """Figures of every scored position, chunk by chunk."""

    nll_reference: list[NDArray[np.float64]]
    nll_exported: list[NDArray[np.float64]]
    divergence: list[NDArray[np.float64]]
    agreement: list[NDArray[np.bool_]]

    def add(self, reference: torch.Tensor, exported: torch.Tensor, targets: torch.Tensor) -> None:
        """Adds logits ``[B, S, V]`` of both models; ``targets`` are the tokens that follow, ``[B, S]``."""
        for theirs, ours, wanted in zip(reference, exported, targets, strict=True):  # one by one: less memory at a time
            p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
            self.nll_reference.append(metrics.nll(p, wanted).double().numpy())
            self.nll_exported.append(metrics.nll(q, wanted).double().numpy())
            self.divergence.append(metrics.kl_divergence(p, q).clamp(min=0).double().numpy())
            self.agreement.append(metrics.top1_agreement(p, q).numpy())


class Reference(Protocol):
    """The unquantized model: called with new tokens, it remembers those before.

    Attributes:
        max_batch: Sequences of a call, at most.
    """

    max_batch: int

    def restart(self) -> None:
        """Forgets all tokens."""

    def run(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Runs new tokens ``[B, S]``; returns the logits of as many of the last ones as the exported graph does."""


class TorchReference:
    """A model in PyTorch, with transformers' own attention and cache."""

    max_batch = 8

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.restart()

    def restart(self) -> None:
        """Forgets all tokens."""
        self._past = DynamicCache(config=self._model.config)

    def run(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Runs new tokens ``[B, S]``; returns their logits, ``[B, S, vocab_size]``."""
        with torch.no_grad():
            given = torch.from_numpy(ids).to(input_device(self._model))
            return self._model(given, past_key_values=self._past, use_cache=True).logits.float().cpu().numpy()


def measure(
    reference: Reference, session: Session, windows: NDArray[np.int64], *, thresholds: Thresholds | None = None
) -> QualityResult:
    """Measures an exported model against the original on windows of text.

    Args:
        reference: The unquantized model.
        session: Of the exported model; token by token where it returns the last position's logits alone.
        windows: ``[windows, length]``, tokens. Every prediction but the first token's is scored.
        thresholds: What to reach.

    Raises:
        SkvError: The windows are too short to have quantized tokens.
    """
    length, vocab = windows.shape[1], session.config.vocab_size
    edges = flush_edges(session.config.layers[0].key, length)
    if len(edges) < 2:
        raise SkvError(
            "quality: window_tokens", got=length, expected=f"more than {edges[0]}, else nothing is quantized"
        )
    if not session.config.all_logits:
        edges = list(range(1, length + 1))
    longest = max(np.diff([0, *edges]))
    batch = max(1, min(reference.max_batch, LOGIT_BYTES // (int(longest) * vocab * 4)))
    scores = _Scores([], [], [], [])
    with Progress() as progress:
        done = 0
        for rows in np.split(windows, range(batch, len(windows), batch)):
            cache = session.cache(len(rows), length)
            reference.restart()
            for start, end in zip([0, *edges], edges, strict=False):
                ids = np.ascontiguousarray(rows[:, start:end])
                exported = torch.from_numpy(session.run(ids, None, None, cache))
                expected = torch.from_numpy(reference.run(ids))
                targets = torch.from_numpy(rows[:, start + 1 : end + 1])
                scored = targets.shape[1]
                scores.add(expected[:, :scored], exported[:, :scored], targets)
                done += ids.size
                progress("quality", done, windows.size)
    result = _summary(scores, effective_bits(session.config, length), length)
    return dataclasses.replace(result, failures=result.against(thresholds or Thresholds()))


def _summary(scores: _Scores, bits: float, window: int) -> QualityResult:
    divergence = np.concatenate(scores.divergence)
    return QualityResult(
        ppl_reference=metrics.perplexity(np.concatenate(scores.nll_reference)),
        ppl_exported=metrics.perplexity(np.concatenate(scores.nll_exported)),
        kld_mean=float(divergence.mean()),
        kld_p99=float(np.quantile(divergence, 0.99)),
        top1_agreement=float(np.concatenate(scores.agreement).mean()),
        effective_bits=bits,
        window=window,
        positions=len(divergence),
    )
