"""The server, over HTTP and with OpenAI's own client: what the session says is what the client gets."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_graph import CONTEXT, EXACT, Tiny

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install '.[serve]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install '.[serve]'")
pytest.importorskip("prometheus_client", reason="prometheus_client is not installed: pip install '.[serve]'")
pytest.importorskip("openai", reason="openai is not installed: pip install openai")

import openai
import uvicorn

from skv_export.cli.main import main
from skv_export.cli.serve import is_loopback
from skv_export.runtime.cache import Cache
from skv_export.runtime.sampling import Sampling
from skv_export.runtime.session import Session
from skv_export.serving import app as app_module
from skv_export.serving.app import create_app
from skv_export.serving.engine import Engine

pytestmark = pytest.mark.usefixtures("library")
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'forbidden' %}{{ raise_exception('Not that.') }}{% endif %}"
    "[{{ m.role[0] }}: {{ m.content }}]{% endfor %}{% if tools %}{{ tools | length }}{% endif %}{{ mood }}[a: "
)
HELLO = [{"role": "user", "content": "Hello"}]


class Server:
    """A server in a thread."""

    def __init__(
        self, folder: Path, *, slots: int = 1, queue_size: int = 16, api_key: str | None = None, **options: Any
    ) -> None:
        self.session = Session(folder, prefix_bytes=1 << 30)
        self.engine = Engine(self.session, slots=slots, queue_size=queue_size)
        app = create_app(self.engine, "tiny", api_key=api_key, **options)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()
        self.socket.close()

    def get(self, path: str, **headers: str) -> str:
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}{path}", headers=headers)) as answer:
            return str(answer.read().decode())

    def post(self, path: str, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
        request = urllib.request.Request(f"{self.url}{path}", body, {"content-type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"{}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Tiny(EXACT).write_all(tmp_path_factory.mktemp("tiny"), eos_token_id=[])
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    made = Server(folder, slots=2)
    yield made
    made.close()


def expected(server: Server, prompt: str, count: int, **sampling: Any) -> str:
    """What a session of its own says."""
    ids = server.session.tokenizer.encode(prompt).ids
    (tokens,) = Session(server.session.folder).generate([ids], max_new_tokens=count, sampling=Sampling(**sampling))
    return str(server.session.tokenizer.decode(tokens))


def test_models_are_listed(server: Server) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError, match="'other': not served here; 'tiny' is"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")


def test_a_chat_completion_is_what_the_model_says(server: Server) -> None:
    messages = [{"role": "system", "content": "Be kind."}, *HELLO]
    done = server.client().chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0)
    prompt = "[s: Be kind.][u: Hello][a: "
    (choice,) = done.choices
    assert choice.message.content == expected(server, prompt, 12) and choice.finish_reason == "length"
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(prompt), 12)
    assert done.usage.total_tokens == len(prompt) + 12 and choice.logprobs is None


def test_a_stream_is_the_same_text_in_pieces(server: Server) -> None:
    options = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "temperature": 0}
    chunks = list(
        server.client().chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == expected(server, "[u: Hello][a: ", 12) and len(texts) > 10
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12


def test_completions_stop_and_stream(server: Server) -> None:
    whole = expected(server, "Anne", 16)
    client = server.client()
    assert client.completions.create(model="tiny", prompt="Anne", temperature=0).choices[0].text == whole
    stopped = client.completions.create(model="tiny", prompt=["Anne"], temperature=0, stop=["\0", whole[4:6]])
    assert stopped.choices[0].text == whole[: whole.index(whole[4:6])] and stopped.choices[0].finish_reason == "stop"
    pieces = client.completions.create(model="tiny", prompt="Anne", temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == whole


def test_sampling_follows_seed_and_knobs(server: Server) -> None:
    client, options = server.client(), {"model": "tiny", "prompt": "Anne", "max_tokens": 24}

    def say(**more: Any) -> str:
        return client.completions.create(**options, **more).choices[0].text

    knobs = {"temperature": 0.9, "top_p": 0.9, "seed": 7}
    assert say(**knobs) == say(**knobs) == expected(server, "Anne", 24, **knobs)
    assert say(**{**knobs, "seed": 8}) != say(**knobs)
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3}
    assert say(**knobs, extra_body=extra) == expected(server, "Anne", 24, **knobs, **extra)
    assert len({say() for _ in range(3)}) == 3  # without a seed, nobody knows it


def test_log_probabilities_are_the_models(server: Server) -> None:
    done = server.client().chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    entries = done.choices[0].logprobs.content
    session, prompt = Session(server.session.folder), "[u: Hello][a: "
    ids = session.tokenizer.encode(prompt + done.choices[0].message.content).ids
    cache = session.cache(1)
    rows = [session.run([ids[: len(prompt)]], None, None, cache)[0, -1]]
    rows += [session.run([[token]], None, None, cache)[0, -1] for token in ids[len(prompt) : -1]]
    for entry, row, token in zip(entries, rows, ids[len(prompt) :], strict=True):
        wide = row.astype(np.float64)
        logprobs = wide - np.log(np.exp(wide).sum())
        assert entry.token == session.tokenizer.decode([token]) and bytes(entry.bytes).decode() == entry.token
        assert entry.logprob == pytest.approx(logprobs[token], abs=1e-3)
        best = np.argsort(-logprobs)[:3]
        assert [top.token for top in entry.top_logprobs] == [session.tokenizer.decode([int(i)]) for i in best]
    old = server.client().completions.create(model="tiny", prompt="Anne", max_tokens=4, temperature=0, logprobs=2)
    assert len(old.choices[0].logprobs.token_logprobs) == 4 and len(old.choices[0].logprobs.top_logprobs[0]) == 2
    pieces = server.client().chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=5, temperature=0, logprobs=True, stream=True
    )
    streamed = [entry.token for p in pieces if p.choices[0].logprobs for entry in p.choices[0].logprobs.content]
    assert streamed == [entry.token for entry in entries]


def test_a_conversation_runs_only_what_is_new(server: Server) -> None:
    client = server.client()
    first = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=8, temperature=0)
    said = {"role": "assistant", "content": first.choices[0].message.content}
    messages = [*HELLO, said, {"role": "user", "content": "And?"}]
    second = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached == len("[u: Hello][a: ") + 7  # the last token has never run
    prompt = f"[u: Hello][a: {said['content']}][u: And?][a: "
    assert second.choices[0].message.content == expected(server, prompt, 8)


def test_templates_get_tools_parts_and_options(server: Server) -> None:
    client = server.client()
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    done = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": parts}], tools=[tool, tool], max_tokens=3, temperature=0,
        extra_body={"chat_template_kwargs": {"mood": "!"}},
    )  # fmt: skip
    assert done.choices[0].message.content == expected(server, "[u: Hello]2![a: ", 3)
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(openai.BadRequestError, match="got image_url; expected text"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": image}])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n": 2}, "n: Input should be 1"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"extra_body": {"nonsense": 1}}, "nonsense: not supported here"),
        ({"temperature": -1}, "temperature"),
        ({"stop": [""]}, "none of them empty"),
        ({"stop": ["x"] * 17}, "at most 16"),
        ({"messages": [{"role": "user", "content": "forbidden"}]}, "Not that."),
        ({"messages": [{"role": "user", "content": "x" * CONTEXT}]}, "the model's context"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_stops(server: Server, options: dict[str, Any], said: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=said.replace(".", r"\.")):
            server.client().chat.completions.create(**{"model": "tiny", "messages": HELLO, **options}, stream=stream)
    done = server.client().chat.completions.create(model="tiny", messages=HELLO, max_tokens=2, temperature=0)
    assert done.choices[0].message.content == expected(server, "[u: Hello][a: ", 2)


def test_bodies_are_json_and_of_bounded_size(server: Server) -> None:
    path = "/v1/completions"
    assert server.post(path, b"{}", **{"content-type": "text/plain"})[0] == 415
    assert server.post(path, b"{")[0] == 400
    assert server.post("/v1/nothing", b"{}")[0] == 404


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large_is_not_read(server: Server, declared: bool) -> None:
    size = app_module.MAX_BODY_BYTES + 1
    how = f"Content-Length: {size}" if declared else "Transfer-Encoding: chunked"
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{how}\r\n\r\n"
    with socket.create_connection(server.socket.getsockname()) as connection:
        connection.sendall(head.encode())
        if not declared:
            connection.sendall(b"%x\r\n" % size + b" " * size + b"\r\n0\r\n\r\n")
        assert connection.recv(64).startswith(b"HTTP/1.1 413 ")


def test_health_and_metrics(server: Server) -> None:
    server.client().completions.create(model="tiny", prompt="Anne", max_tokens=3, temperature=0)
    assert json.loads(server.get("/health")) == {"status": "ok"}
    text = server.get("/metrics")
    assert 'skv_requests_total{path="/v1/completions",status="200"}' in text
    for name in ("skv_generated_tokens_total", "skv_time_to_first_token_seconds_count", "skv_waiting_requests 0.0"):
        assert name in text
    assert "skv_slots 2.0" in text and not re.search(r"^skv_kept_bytes 0.0", text, re.MULTILINE)


class Slow:
    """Makes each call of the model take a while, counts them, and notes of how many sequences each was."""

    def __init__(self, server: Server, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.05) -> None:
        self.calls, self.sequences, run = 0, list[int](), server.session.graph.run

        def slow(cache: Cache, *arguments: Any) -> Any:
            self.calls += 1
            self.sequences.append(cache.batch)
            time.sleep(seconds)
            return run(cache, *arguments)

        monkeypatch.setattr(server.session.graph, "run", slow)


def idle(server: Server) -> None:
    end = time.monotonic() + 120
    while server.engine.running or server.engine.waiting:
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_request(
    server: Server, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(server, monkeypatch)
    options = {"model": "tiny", "prompt": "Anne", "max_tokens": 400, "temperature": 0}
    if stream:
        pieces = server.client().completions.create(**options, stream=True)
        next(iter(pieces))
        pieces.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            server.client().with_options(timeout=0.5).completions.create(**options)
    idle(server)
    assert slow.calls < 100  # of 400


def test_requests_wait_their_turn_in_a_bounded_queue(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(folder, queue_size=2)
    try:
        Slow(server, monkeypatch)
        texts: dict[str, str] = {}

        def say(prompt: str) -> None:
            done = server.client().completions.create(model="tiny", prompt=prompt, max_tokens=30, temperature=0)
            texts[prompt] = done.choices[0].text

        threads = [threading.Thread(target=say, args=(prompt,)) for prompt in ("Anne", "Sir Walter", "Mary")]
        for i, thread in enumerate(threads):
            thread.start()
            end = time.monotonic() + 120
            while server.engine.running + server.engine.waiting < i + 1:
                assert time.monotonic() < end
                time.sleep(0.01)
        with pytest.raises(openai.InternalServerError, match="all places in the queue are taken") as caught:
            say("Too many")
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"] == "2"
        for thread in threads:
            thread.join()
        monkeypatch.undo()
        assert texts == {prompt: expected(server, prompt, 30) for prompt in ("Anne", "Sir Walter", "Mary")}
    finally:
        server.close()


@pytest.mark.parametrize("slots", [1, 3])
def test_concurrent_streams_say_what_each_says_alone(folder: Path, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(folder, slots=slots)
    try:
        sequences = Slow(server, monkeypatch, 0.01).sequences
        asked = {f"{'Anne ' * i}{i}": {"temperature": 0.8 * (i % 2), "seed": i} for i in range(7)}
        stop = {prompt: expected(server, prompt, 40, **knobs)[25:27] for prompt, knobs in asked.items()}
        texts, reasons = dict[str, str](), dict[str, str | None]()

        def say(prompt: str) -> None:
            stream = server.client().completions.create(
                model="tiny", prompt=prompt, max_tokens=40, stream=True, stop=stop[prompt], **asked[prompt]
            )
            choices = [chunk.choices[0] for chunk in stream]
            texts[prompt], reasons[prompt] = "".join(x.text for x in choices), choices[-1].finish_reason

        threads = [threading.Thread(target=say, args=(prompt,)) for prompt in asked]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for prompt, knobs in asked.items():
            whole = expected(server, prompt, 40, **knobs)
            assert texts[prompt] == whole[: whole.index(stop[prompt])] and reasons[prompt] == "stop"
        assert max(sequences) == slots
    finally:
        server.close()


def test_a_request_that_fails_beside_others_fails_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(folder, slots=2)
    try:
        Slow(server, monkeypatch)
        stream = server.client().completions.create(
            model="tiny", prompt="Anne", max_tokens=20, temperature=0, stream=True
        )
        first = next(iter(stream)).choices[0].text
        for messages in ([{"role": "user", "content": "forbidden"}], [{"role": "user", "content": "x" * CONTEXT}]):
            with pytest.raises(openai.BadRequestError):
                server.client().chat.completions.create(model="tiny", messages=messages)
        rest = "".join(chunk.choices[0].text for chunk in stream)
        monkeypatch.undo()
        assert first + rest == expected(server, "Anne", 20)
    finally:
        server.close()


def test_a_fault_is_the_servers_and_the_next_request_runs(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("a secret path")

    with monkeypatch.context() as patch:
        patch.setattr(server.session.graph, "run", broken)
        with pytest.raises(openai.InternalServerError) as caught:
            server.client().completions.create(model="tiny", prompt="Anne")
        assert caught.value.status_code == 500 and "secret" not in str(caught.value)
    done = server.client().completions.create(model="tiny", prompt="Anne", max_tokens=4, temperature=0)
    assert done.choices[0].text == expected(server, "Anne", 4)


def test_keys_and_hosts(folder: Path) -> None:
    server = Server(folder, api_key="secret", allowed_hosts=["127.0.0.1"])
    try:
        assert [model.id for model in server.client("secret").models.list()] == ["tiny"]
        for key in ("wrong", "secre"):
            with pytest.raises(openai.AuthenticationError):
                server.client(key).models.list()
        assert json.loads(server.get("/health"))["status"] == "ok"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            server.get("/metrics")
        with pytest.raises(urllib.error.HTTPError, match="400"):
            server.get("/health", Host="evil.example")
    finally:
        server.close()


def test_the_end_of_the_server_ends_what_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(folder)
    Slow(server, monkeypatch)
    pieces = server.client().completions.create(model="tiny", prompt="Anne", max_tokens=400, stream=True)
    next(iter(pieces))
    start = time.monotonic()
    pieces.close()
    server.close()
    assert not server.engine.alive and time.monotonic() - start < 30


# The command.


@pytest.mark.parametrize(
    ("host", "own"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)]
)
def test_only_loopback_is_open_without_a_key(host: str, own: bool, folder: Path) -> None:
    assert is_loopback(host) == own
    if not own:
        result = CliRunner().invoke(main, ["serve", str(folder), "--host", host])
        assert result.exit_code == 1 and "others can reach it; expected --api-key" in result.output


def test_a_missing_extra_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(main, ["serve", "/nowhere"])
    assert result.exit_code == 1 and "pip install '.[serve]'" in result.output


def test_the_command_serves_until_it_is_told_to_end(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    code = "import sys; from skv_export.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "serve", str(folder), "--port", str(port), "--model-name", "mine"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None and "Serving mine at http://127.0.0.1" in process.stderr.readline()
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=20)
            assert [model.id for model in client.models.list()] == ["mine"]
        finally:
            process.terminate()
        assert process.wait(60) in (143, -15)
