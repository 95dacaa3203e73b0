"""A hook of mkdocs: links to files outside docs/, which the site does not have, become the files' names."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"\[[^\]]*\]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Returns a page's text with such links as names in the repository."""
    return _OUTSIDE.sub(r"`\1`", markdown)
