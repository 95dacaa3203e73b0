"""Saved caches: going on in another process is going on in the first, and what is no cache of the model is an error."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from tiny_graph import CONTEXT, EXACT, SMALL, VOCAB, Tiny

from skv_export.cli.main import main
from skv_export.errors import SkvError
from skv_export.runtime.cache import Cache
from skv_export.runtime.session import Session
from skv_export.runtime.text import generate_text

pytestmark = pytest.mark.usefixtures("library")

TOKENS = np.random.default_rng(3).integers(3, VOCAB, 300).tolist()
MODELS = {
    "full": Tiny(SMALL),
    "window": Tiny(SMALL, windows=(40, 0)),
    "all windows": Tiny(SMALL, windows=(40, 70)),
    "token_channel": Tiny(dataclasses.replace(SMALL, k_granularity="token_channel", v_bits=3)),
    "exact": Tiny(EXACT),
}


@pytest.fixture(scope="module", params=MODELS)
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Session:
    return Session(MODELS[request.param].write_all(tmp_path_factory.mktemp("model"), eos_token_id=[]))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return Session(Tiny(SMALL).write_all(tmp_path_factory.mktemp("one"), eos_token_id=[]))


def filled(session: Session, lengths: list[int], max_length: int | None = None) -> Cache:
    cache = session.cache(len(lengths), max_length)
    ids, mask = np.zeros((2, len(lengths), max(lengths)), np.int64)
    for b, length in enumerate(lengths):
        ids[b, :length], mask[b, :length] = TOKENS[b : b + length], 1
    session.run(ids, mask, None, cache)
    return cache


def goes_on_alike(session: Session, caches: list[Cache], steps: int = 50) -> None:
    for token in TOKENS[100 : 100 + steps]:
        first, *others = [session.run([[token]] * cache.batch, None, None, cache) for cache in caches]
        assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("lengths", [[1], [49], [130], [150, 3, 60]], ids=str)
def test_a_loaded_cache_goes_on_as_the_saved_one(session: Session, tmp_path: Path, lengths: list[int]) -> None:
    cache = filled(session, lengths, 250)
    cache.save(tmp_path / "cache")
    loaded = session.load_cache(tmp_path / "cache")
    assert loaded.max_length == CONTEXT and loaded.tokens == cache.tokens
    assert loaded.lengths.tolist() == lengths
    goes_on_alike(session, [cache, loaded])


def test_a_rewound_cache_is_rewound_as_far_after_loading(session: Session, tmp_path: Path) -> None:
    cache = filled(session, [150])
    goes_on_alike(session, [cache], 30)
    cache.rewind(170)
    cache.save(tmp_path / "cache")
    loaded = session.load_cache(tmp_path / "cache", room=60)
    assert loaded.rewind_floor(0) == cache.rewind_floor(0)
    for x in (cache, loaded):
        x.rewind(x.rewind_floor(0))
    assert cache.tokens == loaded.tokens
    goes_on_alike(session, [cache, loaded])


def test_the_same_cache_is_the_same_file(one: Session, tmp_path: Path) -> None:
    filled(one, [33]).save(tmp_path / "a")
    filled(one, [33]).save(tmp_path / "b")
    one.load_cache(tmp_path / "a", room=3).save(tmp_path / "c")
    data = [(tmp_path / name).read_bytes() for name in "ab"]
    assert data[0] == data[1]
    assert load_file(tmp_path / "c").keys() == load_file(tmp_path / "a").keys()
    for name, tensor in load_file(tmp_path / "c").items():
        assert np.array_equal(tensor, load_file(tmp_path / "a")[name]), name


def test_a_second_process_writes_what_the_first_would_have(one: Session, tmp_path: Path) -> None:
    """One process generates 60 tokens; two others, the second from a file, generate 25 and 35."""
    whole = generate_text(one.folder, "Anne Elliot", max_new_tokens=60)
    code = (
        "import sys; from skv_export.runtime.text import generate_text as g; folder, file = sys.argv[1:];"
        "print(g(folder, 'Anne Elliot', max_new_tokens=25, save_cache=file).tokens)"
    )
    command = [sys.executable, "-c", code, str(one.folder), str(tmp_path / "cache")]
    first = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    second = generate_text(one.folder, "", max_new_tokens=35, load_cache=tmp_path / "cache")
    assert json.loads(first) + second.tokens == whole.tokens
    more = generate_text(one.folder, "and", max_new_tokens=5, load_cache=tmp_path / "cache")
    assert (more.prompt_tokens, more.cached_tokens) == (39, 36) and len(more.tokens) == 5


def test_the_command_saves_and_goes_on(one: Session, tmp_path: Path) -> None:
    def run(*options: str) -> str:
        result = CliRunner().invoke(main, ["generate", str(one.folder), *options, "--max-new-tokens", "9"])
        assert result.exit_code == 0, result.output
        return result.stdout.rstrip("\n")

    whole = generate_text(one.folder, "Anne", max_new_tokens=18).text
    first = run("--prompt", "Anne", "--save-cache", str(tmp_path / "cache"))
    assert first + run("--prompt", "", "--load-cache", str(tmp_path / "cache")) == whole


def test_an_empty_cache_is_saved_too(one: Session, tmp_path: Path) -> None:
    one.cache(2, 90).save(tmp_path / "cache")
    loaded = one.load_cache(tmp_path / "cache", room=90)
    assert loaded.batch == 2 and loaded.max_length == 90 and loaded.lengths.tolist() == [0, 0]
    with pytest.raises(SkvError, match="cache: sequences; got 2"):
        generate_text(one.folder, "", load_cache=tmp_path / "cache")
    one.cache().save(tmp_path / "cache")
    with pytest.raises(SkvError, match="prompt: no tokens"):
        generate_text(one.folder, "", load_cache=tmp_path / "cache")


# What is refused.


def test_a_cache_of_another_model_is_refused(one: Session, tmp_path: Path) -> None:
    cache = filled(one, [60])
    cache.save(tmp_path / "cache")
    other = Tiny(dataclasses.replace(SMALL, v_bits=3)).write(tmp_path / "other")
    with pytest.raises(SkvError, match="a cache of other layouts"):
        Session(other).load_cache(tmp_path / "cache")
    twin = Tiny(SMALL).write(tmp_path / "twin")
    assert Session(twin).load_cache(tmp_path / "cache").lengths.tolist() == [60]  # the same model elsewhere
    weights = bytearray((twin / "model.onnx.data").read_bytes())
    weights[-1] ^= 1
    (twin / "model.onnx.data").write_bytes(weights)
    with pytest.raises(SkvError, match="a cache of another model"):
        Session(twin).load_cache(tmp_path / "cache")


def test_every_truncation_and_flipped_byte_is_an_error(one: Session, tmp_path: Path) -> None:
    path, damaged = tmp_path / "cache", tmp_path / "damaged"
    filled(one, [70]).save(path)
    good, rng = path.read_bytes(), np.random.default_rng(0)
    header = 8 + int.from_bytes(good[:8], "little")
    for size in (0, 1, 7, 8, 100, header, header + 1, len(good) - 1):
        damaged.write_bytes(good[:size])
        with pytest.raises(SkvError, match="damaged"):
            one.load_cache(damaged)
    damaged.write_bytes(good + b"x")
    with pytest.raises(SkvError, match="bytes after"):
        one.load_cache(damaged)
    for at in [*rng.integers(0, header, 60).tolist(), *rng.integers(header, len(good), 40).tolist()]:
        changed = bytearray(good)
        changed[at] ^= int(rng.integers(1, 256))
        damaged.write_bytes(changed)
        with pytest.raises(SkvError):
            one.load_cache(damaged)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "other", "no saved cache"),
        ("format_version", "2", "format_version; got 2"),
        ("layout_version", "7", "layout_version; got 7"),
        ("lengths", "[70, 70]", "damaged"),
        ("lengths", "[-1]", "lengths"),
        ("lengths", "[1e9]", "lengths"),
        ("lengths", "70", "damaged"),
        ("lengths", "[[", "damaged"),
        ("lengths", "[69]", "tensor 0.tokens"),
        ("longest", "[69]", "lengths"),
        ("longest", f"[{10**12}]", "lengths"),
        ("dropped", "[71]", "lengths"),
        ("dropped", "[0, 0]", "damaged"),
        ("chosen", "[1]", "lengths"),
        ("chosen", None, "no chosen"),
        ("max_length", "0", "lengths"),
        ("max_length", "many", "metadata"),
        ("sha256", "0" * 64, "SHA-256"),
        ("sha256", "", "SHA-256"),
        ("model", None, "no model"),
    ],
)
def test_hostile_metadata_is_an_error(one: Session, tmp_path: Path, key: str, value: str | None, message: str) -> None:
    path = tmp_path / "cache"
    filled(one, [70]).save(path)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    if value is None:
        del header["__metadata__"][key]
    else:
        header["__metadata__"][key] = value
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    with pytest.raises(SkvError, match=message):
        one.load_cache(path)


def test_other_files_are_named(one: Session, tmp_path: Path) -> None:
    with pytest.raises(SkvError, match="no such file"):
        one.load_cache(tmp_path / "nothing")
    with pytest.raises(SkvError, match="no such file"):
        one.load_cache(tmp_path)
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "weights")
    with pytest.raises(SkvError, match="no saved cache"):
        one.load_cache(tmp_path / "weights")
    with pytest.raises(SkvError, match="its folder does not exist"):
        filled(one, [3]).save(tmp_path / "no" / "cache")
    filled(one, [30]).save(tmp_path / "cache")
    for room in (-1, "many", CONTEXT):
        with pytest.raises(SkvError, match="room"):
            one.load_cache(tmp_path / "cache", room=room)  # type: ignore[arg-type]


def test_a_failed_save_leaves_the_old_file(one: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache"
    filled(one, [40]).save(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Cache, "tensor_state", full)
    with pytest.raises(SkvError, match="No space left"):
        filled(one, [90]).save(path)
    assert path.read_bytes() == before and [x.name for x in tmp_path.iterdir()] == ["cache"]


# Copies.


def test_forks_go_on_by_themselves(session: Session) -> None:
    cache = filled(session, [60, 90])
    forked = cache.fork(2)
    assert forked.tokens == [cache.tokens[0], cache.tokens[0], cache.tokens[1], cache.tokens[1]]
    steps = np.random.default_rng(0).integers(3, VOCAB, (40, 4))
    got = np.stack([session.run(row[:, None], None, None, forked)[:, 0] for row in steps])
    for b, source in enumerate([0, 0, 1, 1]):
        alone = cache.select([source])
        want = np.stack([session.run([[row[b]]], None, None, alone)[:, 0] for row in steps])
        assert np.abs(got[:, b] - want[:, 0]).max() < 2e-2
    assert cache.lengths.tolist() == [60, 90]
    with pytest.raises(SkvError, match="fork"):
        cache.fork(0)


def test_the_tokens_follow_every_change(one: Session) -> None:
    cache = filled(one, [20, 50])
    cache.rewind([20, 45])
    assert cache.tokens == [TOKENS[:20], TOKENS[1:46]]
    cache.reorder([1, 0])
    one.run([[5, 0], [0, 6]], np.concatenate([np.arange(45) < [[45], [20]], [[1, 0], [0, 1]]], axis=1), None, cache)
    assert cache.tokens == [[*TOKENS[1:46], 5], [*TOKENS[:20], 6]]
    cache.rewind([0, 21])
    assert cache.tokens == [[], [*TOKENS[:20], 6]]
    cache.reset()
    assert cache.tokens == [[], []]
