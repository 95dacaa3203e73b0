"""How the next token is chosen: the distribution, against transformers' processors, and options that make no sense."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_graph import Tiny

from skv_export.errors import SkvError
from skv_export.runtime.prompts import load_tokenizer
from skv_export.runtime.sampling import Sampler, Sampling
from skv_export.runtime.text import generate_text

pytestmark = pytest.mark.usefixtures("library")


def test_sampler_draws_from_the_distribution_it_says() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32)).repeat(4000, axis=0)
    sampler = Sampler(Sampling(temperature=1.0, top_p=0.9))
    assert sampler.probabilities(logits[:1])[0, 3] == 0
    counts = Counter(sampler(logits).tolist())
    assert counts[3] == 0
    for token, share in enumerate((0.5, 0.3, 0.15)):
        assert abs(counts[token] / 4000 - share / 0.95) < 0.03
    assert set(Sampler(Sampling(temperature=1.0, top_k=2))(logits).tolist()) == {0, 1}
    assert set(Sampler(Sampling(temperature=1.0, top_p=1e-9))(logits).tolist()) == {0}
    assert set(Sampler(Sampling())(logits).tolist()) == {0}


def test_the_knobs_are_those_of_transformers_in_its_order() -> None:
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process as theirs

    logits = np.random.default_rng(11).standard_normal((5, 200)).astype(np.float32) * 3
    held = np.random.default_rng(12).integers(0, 200, (5, 30))
    present = np.zeros((5, 200), np.bool_)
    np.put_along_axis(present, held, True, axis=1)
    for k, p, m, penalty in ((0, 1.0, 0.1, 1.0), (40, 0.9, 0.05, 1.3), (0, 0.7, 0.0, 0.8), (5, 1.0, 0.3, 2.0)):
        chain = [theirs.RepetitionPenaltyLogitsProcessor(penalty), theirs.TemperatureLogitsWarper(0.7)]
        chain += [theirs.TopKLogitsWarper(k)] if k else []
        chain += [theirs.TopPLogitsWarper(p)] if p < 1 else []
        chain += [theirs.MinPLogitsWarper(m)] if m else []
        expected = LogitsProcessorList(chain)(torch.tensor(held), torch.tensor(logits)).softmax(-1).numpy()
        sampler = Sampler(Sampling(0.7, k, p, 0, m, penalty), present)
        found = sampler.probabilities(sampler._penalized(logits))
        np.testing.assert_allclose(found / found.sum(-1, keepdims=True), expected, atol=1e-6)
        assert ((found > 0) == (expected > 0)).all()


def test_repetition_is_penalized_in_greedy_text_too(tmp_path: Path) -> None:
    """A penalty so high that no token comes twice, those of the prompt and of earlier turns included."""
    folder = Tiny().write_all(tmp_path, eos_token_id=[])
    free = generate_text(folder, "Anne", max_new_tokens=40).tokens
    assert len(set(free)) < 40
    penalized = generate_text(folder, "Anne", max_new_tokens=40, repetition_penalty=1e9).tokens
    prompt = load_tokenizer(folder).encode("Anne").ids
    assert len({*penalized, *prompt}) == 40 + len(set(prompt))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1},
        {"min_p": -0.1}, {"min_p": 1.1}, {"repetition_penalty": 0.0}, {"seed": -1},
    ],
)  # fmt: skip
def test_bad_sampling_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(SkvError, match=next(iter(options))):
        Sampling(**options)  # type: ignore[arg-type]
