"""How table formats are chosen: pure search, with costs made up."""

import dataclasses
import itertools

import numpy as np
import pytest
import shop
from hypothesis import given
from hypothesis import strategies as st

from xlarank.compiler.golden_set import Judgement
from xlarank.compiler.table_formats import choose_formats, find_formats, smaller_formats, with_formats
from xlarank.device import ScoreError
from xlarank.errors import ConfigError
from xlarank.host import encode_rows
from xlarank.spec import ErrorBudget, Precision, PrecisionPolicy, RowFormat, TableSpec

F32, F16, BF16, INT8, INT4 = RowFormat
ALL = (INT4, INT8, F16)


def one_by_one(candidates, fits):
    """Greedy by the book: each table in turn takes the smallest format that fits."""
    chosen = {}
    for name, formats in candidates.items():
        for row_format in formats:
            if fits(chosen | {name: row_format}):
                chosen[name] = row_format
                break
    return chosen


@given(
    st.lists(st.tuples(*(st.floats(0, 1) for _ in ALL)), min_size=1, max_size=12),
    st.floats(0, 4),
)
def test_groups_find_what_one_table_at_a_time_would(costs, budget):
    candidates = {f"t{number}": ALL for number in range(len(costs))}
    # Each larger format costs no more than the smaller ones.
    cost_of = {
        (f"t{number}", row_format): cost
        for number, table in enumerate(costs)
        for row_format, cost in zip(ALL, sorted(table, reverse=True), strict=True)
    }

    def fits(formats):
        return sum(cost_of[item] for item in formats.items()) <= budget

    found = choose_formats(candidates, fits, lambda: False)
    assert found == one_by_one(candidates, fits)
    assert fits(found)


def test_tables_that_all_fit_are_settled_by_one_trial_and_a_misfit_costs_a_few():
    trials = []

    def fits(formats):
        trials.append(formats)
        return formats.get("t700", F32) in (F32, F16)

    names = [f"t{number}" for number in range(1000)]
    assert choose_formats(dict.fromkeys(names[:700], ALL), fits, lambda: False) == dict.fromkeys(
        names[:700], INT4
    )
    assert len(trials) == 1
    found = choose_formats(dict.fromkeys(names, ALL), fits, lambda: False)
    assert found == dict.fromkeys(names, INT4) | {"t700": F16}
    assert len(trials) < 40


@pytest.mark.parametrize("num_trials", range(6))
def test_what_is_settled_when_time_is_up_stays_and_the_rest_is_float32(num_trials):
    left = itertools.count(num_trials, -1)
    tried = []

    def fits(formats):
        tried.append(formats)
        return "b" not in formats

    found = choose_formats(dict.fromkeys("abcd", ALL), fits, lambda: next(left) <= 0)
    assert len(tried) <= num_trials
    assert found in ({}, {"a": INT4}) if num_trials < 6 else {"a": INT4, "c": INT4, "d": INT4}


def test_without_tables_nothing_is_tried():
    assert choose_formats({}, lambda _: pytest.fail("tried"), lambda: False) == {}


@pytest.mark.parametrize(
    ("dim", "expected"),
    [(1, [F16]), (4, [F16]), (8, [INT4, F16]), (16, [INT4, INT8, F16]), (128, [INT4, INT8, F16])],
)
def test_formats_worth_a_try_are_smaller_than_every_more_exact_one(dim, expected):
    table = TableSpec(name="t", dim=dim, rows=3)
    assert smaller_formats(table, 1.0) == expected
    sizes = [f.row_bytes(dim) for f in expected]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] < F32.row_bytes(dim)
    # What float16 can't hold, bfloat16 can.
    assert smaller_formats(table, 1e5) == [BF16 if f is F16 else f for f in expected]


def test_a_format_that_cannot_hold_a_table_s_values_is_not_tried():
    table = TableSpec(name="t", dim=128, rows=3)
    assert smaller_formats(table, 1.5e38) == [INT4, INT8, BF16]
    assert smaller_formats(table, 2e38) == [BF16]
    assert smaller_formats(table, 3.4e38) == []


@pytest.mark.parametrize("row_format", [F16, BF16, INT8, INT4])
def test_what_is_worth_a_try_can_be_encoded_whatever_lies_between(row_format):
    rng = np.random.default_rng(0)
    table = TableSpec(name="t", dim=64, rows=2)
    for _ in range(200):
        largest = np.float32(10.0 ** rng.uniform(4, 38.53))
        values = np.where(rng.random((2, 64)) < 0.5, largest, -largest) * rng.random((2, 1), np.float32)
        values[0] = largest * np.where(np.arange(64) % 2, 1, -1)
        if row_format in smaller_formats(table, float(largest)):
            encode_rows(values.astype(np.float32), row_format)


def judgement(p99=0.0, largest=None, auc_loss=0.0):
    error = ScoreError(p99, p99 if largest is None else largest)
    errors = {"click": error, "spend": ScoreError(0.0, 0.0)}
    return Judgement(errors, errors, {"click": auc_loss})


def found(judge, policy=None, spec=shop.SPEC, **changes):
    policy = policy or PrecisionPolicy(Precision.FLOAT32, budget=ErrorBudget(2e-3, 5e-4))
    arguments = {"start": None, "unlabelled": [], "is_time_up": lambda: False} | changes
    return find_formats(spec, shop.make_tables(), policy, judge, **arguments)


def test_the_budget_s_error_and_auc_loss_both_count():
    smallest = {"items": INT4, "tags": F16}
    assert found(lambda _: judgement(1.7e-3, 1e9, 4.4e-4)) == (smallest, "")
    float32 = dict.fromkeys(("items", "tags"), F32)
    for too_much in (judgement(1.9e-3), judgement(auc_loss=4.6e-4), judgement(0.0, np.inf)):
        assert found(lambda _, j=too_much: j) == (float32, "")


@pytest.mark.parametrize("precision", [None, Precision.INT8])
def test_where_matmuls_may_be_lowered_too_tables_take_half_of_the_budget(precision):
    policy = PrecisionPolicy(precision, budget=ErrorBudget(2e-3, 5e-4))
    assert found(lambda _: judgement(0.8e-3), policy)[0]["items"] is INT4
    assert found(lambda _: judgement(1.1e-3), policy)[0]["items"] is F32


def test_a_named_format_is_of_all_tables_and_is_not_tried():
    policy = PrecisionPolicy(tables=INT8)
    assert found(lambda _: pytest.fail("tried"), policy) == (dict.fromkeys(("items", "tags"), INT8), "")


def test_without_labels_tables_stay_and_it_is_said_why():
    formats, note = found(lambda _: pytest.fail("tried"), unlabelled=["click"])
    assert set(formats.values()) == {F32}
    assert note == (
        "tables stay as they are: the golden requests have no labels of both classes for click, so the AUC "
        "loss of smaller ones can't be known; give labels, or name a table precision"
    )


def test_without_time_nothing_is_tried_and_that_is_said():
    formats, note = found(lambda _: pytest.fail("tried"), is_time_up=lambda: True)
    assert set(formats.values()) == {F32}
    assert note == "time was up before smaller formats of every table were tried"


def test_a_format_that_the_spec_states_stays_and_counts_in_every_trial():
    tried = []

    def judge(formats):
        tried.append(formats)
        return judgement()

    spec = with_formats(shop.SPEC, {"tags": BF16})
    assert found(judge, spec=spec) == ({"items": INT4, "tags": BF16}, "")
    assert tried == [{"items": INT4, "tags": BF16}]
    spec = with_formats(shop.SPEC, {"items": INT8, "tags": BF16})
    assert found(lambda _: pytest.fail("tried"), spec=spec) == ({"items": INT8, "tags": BF16}, "")


def test_an_earlier_version_s_formats_are_taken_if_they_hold_and_searched_for_anew_if_not():
    start = {"items": F16, "tags": F16}
    assert found(lambda _: judgement(), start=start) == (start, "")
    assert found(lambda f: judgement(0.0 if f["items"] is F32 else 1.0), start=start) == (
        {"items": F32, "tags": F16},
        "",
    )
    # One that found nothing smaller had as much time: it needs no trial.
    float32 = dict.fromkeys(("items", "tags"), F32)
    assert found(lambda _: pytest.fail("tried"), start=float32) == (float32, "")


WIDE = shop.make_tables()
WIDE["items"] = WIDE["items"].copy()
WIDE["items"][7, :2] = [-3e38, 3e38]


def found_wide(judge, policy=None, spec=shop.SPEC, start=None):
    policy = policy or PrecisionPolicy(Precision.FLOAT32, budget=ErrorBudget(2e-3, 5e-4))
    return find_formats(spec, WIDE, policy, judge, start=start, unlabelled=[], is_time_up=lambda: False)


def test_a_row_that_no_golden_request_reads_counts_too():
    assert found_wide(lambda _: judgement())[0] == {"items": BF16, "tags": F16}
    earlier = {"items": INT8, "tags": F16}
    assert found_wide(lambda _: judgement(), start=earlier)[0] == {"items": BF16, "tags": F16}
    earlier = {"items": BF16, "tags": F32}
    assert found_wide(lambda _: judgement(), start=earlier)[0] == earlier


def test_a_format_that_was_asked_for_and_cannot_hold_a_row_is_refused_with_table_and_row():
    told = r"table 'items': row 7 reaches from -3e\+38 to 3e\+38, more than int8 holds"
    with pytest.raises(ConfigError, match=told):
        found_wide(lambda _: pytest.fail("tried"), PrecisionPolicy(tables=INT8))
    with pytest.raises(ConfigError, match=told):
        found_wide(lambda _: pytest.fail("tried"), spec=with_formats(shop.SPEC, {"items": INT8}))


def test_table_precision_is_named_or_refused():
    assert PrecisionPolicy.named("auto").tables is None
    assert PrecisionPolicy.named("auto", tables="int4").tables is INT4
    with pytest.raises(
        ConfigError, match=r"table precision: expected one of \['auto', 'float32', .*got 'int2'"
    ):
        PrecisionPolicy.named("auto", tables="int2")


def test_with_formats_leaves_all_else_as_it_was():
    changed = with_formats(shop.SPEC, {"items": INT4})
    assert [table.dtype for table in changed.tables] == [INT4, F32]
    assert dataclasses.replace(changed, tables=shop.SPEC.tables) == shop.SPEC
