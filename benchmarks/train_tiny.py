"""Trains the tiny models that recommendations are held to: one per kind of attention, a few minutes each on a CPU.

    python benchmarks/train_tiny.py FOLDER [--only qk_norm,bias] [--steps 200]

Each kind becomes a checkpoint, FOLDER/KIND, with a tokenizer of its own: 4 layers, 0.7 to 1 million parameters, trained
on Python's language reference as the standard library ships it (``pydoc_data.topics``). Seeds are fixed; sums in
another order (threads, versions of torch) still give other weights, so figures are reproducible in kind, not in digits.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY, LAYERS, WINDOW, BATCH = 1024, 4, 256, 4
PEAK_LEARNING_RATE, WARMUP = 3e-3, 40
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_MIXED = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "qk_norm": ("qwen3", {}),
    "bias": ("qwen2", {}),
    "mqa_window": (
        "gemma3_text",
        {"num_key_value_heads": 1, "layer_types": _MIXED, "sliding_window": 128, "query_pre_attn_scalar": 32},
    ),
    "no_rope": ("gpt2", {"n_inner": 384}),
}
"""Kind to architecture and what it sets beyond the sizes that all share."""


def corpus() -> str:
    """Python's language reference, in the order of its topics."""
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def unigram_entropy(ids: torch.Tensor) -> float:
    """Returns the nats per token that a model would lose which knew how frequent each token is, and nothing else."""
    shares = torch.bincount(ids).double() / len(ids)
    return -float(torch.special.xlogy(shares, shares).sum())


def train(kind: str, ids: torch.Tensor, steps: int) -> Any:
    """Trains one model with AdamW, a warm-up and a cosine decay; prints the loss as it goes."""
    architecture, options = KINDS[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**_SIZES, **options})
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.05, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(1)
    start = time.perf_counter()
    for step in range(steps):
        decay = (1 + math.cos(math.pi * max(0, step - WARMUP) / max(1, steps - WARMUP))) / 2
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * max(decay, 0.05)
        places = torch.randint(len(ids) - WINDOW, (BATCH,), generator=generator)
        batch = torch.stack([ids[place : place + WINDOW] for place in places.tolist()])
        loss = model(batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"{kind} {step + 1}/{steps}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    return model


def main() -> None:
    """Parses, trains, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=",".join(KINDS), help="Kinds, separated by commas.")
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    text = corpus()
    tokenizer = train_tokenizer(text)
    ids = torch.tensor(tokenizer(text).input_ids)
    print(f"{len(ids)} tokens; entropy of single tokens {unigram_entropy(ids):.3f} nats", flush=True)
    for kind in given.only.split(","):
        model = train(kind, ids, given.steps)
        model.save_pretrained(given.folder / kind)
        tokenizer.save_pretrained(given.folder / kind)


if __name__ == "__main__":
    main()
