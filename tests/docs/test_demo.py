"""The main job on the real model, by the command line: what `make demo` does, with less text."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from skv_export.cli.main import main
from skv_export.model_folder.skv_config import ModelConfig

pytestmark = pytest.mark.slow


def test_verify_passes_and_reports_every_figure(demo_export: Path, tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    arguments = ["verify", str(demo_export), "--level", "graph", "--level", "quality", "--json", str(target)]
    result = CliRunner().invoke(main, [*arguments, "--windows", "2", "--window-tokens", "400"])
    assert result.exit_code == 0, result.output
    report = json.loads(target.read_text())
    assert report["passed"] is True
    assert report["graph"]["steps"] == 2 * 64 + 64
    assert report["graph"]["max_abs_logit_diff"] < 5e-2
    assert report["graph"]["argmax_agreement"] == 1
    quality = report["quality"]
    assert 10 < quality["ppl_reference"] < 80
    assert abs(quality["ppl_exported"] / quality["ppl_reference"] - 1) < 0.05
    assert 0 < quality["kld_mean"] < quality["kld_p99"]
    assert quality["top1_agreement"] > 0.9
    assert 3 < quality["effective_bits"] < 16


def test_generate_streams_the_answer(demo_export: Path) -> None:
    result = CliRunner().invoke(main, ["generate", str(demo_export), "--prompt", "The capital of France is"])
    assert result.exit_code == 0, result.output
    assert "Paris" in result.output and "tokens/s" in result.output


def test_chat_samples_the_same_with_the_same_seed(demo_export: Path) -> None:
    arguments = ["generate", str(demo_export), "--chat", "--prompt", "Name a colour.", "--temperature", "0.7"]
    first, again, other = (
        CliRunner().invoke(main, [*arguments, "--seed", seed, "--max-new-tokens", "12"]).stdout for seed in "001"
    )
    assert first == again != other


def test_demo_model_writes_a_sentence(demo_export: Path) -> None:
    from skv_export.runtime.text import generate_text

    generation = generate_text(demo_export, "The capital of France is", max_new_tokens=12)
    assert "Paris" in generation.text
    config = ModelConfig.load(demo_export)
    assert (config.model_type, len(config.layers), config.context_length) == ("llama", 30, 8192)
    graph = onnx.load(demo_export / "model.onnx", load_external_data=False)
    operators = Counter(node.op_type for node in graph.graph.node)
    # The file's 210 matrices and its head, twice the embedding's (it has two planes); each with its offsets' product.
    products = operators["MatMulNBits"], operators["MatMul"], operators["Gemm"]
    assert (products, operators["GatherBlockQuantized"]) == ((212, 211, 0), 2)
    assert (operators["QuantizedKVAttention"], operators["Transpose"], operators["Cos"]) == (30, 1, 1)
    assert sum(operators.values()) < 30 * 40 + 60
    assert (demo_export / "model.onnx.data").stat().st_size < 120e6


def test_demo_tokenizer_round_trips(demo_export: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(demo_export / "tokenizer.json"))
    for text in ("The capital of France is Paris.", "  def f(x):\n\treturn x + 1", "naïve café, 東京 🙂 12345"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    chat = (demo_export / "chat_template.jinja").read_text()
    assert "<|im_start|>" in chat
