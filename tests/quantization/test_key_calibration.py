"""`skv-export calibrate` and `quality --calibration` on tiny models: what is summed, written, and measured with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from letters import TEXT, Letters
from transformers import AttentionInterface, AutoModelForCausalLM

from skv_export.calibration.file import Calibration
from skv_export.checkpoints.checkpoint import resolve
from skv_export.cli.main import main
from skv_export.errors import SkvError
from skv_export.evaluation import comparison
from skv_export.quantization import key_calibration, layer_by_layer
from skv_export.quantization.key_calibration import calibrate, measure
from skv_export.quantization.layer_by_layer import LayerByLayer
from skv_export.spec.recipe import LayerConfig


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (comparison, key_calibration):
        monkeypatch.setattr(module, "load_tokenizer", lambda _: Letters())


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_moments_are_those_of_what_transformers_own_attention_gets(
    arch: str, tiny_checkpoint: Callable[..., Path], letters: None
) -> None:
    """Queries and keys are caught in transformers' plain attention, and summed with numpy, tile by tile."""
    folder = tiny_checkpoint(arch)
    seen: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}

    def catch(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
    ) -> Any:
        seen.setdefault(module.layer_idx, []).append((query[0].double().numpy(), key[0].double().numpy()))
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if options.get("softcap"):
            from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

            return eager_attention_forward(module, query, key, value, mask, **options)
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register("catching", catch)
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask

    ALL_MASK_ATTENTION_FUNCTIONS.register("catching", eager_mask)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="catching").eval()
    windows = torch.stack([(torch.arange(150) * step) % 300 for step in (37, 41)])
    with torch.no_grad():
        for ids in windows:
            plain(ids[None], use_cache=False)

    tiles = LayerConfig(num_sink_tokens=3, tile_tokens=32)
    model = LayerByLayer(resolve(folder))
    found = {index: moments for index, moments, _ in measure(model, model.embed(windows), tiles)}
    assert set(found) == set(seen)
    for layer, moments in found.items():
        heads = moments.keys.shape[0]
        queries, keys = np.zeros_like(moments.queries), np.zeros_like(moments.keys)
        for q, k in seen[layer]:
            for n in range(q.shape[0]):
                queries[n * heads // q.shape[0]] += q[n].T @ q[n]
            for h in range(heads):
                for start in range(3, 150 - 31, 32):
                    tile = k[h, start : start + 32]
                    keys[h] += (tile - tile.mean(0)).T @ (tile - tile.mean(0))
        for got, want in ((moments.queries, queries), (moments.keys, keys)):
            assert np.abs(got.numpy() - want).max() < 1e-4 * np.abs(want).max()


def test_a_window_below_a_tile_is_refused(tiny_checkpoint: Callable[..., Path], letters: None) -> None:
    model = LayerByLayer(resolve(tiny_checkpoint("llama")))
    with pytest.raises(SkvError, match="calibration: window; got 60 tokens; expected at least 68"):
        next(measure(model, model.embed(torch.zeros(1, 60, dtype=torch.int64))))


def test_an_interrupted_run_goes_on_where_it_was(
    tiny_checkpoint: Callable[..., Path], letters: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, state = resolve(tiny_checkpoint("gemma2")), tmp_path / "state"
    whole = calibrate(source, TEXT, windows=2, window=128)
    run, calls = layer_by_layer.LayerByLayer.run, []

    def interrupted(model: LayerByLayer, index: int, *arguments: Any) -> torch.Tensor:
        calls.append(index)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return run(model, index, *arguments)

    monkeypatch.setattr(layer_by_layer.LayerByLayer, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(source, TEXT, windows=2, window=128, state=state)
    found = calibrate(source, TEXT, windows=2, window=128, state=state)
    assert calls == [0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert {index: basis.digest for index, basis in found.bases.items()} == {
        index: basis.digest for index, basis in whole.bases.items()
    }
    with pytest.raises(SkvError, match="not the state of this run"):
        calibrate(source, TEXT[5:], windows=2, window=128, state=state)
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(SkvError):
        calibrate(source, TEXT, windows=2, window=128, state=state)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, list(arguments))


def test_a_calibration_is_made_and_measured_beside_the_plain_form(
    tiny_checkpoint: Callable[..., Path], letters: None, tmp_path: Path
) -> None:
    text, out, folder = tmp_path / "text.txt", tmp_path / "cal.safetensors", str(tiny_checkpoint("qwen3"))
    text.write_text(TEXT)
    made = run("calibrate", folder, "--text", str(text), "--windows", "2", "--window", "200", "--out", str(out))
    assert made.exit_code == 0, made.output
    assert "2 layers of 2 KV heads, measured on 2 windows of 200 tokens" in made.output
    assert made.output.rstrip().splitlines()[-1].startswith("These keys need fewer bits")
    calibration = Calibration.load(out)
    assert {layer: basis.key.shape for layer, basis in calibration.bases.items()} == {0: (2, 64, 64), 1: (2, 64, 64)}
    shown = run(
        "quality", folder, "--configs", "K2V2,K16V2,turboquant-like", "--calibration", str(out), "--text", str(text),
        "--windows", "2", "--window", "200", "--json", str(tmp_path / "q.json"),
    )  # fmt: skip
    assert shown.exit_code == 0, shown.output
    rows = {row["name"]: row for row in json.loads((tmp_path / "q.json").read_text())["rows"]}
    # Keys of 16 bits, or with a scale per token, have no calibrated form.
    assert list(rows) == ["K2V2", "K2V2+cal", "K16V2", "turboquant-like"]
    assert rows["K2V2+cal"]["effective_bits"] == rows["K2V2"]["effective_bits"]
    assert rows["K2V2+cal"]["kld_mean"] != rows["K2V2"]["kld_mean"]


def test_another_models_calibration_is_refused(
    tiny_checkpoint: Callable[..., Path], letters: None, tmp_path: Path
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "cal.safetensors"
    text.write_text(TEXT)
    folder = str(tiny_checkpoint("llama"))
    made = run("calibrate", folder, "--text", str(text), "--windows", "1", "--window", "128", "--out", str(out))
    assert made.exit_code == 0, made.output
    refused = run("quality", str(tiny_checkpoint("qwen3")), "--configs", "K2V2", "--calibration", str(out))
    assert refused.exit_code == 1 and "made for another checkpoint" in refused.output
    out.write_bytes(out.read_bytes()[:-1])
    assert run("quality", folder, "--configs", "K2V2", "--calibration", str(out)).exit_code == 1


def test_the_default_text_is_not_the_one_that_quality_reports_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from skv_export.evaluation.text import CALIBRATION_TEXT, SHIPPED_TEXT, read_text

    assert CALIBRATION_TEXT != SHIPPED_TEXT
    assert read_text(None, CALIBRATION_TEXT)[:2000] not in read_text(None)
