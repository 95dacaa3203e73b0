"""What fits on a card: its memory less the weights and activations, and how long a context that holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from skv_export.analysis.budget import MAX_CONTEXT, CacheBudget, Pair
from skv_export.checkpoints.block_weights import BlockFormat
from skv_export.checkpoints.checkpoint import Checkpoint
from skv_export.errors import SkvError
from skv_export.spec.recipe import AS_IS

GIB = 1 << 30
CARDS = {
    "t4": 15360, "l4": 23034, "l40s": 46068, "a10": 23028, "a100-40": 40960, "a100-80": 81920, "h100": 81559,
    "h200": 143771, "b200": 183359, "rtx3060": 12288, "rtx3090": 24576, "rtx4060": 8188, "rtx4070": 12282,
    "rtx4080": 16376, "rtx4090": 24564, "rtx5070": 12227, "rtx5080": 16303, "rtx5090": 32607, "rtx-a6000": 49140,
    "rtx-6000-ada": 49140, "rtx-pro-6000": 97887,
}  # fmt: skip
"""Memory in MiB as nvidia-smi reports it: what the data sheets call GB is GiB on most cards, less what error correction
(t4, l4, l40s, a10) and the firmware keep; the 192 GB of b200 are 10^9 bytes each."""
WEIGHT_BITS = {"fp32": 32.0, "fp16": 16.0, "bf16": 16.0, "int8": 8.5, "int4": 4.5}
"""Bits of a weight, scales of blocks of 32 included."""
RUNTIME_BYTES = GIB // 2
"""CUDA's context, ONNX Runtime's kernels and what the driver keeps."""
PREFILL_TOKENS = 2048
"""Tokens of a prompt handled at once, for which activations are counted."""
_WIDE = ("embed_tokens", "token_embd", "wte.weight", "wpe.weight", "norm", "bias", "ln_")


def card_memory(name: str) -> int:
    """Returns a card's memory in bytes, as its driver reports it.

    Raises:
        SkvError: Not in the table.
    """
    key = name.lower().replace(" ", "").replace("_", "-")
    if key not in CARDS:
        raise SkvError(f"--gpu {name}", expected=", ".join(CARDS), fix="For another card, give --memory.")
    return CARDS[key] << 20


def weight_bytes(opened: Checkpoint, weights: str) -> int:
    """Returns the bytes of a checkpoint's weights in a number format.

    Embeddings and norms of int8 and int4 are in 16 bits, as is what the checkpoint itself does not hold quantized, or
    not in a form that a graph can hold.

    Raises:
        SkvError: An unknown format.
    """
    if weights == AS_IS:
        return round(sum(math.prod(opened.shape(name)) * _held_bits(opened, name) for name in opened.names()) / 8)
    if weights not in WEIGHT_BITS:
        raise SkvError(f"--weights {weights}", expected=", ".join([AS_IS, *WEIGHT_BITS]))
    narrow = WEIGHT_BITS[weights]
    wide = max(16.0, narrow)
    bits = sum(
        math.prod(opened.shape(name)) * (wide if any(part in name for part in _WIDE) else narrow)
        for name in opened.names()
    )
    return round(bits / 8)


def usual_weights(opened: Checkpoint, dtype: str) -> str:
    """Returns the number format that an export gives the weights if not asked: as they are, or else ``dtype``."""
    return AS_IS if any(_held(opened, name) for name in opened.names()) else dtype


def _held(opened: Checkpoint, name: str) -> BlockFormat | None:
    """How a graph stores a weight as the checkpoint quantized it."""
    held = opened.entries[name].blocks()
    return None if held is None else held.format


def _held_bits(opened: Checkpoint, name: str) -> float:
    form = _held(opened, name)
    return 16.0 if form is None else form.stored(exact=True).weight_bits(16)


def activation_bytes(opened: Checkpoint, batch: int) -> int:
    """Returns the bytes of float16 activations while a prompt is read, logits of the last tokens, and the runtime.

    Per token and layer in work: the residual stream, queries, keys, values and output (six of ``hidden_size``) and
    three of the feed-forward layer's width (both halves and their product). In float32 that is what SmolLM2 was seen to
    take on the CPU (``benchmarks/RESULTS.md``); on a GPU nothing was measured.
    """
    text = opened.config.get("text_config") or opened.config

    def size(*names: str) -> int:
        found: Any = next((text[n] for n in names if text.get(n)), 0)
        return max(map(int, found)) if isinstance(found, list) else int(found)  # one for each layer, or for all

    hidden, vocabulary = size("hidden_size", "n_embd"), size("vocab_size")
    inner = size("intermediate_size", "n_inner", "ffn_dim") or 4 * hidden
    return batch * (PREFILL_TOKENS * (6 * hidden + 3 * inner) * 2 + vocabulary * 4) + RUNTIME_BYTES


def room_for_cache(memory: int, opened: Checkpoint, weights: str, batch: int) -> int:
    """Returns the bytes of a card that are left for the cache.

    Raises:
        SkvError: Nothing is left.
    """
    taken = weight_bytes(opened, weights), activation_bytes(opened, batch)
    if sum(taken) >= memory:
        raise SkvError(
            f"memory: {memory / GIB:.1f} GiB hold no cache beside the weights",
            got=f"{taken[0] / GIB:.1f} GiB of {weights} weights, {taken[1] / GIB:.1f} GiB of activations",
            fix="Take a larger card, smaller --weights or a smaller --batch.",
        )
    return memory - sum(taken)


def context_table(cache: CacheBudget, bits: Sequence[Pair], room: int) -> dict[str, int]:
    """Returns the most tokens per sequence in so many bytes: with a cache in fp16, in int8, and as recommended.

    int8 has a 16-bit scale per token and head. A layer with a sliding window holds its window only.
    """
    head_dim = cache.config.head_dim
    sizes: dict[str, Callable[[int], int]] = {
        "fp16": lambda tokens: cache.plain_memory(2 * head_dim, tokens),
        "int8": lambda tokens: cache.plain_memory(head_dim + 2, tokens),
        "recommended": lambda tokens: cache.memory(bits, tokens),
    }
    return {name: _most_tokens(size, room) for name, size in sizes.items()}


_CACHES: tuple[Pair, ...] = ((8, 8), (4, 4), (4, 2), (3, 2), (2, 2))
"""Caches that are tried, best first; the third is the default."""


@dataclass(frozen=True)
class Split:
    """What a card holds with one form of the weights.

    Attributes:
        weights: The form.
        weight_bytes: What they take.
        room: Bytes that are left for the cache; negative where the weights alone are too large.
        cache: The best cache whose tokens fit at the context: ``fp16``, ``K8V8``, ...; "" where none does.
        longest: Tokens of each sequence that fit with the default cache.
    """

    weights: str
    weight_bytes: int
    room: int
    cache: str
    longest: int


def splits(opened: Checkpoint, cache: CacheBudget, memory: int) -> list[Split]:
    """Returns how a card's memory can be split between weights and cache: a line for each form of the weights.

    Args:
        opened: The checkpoint.
        cache: Its cache, at a context and for a batch.
        memory: The card's, in bytes.
    """
    layers = cache.config.num_hidden_layers
    found = []
    for form in dict.fromkeys([usual_weights(opened, "fp16"), "fp16", "int8", "int4"]):
        taken = weight_bytes(opened, form)
        room = memory - taken - activation_bytes(opened, cache.batch)
        sizes = {"fp16": cache.plain_memory(2 * cache.config.head_dim)}
        sizes |= {f"K{k}V{v}": cache.memory([(k, v)] * layers) for k, v in _CACHES}
        best = next((name for name, size in sizes.items() if size <= room), "")
        longest = _most_tokens(lambda tokens: cache.memory([_CACHES[2]] * layers, tokens), room)
        found.append(Split(form, taken, room, best, longest))
    return found


def _most_tokens(size: Callable[[int], int], room: int) -> int:
    low, high = 0, MAX_CONTEXT
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= room else (low, middle - 1)
    return low
