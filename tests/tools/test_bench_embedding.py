"""The embedding benchmark: its lookups look up the same, and its figures are of the cells that they name."""

import itertools

import bench_embedding
import bench_embedding_turns
import embedding_lookups
import numpy as np
import pytest
from bench_embedding import COMPARISONS, FULL, SHORT, Comparison, figure_of
from embedding_lookups import LOOKUPS, NUM_BAGS, Shape, available, draw_ids
from embedding_plot import draw

from xlarank.host import decode_rows, native_available
from xlarank.host.traces import Hotness
from xlarank.spec import RowFormat

pytestmark = pytest.mark.once

SMALL = Shape(name="small", num_tables=3, num_rows=1_000, dim=12)
OURS = [name for name in LOOKUPS if name.startswith("ours")]
CEILINGS = [name for name in LOOKUPS if name.startswith("ceiling")]

needs_native = pytest.mark.skipif(not native_available(), reason="the kernel isn't built")


def cell(ms, *, shape="8x2Mx64", pooling=20, hotness="random", num_rows=1_000_000):
    return {"shape": shape, "pooling": pooling, "hotness": hotness, "num_rows": num_rows, "ms": ms}


def small_ids(pooling=4):
    drawn = draw_ids(SMALL, Hotness.MED, 2 * NUM_BAGS * pooling)
    return drawn.reshape(SMALL.num_tables, 2, NUM_BAGS, pooling).swapaxes(0, 1)


@needs_native
@pytest.mark.parametrize("name", OURS)
def test_our_lookups_are_the_sums_of_the_rows(name):
    ids = small_ids()
    row_format = next((f for f in RowFormat if f.value in name), RowFormat.FLOAT32)
    tables = [decode_rows(table) for table in embedding_lookups.huge_tables(SMALL, row_format)]
    look_up = LOOKUPS[name](SMALL, ids)
    for number, batch in enumerate(ids):
        expected = [table[bags].sum(axis=1) for table, bags in zip(tables, batch, strict=True)]
        np.testing.assert_allclose(look_up(number), np.concatenate(expected, axis=1), rtol=1e-5, atol=1e-5)


@needs_native
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("name", CEILINGS)
def test_a_ceiling_reads_each_id_once(name, num_threads, monkeypatch):
    monkeypatch.setattr(embedding_lookups, "_CEILING_S", 0.01)
    read = []
    monkeypatch.setattr(
        embedding_lookups, "native", type("Native", (), {"read_rows": lambda _, ids: read.append(ids)})
    )
    look_up = LOOKUPS[name](SMALL, small_ids(), num_threads)
    read.clear()
    look_up(1)
    assert sorted(np.concatenate(read).tolist()) == sorted(small_ids()[1].reshape(-1).tolist())


@needs_native
@pytest.mark.parametrize("num_threads", [1, 2])
def test_cells_have_as_many_samples_of_each_lookup(num_threads, monkeypatch):
    monkeypatch.setattr(bench_embedding_turns, "_BURST_S", 0.0)
    monkeypatch.setattr(embedding_lookups, "_CEILING_S", 0.01)
    monkeypatch.setattr(bench_embedding_turns, "_BYTES_OF_BATCHES", 1)
    names = [*OURS, "ceiling"]
    presets = [Hotness.ONE_ITEM, Hotness.RANDOM]
    found = bench_embedding_turns.measure(SMALL, names, [1, 2], presets, 0.0, num_threads)
    assert [(c["pooling"], c["hotness"], c["num_rows"]) for c in found] == [
        (pooling, hotness, 3 * NUM_BAGS * pooling)
        for hotness, pooling in itertools.product(["one_item", "random"], [1, 2])
    ]
    for c in found:
        assert list(c["ms"]) == names
        assert {len(samples) for samples in c["ms"].values()} == {3}


@needs_native
def test_a_lookup_of_other_vectors_stops_the_benchmark(monkeypatch):
    monkeypatch.setattr(bench_embedding_turns, "_BYTES_OF_BATCHES", 1)
    wrong = np.zeros((NUM_BAGS, SMALL.num_tables * SMALL.dim), np.float32)
    monkeypatch.setitem(LOOKUPS, "wrong", lambda shape, ids, num_threads: lambda index: wrong)
    with pytest.raises(AssertionError, match="wrong"):
        bench_embedding_turns.measure(SMALL, ["ours", "wrong"], [1], [Hotness.RANDOM], 0.0)


def test_ids_of_a_shape_are_rows_of_its_tables():
    drawn = draw_ids(SMALL, Hotness.LOW, 500)
    assert drawn.shape == (3, 500)
    assert drawn.max() < SMALL.num_rows
    assert (drawn[0] != drawn[1]).any()


def test_a_figure_is_the_ratio_on_random_ids_of_the_first_shape():
    comparison = Comparison(figure="vs_torch_pool20", slow="torch", fast="ours", pooling=20, target=1.5)
    cells = [
        cell({"ours": [9.0], "torch": [9.0]}, hotness="high"),
        cell({"ours": [9.0], "torch": [9.0]}, pooling=1),
        cell({"ours": [1.0, 4.0, 2.0], "torch": [3.0, 8.0, 5.0], "ceiling": [0.5, 2.0, 1.0]}),
        cell({"ours": [9.0], "torch": [9.0]}, shape="12x500Kx128"),
        cell({"ours": [9.0], "fbgemm": [9.0]}),
    ]
    figure = figure_of(comparison, cells, "a note; ")
    assert figure is not None
    assert figure.value == 2.5  # of 3, 2, 2.5
    assert figure.is_met
    assert figure.how.startswith("a note; ")
    assert "8 tables x 2000000 x 64, batch 512, 20 ids a bag, sum, random ids, 2 threads each" in figure.how
    assert list(figure.beside) == [
        "8x2Mx64, 20 ids a bag, high",
        "8x2Mx64, 20 ids a bag, random",
        "12x500Kx128, 20 ids a bag, random",
    ]
    assert figure.beside["8x2Mx64, 20 ids a bag, random"] == (
        "2.50: ours 2.000 ms (500.0 M rows/s), torch 5.000 ms (200.0 M rows/s), ceiling 1.000 ms (1000.0 M "
        "rows/s); ours at 0.50 of ceiling"
    )


def test_a_figure_that_was_not_measured_is_none():
    comparison = COMPARISONS[0]
    assert figure_of(comparison, [cell({"ours": [1.0]}, pooling=1)], "") is None
    assert (
        figure_of(comparison, [cell({"ours": [1.0], "torch": [1.0]}, pooling=1, hotness="high")], "") is None
    )


@pytest.mark.parametrize("sizes", [FULL, SHORT])
def test_every_figure_is_measured_or_needs_a_library(sizes):
    for comparison in COMPARISONS:
        both = {comparison.slow, comparison.fast}
        measured = any(
            both <= set(run.lookups) and comparison.pooling in run.poolings and Hotness.RANDOM in run.presets
            for run in sizes.runs
        )
        assert measured or (sizes is SHORT and comparison.figure.startswith("vs_")), comparison.figure
    assert all(set(run.lookups) <= LOOKUPS.keys() for run in sizes.runs)
    assert all(shape in bench_embedding.SHAPES for shape in sizes.shapes)


def test_our_own_lookups_need_nothing_else():
    assert all(available(name) for name in [*OURS, *CEILINGS])


def test_the_plot_is_a_picture(tmp_path):
    cells = [
        cell(
            {"ours": [1.0], "torch": [2.0], "ceiling": [0.9]},
            shape=shape,
            pooling=pooling,
            hotness=preset.value,
        )
        for shape in ("8x2Mx64", "12x500Kx128")
        for pooling in (1, 20)
        for preset in Hotness
    ]
    draw([*cells, cell({"ours_int8": [0.4], "ceiling_int8": [0.3]})], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
