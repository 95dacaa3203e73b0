"""Exports with calibrated keys: what the folder holds, that it computes what PyTorch does, rewinding, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from letters import TEXT, Letters
from onnx.external_data_helper import load_external_data_for_model

from skv_export.calibration.file import Calibration, fingerprint
from skv_export.checkpoints.checkpoint import resolve
from skv_export.checkpoints.pretrained import load_model
from skv_export.cli.main import main
from skv_export.errors import SkvError
from skv_export.export.pipeline import export_model, plan
from skv_export.model_folder.names import CALIBRATION_FILE
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.quantization import key_calibration
from skv_export.runtime.session import Session
from skv_export.spec import reference
from skv_export.spec.conformance import make_basis
from skv_export.spec.key_basis import INPUTS, MATRICES
from skv_export.spec.recipe import LayerConfig, Recipe
from skv_export.verification import graph_level, graph_variants

pytestmark = pytest.mark.usefixtures("library")
SMALL = Recipe(LayerConfig(k_bits=3, v_bits=4, num_sink_tokens=4, recent_tokens=32, tile_tokens=32))


def calibration_of(folder: Path, layers: tuple[int, ...], heads: int, head_dim: int) -> Calibration:
    """Constants that are far from the identity, as if calibration had found them."""
    padded = -(-head_dim // 32) * 32
    bases = {layer: make_basis(heads, head_dim, padded, seed=layer) for layer in layers}
    return Calibration(bases, fingerprint(resolve(folder)), {})


@pytest.fixture(scope="module")
def made(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, library: Path
) -> dict[str, Path]:
    """Exports: llama with heads of 80 that are padded, gemma3 with windows and a calibration of two of four layers."""
    folders = {}
    for arch, layers, head_dim in (("llama", (0, 1), 80), ("gemma3_text", (1, 2), 64)):
        source, out = tiny_checkpoint(arch), tmp_path_factory.mktemp("calibrated") / arch
        calibration = calibration_of(source, layers, 2, head_dim)
        export_model(source, out=out, recipe=SMALL, calibration=calibration, progress=lambda *_: None)
        folders[arch] = out
    return folders


@pytest.mark.parametrize(("arch", "layers"), [("llama", {0, 1}), ("gemma3_text", {1, 2})])
def test_the_graph_holds_the_constants_of_its_layers(made: dict[str, Path], arch: str, layers: set[int]) -> None:
    folder = made[arch]
    held = Calibration.load(folder / CALIBRATION_FILE)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    load_external_data_for_model(model, str(folder))
    initializers = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "QuantizedKVAttention"]
    for layer, node in enumerate(nodes):
        names = list(node.input)[17:]
        assert len(names) == (3 if layer in layers else 0)
        for name, matrix in zip(names, MATRICES, strict=bool(names)):
            assert np.array_equal(initializers[name], getattr(held.bases[layer], matrix))
    config = ModelConfig.load(folder)
    assert {i for i, layer in enumerate(config.layers) if layer.calibrated} == layers


@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])
def test_the_export_computes_what_pytorch_does_with_the_same_cache(
    made: dict[str, Path], tiny_checkpoint: Callable[..., Path], arch: str
) -> None:
    """The graph level of verify: every step's bytes and logits; and with nothing rounded, without the constants."""
    folder = made[arch]
    prompt, steps = graph_level.step_counts(ModelConfig.load(folder))
    tokens = (np.arange(prompt + steps) * 37 % 300).tolist()
    result = graph_level.check(load_model(resolve(tiny_checkpoint(arch))), folder, tokens)
    assert not result.failures, result.failures
    assert result.quantized is not None and min(result.quantized.written) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "overrides"), [("qwen2", {"num_key_value_heads": 1}), ("gptj", {})])
def test_biases_one_kv_head_and_rope_in_pairs(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str,
    overrides: dict[str, int],
) -> None:  # fmt: skip
    """Calibrated, exported, held against PyTorch: keys of one head with a bias, and RoPE on neighbouring channels."""
    monkeypatch.setattr(key_calibration, "load_tokenizer", lambda _: Letters())
    checkpoint = tiny_checkpoint(arch, **overrides)
    found = key_calibration.calibrate(resolve(checkpoint), TEXT, windows=2, window=160)
    folder = export_model(
        checkpoint, out=tmp_path / "x", recipe=SMALL, calibration=found, progress=lambda *_: None
    )  # fmt: skip
    config = ModelConfig.load(folder)
    assert all(layer.calibrated for layer in config.layers)
    prompt, steps = graph_level.step_counts(config)
    result = graph_level.check(load_model(resolve(checkpoint)), folder, (np.arange(prompt + steps) * 37 % 300).tolist())
    assert not result.failures, result.failures


def test_the_constants_change_what_is_computed_once_there_are_tiles(
    made: dict[str, Path], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    plain = export_model(tiny_checkpoint("llama"), out=tmp_path / "x", recipe=SMALL, progress=lambda *_: None)
    tokens = (np.arange(90) * 37 % 300).tolist()
    logits = []
    for folder in (plain, made["llama"]):
        session = Session(folder)
        cache = session.cache(1, 200)
        first = session.run([tokens[:60]], None, None, cache)
        session.run([tokens[60:80]], None, None, cache)
        logits.append((first, session.run([tokens[80:]], None, None, cache)))
    assert np.array_equal(logits[0][0], logits[1][0])
    assert np.abs(logits[0][1] - logits[1][1]).max() > 1e-3


def test_a_rewound_cache_is_that_of_the_reference(made: dict[str, Path]) -> None:
    """Tokens that leave a tile come back through the constants; without them the rows would be others."""
    session = Session(made["llama"])
    cache = session.cache(1, 200)
    session.run([(np.arange(110) * 37 % 300).tolist()], None, None, cache)
    layout, heads = session.config.layers[1].key, 2
    want = cache.data(1, "key").reshape(heads, -1)
    wrong = want.copy()
    reference.rewind(layout, want, 110, 85, basis=session.bases[1])
    reference.rewind(layout, wrong, 110, 85)
    cache.rewind(85)
    got = cache.data(1, "key").reshape(heads, -1)
    assert np.array_equal(got, want) and not np.array_equal(got, wrong)


def test_verification_without_rounding_drops_the_constants(made: dict[str, Path]) -> None:
    session = graph_variants.unquantized(made["llama"])
    assert not session.bases and not any(layer.calibrated for layer in session.config.layers)


def test_a_twin_that_is_made_in_memory_finds_the_constants(made: dict[str, Path]) -> None:
    """The quality level's: all logits, from a graph in memory that refers to the folder's files."""
    tokens = (np.arange(90) * 37 % 300).tolist()
    rows = []
    for session in (Session(made["llama"]), graph_variants.all_logits(made["llama"])):
        cache = session.cache(1, 200)
        session.run([tokens[:80]], None, None, cache)
        rows.append(session.run([tokens[80:]], None, None, cache)[0, -1])
    assert np.allclose(rows[0], rows[1], atol=1e-5)


def test_the_plan_says_which_layers_are_calibrated(tiny_checkpoint: Callable[..., Path]) -> None:
    source = tiny_checkpoint("gemma3_text")
    table = plan(source, SMALL, calibration=calibration_of(source, (1, 2), 2, 64)).table()
    assert "layer 0: K3V4" in table and "keys per channel, calibrated" in table
    (line,) = (line for line in table.splitlines() if "layer 1:" in line)
    assert "keys per channel, calibrated" in line


@pytest.mark.parametrize(
    ("changes", "layers", "heads", "message"),
    [
        ({"k_granularity": "token"}, (0,), 2, "the recipe has no layer for it"),
        ({"k_bits": 16}, (0,), 2, "the recipe has no layer for it"),
        ({}, (5,), 2, "calibration: layer; got 5"),
        ({}, (0,), 3, "key basis: shape"),
    ],
)
def test_a_calibration_that_does_not_fit_is_refused_before_anything_is_written(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    changes: dict[str, object],
    layers: tuple[int, ...],
    heads: int,
    message: str,
) -> None:
    source = tiny_checkpoint("qwen3")
    calibration = calibration_of(source, layers, heads, 64)
    recipe = SMALL.with_options(**changes)
    with pytest.raises(SkvError, match=message):
        export_model(source, out=tmp_path / "x", recipe=recipe, calibration=calibration, progress=lambda *_: None)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_takes_the_file(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source, file = tiny_checkpoint("qwen3"), tmp_path / "cal.safetensors"
    calibration_of(source, (0, 1), 2, 64).save(file)
    out = tmp_path / "out"
    options = ["--k-bits", "3", "--v-bits", "2", "--calibration", str(file)]
    result = CliRunner().invoke(main, ["model", str(source), *options, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "keys per channel, calibrated" in result.output
    assert CALIBRATION_FILE in json.loads((out / "skv_files.json").read_text())["files"]
    again = CliRunner().invoke(main, ["model", str(source), *options, "--out", str(out), "--force"])
    assert again.exit_code == 0, again.output
    other = CliRunner().invoke(main, ["model", str(tiny_checkpoint("llama")), *options, "--out", str(tmp_path / "y")])
    assert other.exit_code == 1 and "made for another checkpoint" in other.output
    tuned = tiny_checkpoint("qwen3", vocab_size=321)
    for way in (["--out", str(tmp_path / "z")], ["--dry-run"]):
        foreign = CliRunner().invoke(main, ["model", str(tuned), *options, *way])
        assert foreign.exit_code == 1 and "made for another checkpoint" in foreign.output
    assert not (tmp_path / "y").exists() and not (tmp_path / "z").exists()


def test_an_onnx_model_has_none(made: dict[str, Path], tmp_path: Path) -> None:
    file = made["llama"] / CALIBRATION_FILE
    result = CliRunner().invoke(main, ["model", str(made["llama"] / "model.onnx"), "--calibration", str(file)])
    assert result.exit_code == 1 and "--calibration; got an ONNX model" in result.output


@pytest.mark.parametrize("damage", ["missing", "cut", "other layers"])
def test_a_damaged_folder_is_an_error_when_the_constants_are_needed(
    made: dict[str, Path], tmp_path: Path, damage: str
) -> None:
    import shutil

    folder = tmp_path / "folder"
    shutil.copytree(made["llama"], folder)
    file = folder / CALIBRATION_FILE
    session = Session(folder)
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-4])
    else:
        held = Calibration.load(file)
        Calibration({7: held.bases[0]}, held.checkpoint, {}).save(file)
    with pytest.raises(SkvError, match=CALIBRATION_FILE):
        _ = session.bases
    assert INPUTS[0] == "key_basis"


def test_a_configuration_that_calibrates_what_cannot_be_is_damaged(made: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "folder"
    shutil.copytree(made["llama"], folder)
    config = json.loads((folder / "skv_config.json").read_text())
    config["layers"][0]["calibrated"] = "yes"
    (folder / "skv_config.json").write_text(json.dumps(config))
    with pytest.raises(SkvError, match="calibrated is yes"):
        ModelConfig.load(folder)
