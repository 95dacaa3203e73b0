"""Folders that a session opens: damaged ones, links, and nonsense in skv_config.json."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_graph import Tiny

from skv_export.errors import SkvError
from skv_export.model_folder.skv_config import ModelConfig, layout_entry
from skv_export.runtime.session import Session

pytestmark = pytest.mark.usefixtures("library")

TOKENS = [5, 6, 7]


def _damage(folder: Path, change: str) -> None:
    path = folder / "skv_config.json"
    values = json.loads(path.read_text())
    match change:
        case "missing":
            path.unlink()
        case "not json":
            path.write_text("{")
        case "not an object":
            path.write_text("[1]")
        case "version":
            path.write_text(json.dumps(values | {"format_version": 9}))
        case "no layers":
            del values["layers"]
            path.write_text(json.dumps(values))
        case "a layer less":
            path.write_text(json.dumps(values | {"layers": values["layers"][:1]}))
        case "other bits":
            key = dataclasses.replace(ModelConfig.load(folder).layers[1].key, bits=8)
            values["layers"][1]["key"] = layout_entry(key)
            path.write_text(json.dumps(values))
        case "other shape":
            values["layers"][0]["value"]["shape"]["tile_bytes"] += 16
            path.write_text(json.dumps(values))
        case "unknown layout field":
            values["layers"][0]["key"]["nbits"] = 4
            path.write_text(json.dumps(values))
        case "no model":
            (folder / "model.onnx").unlink()
        case "truncated model":
            model = folder / "model.onnx"
            model.write_bytes(model.read_bytes()[:500])
        case "no data":
            (folder / "model.onnx.data").unlink()
        case _:
            raise AssertionError(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "skv_config.json: no such file"),
        ("not json", "skv_config.json: not valid JSON"),
        ("not an object", "skv_config.json: no JSON object"),
        ("version", "format_version; got 9; expected 1"),
        ("no layers", "skv_config.json: damaged; got no key 'layers'"),
        ("a layer less", "1 layers listed, num_hidden_layers is 2"),
        ("other bits", "do not belong together: layer 1, key"),
        ("other shape", "damaged; got value: shape is"),
        ("unknown layout field", "nbits"),
        ("no model", "model.onnx: no such file"),
        ("truncated model", "model.onnx: ONNX Runtime can't load it"),
        ("no data", "model.onnx: ONNX Runtime can't load it"),
    ],
)
def test_a_damaged_folder_is_a_clear_error(tmp_path: Path, change: str, message: str) -> None:
    _damage(Tiny().write(tmp_path), change)
    with pytest.raises(SkvError) as error:
        Session(tmp_path)
    assert message in str(error.value)
    assert error.value.fix


@pytest.mark.parametrize("place", ["by hand", "a hub's cache"])
def test_weights_behind_a_link_are_named_with_what_to_do(tmp_path: Path, place: str) -> None:
    """ONNX Runtime reads none from outside the folder; the model need not be exported again."""
    source, folder = Tiny().write(tmp_path / "blobs"), tmp_path / "snapshots" / "0123"
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if place == "by hand" and file.name != "model.onnx.data":
            shutil.copy(file, folder)
        else:
            (folder / file.name).symlink_to(f"../../blobs/{file.name}")
    message = rf"snapshots/0123/model\.onnx\.data: a link that leads out .*; got {source}/model\.onnx\.data; .*cp -rL"
    with pytest.raises(SkvError, match=message):
        Session(folder)
    shutil.copytree(folder, tmp_path / "copy")  # it follows links, as cp -rL does
    assert Session(tmp_path / "copy").generate([TOKENS], max_new_tokens=1)
    (source / "model.onnx.data").rename(tmp_path / "moved")
    with pytest.raises(SkvError, match=r"model\.onnx\.data, which does not exist"):
        Session(folder)


def test_links_that_stay_inside_the_folder_load(tmp_path: Path) -> None:
    folder = Tiny().write(tmp_path / "model")
    (folder / "model.onnx.data").rename(folder / "weights")
    (folder / "model.onnx.data").symlink_to("weights")
    (tmp_path / "link").symlink_to(folder)
    assert Session(tmp_path / "link").generate([TOKENS], max_new_tokens=1)


def test_config_is_read_back(tmp_path: Path) -> None:
    config = ModelConfig.load(Tiny(windows=(40, 0)).write(tmp_path, eos_token_id=7, pad_token_id=None))
    assert config.eos_token_id == (7,) and config.pad_token_id is None and not config.all_logits
    assert [layer.local_window_size for layer in config.layers] == [40, 0]
    assert (config.layers[0].key, config.layers[0].value) == Tiny(windows=(40, 0)).layouts(0)


NONSENSE = {
    ("layers", 0, "key", "tile_tokens"): [0, -64, 1.5, "64", None, 48],
    ("layers", 1, "value", "granularity"): ["nonsense", None, 3, ["token"]],
    ("layers", 0, "value", "rotation"): ["nonsense", {}],
    ("layers", 0, "key", "bits"): [0, 7, 4.0, True],
    ("layers", 0, "key", "head_dim"): [0, 1 << 40, "32"],
    ("layers", 0, "key", "group_size"): [0, 31, 1 << 30],
    ("layers", 0, "key", "is_value"): [True, 0, None],
    ("layers", 0, "key", "recent_type"): ["float8"],
    ("layers", 0, "key", "local_window_size"): [-1, 7],
    ("layers", 0, "key"): [None, [], {}],
    ("layers", 0, "num_attention_heads"): [0, -1, 3, "4"],
    ("layers", 0, "num_key_value_heads"): [0],
    ("layers",): [None, {}, [None], "x"],
    ("vocab_size",): [0, 10**12, "96", None],
    ("context_length",): [0, 10**18],
    ("eos_token_id",): ["x", [None, "x"], {}],
    ("bos_token_id",): ["1", 10**30],
    ("model_type",): [None, 3],
    ("source",): [None, 3],
}


@pytest.mark.parametrize("keys", NONSENSE, ids=lambda keys: ".".join(map(str, keys)))
def test_nonsense_in_skv_config_is_a_clear_error(tmp_path: Path, keys: tuple[Any, ...]) -> None:
    folder = Tiny().write(tmp_path)
    good = (folder / "skv_config.json").read_text()
    for value in NONSENSE[keys]:
        values = json.loads(good)
        place = values
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        (folder / "skv_config.json").write_text(json.dumps(values))
        with pytest.raises(SkvError, match=r"skv_config.json: damaged; got .*Export the model again"):
            ModelConfig.load(folder)
