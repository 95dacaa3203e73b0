"""Form of the documentation: lines of text end by column 120, and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_models import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def text_lines(page: Path) -> list[tuple[int, str]]:
    """Numbered lines of text: neither code nor tables."""
    lines, code = [], False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        code ^= line.startswith("```")
        if not code and not line.startswith("    ") and not line.lstrip().startswith("|"):
            lines.append((number, line))
    return lines


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_wrapped(page: Path) -> None:
    assert [f"{page.name}:{number}" for number, line in text_lines(page) if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("suffix", ["py", "h", "cuh", "cc", "cu"])
def test_files_say_in_their_first_line_what_they_do(suffix: str) -> None:
    for path in sorted((ROOT / "skv_export").rglob(f"*.{suffix}")):
        first = next(iter(path.read_text(encoding="utf-8").splitlines()), "")
        assert first.startswith(('"""', "// ", "#include")), path
        assert "Owns" not in first, path
