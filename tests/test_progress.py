"""Progress: a bar on a terminal, a line per phase elsewhere, on standard error; the paths that users give."""

from __future__ import annotations

import io
import sys

import pytest

from skv_export.errors import SkvError
from skv_export.paths import to_path
from skv_export.progress import Progress, set_quiet, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def steps() -> None:
    with Progress() as progress:
        for phase in ("reading", "writing", "reading"):
            for done in range(101):
                progress(phase, done, 100)
    assert list(track(range(3), "op")) == [0, 1, 2]


def test_off_a_terminal_each_phase_is_one_line_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    steps()
    out, err = capsys.readouterr()
    assert (out, err.splitlines()) == ("", ["reading", "writing", "op"])


def test_on_a_terminal_a_bar_is_drawn_and_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    steps()
    text = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "reading:   0%" in text and "op:" in text and text.endswith(" \r") and "\n" not in text


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    set_quiet()
    try:
        steps()
    finally:
        set_quiet(False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("value", [None, 5, b"x", "", "a\0b", "x" * 256, "y/" * 3000, "~no-such-user/x", "\ud800"])
def test_paths_that_no_file_system_holds(value: object) -> None:
    with pytest.raises(SkvError, match="checkpoint"):
        to_path(value, "checkpoint")
