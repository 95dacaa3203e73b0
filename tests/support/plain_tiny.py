"""The tiny model in plain numpy, without a cache: each head sees the positions that it is told to."""

from __future__ import annotations

import numpy as np
from tiny_graph import CONTEXT, EXACT, HEAD_DIM, HEADS, KV_HEADS, WIDTH, Tiny

GROUP = HEADS // KV_HEADS


class Plain:
    """The tiny model with exact keys and values, each head seeing the positions that it is told to: no cache."""

    def __init__(self, tiny: Tiny) -> None:
        self.weights, self.windows = tiny.weights, tiny.windows
        self.keys: list[list[np.ndarray]] = [[] for _ in self.windows]
        self.values: list[list[np.ndarray]] = [[] for _ in self.windows]
        self.queries: list[list[np.ndarray]] = [[] for _ in self.windows]
        self.forgotten = np.zeros((len(self.windows), KV_HEADS, CONTEXT), np.bool_)

    def step(self, token: int) -> np.ndarray:
        w, position = self.weights, len(self.keys[0])
        x = w["embedding"][token] + w["position"][position]
        for i, window in enumerate(self.windows):
            q, k, v = np.split(x @ w[f"qkv.{i}"], [WIDTH, WIDTH + KV_HEADS * HEAD_DIM])
            self.queries[i].append(q.reshape(HEADS, HEAD_DIM))
            self.keys[i].append(k.reshape(KV_HEADS, HEAD_DIM))
            self.values[i].append(v.reshape(KV_HEADS, HEAD_DIM))
            out = np.empty((HEADS, HEAD_DIM), np.float32)
            for head in range(HEADS):
                h = head // GROUP
                first = max(0, position - window + 1) if window else 0
                seen = [p for p in range(first, position + 1) if not self.forgotten[i, h, p]]
                weights = self.attention(i, head, position, seen)
                out[head] = weights @ np.array([self.values[i][p][h] for p in seen])
            x = x + out.reshape(-1) @ w[f"out.{i}"]
        return x @ w["head"]

    def attention(self, i: int, head: int, position: int, seen: list[int]) -> np.ndarray:
        h = head // GROUP
        scores = np.array([self.keys[i][p][h] for p in seen]) @ self.queries[i][position][head] * HEAD_DIM**-0.5
        weights = np.exp(scores - scores.max())
        return weights / weights.sum()

    def received(self, i: int, h: int, window: int) -> np.ndarray:
        """``[length]``: what tokens get from the last queries of a KV head: pooled, the mean over its query heads."""
        length, total = len(self.keys[0]), np.zeros(len(self.keys[0]))
        for head in range(h * GROUP, (h + 1) * GROUP):
            received = np.zeros(length)
            for position in range(length - window, length):
                received[: position + 1] += self.attention(i, head, position, list(range(position + 1)))
            total += [received[max(0, p - 3) : p + 4].max() / GROUP for p in range(length)]
        return total

    def forget(self, last_tile: int, count: int, window: int) -> None:
        """Each head of full attention forgets tokens, but for sinks and what follows ``last_tile``; ``count`` stay."""
        for i, local in enumerate(self.windows):
            for h in range(KV_HEADS if not local else 0):
                scores = self.received(i, h, window)
                candidates = sorted(range(EXACT.num_sink_tokens, last_tile), key=lambda p: (-scores[p], p))
                self.forgotten[i, h, candidates[count:]] = True

    def take_back(self, count: int) -> None:
        for of_layers in (self.keys, self.values, self.queries):
            for rows in of_layers:
                del rows[-count:]
