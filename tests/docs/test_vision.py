"""docs/vision.md: its programs run as they stand, and what they print is what transformers' whole model generates."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import ROOT
from vision_models import CONFIGS, IMAGE, make_vision_model

from skv_export.export import vision_language
from skv_export.export.pipeline import export_model
from skv_export.spec.recipe import Recipe

TEXT = (ROOT / "docs" / "vision.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_programs_run_as_they_stand(library: Path, tmp_path: Path) -> None:
    model = make_vision_model(tmp_path / "llava-checkpoint", "llava")
    exact = Recipe().with_options(k_bits=16, v_bits=16, recent_type="float")
    export_model(tmp_path / "llava-checkpoint", out=tmp_path / "llava-k4v2", recipe=exact, progress=lambda *_: None)
    ids = [11, 12, *[IMAGE] * 16, 40, 41]
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    np.save(tmp_path / "pixels.npy", pixels.numpy())
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    for program in PROGRAMS:
        command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{program}"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    expected = []
    with torch.no_grad():
        for _ in range(20):
            logits = model(input_ids=torch.tensor([[*ids, *expected]]), pixel_values=pixels).logits
            expected.append(int(logits[0, -1].argmax()))
    assert json.loads(result.stdout) == expected


def test_the_page_names_what_is_exported_and_what_is_refused() -> None:
    (tested,) = re.findall(r"images: (.*?) with text only", TEXT, re.DOTALL)
    assert set(re.findall(r"[a-z]+[\w]*\d?\w*", tested)) - {"and"} == set(CONFIGS) == set(vision_language.TOWERS)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"{kind}" in readme for kind in vision_language.TOWERS)
