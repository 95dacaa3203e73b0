"""llama.cpp's own logits and token ids of a GGUF file: the truth of such files, by code that shares nothing with ours.

It runs in a process of its own: what it does not like about a file ends its process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest


def environment() -> dict[str, str]:
    """The variables of a process that can import llama_cpp (extra ``llama-cpp``, or the folder SKV_LLAMA_CPP)."""
    folder = os.environ.get("SKV_LLAMA_CPP")
    if folder is None and importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed: pip install '.[llama-cpp]'")
    return {**os.environ, "PYTHONPATH": folder or ""}


def llama_cpp(path: Path, *, ids: Sequence[int] = (), texts: Sequence[str] = ()) -> dict[str, Any]:
    """Returns ``logits`` of every position (``[tokens][vocab_size]``), and the ``ids`` of each text."""
    question = json.dumps({"path": str(path), "ids": list(ids), "texts": list(texts)})
    done = subprocess.run(
        [sys.executable, __file__], input=question, capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, f"llama.cpp ended with {done.returncode}: {done.stderr[-800:]}"
    return json.loads(done.stdout)


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    from llama_cpp import GGML_TYPE_F32, Llama

    length = max(len(question["ids"]), 512)
    llama = Llama(
        question["path"], n_ctx=length, n_batch=length, logits_all=True, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32,
        n_threads=2, n_gpu_layers=0, verbose=False, yarn_beta_fast=-1.0, yarn_beta_slow=-1.0,  # as the file says
    )  # fmt: skip
    if question["ids"]:
        llama.eval(question["ids"])
    return {
        "logits": llama.scores[: len(question["ids"])].tolist(),
        "ids": [llama.tokenize(text.encode(), add_bos=False, special=True) for text in question["texts"]],
    }


if __name__ == "__main__":
    print(json.dumps(_answer(json.loads(sys.stdin.read()))))
