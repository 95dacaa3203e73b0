"""Checkpoints quantized by other tools, exported as they are: the plain weights that they stand for, bit by bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from packed_files import Writer, awq, exact, fp8, gptq, hqq, mxfp4, olive, pack_folder, pack_quantized
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from skv_export.checkpoints.checkpoint import Checkpoint, Source
from skv_export.checkpoints.pretrained import load_model
from skv_export.errors import SkvError
from skv_export.export import pipeline
from skv_export.export.supported import prepare_model
from skv_export.spec.recipe import Recipe
from skv_export.verification import graph_variants

EXACT = Recipe().with_options(k_bits=16, v_bits=16, recent_type="float")
IDS = torch.randint(3, 320, (1, 20), generator=torch.Generator().manual_seed(1))


def compressed(bits: int, form: str = "pack-quantized", kind: str = "int", **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": "group", "group_size": 32, **more}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


def of_gptq(**more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, **more}


def of_hqq(bits: int = 4, group: int = 32, axis: int = 1) -> dict[str, Any]:
    inner = {"nbits": bits, "group_size": group, "axis": axis, "optimize": True, "view_as_float": False}
    return {"quant_method": "hqq", "quant_config": {"weight_quant_params": inner}, "skip_modules": ["lm_head"]}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FORMATS: dict[str, tuple[Writer, Mapping[str, Any]]] = {
    "gptq": (gptq(), of_gptq()),
    "gptq, asymmetric": (gptq(symmetric=False), of_gptq(sym=False)),
    "gptq, act-order": (gptq(symmetric=False, reordered=True), of_gptq(sym=False, desc_act=True)),
    "gptq, version 2": (gptq(symmetric=False, v1=False), of_gptq(sym=False, checkpoint_format="gptq_v2")),
    "gptq, one group": (gptq(group=-1), of_gptq(group_size=-1)),
    "gptq, 8 bits": (gptq(8, symmetric=False, reordered=True), of_gptq(bits=8, sym=False, desc_act=True)),
    "gptq, 2 bits": (gptq(2, 16, symmetric=False), of_gptq(bits=2, group_size=16, sym=False)),
    "awq": (awq(), AWQ),
    "awq, groups of 16": (awq(16), AWQ | {"group_size": 16}),
    "W4A16": (pack_quantized(), compressed(4)),
    "W4A16, asymmetric, act-order": (
        pack_quantized(symmetric=False, reordered=True), compressed(4, symmetric=False, actorder="group")
    ),
    "W8A16, channels": (pack_quantized(8, -1), compressed(8, strategy="channel", group_size=None)),
    "FP8, rows": (fp8(), compressed(8, "float-quantized", "float", strategy="channel", group_size=None)),
    "MXFP4": (mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}),
    "olive": (olive(), {"quant_method": "olive", "bits": 4, "symmetric": True, "group_size": 32}),
    "olive, asymmetric": (
        olive(symmetric=False), {"quant_method": "olive", "bits": 4, "symmetric": False, "group_size": 32}
    ),
    "olive, 8 bits, channels": (
        olive(8, -1, symmetric=False), {"quant_method": "olive", "bits": 8, "symmetric": False, "group_size": -1}
    ),
    "hqq": (hqq(), of_hqq()),
    "hqq, 2 bits, as floats": (hqq(2, 16, as_floats=True), of_hqq(2, 16)),
    "hqq, 8 bits": (hqq(8), of_hqq(8)),
    "hqq, groups of outputs": (hqq(4, 32, 0), of_hqq(axis=0)),
    "FP8, blocks": (fp8((16, 32), "weight_scale_inv"), {"quant_method": "fp8", "weight_block_size": [16, 32]}),
}  # fmt: skip


@pytest.fixture
def packed(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of a tiny model in one of ``FORMATS``."""

    def make(name: str, arch: str = "llama") -> Path:
        return pack_folder(tiny_checkpoint(arch), tmp_path / "packed", *FORMATS[name])

    return make


@pytest.mark.parametrize("name", FORMATS)
def test_a_packed_matrix_is_what_it_was_made_from(name: str, packed: Callable[..., Path]) -> None:
    folder = packed(name, "gpt_oss" if name == "MXFP4" else "llama")
    checkpoint, plain = Checkpoint.open(folder), load_file(exact(folder) / "model.safetensors")
    assert sorted(checkpoint.names()) == sorted(plain)
    for tensor, expected in plain.items():
        assert checkpoint.shape(tensor) == tuple(expected.shape)
        found = checkpoint.tensor(tensor).astype(np.float32)
        np.testing.assert_allclose(found, expected.float().numpy(), atol=1e-6, rtol=0)


@torch.no_grad()
def logits(folder: Path) -> np.ndarray:
    model = load_model(Source("safetensors", folder))
    prepare_model(model)
    return model(IDS).logits[0, -1].numpy()


@pytest.mark.parametrize(
    ("name", "arch", "products"),
    [
        ("gptq", "llama", 14),
        ("gptq, act-order", "qwen2", 14),
        ("gptq, 8 bits", "llama", 28),
        ("awq", "phi3", 8),
        ("W4A16, asymmetric, act-order", "qwen3", 14),
        ("W8A16, channels", "llama", 28),
        ("hqq", "llama", 14),
        ("gptq, act-order", "gpt2", 8),
        ("FP8, blocks", "llama", 0),
        ("MXFP4", "gpt_oss", 0),
    ],
)
def test_an_export_computes_with_the_weights_that_they_stand_for(
    name: str, arch: str, products: int, packed: Callable[..., Path], tmp_path: Path, library: Path
) -> None:
    folder = packed(name, arch)
    expected = logits(exact(folder))
    np.testing.assert_allclose(logits(folder), expected, atol=1e-4, rtol=0)
    out = pipeline.export_model(folder, out=tmp_path / "out", recipe=EXACT, progress=lambda phase, fraction: None)
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    assert sum(node.op_type == "MatMulNBits" for node in graph.node) == products
    session = graph_variants.exact_products(out)
    got = session.run(IDS.numpy(), None, None, session.cache(1, IDS.shape[1]))[0, 0]
    np.testing.assert_allclose(got, expected, atol=1e-3, rtol=0)
    # The plan counts every part of every weight, also those that are too small for the data file.
    itemsize = {kind: np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)).itemsize for kind in (1, 2, 7)}
    ours = ("model.layers.", "model.embed_", "model.norm.", "lm_", "transformer.")
    weights = [t for t in graph.initializer if t.name.startswith(ours)]
    stored = sum(math.prod(tensor.dims) * itemsize[tensor.data_type] for tensor in weights)
    assert pipeline.plan(folder, EXACT).weight_bytes == stored


DOWN = r"mlp\.down_proj"


@pytest.mark.parametrize("target", ["re:.*mlp\\.down_proj$", "names"])
def test_matrices_of_several_widths(
    target: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path, library: Path
) -> None:
    """compressed-tensors with groups of modules, as targets of two kinds name them."""
    config = compressed(4, symmetric=False)
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(2)] if target == "names" else [target]
    wide = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    config["config_groups"]["group_1"] = {"targets": names, "weights": wide}
    write = pack_quantized(symmetric=False)
    folder = pack_folder(tiny_checkpoint("llama"), tmp_path / "packed", write, config, {DOWN: pack_quantized(8)})
    expected = logits(exact(folder))
    np.testing.assert_allclose(logits(folder), expected, atol=1e-4, rtol=0)
    if target == "names":
        return
    out = pipeline.export_model(folder, out=tmp_path / "out", recipe=EXACT, progress=lambda phase, fraction: None)
    session = graph_variants.exact_products(out)
    got = session.run(IDS.numpy(), None, None, session.cache(1, IDS.shape[1]))[0, 0]
    np.testing.assert_allclose(got, expected, atol=1e-3, rtol=0)


def test_experts_one_by_one_are_stacked(tmp_path: Path) -> None:
    """The router's eight rows, the attention and each expert are matrices of their own in the file."""
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 320, "head_dim": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", **sizes, **heads, **experts, mlp_only_layers=[])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "plain")
    folder = pack_folder(tmp_path / "plain", tmp_path / "packed", gptq(), of_gptq())
    np.testing.assert_allclose(logits(folder), logits(exact(folder)), atol=1e-4, rtol=0)
    held = pipeline.plan(folder, EXACT).held
    assert held and not any(".experts." in name for name in held)  # gathered, so dequantized


@pytest.mark.parametrize("pattern", ["re:(a+)+$", "re:[", "re:" + "a*" * 20])
def test_patterns_that_could_run_for_ever_are_refused(
    pattern: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    config = compressed(4)
    config["config_groups"]["group_1"] = {"targets": [pattern], "weights": {"num_bits": 8, "type": "int"}}
    folder = pack_folder(tiny_checkpoint("llama"), tmp_path / "packed", pack_quantized(), config)
    with pytest.raises(SkvError, match="without repeated groups"):
        pipeline.plan(folder)


def test_olives_modules_of_other_widths(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    own = {f"model.layers.{i}.mlp.down_proj": {"bits": 8, "symmetric": False} for i in range(2)}
    config = {"quant_method": "olive", "bits": 4, "symmetric": True, "group_size": 32, "overrides": own}
    others = {DOWN: olive(8, symmetric=False)}
    folder = pack_folder(tiny_checkpoint("llama"), tmp_path / "packed", olive(), config, others)
    np.testing.assert_allclose(logits(folder), logits(exact(folder)), atol=1e-4, rtol=0)


def changed(folder: Path, part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """Changes one tensor of a folder."""
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.1.mlp.up_proj.{part}"
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Sets a tensor's first number."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


DAMAGE: dict[str, tuple[str, str, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "a group that does not exist": ("gptq, act-order", "g_idx", first(9), "g_idx names groups that do not exist"),
    "a negative group": ("gptq, act-order", "g_idx", first(-1), "g_idx names groups that do not exist"),
    "groups of other sizes": ("gptq, act-order", "g_idx", lambda t: t * 0, "g_idx makes groups of other sizes"),
    "an order that is not announced": ("gptq", "g_idx", lambda t: t.flip(0), "g_idx reorders inputs.*desc_act true"),
    "a scale that is no number": ("gptq", "scales", first(float("nan")), "infinite or not a number"),
    "an infinite scale": ("W4A16", "weight_scale", first(float("inf")), "infinite or not a number"),
    "zero points of a symmetric format": ("gptq", "qzeros", first(0), "zero points of a symmetric format"),
    "scales of too few outputs": ("awq", "scales", lambda t: t[:, :-8], "its scales"),
    "zero points of too few groups": ("gptq", "qzeros", lambda t: t[:-1], "its qzeros"),
    "another shape": ("W4A16", "weight_shape", first(7), "its weight_shape"),
    "groups across outputs": ("hqq", "group_size", first(48), "groups across outputs"),
    "a shape of another matrix": ("hqq", "shape", first(7), "its shape"),
    "a zero point that is no number": ("hqq", "zero", first(float("nan")), "infinite or not a number"),
    "too few codes": ("gptq", "qweight", lambda t: t[:-4], "up_proj"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_parts_are_named_and_leave_nothing_behind(
    case: str, packed: Callable[..., Path], tmp_path: Path, library: Path
) -> None:
    name, part, change, message = DAMAGE[case]
    folder = changed(packed(name), part, change)
    with pytest.raises(SkvError, match=rf"(?s)up_proj.*{message}|{message}"):
        pipeline.export_model(folder, out=tmp_path / "out", recipe=EXACT, progress=lambda phase, fraction: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "packed.plain"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (of_gptq(bits=3), "GPTQ with 3 bits"),
        (of_gptq(checkpoint_format="marlin"), "marlin"),
        (AWQ | {"version": "gemv"}, "gemv"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "entries of a table"),
        ({"quant_method": "quark"}, "quark"),
        (of_hqq(3), "HQQ with .*3.* bits"),
        ({"quant_method": "hqq"}, "HQQ with no bits"),
        ({"quant_method": "olive", "bits": 3, "group_size": 32}, "Olive with 3 bits"),
        (compressed(4, "nvfp4-pack-quantized", "float"), "nvfp4"),
        (AWQ, r"none is|it had"),
    ],
)
def test_formats_that_cannot_be_read_are_refused_by_name(
    config: dict[str, Any], message: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    plain = tiny_checkpoint("llama")
    (folder / "model.safetensors").write_bytes((plain / "model.safetensors").read_bytes())
    values = json.loads((plain / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(SkvError, match=message):
        pipeline.plan(folder)
