"""Cards: what weights and activations leave of them, and how long a context fits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from safetensors.numpy import load_file
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

from skv_export.analysis import card, pipeline
from skv_export.analysis.pipeline import Target
from skv_export.checkpoints.checkpoint import Checkpoint
from skv_export.cli.analyze import planner, spending
from skv_export.errors import SkvError
from skv_export.spec.layout import CacheLayout, cache_bytes
from skv_export.spec.recipe import LayerConfig


def test_weights_are_counted_by_format(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("llama")
    opened = Checkpoint.open(folder)
    sizes = {name: tensor.size for name, tensor in load_file(folder / "model.safetensors").items()}
    total = sum(sizes.values())
    wide = sum(n for name, n in sizes.items() if "embed" in name or "norm" in name)
    assert card.weight_bytes(opened, "fp32") == 4 * total
    assert card.weight_bytes(opened, "fp16") == 2 * total
    assert card.weight_bytes(opened, "int4") == round(2 * wide + (total - wide) * 4.5 / 8)
    with pytest.raises(SkvError, match="--weights int3"):
        card.weight_bytes(opened, "int3")


def test_weights_as_they_are_take_what_the_file_holds(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", num_hidden_layers=1))
    file = write_gguf(tmp_path / "m.gguf", "llama", model, quantize=lambda n: "Q4_0" if "ffn" in n else None)
    opened = Checkpoint.open(file)
    codes = 3 * 64 * 96
    plain = sum(int(np.prod(opened.shape(name))) for name in opened.names()) - codes
    assert card.weight_bytes(opened, "as-is") == round(plain * 2 + codes * (4 + 16 / 32) / 8)
    assert card.usual_weights(opened, "bf16") == "as-is"
    assert card.usual_weights(Checkpoint.open(tiny_checkpoint("llama")), "bf16") == "bf16"


def test_a_card_too_small_says_what_takes_the_room(tiny_checkpoint: Callable[..., Path]) -> None:
    opened = Checkpoint.open(tiny_checkpoint("llama"))
    room = card.room_for_cache(card.GIB, opened, "fp16", 2)
    assert room == card.GIB - card.weight_bytes(opened, "fp16") - card.activation_bytes(opened, 2)
    with pytest.raises(SkvError, match="hold no cache beside the weights"):
        card.room_for_cache(card.GIB // 4, opened, "fp16", 1)


def test_smaller_weights_leave_room_for_a_better_cache(tiny_checkpoint: Callable[..., Path]) -> None:
    """Each line against its definition: what is left, the first cache that fits there, the last token that does."""
    folder = tiny_checkpoint("llama")
    opened = Checkpoint.open(folder)
    found = pipeline.analyze(folder, target=Target(context=1000, batch=3), measure=None)
    layers = found.config.num_hidden_layers
    fixed = card.activation_bytes(opened, 3)
    int8 = card.weight_bytes(opened, "int8")
    memory = fixed + int8 + found.budget.memory([(4, 4)] * layers)
    lines = {split.weights: split for split in card.splits(opened, found.budget, memory)}
    assert list(lines) == ["fp16", "int8", "int4"]
    assert lines["int8"].cache == "K4V4"
    assert lines["int8"].room == found.budget.memory([(4, 4)] * layers)
    longest = lines["int8"].longest
    assert found.budget.memory([(4, 2)] * layers, longest) <= lines["int8"].room
    assert found.budget.memory([(4, 2)] * layers, longest + 64) > lines["int8"].room
    better = {"": 0, "K2V2": 1, "K3V2": 2, "K4V2": 3, "K4V4": 4, "K8V8": 5, "fp16": 6}
    assert better[lines["fp16"].cache] < better["K4V4"] <= better[lines["int4"].cache]
    (none,) = {split.cache for split in card.splits(opened, found.budget, fixed)}
    assert none == ""
    printed = spending(found, memory, "")
    assert "K4V4" in printed and "3 x 1,000 tokens" in printed


@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])
def test_where_fp16_fits_it_is_said(arch: str, tiny_checkpoint: Callable[..., Path]) -> None:
    """Counted here: 2 bytes for each element of keys and values, a window's layer counts its window."""
    folder, batch, context = tiny_checkpoint(arch), 3, 4096
    config = pipeline.analyze(folder).config
    tokens = sum(min(context, w) if w else context for w in config.windows)
    exactly = batch * 2 * config.num_key_value_heads * config.head_dim * tokens * 2
    for memory, said in ((exactly, True), (exactly - 1, False)):
        found = pipeline.analyze(folder, target=Target(memory=memory, context=context, batch=batch))
        reasons = found.recommendation.reasons
        assert any("fp16" in reason for reason in reasons) == said
        assert ("nothing has to be quantized" in reasons[0]) == said
    assert "model's whole context fits" in planner(found, 1 << 40)
    assert "model's whole context fits" not in planner(found, 1 << 18)


@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])
def test_the_longest_context_fits_and_one_token_more_does_not(arch: str, tiny_checkpoint: Callable[..., Path]) -> None:
    found = pipeline.analyze(tiny_checkpoint(arch), target=Target(budget=5.0, context=4096, batch=3))
    bits, cache, room = found.recommendation.allocation.bits, found.budget, 64 << 20
    tokens = card.context_table(cache, bits, room)
    assert cache.memory(bits, tokens["recommended"]) <= room < cache.memory(bits, tokens["recommended"] + 64)
    config = found.config
    row = 2 * config.num_key_value_heads * 3

    def plain(count: int, width: int) -> int:
        return sum(row * width * (min(count, w) if w else count) for w in config.windows)

    for name, width in (("fp16", 2 * config.head_dim), ("int8", config.head_dim + 2)):
        assert plain(tokens[name], width) <= room < plain(tokens[name] + 1, width)
    assert tokens["fp16"] < tokens["int8"] < tokens["recommended"]


def test_nothing_fits_into_nothing(tiny_checkpoint: Callable[..., Path]) -> None:
    found = pipeline.analyze(tiny_checkpoint("llama"), target=Target(budget=5.0, context=4096))
    assert set(card.context_table(found.budget, found.recommendation.allocation.bits, 10).values()) == {0}


def test_cards_by_name() -> None:
    assert card.card_memory("RTX4090") == card.card_memory("rtx4090") == 24564 << 20
    assert card.card_memory("RTX_A6000") == 49140 << 20
    with pytest.raises(SkvError, match=r"expected .*rtx4090"):
        card.card_memory("abacus")


def test_cards_have_what_their_data_sheets_say_and_never_more() -> None:
    """Sold as so many GB: never more GiB than that, and at least 93% of it, or what 10^9 bytes each leave."""
    sold = {
        "t4": 16, "l4": 24, "l40s": 48, "a10": 24, "a100-40": 40, "a100-80": 80, "h100": 80, "h200": 141, "b200": 192,
        "rtx3060": 12, "rtx3090": 24, "rtx4060": 8, "rtx4070": 12, "rtx4080": 16, "rtx4090": 24, "rtx5070": 12,
        "rtx5080": 16, "rtx5090": 32, "rtx-a6000": 48, "rtx-6000-ada": 48, "rtx-pro-6000": 96,
    }  # fmt: skip
    assert sold.keys() == card.CARDS.keys()
    for name, gigabytes in sold.items():
        assert 0.93 * gigabytes * card.GIB <= card.card_memory(name) <= gigabytes * card.GIB, name


PEAK = """
import sys
from pathlib import Path
import numpy as np
from skv_export.runtime.session import Session

def memory(kind):
    return 1024 * int(Path("/proc/self/status").read_text().partition(kind + ":")[2].split()[0])

session, ids = Session(sys.argv[1]), np.arange(int(sys.argv[2]))[None] * 7919 % 40000
session.run(ids[:, :16], None, None, session.cache(1, 64))  # whatever a first call allocates once
cache = session.cache(1, ids.size)
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
session.run(ids, None, None, cache)
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
def test_activations_take_what_a_session_is_seen_to_take(demo_checkpoint: Path, demo_export: Path) -> None:
    """Resident memory of a prompt of 2,048 tokens, in float32: twice the estimate, which is for 16 bits."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc/self/clear_refs: the peak of resident memory can't be started anew")
    command = [sys.executable, "-c", PEAK, str(demo_export), str(card.PREFILL_TOKENS)]
    seen = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    cache = cache_bytes([CacheLayout.pair(LayerConfig(), 64)] * 30, [3] * 30, card.PREFILL_TOKENS)
    estimate = 2 * (card.activation_bytes(Checkpoint.open(demo_checkpoint), 1) - card.RUNTIME_BYTES)
    assert 0.6 * (seen - cache) < estimate < 1.6 * (seen - cache)


def test_memory_of_a_card_becomes_a_limit(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("llama")
    opened = Checkpoint.open(folder)
    memory = card.weight_bytes(opened, "int4") + card.activation_bytes(opened, 8) + (24 << 20)
    found = pipeline.analyze(folder, target=Target(memory=memory, weights="int4", batch=8, context=8192))
    assert found.budget.limit == pytest.approx((24 << 20) / 8)
    assert found.budget.fits(found.recommendation.allocation.bits)
    assert np.mean(found.recommendation.allocation.bits) > 2
