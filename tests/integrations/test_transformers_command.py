"""transformers' own server on an exported folder, asked as its own chat asks it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tiny, write_tokenizer

from skv_export import export_model

pytest.importorskip("rich", reason="rich is not installed: pip install 'transformers[serving]'")
pytest.importorskip("fastapi", reason="fastapi is not installed: pip install '.[serve]'")
pytestmark = pytest.mark.slow

SERVE = (
    "import sys; from skv_export.integrations.transformers_command import main; sys.argv[0] = 'transformers'; main()"
)


def post(port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return dict(json.load(answer))


def test_transformers_serves_an_exported_folder(tmp_path: Path, library: Path) -> None:
    checkpoint = make_tiny(tmp_path / "tiny", "llama")
    write_tokenizer(checkpoint, 96)
    (checkpoint / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}[")
    folder = tmp_path / "exported"
    export_model(checkpoint, out=folder, progress=lambda phase, fraction: None)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["SkvForCausalLM"]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", SERVE, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "log").open("w") as log, subprocess.Popen([*command, "--device", "cpu"], stderr=log) as server:
        try:
            end = time.monotonic() + 240
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).close()
                    break
                except urllib.error.URLError:
                    assert server.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()[-2000:]
                    time.sleep(0.5)
            generation = json.dumps({"max_new_tokens": 12, "do_sample": False})
            said = post(
                port,
                "/v1/chat/completions",
                {
                    "model": str(folder),
                    "messages": [{"role": "user", "content": "Hello"}],
                    "generation_config": generation,
                },
            )
        finally:
            server.terminate()
    from skv_export import Session

    session = Session(folder)
    (tokens,) = session.generate([session.tokenizer.encode("[Hello][").ids], max_new_tokens=12)
    assert said["choices"][0]["message"]["content"] == session.tokenizer.decode(tokens)
