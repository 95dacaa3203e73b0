"""Exported models on the hub: pushed, fetched, saved, in transformers' pipeline. The hub is a server of this file's."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import logging
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import constants, snapshot_download
from tiny_graph import SMALL, Tiny
from transformers import AutoTokenizer, pipeline

from skv_export import SkvForCausalLM
from skv_export.checkpoints.checkpoint import resolve
from skv_export.checkpoints.pretrained import download
from skv_export.cli.main import main
from skv_export.errors import SkvError
from skv_export.export.pipeline import Export, export_model
from skv_export.model_folder import hub as hub_module
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.runtime.session import Session
from skv_export.spec.conformance import op_cases
from skv_export.verification import op_level

PROMPT = [[7, 8, 9, 40, 41, 42] * 8]


class Hub:
    """As much of the hub's interface as huggingface_hub needs to make a repository, commit to it and download it.

    Attributes:
        repos: Repository to revision to file to content.
        log: Method and path of every request.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.log: list[tuple[str, str]] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self, b"")

            do_HEAD = do_GET  # noqa: N815

            def do_POST(self) -> None:
                hub.answer(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
        path = request.path.partition("?")[0]
        self.log.append((request.command, path))
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization', 'me')}/{given['name']}"
            known = name in self.repos
            self.repos.setdefault(name, {"main": {}})
            values = {"url": f"{self.url}/{name}", "error": "exists"}
            return self.send(request, json.dumps(values).encode(), 409 if known else 200)
        if path == "/api/validate-yaml":
            front = json.loads(body)["content"].split("---")[1]
            assert yaml.safe_load(front)["library_name"] == "skv_export"
            return self.send(request, b'{"errors": [], "warnings": []}')
        for name, revisions in self.repos.items():
            if path.startswith(f"/{name}/resolve/"):
                revision, _, file = path.removeprefix(f"/{name}/resolve/").partition("/")
                return self.resolve(request, self.files(revisions, revision), file)
            if path.startswith(f"/api/models/{name}/"):
                verb, _, rest = path.removeprefix(f"/api/models/{name}/").partition("/")
                return self.api(request, revisions, verb, rest, body)
        return self.send(request, b"", 404, {"X-Error-Code": "RepoNotFound"})

    def api(self, request: Any, revisions: dict[str, dict[str, bytes]], verb: str, rest: str, body: bytes) -> None:
        if verb == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.send(request, json.dumps({"files": files}).encode())
        if verb == "commit":
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    revisions.setdefault(rest, {})[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            values = {"commitUrl": f"{self.url}/me/repo/commit/1", "commitOid": sha(revisions[rest]), "success": True}
            return self.send(request, json.dumps(values).encode())
        files = self.files(revisions, rest)
        if files is None:
            return self.send(request, b"", 404, {"X-Error-Code": "RevisionNotFound"})
        if verb == "tree":
            tree = [{"type": "file", "path": n, "size": len(d), "oid": digest(d)} for n, d in files.items()]
            return self.send(request, json.dumps(tree).encode())
        values = {"id": "x", "sha": sha(files), "siblings": [{"rfilename": n} for n in files]}
        return self.send(request, json.dumps(values).encode())

    def files(self, revisions: dict[str, dict[str, bytes]], revision: str) -> dict[str, bytes] | None:
        return {**revisions, **{sha(files): files for files in revisions.values()}}.get(revision)

    def resolve(self, request: Any, files: dict[str, bytes] | None, file: str) -> None:
        if files is None or file not in files:
            code = "RevisionNotFound" if files is None else "EntryNotFound"
            return self.send(request, b"", 404, {"X-Error-Code": code, "X-Repo-Commit": sha(files or {})})
        data, headers = files[file], {"ETag": f'"{digest(files[file])}"', "X-Repo-Commit": sha(files)}
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range") or ""):
            part = data[int(match[1]) : int(match[2]) + 1]
            headers["Content-Range"] = f"bytes {match[1]}-{int(match[1]) + len(part) - 1}/{len(data)}"
            return self.send(request, part, 206, headers)
        return self.send(request, data, 200, headers)

    def send(self, request: Any, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def sha(files: dict[str, bytes]) -> str:
    return digest(b"".join(name.encode() + data for name, data in sorted(files.items())))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    served = Hub()
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield served
    served.server.shutdown()
    served.server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, library: Path) -> Path:
    path = Tiny(SMALL).write_all(tmp_path_factory.mktemp("model") / "tiny", eos_token_id=[])
    (path / "recipe.toml").write_text("k_bits = 4\n")
    (path / "libskv_ops.so").write_bytes(b"native code")
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    return Session(folder).generate(PROMPT, max_new_tokens=20)


def test_what_is_pushed_is_what_comes_back(hub: Hub, folder: Path, expected: list[list[int]]) -> None:
    pushed = SkvForCausalLM.from_pretrained(folder)
    pushed.generation_config.top_k = 7
    url = pushed.push_to_hub("me/tiny", token="hf_token", commit_message="First")
    assert url.startswith(hub.url) and "/commit/" in url
    files = hub.repos["me/tiny"]["main"]
    assert {"model.onnx", "model.onnx.data", "skv_config.json", "tokenizer.json", "recipe.toml"} <= files.keys()
    assert files["model.onnx.data"] == (folder / "model.onnx.data").read_bytes()
    assert json.loads(files["generation_config.json"])["top_k"] == 7

    fetched = SkvForCausalLM.from_pretrained("me/tiny", max_length=100)
    assert fetched.session.folder != folder and fetched.max_length == 100
    assert fetched.session.generate(PROMPT, max_new_tokens=20) == expected
    assert fetched.generation_config.top_k == 7
    AutoTokenizer.from_pretrained(fetched.session.folder)


def test_no_native_code_goes_to_the_hub_or_comes_from_it(hub: Hub, folder: Path) -> None:
    SkvForCausalLM.from_pretrained(folder).push_to_hub("me/tiny", token="hf_token")
    files = hub.repos["me/tiny"]["main"]
    assert "libskv_ops.so" not in files
    files |= {"libskv_ops.so": b"somebody's", "tokenizer.py": b"somebody's", "pytorch_model.bin": b"somebody's"}
    fetched = hub_module.fetch("me/tiny")
    assert not {"libskv_ops.so", "tokenizer.py", "pytorch_model.bin"} & {path.name for path in fetched.iterdir()}


def test_a_card_is_written_once(hub: Hub, folder: Path) -> None:
    hub_module.push(folder, "me/tiny", token="hf_token")
    card = hub.repos["me/tiny"]["main"]["README.md"].decode()
    assert 'SkvForCausalLM.from_pretrained("me/tiny")' in card and "K4V2" in card
    hub.repos["me/tiny"]["main"]["README.md"] = b"My own words."
    hub_module.push(folder, "me/tiny", token="hf_token")
    assert hub.repos["me/tiny"]["main"]["README.md"] == b"My own words."


def test_revisions_and_the_cache(hub: Hub, folder: Path, expected: list[list[int]]) -> None:
    hub_module.push(folder, "me/tiny", token="hf_token")
    hub.repos["me/tiny"]["old"] = dict(hub.repos["me/tiny"]["main"])
    hub.repos["me/tiny"]["main"]["recipe.toml"] = b"k_bits = 8\n"
    new, old = hub_module.fetch("me/tiny"), hub_module.fetch("me/tiny", revision="old")
    assert [(x / "recipe.toml").read_text() for x in (new, old)] == ["k_bits = 8\n", "k_bits = 4\n"]
    hub.log.clear()
    again = SkvForCausalLM.from_pretrained("me/tiny", revision="old", local_files_only=True)
    assert not hub.log and again.session.folder == old
    assert again.session.generate(PROMPT, max_new_tokens=20) == expected


def test_the_fetched_folder_has_files_not_links(hub: Hub, folder: Path) -> None:
    """ONNX Runtime refuses external data behind links that lead out of the folder, as those of the cache do."""
    hub_module.push(folder, "me/tiny", token="hf_token")
    fetched = hub_module.fetch("me/tiny")
    assert not [path for path in fetched.iterdir() if path.is_symlink()]
    weights = fetched / "model.onnx.data"
    blob = next(path for path in fetched.parents[1].glob("blobs/*") if path.samefile(weights))
    assert blob.stat().st_nlink == 2  # it takes its space once
    (fetched / "recipe.toml").unlink()
    assert hub_module.fetch("me/tiny") == fetched and (fetched / "recipe.toml").is_file()


def test_templates_in_a_folder_of_their_own_go_and_come(hub: Hub, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "additional_chat_templates").mkdir()
    (tmp_path / "copy" / "additional_chat_templates" / "tool_use.jinja").write_text("for tools")
    hub_module.push(tmp_path / "copy", "me/templates", token="hf_token")
    for _ in range(2):  # downloaded, and found there
        fetched = hub_module.fetch("me/templates")
        assert (fetched / "additional_chat_templates" / "tool_use.jinja").read_text() == "for tools"


def test_a_snapshot_that_was_downloaded_otherwise_loads(
    hub: Hub, folder: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    """huggingface_hub's own cache, ``snapshots/COMMIT/model.onnx.data`` a link to ``../../blobs/...``."""
    hub_module.push(folder, "me/tiny", token="hf_token")
    snapshot = Path(snapshot_download("me/tiny", endpoint=hub.url, cache_dir=tmp_path / "other"))
    assert (snapshot / "model.onnx.data").is_symlink()
    hub.log.clear()
    model = SkvForCausalLM.from_pretrained(snapshot)
    assert not hub.log and model.session.folder == snapshot.parents[1] / "skv_export" / snapshot.name
    assert model.session.generate(PROMPT, max_new_tokens=20) == expected


# The command line.


@pytest.mark.parametrize("revision", [None, "old"])
def test_generate_takes_a_hub_id(hub: Hub, folder: Path, revision: str | None) -> None:
    hub_module.push(folder, "me/tiny", token="hf_token")
    files = hub.repos["me/tiny"]
    if revision:
        files |= {revision: files["main"], "main": {}}
    arguments = ["--prompt", "Anne Elliot", "--max-new-tokens", "8"]
    local = CliRunner().invoke(main, ["generate", str(folder), *arguments])
    fetched = CliRunner().invoke(
        main, ["generate", "me/tiny", *arguments, *(["--revision", revision] if revision else [])]
    )
    assert fetched.exit_code == 0, fetched.output
    assert fetched.stdout == local.stdout and fetched.stdout.strip()


def test_verify_takes_a_hub_id(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_module.push(folder, "me/tiny", token="hf_token")
    cases = op_cases()[:1]
    monkeypatch.setattr(op_level, "op_cases", lambda: cases)
    result = CliRunner().invoke(main, ["verify", "me/tiny", "--level", "op"])
    assert result.exit_code == 0, result.output
    assert str(hub_module.fetch("me/tiny", local_files_only=True)) in result.output and "1 cases" in result.output


@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["verify"]])
def test_commands_say_what_is_no_exported_model(hub: Hub, command: list[str]) -> None:
    hub.repos["me/other"] = {"main": {"config.json": b"{}"}}
    result = CliRunner().invoke(main, [*command, "me/other"])
    assert result.exit_code == 1 and "me/other: no skv_config.json in this repository" in result.output


# What is refused.


def test_what_is_not_an_exported_model_is_not_downloaded(hub: Hub) -> None:
    hub.repos["me/other"] = {"main": {"config.json": b"{}", "model.onnx": b"large"}}
    with pytest.raises(SkvError, match=r"me/other: no skv_config.json in this repository.*skv-export model"):
        SkvForCausalLM.from_pretrained("me/other")
    assert not [path for _, path in hub.log if path.endswith("model.onnx")]


def test_what_is_not_there_is_a_clear_error(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between attempts
    with pytest.raises(SkvError, match="me/nothing: no such folder, and the hub does not give it"):
        SkvForCausalLM.from_pretrained("me/nothing")
    with pytest.raises(SkvError, match="no such folder"):
        SkvForCausalLM.from_pretrained(tmp_path / "nothing")
    hub_module.push(folder, "me/tiny", token="hf_token")
    with pytest.raises(SkvError, match=r"me/tiny: no such folder.*revision"):
        SkvForCausalLM.from_pretrained("me/tiny", revision="nothing")
    with pytest.raises(SkvError, match=r"skv_config\.json"):
        hub_module.push(tmp_path, "me/tiny")
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(SkvError, match="me/later: no such folder"):
        SkvForCausalLM.from_pretrained("me/later")
    with pytest.raises(SkvError, match="me/tiny can't be written"):
        hub_module.push(folder, "me/tiny", token="hf_token")


def test_saved_folder_is_complete(folder: Path, expected: list[list[int]], library: Path, tmp_path: Path) -> None:
    model = SkvForCausalLM.from_pretrained(folder)
    model.generation_config.max_new_tokens = 9
    model.save_pretrained(tmp_path / "saved")
    assert {p.name for p in folder.iterdir()} <= {p.name for p in (tmp_path / "saved").iterdir()}
    assert (tmp_path / "saved" / "libskv_ops.so").read_bytes() == library.read_bytes()
    again = SkvForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.generation_config.max_new_tokens == 9
    assert again.session.generate(PROMPT, max_new_tokens=20) == expected
    model.save_pretrained(tmp_path / "saved")  # over an exported folder
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("Dear Anne")
    with pytest.raises(SkvError, match="no export wrote"):
        model.save_pretrained(tmp_path / "mine")
    with pytest.raises(SkvError, match="runs from this folder"):
        model.save_pretrained(folder)


def test_transformers_pipeline(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("transformers").propagate = True
    model, tokenizer = SkvForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = ["Anne Elliot", "Sir"]
    made = text(texts, max_new_tokens=8, do_sample=False, return_full_text=False, batch_size=2)
    for given, (answer,) in zip(texts, made, strict=True):
        ids = tokenizer(given)["input_ids"]
        (tokens,) = model.session.generate([ids], max_new_tokens=8)
        assert answer["generated_text"] == tokenizer.decode(tokens, skip_special_tokens=True)
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
    with pytest.raises(SkvError, match="execution_provider"):
        pipeline("text-generation", model=model, tokenizer=tokenizer, device="cuda:0")


def test_a_checkpoint_of_the_hub_is_exported_as_the_folder_it_was_pushed_from(
    hub: Hub, tiny_checkpoint: Callable[..., Path], tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # of transformers' own downloads, read when imported
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    checkpoint = tiny_checkpoint("qwen3")
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    files["generation_config.json"] = json.dumps({"temperature": 0.6, "do_sample": True, "eos_token_id": [5]}).encode()
    hub.repos["me/qwen"] = {"main": {**files, "pytorch_model.bin": b"a pickle"}}
    out, local = (
        export_model(source, out=tmp_path / name, progress=lambda *_: None)
        for name, source in (("out", "me/qwen"), ("local", checkpoint))
    )
    for name in ("model.onnx.data", "config.json"):
        assert (out / name).read_bytes() == (local / name).read_bytes(), name
    graphs = [onnx.load(folder / "model.onnx", load_external_data=False).graph for folder in (out, local)]
    assert graphs[0] == graphs[1]  # the metadata beside it names the source
    config = ModelConfig.load(out)
    assert (config.source["kind"], config.source["name"], config.eos_token_id) == ("hub", "me/qwen", (5,))
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.6
    assert not any(path.endswith(".bin") for _, path in hub.log)


def test_what_is_pushed_after_the_plan_is_not_exported(
    hub: Hub, tiny_checkpoint: Callable[..., Path], tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    planned_of, pushed = ({p.name: p.read_bytes() for p in tiny_checkpoint(a).iterdir()} for a in ("llama", "qwen3"))
    hub.repos["me/moving"] = {"main": planned_of}
    planned = Export.read("me/moving")
    hub.repos["me/moving"] = {"main": pushed, "before": planned_of}
    out = planned.write(tmp_path / "out", progress=lambda *_: None)
    local = export_model(tiny_checkpoint("llama"), out=tmp_path / "local", progress=lambda *_: None)
    assert (out / "model.onnx.data").read_bytes() == (local / "model.onnx.data").read_bytes()
    assert ModelConfig.load(out).source["revision"] == sha(planned_of)
    for revision, model_type in (("main", "qwen3"), ("before", "llama")):
        shown = CliRunner().invoke(main, ["model", "me/moving", "--revision", revision, "--dry-run"])
        assert shown.exit_code == 0 and f": {model_type}, 2 layers" in shown.output, shown.output


def test_a_downloaded_checkpoint_is_known_offline_by_its_branch(
    hub: Hub, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in tiny_checkpoint("llama").iterdir()}
    hub.repos["me/model"] = {"main": files}
    online = resolve("me/model")
    assert online.path is None and online.commit == sha(files)
    folder = download(online).path
    pushed = {**files, "config.json": files["config.json"] + b" "}
    hub.repos["me/model"] = {"main": pushed, "before": files}
    assert resolve("me/model", revision="before").path == folder  # by its commit, whatever the name
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = resolve("me/model")
    assert (offline.path, offline.commit) == (folder, sha(files))
