"""skv-export quality: decode style is token by token decoding, the figures, baselines, resuming, needles, the page."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from letters import TEXT, Letters

from skv_export.checkpoints.checkpoint import resolve
from skv_export.checkpoints.pretrained import own_attention
from skv_export.cli.quality import quality_command
from skv_export.errors import SkvError
from skv_export.evaluation import baselines, candidates, comparison, needle
from skv_export.evaluation.comparison import CandidateResult, pareto
from skv_export.evaluation.decode_simulation import Simulation, simulated_logits
from skv_export.evaluation.html_report import html
from skv_export.evaluation.text import cut_windows
from skv_export.export.decoder import SkvDecoder
from skv_export.spec.layout import CacheLayout
from skv_export.spec.recipe import LayerConfig, Recipe

SMALL = Recipe(LayerConfig(num_sink_tokens=4, recent_tokens=32, tile_tokens=32))


@pytest.fixture
def loaded(tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.setattr(comparison, "load_tokenizer", lambda _: Letters())
    return comparison.load(resolve(tiny_checkpoint("qwen3")))


def run(loaded: tuple[Any, Any], wanted: list[Any], **options: Any) -> comparison.ComparisonResult:
    return comparison.run(resolve_none(), wanted, TEXT, loaded=loaded, **{"windows": 3, "window": 160, **options})


def resolve_none() -> Any:
    return type("Source", (), {"__str__": lambda _: "tiny"})()


def test_windows_that_would_measure_nothing_are_refused(loaded: tuple[Any, Any]) -> None:
    """Where no token is quantized every cache looks perfect; beyond its context a model has no positions."""
    cache, exact = (candidates.parse_configs(name, SMALL) for name in ("K4V2", "K16V16"))
    for window in (64, 69):  # the last query that is scored is the last but one
        with pytest.raises(SkvError, match=f"K4V2: window; got {window} tokens, of which none is quantized"):
            run(loaded, cache, windows=1, window=window)
    assert run(loaded, cache, windows=1, window=70).rows[0].kld_mean > 0
    assert run(loaded, exact, windows=1, window=64).rows[0].kld_mean < 1e-5
    with pytest.raises(SkvError, match="window; got 600 tokens; expected at most 512, the model's context"):
        run(loaded, cache, window=600)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt_oss"])
def test_a_window_in_one_pass_is_the_model_decoding_token_by_token(
    arch: str, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole model, the reference op inside: softcap, windows, sinks. Two tiles are flushed on the way."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(comparison, "load_tokenizer", lambda _: Letters())
    folder, tokens = tiny_checkpoint(arch), 110
    recipe = SMALL.with_options(recent_type="float")
    ids = torch.arange(tokens) * 37 % 300
    model, _ = comparison.load(resolve(folder))
    got = simulated_logits(model, ids, Simulation.of_recipe(recipe))

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    count, heads = plain.config.num_hidden_layers, plain.config.num_key_value_heads
    decoder = SkvDecoder(plain, recipe.layers(count))
    head_dim = getattr(plain.config, "head_dim", None) or plain.config.hidden_size // plain.config.num_attention_heads
    kinds = getattr(plain.config, "layer_types", None) or ["full_attention"] * count
    caches: list[list[torch.Tensor]] = [[], []]
    for kind in kinds:
        window = plain.config.sliding_window if kind == "sliding_attention" else 0
        for held, layout in zip(caches, CacheLayout.pair(recipe.default, head_dim, window), strict=True):
            held.append(torch.zeros(1, heads, *layout.shape(tokens), dtype=torch.uint8))
    rows = []
    with torch.no_grad():
        for i in range(tokens):
            mask = torch.ones(1, i + 1, dtype=torch.int64)
            logits, *caches = decoder(ids[None, i : i + 1], mask, torch.tensor([[i]]), *caches)
            rows.append(logits[0, 0])
    difference = (got - torch.stack(rows)).abs().amax(-1)
    effect = (got - simulated_logits(model, ids, Simulation.full_precision())).abs().amax(-1)
    # The first tile is flushed when 68 tokens are held: until then all is exact. Later a code flips now and then, where
    # two orders of summation differ in the last bit; the cache's own effect is far larger.
    assert difference[:68].max() < 2e-4 and effect[:68].max() < 2e-4
    assert effect[68:].min() > 0.01 and difference[68:].median() < 0.02 * effect[68:].median()


def test_sixteen_bits_lose_nothing_and_fewer_bits_lose_more(loaded: tuple[Any, Any]) -> None:
    wanted = candidates.parse_configs("K16V16,K8V8,K4V4,K2V2", SMALL)
    rows = run(loaded, wanted).rows
    assert [row.name for row in rows] == ["K16V16", "K8V8", "K4V4", "K2V2"]
    losses = [row.kld_mean for row in rows]
    assert losses == sorted(losses) and losses[0] < 1e-5 and losses[-1] > 10 * losses[1]
    assert rows[0].top1_agreement > 0.99 > rows[3].top1_agreement
    for row in rows:
        assert row.ppl_change_percent == pytest.approx(100 * (row.ppl / row.ppl_reference - 1), abs=1e-3)
        assert row.kld_mean <= row.kld_p99 * 50 and row.kld_p99 <= row.kld_max
        assert row.positions == 3 * 159 and row.windows == 3 and row.ppl_stderr_percent > 0
        assert len(row.ppl_change_by_position) == comparison.POSITION_BUCKETS
        assert len(row.kld_by_part) == 3 * comparison.POSITION_BUCKETS
        assert sum(row.kld_by_part) / len(row.kld_by_part) == pytest.approx(row.kld_mean, rel=0.02)  # uneven parts
    layouts = CacheLayout.pair(SMALL.with_options(k_bits=4, v_bits=4).default, 64)
    bits = sum(layout.effective_bits(comparison.BITS_CONTEXT) for layout in layouts) / 2
    assert rows[2].effective_bits == pytest.approx(bits)
    # Early tokens see only exact ones.
    assert abs(rows[3].ppl_change_by_position[0]) < 0.1 * abs(rows[3].ppl_change_by_position[-1]) + 0.5


def test_fewer_tokens_are_scored_behind_the_prompt(loaded: tuple[Any, Any]) -> None:
    whole, few = candidates.of_recipe("whole", SMALL), candidates.of_recipe("few", SMALL, keep=110)
    result = run(loaded, [whole, few], windows=1, window=480, prompt=240)
    assert [row.positions for row in result.rows] == [240, 240]
    assert "scored behind a prompt of 240" in result.table() and json.loads(result.to_json())["prompt"] == 240
    by_name = {row.name: row for row in result.rows}
    assert by_name["few keep 110"].kld_mean > 1.2 * by_name["whole"].kld_mean
    assert by_name["few keep 110"].effective_bits < 0.6 * by_name["whole"].effective_bits
    ids = torch.from_numpy(cut_windows(Letters(), TEXT, 1, 480))[0]
    exact = simulated_logits(loaded[0], ids, Simulation.full_precision()).log_softmax(-1)
    found = few.logits(loaded[0], ids, 240).log_softmax(-1)
    divergence = (exact.exp() * (exact - found)).sum(-1)[239:-1]
    assert by_name["few keep 110"].kld_mean == pytest.approx(divergence.mean().item(), rel=1e-3)
    with pytest.raises(SkvError, match="tokens to keep; got 90; expected at least 100"):
        run(loaded, [candidates.of_recipe("less", SMALL, keep=90)], windows=1, window=480, prompt=240)


def test_an_interrupted_run_goes_on_where_it_stopped(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    state = tmp_path / "state.jsonl"
    wanted = candidates.parse_configs("K4V4,K2V2", SMALL)
    whole = run(loaded, wanted)

    class StopError(Exception):
        pass

    def stop(_: str, done: int, __: int) -> None:
        if done == 3:
            raise StopError

    with pytest.raises(StopError):
        run(loaded, wanted, state=state, progress=stop)
    assert len(state.read_text().splitlines()) == 3
    with state.open("a") as file:
        file.write('{"run": "half a li')  # killed while writing
    seen: list[int] = []
    rest = run(loaded, wanted, state=state, progress=lambda _, done, __: seen.append(done))
    assert seen == [4, 5, 6]
    for a, b in zip(whole.rows, rest.rows, strict=True):
        assert a.kld_mean == pytest.approx(b.kld_mean, rel=1e-4) and a.ppl == pytest.approx(b.ppl, rel=1e-5)
    # The same state with other options of the same name: nothing of it is taken.
    seen.clear()
    other = candidates.parse_configs("K4V4", SMALL.with_options(recent_tokens=0))
    run(loaded, other, state=state, progress=lambda _, done, __: seen.append(done))
    assert seen == [1, 2, 3]


def test_the_first_windows_are_those_of_the_whole_run(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    state = tmp_path / "state.jsonl"
    wanted = candidates.parse_configs("K4V4", SMALL)
    row = run(loaded, wanted, state=state, first=2).rows[0]
    assert row.windows == 2 == len(state.read_text().splitlines())
    seen: list[int] = []
    assert run(loaded, wanted, state=state, progress=lambda _, done, __: seen.append(done)).rows[0].windows == 3
    assert seen == [3]


def test_a_damaged_state_is_refused(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    state = tmp_path / "state.jsonl"
    state.write_text("not JSON\n{}\n")
    with pytest.raises(SkvError, match=r"state\.jsonl, line 1: no saved step"):
        run(loaded, candidates.parse_configs("K4V4", SMALL), state=state)


class Rounding:
    """A quantizer for transformers' cache, without hqq: rounds to a grid that depends on the whole tensor."""

    @staticmethod
    def quantize(self: Any, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        step = tensor.abs().amax(-2, keepdim=True) / 4
        return (tensor / step).round() * step


def test_transformers_cache_in_calls_is_token_by_token(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls that end where transformers' cache flushes give what one per token gives, its requantizing included."""
    from transformers import cache_utils

    class Layer(cache_utils.QuantizedLayer):  # type: ignore[misc]
        _quantize = Rounding.quantize

        def _dequantize(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor

    monkeypatch.setattr(cache_utils, "HQQQuantizedLayer", Layer)
    model, _ = loaded
    ids = torch.arange(300) * 37 % 300
    candidate = baselines.TransformersCache("hf-hqq-4", "", "", "hqq", 4)
    with torch.no_grad():
        got = candidate.logits(model, ids, 0)
        cache = cache_utils.QuantizedCache(backend="hqq", config=model.config, nbits=4, axis_key=1, axis_value=1)
        with own_attention(model):
            calls = [ids[:64], *ids[64:].split(1)]
            rows = [model(c[None], past_key_values=cache, use_cache=True).logits[0] for c in calls]
        full = simulated_logits(model, ids, Simulation.full_precision())
    assert (got - full).abs().max() > 0.05, "the cache must matter here"
    assert (got - torch.cat(rows)).abs().median() < 1e-5
    assert candidate.effective_bits(8192) == pytest.approx((8064 * 4.5 + 128 * 16) / 8192)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: candidates.parse_configs("K4", SMALL), "--configs: K4; expected a bit pair such as K4V2"),
        (lambda: candidates.parse_configs("K7V2", SMALL), "k_bits; got 7"),
        (lambda: baselines.parse_baselines("fp8"), "--baselines: fp8; expected kivi, kvquant, "),
        (lambda: baselines.parse_baselines("kivi-k4"), "--baselines: kivi-k4; expected"),
        (lambda: needle.parse_lengths("64"), "--needle-lengths; got 64"),
        (lambda: cut_windows(Letters(), "short", 2, 100), "text: too short; got 5 tokens"),
    ],
)
def test_bad_options_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(SkvError, match=message):
        call()


def test_a_baseline_whose_package_is_missing_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for backend, package in (("hf-hqq", "hqq"), ("hf-quanto-4", "optimum-quanto")):
        with pytest.raises(SkvError, match=f"needs the package {package}; got not installed. pip install {package}"):
            baselines.parse_baselines(backend)


def test_bits_that_a_cache_does_not_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    with pytest.raises(SkvError, match="--baselines: hf-hqq-3; expected bits of"):
        baselines.parse_baselines("hf-hqq-3")


def test_names_become_candidates(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("k_bits = 3\nv_bits = 3\n")
    wanted = candidates.parse_configs(f"k4v2, {tmp_path}/*.toml, smallest", SMALL)
    assert [c.name for c in wanted] == ["K4V2", "mine", "smallest"]
    names = [c.name for c in baselines.parse_baselines("kivi,kivi-k4v2")]
    assert names == ["kivi-k4v4", "kivi-k2v2", "kivi-k4v2"]
    with pytest.raises(SkvError, match="got K4V2 twice"):
        comparison.run(resolve_none(), [wanted[0], wanted[0]], TEXT)


def row(name: str, bits: float, loss: float) -> CandidateResult:
    values: dict[str, Any] = {f.name: 1.0 for f in dataclasses.fields(CandidateResult)} | {
        "ppl_change_by_position": [0.5, 1.0],
        "kld_by_part": [loss] * 2,
    }
    return CandidateResult(
        **{**values, "name": name, "note": "", "effective_bits": bits, "kld_mean": loss, "windows": 1}
    )  # type: ignore[arg-type]


def test_the_front_is_what_nothing_beats() -> None:
    rows = [row("a", 4, 0.01), row("b", 3, 0.02), row("c", 3.5, 0.03), row("d", 3, 0.05), row("e", 5, 0.01)]
    assert [r.name for r in pareto(rows)] == ["b", "a"]


def test_a_needle_stands_at_its_depth_and_the_answer_at_the_end() -> None:
    ids, count = needle.make_prompt(Letters(), TEXT, 600, 0.5, 1)
    text = "".join(chr(i - 3) for i in ids.tolist()[1:])
    assert len(ids) == 600 + count and count == 6
    number = text[-5:]
    assert number.isdigit() and text.count(number) == 2
    room = text.index("\n\nThe secret number")
    assert 0.3 < room / 600 < 0.5
    assert torch.equal(needle.make_prompt(Letters(), TEXT, 600, 0.5, 1)[0], ids)


def test_needles_are_found_exactly_when_greedy_decoding_would_write_them() -> None:
    class Oracle(candidates.Candidate):
        """Predicts the next token for sure; from position `wrong` on, another one."""

        def __init__(self, wrong: int) -> None:
            object.__setattr__(self, "wrong", wrong)
            super().__init__(f"oracle {wrong}", "", "")

        def logits(self, model: Any, ids: torch.Tensor, prompt: int) -> torch.Tensor:
            rows = torch.nn.functional.one_hot(ids.roll(-1), 400).float() * 20
            if self.wrong < 0:  # type: ignore[attr-defined]
                rows[self.wrong - 1] = 0.0  # type: ignore[attr-defined]
                rows[self.wrong - 1, 0] = 20.0  # type: ignore[attr-defined]
            return rows

        def effective_bits(self, context_length: int) -> float:
            return 16.0

    prompts = [[needle.make_prompt(Letters(), TEXT, 400, d, 0)] for d in needle.DEPTHS]
    good = needle._row(Oracle(0), None, 400, prompts)  # type: ignore[arg-type]
    bad = needle._row(Oracle(-3), None, 400, prompts)  # type: ignore[arg-type]
    assert good.found == [1.0] * 5 and good.nll < 1e-5
    assert bad.found == [0.0] * 5 and bad.nll == pytest.approx(20 / 6, rel=0.01)


def test_the_command_prints_and_writes(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "load_tokenizer", lambda _: Letters())
    monkeypatch.setattr(needle, "DEPTHS", (0.5,))
    text, page, figures = tmp_path / "text.txt", tmp_path / "quality.html", tmp_path / "quality.json"
    text.write_text(TEXT)
    arguments = [str(tiny_checkpoint("qwen3")), "--text", str(text), "--configs", "K4V4,K2V2", "--baselines", "kivi"]
    arguments += ["--windows", "2", "--window", "192", "--needles", "--needle-lengths", "300"]
    done = CliRunner().invoke(
        quality_command, [*arguments, "--json", str(figures), "--report", str(page)], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert "Needles found" in done.output and "kivi-k2v2" in done.output
    found = json.loads(figures.read_text())
    wanted = {
        "name", "effective_bits", "ppl", "ppl_reference", "ppl_change_percent", "ppl_stderr_percent", "kld_mean",
        "kld_p99", "top1_agreement",
    }  # fmt: skip
    assert [r["name"] for r in found["rows"]] == ["K4V4", "K2V2", "kivi-k4v4", "kivi-k2v2"]
    assert all(wanted <= set(r) and math.isfinite(r["ppl"]) for r in found["rows"])
    assert {r["name"] for r in found["needles"]} == {"full precision", *(r["name"] for r in found["rows"])}
    shown = page.read_text()
    assert "<svg" in shown and "kivi-k2v2" in shown and "http" not in shown.replace("http-equiv", "")


def test_the_page_escapes_names() -> None:
    result = comparison.ComparisonResult("<model>", "0", 10, [row("<b>", 4, 0.01), row("c", 3, 0.02)])
    assert "<b>" not in html(result) and "&lt;model&gt;" in html(result)


def test_bold_is_what_is_on_the_front_and_nothing_else() -> None:
    rows = [row("worst", 2, 0.5), row("dominated", 4, 0.02), row("good", 3, 0.01), row("best", 4, 0.001)]
    shown = html(comparison.ComparisonResult("/some/where/model", "0", 10, rows))
    assert re.findall(r"<tr class=best><td>(\w+)", shown) == ["worst", "good", "best"]
    assert "<td>dominated</td>" in shown and "perplexity rises by" in shown and "increase of perplexity, %" in shown
    assert "<h1>model</h1>" in shown and "/some/where" not in shown
    assert shown.count("<li><svg") == 4  # a legend under the losses by position


def test_the_command_line_does_not_load_torch() -> None:
    import subprocess
    import sys

    code = "import sys, skv_export.cli.quality; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
