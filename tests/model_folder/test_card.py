"""The folder's README.md: what it says of the model, whose licence it names, and that its examples run."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_graph import Tiny

from skv_export.export.pipeline import export_model
from skv_export.model_folder.card import licence_of, model_card
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.spec.recipe import Recipe

pytestmark = pytest.mark.usefixtures("library")


def test_every_export_has_one(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    recipe = dataclasses.replace(Recipe.load(Path(__file__).parents[2] / "recipes" / "small.toml"))
    out = export_model(tiny_checkpoint("qwen3"), out=tmp_path / "out", recipe=recipe, progress=lambda *_: None)
    card = (out / "README.md").read_text()
    for said in ("K3V2", "tokens |", "| weights | fp32 |", "2 of qwen3, 512 tokens", "not stated", recipe.description):
        assert said in card, said
    assert '"README.md"' in (out / "skv_files.json").read_text()


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# Hi\n", "apache-2.0"),
        ('---\ntags: [x]\nlicense: "llama3.1"\n---\n', "llama3.1"),
        ("# Hi\nlicense: mit\n", ""),
        ("---\nlicense: [a](javascript:x)\n---\n", ""),
        ("---\nlicense:\n  - a\n---\n", ""),
        ("---\nlicense: mit", ""),
    ],
)
def test_the_licence_is_the_one_that_the_source_states(text: str, licence: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert licence_of(tmp_path) == licence
    assert licence_of(None, {"general.license": "gemma"}) == "gemma"
    assert licence_of(None, {"general.license": 3}) == licence_of(None) == ""
    card = model_card(ModelConfig.load(Tiny().write(tmp_path / "m")), ".", licence=licence)
    assert (f"license: {licence}\n" in card) == bool(licence) and f"| licence of the source | {licence}" in card


def test_the_card_of_a_repository_names_the_repository(tmp_path: Path) -> None:
    config = ModelConfig.load(Tiny().write(tmp_path))
    hub = dataclasses.replace(config, source={"kind": "hub", "name": "org/base"})
    card = model_card(hub, "me/base-k4v2")
    assert "base_model: org/base\n" in card and "# base-k4v2\n" in card and 'from_pretrained("me/base-k4v2")' in card


@pytest.mark.slow
def test_its_examples_run_in_three_runtimes(demo_export: Path) -> None:
    card = (demo_export / "README.md").read_text()
    assert "| licence of the source | apache-2.0 |" in card
    programs = re.findall(r"^```python\n(.*?)^```", card, flags=re.DOTALL | re.MULTILINE)
    commands = [shlex.split(line)[1:] for line in re.findall(r"^    (skv-export generate .*)$", card, re.MULTILINE)]
    main = "import sys; from skv_export.cli.main import main; main(sys.argv[1:])"
    for arguments in (*(["-c", program] for program in programs), *(["-c", main, *line] for line in commands)):
        if "onnxruntime_genai" in arguments[1]:
            pytest.importorskip("onnxruntime_genai", reason="pip install onnxruntime-genai")
        done = subprocess.run(
            [sys.executable, *arguments], cwd=demo_export, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and "Paris" in done.stdout, done.stderr
    assert len(programs) == 2 and len(commands) == 1
