"""The runtime: folder, cache, calls and token loop, on a hand-made model against the reference in numpy."""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_graph import CONTEXT, EXACT, KV_HEADS, SMALL, VOCAB, Tiny, addresses

from skv_export.errors import SkvError
from skv_export.native import library
from skv_export.native.library import library_path
from skv_export.runtime.arrays import last_logits
from skv_export.runtime.prompts import load_tokenizer
from skv_export.runtime.sampling import Sampling
from skv_export.runtime.session import Session
from skv_export.runtime.text import generate_text
from skv_export.spec.recipe import LayerConfig

pytestmark = pytest.mark.usefixtures("library")

RNG = np.random.default_rng(3)
TOKENS = RNG.integers(3, VOCAB, 200).tolist()
TOLERANCE = 2e-4  # of logits of about 3: float32 sums in another order than numpy's
FLIPPED = 2e-2  # with codes: such a sum can also turn a code of the second layer


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return Session(Tiny().write(tmp_path_factory.mktemp("quantized")))


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return Session(Tiny(EXACT).write(tmp_path_factory.mktemp("exact")))


def steps(session: Session, tokens: list[int], chunks: list[int]) -> np.ndarray:
    """The last logits of each call, ``[len(chunks), vocab]``."""
    cache, start, rows = session.cache(1), 0, []
    for count in chunks:
        rows.append(session.run([tokens[start : start + count]], None, None, cache)[0, -1])
        start += count
    return np.stack(rows)


# Calls.


@pytest.mark.parametrize("config", [SMALL, EXACT, dataclasses.replace(SMALL, k_bits=3, v_bits=3)], ids=lambda c: c.name)
def test_decoding_over_every_boundary_gives_the_references_logits(tmp_path: Path, config: LayerConfig) -> None:
    tiny = Tiny(config)
    session = Session(tiny.write(tmp_path))
    chunks = [5] + [1] * 145  # sinks, recent tokens, the first flush at 50 tokens and three more
    expected = tiny.logits(TOKENS[:150], chunks)[4:]
    assert np.abs(steps(session, TOKENS, chunks) - expected).max() < (TOLERANCE if config is EXACT else FLIPPED)


def test_sliding_window_runs_past_its_ring(tmp_path: Path) -> None:
    tiny = Tiny(EXACT, windows=(40, 0))
    session = Session(tiny.write(tmp_path))
    chunks = [100] + [1] * 90
    assert np.abs(steps(session, TOKENS, chunks) - tiny.logits(TOKENS[:190], chunks)[99:]).max() < TOLERANCE


def test_all_layers_windowed_has_no_capacity(tmp_path: Path) -> None:
    session = Session(Tiny(windows=(40, 40)).write(tmp_path))
    assert session.cache(1, CONTEXT).capacity is None


def test_prompt_in_one_call_in_chunks_and_token_by_token_agree_when_nothing_is_rounded(exact: Session) -> None:
    whole = steps(exact, TOKENS[:130], [130])[-1]
    assert np.abs(steps(exact, TOKENS[:130], [1, 49, 3, 77])[-1] - whole).max() < TOLERANCE
    assert np.abs(steps(exact, TOKENS[:130], [1] * 130)[-1] - whole).max() < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("all_logits", [False, True])
def test_padded_batch_equals_one_by_one(tmp_path: Path, side: str, all_logits: bool) -> None:
    tiny = Tiny(EXACT, all_logits=all_logits)
    session = Session(tiny.write(tmp_path))
    lengths = [60, 1, 33]
    prompts = [TOKENS[i : i + n] for i, n in enumerate(lengths)]
    ids, mask = np.zeros((3, 60), np.int64), np.zeros((3, 60), np.int64)
    for row, prompt in enumerate(prompts):
        at = slice(60 - len(prompt), None) if side == "left" else slice(None, len(prompt))
        ids[row, at], mask[row, at] = prompt, 1
    cache = session.cache(3, 100)
    logits = session.run(ids, mask, None, cache)
    assert logits.shape == (3, 60 if all_logits else 1, VOCAB)
    assert cache.lengths.tolist() == lengths
    got = [last_logits(logits, mask != 0)]
    # The caller's mask keeps its columns, as transformers' does.
    for token in (7, 8):
        mask = np.concatenate([mask, np.ones((3, 1), np.int64)], axis=1)
        got.append(session.run(np.full((3, 1), token), mask, None, cache)[:, 0])
    for row, prompt in enumerate(prompts):
        expected = tiny.logits([*prompt, 7, 8], [len(prompt), 1, 1])[-3:]
        assert np.abs(np.stack(got)[:, row] - expected).max() < TOLERANCE, row


def test_given_positions_are_used(exact: Session) -> None:
    one, two = exact.cache(1), exact.cache(1)
    same = exact.run([[5, 6]], None, [[0, 1]], one)
    assert np.array_equal(same, exact.run([[5, 6]], None, None, two))
    one.reset()
    assert not np.allclose(same, exact.run([[5, 6]], None, [[3, 9]], one))


# The cache.


def test_buffers_are_bound_in_place_and_never_move(quantized: Session) -> None:
    cache = quantized.cache(1, 200)
    before, size = addresses(cache), cache.nbytes
    for token in TOKENS[:100]:
        quantized.run([[token]], None, None, cache)
    outputs = {v.data_ptr() for v in cache.binding.get_outputs() if v.data_type() == "tensor(uint8)"}
    assert addresses(cache) == before
    assert outputs == set(before)
    assert (
        cache.nbytes
        == size
        == sum(KV_HEADS * rows * width for layout in Tiny().layouts(0) * 2 for rows, width in [layout.shape(200)])
    )


def test_capacity_is_named_before_anything_is_written(quantized: Session) -> None:
    cache = quantized.cache(1, 100)
    assert cache.capacity is not None and cache.capacity >= 100
    quantized.run([TOKENS[: cache.capacity]], None, None, cache)
    before = [cache.data(i, name) for i in range(2) for name in ("key", "value")]
    with pytest.raises(SkvError, match=f"capacity of {cache.capacity}"):
        quantized.run([[5]], None, None, cache)
    after = [cache.data(i, name) for i in range(2) for name in ("key", "value")]
    assert all(map(np.array_equal, before, after)) and cache.lengths[0] == cache.capacity


@pytest.mark.parametrize("length", [0, CONTEXT + 1])
def test_cache_length_outside_the_context_is_refused(quantized: Session, length: int) -> None:
    with pytest.raises(SkvError, match="max_length"):
        quantized.cache(1, length)


def test_wrong_masks_and_tokens_are_refused(quantized: Session) -> None:
    cache = quantized.cache(2, 50)
    with pytest.raises(SkvError, match=r"input_ids: shape"):
        quantized.run([[1]], None, None, cache)
    with pytest.raises(SkvError, match=r"no such token.*96"):
        quantized.run([[1], [VOCAB]], None, None, cache)
    with pytest.raises(SkvError, match="attention_mask: shape"):
        quantized.run([[1, 2], [1, 2]], [[1], [1]], None, cache)
    quantized.run([[1, 2], [1, 2]], [[1, 1], [1, 0]], None, cache)
    with pytest.raises(SkvError, match=r"do not count what the cache holds; got \[2, 2\]; expected \[2, 1\]"):
        quantized.run([[3], [3]], np.ones((2, 3)), None, cache)


def test_a_call_that_fails_inside_empties_the_cache(quantized: Session) -> None:
    wrong = dataclasses.replace(quantized.config, context_length=2 * CONTEXT)
    session = Session(quantized.folder, config=wrong)
    cache = session.cache(1)
    session.run([TOKENS[:60]], None, None, cache)
    with pytest.raises(SkvError, match="the call failed, and the cache has been emptied"):
        session.run([[5]], None, [[CONTEXT]], cache)  # no such position in the model's table
    assert cache.lengths.tolist() == [0]
    again = session.run([TOKENS[:60]], None, None, cache)
    assert np.array_equal(again, quantized.run([TOKENS[:60]], None, None, quantized.cache(1)))


@pytest.mark.parametrize("back", [1, 7, 16])
@pytest.mark.parametrize("length", [30, 80, 100, 150])
def test_rewind_is_as_if_the_tokens_had_never_been_there(exact: Session, length: int, back: int) -> None:
    straight, detour = exact.cache(1), exact.cache(1)
    exact.run([TOKENS[: length - back]], None, None, straight)
    exact.run([TOKENS[: length - back]], None, None, detour)
    for token in range(3, 3 + back):
        exact.run([[token]], None, None, detour)
    detour.rewind(length - back)
    for token in TOKENS[150:190]:
        one, other = (exact.run([[token]], None, None, cache) for cache in (straight, detour))
        assert np.array_equal(one, other)


def test_speculative_decoding_of_a_ragged_batch_is_a_fresh_run(exact: Session) -> None:
    rng = np.random.default_rng(0)
    cache, rows = exact.cache(3), [TOKENS[:7], TOKENS[20:51], TOKENS[60:66]]
    ids, mask = np.zeros((3, 31), np.int64), np.zeros((3, 31), np.int64)
    for b, row in enumerate(rows):
        ids[b, : len(row)], mask[b, : len(row)] = row, 1
    exact.run(ids, mask, None, cache)
    for _ in range(70):
        drafted = int(rng.integers(1, 5))
        new = rng.integers(3, VOCAB, (3, drafted))
        exact.run(new, None, None, cache)
        kept = rng.integers(0, drafted + 1, 3)
        rows = [row + new[b, : kept[b]].tolist() for b, row in enumerate(rows)]
        cache.rewind([len(row) for row in rows])
    got = exact.run([[5]] * 3, None, None, cache)
    for b, row in enumerate(rows):
        assert len(row) > 100
        fresh = exact.cache(1)
        exact.run([row], None, None, fresh)
        assert np.abs(got[b] - exact.run([[5]], None, None, fresh)[0]).max() < 1e-4


def test_rewind_is_exact_with_codes_too_where_no_tile_was_flushed(quantized: Session) -> None:
    straight, detour = quantized.cache(1), quantized.cache(1)
    for cache in (straight, detour):
        quantized.run([TOKENS[:60]], None, None, cache)
    quantized.run([[3] * 10], None, None, detour)
    detour.rewind([60])
    for token in TOKENS[60:140]:
        one, other = (quantized.run([[token]], None, None, cache) for cache in (straight, detour))
        assert np.array_equal(one, other)


def test_rewind_too_far_changes_nothing_and_zero_is_always_possible(quantized: Session) -> None:
    cache = quantized.cache(2)
    quantized.run([TOKENS[:100], TOKENS[100:200]], None, None, cache)
    before = cache.data(0, "key")
    with pytest.raises(SkvError, match=r"sequence 1.*got 83; expected 84 ... 100"):
        cache.rewind([90, 83])
    with pytest.raises(SkvError, match="got 101"):
        cache.rewind(101)
    assert np.array_equal(before, cache.data(0, "key")) and cache.lengths.tolist() == [100, 100]
    cache.rewind([84, 0])
    assert cache.lengths.tolist() == [84, 0]


def test_reorder_makes_copies(quantized: Session) -> None:
    cache = quantized.cache(3)
    prompts = [TOKENS[:70], TOKENS[70:140], TOKENS[100:170]]
    quantized.run(prompts, None, None, cache)
    before = addresses(cache)
    cache.reorder([2, 2, 0])
    logits = quantized.run([[5], [5], [5]], None, None, cache)[:, 0]
    assert addresses(cache) == before
    for row, source in enumerate([2, 2, 0]):
        assert np.abs(logits[row] - Tiny().logits([*prompts[source], 5], [70, 1])[-1]).max() < FLIPPED


# The token loop.


def test_greedy_generation_is_the_references(quantized: Session) -> None:
    assert quantized.generate([TOKENS[:40]], max_new_tokens=15) == [_until_eos(Tiny().greedy(TOKENS[:40], 15))]


def _until_eos(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(2) + 1] if 2 in tokens else tokens


def test_batch_of_different_lengths_generates_what_each_alone_does(quantized: Session) -> None:
    prompts = [TOKENS[:50], TOKENS[60:61], TOKENS[80:110]]
    together = quantized.generate(prompts, max_new_tokens=25)
    assert together == [quantized.generate([prompt], max_new_tokens=25)[0] for prompt in prompts]


def test_end_tokens_stop_one_sequence_and_not_the_others(tmp_path: Path) -> None:
    prompts = [TOKENS[:20], TOKENS[40:50]]
    free = Session(Tiny().write(tmp_path / "free", eos_token_id=[])).generate(prompts, max_new_tokens=12)
    end = free[0][4]
    session = Session(Tiny().write(tmp_path / "ends", eos_token_id=[end]))
    stopped = session.generate(prompts, max_new_tokens=12)
    assert stopped[0] == free[0][: free[0].index(end) + 1] and len(stopped[0]) <= 5
    other = free[1]
    assert stopped[1] == (other[: other.index(end) + 1] if end in other else other)
    ids, mask = [[*prompts[0]], [*prompts[1], *[0] * 10]], [[1] * 20, [1] * 10 + [0] * 10]
    cache = session.cache(2)
    rows = list(session.stream(ids, mask, max_new_tokens=12, cache=cache))
    assert all(row[0] == session.pad_token_id for row in rows[len(stopped[0]) :])
    assert cache.lengths[0] == 20 + len(stopped[0]) - 1  # a finished sequence takes no more room


def test_generation_ends_where_the_cache_ends(quantized: Session) -> None:
    cache = quantized.cache(1, 60)
    tokens = list(quantized.stream([TOKENS[:50]], max_new_tokens=500, cache=cache))
    assert cache.lengths[0] == 60 and len(tokens) == 11  # the last has not been appended


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder without end tokens, whose learned positions end where its context does."""
    return Tiny().write_all(tmp_path_factory.mktemp("endless"), eos_token_id=[])


def test_generation_ends_where_the_context_ends(endless: Path) -> None:
    session, long = Session(endless), [*TOKENS, *TOKENS, *TOKENS[:108]]
    assert len(long) == CONTEXT - 4
    assert [len(row) for row in session.generate([long], max_new_tokens=50)] == [5]
    ids, mask = [[*TOKENS[:20], *[0] * (CONTEXT - 24)], long], np.ones((2, CONTEXT - 4), np.int64)
    mask[0, 20:] = 0
    rows = np.array(list(session.stream(ids, mask, max_new_tokens=9)))
    alone = list(session.stream([TOKENS[:20]], max_new_tokens=9))
    assert rows[:, 0].tolist() == [int(token[0]) for token in alone]  # a full sequence does not end the others
    assert rows[5:, 1].tolist() == [session.pad_token_id] * 4


def test_a_prompt_beyond_the_context_is_refused_before_any_work(endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, too_long = Session(endless), [5] * (CONTEXT + 1)
    cache = session.cache(1)
    assert cache.capacity is not None and cache.capacity > CONTEXT
    monkeypatch.setattr(Session, "cache", lambda *_: pytest.fail("a cache was allocated"))
    message = f"total length; got {CONTEXT + 1} tokens; expected at most {CONTEXT}, the model's context"
    for call in (
        lambda: session.generate([too_long]),
        lambda: list(session.stream([too_long])),
        lambda: session.run([too_long], None, None, cache),
        lambda: generate_text(endless, "a" * (CONTEXT + 1)),
    ):
        with pytest.raises(SkvError, match=message):
            call()


def test_why_generation_stopped_is_said(endless: Path, tmp_path: Path) -> None:
    full = generate_text(endless, "a" * (CONTEXT - 2), max_new_tokens=50)
    assert (full.stop_reason, len(full.tokens)) == ("context", 3)
    assert full.summary().endswith("stopped by the model's context, which is full")
    free = generate_text(endless, "Anne", max_new_tokens=4)
    assert (free.stop_reason, len(free.tokens)) == ("max_new_tokens", 4)
    ends = Tiny().write_all(tmp_path, eos_token_id=[free.tokens[1]])
    stopped = generate_text(ends, "Anne", max_new_tokens=4)
    assert stopped.stop_reason == "eos" and stopped.tokens == free.tokens[: free.tokens.index(free.tokens[1]) + 1]


def test_a_cache_carries_on_where_a_call_ended(quantized: Session) -> None:
    cache = quantized.cache(1)
    first = [int(t[0]) for t in quantized.stream([TOKENS[:40]], max_new_tokens=5, cache=cache)]
    second = [int(t[0]) for t in quantized.stream([first[-1:]], max_new_tokens=5, cache=cache)]
    assert first + second == [int(t[0]) for t in quantized.stream([TOKENS[:40]], max_new_tokens=10)]


def test_sampling_is_reproducible_and_follows_its_seed(quantized: Session) -> None:
    def run(seed: int) -> list[list[int]]:
        sampling = Sampling(temperature=1.0, top_k=20, top_p=0.95, seed=seed)
        return quantized.generate([TOKENS[:10], TOKENS[10:30]], max_new_tokens=20, sampling=sampling)

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_empty_prompt_is_refused(quantized: Session) -> None:
    with pytest.raises(SkvError, match="prompts"):
        quantized.generate([[5], []])


# Text.


def test_text_streams_piece_by_piece(tmp_path: Path) -> None:
    folder, pieces = Tiny().write_all(tmp_path, eos_token_id=[]), []
    result = generate_text(folder, "Anne Elliot", max_new_tokens=12, on_text=pieces.append)
    assert "".join(pieces) == result.text == load_tokenizer(folder).decode(result.tokens)
    assert len(result.tokens) == 12 and result.prompt_tokens == 11
    assert "11 prompt tokens" in result.summary() and "12 new" in result.summary()
    sampled = [generate_text(folder, "Anne", max_new_tokens=12, temperature=1.0, seed=s).tokens for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_chat_prompts_go_through_the_models_template(tmp_path: Path) -> None:
    folder = Tiny().write_all(tmp_path)
    with pytest.raises(SkvError, match="no chat template"):
        generate_text(folder, "hello", chat=True)
    template = (
        "{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    assert Session(folder).chat_prompt([{"role": "user", "content": "hello"}]) == "[user: hello]>"
    assert generate_text(folder, "hello", chat=True, max_new_tokens=1).prompt_tokens == len("[user: hello]>")
    with pytest.raises(SkvError, match="prompt: no tokens"):
        generate_text(folder, "")


# CUDA graphs: their buffers and masks here, their capture in test_provider.py.


def test_decoding_from_buffers_that_stay_is_decoding(quantized: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks, prompts = [40] + [1] * 60, [TOKENS[:30], TOKENS[50:53]]
    expected, texts = steps(quantized, TOKENS, chunks), quantized.generate(prompts, max_new_tokens=40)
    columns: list[int] = []

    def set_column(device_id: int, address: int, row_bytes: int, rows: int) -> None:
        """On the host, where these buffers are."""
        columns.append(rows)
        for row in range(rows):
            number = ctypes.c_int64.from_address(address + row * row_bytes)
            assert number.value == 0
            number.value = 1

    monkeypatch.setattr(quantized.library, "set_column", set_column)
    monkeypatch.setattr(quantized.graph, "cuda_graph", True)
    assert np.array_equal(steps(quantized, TOKENS, chunks), expected)
    assert columns == 59 * [1], "the mask is made anew in more than the first of 60 steps"
    assert quantized.generate(prompts, max_new_tokens=40) == texts
    cache = quantized.cache(1)
    quantized.run([TOKENS[:20]], None, None, cache)
    assert len(quantized.graph.captured) == 0  # those of the caches before went with them, and a prompt needs none


def test_a_graph_is_the_gpus(tmp_path: Path) -> None:
    with pytest.raises(SkvError, match="cuda_graph; got execution_provider cpu; expected cuda"):
        Session(Tiny().write(tmp_path), cuda_graph=True)


# The library.


def test_library_that_is_not_there_says_where_it_looked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SKV_OPS_LIBRARY", str(tmp_path / "nothing.so"))
    with pytest.raises(SkvError, match=r"SKV_OPS_LIBRARY: no such file; got .*nothing.so"):
        library_path()
    monkeypatch.delenv("SKV_OPS_LIBRARY")
    monkeypatch.setattr("skv_export.__path__", [str(tmp_path)])
    with pytest.raises(SkvError, match=r"not found; got nothing at .*lib/libskv_ops.so"):
        library_path()


def test_file_that_is_no_library_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "libskv_ops.so"
    path.write_bytes(b"not ELF")
    with pytest.raises(SkvError, match=r"can't be loaded.*expected a build of skv_export"):
        library.load_library(path)


def test_runtime_needs_no_torch() -> None:
    code = (
        "import sys, skv_export.runtime.session as r; assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_wrong_types_are_clear_errors(quantized: Session) -> None:
    with pytest.raises(SkvError, match="folder; got None"):
        Session(None)  # type: ignore[arg-type]
    for threads in (1_000_000, -1, "4", True):
        with pytest.raises(SkvError, match="num_threads"):
            Session(quantized.folder, num_threads=threads)  # type: ignore[arg-type]
    for batch in (0, 1.5, None):
        with pytest.raises(SkvError, match="batch"):
            quantized.cache(batch)  # type: ignore[arg-type]
    with pytest.raises(SkvError, match="max_length"):
        quantized.cache(1, "10")  # type: ignore[arg-type]
    for cache in (None, {}, Session(quantized.folder).cache()):
        with pytest.raises(SkvError, match=r"cache; got .*expected (Cache|one that this session's cache)"):
            quantized.run([[1]], None, None, cache)  # type: ignore[arg-type]


def test_the_first_sequences_are_a_cache_of_their_own_kind(quantized: Session) -> None:
    """What a part does, the whole has: calls, rewinds, copies; and the other sequences take no part."""
    whole = quantized.cache(3, 200)
    quantized.append([[5, 6, 7], [8, 9], [10]], whole)
    others = whole.data(0, "key")[2].copy()
    part = whole.first(2)
    single = [quantized.cache(1, 200) for _ in range(2)]
    for cache, tokens in zip(single, ([5, 6, 7], [8, 9]), strict=True):
        quantized.append([tokens], cache)
    for step in range(60):
        rows = [[11 + step], [70 - step]]
        both = quantized.append(rows, part)
        for b, cache in enumerate(single):
            np.testing.assert_allclose(both[b], quantized.append([rows[b]], cache)[0], rtol=1e-3, atol=1e-3)
    assert whole.lengths.tolist() == [63, 62, 1] and [len(x) for x in whole.tokens] == [63, 62, 1]
    part.rewind([60, 0])
    part.reorder([0, 0])
    assert whole.lengths.tolist() == [60, 60, 1] and whole.tokens[1] == whole.tokens[0]
    assert np.array_equal(part.data(1, "value"), whole.data(1, "value")[:2])
    assert np.array_equal(whole.data(0, "key")[2], others)
    part.reset()
    assert whole.lengths.tolist() == [0, 0, 1] and whole.tokens == [[], [], [10]]
    for n in (0, 4):
        with pytest.raises(SkvError, match=r"1 \.\.\. 3"):
            whole.first(n)
