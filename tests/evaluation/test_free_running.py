"""`quality --generate`: when texts part is when decoding would part them; tasks have the answers that they should."""

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

from skv_export.checkpoints.checkpoint import resolve
from skv_export.cli.quality import quality_command
from skv_export.evaluation import candidates, comparison, free_running
from skv_export.evaluation.free_running import TASKS, FreeResult, FreeRow, continued, make_question, parting, wilson
from skv_export.spec.recipe import LayerConfig, Recipe

SMALL = Recipe(LayerConfig(num_sink_tokens=4, recent_tokens=32, tile_tokens=32))


@pytest.fixture
def loaded(tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.setattr(comparison, "load_tokenizer", lambda _: Letters())
    return comparison.load(resolve(tiny_checkpoint("qwen3")))


@torch.no_grad()
def test_texts_part_where_decoding_token_by_token_parts_them(loaded: tuple[Any, Any]) -> None:
    """The candidate's own text, grown token by token from its own tokens, against the exact one."""
    model, _ = loaded
    prompt = torch.arange(120) * 37 % 300
    exact = continued(model, prompt, 24)
    parted = []
    for name in ("K16V16", "K8V8", "K1V1"):
        (candidate,) = candidates.parse_configs(name, SMALL)
        own = prompt
        for _ in range(24):
            own = torch.cat([own, candidate.logits(model, own, 0)[-1].argmax(-1, keepdim=True)])
        same = (own[120:] == exact[120:]).tolist()
        parted.append(parting(candidate, model, exact, 120))
        assert parted[-1] == (same.index(False) if False in same else 24)
    assert parted[0] == 24 > parted[2]


@torch.no_grad()
def test_the_exact_text_is_transformers_greedy_one(
    loaded: tuple[Any, Any], tiny_checkpoint: Callable[..., Path]
) -> None:
    from transformers import AutoModelForCausalLM

    prompt = torch.arange(50) * 37 % 300
    plain = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("qwen3"), dtype=torch.float32)
    options = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": None}
    want = plain.generate(prompt[None], attention_mask=torch.ones(1, 50, dtype=torch.int64), **options)[0]
    assert torch.equal(continued(loaded[0], prompt, 16), want)


def test_questions_have_the_right_answers_and_are_the_same_each_time() -> None:
    for seed in range(20):
        tasks = {name: make(np.random.default_rng(seed)) for name, make in TASKS.items()}
        a, _, b, _ = tasks["arithmetic"].asked.splitlines()[-1].split()
        assert int(tasks["arithmetic"].answer) == int(a) + int(b)
        for line in tasks["arithmetic"].asked.splitlines()[:-1]:
            x, _, y, _, total = line.split()
            assert int(x) + int(y) == int(total)
        assert tasks["copying"].given == f"The password is:{tasks['copying'].answer}.\n\n"
        city = tasks["retrieval"].asked.split()[-2]
        assert f"The code of {city} is{tasks['retrieval'].answer}." in tasks["retrieval"].given
        assert tasks["recall"].answer in tasks["recall"].given and len(tasks["recall"].answer) == 13
    for task in TASKS:
        ids, start = make_question(Letters(), TEXT, task, 3)
        again, _ = make_question(Letters(), TEXT, task, 3)
        other, _ = make_question(Letters(), TEXT, task, 4)
        assert torch.equal(ids, again) and not torch.equal(ids[-len(other) :], other[-len(ids) :])
        assert ids[0] == 1 and start > free_running.FILLER_TOKENS


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_intervals_are_wilsons(successes: int, trials: int, low: float, high: float) -> None:
    """Figures of Newcombe, Statistics in Medicine 17 (1998), and of statsmodels."""
    assert wilson(successes, trials) == pytest.approx((low, high), abs=1e-4)


def test_the_command_shows_and_writes_what_was_found(
    loaded: tuple[Any, Any], tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(free_running, "NEW_TOKENS", 6)
    monkeypatch.setattr(free_running, "PROMPT_TOKENS", 150)
    monkeypatch.setattr(free_running, "FILLER_TOKENS", 40)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = ["--configs", "K16V16,K1V1", "--text", str(text), "--windows", "1", "--window", "160", "--generate", "2"]
    result = CliRunner().invoke(
        quality_command, [str(tiny_checkpoint("qwen3")), *options, "--json", str(tmp_path / "q.json")]
    )
    assert result.exit_code == 0, result.output
    assert "when 2 of them leave the exact model's; and 2 questions per task" in result.output
    rows = json.loads((tmp_path / "q.json").read_text())["generate"]
    assert [row["name"] for row in rows] == ["full precision", "K16V16", "K1V1"]
    assert rows[0]["parted"] == [6, 6] and set(rows[0]["right"]) == set(TASKS)


def test_a_table_counts_what_never_parted(monkeypatch: pytest.MonkeyPatch) -> None:
    row = FreeRow("K4V2", [128, 128, 17, 40], dict.fromkeys(TASKS, 3), 4)
    line = FreeResult([row]).table().splitlines()[-1]
    assert line.split()[:4] == ["K4V2", "84", "50%", "(15%-85%)"] and line.count("75% (30%-95%)") == len(TASKS)
