"""Recipes: TOML in and out, per-layer overrides, flags on top, and what is refused."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skv_export.errors import SkvError
from skv_export.spec.recipe import BITS, LayerConfig, LayerOverride, Recipe, shipped_recipes


def from_toml(text: str) -> Recipe:
    return Recipe.from_dict(tomllib.loads(text))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # neither may depend on a machine's load
@given(
    st.sampled_from(BITS),
    st.sampled_from(["none", "hadamard"]),
    st.sampled_from(["fp32", "fp16", "bf16"]),
    st.text(max_size=40).filter(lambda s: s.isprintable()),
    st.lists(st.tuples(st.integers(0, 99), st.sampled_from(BITS)), max_size=4),
)
def test_toml_round_trip(bits: int, rotation: str, dtype: str, description: str, layers: list[tuple[int, int]]) -> None:
    recipe = Recipe(
        default=LayerConfig(k_bits=bits, k_rotation=rotation),
        overrides=tuple(LayerOverride((i, i + 1), (("v_bits", b),)) for i, b in layers),
        dtype=dtype,
        description=description,
    )
    assert from_toml(recipe.to_toml()) == recipe


def test_overrides_hold_for_their_layers_and_the_later_wins() -> None:
    recipe = from_toml("k_bits = 4\n[[layers]]\nindex = [0, 2]\nk_bits = 8\n[[layers]]\nindex = 2\nv_bits = 3")
    assert [(c.k_bits, c.v_bits) for c in recipe.layers(4)] == [(8, 2), (4, 2), (8, 3), (4, 2)]


def test_a_flag_wins_over_the_recipe_and_its_overrides() -> None:
    recipe = from_toml("k_bits = 4\n[[layers]]\nindex = 0\nk_bits = 8\nv_bits = 3").with_options(k_bits=2, dtype="fp16")
    assert [(c.k_bits, c.v_bits) for c in recipe.layers(2)] == [(2, 3), (2, 2)]
    assert recipe.dtype == "fp16"
    assert recipe.with_options(k_bits=None) == recipe


def test_per_layer_bits_become_a_default_and_overrides() -> None:
    bits = [(8, 4), (4, 2), (4, 2), (3, 2)]
    recipe = Recipe.per_layer(bits)
    assert [(c.k_bits, c.v_bits) for c in recipe.layers(4)] == bits
    assert recipe.default.name == "K4V2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k_bits = 7", "k_bits; got 7; expected one of 1, 2, 3, 4, 5, 6, 8, 16"),
        ("k_bits = 4.0", r"k_bits; got 4\.0"),
        ("k_bits = true", "k_bits; got True"),
        ("k_bits = '4'", "k_bits; got '4'"),
        ("nbits = 4", "recipe: unknown key nbits; expected k_bits"),
        ("v_group_size = 48", "v_group_size; got 48; expected a multiple of 32"),
        ("recent_tokens = -1", "recent_tokens; got -1; expected an integer from 0 to 4096"),
        ("dtype = 'int8'", "dtype; got 'int8'; expected one of fp32, fp16, bf16"),
        ("description = 3", "description; got int; expected a string"),
        ("layers = 3", r"layers; got int; expected an array of tables"),
        ("[[layers]]\nk_bits = 4", r"recipe: \[\[layers\]\] 1: index; got None"),
        ("[[layers]]\nindex = [-1]", r"recipe: \[\[layers\]\] 1: index; got \[-1\]"),
        ("[[layers]]\nindex = 0\nrecent_tokens = 4", "unknown key recent_tokens"),
        ("[[layers]]\nindex = 0\nk_bits = 7", r"recipe: \[\[layers\]\] 1: k_bits; got 7"),
        (
            "[[layers]]\nindex = 0\nk_bits = 8\n[[layers]]\nindex = 1\nkbits = 4",
            r"recipe: \[\[layers\]\] 2: unknown key kbits; expected k_bits.*\. kbits: did you mean k_bits\?",
        ),
        (
            "vbits = 4\nkbits = 4",
            r"keys kbits, vbits; .*kbits: did you mean k_bits\? vbits: did you mean v_bits",
        ),
        ("k_granularity = 'chanel'", r"recipe: k_granularity; got 'chanel'; .*\. chanel: did you mean channel\?"),
        ("k_bits = '4'", r"got '4'; .*\. Write the number without quotes\."),
        ("quantize_head = 1", "recipe: quantize_head; got 1; expected true or false"),
        ("xyz = 1", "recipe: unknown key xyz; expected k_bits.*description, layers$"),
    ],
)
def test_what_is_refused_and_how(text: str, message: str) -> None:
    with pytest.raises(SkvError, match=message):
        from_toml(text)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(SkvError, match="no such file"):
        Recipe.load(tmp_path / "none.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text("k_bits = ")
    with pytest.raises(SkvError, match="not valid TOML"):
        Recipe.load(bad)
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(SkvError, match="not valid TOML"):
        Recipe.load(bad)
    bad.write_text("#" * (1 << 20) + "#")
    with pytest.raises(SkvError, match="too large"):
        Recipe.load(bad)


def test_a_layer_that_the_model_does_not_have() -> None:
    with pytest.raises(SkvError, match=r"got index \[30\]; expected 0 ... 29"):
        from_toml("[[layers]]\nindex = 30\nk_bits = 8").layers(30)


def test_every_shipped_recipe_loads_and_says_what_it_is_for() -> None:
    found = shipped_recipes()
    assert found
    for name, path in found.items():
        recipe = Recipe.load(path)
        assert recipe.description, name


def test_measured_recipes_say_of_what_model_by_which_command_and_what_was_measured() -> None:
    found = {name: path for name, path in shipped_recipes().items() if name.startswith("measured/")}
    assert found
    for path in found.values():
        head = path.read_text(encoding="utf-8").partition("\n\n")[0]
        model = re.search(r"^# model: .*, (\d+) layers$", head, re.MULTILINE)
        assert model and "# command: skv-export analyze" in head and "# held-out prose" in head
        assert "# revision: " in head, path
        Recipe.load(path).layers(int(model[1]))


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LayerConfig().k_bits = 8  # type: ignore[misc]


@pytest.mark.parametrize("text", ["k_bits = " + "9" * 5000, "x = " + "[" * 5000, "k_bits = \xff".encode("latin-1")])
def test_what_is_no_toml_is_a_clear_error(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SkvError, match="not valid TOML"):
        Recipe.load(path)
