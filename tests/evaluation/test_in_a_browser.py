"""Both reports, laid out by headless Chromium on a phone, a tablet and a desk, in light and dark: what people see."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from skv_export.analysis import html_report as analysis_report
from skv_export.analysis import pipeline
from skv_export.evaluation import html_report as quality_report
from skv_export.evaluation.comparison import CandidateResult, ComparisonResult

WIDTHS = (360, 768, 1280)
CHECK = (Path(__file__).parent / "check_layout.js").read_text(encoding="utf-8")

pytestmark = pytest.mark.slow


def quality_page() -> str:
    """A report with what is hard to lay out: many rows, some alike, long names."""
    names = ["near-lossless", "balanced", "small", "smallest", "K8V8", "K2V2, 8-bit parameters, 32 recent"]
    names += [f"K{k}V{v}" for k in (2, 3, 4, 5) for v in (2, 3, 4)]
    rows = []
    for i, name in enumerate(names):
        bits, loss = 2.4 + 0.33 * (i % 9), 0.04 * 0.3 ** (i % 9) + 0.0001 * i
        parts = [100 * loss * (1 + 0.3 * j) for j in range(8)]
        rows.append(
            CandidateResult(
                name,
                "",
                bits,
                20 * (1 + loss),
                20.0,
                100 * loss,
                10 * loss,
                loss,
                loss / 9,
                9 * loss,
                80 * loss,
                1 - loss,
                parts,
                [loss] * 8,
                16,
                16_000,
            )
        )
    return quality_report.html(ComparisonResult("org/" + "a-rather-long-model-name-" * 3, "0", 1024, rows))


@pytest.fixture(scope="module")
def pages(tiny_checkpoint: Callable[..., Path]) -> dict[str, str]:
    found = pipeline.analyze(tiny_checkpoint("llama"), target=pipeline.Target(budget=5.0, context=4096))
    return {"quality": quality_page(), "analysis": analysis_report.html(found)}


def faults(page: str, folder: Path, *, dark: bool = False) -> dict[str, list[str]]:
    """What the browser finds wrong with a page, by width."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("chromium: not installed (.ci/install adds it)")
    # Frames, as a window can't be as narrow as a phone.
    frames = "".join(
        f'<iframe width="{w}" height="900" srcdoc="{html.escape(page, quote=True)}"></iframe>' for w in WIDTHS
    )
    style = "<style>:root { color-scheme: light dark; }</style>"
    source = folder / "frames.html"
    source.write_text(f"<!doctype html>{style}{frames}<pre id=found></pre><script>{CHECK}</script>", encoding="utf-8")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--dump-dom", "--virtual-time-budget=10000", "--window-size=1400,1000"]
    # Blink's own numbers: 0 is dark, 1 is light.
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", source.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    (text,) = re.findall(r"<pre id=\"found\">(.*?)</pre>", done.stdout, flags=re.DOTALL)
    found = json.loads(html.unescape(text))
    assert [frame["width"] for frame in found] == list(WIDTHS)
    assert all(frame["dark"] == dark and frame["texts"] > 40 for frame in found)
    return {f"{frame['width']} pixels": frame["faults"] for frame in found}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["quality", "analysis"])
def test_nothing_covers_overflows_or_is_too_small(pages: dict[str, str], name: str, dark: bool, tmp_path: Path) -> None:
    assert faults(pages[name], tmp_path, dark=dark) == {f"{width} pixels": [] for width in WIDTHS}


def test_what_is_wrong_is_found(pages: dict[str, str], tmp_path: Path) -> None:
    page = pages["quality"]
    wrong = {
        "below 11 pixels": page.replace("min-width: 640px", "min-width: 0"),
        "covers": page.replace("<h2>Figures", '<svg viewBox="0 0 99 40" width=99><text y=20>abc</text>'
                               "<text x=4 y=22>def</text></svg><h2>Figures"),
        "wider than the page": page.replace("<div class=scroll>", "<div>"),
        "outside its drawing": page.replace("<h2>Figures", '<svg viewBox="0 0 99 40" width=99><text x=90 y=20>abcdefgh'
                                            "</text></svg><h2>Figures"),
        "contrast": page.replace("--soft: #5c646e", "--soft: #d0d0d0"),
    }  # fmt: skip
    for fault, changed in wrong.items():
        assert changed != page
        assert any(fault in each for each in faults(changed, tmp_path)["360 pixels"]), fault
