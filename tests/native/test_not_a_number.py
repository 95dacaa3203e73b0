"""What is not a number stays so in what depends on it, and nowhere else: the reference, the kernels, the op."""

from __future__ import annotations

import dataclasses

import native
import numpy as np
import pytest

from skv_export.spec.conformance import Case, expected_of, make_inputs, not_a_number_cases, output_error

CASES = not_a_number_cases()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_reference_spreads_it_to_what_depends_on_it(case: Case) -> None:
    """One tensor's NaN at a time, against the definition of attention: who sees which token."""
    clean = expected_of(case, make_inputs(dataclasses.replace(case, not_numbers=())))[0]
    new = case.query_seqlens or (case.new_tokens,) * len(case.past_lengths)
    groups, d = case.num_heads // case.kv_num_heads, case.head_dim
    for tensor, b, token, column in case.not_numbers:
        one = dataclasses.replace(case, not_numbers=((tensor, b, token, column),))
        got = expected_of(one, make_inputs(one))[0].reshape(len(new), case.new_tokens, case.num_heads, d)
        depends = np.zeros_like(got, np.bool_)
        head, channel = divmod(column, d)
        for row in range(token, new[b]) if token < new[b] else ():
            if tensor == "query":
                depends[b, token, head] = True
            elif not case.local_window_size or row - token < case.local_window_size:
                seen = depends[b, row, head * groups : (head + 1) * groups]
                seen[:, channel if tensor == "value" and case.config.v_rotation == "none" else slice(None)] = True
        assert np.array_equal(np.isnan(got), depends)
        assert np.allclose(got[~depends], clean.reshape(got.shape)[~depends], atol=1e-5)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_attention_is_the_references(case: Case, dtype: str) -> None:
    case = dataclasses.replace(case, dtype=dtype)
    inputs = make_inputs(case)
    want = expected_of(case, inputs)
    for thread_count in (1, 3):
        call = native.Call(case, inputs)
        got = call.run(thread_count=thread_count)
        assert output_error(got[0], want[0]) <= case.tolerance
        assert all(map(np.array_equal, got[1:], want[1:]))
        assert call.not_finite.array[0] == any(tensor != "query" for tensor, *_ in case.not_numbers)
