"""docs/spec.md: its tables and its worked example agree with the code."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tiny_models import ROOT

from skv_export.spec import layout, quantizer, recipe
from skv_export.spec.layout import CacheLayout

PAGE = (ROOT / "docs" / "spec.md").read_text(encoding="utf-8")
NATIVE = ROOT / "skv_export" / "native" / "ort"


def rows(heading: str) -> list[list[str]]:
    """Cells of the first table after a heading, without its header."""
    section = PAGE.split(f"\n## {heading}\n" if f"\n## {heading}\n" in PAGE else f"\n### {heading}\n")[1]
    table = re.search(r"(?:^ *\|.*\n)+", section, flags=re.MULTILINE)
    assert table is not None, heading
    lines = table.group().splitlines()[2:]
    return [[cell.strip().replace("`", "") for cell in line.strip().strip("|").split("|")] for line in lines]


def test_inputs_are_those_of_the_op() -> None:
    source = (NATIVE / "op.cc").read_text(encoding="utf-8")
    body = source.split("kInputNames[kNumInputs] = {")[1].split("};")[0]
    names = re.findall(r'"([^"]+)"', body)
    table = rows("Inputs")
    assert [int(row[0]) for row in table] == list(range(len(names)))
    assert [row[1] or f"input {row[0]}" for row in table] == names


def test_attributes_are_those_of_the_op() -> None:
    source = (NATIVE / "attributes.cc").read_text(encoding="utf-8")
    read = set(re.findall(r'reader\.(?:choice|integer|real|text|required|required_count)\("(\w+)"', source))
    for pair in re.findall(r'name\("(k_\w+)", "(v_\w+)"\)', source):
        read |= set(pair)
    assert {name for row in rows("Attributes") for name in row[0].split(", ")} == read


def test_attributes_have_the_recipes_defaults_and_choices() -> None:
    defaults = recipe.LayerConfig()
    table = {name: row for row in rows("Attributes") for name in row[0].split(", ")}
    choices = {"bits": recipe.BITS, "granularity": recipe.GRANULARITIES, "rotation": recipe.ROTATIONS}
    for name, row in table.items():
        if not hasattr(defaults, name):
            continue
        if row[2] != "required":
            assert row[2] == str(getattr(defaults, name)), name
        for choice in choices.get(name[2:], ()):
            assert re.search(rf"\b{choice}\b", row[3]), (name, choice)


def test_attributes_have_the_layouts_ranges() -> None:
    table = {row[0]: row[3] for row in rows("Attributes")}
    for name, (low, high) in {
        "num_sink_tokens": (0, recipe.MAX_KEPT_TOKENS),
        "recent_tokens": (0, recipe.MAX_KEPT_TOKENS),
        "local_window_size": (-1, layout.MAX_WINDOW),
    }.items():
        assert table[name].startswith(f"{low} ... {high}"), name
    assert table["tile_tokens"] == ", ".join(map(str, recipe.TILE_TOKENS))
    assert f"1 ... {recipe.MAX_HEAD_DIM}" in PAGE


def test_planes() -> None:
    assert {int(row[0]): tuple(int(p) for p in row[1].split(", ")) for row in rows("Tile")} == layout.PLANES


def test_steps_of_a_gaussian() -> None:
    section = PAGE.split("### Granularity `token`\n")[1]
    bits, steps = (re.search(rf"^ *\| {name} \|(.*)\|$", section, flags=re.MULTILINE) for name in ("b", "c_b"))
    assert bits is not None and steps is not None
    pairs = zip(bits.group(1).split("|"), steps.group(1).split("|"), strict=True)
    assert {int(b): float(step) for b, step in pairs} == quantizer.MIDRISE_STEP


@pytest.mark.parametrize("row", rows("Sizes by example"), ids=" ".join)
def test_sizes(row: list[str]) -> None:
    tensor, bits, granularity, parameter_bits, tile_bytes, width = row
    one = CacheLayout(128, int(bits), granularity, "none", 64, 4, 64, 64, "float16", tensor == "value", 0,
                      int(parameter_bits))  # fmt: skip
    assert (one.tile_bytes, one.width) == (int(tile_bytes), int(width))


@pytest.mark.parametrize("granularity", recipe.GRANULARITIES)
@pytest.mark.parametrize("parameter_bits", recipe.PARAMETER_BITS)
@pytest.mark.parametrize("head_dim", [32, 80, 128, 256])
def test_bytes_of_parameters(granularity: str, parameter_bits: int, head_dim: int) -> None:
    if parameter_bits == 8 and granularity != "channel":
        return
    one = CacheLayout(head_dim, 4, granularity, "none", 32, 4, 64, 64, "float16", False, 0, parameter_bits)
    section = PAGE.split("Then the parameters:")[1]
    name = f"`{granularity}`" + (", 8-bit parameters" if parameter_bits == 8 else "")
    line = next(line for line in section.splitlines() if line.startswith(f"| {name} |"))
    formula = line.strip("| ").split("|")[-1].strip(" `").replace("ceil(D/128)", "-(-D // 128)")
    names: dict[str, Any] = {"D": one.padded_dim, "T": one.tile_tokens, "g": one.group_size}
    assert eval(formula, {"__builtins__": {}}, names) == one.parameter_bytes


def test_the_tiles_bytes() -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    tiles: dict[str, Any] = {}
    exec(program, tiles)
    for name in ("key_tile", "value_tile"):
        table = re.search(rf"^\| {name} \|.*\n(?:\|.*\n)+", PAGE, flags=re.MULTILINE)
        assert table is not None
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.group().splitlines()[2:]]
        assert lines[-1][:2] == [str(tiles[name].size), "end"]
        for start, content, expected in lines[:-1]:
            given = bytes.fromhex(expected)
            assert tiles[name][int(start) :][: len(given)].tobytes() == given, (name, content)
