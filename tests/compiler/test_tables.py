"""Tables in every format from a build to the engine, against the model by hand."""

import dataclasses
import io
from types import SimpleNamespace

import numpy as np
import pytest
import shop
from flax import nnx
from rich.console import Console

from xlarank import device
from xlarank.bundle import open_bundle, stored_form
from xlarank.cli import inspect
from xlarank.cli.compile_output import facts_of, show
from xlarank.compiler import BuildOptions, PlacementPolicy, build, random_requests, reference_scores
from xlarank.compiler.program import Traces
from xlarank.compiler.split import split_module
from xlarank.compiler.table_formats import with_formats
from xlarank.compiler.table_trial import DecodedTables, TableTrial, rows_read
from xlarank.device import row_errors
from xlarank.errors import VerifyError
from xlarank.host import decode_rows, encode_rows
from xlarank.runtime import Engine
from xlarank.spec import ErrorBudget, Precision, PrecisionPolicy, RowFormat

F32, F16, BF16, INT8, INT4 = RowFormat
WIDE = ErrorBudget(0.5, 0.5)
REQUESTS = random_requests(shop.SPEC, 20)
NUM_ROWS = sum(request.num_candidates for request in REQUESTS)
LABELS = {"click": (np.arange(NUM_ROWS) % 2).astype(np.float32)}


def options(tables=None, budget=WIDE, *, precision=Precision.FLOAT32, tune_seconds=0.0, **others):
    policy = PrecisionPolicy(precision, tables, budget=budget)
    return BuildOptions(
        bucket_rows=(8,), tune_seconds=tune_seconds, num_devices=1, policy=policy, reuse=False, **others
    )


def built(out, seed=0, *, options, tables=None, labels=LABELS):
    device.configure()
    tables = shop.make_tables() if tables is None else tables
    model = shop.Shop(rngs=nnx.Rngs(seed))
    return build(model, shop.SPEC, tables, out=out, options=options, golden=REQUESTS, labels=labels)


def decoded(formats):
    return {
        name: decode_rows(encode_rows(table, formats[name])) for name, table in shop.make_tables().items()
    }


def by_hand(tables):
    """Scores of all golden rows by task."""
    model = shop.Shop(rngs=nnx.Rngs(0))
    parts = [shop.numpy_scores(model, request, tables) for request in REQUESTS]
    return {task: np.concatenate([part[task] for part in parts]) for task in parts[0]}


@pytest.mark.parametrize(
    "row_format",
    [
        RowFormat.FLOAT32,
        RowFormat.INT8,
        *(
            pytest.param(f, marks=pytest.mark.sweep)
            for f in (RowFormat.FLOAT16, RowFormat.BFLOAT16, RowFormat.INT4)
        ),
    ],
)
def test_a_named_format_is_that_of_the_bundle_s_tables_and_of_what_is_served(tmp_path, row_format):
    result = built(tmp_path, options=options(row_format))
    bundle = open_bundle(result.path)
    tables = decoded(dict.fromkeys(("items", "tags"), row_format))
    for table in bundle.spec.tables:
        assert table.dtype is row_format
        array = bundle.tables()[table.name]
        assert (array.dtype, array.shape) == stored_form(table)
        encoded = encode_rows(shop.make_tables()[table.name], row_format)
        np.testing.assert_array_equal(array.view(np.uint8), encoded.rows)
    # Golden scores are those of the tables as they are served; programs keep float32's tolerance to them.
    expected, exact = by_hand(tables), by_hand(shop.make_tables())
    for task, scores in bundle.golden()[1]["scores"].items():
        np.testing.assert_allclose(scores, expected[task], rtol=1e-4, atol=1e-5)
    for entry in bundle.manifest.programs:
        assert all(error <= bundle.manifest.tolerance.probability for error in entry.max_error.values())
    for memory in ("huge", "mmap"):
        with Engine.load(result.path, table_memory=memory) as engine:
            scores = [engine.score(engine.request(features_of(request))) for request in REQUESTS[:2]]
            scores.append(engine.score(REQUESTS[2]))  # made with the spec that the build was given
        for task in expected:
            found = np.concatenate([part[task] for part in scores])
            np.testing.assert_allclose(found, expected[task][: len(found)], rtol=1e-4, atol=1e-5)
    # What the tables cost, by hand.
    for task, errors in row_errors(shop.SPEC, expected, exact).items():
        error = bundle.manifest.table_errors[task]
        assert error.max == pytest.approx(errors.max(), rel=0.02, abs=2e-6)
        assert error.p99 <= error.max
        assert (error.auc_loss is None) == (task == "spend")
    assert result.tables.is_smaller == (row_format is not F32)
    assert str(result.tables) == f"2 of 2 in {row_format}"


def features_of(request):
    return dict(zip((f.name for f in request.spec.features), request.columns, strict=True))


def test_a_named_format_that_leaves_the_budget_is_refused(tmp_path):
    tight = options(INT4, ErrorBudget(1e-5, 0.5))
    message = (
        r"task 'click', tables, 2 of 2 in int4, 99th percentile over all golden rows: scores differ from the "
        r"reference by [\d.e-]+, expected 1e-05 or less; raise max_score_error \(--max-score-error\), or ask "
        r"for another table precision"
    )
    with pytest.raises(VerifyError, match=message):
        built(tmp_path / "models", options=tight)
    assert not list((tmp_path / "models").rglob("manifest.json"))
    kept = dataclasses.replace(tight, keep_failed=tmp_path / "kept")
    with pytest.raises(VerifyError, match=r"kept for study in .*kept/shop/1"):
        built(tmp_path / "models", options=kept)
    manifest = open_bundle(tmp_path / "kept/shop/1").manifest
    assert "2 of 2 in int4" in manifest.refusal
    assert {table.dtype for table in manifest.spec.tables} == {INT4}


def test_auto_takes_smaller_formats_with_labels_and_says_why_not_without(tmp_path):
    auto = options(tune_seconds=2.0)
    result = built(tmp_path, options=auto)
    assert result.tables.formats == {"items": INT4, "tags": F16}
    assert [table.dtype for table in open_bundle(result.path).spec.tables] == [INT4, F16]
    result = built(tmp_path, options=auto, labels=None)
    assert set(result.tables.formats.values()) == {F32}
    assert "give labels, or name a table precision" in result.tables.note
    assert open_bundle(result.path).spec == shop.SPEC


def test_a_format_stated_in_the_spec_is_kept(tmp_path):
    spec = with_formats(shop.SPEC, {"items": INT8})
    device.configure()
    result = build(
        shop.Shop(rngs=nnx.Rngs(0)),
        spec,
        shop.make_tables(),
        out=tmp_path,
        options=options(),
        golden=random_requests(spec, 20),
    )
    assert result.manifest.spec == spec


@pytest.mark.parametrize("placement", ["host", "device"])
def test_a_refresh_takes_the_formats_of_the_version_before(trial, tmp_path, placement):
    """Programs that look up rows on devices decode one format."""
    smallest = {"items": INT4, "tags": F16}
    # What these formats take and a little, with the part of the budget that is left for rounding.
    p99 = max(error.p99 for error in trial[0].judge(smallest).budget_errors.values())
    auto = options(
        None, ErrorBudget(1.5 * p99, 0.5), tune_seconds=2.0, placement=PlacementPolicy.named(placement)
    )
    auto = dataclasses.replace(auto, reuse=True)
    first = built(tmp_path, options=auto)
    second = built(tmp_path, options=auto)
    assert second.reused == 1
    assert second.tables.formats == first.tables.formats == smallest
    coarse = shop.make_tables()
    coarse["items"] *= 10  # and its steps are ten times as wide
    third = built(tmp_path, options=auto, tables=coarse)
    assert third.reused == (2 if placement == "host" else None)
    assert third.tables.formats["items"] is F16
    named = dataclasses.replace(auto, policy=dataclasses.replace(auto.policy, tables=F16))
    assert built(tmp_path, options=named).reused is None


@pytest.fixture(scope="module")
def trial():
    device.configure()
    traces, tables = Traces(split_module(shop.Shop(rngs=nnx.Rngs(0))), shop.SPEC), shop.make_tables()
    scores = reference_scores(traces.model.reference, shop.SPEC, tables, REQUESTS)
    decoded_tables = DecodedTables(shop.SPEC, tables, REQUESTS)
    policy = PrecisionPolicy(budget=WIDE)
    return TableTrial(
        traces, decoded_tables, REQUESTS, scores, LABELS, policy, device.devices(1)[0]
    ), decoded_tables


@pytest.mark.parametrize(
    "formats",
    [{}, {"items": INT4}, {"tags": F16}, {"items": INT8, "tags": INT4}, {"tags": BF16}],
    ids=str,
)
def test_a_trial_is_what_the_model_gives_with_the_tables_decoded(trial, formats):
    judged = trial[0].judge(formats)
    expected = by_hand(decoded({"items": F32, "tags": F32} | formats))
    for task, errors in row_errors(shop.SPEC, expected, by_hand(shop.make_tables())).items():
        assert judged.budget_errors[task].max == pytest.approx(errors.max(), rel=0.02, abs=5e-6)


def test_only_rows_that_are_read_are_decoded():
    requests = random_requests(shop.SPEC, 1, num_candidates=1)
    rows = rows_read(shop.SPEC, requests)
    tables = DecodedTables(shop.SPEC, shop.make_tables(), requests)
    tables.set({"items": INT8})
    for name, table in shop.make_tables().items():
        assert 0 < len(rows[name]) < len(table)
        unread = np.setdiff1d(np.arange(len(table)), rows[name])
        assert not tables.tables[name][unread].any()
        expected = decode_rows(encode_rows(table, INT8)) if name == "items" else table
        np.testing.assert_array_equal(tables.tables[name][rows[name]], expected[rows[name]])
    tables.set({})
    np.testing.assert_array_equal(
        tables.tables["items"][rows["items"]], shop.make_tables()["items"][rows["items"]]
    )


def test_a_lower_precision_is_held_to_the_budget_with_the_tables_share_in_it(tmp_path):
    """int8 matmuls alone stay within a budget that they leave together with int4 tables."""
    policy = {"precision": Precision.INT8}
    alone = built(tmp_path, options=options(F32, **policy))
    p99 = max(max(entry.p99_error.values()) for entry in alone.manifest.programs)
    both = built(tmp_path, options=options(INT4, **policy))
    tables = max(error.p99 for error in both.manifest.table_errors.values())
    together = max(max(e.p99 for e in r.judgement.budget_errors.values()) for r in both.results)
    assert together > max(p99, tables)
    budget = ErrorBudget((together + max(p99, tables)) / 2, 0.5)
    built(tmp_path, options=options(F32, budget, **policy))
    with pytest.raises(VerifyError, match=r"form '.*int8', 99th percentile over all golden rows"):
        built(tmp_path, options=options(INT4, budget, **policy))


def test_formats_and_what_they_cost_are_told_by_compile_inspect_and_the_report(tmp_path, capsys):
    result = built(tmp_path, options=options(INT8))
    error = result.tables.errors["click"]
    told = f"{error.p99:.1e} p99, {error.max:.1e} at most, AUC loss {result.tables.auc_loss['click']:+.1e}"
    output = Console(file=io.StringIO(), width=200)
    show(result, output)
    text = output.file.getvalue()
    assert "tables 0.00 MB, in float32 0.00 MB: items int8, tags int8" in text
    assert f"error of the tables, task click: {told}" in text
    # A row of D = 8 or 5 takes 8 bytes for scale and bias and 8 for values.
    facts = facts_of(result)
    assert facts["tables"]["items"] == {
        "format": "int8",
        "bytes": 50 * 16,
        "float32_bytes": 50 * 32,
        "device_rows": 0,
    }
    assert facts["table_errors"]["click"]["p99"] == error.p99
    inspected = inspect.run(SimpleNamespace(bundle=str(result.path), no_verify=False))
    assert [(table["dtype"], table["bytes"]) for table in inspected["tables"]] == [
        ("int8", 800),
        ("int8", 320),
    ]
    assert inspected["table_errors"] == facts["table_errors"]
    assert "what the tables' types cost" in capsys.readouterr().out
    page = open_bundle(result.path).text("report.html")
    assert "2 of 2 in int8" in page
    assert f"{error.p99:.1e}" in page
