"""verify's text level: it passes on what is right, and fails on faults that the other levels share with the export."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny, write_tokenizer
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from skv_export.export.pipeline import export_model
from skv_export.integrations.transformers_model import SkvForCausalLM
from skv_export.spec.recipe import LayerConfig, Recipe
from skv_export.verification import run, text_level

pytestmark = pytest.mark.usefixtures("library")

VOCAB = 320
RECIPE = Recipe(LayerConfig(num_sink_tokens=2, recent_tokens=16, tile_tokens=32))


def _export(checkpoint: Path, out: Path) -> Path:
    return export_model(checkpoint, out=out, recipe=RECIPE, progress=lambda *_: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A tiny checkpoint whose tokenizer begins every text with a token, and its export."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small only wait for each other
    root = tmp_path_factory.mktemp("text")
    checkpoint = make_tiny(root / "checkpoint", "qwen3", eos_token_id=None, max_position_embeddings=1024)
    write_tokenizer(checkpoint, VOCAB)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="~ $A", special_tokens=[("~", tokenizer.token_to_id("~"))])
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    yield checkpoint, _export(checkpoint, root / "folder")
    torch.set_num_threads(threads)


def _verify(checkpoint: Path, folder: Path) -> run.Report:
    return run.verify(folder, checkpoint=checkpoint, levels=["text"])


def _copy(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(made[1], tmp_path / "copy")


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_an_export_writes_the_texts_that_the_checkpoint_writes(made: tuple[Path, Path]) -> None:
    report = _verify(*made)
    assert report.failures == (), report.table()
    found = report.text
    assert found is not None and found.prompts == len(text_level.PROMPT_WORDS)
    # Each prompt alone and in the batch, by SkvForCausalLM and by Session.
    assert found.near_ties == 0 and found.tokens == 4 * found.prompts * text_level.NEW_TOKENS
    assert json.loads(report.to_json())["text"] is True and "ok    text" in report.table()


def test_wrong_frequencies_of_rope_fail(made: tuple[Path, Path], tmp_path: Path) -> None:
    """As where the export and verify's loader read the configuration alike, and both wrongly."""
    wrong = shutil.copytree(made[0], tmp_path / "wrong")
    _edit(wrong / "config.json", lambda c: c["rope_parameters"].update(rope_theta=50.0))
    report = _verify(made[0], _export(wrong, tmp_path / "folder"))
    assert any("text, SkvForCausalLM.generate" in failure for failure in report.failures), report.table()
    assert any("text, Session.generate" in failure and "alone" in failure for failure in report.failures)
    assert "FAIL  text" in report.table() and json.loads(report.to_json())["text"] is False
    assert run.verify(tmp_path / "folder", checkpoint=wrong, levels=["text"]).passed


def test_a_tokenizer_that_truncates_fails(made: tuple[Path, Path], tmp_path: Path) -> None:
    folder = _copy(made, tmp_path)
    truncation = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    _edit(folder / "tokenizer.json", lambda t: t.update(truncation=truncation))
    failures = _verify(made[0], folder).failures
    assert any("text, Session.tokenizer" in failure and "becomes 8 tokens" in failure for failure in failures), failures


def test_a_missing_first_token_fails(made: tuple[Path, Path], tmp_path: Path) -> None:
    folder = _copy(made, tmp_path)
    _edit(folder / "tokenizer.json", lambda t: t.update(post_processor=None))
    failures = _verify(made[0], folder).failures
    for name in ("AutoTokenizer", "Session.tokenizer"):
        assert any(failure.startswith(f"text, {name}: ") for failure in failures), failures


def test_wrong_positions_under_padding_fail_in_the_batch_only(
    made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding that counts as text: the prompts alone are right, the batch is not."""
    real = SkvForCausalLM.forward

    def forward(self: SkvForCausalLM, input_ids: torch.Tensor, attention_mask: Any = None, **given: Any) -> Any:
        return real(self, input_ids, None if attention_mask is None else torch.ones_like(attention_mask), **given)

    monkeypatch.setattr(SkvForCausalLM, "__call__", forward)
    monkeypatch.setattr(SkvForCausalLM, "forward", forward)
    failures = _verify(*made).failures
    assert failures and all("in a padded batch of 3" in failure for failure in failures), failures


def test_texts_may_part_at_a_near_tie_only() -> None:
    lead = torch.full((3, 4), 5.0)
    lead[1, 2] = 1e-4
    reference = text_level.Continuation([1], [0, 1, 2], lead, "abc")
    findings = text_level._Findings(margin=1e-3)
    findings.compare("it", ["p"], [reference], [([0, 2, 3], "acd")])
    assert (findings.near_ties, findings.tokens, findings.failures) == (1, 1, [])
    findings.compare("it", ["p"], [reference], [([0, 3, 3], "add")])
    findings.compare("it", ["p"], [reference], [([0, 1], "ab")])
    findings.compare("it", ["p"], [reference], [([0, 1, 2], "abd")])
    assert [f.partition("; ")[2] or f for f in findings.failures] == [
        "they part at token 1, where the reference's lead is 5",
        "they part at token 2",
        "text, it: the same tokens become 'abd', not 'abc'",
    ]
    assert findings.near_ties == 1 and dataclasses.replace(findings).margin == 1e-3


def test_weights_that_were_rounded_are_the_references_too(made: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = RECIPE.with_options(weights="int4")
    folder = export_model(made[0], out=tmp_path / "int4", recipe=recipe, progress=lambda *_: None)
    report = _verify(made[0], folder)
    assert report.failures == () and report.text is not None and report.text.tokens > 100, report.table()
