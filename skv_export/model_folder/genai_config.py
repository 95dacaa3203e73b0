"""``genai_config.json`` for onnxruntime-genai, and what its cache allocation costs.

This describes genai 0.18, from its source and from runs. It allocates ``[batch, kv_heads, max_length, width]`` for the
keys and for the values of a layer alike, with the width of the *key* input, or ``head_size`` where that dimension is
open. Only the bytes of a block matter to the op, so any pair of widths runs there: the narrower tensor's last dimension
is left open in the graph and gets the wider one's size. Beam search, rewinding and growing buffers
(``past_present_share_buffer`` off) must stay off: they would cut or copy blocks as if their rows were tokens.

Recurrent states have names of their own; which layers have keys and values, and which a state, it sees in the graph.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from skv_export.model_folder.names import (
    LIBRARY_FILE,
    LOGITS,
    MODEL_FILE,
    TOKEN_INPUTS,
    past_name,
    past_state_name,
    present_name,
    present_state_name,
)
from skv_export.model_folder.skv_config import LayerCache, ModelConfig
from skv_export.spec.layout import CacheLayout
from skv_export.spec.recipe import BITS, LayerConfig

MODEL_TYPE = "decoder"
"""genai's type for any decoder. Its others mean the same, or switch on what models of that name need in graphs."""
Layouts = tuple[CacheLayout, CacheLayout]


def cache_widths(layouts: Layouts) -> tuple[int | None, int | None]:
    """Last dimensions of a layer's past_key and past_value in the graph; None = open (see above)."""
    key, value = (layout.width for layout in layouts)
    return (key if key >= value else None), (value if value >= key else None)


def row_bytes(layouts: Layouts) -> int:
    """Bytes that genai allocates per token and KV head for the keys, and again for the values."""
    return max(layout.width for layout in layouts)


def capacity(layers: Sequence[Layouts], max_length: int) -> int | None:
    """Tokens that a sequence can hold in what genai allocates for ``max_length``; None = any number.

    The full-precision rows need space that a short cache does not have: with 64-channel heads in 4 bits 1,024 rows hold
    1,027 tokens, but 512 rows hold 323.
    """
    sizes = [
        layout.capacity(max_length * row_bytes(pair) // 16 * 16)
        for pair in layers
        for layout in pair
        if max_length * row_bytes(pair) >= layout.full_rows * layout.row_bytes
    ]
    if len(sizes) < 2 * len(layers):
        return 0
    return min((size for size in sizes if size is not None), default=None)


def least_length(layers: Sequence[Layouts], context_length: int) -> int | None:
    """Smallest ``max_length`` whose genai cache holds ``max_length`` tokens; None = none within the context."""
    lengths = np.arange(1, context_length + 1)
    short = np.zeros(context_length, np.bool_)
    for layout, width in {(layout, row_bytes(pair)) for pair in layers for layout in pair}:
        tiles = (lengths * width - layout.full_rows * layout.row_bytes) // layout.tile_bytes
        held = np.where(tiles >= 0, tiles * layout.tile_tokens + layout.full_rows - 1, 0)
        endless = bool(layout.local_window_size) & (tiles >= layout.window_tiles)
        short |= (held < lengths) & ~endless
    failing = np.flatnonzero(short)
    if not failing.size:
        return 1
    return None if failing[-1] == context_length - 1 else int(failing[-1]) + 2


def equal_pair(config: LayerConfig, head_dim: int) -> LayerConfig | None:
    """The best pair with equal bits whose cache is no larger than this one's; None = no such pair."""
    size = sum(layout.tile_bytes for layout in CacheLayout.pair(config, head_dim))
    for bits in sorted(BITS, reverse=True):
        equal = dataclasses.replace(config, k_bits=bits, v_bits=bits)
        pair = CacheLayout.pair(equal, head_dim)
        if pair[0].width == pair[1].width and sum(layout.tile_bytes for layout in pair) <= size:
            return equal
    return None


def free_pair(config: LayerConfig, head_dim: int) -> LayerConfig:
    """The pair with the most bits that takes no more memory in genai than this one does there."""
    width = row_bytes(CacheLayout.pair(config, head_dim))

    def most(name: str, index: int) -> int:
        pairs = {bits: CacheLayout.pair(_with(config, name, bits), head_dim) for bits in BITS}
        return max(bits for bits, pair in pairs.items() if pair[index].width <= width)

    return dataclasses.replace(config, k_bits=most("k_bits", 0), v_bits=most("v_bits", 1))


def _with(config: LayerConfig, name: str, bits: int) -> LayerConfig:
    return dataclasses.replace(config, **{name: bits})  # type: ignore[arg-type]


def advice(configs: Sequence[LayerConfig], layers: Sequence[Layouts], context_length: int) -> str:
    """One or two lines for a plan: what a recipe costs in onnxruntime-genai, and which equal pair to take instead."""
    least = least_length(layers, context_length)
    held = capacity(layers, context_length)
    if held == 0:
        return (
            f"onnxruntime-genai: can't use this folder: at the model's context of {context_length:,} tokens its caches "
            "hold none, as it allocates keys and values alike."
        )
    of_context = f" of the context's {context_length:,}" if held is not None and held < context_length else ""
    short = f"give it a max_length of {least:,} or more" if least else f"its caches hold {held:,} tokens{of_context}"
    unequal = [(c, pair) for c, pair in zip(configs, layers, strict=True) if pair[0].width != pair[1].width]
    if not unequal:
        return f"onnxruntime-genai: runs this folder; {short}."
    config, pair = unequal[0]
    there, here = 2 * row_bytes(pair), pair[0].width + pair[1].width
    lines = [
        f"onnxruntime-genai: runs this folder, but allocates keys and values alike: {there} instead of {here} bytes "
        f"per token and head in {len(unequal)} of {len(layers)} layers; {short}."
    ]
    free, equal = free_pair(config, pair[0].head_dim), equal_pair(config, pair[0].head_dim)
    offers = [f"{free.name} takes no more there than {config.name}"] if free != config else []
    offers += [f"{equal.name} is the equal pair of {config.name}'s size here"] if equal else []
    return "\n".join([*lines, f"  For use there, {'; '.join(offers)}."] if offers else lines)


def genai_config(
    config: ModelConfig, hidden_size: int, inputs: Sequence[str], base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the content of ``genai_config.json``.

    Args:
        config: The model, as ``skv_config.json`` describes it.
        hidden_size: Channels of the hidden state.
        inputs: Names of the graph's inputs.
        base: The source's ``genai_config.json``, if it has one: what is not ours to say is kept.
    """
    values: dict[str, Any] = copy.deepcopy(dict(base or {}))
    model = _table(values, "model")
    decoder = _table(model, "decoder")
    layer = config.layers[0]
    open_keys = [row_bytes(_pair(x)) for x in config.layers if cache_widths(_pair(x))[0] is None]
    model.setdefault("type", MODEL_TYPE)
    model.update(
        vocab_size=config.vocab_size,
        context_length=config.rope_switch or config.context_length,  # beyond it, a sequence would have to run anew
        bos_token_id=_or_first_end(config.bos_token_id, config),
        eos_token_id=list(config.eos_token_id) if len(config.eos_token_id) != 1 else config.eos_token_id[0],
        pad_token_id=_or_first_end(config.pad_token_id, config),
    )
    states = sorted({state.name for state in config.states})
    options = _table(decoder, "session_options")
    options.setdefault("log_id", "onnxruntime-genai")
    options.setdefault("provider_options", [])
    options["custom_ops_library"] = LIBRARY_FILE
    decoder.update(
        filename=MODEL_FILE,
        hidden_size=hidden_size,
        head_size=max(open_keys, default=row_bytes(_pair(layer))),
        num_attention_heads=layer.num_attention_heads,
        num_key_value_heads=layer.num_key_value_heads,
        num_hidden_layers=config.num_hidden_layers or len(config.layers),
        inputs={
            **{name: name for name in TOKEN_INPUTS if name in inputs},
            "past_key_names": past_name("%d", "key"),
            "past_value_names": past_name("%d", "value"),
            **{f"past_{state}_names": past_state_name("%d", state) for state in states},
        },
        outputs={
            "logits": LOGITS,
            "present_key_names": present_name("%d", "key"),
            "present_value_names": present_name("%d", "value"),
            **{f"present_{state}_names": present_state_name("%d", state) for state in states},
        },
    )
    # A window is the op's own business: genai would cut the cache to so many rows, or slide its inputs.
    decoder.pop("sliding_window", None)
    search = _table(values, "search")
    search.update(past_present_share_buffer=True, num_beams=1)
    search.setdefault("max_length", config.rope_switch or config.context_length)
    search.setdefault("do_sample", False)
    return values


def _table(values: dict[str, Any], name: str) -> dict[str, Any]:
    table = values.setdefault(name, {})
    if not isinstance(table, dict):
        table = values[name] = {}
    return table


def _pair(layer: LayerCache) -> Layouts:
    return layer.key, layer.value


def _or_first_end(token: int | None, config: ModelConfig) -> int:
    """A token that genai requires even if the model has none."""
    if token is not None:
        return token
    return config.eos_token_id[0] if config.eos_token_id else 0
