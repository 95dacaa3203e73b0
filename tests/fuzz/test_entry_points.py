"""Damaged and hostile files through the real entry points: an answer or a SkvError, in bounded time, never a crash.

Seeds are fixed; SKV_FUZZ_SECONDS (for each kind of file) and SKV_FUZZ_SEED make a longer or another run. What a run
finds is mended and kept as a case beside the code that was at fault.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from source_graphs import CONTEXT, DIM, HEADS, VOCAB, SourceGraph
from tiny_graph import Tiny
from tiny_models import make_tiny, write_tokenizer

from skv_export.analysis.pipeline import analyze
from skv_export.calibration.file import Calibration
from skv_export.checkpoints.checkpoint import Checkpoint, resolve
from skv_export.checkpoints.model_config import load_config
from skv_export.checkpoints.pretrained import load_model
from skv_export.cli.doctor import diagnose
from skv_export.errors import SkvError
from skv_export.export import pipeline
from skv_export.model_folder.tokenizer import write_tokenizer as write_folders_tokenizer
from skv_export.model_folder.writer import generation_config
from skv_export.rewrite import pipeline as rewrite
from skv_export.runtime.session import Session
from skv_export.spec.conformance import make_basis
from skv_export.spec.recipe import Recipe

SECONDS = float(os.environ.get("SKV_FUZZ_SECONDS", "4"))
SEED = int(os.environ.get("SKV_FUZZ_SEED", "0"))
CASES = 400
LIMIT_S = 20
"""For one case, on a machine that does other things too."""
NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 33, 7, 10**6, 10**12, 10**30, -(2**63), 0.5, -1.5, 1e300, float("nan"),
    float("inf"), "", "64", "nonsense", "\0", "x" * 300, [], [0], [None], ["x"] * 5, {}, {"x": 1}, [[[]]],
]  # fmt: skip


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"more than {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fuzz(damage: Callable[[random.Random], str], *entries: Callable[[], object]) -> None:
    """Damages a file by each seed and runs the entry points on it; at least a few cases, then until the time is up."""
    end = time.monotonic() + SECONDS
    for seed in range(SEED, SEED + CASES):
        if seed - SEED >= 5 and time.monotonic() > end:
            break
        case = damage(random.Random(seed))
        for entry in entries:
            try:
                with time_limit(), contextlib.suppress(SkvError):
                    entry()
            except Exception as error:
                raise AssertionError(f"seed {seed}: {case}") from error


def places(values: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    found = []
    for key in list(values) if isinstance(values, dict) else range(len(values)):
        found.append((values, key))
        if isinstance(values[key], dict | list):
            found += places(values[key])
    return found


def damaged_json(good: dict[str, Any], rng: random.Random) -> tuple[Any, str]:
    """One to three values replaced, removed or added."""
    values, told = copy.deepcopy(good), []
    for _ in range(rng.choice([1, 1, 2, 3])):
        container, key = rng.choice(places(values))
        if rng.random() < 0.2:
            del container[key]
            told.append(f"{key} removed")
            if not values:
                break
        else:
            value = container[key]
            near = [0, -1, 1, value - 1, value + 1, 2 * value] if type(value) in (int, float) else []
            container[key] = copy.deepcopy(rng.choice(near if near and rng.random() < 0.5 else NASTY))
            told.append(f"{key} = {str(container[key])[:40]}")
    return values, ", ".join(told)


def damage_json(path: Path) -> Callable[[random.Random], str]:
    good = json.loads(path.read_text())

    def damage(rng: random.Random) -> str:
        if rng.random() < 0.05:
            text = json.dumps(good)
            path.write_text(text[: rng.randrange(len(text))])
            return "cut short"
        values, told = damaged_json(good, rng)
        path.write_text(json.dumps(values))
        return told

    return damage


def damage_bytes(path: Path, header: int | None = None) -> Callable[[random.Random], str]:
    """Replaces some bytes of a file, most of them in its first ``header`` ones, or cuts it."""
    good = path.read_bytes()
    first = min(header or len(good), len(good))

    def damage(rng: random.Random) -> str:
        data, told = bytearray(good), []
        for _ in range(rng.choice([1, 1, 2, 4])):
            start = rng.randrange(first if rng.random() < 0.9 else len(good))
            new = rng.choice([b"\xff", b"\0", b"9", b"-", b"\xff" * 8, b"\0" * 4, b'"', b"}", rng.randbytes(4)])
            data[start : start + len(new)] = new
            told.append(f"{new!r} at {start}")
        if rng.random() < 0.1:
            del data[rng.randrange(len(data)) :]
            told.append(f"cut to {len(data)}")
        path.write_bytes(data)
        return ", ".join(told)

    return damage


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "gpt_oss", "falcon"])
def test_a_config_json_that_the_plan_lets_through_is_one_that_transformers_runs(arch: str, tmp_path: Path) -> None:
    folder, ids = make_tiny(tmp_path / "model", arch), torch.arange(3, 43)[None]

    def plan_and_run() -> None:
        pipeline.plan(folder)
        try:
            with torch.no_grad():
                load_model(resolve(folder))(ids, use_cache=False)
        except SkvError as error:
            raise AssertionError(f"the plan was made, but {error}") from error

    plan_and_run()
    fuzz(damage_json(folder / "config.json"), plan_and_run)


def test_skv_config_json(tmp_path: Path) -> None:
    folder = Tiny().write(tmp_path)
    fuzz(damage_json(folder / "skv_config.json"), lambda: Session(folder), lambda: diagnose(folder))


def test_genai_config_json(tmp_path: Path) -> None:
    source = SourceGraph().write(tmp_path)
    given = {
        "model": {
            "type": "llama", "vocab_size": VOCAB, "context_length": CONTEXT, "bos_token_id": 1, "eos_token_id": [2],
            "pad_token_id": 0, "decoder": {"head_size": DIM, "hidden_size": HEADS * DIM, "session_options": {}},
        },
        "search": {"max_length": CONTEXT},
    }  # fmt: skip
    path = tmp_path / "genai_config.json"
    path.write_text(json.dumps(given))
    rewrite.plan(source)
    count = iter(range(10**6))

    def export() -> None:
        rewrite.rewrite_model(source, out=tmp_path / f"out{next(count)}")

    fuzz(damage_json(path), export)


def test_recipes(tmp_path: Path) -> None:
    good = (
        'dtype = "fp16"\nk_bits = 4\nv_bits = 2\nk_granularity = "channel"\nrecent_tokens = 64\ntile_tokens = 64\n'
        "[[layers]]\nindex = [0, 1]\nk_bits = 8\n"
    )
    path = tmp_path / "recipe.toml"
    pieces = ["nan", "-1", "1e400", '"x"', "[]", "{}", "2020-01-01", "\0", "[[", "]]", "layers", "=", "\n", "9" * 4000]

    def damage(rng: random.Random) -> str:
        text = good
        for _ in range(rng.choice([1, 2, 3])):
            start = rng.randrange(len(text))
            text = text[:start] + rng.choice(pieces) + text[start + rng.randrange(8) :]
        path.write_text(text)
        return repr(text)

    fuzz(damage, lambda: Recipe.load(path).layers(2))


def write_gguf(path: Path) -> Path:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    for name, value in (
        ("block_count", 2), ("embedding_length", 64), ("context_length", 512), ("feed_forward_length", 96),
        ("attention.head_count", 4), ("attention.head_count_kv", 2), ("vocab_size", 64),
    ):  # fmt: skip
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    rng = np.random.default_rng(5)
    shapes = {"token_embd.weight": (64, 64), "output_norm.weight": (64,)}
    for i in range(2):
        shapes |= {
            f"blk.{i}.{name}.weight": shape
            for name, shape in {
                "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64), "attn_norm": (64,),
                "ffn_norm": (64,), "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96),
            }.items()
        }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_headers(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    pipeline.plan(path)
    header = path.read_bytes().index(b"blk.1.ffn_down") + 64
    fuzz(damage_bytes(path, header), lambda: pipeline.plan(path))


def test_safetensors_headers(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "model", "llama")
    path = folder / "model.safetensors"
    header = int.from_bytes(path.read_bytes()[:8], "little")
    fuzz(damage_bytes(path, header + 8), lambda: pipeline.plan(folder), lambda: analyze(folder))


def write_adapter(folder: Path) -> Path:
    """A LoRA adapter of two projections, as peft writes it."""
    folder.mkdir()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "r": 4, "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj"], "bias": "none", "use_rslora": False, "use_dora": False,
        "fan_in_fan_out": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
        "layers_to_transform": None, "inference_mode": True, "lora_dropout": 0.0,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for layer in range(2):
        for name, rows in (("q_proj", 4 * 80), ("v_proj", 2 * 80)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = np.ones((4, 64), np.float32)
            tensors[f"{prefix}.lora_B.weight"] = np.ones((rows, 4), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapters(name: str, tmp_path: Path) -> None:
    folder, adapter = make_tiny(tmp_path / "base", "llama"), write_adapter(tmp_path / "adapter")

    def merge() -> None:
        checkpoint = Checkpoint.open(folder, adapter=adapter)
        for layer in range(2):
            checkpoint.tensor(f"model.layers.{layer}.self_attn.q_proj.weight")

    merge()
    path = adapter / name
    damage = damage_json(path) if path.suffix == ".json" else damage_bytes(path, 1200)
    fuzz(damage, merge, lambda: pipeline.plan(folder, adapter=adapter))


def test_calibration_files(tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"
    Calibration({0: make_basis(2, 32, 32), 1: make_basis(2, 32, 32)}, "f" * 64, {"tokens": "9"}).save(path)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    fuzz(damage_bytes(path, header + 8), lambda: Calibration.load(path))


def test_saved_caches(tmp_path: Path) -> None:
    session, path = Session(Tiny().write(tmp_path)), tmp_path / "cache"
    cache = session.cache(2, 200)
    session.run(np.arange(3, 93)[None].repeat(2, 0), None, None, cache)
    cache.save(path)
    header = int.from_bytes(path.read_bytes()[:8], "little")

    def load_and_go_on() -> None:
        loaded = session.load_cache(path)
        session.run([[5], [6]], None, None, loaded)
        loaded.rewind(loaded.lengths - 1)

    load_and_go_on()
    fuzz(damage_bytes(path, header + 8), load_and_go_on)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_files_beside_the_weights(name: str, tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "model", "llama")
    write_tokenizer(folder, 200)
    source, count = resolve(folder), iter(range(10**6))

    def take() -> None:
        out = tmp_path / f"out{next(count)}"
        out.mkdir()
        write_folders_tokenizer(source, out)
        generation_config(source, load_config(source))

    take()
    fuzz(damage_json(folder / name), take)


def test_the_tokenizer_of_an_exported_folder(tmp_path: Path) -> None:
    folder = Tiny().write(tmp_path)
    write_tokenizer(folder, 96)

    def use() -> None:
        tokenizer = Session(folder).tokenizer
        tokenizer.decode(tokenizer.encode("Anne").ids)

    use()
    fuzz(damage_json(folder / "tokenizer.json"), use)
