"""SkvCache: each method of transformers' Cache does what it says, or raises."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny_graph import EXACT, SMALL, VOCAB, Tiny, addresses
from transformers.cache_utils import Cache as TransformersCache

from skv_export import SkvForCausalLM
from skv_export.errors import SkvError
from skv_export.integrations.transformers_cache import SkvCache

pytestmark = pytest.mark.usefixtures("library")

RNG = np.random.default_rng(5)
ROWS = [RNG.integers(3, VOCAB, 45).tolist(), RNG.integers(3, VOCAB, 60).tolist()]
NEXT = torch.tensor([[7], [9]])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SkvForCausalLM:
    folder = Tiny(EXACT).write_all(tmp_path_factory.mktemp("exact"), eos_token_id=[])
    return SkvForCausalLM.from_pretrained(folder)


def left_padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


@pytest.fixture
def filled(model: SkvForCausalLM) -> SkvCache:
    """A cache of both rows, the first padded by 15 columns on the left."""
    cache = model.new_cache(2, 200)
    ids, mask = left_padded(ROWS)
    model(ids, attention_mask=mask, past_key_values=cache)
    return cache


def logits_after(model: SkvForCausalLM, cache: SkvCache, tokens: torch.Tensor) -> torch.Tensor:
    mask = torch.from_numpy(np.concatenate([cache.held, np.ones(tokens.shape, np.bool_)], axis=1).astype(np.int64))
    return model(tokens, attention_mask=mask, past_key_values=cache).logits[:, -1]


def fresh_logits(model: SkvForCausalLM, rows: list[list[int]]) -> torch.Tensor:
    return torch.cat([model(torch.tensor([row])).logits[:, -1] for row in rows])


def test_no_method_of_transformers_cache_is_inherited() -> None:
    public = {name for name in dir(TransformersCache) if not name.startswith("_")}
    assert len(public) > 20
    assert public - set(vars(SkvCache)) == set(), "decide what they mean for SkvCache"
    assert {"__repr__", "__len__", "__copy__", "__deepcopy__"} <= set(vars(SkvCache))


@pytest.mark.parametrize("remove", [0, 1, 12, 16])
def test_crop_is_as_if_the_tokens_had_never_been_there(model: SkvForCausalLM, filled: SkvCache, remove: int) -> None:
    filled.crop(-remove)
    assert filled.get_seq_length() == 60 - remove and filled.cache.lengths.tolist() == [45 - remove, 60 - remove]
    expected = fresh_logits(model, [[*row[: len(row) - remove], int(t)] for row, t in zip(ROWS, NEXT, strict=True)])
    assert torch.allclose(logits_after(model, filled, NEXT), expected, atol=1e-4)


def test_crop_counts_padding_as_columns_and_takes_a_length_too(model: SkvForCausalLM) -> None:
    cache = model.new_cache(2, 200)
    right = torch.tensor([ROWS[0][:20] + [0] * 5, ROWS[1][:25]])
    mask = torch.ones_like(right)
    mask[0, 20:] = 0
    model(right, attention_mask=mask, past_key_values=cache)
    cache.crop(-7)
    assert cache.cache.lengths.tolist() == [18, 18] and cache.get_seq_length() == 18
    cache.crop(30)
    assert cache.get_seq_length() == 18
    cache.crop(10)
    assert cache.cache.lengths.tolist() == [10, 10]
    expected = fresh_logits(model, [[*row[:10], int(t)] for row, t in zip(ROWS, NEXT, strict=True)])
    assert torch.allclose(logits_after(model, cache, NEXT), expected, atol=1e-4)


def test_crop_too_far_is_refused_and_changes_nothing(model: SkvForCausalLM) -> None:
    cache = model.new_cache(1, 200)
    model(torch.tensor([ROWS[0] + ROWS[1]]), past_key_values=cache)
    for remove in (-17, -104, -106):
        with pytest.raises(SkvError, match=r"rewind|SkvCache.crop"):
            cache.crop(remove)
    assert cache.get_seq_length() == 105 and cache.cache.lengths.tolist() == [105]
    cache.crop(-105)  # everything
    assert cache.get_seq_length() == 0 and cache.cache.lengths.tolist() == [0]


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False])), [0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
    ],
    ids=["reorder", "select", "mask", "repeat"],
)
def test_the_batch_changes(
    model: SkvForCausalLM, filled: SkvCache, change: Callable[[SkvCache], None], rows: list[int]
) -> None:
    change(filled)
    new = torch.arange(5, 5 + len(rows))[:, None]
    assert filled.batch_size == len(rows)
    expected = fresh_logits(model, [[*ROWS[row], int(token)] for row, token in zip(rows, new, strict=True)])
    assert torch.allclose(logits_after(model, filled, new), expected, atol=1e-4)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_shares_nothing(model: SkvForCausalLM, filled: SkvCache, copied: Callable[[SkvCache], SkvCache]) -> None:
    twin = copied(filled)
    assert set(addresses(twin.cache)).isdisjoint(addresses(filled.cache))
    logits_after(model, twin, torch.full((2, 30), 11))
    twin.crop(-8)
    assert (filled.get_seq_length(), twin.get_seq_length()) == (60, 82)
    expected = fresh_logits(model, [[*row, int(t)] for row, t in zip(ROWS, NEXT, strict=True)])
    assert torch.allclose(logits_after(model, filled, NEXT), expected, atol=1e-4)
    with pytest.raises(SkvError, match="sequences of the cache"):
        filled.cache.select([2])


def test_what_it_says_of_itself(
    model: SkvForCausalLM, filled: SkvCache, tmp_path_factory: pytest.TempPathFactory
) -> None:
    layers = len(model.session.config.layers)
    assert (len(filled), filled.batch_size, filled.get_max_length(), filled.get_query_offset()) == (layers, 2, 200, 60)
    assert filled.get_mask_sizes(3, 0) == (63, 0) and repr(filled) == "SkvCache(batch=2, columns=60, max_length=200)"
    assert filled.is_initialized and not filled.is_compileable and filled.is_recording_past(0)
    assert [filled.is_sliding, filled.is_linear, filled.is_dummy] == [[False] * layers] * 3
    filled.activate_past_recording()
    folder = Tiny(SMALL).write_all(tmp_path_factory.mktemp("rounded"), eos_token_id=[])
    assert filled.is_croppable and not SkvForCausalLM.from_pretrained(folder).new_cache(1).is_croppable
    filled.reset()
    assert filled.get_seq_length() == 0 and filled.cache.lengths.tolist() == [0, 0]


REFUSED = (
    "update", "update_indexer", "early_initialization", "prefetch", "offload", "has_previous_state", "get_conv_state",
    "get_recurrent_state", "update_conv_state", "update_recurrent_state",
)  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_can_not_do_raises(filled: SkvCache, name: str) -> None:
    with pytest.raises(SkvError, match=rf"SkvCache\.{name}: not supported"):
        getattr(filled, name)(0)


def test_a_cache_that_is_too_small_is_refused_before_generation(model: SkvForCausalLM) -> None:
    with pytest.raises(SkvError, match="at most 50, the max_length of past_key_values"):
        model.generate(torch.tensor([ROWS[0]]), past_key_values=model.new_cache(1, 50), max_new_tokens=20)
