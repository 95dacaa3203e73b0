"""Tokenizers of exported folders: read raw, they give transformers' ids; what is wrong shows before the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_gguf
from tiny_models import tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from skv_export.checkpoints.checkpoint import Source, resolve
from skv_export.checkpoints.tokenizer import load_tokenizer
from skv_export.errors import SkvError
from skv_export.export import pipeline
from skv_export.model_folder.tokenizer import TEXTS, difference, write_tokenizer
from skv_export.runtime.session import Session

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def bpe() -> Tokenizer:
    """A byte-level BPE, trained on the spread of texts."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny llama with a tokenizer."""
    folder = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "checkpoint")
    bpe().save(str(folder / "tokenizer.json"))
    configure(folder)
    return folder


def configure(folder: Path, **changes: Any) -> None:
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **changes}
    text = json.dumps({key: value for key, value in values.items() if value is not None})
    (folder / "tokenizer_config.json").write_text(text)


def written(checkpoint: Path, folder: Path) -> Tokenizer:
    """What a runtime reads of the folder that is written for a checkpoint; held to transformers' ids here too."""
    folder.mkdir()
    source = Source("safetensors", checkpoint)
    assert write_tokenizer(source, folder)
    assert difference(load_tokenizer(source), folder) is None
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for tokenizer in (AutoTokenizer.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(folder)):
        for text in TEXTS:
            assert raw.encode(text).ids == tokenizer(text)["input_ids"]
    return raw


def test_files_are_copied_as_they_are(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    written(checkpoint, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (checkpoint / name).read_bytes()


def test_truncation_and_padding_stay_behind(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = bpe()
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    assert len(tokenizer.encode(TEXTS[3]).ids) == 16
    raw = written(checkpoint, tmp_path / "out")
    assert raw.truncation is None and raw.padding is None
    assert len(raw.encode(TEXTS[-1]).ids) > 500


def test_a_begin_that_only_another_file_names(checkpoint: Path, tmp_path: Path) -> None:
    """The tokenizer's own file says nothing of a token before each text; tokenizer_config.json and transformers do."""
    configure(checkpoint, tokenizer_class="LlamaTokenizer", add_bos_token=True)
    raw = written(checkpoint, tmp_path / "out")
    with_bos = AutoTokenizer.from_pretrained(checkpoint)("Hello")["input_ids"]
    assert raw.encode("Hello").ids == with_bos


def test_chats_begin_with_a_token_of_special_tokens_map(checkpoint: Path, tmp_path: Path, library: Path) -> None:
    configure(checkpoint, bos_token=None, eos_token=None)
    (checkpoint / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    expected = AutoTokenizer.from_pretrained(checkpoint).apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )
    out = pipeline.export_model(checkpoint, out=tmp_path / "out", progress=lambda phase, fraction: None)
    assert Session(out).chat_prompt([{"role": "user", "content": "Hi"}]) == expected == "<s>[user]Hi"


def test_every_one_of_several_chat_templates_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    templates = {"tool_use": "tools", "default": TEMPLATE, "../escaped": "x"}
    configure(checkpoint, chat_template=[{"name": name, "template": text} for name, text in templates.items()])
    written(checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert loaded == {"default": TEMPLATE, "tool_use": "tools"}  # a name is never a way out of the folder
    assert not list(tmp_path.rglob("*escaped*"))


def test_a_checkpoint_without_a_tokenizer(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    assert not write_tokenizer(Source("safetensors", tiny_checkpoint("llama")), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_difference_is_found_and_named(checkpoint: Path, tmp_path: Path) -> None:
    original = load_tokenizer(Source("safetensors", checkpoint))
    other = bpe()
    other.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    other.save(str(tmp_path / "tokenizer.json"))
    assert difference(original, tmp_path) == ("", [1], [])
    other.post_processor = None
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    other.save(str(tmp_path / "tokenizer.json"))
    found = difference(original, tmp_path)
    assert found is not None and found[0] in TEXTS and found[1] != found[2]


def test_what_transformers_cannot_load_is_said_before_the_weights(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Path
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the weights were read")

    for name in ("tensor", "row_blocks"):
        monkeypatch.setattr(pipeline.Weights, name, fail)
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer.model").write_bytes(b"\x0a\x00")
    configure(checkpoint, tokenizer_class="LlamaTokenizer")
    with pytest.raises(SkvError, match=r"can't load its tokenizer.*no tokenizer\.json: convert it"):
        pipeline.export_model(checkpoint, out=tmp_path / "out", progress=lambda phase, fraction: None)


# GGUF.


def gguf_with(tmp_path: Path, **keys: Any) -> Path:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    return write_gguf(tmp_path / "model.gguf", "llama", model, tokenizer=keys)


def test_tokenizer_of_a_gguf_file(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(resolve(gguf_with(tmp_path)))
    assert tokenizer.decode(tokenizer("the answer and 12</s>")["input_ids"]) == "the answer and 12</s>"
    (tmp_path / "out").mkdir()
    assert write_tokenizer(resolve(tmp_path / "model.gguf"), tmp_path / "out")
    raw = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert raw.encode("the answer </s>").ids == tokenizer("the answer </s>")["input_ids"]


def test_digits_stand_apart_where_the_file_says_so(tmp_path: Path) -> None:
    merges = ["1 2", "t h"]
    joined = load_tokenizer(resolve(gguf_with(tmp_path / "a", pre="gpt-2", merges=merges)))
    apart = load_tokenizer(resolve(gguf_with(tmp_path / "b", pre="smollm", merges=merges)))
    assert joined.tokenize("th12") == ["th", "12"] and apart.tokenize("th12") == ["th", "1", "2"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"merges": None}, r"not whole; got no tokenizer\.ggml\.merges"),
        ({"pre": "brand-new"}, r"tokenizer\.ggml\.pre.*got 'brand-new'"),
        ({"pre": None}, r"tokenizer\.ggml\.pre.*got None"),
        ({"model": "rwkv"}, "can't load its tokenizer.*rwkv"),
    ],
)
def test_gguf_tokenizers_that_cannot_be_read(keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(SkvError, match=said):
        load_tokenizer(resolve(gguf_with(tmp_path, **keys)))


def test_a_gguf_file_without_a_tokenizer(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    assert load_tokenizer(resolve(write_gguf(tmp_path / "model.gguf", "llama", model))) is None
