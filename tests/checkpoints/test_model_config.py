"""Configurations: spellings that transformers does not know, and checkpoints that are not what they seem."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from skv_export.checkpoints.checkpoint import Checkpoint, Source, resolve
from skv_export.checkpoints.model_config import load_config
from skv_export.checkpoints.pretrained import load_model
from skv_export.errors import SkvError


def configured(checkpoint: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with other values in config.json; None removes one."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    text = json.dumps({key: value for key, value in config.items() if value is not None})
    (folder / "config.json").write_text(text)
    return folder


def rope_of(folder: Path) -> Any:
    """The parameters of RoPE of a checkpoint's model, which has to be one that can be built."""
    config = load_config(Source("safetensors", folder))
    AutoModelForCausalLM.from_config(config)
    return config.rope_parameters


def test_longrope_by_its_old_name(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    lists = {"short_factor": [1.5] * 8, "long_factor": [4.0] * 8}
    rope = rope_of(
        configured(
            tiny_checkpoint("phi3"),
            tmp_path / "su",
            rope_parameters=None,
            rope_scaling={"type": "su", **lists},
            original_max_position_embeddings=128,
        )
    )
    assert rope["rope_type"] == "longrope" and rope["original_max_position_embeddings"] == 128
    assert rope["short_factor"] == lists["short_factor"]


def test_multimodal_rope_of_text_is_plain_rope(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    scaling = {"type": "mrope", "mrope_section": [4, 6, 6]}
    folder = configured(
        tiny_checkpoint("qwen2"), tmp_path / "m", rope_parameters=None, rope_scaling=scaling, rope_theta=3e5
    )
    rope = rope_of(folder)
    assert rope["rope_type"] == "default" and rope["rope_theta"] == 3e5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "llama99"}, "model_type; got 'llama99'"),
        ({"model_type": None}, "model_type; got None"),
        ({"hidden_size": "64"}, "transformers can't read its configuration"),
    ],
)
def test_what_transformers_does_not_take(
    changes: dict[str, Any], said: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = configured(tiny_checkpoint("llama"), tmp_path / "x", **changes)
    with pytest.raises(SkvError, match=said):
        load_config(Source("safetensors", folder))


def test_numbers_that_json_lacks(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    strange = {"limits": [0.0, {"__float__": "Infinity"}], "nested": {"low": {"__float__": "-Infinity"}}}
    config = load_config(Source("safetensors", configured(tiny_checkpoint("llama"), tmp_path / "x", **strange)))
    assert config.limits == [0.0, float("inf")] and config.nested == {"low": float("-inf")}


def test_no_configuration(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "x")
    (folder / "config.json").unlink()
    with pytest.raises(SkvError, match=r"no config\.json"):
        load_config(resolve(folder))


@pytest.mark.parametrize("weights", ["model.safetensors", "adapter_model.safetensors", None])
def test_adapters_without_their_base_are_refused_with_how_to_merge(
    weights: str | None, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "x")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    if weights is None:
        (folder / "model.safetensors").unlink()
    elif weights.startswith("adapter"):
        (folder / "model.safetensors").rename(folder / weights)
    with pytest.raises(SkvError, match=r"an adapter (\(LORA\) )?of org/base.*--adapter .*x"):
        resolve(folder)


def test_names_of_torch_compile(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    plain = tiny_checkpoint("qwen2")
    folder = shutil.copytree(plain, tmp_path / "x")
    tensors = {f"_orig_mod.{name}": tensor for name, tensor in load_file(plain / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    assert set(Checkpoint.open(folder).names()) == set(Checkpoint.open(plain).names())
    expected = load_model(Source("safetensors", plain)).state_dict()
    for name, tensor in load_model(Source("safetensors", folder)).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_files_of_a_model_that_is_cut_into_several(demo_checkpoint: Path, tmp_path: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(demo_checkpoint)
    names = [f"model-{i:05d}-of-00002.gguf" for i in (1, 2)]
    for i, name in enumerate(names):
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        for key, field in reader.fields.items():
            if i == 0 and not key.startswith(("GGUF.", "general.architecture")):
                value, kinds = field.contents(), field.types
                writer.add_key_value(key, value, kinds[0], sub_type=kinds[-1] if len(kinds) > 1 else None)
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[i::2]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    whole = Checkpoint.open(demo_checkpoint)
    for path in (tmp_path / names[0], tmp_path / names[1], tmp_path):
        cut = Checkpoint.open(path)
        assert cut.source.gguf_file == names[0]
        assert set(cut.names()) == set(whole.names()) and cut.config == whole.config
    name = "blk.3.attn_k.weight"
    assert (cut.tensor(name) == whole.tensor(name)).all()
    (tmp_path / names[1]).rename(tmp_path / "elsewhere")
    with pytest.raises(SkvError, match=r"cut into 2 files, and some are missing; got model-00002-of-00002\.gguf"):
        resolve(tmp_path / names[0])


def test_the_suffix_in_capitals(demo_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "MODEL.GGUF").symlink_to(demo_checkpoint)
    assert resolve(tmp_path / "MODEL.GGUF") == resolve(tmp_path)
    assert resolve(tmp_path).gguf_file == "MODEL.GGUF"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu_nope"}, "hidden_act: an activation function that transformers does not have; got 'gelu_"),
        ({"hidden_act": "silo"}, r"silo: did you mean silu\?"),
        (
            {"rope_scaling": {"type": "nope", "factor": 2.0}},
            "rope_type: a kind of RoPE that transformers does not have",
        ),
        ({"rope_parameters": {"rope_type": "yarm", "rope_theta": 1e4, "factor": 2.0}}, r"yarm: did you mean yarn\?"),
        ({"quantization_config": ["gptq"]}, r"quantization_config in config\.json; got \['gptq'\]; expected a table"),
        ({"quantization_config": "gptq"}, r"quantization_config in config\.json; got 'gptq'; expected a table"),
    ],
)
def test_names_that_transformers_does_not_have_are_said(
    changes: dict[str, Any], message: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoint("qwen3"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | changes
    if "rope_scaling" in changes:
        del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SkvError, match=message):
        load_config(resolve(folder))
