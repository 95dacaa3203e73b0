"""lm-eval's model `skv`: scores are those of decoding token by token; a task of a file in lm-eval's command line."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_graph import CONTEXT, EXACT, SMALL, VOCAB, Tiny

from skv_export.errors import SkvError
from skv_export.runtime.session import Session

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[lm-eval]'")

from skv_export.integrations.lm_eval import SkvLM, main

FLOAT = dataclasses.replace(SMALL, recent_type="float")
LETTERS = [chr(31 + i) for i in range(1, VOCAB)]
TEXT = "".join(np.random.default_rng(11).choice(LETTERS[1:], 160))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, library: Path) -> Path:
    return Tiny(FLOAT).write_all(tmp_path_factory.mktemp("lm_eval") / "tiny", eos_token_id=[5], bos_token_id=1)


def ask(*args: Any) -> Any:
    """A request as lm-eval makes it."""
    return SimpleNamespace(args=args)


def ids(text: str) -> list[int]:
    return [ord(letter) - 31 for letter in text]


def stepwise(folder: Path, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Decodes token by token with the exported graph itself."""
    session = Session(folder)
    cache, total, greedy = session.cache(1, CONTEXT), 0.0, True
    tokens = context + continuation
    for i, token in enumerate(tokens[:-1]):
        row = session.run([[token]], None, None, cache)[0, 0].astype(np.float64)
        if i + 1 >= len(context):
            total += row[tokens[i + 1]] - np.log(np.exp(row - row.max()).sum()) - row.max()
            greedy &= int(row.argmax()) == tokens[i + 1]
    return total, greedy


@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_are_those_of_decoding_token_by_token(folder: Path, batch_size: int) -> None:
    model = SkvLM(str(folder), batch_size=batch_size)
    pairs = [(TEXT[:120], TEXT[120:150]), (TEXT[:30], TEXT[30:33]), (TEXT[5:90], TEXT[90:91]), ("", TEXT[:70])]
    scores = model.loglikelihood([ask(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(pairs, scores, strict=True):
        expected = stepwise(folder, ids(context) or [1], ids(continuation))
        assert abs(score - expected[0]) < 1e-3 and greedy == expected[1]


def test_a_greedy_continuation_is_recognized(folder: Path) -> None:
    prompt = ids(TEXT[:60])
    (tokens,) = Session(folder).generate([prompt], max_new_tokens=4)
    continuation = "".join(chr(31 + token) for token in tokens)
    other = continuation[:-1] + ("b" if continuation[-1] == "a" else "a")
    model = SkvLM(str(folder))
    scores = model.loglikelihood([ask(TEXT[:60], text) for text in (continuation, other)], disable_tqdm=True)
    assert [greedy for _, greedy in scores] == [True, False]


def test_decode_style_is_what_sees_the_quantized_cache(folder: Path, tmp_path: Path) -> None:
    request = [ask(TEXT[:130], TEXT[130:])]
    exact = Tiny(EXACT).write_all(tmp_path / "exact")

    def score(source: Path, **options: Any) -> float:
        return float(SkvLM(str(source), **options).loglikelihood(request, disable_tqdm=True)[0][0])

    one_call = score(folder, decode_style=False)
    assert abs(one_call - score(exact)) < 1e-3  # exact: as if the cache had no codes
    assert abs(score(folder) - one_call) > 1e-2


def test_rolling_scores_every_token_once(folder: Path) -> None:
    (whole,) = SkvLM(str(folder)).loglikelihood_rolling([ask(TEXT)], disable_tqdm=True)
    assert abs(whole - stepwise(folder, [1], ids(TEXT))[0]) < 1e-3
    windowed = SkvLM(str(folder), max_length=50)
    totals = windowed.loglikelihood_rolling([ask(TEXT), ask(TEXT[:10])], disable_tqdm=True)
    expected = stepwise(folder, [1], ids(TEXT[:50]))[0]
    for start in (49, 99):
        expected += stepwise(folder, ids(TEXT[start : start + 1]), ids(TEXT[start + 1 : start + 51]))[0]
    # The last window is filled up with what comes before it.
    expected += stepwise(folder, ids(TEXT[109:150]), ids(TEXT[150:]))[0]
    np.testing.assert_allclose(totals, [expected, stepwise(folder, [1], ids(TEXT[:10]))[0]], atol=2e-3)


def test_a_long_context_loses_its_beginning(folder: Path) -> None:
    model = SkvLM(str(folder), max_length=40)
    long, cut = model.loglikelihood([ask(TEXT[:100], TEXT[100:110]), ask(TEXT[69:100], TEXT[100:110])])
    assert long == cut
    with pytest.raises(SkvError, match="continuation is longer"):
        model.loglikelihood([ask("a", TEXT[:41])])


def test_generation_stops_where_the_task_says(folder: Path) -> None:
    model, prompt = SkvLM(str(folder), max_gen_toks=30), TEXT[:50]
    (tokens,) = Session(folder).generate([ids(prompt)], max_new_tokens=30)
    whole = "".join(chr(31 + token) for token in tokens if token not in (0, 5))
    stop = whole[6:8]
    free, stopped, short = model.generate_until(
        [ask(prompt, {"until": []}), ask(prompt, {"until": ["~~", stop]}), ask(prompt, {"max_gen_toks": 3})]
    )
    assert free == whole and len(whole) > 8
    assert stopped == whole[: whole.index(stop)] and short == whole[:3]
    sampled = model.generate_until([ask(prompt, {"do_sample": True, "temperature": 3.0, "top_k": 40})])
    assert sampled == model.generate_until([ask(prompt, {"do_sample": True, "temperature": 3.0, "top_k": 40})])
    assert sampled != [free]
    with pytest.raises(SkvError, match="num_beams"):
        model.generate_until([ask(prompt, {"num_beams": 4})])


def test_bad_arguments_are_clear_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SkvError, match="max_length; got 513"):
        SkvLM(str(folder), max_length=CONTEXT + 1)
    with pytest.raises(SkvError, match="batch_size; got auto"):
        SkvLM(str(folder), batch_size="auto")
    with pytest.raises(SkvError, match="no such folder"):
        SkvLM(str(tmp_path / "nothing"))


def test_a_task_of_a_file_through_the_command_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Multiple choice: the right answer is the likelier one, so the accuracy follows from the scores above."""
    questions = [
        {"text": TEXT[i : i + 60], "choices": [TEXT[i + 60 : i + 63], TEXT[i + 3 : i + 6]], "answer": i % 2}
        for i in range(0, 24, 4)
    ]
    (tmp_path / "task").mkdir()
    data = tmp_path / "task" / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "task" / "letters.yaml").write_text(
        "task: letters\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: " + str(data) + "\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: answer\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n"
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    arguments = ["--model", "skv", "--model_args", f"pretrained={folder},max_length=200", "--batch_size", "2"]
    arguments += ["--tasks", "letters", "--include_path", str(tmp_path / "task"), "--output_path", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["skv-lm-eval", *arguments])
    main()
    (written,) = tmp_path.rglob("results_*.json")
    found = json.loads(written.read_text())["results"]["letters"]["acc,none"]
    right = 0
    for question in questions:
        scores = [stepwise(folder, ids(question["text"]), ids(choice))[0] for choice in question["choices"]]
        right += int(np.argmax(scores)) == question["answer"]
    assert found == right / len(questions) and right > 0


@pytest.mark.parametrize(
    ("code", "arguments", "message"),
    [
        ("sys.modules['lm_eval'] = None", [], "pip install '.[lm-eval]'"),
        ("", ["--model", "skv", "--model_args", "pretrained=x", "--tasks", "x"], "lm-eval: Tasks not found"),
    ],
)
def test_the_command_ends_with_a_message(code: str, arguments: list[str], message: str) -> None:
    start = f"import sys\n{code}\nfrom skv_export.integrations.lm_eval_command import main\nmain()"
    done = subprocess.run([sys.executable, "-c", start, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
