"""Checkpoints: what a path names, damaged headers, shards, HTTP ranges, where architectures keep their weights."""

from __future__ import annotations

import http.server
import json
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import CONFIG, entry, llama_tensors, write
from safetensors.numpy import save_file

from skv_export.checkpoints import tensor_files
from skv_export.checkpoints.attention_weights import AttentionReader
from skv_export.checkpoints.checkpoint import Checkpoint, resolve
from skv_export.errors import SkvError
from skv_export.rewrite.source import find_onnx


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(llama_tensors(), tmp_path / "model.safetensors")
    return tmp_path


DAMAGED: dict[str, tuple[Any, bytes, int | None, str]] = {
    "length beyond the file": ({"a": entry()}, bytes(8), 10_000, "header's length"),
    "length huge": ({"a": entry()}, bytes(8), 1 << 62, "header's length"),
    "not json": (b"{not json", bytes(8), None, "not valid JSON"),
    "not utf-8": (b'{"\xff": 1}', bytes(8), None, "not valid JSON"),
    "deep nesting": (b"[" * 100_000, b"", None, "not valid JSON"),
    "a list": ([1], b"", None, "no table"),
    "twice the same name": (b'{"a": 1, "a": 2}', b"", None, "occurs twice"),
    "no offsets": ({"weight": {"dtype": "F32", "shape": [2]}}, bytes(8), None, "'weight'"),
    "offsets beyond the file": ({"weight": entry(offsets=(0, 16), shape=(4,))}, bytes(8), None, "'weight'"),
    "offsets reversed": ({"weight": entry(offsets=(8, 0))}, bytes(8), None, "'weight'"),
    "offsets negative": ({"weight": entry(offsets=(-8, 0))}, bytes(8), None, "'weight'"),
    "offsets not integers": ({"weight": entry(offsets=(0.0, 8.0))}, bytes(8), None, "'weight'"),
    "overlap": ({"one": entry(), "two": entry(offsets=(4, 12))}, bytes(12), None, "overlaps"),
    "gap": ({"one": entry(), "two": entry(offsets=(12, 20))}, bytes(20), None, "gap"),
    "bytes left over": ({"weight": entry()}, bytes(12), None, "after the last"),
    "absurd shape": ({"weight": entry(shape=(1 << 40, 1 << 40))}, bytes(8), None, "'weight'"),
    "negative shape": ({"weight": entry(shape=(-2,))}, bytes(8), None, "'weight'"),
    "boolean shape": ({"weight": entry(shape=(True, 2))}, bytes(8), None, "'weight'"),
    "many dimensions": ({"weight": entry(shape=(1,) * 9)}, bytes(8), None, "'weight'"),
    "wrong dtype": ({"weight": entry(dtype="F16")}, bytes(8), None, "'weight'"),
    "unknown dtype": ({"weight": entry(dtype="F31")}, bytes(8), None, "F31"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_headers_name_the_file_and_the_tensor(case: str, tmp_path: Path) -> None:
    header, data, length, said = DAMAGED[case]
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    write(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(SkvError, match=said) as error:
        resolve(tmp_path)
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize("size", [0, 4, 8, 40])
def test_truncated_files(size: int, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(SkvError, match=r"model\.safetensors"):
        resolve(folder)


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    rng = np.random.default_rng(1)
    kinds = [np.float32, np.float16, np.int64, np.uint8, np.bool_, ml_dtypes.bfloat16]
    tensors = {f"t{i}": (10 * rng.standard_normal((3, 5))).astype(kind) for i, kind in enumerate(kinds)}
    tensors["empty"] = np.zeros((0, 4), np.float32)
    tensors["scalar"] = np.array(3, np.float32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "np"})
    opened = Checkpoint.open(tmp_path)
    assert set(opened.names()) == set(tensors)
    for name, tensor in tensors.items():
        read = opened.tensor(name)
        assert read.dtype == tensor.dtype and opened.shape(name) == tensor.shape
        assert read.tobytes() == tensor.tobytes()
    assert opened.bytes_read == sum(t.nbytes for t in tensors.values())
    assert not read.flags.writeable


def test_shards(tmp_path: Path) -> None:
    tensors = llama_tensors()
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    shards = {"a.safetensors": "layers.0", "b.safetensors": "layers.1"}
    for shard, key in shards.items():
        save_file({n: t for n, t in tensors.items() if key in n}, tmp_path / shard)
    index = {"weight_map": {n: s for n in tensors for s, key in shards.items() if key in n}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    opened = Checkpoint.open(tmp_path)
    np.testing.assert_array_equal(
        opened.tensor("model.layers.1.self_attn.k_proj.weight"), tensors["model.layers.1.self_attn.k_proj.weight"]
    )
    (tmp_path / "b.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(SkvError, match=r"b\.safetensors: the file is missing"):
        resolve(tmp_path)
    save_file({"other": tensors["model.layers.0.input_layernorm.weight"]}, tmp_path / "b.safetensors")
    with pytest.raises(SkvError, match=r"in no shard.*layers\.1"):
        resolve(tmp_path)
    index["weight_map"]["x"] = "../../etc/passwd"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SkvError, match="weight_map"):
        resolve(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "x.ckpt", "x.PKL"])
def test_pickles_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    with pytest.raises(SkvError, match="pickle"):
        resolve(tmp_path / name)
    if name.islower():
        with pytest.raises(SkvError, match="pickle"):
            resolve(tmp_path)


@pytest.mark.parametrize("text", ["./nothing", "/no/such", "a/b/c", "x..y/z", "no.gguf", "bad name", "org/../x"])
def test_what_is_neither_a_file_nor_a_hub_id(text: str) -> None:
    with pytest.raises(SkvError, match="no such file"):
        resolve(text)


def test_empty_and_ambiguous_folders(tmp_path: Path) -> None:
    with pytest.raises(SkvError, match="no checkpoint"):
        resolve(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(SkvError, match="several GGUF"):
        resolve(tmp_path)


def test_a_file_in_the_folder_names_the_folder(folder: Path) -> None:
    assert resolve(folder / "model.safetensors") == resolve(folder)
    assert resolve(folder).pretrained == str(folder)


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(range(256)) * (1 << 14))
    file = tensor_files.LocalFile(path)
    big = 3 << 20
    assert bytes(file.read(5, 9)) == bytes([5, 6, 7, 8]) and bytes(file.read(big, big + 3)) == bytes([0, 1, 2])
    assert bytes(file.read(1, big)) == path.read_bytes()[1:big]
    before = path.stat()
    with path.open("r+b") as opened:
        opened.truncate(1 << 20)
    with pytest.raises(SkvError, match="changed while it was read"):
        file.read(0, big)
    monkeypatch.setattr(tensor_files.os, "fstat", lambda descriptor: before)  # it shrinks after it was looked at
    with pytest.raises(SkvError, match="changed while it was read"):
        file.read(0, big)


# GGUF.


def test_gguf_of_the_demo_model(demo_checkpoint: Path) -> None:
    reader = AttentionReader(Checkpoint.open(demo_checkpoint))
    assert (reader.config.num_hidden_layers, reader.config.num_key_value_heads, reader.config.head_dim) == (30, 3, 64)
    layer = reader.layer(29)
    assert layer.q.shape == (576, 576) and layer.k.shape == layer.v.shape == (192, 576)
    assert np.isfinite(layer.q).all() and layer.norm is not None and layer.norm.shape == (576,)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: d[:100], "truncated"),
        (lambda d: b"GGML" + d[4:], "magic"),
        (lambda d: d[:4] + struct.pack("<I", 9) + d[8:], "version"),
        (lambda d: d[:8] + struct.pack("<Q", 1 << 60) + d[16:], "counts"),
        (lambda d: d[:16] + struct.pack("<Q", 1 << 19) + d[24:], "demo"),
        (lambda d: d[: len(d) // 2], "within the file"),
    ],
)
def test_damaged_gguf(damage: Callable[[bytes], bytes], said: str, demo_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "demo.gguf"
    file.write_bytes(damage(demo_checkpoint.read_bytes()))
    with pytest.raises(SkvError, match=said):
        resolve(file)


# HTTP.


class Hub:
    """A hub on 127.0.0.1: serves one folder as repository org/model, and misbehaves as told.

    With a commit, it says so, and has its files elsewhere, as the hub has large ones.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.mode, self.log = root, "good", list[tuple[str, str | None]]()
        self.commit = ""
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.serve(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def serve(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path, wanted = request.path, request.headers.get("Range")
        self.log.append((path, wanted))
        file = self.root / path.rpartition("/")[2]
        revision = path.removeprefix("/org/model/resolve/").partition("/")[0]
        if self.commit and revision in ("main", self.commit) and file.is_file():
            request.send_response(302)
            request.send_header("X-Repo-Commit", self.commit)
            request.send_header("Location", f"/elsewhere/{file.name}")
            request.end_headers()
            return None
        if not path.startswith(("/org/model/resolve/main/", "/elsewhere/")) or not file.is_file():
            return request.send_error(404)
        if self.mode == "refuse":
            return request.send_error(401)
        if self.mode == "busy" or (self.mode == "busy once" and len(self.log) % 2):
            return request.send_error(503)
        data = file.read_bytes()
        start, stop = (int(x) for x in (wanted or "bytes=0-0").removeprefix("bytes=").split("-"))
        part = data[start : stop + 1]
        if self.mode == "ignores ranges":
            request.send_response(200)
            request.send_header("Content-Length", str(len(data)))
            request.end_headers()
            request.wfile.write(data)
            return None
        shift = 1 if self.mode == "other range" else 0
        request.send_response(206)
        request.send_header("Content-Range", f"bytes {start + shift}-{start + len(part) - 1}/{len(data)}")
        request.send_header("Content-Length", str(len(part)))
        request.end_headers()
        if self.mode == "drops" and len(part) > 512:
            part = part[: len(part) // 2]
        if self.mode == "drops everything":
            part = b""
        request.wfile.write(part)
        request.close_connection = True
        return None


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    served = Hub(folder)
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    monkeypatch.setattr(tensor_files.time, "sleep", lambda _: None)
    yield served
    served.server.shutdown()


def test_hub_reads_only_what_is_needed(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    padding = np.zeros((1 << 10, 1 << 8), np.float32)
    save_file({**llama_tensors(), "model.embed.weight": padding}, folder / "model.safetensors")
    monkeypatch.setattr(tensor_files, "_FIRST_READ", 4096)
    opened = Checkpoint.open("org/model")
    reader = AttentionReader(opened)
    local = AttentionReader(Checkpoint.open(folder))
    for i in range(2):
        np.testing.assert_array_equal(reader.layer(i).k, local.layer(i).k)
    assert opened.bytes_read == reader.nbytes() == 2 * (3 * 8 * 8 + 8) * 4
    sent = sum(
        int(r.removeprefix("bytes=").split("-")[1]) - int(r.removeprefix("bytes=").split("-")[0]) + 1
        for _, r in hub.log
        if r
    )
    assert sent < 40_000 < padding.nbytes
    assert opened.source.repo_id == "org/model" and opened.source.kind == "hub"


@pytest.mark.parametrize("mode", ["drops", "busy once"])
def test_a_flaky_hub_is_asked_again(mode: str, hub: Hub) -> None:
    hub.mode = mode
    opened = Checkpoint.open("org/model")
    np.testing.assert_array_equal(
        opened.tensor("model.layers.0.self_attn.k_proj.weight"),
        llama_tensors()["model.layers.0.self_attn.k_proj.weight"],
    )


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("ignores ranges", "ignores byte ranges"),
        ("drops everything", "failed 5 times"),
        ("busy", "failed 5 times.*503"),
        ("refuse", "refuses.*401"),
        ("other range", "another range"),
    ],
)
def test_a_bad_hub_is_a_clear_error(mode: str, said: str, hub: Hub) -> None:
    hub.mode = mode
    with pytest.raises(SkvError, match=said) as error:
        resolve("org/model")
    assert "org/model@main" in str(error.value)
    assert len(hub.log) <= 2 * tensor_files.ATTEMPTS


@pytest.mark.parametrize("validate", [True, False])
def test_a_branch_is_one_commit_from_the_first_answer_on(validate: bool, hub: Hub) -> None:
    hub.commit = "0123456789abcdef" * 2 + "01234567"
    source = resolve("org/model", validate=validate)
    opened = Checkpoint.open(source)
    assert (opened.source.revision, opened.source.commit, opened.revision()) == ("main", hub.commit, hub.commit)
    hub.log.clear()
    opened.tensor("model.layers.0.self_attn.k_proj.weight")
    assert Checkpoint(opened.source).config and hub.log
    assert not any("/resolve/main/" in path for path, _ in hub.log)


def test_a_hub_that_is_not_there(hub: Hub) -> None:
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(SkvError, match="can't be reached"):
        resolve("org/model")


def test_hub_without_safetensors(hub: Hub, folder: Path) -> None:
    with pytest.raises(SkvError, match="no such repository"):
        resolve("org/other")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SkvError, match="pickle"):
        resolve("org/model")


def test_hub_prefers_its_cache(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(folder / "config.json"))
    source = resolve("org/model")
    assert source.path == folder and source.pretrained == "org/model" and source.commit is None and not hub.log


def test_a_cached_branch_is_the_commit_that_it_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "89abcdef" * 5
    snapshot = shutil.copytree(folder, tmp_path / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(snapshot / "config.json"))
    assert resolve("org/model").commit == commit and str(resolve("org/model")) == f"org/model@{commit}"
    with pytest.raises(SkvError, match=r"--revision; got .*; expected a hub id"):
        resolve(folder, revision="main")


def test_the_module_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, skv_export.cli.analyze, skv_export.analysis.html_report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    "claim", [{"num_hidden_layers": 1_000_000}, {"vocab_size": 10**12}, {"text_config": {"hidden_size": 1e18}}]
)
def test_a_configuration_claims_no_more_than_its_files_hold(
    claim: dict[str, Any], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | claim))
    with pytest.raises(SkvError, match="in its configuration; got"):
        resolve(folder)


def test_what_looks_like_a_path_asks_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for text in ("models/llama", "nothing/", "model.onnx"):
        with pytest.raises(SkvError, match="no such file or folder"):
            resolve(text)
    start = time.monotonic()
    with pytest.raises(SkvError, match="the hub can't be reached"):
        resolve("org/name")
    assert time.monotonic() - start < 5
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SkvError, match="HF_HUB_OFFLINE"):
        resolve("org/name")


@pytest.mark.parametrize(
    ("content", "name"), [('{"source": {"name": "org/qwen3"}}', "org/qwen3"), ("[]", "a checkpoint"), ("{", "a check")]
)
def test_an_exported_folder_is_no_checkpoint_and_its_source_is_named(content: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "skv_config.json").write_text(content)
    (tmp_path / "model.onnx").write_bytes(b"x")
    for look in (resolve, find_onnx):
        with pytest.raises(SkvError, match=f"an exported folder, made from {name}"):
            look(tmp_path)
