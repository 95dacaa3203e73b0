"""Weights: read one at a time, they are what transformers loads as a whole; what does not fit is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY, make_tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

from skv_export.checkpoints.checkpoint import Source, resolve
from skv_export.checkpoints.demo_model import demo_checkpoint
from skv_export.checkpoints.model_config import load_config
from skv_export.checkpoints.pretrained import load_model
from skv_export.errors import SkvError
from skv_export.export import empty_model
from skv_export.export.checkpoint_weights import Weights
from skv_export.export.lazy_weights import LazyWeight, Named

EXPERTS = {
    "mixtral": {"num_local_experts": 12, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
"""Architectures whose checkpoints hold experts one by one: twelve, for the tenth must stand behind the ninth."""


def weights_of(source: Source) -> tuple[Weights, PreTrainedModel]:
    config = load_config(source)
    return Weights(source, empty_model.build(config, torch.float32).model), load_model(source, config)


def assert_same(source: Source) -> None:
    weights, model = weights_of(source)
    for name, expected in model.state_dict().items():
        assert name in weights
        torch.testing.assert_close(weights.tensor(name).float(), expected, rtol=0, atol=0, msg=name)
        weights.release()
        blocks = list(weights.row_blocks(name, 1000))
        assert len(blocks) > 1 or len(expected) == 1 or expected.nbytes <= 2000
        torch.testing.assert_close(torch.cat(blocks).float(), expected, rtol=0, atol=0, msg=name)
        weights.release()


@pytest.mark.parametrize("arch", TINY)
def test_weights_are_those_that_transformers_loads(arch: str, tiny_checkpoint: Callable[..., Path]) -> None:
    assert_same(Source("safetensors", tiny_checkpoint(arch)))


@pytest.mark.parametrize("arch", EXPERTS)
def test_experts_are_stacked_in_their_order(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TINY, arch, EXPERTS[arch])
    checkpoint = make_tiny(tmp_path, arch)
    assert any("experts.11." in name for name in load_file(checkpoint / "model.safetensors"))
    assert_same(Source("safetensors", checkpoint))


def test_a_gguf_file_gives_what_transformers_makes_of_it() -> None:
    source = resolve(demo_checkpoint())
    model = empty_model.build(load_config(source), torch.float32).model
    weights = Weights(source, model)
    theirs = AutoModelForCausalLM.from_pretrained(source.path, gguf_file=source.gguf_file, dtype=torch.float32)
    for name, expected in theirs.state_dict().items():
        torch.testing.assert_close(weights.tensor(name), expected, rtol=0, atol=0, msg=name)
        weights.release()


def test_tied_weights_have_one_name(tiny_checkpoint: Callable[..., Path]) -> None:
    weights, _ = weights_of(Source("safetensors", tiny_checkpoint("llama")))
    assert weights.canonical("lm_head.weight") == weights.canonical("model.embed_tokens.weight")


def test_a_missing_tensor_and_one_of_another_shape_are_named_before_any_is_read(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(tiny_checkpoint("qwen3"), tmp_path / "checkpoint")
    stored = load_file(checkpoint / "model.safetensors")
    model = empty_model.build(load_config(Source("safetensors", checkpoint)), torch.float32).model
    name = "model.layers.1.mlp.up_proj.weight"
    for broken in ({}, {name: stored[name][:-1].clone()}):
        save_file({n: t for n, t in stored.items() if n != name} | broken, checkpoint / "model.safetensors")
        with pytest.raises(SkvError, match=r"missing or have another shape.*layers\.1\.mlp\.up_proj"):
            Weights(Source("safetensors", checkpoint), model)


@pytest.mark.parametrize("transposed", [False, True])
def test_slabs_are_the_whole(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx_ir as ir

    from skv_export.export import lazy_weights

    monkeypatch.setattr(lazy_weights, "SLAB_BYTES", 100)
    tensor = torch.arange(77, dtype=torch.bfloat16).reshape(7, 11)

    class Reader:
        def row_blocks(self, name: str, nbytes: int) -> Iterator[torch.Tensor]:
            yield from {"it": tensor}[name].split(nbytes // 22)

        def release(self) -> None:
            """Nothing is kept."""

    form = Named("it", ir.DataType.FLOAT16, transposed)
    expected = tensor.T if transposed else tensor
    made = LazyWeight(form, Reader(), ir.DataType.FLOAT16, ir.Shape(expected.shape), "it")
    assert len(list(made.slabs())) > 1
    assert (made.numpy() == expected.to(torch.float16).numpy()).all()
    wrong = LazyWeight(form, Reader(), ir.DataType.FLOAT16, ir.Shape([7, 12]), "it")
    with pytest.raises(SkvError, match=r"weight it.*154 bytes.*168"):
        wrong.numpy()
