"""A tokenizer and a text for tests that predict text with a tiny model."""

from __future__ import annotations

TEXT = "".join(chr(97 + (i * i // 7 + i // 3) % 26) + (" " if i % 6 == 0 else "") for i in range(2000))


class Letters:
    """A tokenizer of one token per character, that begins every text with token 1."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [3 + ord(c) % 300 for c in text]
        return [1, *ids] if add_special_tokens else ids
