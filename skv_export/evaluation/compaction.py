"""What a compacted cache loses: decoding simulated with a cache that holds fewer tokens from a prompt's end on.

Up to there a window is decoded as ever; then each layer with full attention keeps what ``Session.compact`` would keep,
in the bytes that it would have, and the tokens after it see that. The arithmetic is ``spec/compaction.py``'s.
"""

from __future__ import annotations

import torch

from skv_export.evaluation.decode_simulation import LayoutCache, States, attend
from skv_export.spec.compaction import attention_received, candidates, choose, tokens_to_drop

SCORE_WINDOW = 32
"""Last queries of a prompt that say which tokens stay, as in the runtime."""


class CompactedAttention:
    """``attend`` for a cache that is compacted at the end of a prompt.

    Args:
        keep: Most tokens that stay.

    Attributes:
        keep: As given.
        prompt: Tokens of the prompt, of which so many stay; set before a window is run.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.prompt = 0

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        caches: tuple[LayoutCache, LayoutCache],
        *,
        scale: float,
        softcap: float = 0.0,
        local_window_size: int = 0,
        head_sink: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As ``attend``."""
        end, layouts = self.prompt, [cache.layout for cache in caches]
        drop = tokens_to_drop(layouts, end, self.keep)
        if local_window_size or not drop:
            return attend(
                query, key, value, caches, scale=scale, softcap=softcap, local_window_size=local_window_size,
                head_sink=head_sink,
            )  # fmt: skip
        out = torch.empty_like(query)
        before = [x[:, :end] for x in (query, key, value)]
        out[:, :end] = attend(
            before[0], before[1], before[2], caches, scale=scale, softcap=softcap, head_sink=head_sink
        )
        sinks, last, count = candidates(layouts[0], end, drop)
        keys = _as_read(caches[0], key[:, :end])
        queries = query[:, max(0, end - SCORE_WINDOW) : end]
        scores = attention_received(queries.cpu().numpy(), keys.cpu().numpy(), scale=scale, softcap=softcap)
        chosen = choose(scores[:, sinks : sinks + last], count)
        states: list[States] = []
        for cache, x in zip(caches, (key, value), strict=True):
            moved = cache.moved(x[:, : sinks + last], chosen)
            exact, quantized = cache.exact(x), cache.quantized(x)
            behind = sinks + count + drop  # what stands from here on keeps its place in its tile or row
            states.append(
                (
                    torch.cat([exact[:, :sinks], moved, exact[:, behind:]], 1),
                    torch.cat([quantized[:, :sinks], moved, quantized[:, behind:]], 1),
                )
            )
        q, k, v = (torch.cat([x[:, :1].expand(-1, end - drop, -1), x[:, end:]], 1) for x in (query, key, value))
        rest = attend(
            q, k, v, caches, scale=scale, softcap=softcap, head_sink=head_sink, states=(states[0], states[1]),
            first=end - drop,
        )  # fmt: skip
        out[:, end:] = rest[:, end - drop :]
        return out


def _as_read(cache: LayoutCache, x: torch.Tensor) -> torch.Tensor:
    """All tokens ``[H, S, D]`` of a cache that holds them, as it reads them back."""
    found, sinks = cache.exact(x).clone(), cache.num_sink_tokens
    in_tiles = slice(sinks, sinks + cache.quantized_tokens(x.shape[1]))
    found[:, in_tiles] = cache.quantized(x)[:, in_tiles]
    return found
