"""Wrong arguments of the Python API: whatever is passed, the answer is a result or a SkvError."""

from __future__ import annotations

import collections
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tiny_graph import Tiny

import skv_export
from skv_export.analysis.pipeline import MeasureOptions, Target, analyze
from skv_export.arguments import check_fields, checked
from skv_export.errors import SkvError
from skv_export.export.pipeline import export_model, plan
from skv_export.integrations.transformers_cache import SkvCache
from skv_export.integrations.transformers_model import SkvForCausalLM
from skv_export.runtime.cache import Cache
from skv_export.runtime.sampling import Sampling
from skv_export.runtime.session import Session
from skv_export.spec.recipe import LayerConfig, Recipe
from skv_export.verification.graph_level import Tolerance
from skv_export.verification.quality_level import Thresholds
from skv_export.verification.run import verify

if TYPE_CHECKING:
    from collections import Counter


class Odd:
    """No argument of anything."""


# The decorator.


@checked
def example(
    count: int = 0,
    ratio: float | None = None,
    *,
    flag: bool = False,
    name: str = "",
    place: str | Path = "",
    rows: Sequence[Sequence[int]] = (),
    pair: tuple[int, int] = (0, 0),
    table: Mapping[str, int] | None = None,
    call: Callable[[int], int] | None = None,
    seen: Counter[str] | None = None,
    **others: Any,
) -> tuple[Any, ...]:
    return count, ratio, flag, name, place, rows, pair, table, call, seen, others


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("count", 3), ("count", np.int64(3)), ("ratio", 2), ("ratio", 0.5), ("ratio", np.float32(0.5)), ("ratio", None),
        ("ratio", float("inf")), ("flag", True), ("flag", np.True_), ("place", "x"), ("place", Path("x")),
        ("rows", [[1, 2], (3,)]), ("rows", np.ones((2, 2), np.int64)), ("pair", (1, 2)), ("pair", [1, 2]),
        ("table", {"x": 1}), ("call", len), ("seen", collections.Counter("xx")), ("anything", Odd()),
    ],
)  # fmt: skip
def test_what_fits_its_annotation_passes_unchanged(parameter: str, value: Any) -> None:
    got = example(**{parameter: value})
    names = list(inspect.signature(example).parameters)[:-1]
    assert (got[-1].get(parameter) if parameter not in names else got[names.index(parameter)]) is value


@pytest.mark.parametrize(
    ("parameter", "value", "message"),
    [
        ("count", 1.0, "count; got float 1.0; expected a whole number"),
        ("count", True, "count; got True; expected a whole number"),
        ("count", "3", "count; got str '3'; expected a whole number"),
        ("ratio", float("nan"), "ratio; got float nan; expected a number or None"),
        ("ratio", False, "ratio; got False; expected a number or None"),
        ("flag", 1, "flag; got int 1; expected True or False"),
        ("name", b"x", "name; got bytes b'x'; expected a text"),
        ("place", 3, "place; got int 3; expected a path, as str or pathlib.Path"),
        ("rows", [1, 2], r"rows; got list \[1, 2\]; expected a list, each a list of whole numbers"),
        ("rows", "12", "rows; got str '12'; expected a list, each a list of whole numbers"),
        ("rows", [[0.5]], r"rows; got list \[\[0.5\]\]; expected a list, each a list of whole numbers"),
        ("pair", (1, 2, 3), r"pair; got tuple \(1, 2, 3\); expected a tuple of 2"),
        ("table", [("x", 1)], r"table; got list \[\('x', 1\)\]; expected a dict or None"),
        ("call", 3, "call; got int 3; expected a function or None"),
        ("seen", {"x": 1}, r"seen; got dict \{'x': 1\}; expected Counter or None"),
    ],
)
def test_what_does_not_fit_is_named(parameter: str, value: Any, message: str) -> None:
    with pytest.raises(SkvError, match=f"^{message}$"):
        example(**{parameter: value})


def test_names_that_a_function_does_not_have_are_pythons_own_error() -> None:
    with pytest.raises(TypeError, match="too many positional"):
        example(1, 2.0, 3)  # type: ignore[misc]


def test_a_value_whose_repr_fails_is_named_by_its_type() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise ValueError("no")

    with pytest.raises(SkvError, match="count; got Broken <Broken>; expected a whole number"):
        example(Broken())  # type: ignore[arg-type]


def test_names_are_those_of_the_function_that_a_decorator_wraps() -> None:
    @checked
    @torch.no_grad()
    def decorated(rows: Sequence[Odd] = ()) -> int:
        return len(rows)

    assert decorated([Odd()]) == 1
    with pytest.raises(SkvError, match=r"rows; got list \[1\]; expected a list, each Odd"):
        decorated([1])  # type: ignore[list-item]


def test_fields_of_a_dataclass() -> None:
    @dataclass(frozen=True)
    class Options:
        most: int = 1

        def __post_init__(self) -> None:
            check_fields(self)

    Options(2)
    with pytest.raises(SkvError, match=r"most; got float 2\.5"):
        Options(2.5)  # type: ignore[arg-type]


# The public API: every parameter.

NEEDED: dict[str, Any] = {
    "source": "x", "checkpoint": "x", "out": "x", "folder": "x", "model": "x", "repo_id": "x/y", "save_directory": "x",
    "path": "x", "cache": Cache.__new__(Cache), "session": Session.__new__(Session), "attention_mask": None,
    "inputs_embeds": np.zeros((1, 1, 4), np.float32),
    "position_ids": None, "input_ids": torch.ones(1, 1, dtype=torch.int64), "batch": 1, "slots": 1, "rows": [[1]],
    "length": 1, "present": [[1]], "prompts": [[1]], "messages": [], "num_hidden_layers": 1, "bits": [(4, 2)],
    "values": {}, "index": 0, "n": 1, "b": 0, "layer": 0, "name": "key", "states": [], "new": [], "tokens": [],
    "longest": 1, "key": (0, "key"), "tokens_to_remove": -1, "beam_idx": torch.zeros(1, dtype=torch.int64),
    "indices": torch.zeros(1, dtype=torch.int64), "repeats": 1, "keep": 100,
}  # fmt: skip
"""Something that fits, for each parameter without a default."""
FREE = {"dtype", "torch_dtype", "device_map", "trust_remote_code", "labels", "return_dict"}
"""Parameters that several kinds of values have a meaning for: their functions tell them apart."""
INTERNAL = {
    "belongs_to", "bind", "restore_tensor", "begins", "append_columns", "prefill", "keep", "check_ids", "run_columns",
    "check_cache", "become",
}  # fmt: skip
CLASSES = (Session, Cache, SkvForCausalLM, Recipe)
FUNCTIONS = (analyze, export_model, plan, verify)


def api() -> list[tuple[str, Callable[..., Any]]]:
    found = [(f.__name__, f) for f in FUNCTIONS]
    for kind in CLASSES:
        for name, member in vars(kind).items():
            function = getattr(member, "__func__", member)
            refuses = "NoReturn" in str(getattr(function, "__annotations__", {}).get("return"))
            if inspect.isfunction(function) and name not in INTERNAL and not refuses and not name.startswith("_"):
                found.append((f"{kind.__name__}.{name}", function))
    return [*found, ("Session", Session.__init__)]


def annotated(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters whose types the API promises."""
    return [
        p
        for p in inspect.signature(function).parameters.values()
        if p.name not in ("self", "cls", *FREE)
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        and not any(free in str(p.annotation) for free in ("ArrayLike", "Any"))
    ]


CASES = [
    (name, function, p)
    for name, function in api()
    for p in annotated(function)
    if name not in ("SkvForCausalLM.prepare_inputs_for_generation", "Recipe.load", "Recipe.find")
]


@pytest.mark.parametrize(
    ("function", "parameter"), [c[1:] for c in CASES], ids=[f"{name}-{p.name}" for name, _, p in CASES]
)
def test_every_parameter_refuses_what_it_is_not(function: Callable[..., Any], parameter: inspect.Parameter) -> None:
    """The object itself is not needed: arguments are checked before anything else."""
    parameters = inspect.signature(function).parameters
    owner = [Odd()] if {"self", "cls"} & set(parameters) else []
    needed = {
        p.name: NEEDED[p.name]
        for p in parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in ("self", "cls")
    }
    with pytest.raises(SkvError, match=f"^{parameter.name}; got Odd "):
        function(*owner, **(needed | {parameter.name: Odd()}))


@pytest.mark.parametrize("kind", [Sampling, Target, MeasureOptions, Thresholds, Tolerance, LayerConfig, Recipe])
def test_every_option_refuses_what_it_is_not(kind: Any) -> None:
    for field in fields(kind):
        for value in (Odd(), float("nan"), [Odd()]):
            with pytest.raises(SkvError, match=field.name):
                kind(**{field.name: value})


# What types do not say: values, of the right type and of others, through a model that runs.

NASTY: list[Any] = [
    None, True, 0, -1, 1.5, float("nan"), float("inf"), 10**30, -(10**30), "", "64", b"bytes", [], [1], ["x"], [None],
    {}, (), set(), Path("nowhere/x"), Odd(), np.int64(3), np.float32(2.5), np.array([1, 2]), np.array([[2**63]], "u8"),
    np.array([[0.5]]), [[1], [2, 3]], [[-1]], [[10**30]], [[True]], torch.tensor(3), torch.zeros(2, 2),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Tiny().write(tmp_path_factory.mktemp("tiny"))


def answers(call: Callable[..., object], *parameters: str, **good: Any) -> None:
    """Calls with every nasty value for every parameter: a result, or a SkvError."""
    call(**good)
    for parameter in parameters:
        for value in NASTY:
            try:
                call(**(good | {parameter: value}))
            except SkvError:
                continue
            except Exception as error:
                raise AssertionError(f"{parameter} = {value!r}") from error


def filled(session: Session) -> Cache:
    cache = session.cache(2, 40)
    session.run([[3, 4, 5], [6, 7, 8]], None, None, cache)
    return cache


def test_session(folder: Path) -> None:
    session = Session(folder)
    answers(
        lambda **o: Session(folder, **o),
        "execution_provider", "cuda_graph", "num_threads", "spinning", "model", "config", "num_logits", "prefix_bytes",
        "score_window",
    )  # fmt: skip
    answers(session.cache, "batch", "max_length")
    answers(session.batch, "slots", "max_length", "prompt_chunk", slots=1)
    answers(session.load_cache, "path", "room", path=_saved(session, folder))
    one = [[3, 4]]
    answers(
        lambda **o: session.run(**({"cache": session.cache(1, 40)} | o)),
        "input_ids", "attention_mask", "position_ids", "cache",
        input_ids=one, attention_mask=None, position_ids=None,
    )  # fmt: skip
    answers(lambda **o: session.append(**({"cache": session.cache(1, 40)} | o)), "rows", "cache", rows=one)
    answers(
        lambda **o: list(session.stream(**o)),
        "input_ids", "attention_mask", "max_new_tokens", "sampling", "cache", "present", "keep_tokens", "look_ahead",
        input_ids=one, max_new_tokens=2,
    )  # fmt: skip
    scored = Session(folder, score_window=8)
    cache = scored.cache(1, 200)
    scored.run([[3] * 200], None, None, cache)
    answers(lambda **o: scored.compact(**({"cache": cache.fork(1)} | o)), "cache", "keep", "room", keep=200, room=0)
    answers(session.room, "cache", cache=cache)
    answers(session.generate, "prompts", "max_new_tokens", "sampling", prompts=one, max_new_tokens=2)
    answers(session.check_length, "length", "capacity", length=3)
    answers(lambda **o: session.batch(1).add(**o), "prompt", "max_new_tokens", "sampling", prompt=[3])


def _saved(session: Session, folder: Path) -> Path:
    filled(session).save(folder.parent / "saved")
    return folder.parent / "saved"


def test_cache(folder: Path) -> None:
    session = Session(folder)
    cache = filled(session)
    answers(lambda lengths: filled(session).rewind(lengths), "lengths", lengths=2)
    answers(lambda indices: filled(session).reorder(indices), "indices", indices=[1, 0])
    answers(cache.select, "indices", indices=[1])
    answers(lambda n: session.cache(1, 8).fork(min(n, 2) if type(n) is int else n), "n", n=2)
    for method in (cache.state, cache.longest, cache.rewind_floor, cache.draft_room):
        answers(method, "b", b=1)
        for outside in (-1, 2, 10**30):  # not the bytes beside the buffer
            with pytest.raises(SkvError, match=r"cache: sequence; got -?\d+; expected 0 \.\.\. 1"):
                method(outside)
    answers(lambda **o: filled(session).rewind_to_common(**o), "b", "tokens", b=1, tokens=[6, 7, 9])
    answers(cache.common, "b", "tokens", b=1, tokens=[6, 7, 9])
    answers(cache.load, "b", "key", b=1, key=(0, "value"))
    state = cache.state(0)
    before = cache.data(0, "key")
    for outside in (-1, 2):
        with pytest.raises(SkvError, match="cache: sequence"):
            cache.restore(outside, [state])
    assert np.array_equal(cache.data(0, "key"), before)
    answers(lambda **o: filled(session).restore(**o), "b", "states", b=1, states=[state])


def test_positions_outside_the_context_are_refused(folder: Path) -> None:
    session = Session(folder)
    context = session.config.context_length
    for positions in ([[-1, 0]], [[0, context]]):
        with pytest.raises(SkvError, match=rf"position_ids; .*expected 0 \.\.\. {context - 1}"):
            session.run([[3, 4]], None, positions, session.cache(1, 40))


def test_fractions_are_not_cut_off(folder: Path) -> None:
    session = Session(folder)
    for ids in ([[3.7]], np.array([[3.0]]), [["3"]]):
        with pytest.raises(SkvError, match=r"input_ids; .*expected whole numbers"):
            session.run(ids, None, None, session.cache(1, 40))
    with pytest.raises(SkvError, match=r"attention_mask; .*expected a mask"):
        session.run([[3]], [[float("nan")]], None, session.cache(1, 40))


def test_transformers_model(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = export_model(tiny_checkpoint("qwen3"), out=tmp_path / "out", progress=lambda *_: None)
    model = SkvForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[5, 6, 7]])
    answers(
        lambda **o: SkvForCausalLM.from_pretrained(folder, **o),
        "execution_provider", "cuda_graph", "max_length", "num_threads", "num_logits", "dtype", "torch_dtype",
        "device_map", "trust_remote_code", "local_files_only",
    )  # fmt: skip
    answers(model.new_cache, "batch", "max_length", batch=1)
    answers(
        model.forward,
        "input_ids", "attention_mask", "past_key_values", "use_cache", "logits_to_keep", "position_ids", "labels",
        input_ids=ids,
    )  # fmt: skip
    answers(
        model.generate,
        "input_ids", "attention_mask", "past_key_values", "max_new_tokens", "num_beams", "do_sample", "temperature",
        "top_k", "top_p", "use_cache",
        input_ids=ids, max_new_tokens=2,
    )  # fmt: skip

    def cache() -> SkvCache:
        made = model.new_cache(2, 40)
        model(ids.repeat(2, 1), past_key_values=made)
        return made

    answers(lambda tokens_to_remove: cache().crop(tokens_to_remove), "tokens_to_remove", tokens_to_remove=-1)
    both = torch.tensor([1, 0])
    answers(lambda beam_idx: cache().reorder_cache(beam_idx), "beam_idx", beam_idx=both)
    answers(lambda indices: cache().batch_select_indices(indices), "indices", indices=both)
    answers(lambda repeats: cache().batch_repeat_interleave(repeats), "repeats", repeats=2)


def test_checkpoints(tiny_checkpoint: Callable[..., Path]) -> None:
    source = tiny_checkpoint("qwen3")
    answers(lambda **o: plan(**({"source": source} | o)), "source", "recipe", "as_causal_lm", "adapter", "calibration")
    answers(
        lambda **o: analyze(source, **o),
        "target", "base", "score", "optimal", "measure", "revision", "as_causal_lm", "progress",
    )  # fmt: skip
    names = [f.name for f in fields(Target)]
    answers(lambda **o: analyze(source, target=Target(**o)), *names)
    answers(lambda **o: Recipe(**o).layers(2), *[f.name for f in fields(Recipe)])
    answers(lambda **o: LayerConfig(**o), *[f.name for f in fields(LayerConfig)])
    answers(lambda num_hidden_layers: Recipe().layers(num_hidden_layers), "num_hidden_layers", num_hidden_layers=2)
    answers(lambda values: Recipe.from_dict(values), "values", values={})
    answers(lambda bits: Recipe.per_layer(bits), "bits", bits=[(4, 2)])


def test_documented_names_are_the_ones_that_are_tested() -> None:
    assert {"Session", "SkvForCausalLM", "Recipe", "analyze", "export_model", "verify"} <= set(skv_export.__all__)
