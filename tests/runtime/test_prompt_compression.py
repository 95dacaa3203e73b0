"""A draft chooses the tokens that its last queries look at; the model gets these alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from plain_tiny import Plain
from tiny_graph import EXACT, KV_HEADS, SMALL, VOCAB, Tiny

from skv_export.cli.main import main
from skv_export.errors import SkvError
from skv_export.runtime.compaction import WINDOW
from skv_export.runtime.prompt_compression import FRONT, PromptCompressor
from skv_export.runtime.session import Session
from skv_export.runtime.text import generate_text

pytestmark = pytest.mark.usefixtures("library")

TOKENS = np.random.default_rng(3).integers(3, VOCAB, 200).tolist()
TEXT = "The quick brown fox jumps over the lazy dog. " * 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Tiny(EXACT).write_all(tmp_path_factory.mktemp("model"), eos_token_id=[])


@pytest.mark.parametrize("layers", [None, 1, 2])
@pytest.mark.parametrize("keep", [0.3, 0.6])
def test_what_the_drafts_last_queries_look_at_stays(folder: Path, layers: int | None, keep: float) -> None:
    plain = Plain(Tiny(EXACT))
    for token in TOKENS:
        plain.step(token)
    scores = np.max([plain.received(i, h, WINDOW) for i in range(layers or 2) for h in range(KV_HEADS)], axis=0)
    scores[:FRONT] = scores[-WINDOW:] = np.inf
    stay = sorted(sorted(range(200), key=lambda p: (-scores[p], p))[: round(200 * keep)])
    got = PromptCompressor(folder, vocab_size=VOCAB, first_layers=layers)(TOKENS, keep)
    assert got == [TOKENS[p] for p in stay]


def test_layers_with_a_window_have_no_say(tmp_path: Path) -> None:
    model = Tiny(EXACT, windows=(40, 0))
    compress = PromptCompressor(model.write(tmp_path), vocab_size=VOCAB)
    plain = Plain(model)
    for token in TOKENS:
        plain.step(token)
    scores = np.max([plain.received(1, h, WINDOW) for h in range(KV_HEADS)], axis=0)
    scores[:FRONT] = scores[-WINDOW:] = np.inf
    stay = sorted(sorted(range(200), key=lambda p: (-scores[p], p))[:80])
    assert compress(TOKENS, 0.4) == [TOKENS[p] for p in stay]
    with pytest.raises(SkvError, match="layers with full attention"):
        PromptCompressor(tmp_path, vocab_size=VOCAB, first_layers=1)


def test_short_prompts_and_whole_ones_stay(folder: Path) -> None:
    compress = PromptCompressor(folder, vocab_size=VOCAB)
    assert compress(TOKENS, 1) == TOKENS
    assert compress(TOKENS[: FRONT + WINDOW], 0.1) == TOKENS[: FRONT + WINDOW]
    assert compress(TOKENS, 0.01) == [*TOKENS[:FRONT], *TOKENS[-WINDOW:]]


def test_what_is_no_draft_and_no_share_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SkvError, match="vocab_size"):
        PromptCompressor(folder, vocab_size=VOCAB + 1)
    for layers in (0, 3, True):
        with pytest.raises(SkvError, match=r"first.layers"):
            PromptCompressor(folder, vocab_size=VOCAB, first_layers=layers)
    with pytest.raises(SkvError, match=r"no such file|skv_config"):
        PromptCompressor(tmp_path, vocab_size=VOCAB)
    compress = PromptCompressor(folder, vocab_size=VOCAB)
    for keep in (0, -1, 1.5, float("nan"), "half"):
        with pytest.raises(SkvError, match=r"share of the prompt|keep; got"):
            compress(TOKENS, keep)  # type: ignore[arg-type]
    with pytest.raises(SkvError, match="input_ids"):
        compress([], 0.5)
    with pytest.raises(SkvError, match="total length"):
        compress(TOKENS * 3, 0.5)  # longer than the draft's context


@pytest.mark.parametrize("own", [False, True])
def test_generate_with_a_shorter_prompt(folder: Path, tmp_path: Path, own: bool) -> None:
    draft = 1 if own else Tiny(SMALL).write_all(tmp_path / "draft")
    made = generate_text(folder, TEXT, compress_prompt=draft, keep=0.4, max_new_tokens=12)
    session = Session(folder)
    ids = session.tokenizer.encode(TEXT).ids
    few = PromptCompressor(folder if own else draft, vocab_size=VOCAB, first_layers=1 if own else None)(ids, 0.4)
    assert made.tokens == session.generate([few], max_new_tokens=12)[0]
    assert made.given_tokens == len(ids) and made.prompt_tokens == round(0.4 * len(ids))
    assert f"{len(few)} of {len(ids)} prompt tokens" in made.summary()
    assert made.prefill_seconds > 0 and made.decode_seconds > 0


def test_the_command_takes_a_folder_or_a_number(folder: Path, tmp_path: Path) -> None:
    def run(*options: str) -> tuple[int, str]:
        words = ["generate", str(folder), "--prompt", TEXT, "--max-new-tokens", "4", *options]
        result = CliRunner().invoke(main, words)
        return result.exit_code, result.output

    both = [run("--compress-prompt", draft, "--keep", "0.5") for draft in (str(folder), "2")]
    assert both[0][0] == both[1][0] == 0 and both[0][1].split("\n")[0] == both[1][1].split("\n")[0]
    code, output = run("--compress-prompt", "9")
    assert code == 1 and "first layers" in output and "expected 1 ... 2" in output
    saved = str(tmp_path / "cache")
    assert run("--save-cache", saved)[0] == 0
    code, output = run("--compress-prompt", "1", "--load-cache", saved)
    assert code == 1 and "compress_prompt" in output
    assert run("--keep-tokens", "90", "--look-ahead", str(folder))[0] == 0
    code, output = run("--look-ahead", str(folder))
    assert code == 1 and "keep_tokens" in output
