"""RoPE that depends on the length, on both sides of where it changes; transformers' own forward pass is the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import make_tiny, tiny_config, write_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache

from skv_export.checkpoints.model_config import context_length
from skv_export.errors import SkvError
from skv_export.export import pipeline, supported
from skv_export.integrations.transformers_model import SkvForCausalLM
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.runtime.session import Session
from skv_export.runtime.speculation import PromptLookup, Speculation
from skv_export.spec.recipe import Recipe
from skv_export.verification.run import verify

pytestmark = pytest.mark.usefixtures("library")
EXACT = Recipe().with_options(
    k_bits=16, v_bits=16, tile_tokens=32, recent_tokens=8, num_sink_tokens=2, recent_type="float"
)
ORIGINAL, WHOLE = 48, 192
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("phi3", {
        "sliding_window": None, "original_max_position_embeddings": ORIGINAL, "max_position_embeddings": WHOLE,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4 + [1.2] * 4,
            "long_factor": [2.0, 3.0] * 4,
        },
    }),
    "dynamic": ("llama", {
        "head_dim": 32, "max_position_embeddings": ORIGINAL,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    }),
    "yarn": ("llama", {
        "head_dim": 32, "max_position_embeddings": WHOLE,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": ORIGINAL,
        },
    }),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, library: Path) -> Callable[[str], tuple[Path, Path]]:
    """A function: a kind's checkpoint and its export, made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            folder, (arch, options) = tmp_path_factory.mktemp(kind), KINDS[kind]
            checkpoint = make_tiny(folder / "checkpoint", arch, **options)
            write_tokenizer(checkpoint, 320)
            made[kind] = (
                checkpoint,
                pipeline.export_model(
                    checkpoint, out=folder / "out", recipe=EXACT, all_logits=True, progress=lambda *_: None
                ),
            )
        return made[kind]

    return get


def original(checkpoint: Path) -> PreTrainedModel:
    """A fresh one: transformers keeps the frequencies of the longest sequence so far."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    return model.eval()


def tokens(count: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(3, 320, (rows, count), generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def by_calls(checkpoint: Path, ids: torch.Tensor, calls: list[int], *, anew_beyond: int = 0) -> np.ndarray:
    """transformers' logits, call by call; beyond ``anew_beyond`` a sequence runs anew, as in Phi-3's generate."""
    model, cache, found, start = original(checkpoint), DynamicCache(), [], 0
    for stop in np.cumsum(calls):
        first = start
        if anew_beyond and start <= anew_beyond < stop:
            cache, first = DynamicCache(), 0
        positions = torch.arange(first, stop)[None]
        logits = model(ids[:, first:stop], position_ids=positions, past_key_values=cache, use_cache=True).logits
        found.append(logits[0, start - first :])
        start = stop
    return torch.cat(found).numpy()


def ours(folder: Path, ids: torch.Tensor, calls: list[int]) -> np.ndarray:
    session = Session(folder)
    cache, ends = session.cache(1, ids.shape[1]), np.cumsum(calls)
    parts = [ids[:, end - n : end].numpy() for n, end in zip(calls, ends, strict=True)]
    return np.concatenate([session.run(part, None, None, cache)[0] for part in parts])


@pytest.mark.parametrize(
    "calls",
    [[ORIGINAL], [ORIGINAL + 1], [20, *[1] * 40], [30, 30, 40, *[1] * 5]],
    ids=["to", "by one", "step", "chunks"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_of_the_switch_are_transformers(
    kind: str, calls: list[int], models: Callable[[str], tuple[Path, Path]]
) -> None:
    checkpoint, folder = models(kind)
    ids = tokens(sum(calls))
    expected = by_calls(checkpoint, ids, calls, anew_beyond=ORIGINAL if kind == "longrope" else 0)
    np.testing.assert_allclose(ours(folder, ids, calls), expected, atol=1e-3, rtol=0)


def test_decoding_over_the_switch_is_what_phi3_generates(models: Callable[[str], tuple[Path, Path]]) -> None:
    """transformers' generate runs all tokens anew there, too."""
    checkpoint, folder = models("longrope")
    ids = tokens(ORIGINAL - 6)
    expected = original(checkpoint).generate(ids, max_new_tokens=14, do_sample=False, eos_token_id=-1)[
        0, ids.shape[1] :
    ]
    session = Session(folder)
    got = [int(step[0]) for step in session.stream(ids.numpy(), max_new_tokens=14)]
    assert got == expected.tolist()[: len(got)] and len(got) > 8


def test_a_batch_is_its_sequences_one_by_one(models: Callable[[str], tuple[Path, Path]]) -> None:
    """Each sequence's own length chooses; of a sequence that passes the switch all tokens run anew, and of the rest."""
    for kind in ("longrope", "dynamic"):
        _, folder = models(kind)
        session = Session(folder)
        rows = [tokens(n)[0].tolist() for n in (20, ORIGINAL - 2, ORIGINAL + 20)]
        together, apart = session.cache(3, WHOLE), [session.cache(1, WHOLE) for _ in rows]
        new = [[row, [5], [6, 7, 8], [9]] for row in rows]
        for step in range(4):
            got = session.append([row[step] for row in new], together)
            want = [session.append([row[step]], cache)[0] for row, cache in zip(new, apart, strict=True)]
            np.testing.assert_allclose(got, want, atol=1e-3, rtol=0)


def test_back_over_the_switch_a_sequence_runs_anew(models: Callable[[str], tuple[Path, Path]]) -> None:
    session = Session(models("longrope")[1])
    ids, cache, fresh = tokens(ORIGINAL + 3)[0].tolist(), session.cache(1, WHOLE), session.cache(1, WHOLE)
    session.append([ids], cache)
    cache.rewind(ORIGINAL - 2)
    np.testing.assert_allclose(
        session.append([[7]], cache), session.append([[*ids[: ORIGINAL - 2], 7]], fresh), atol=1e-4
    )
    assert not cache.second_rope[0]


def test_saved_and_copied_sequences_know_their_frequencies(
    models: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    session = Session(models("longrope")[1])
    cache = session.cache(1, WHOLE)
    session.append([tokens(ORIGINAL + 9)[0].tolist()], cache)
    cache.save(tmp_path / "cache")
    others = [session.load_cache(tmp_path / "cache"), cache.fork(1)]
    expected = session.append([[7]], cache)
    for other in others:
        assert other.second_rope[0]
        np.testing.assert_array_equal(session.append([[7]], other), expected)


def test_guesses_that_can_not_be_taken_back_are_refused(models: Callable[[str], tuple[Path, Path]]) -> None:
    """A key keeps the frequencies of the call it came in: a wrong guess would change those of its neighbours."""
    for kind in KINDS:
        session = Session(models(kind)[1])
        model, ids = SkvForCausalLM.from_session(session), tokens(20)
        if kind == "yarn":
            model.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=4)
            continue
        with pytest.raises(SkvError, match=r"speculative decoding; got a model whose RoPE depends on the length"):
            Speculation(session, PromptLookup(3))
        with pytest.raises(ValueError, match="stateful"):
            model.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=4)


@pytest.mark.parametrize("kind", KINDS)
def test_verify_writes_the_texts_of_transformers(kind: str, models: Callable[[str], tuple[Path, Path]]) -> None:
    """Prompts one by one: in a batch transformers takes the frequencies of the longest."""
    checkpoint, folder = models(kind)
    report = verify(folder, checkpoint=checkpoint, levels=["text"])
    assert report.failures == (), report.table()


def test_what_can_not_be_right_is_refused(models: Callable[[str], tuple[Path, Path]]) -> None:
    folder = models("longrope")[1]
    assert ModelConfig.load(folder).rope_switch == ORIGINAL
    with pytest.raises(SkvError, match="prefix_bytes; got a model whose RoPE frequencies change beyond 48 tokens"):
        Session(folder, prefix_bytes=1 << 20)
    mixed = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    parameters = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": mixed}
    config = tiny_config("gemma3_text", rope_parameters=parameters)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(SkvError, match="depends on the length, in some kinds of layers; got default, dynamic"):
        supported.prepare_model(model)


def test_contexts_reach_as_far_as_the_frequencies() -> None:
    for kind, reach in (("longrope", WHOLE), ("dynamic", 4 * ORIGINAL), ("yarn", WHOLE)):
        arch, options = KINDS[kind]
        assert context_length(tiny_config(arch, **options)) == reach
