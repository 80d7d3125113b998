"""Made-up traces have the shape of the published ones, and are counted as their makers counted."""

import numpy as np
import pytest

from xlarank.errors import ConfigError
from xlarank.host.traces import REUSE_EDGES, Hotness, TraceStatistics, lognormal_lengths, popularity, trace
from xlarank.spec import Ragged

NUM_ROWS = 500_000

# Of two tables of the ISCA 2023 artifact: accesses, distinct rows an access, shares of the hottest rows.
PUBLISHED = {
    Hotness.LOW: (379_910, 0.608, {10: 0.0039, 100: 0.0168, 1_000: 0.0512, 10_000: 0.1685, 60_000: 0.4874}),
    Hotness.MED: (429_951, 0.238, {10: 0.0080, 100: 0.0255, 1_000: 0.0955, 10_000: 0.3750, 60_000: 0.8769}),
}
# Relative, of each share: the fit is within 0.10, and the ten hottest rows vary with the seed.
TOLERANCE = 0.12

# dlrm_datasets, 2022, locality_stats.txt: distinct rows and accesses by bins of reuse.
ROW_SHARES = [0.342, 0.144, 0.149, 0.138, 0.112, 0.068, 0.029, 0.010]
ACCESS_SHARES = [0.027, 0.023, 0.040, 0.068, 0.105, 0.120, 0.099, 0.070]
ACCESSES_A_ROW = 12.7


def made(hotness, num_accesses, seed=0, num_rows=NUM_ROWS):
    return trace(num_rows, num_accesses, hotness, np.random.default_rng(seed))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("hotness", PUBLISHED)
def test_a_preset_has_the_distinct_and_hot_rows_of_the_published_table(hotness, seed):
    num_accesses, unique_share, top_shares = PUBLISHED[hotness]
    found = TraceStatistics.of([made(hotness, num_accesses, seed)])
    assert found.num_accesses == num_accesses
    assert found.unique_share == pytest.approx(unique_share, rel=0.03)
    assert found.top_shares == pytest.approx(top_shares, rel=TOLERANCE)


def test_a_zipf_law_of_as_many_distinct_rows_fails_the_test_above():
    num_accesses, unique_share, top_shares = PUBLISHED[Hotness.MED]
    shares = np.arange(1, NUM_ROWS + 1) ** -1.02
    counts = np.random.default_rng(0).multinomial(num_accesses, shares / shares.sum())
    found = TraceStatistics.of([np.repeat(np.arange(NUM_ROWS), counts)])
    assert found.unique_share == pytest.approx(unique_share, rel=0.1)
    assert found.top_shares[10] > 20 * top_shares[10]


def test_random_has_as_many_distinct_rows_as_independent_draws_from_all():
    found = TraceStatistics.of([made(Hotness.RANDOM, 307_200)])
    expected = NUM_ROWS * (1 - (1 - 1 / NUM_ROWS) ** 307_200)
    assert found.num_unique == pytest.approx(expected, rel=0.003)


def test_high_reads_about_three_hundredths_of_distinct_rows():
    assert TraceStatistics.of([made(Hotness.HIGH, 400_000)]).unique_share == pytest.approx(0.03, rel=0.1)


def test_one_item_is_one_row():
    assert len(set(made(Hotness.ONE_ITEM, 1_000).tolist())) == 1


def test_presets_are_ordered_by_how_much_the_hottest_rows_get():
    found = [TraceStatistics.of([made(hotness, 400_000)]) for hotness in Hotness]
    assert [s.top_shares[1_000] for s in found] == sorted((s.top_shares[1_000] for s in found), reverse=True)
    assert [s.num_unique for s in found] == sorted(s.num_unique for s in found)


@pytest.mark.parametrize("hotness", Hotness)
@pytest.mark.parametrize("num_rows", [1, 2, 7, 1_000])
def test_every_id_is_a_row_of_the_table_however_small(hotness, num_rows):
    ids = made(hotness, 500, num_rows=num_rows)
    assert (ids.dtype, ids.shape) == (np.int64, (500,))
    assert ids.min() >= 0
    assert ids.max() < num_rows


@pytest.mark.parametrize("hotness", Hotness)
def test_rows_are_distinct_and_their_shares_sum_to_one(hotness):
    drawn = popularity(10_000, hotness, np.random.default_rng(0))
    assert len(np.unique(drawn.rows)) == len(drawn.rows) == len(drawn.shares)
    assert drawn.shares.min() > 0
    assert drawn.shares.sum() == pytest.approx(1)


def test_hot_rows_are_scattered_over_the_table():
    drawn = popularity(NUM_ROWS, Hotness.MED, np.random.default_rng(0))
    hottest = drawn.rows[np.argsort(drawn.shares)[::-1][:1_000]]
    # 1,000 rows thrown at 100 pages of the table: 10 a page, with a standard deviation of about 3.
    pages = np.bincount(hottest // (NUM_ROWS // 100), minlength=100)
    assert pages.max() < 10 + 6 * np.sqrt(10)


def test_hot_rows_are_spread_over_the_trace_and_not_in_runs():
    ids = made(Hotness.HIGH, 200_000)
    counts = np.bincount(ids)
    hot = ids == counts.argmax()
    first = hot[:100_000].sum()
    assert abs(first - hot.sum() / 2) < 6 * np.sqrt(hot.sum() / 4)
    assert (np.diff(ids) == 0).mean() < 0.01


def test_a_trace_is_its_seeds():
    np.testing.assert_array_equal(made(Hotness.LOW, 1_000, seed=3), made(Hotness.LOW, 1_000, seed=3))
    assert (made(Hotness.LOW, 1_000, seed=3) != made(Hotness.LOW, 1_000, seed=4)).any()


def test_the_statistic_of_a_trace_by_hand():
    # Table 0: row 7 four times, row 1 once. Table 1: row 7, another row, twice.
    found = TraceStatistics.of([np.array([7, 7, 1, 7, 7]), np.array([7, 7], np.int32)])
    assert (found.num_accesses, found.num_unique, found.unique_share) == (7, 3, 3 / 7)
    assert set(found.top_shares.values()) == {1.0}
    assert found.row_shares[:4] == (1 / 3, 1 / 3, 1 / 3, 0)  # once, twice, three or four times, more
    assert found.access_shares[:4] == (1 / 7, 2 / 7, 4 / 7, 0)


def test_the_hottest_rows_are_found_wherever_they_lie():
    # Row 10**12 is too far to count by index: the other way of counting must agree.
    ids = np.concatenate([np.full(90, 10**12), np.arange(10, 30)])
    near = TraceStatistics.of([np.where(ids == 10**12, 3, ids)])
    assert TraceStatistics.of([ids]) == near
    assert near.top_shares[10] == (90 + 9) / 110


def test_a_reuse_beyond_the_last_edge_is_in_the_last_bin():
    found = TraceStatistics.of([np.zeros(REUSE_EDGES[-1] + 1, np.int64)])
    assert found.row_shares == found.access_shares == (0.0,) * len(REUSE_EDGES) + (1.0,)


def test_ids_come_as_arrays_lists_or_bags():
    expected = TraceStatistics.of([np.array([3, 1, 3]), np.array([2, 2**40])])
    bags = Ragged(np.array([3, 1, 3]), np.array([1, 2], np.int32))
    assert TraceStatistics.of([bags, [2, 2**40]]) == expected
    assert TraceStatistics.of([np.array([3, 1, 3], np.uint64), np.array([2, 2**40], np.uint64)]) == expected
    assert (expected.num_accesses, expected.num_unique) == (5, 4)


def test_a_preset_may_be_named():
    ids = [trace(50, 100, hotness, np.random.default_rng(0)).tolist() for hotness in ("med", Hotness.MED)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("tables", [[], [np.empty(0, np.int64)], [[]]])
def test_no_accesses_are_no_error(tables):
    found = TraceStatistics.of(tables)
    assert (found.num_accesses, found.num_unique, found.unique_share) == (0, 0, 0)
    assert set(found.top_shares.values()) == {0.0}


def test_rows_drawn_from_the_published_bins_give_the_published_accesses():
    """The file states both histograms; the statistic of rows as in the one must find the other."""
    rng = np.random.default_rng(0)
    num_rows = 200_000
    lows, highs = (0, *REUSE_EDGES), (*REUSE_EDGES, 0)
    ids, first = [], 0
    for low, high, share in zip(lows, highs, ROW_SHARES, strict=False):
        # Reuse falls like a power law inside a bin: log-uniform, rounded up.
        drawn = np.exp(rng.uniform(np.log(max(low, 0.5)), np.log(high), round(share * num_rows)))
        counts = np.minimum(np.ceil(drawn), high).astype(int)
        ids.append(np.repeat(np.arange(first, first + len(counts)), counts))
        first += len(counts)
    found = TraceStatistics.of([np.concatenate(ids)])
    assert found.row_shares[:8] == pytest.approx(ROW_SHARES, abs=0.01)
    # Shares of all accesses, those of the hotter bins included.
    of_all = np.array(found.access_shares[:8]) * found.num_accesses / (num_rows * ACCESSES_A_ROW)
    np.testing.assert_allclose(of_all, ACCESS_SHARES, rtol=0.12)


def test_lengths_have_the_published_mean():
    lengths = lognormal_lengths(200_000, np.random.default_rng(0))
    assert lengths.dtype == np.int32
    assert lengths.min() >= 0
    assert lengths.mean() == pytest.approx(13.6, rel=0.02)
    assert lengths.std() > 13.6  # of a lognormal of sigma 1: 1.31 means


def test_lengths_without_spread_are_the_mean_rounded_up_or_down():
    lengths = lognormal_lengths(10_000, np.random.default_rng(0), mean=2.25, sigma=0)
    assert set(lengths.tolist()) == {2, 3}
    assert lengths.mean() == pytest.approx(2.25, rel=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rng: trace(0, 5, Hotness.LOW, rng), "popularity: num_rows must be >= 1; was 0"),
        (lambda rng: trace(5, -1, Hotness.LOW, rng), "trace: num_accesses must be >= 0; was -1"),
        (
            lambda rng: lognormal_lengths(-1, rng),
            "expected num_bags >= 0, mean > 0 and sigma >= 0, got -1, 13.6 and 1.0",
        ),
        (
            lambda rng: trace(5, 1, "medium", rng),
            r"hotness must be one of \['one_item', 'high', 'med', 'low', 'random'\]; was 'medium'",
        ),
        (
            lambda rng: lognormal_lengths(10, rng, mean=1e12),
            r"expected lengths below 2\*\*31, got .* of mean 1000000000000.0 ",
        ),
        (lambda rng: lognormal_lengths(10, rng, mean=float("inf")), r"below 2\*\*31, got .* of mean inf"),
        (lambda rng: lognormal_lengths(10, rng, sigma=float("inf")), "below .* of mean 13.6 and sigma inf"),
        (lambda rng: TraceStatistics.of([[1], [0.5]]), r"trace of table 1: expected integers .* got float64"),
        (
            lambda rng: TraceStatistics.of([np.array([[1]])]),
            r"expected integers .* got int64 of shape \[1, 1\]",
        ),
        (
            lambda rng: TraceStatistics.of([np.array([2, -1])]),
            r"table 0: expected ids in \[0, 2\*\*63\), got -1",
        ),
        (
            lambda rng: TraceStatistics.of([np.array([2**63], np.uint64)]),
            r"expected ids in \[0, 2\*\*63\), got 9223372036854775808",
        ),
        (lambda rng: TraceStatistics.of([[1, [2]]]), "table 0: expected integers .* got object"),
        (lambda rng: lognormal_lengths(1, rng, mean=0), "got 1, 0 and 1.0"),
        (lambda rng: lognormal_lengths(1, rng, sigma=float("nan")), "got 1, 13.6 and nan"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call(np.random.default_rng(0))
