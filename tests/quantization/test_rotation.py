"""The residual stream in another basis: the same model, in plain transformers too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from log_probabilities import divergence, logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from skv_export.checkpoints.checkpoint import resolve
from skv_export.cli.main import main
from skv_export.errors import SkvError
from skv_export.evaluation.text import CALIBRATION_TEXT, read_text
from skv_export.quantization.layer_by_layer import LayerByLayer
from skv_export.quantization.pipeline import Options, quantize
from skv_export.quantization.rotation import Basis, rotate
from skv_export.quantization.solver import Form

TEXT = read_text(None, CALIBRATION_TEXT)[2000:6000]
IDS = torch.arange(3, 67)


def uneven(folder: Path, out: Path) -> Path:
    """A copy whose norms differ by channel, and whose residual stream has a small channel that is read strongly."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith("norm.weight") and tensor.shape == (64,):
            tensors[name] = tensor * torch.randn(64, generator=generator).mul(0.3).exp()
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[5] /= 20
        elif name.endswith("embed_tokens.weight"):
            tensor[:, 5] /= 20
        elif name.endswith("proj.weight"):
            tensor[:, 5] *= 20
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("size", [1, 6, 64, 576, 35])
def test_a_basis_is_orthogonal_and_mixes_all_channels(size: int) -> None:
    q = Basis(size).turn(torch.eye(size)).double()
    torch.testing.assert_close(q @ q.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-6)
    rows = torch.randn(3, 2, size)
    torch.testing.assert_close(Basis(size).turn(rows).double(), rows.double() @ q, rtol=1e-5, atol=1e-5)
    power = size & -size  # a Hadamard matrix has entries of one size
    norms = q.reshape(size, -1, power).square().sum(1)
    torch.testing.assert_close(norms, torch.full_like(norms, 1 / power), rtol=1e-5, atol=1e-7)


# Tied, untied; biases; QK norm; fused projections; multipliers of embedding, residual stream and logits.
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "smollm3"])
def test_a_rotated_checkpoint_computes_the_same(arch: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = uneven(checkpoint(arch), tmp_path / "model")
    options = Options("rtn", Form(8, 16), windows=2, window=128, rotate=True)
    quantize(resolve(folder), TEXT, tmp_path / "out", options)
    # What 8 bits do; a norm or an embedding that is left out does more than 1.
    assert divergence(logits(folder, IDS[None]), logits(tmp_path / "out", IDS[None])) < 0.05
    tensors: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        tensors |= load_file(file)
    norms = [name for name in tensors if name.endswith(("layernorm.weight", "model.norm.weight"))]
    assert norms and all(torch.equal(tensors[name], torch.ones(64)) for name in norms)
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_plain_transformers_reads_it(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    options = Options("qep", Form(4, 16), windows=2, window=128, rotate=True, head_bits=16)
    quantize(resolve(checkpoint("llama")), TEXT, tmp_path / "out", options)
    unpacked = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, quantization_config=unpacked)
    with torch.no_grad():
        found = theirs(IDS[None]).logits.log_softmax(-1)
    torch.testing.assert_close(found, logits(tmp_path / "out", IDS[None]), rtol=1e-3, atol=1e-3)


def test_a_channel_that_is_read_strongly_costs_less_in_another_basis(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = uneven(checkpoint("mistral"), tmp_path / "model")
    losses = {}
    for rotated in (False, True):
        out = tmp_path / f"rotated-{rotated}"
        quantize(resolve(folder), TEXT, out, Options("rtn", Form(4, 64), windows=2, window=128, rotate=rotated))
        losses[rotated] = divergence(logits(folder, IDS[None]), logits(out, IDS[None]))
    assert losses[True] < 0.8 * losses[False], losses


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("gemma2", "a norm whose output no linear layer reads, .*post_attention_layernorm"),
        ("olmo2", "a norm whose output no linear layer reads"),
        ("gpt_neox", "a norm that subtracts means"),
        ("gpt_oss", "logits that differ"),
    ],
)
def test_what_cannot_be_rotated_is_refused_by_name(
    arch: str, reason: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(SkvError, match=rf"{arch}: can't be rotated.*({reason}).*without --rotate"):
        rotate(LayerByLayer(resolve(checkpoint(arch))), IDS)
    (tmp_path / "text.txt").write_text(TEXT)
    command = ["quantize", str(checkpoint(arch)), "--rotate", "--text", str(tmp_path / "text.txt")]
    size = ["--group-size", "16", "--window", "128", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, [*command, *size])
    assert result.exit_code == 1 and "can't be rotated" in result.output and not (tmp_path / "out").exists()


def test_weights_that_are_not_numbers_are_an_error(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = uneven(checkpoint("mistral"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SkvError, match="mistral: its logits are not finite"):
        rotate(LayerByLayer(resolve(folder)), IDS)
