"""The feature store against a dict of rows: updates, misses, a cache, and threads that do all of it."""

import re
import threading

import numpy as np
import pytest
import stored

from xlarank.errors import ConfigError, FeatureError, XlarankError
from xlarank.host import FeatureRows, FeatureStore, MissPolicy
from xlarank.spec import RankRequest

NAMES = {feature.name for feature in stored.STORED}


class FakeClock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class DictSource:
    """Rows from a dict; remembers what it was asked for, and may do something in between."""

    def __init__(self, rows):
        self.rows, self.asked, self.on_fetch = rows, [], None

    def fetch(self, ids):
        self.asked.append(ids.tolist())
        found = [i for i in ids.tolist() if i in self.rows]
        answer = FeatureRows(np.array(found, np.int64), stored.columns_of([self.rows[i] for i in found]))
        if self.on_fetch is not None:
            self.on_fetch()
        return answer


def joined(store, ids):
    return stored.rows_of(store.join(ids, {}))


def random_rows(rng, ids):
    return {int(i): stored.random_row(rng) for i in ids}


def put(store, rows):
    store.update(list(rows), stored.columns_of(list(rows.values())))


def test_whatever_is_done_to_it_it_is_a_dict_of_rows():
    rng = np.random.default_rng(0)
    store, reference = FeatureStore(stored.SPEC), {}
    ids = np.concatenate([rng.integers(-(2**63), 2**63 - 1, 300), [0, -1, 2**63 - 1, -(2**63)]])
    for _ in range(120):
        some = rng.choice(ids, rng.integers(0, 40))
        if rng.random() < 0.4:
            gone = {int(i) for i in some} & reference.keys()
            assert store.remove(some) == len(gone)
            for i in gone:
                del reference[i]
        else:
            rows = random_rows(rng, some)
            put(store, rows)
            reference |= rows
        there = rng.permutation([i for i in ids.tolist() if i in reference]).astype(np.int64)
        assert joined(store, there) == [reference[i] for i in there.tolist()]
        absent = [i for i in ids.tolist() if i not in reference]
        if absent:
            with pytest.raises(FeatureError, match="candidate_ids: expected ids of the feature store"):
                store.join(absent[:1], {})
        assert store.stats().rows == len(reference)


def test_it_grows_and_shrinks_without_losing_a_row():
    rng = np.random.default_rng(1)
    store = FeatureStore(stored.SPEC)
    rows = random_rows(rng, rng.permutation(20_000)[:6000])
    put(store, rows)
    assert joined(store, list(rows)) == list(rows.values())
    kept = list(rows)[:500]
    bytes_before = store.stats().bytes
    assert store.remove([i for i in rows if i not in set(kept)]) == 5500
    put(store, {kept[0]: rows[kept[0]]})
    assert store.stats().rows == 500
    assert store.stats().bytes < bytes_before
    assert joined(store, kept) == [rows[i] for i in kept]


def test_an_id_may_come_twice_and_of_two_rows_of_one_id_the_last_stays():
    rng = np.random.default_rng(2)
    store, first, last = FeatureStore(stored.SPEC), stored.random_row(rng), stored.random_row(rng)
    store.update([5, 5], stored.columns_of([first, last]))
    assert joined(store, [5, 5, 5]) == [last] * 3


def test_features_that_a_request_brings_go_before_and_the_rest_makes_a_valid_request():
    rng = np.random.default_rng(3)
    store, rows = FeatureStore(stored.SPEC), random_rows(rng, range(10))
    put(store, rows)
    own = {"age": 3.0, "price": [9.0, 8.0], "tags": None}
    features = store.join([4, 2], own)
    request = RankRequest(stored.SPEC, features, num_candidates=2)
    assert request.column("price").tolist() == [[9.0], [8.0]]
    assert stored.rows_of({"item": request.column("item")}) == [{"item": rows[i]["item"]} for i in (4, 2)]
    assert stored.rows_of({"tags": request.column("tags")}) == [{"tags": rows[i]["tags"]} for i in (4, 2)]


def test_ids_alone_of_no_candidates_make_an_empty_request():
    features = FeatureStore(stored.SPEC).join([], {"age": 1.0})
    assert RankRequest(stored.SPEC, features, num_candidates=0).num_candidates == 0


def test_ids_are_not_looked_up_for_features_that_all_came():
    own = stored.columns_of([stored.DEFAULT_ROW])
    assert FeatureStore(stored.SPEC).join([123], own).keys() == NAMES


def test_a_request_says_with_how_many_ids_a_column_doesn_t_agree():
    store = FeatureStore(stored.SPEC, misses="default")
    features = store.join([1, 2, 3], {"age": 1.0, "item": [4]})
    with pytest.raises(FeatureError, match=r"feature 'item': expected 3 rows, as candidate_ids has, got 1"):
        RankRequest(stored.SPEC, features, num_candidates=3)


@pytest.mark.parametrize("ids", [[1.5], [[1]], np.array([2**63], np.uint64), "abc", [True]])
def test_ids_of_another_form_are_refused(ids):
    with pytest.raises(FeatureError, match=r"candidate_ids: expected int64 ids of shape \[N\], got"):
        FeatureStore(stored.SPEC).join(ids, {})


def test_a_bad_row_is_refused_where_it_comes_from_and_nothing_is_put_in():
    store = FeatureStore(stored.SPEC)
    bad = stored.columns_of([stored.DEFAULT_ROW] * 2) | {"item": [3, 100]}
    with pytest.raises(FeatureError, match=r"feature 'item': expected ids in \[0, 100\)"):
        store.update([1, 2], bad)
    with pytest.raises(FeatureError, match="feature 'price': expected 3 rows, as candidate_ids has, got 2"):
        store.update([1, 2, 3], stored.columns_of([stored.DEFAULT_ROW] * 2))
    assert (store.stats().rows, store.stats().version) == (0, 0)


def test_policy_default_stands_in_row_by_row():
    rng = np.random.default_rng(4)
    store, rows = FeatureStore(stored.SPEC, misses="default"), random_rows(rng, [3, 8])
    put(store, rows)
    assert joined(store, [9, 3, 9, 8, 1]) == [
        stored.DEFAULT_ROW,
        rows[3],
        stored.DEFAULT_ROW,
        rows[8],
        stored.DEFAULT_ROW,
    ]
    assert joined(store, [77]) == [stored.DEFAULT_ROW]
    assert (store.stats().hits, store.stats().misses) == (2, 4)


@pytest.mark.parametrize("features", [[1], None, "abc", 3])
def test_features_that_aren_t_values_by_name_are_refused(features):
    with pytest.raises(FeatureError, match="model 'stored': expected values by feature name, got"):
        FeatureStore(stored.SPEC).join([], features)


def test_policy_error_names_the_ids():
    with pytest.raises(
        FeatureError,
        match=re.escape(
            "candidate_ids: expected ids of the feature store of model 'stored', got 2 of 2 that "
            "aren't there: [4, 11]"
        ),
    ):
        FeatureStore(stored.SPEC).join([4, 11], {})


def cache(source, memory_bytes=2**20, **options):
    options = {"fetch_timeout_ms": stored.PATIENT_MS} | options
    return FeatureStore(stored.SPEC, source=source, misses="fetch", memory_bytes=memory_bytes, **options)


def test_policy_fetch_asks_the_source_once_and_keeps_the_answer():
    rng = np.random.default_rng(5)
    source = DictSource(random_rows(rng, range(50)))
    store = cache(source)
    for ids in ([4, 2, 4, 9], [9, 30, 2], [30, 4]):
        assert joined(store, ids) == [source.rows[i] for i in ids]
    assert source.asked == [[2, 4, 9], [30]]
    assert (store.stats().hits, store.stats().misses) == (4, 5)


def test_what_the_source_hasn_t_got_either_is_refused_by_name():
    store = cache(DictSource({1: stored.DEFAULT_ROW}))
    with pytest.raises(FeatureError, match=re.escape("got 2 of 3 that aren't there: [5, 5]")):
        store.join([5, 1, 5], {})
    with pytest.raises(FeatureError, match="the feature store or its source"):
        store.join([5], {})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            FeatureRows(np.array([2]), stored.columns_of([stored.DEFAULT_ROW])),
            "expected distinct ids of the 1",
        ),
        (FeatureRows(np.array([1, 1]), stored.columns_of([stored.DEFAULT_ROW] * 2)), r"got \[1, 1\]"),
        (FeatureRows(np.array([1]), {"item": [200]}), "feature 'item': expected ids in"),
        (FeatureRows(np.array([1.0]), {}), "expected int64 ids"),
        (FeatureRows(np.array([1]), None), "expected"),
        (None, "expected FeatureRows, got NoneType None"),
        ({"item": [1]}, r"expected FeatureRows, got dict \{'item': \[1\]\}"),
    ],
)
def test_a_source_that_answers_wrong_is_not_the_caller_s_fault(answer, message):
    class Wrong:
        def fetch(self, ids):
            return answer

    with pytest.raises(XlarankError, match=f"feature source Wrong of model 'stored': .*{message}") as info:
        cache(Wrong()).join([1], {})
    assert not isinstance(info.value, FeatureError)


def test_an_answer_older_than_an_update_is_not_kept():
    rng = np.random.default_rng(6)
    old, new = stored.random_row(rng), stored.random_row(rng)
    source = DictSource({1: old})
    store = cache(source)

    def update_and_leave():
        source.on_fetch = None
        source.rows[1] = new
        put(store, {1: new})
        store.remove([1])

    source.on_fetch = update_and_leave
    assert joined(store, [1]) == [old]  # admitted before the update
    assert joined(store, [1]) == [new]


def test_a_cached_row_is_asked_for_again_once_it_is_too_old():
    rng, clock = np.random.default_rng(9), FakeClock()
    source = DictSource(random_rows(rng, range(4)))
    store = cache(source, max_age_seconds=10, clock=clock)
    clock.now += 3
    old = joined(store, [0, 1])
    source.rows = random_rows(rng, range(4))
    clock.now += 4
    joined(store, [2])
    assert store.stats().oldest_seconds == 4
    clock.now += 5.9
    assert joined(store, [1, 0]) == old[::-1]
    clock.now += 0.1
    assert store.stats().oldest_seconds == 10
    assert joined(store, [0, 2]) == [source.rows[0], source.rows[2]], "0 is too old, 2 isn't"
    assert source.asked == [[0, 1], [2], [0]]
    assert (store.stats().hits, store.stats().misses) == (3, 4)
    assert joined(store, [0]) == [source.rows[0]], "it is young again"
    put(store, {1: source.rows[3]})
    assert joined(store, [1]) == [source.rows[3]], "an update makes it young too"
    assert len(source.asked) == 3
    assert store.stats().rows == 3
    assert store.stats().oldest_seconds == 6, "of 2: rows that were replaced no longer count"
    del source.rows[2]
    clock.now += 10
    with pytest.raises(FeatureError, match=re.escape("aren't there: [2]")):
        store.join([2], {})


def test_a_row_s_age_counts_from_when_it_was_asked_for():
    clock = FakeClock()
    source = DictSource({1: stored.DEFAULT_ROW})

    def take_long():
        clock.now += 8

    source.on_fetch = take_long
    store = cache(source, max_age_seconds=10, clock=clock)
    assert joined(store, [1]) == [stored.DEFAULT_ROW]
    assert store.stats().oldest_seconds == 8
    clock.now += 2
    joined(store, [1])
    assert len(source.asked) == 2


def test_an_answer_to_an_old_row_is_not_kept_over_an_update():
    rng, clock = np.random.default_rng(10), FakeClock()
    rows = [stored.random_row(rng) for _ in range(3)]
    source = DictSource({1: rows[0]})
    store = cache(source, max_age_seconds=10, clock=clock)
    joined(store, [1])
    clock.now += 10
    source.rows[1] = rows[1]
    source.on_fetch = lambda: put(store, {1: rows[2]})
    assert joined(store, [1]) == [rows[1]]
    assert joined(store, [1]) == [rows[2]]


@pytest.mark.parametrize("policy", ["error", "default"])
def test_without_a_source_an_old_row_goes_by_the_policy(policy):
    clock = FakeClock()
    store = FeatureStore(stored.SPEC, misses=policy, max_age_seconds=1, clock=clock)
    row = stored.random_row(np.random.default_rng(11))
    put(store, {1: row})
    assert joined(store, [1]) == [row]
    clock.now += 1
    if policy == "error":
        with pytest.raises(FeatureError, match=re.escape("aren't there: [1]")):
            store.join([1], {})
    else:
        assert joined(store, [1]) == [stored.DEFAULT_ROW]


@pytest.mark.parametrize("memory_bytes", [2**20, 3 * 2**19, 5 * 2**18])
def test_small_records_fill_a_limit_of_any_size(memory_bytes):
    """All but the part that is for what isn't freed yet."""
    features = [{"name": f"d{i}", "kind": "dense", "scope": "candidate"} for i in range(2)]
    spec = stored.SPEC.from_dict(
        {"name": "small", "features": features, "tables": [], "tasks": [{"name": "click"}]}
    )
    store = FeatureStore(spec, memory_bytes=memory_bytes)
    ids, values = np.arange(500), np.ones(500, np.float32)
    for first in range(0, 40_000, 500):
        store.update(first + ids, {"d0": values, "d1": values})
        assert store.stats().bytes <= memory_bytes
    assert store.stats().bytes >= 0.85 * memory_bytes
    store.join(40_000 - store.stats().rows // 2 + ids, {})  # the newest are there


@pytest.mark.parametrize("memory_bytes", [2**16, 2**17, 2**19])
def test_the_memory_limit_holds_whatever_comes(memory_bytes):
    rng = np.random.default_rng(7)
    source = DictSource(random_rows(rng, range(3000)))
    source.rows[3000] = stored.DEFAULT_ROW | {"topics": [1] * (memory_bytes // 8)}  # fits in no way
    store = cache(source, memory_bytes)
    for step in range(300):
        ids = rng.choice(3001, rng.integers(1, 60))
        assert joined(store, ids) == [source.rows[i] for i in ids.tolist()]
        if step % 7 == 0:
            row = stored.random_row(rng) | {"topics": [1] * int(rng.integers(200))}
            source.rows[int(ids[0])] = row
            put(store, {int(ids[0]): row})
        if step % 11 == 0:
            store.remove(ids[:3])
        assert store.stats().bytes <= memory_bytes
    stats = store.stats()
    assert stats.evictions > 0
    assert stats.rows > 20


def test_rows_that_are_looked_up_stay_when_others_pass_by():
    rng = np.random.default_rng(8)
    source = DictSource(random_rows(rng, range(20_000)))
    store = cache(source, 2**17)
    hot = list(range(50))
    store.join(hot, {})
    for first in range(50, 20_000, 50):
        store.join(list(range(first, first + 50)), {})
        store.join(hot, {})
    asked_for_hot = sum(len(set(ids) & set(hot)) for ids in source.asked)
    assert asked_for_hot <= 2 * len(hot)
    assert store.stats().evictions > 10_000


def test_version_and_age_are_of_the_newest_update():
    clock = FakeClock()
    store = FeatureStore(stored.SPEC, clock=clock)
    clock.now += 5
    assert (store.stats().version, store.stats().age_seconds) == (0, 5)
    put(store, {1: stored.DEFAULT_ROW})
    clock.now += 2
    assert (store.stats().version, store.stats().age_seconds) == (1, 2)
    store.remove([1])
    assert (store.stats().version, store.stats().age_seconds) == (2, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"misses": "ask"}, r"misses must be one of \['error', 'default', 'fetch'\]; was 'ask'"),
        ({"misses": "fetch"}, "expected a source with misses 'fetch'"),
        ({"source": DictSource({}), "memory_bytes": 2**20}, "and with no other policy"),
        ({"misses": "fetch", "source": DictSource({})}, "a source needs memory_bytes"),
        ({"memory_bytes": 1000}, r"memory_bytes must be an integer in \[65536, 2\*\*63\); was 1000"),
        ({"memory_bytes": "1GB"}, "memory_bytes must be an integer in .*; was '1GB'"),
        ({"memory_bytes": 1.5e6}, r"memory_bytes must be an integer in .*; was 1500000\.0"),
        ({"memory_bytes": True}, "memory_bytes must be an integer in .*; was True"),
        ({"memory_bytes": 2**70}, f"memory_bytes must be an integer in .*; was {2**70}"),
        (
            {"memory_bytes": 2**62},
            r"memory_bytes of 4294967296\.00 GiB, .* more than the .* GiB that are available \(MemAvailable",
        ),
        ({"max_age_seconds": "5"}, "max_age_seconds must be a finite number; was '5'"),
        ({"max_age_seconds": 0.5}, "max_age_seconds must be >= 1; was 0.5"),
        ({"max_age_seconds": float("nan")}, "max_age_seconds must be a finite number; was nan"),
        ({"fetch_timeout_ms": 0}, "fetch_timeout_ms must be > 0; was 0"),
        ({"fetch_timeout_ms": 1e20}, r"fetch_timeout_ms must be <= 1e\+11; was 1e\+20"),
        ({"fetch_timeout_ms": "5"}, "fetch_timeout_ms must be a finite number; was '5'"),
        ({"without": ["age"]}, "has no candidate feature 'age'"),
        ({"without": NAMES}, "expected at least one candidate feature to store"),
    ],
)
def test_arguments_that_don_t_go_together_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        FeatureStore(stored.SPEC, **options)


def test_policy_default_needs_a_default_of_every_stored_feature():
    features = stored.SPEC.to_dict()["features"]
    for feature in features:
        if feature["name"] == "item":
            del feature["default"]
    spec = stored.SPEC.from_dict(stored.SPEC.to_dict() | {"features": features})
    with pytest.raises(ConfigError, match=r"misses 'default' needs .*; \['item'\] have none"):
        FeatureStore(spec, misses=MissPolicy.DEFAULT)
    assert FeatureStore(spec, misses=MissPolicy.DEFAULT, without=["item"]).names[:3] == (
        "price",
        "vector",
        "hour",
    )


def telling_row(number):
    """A row all of whose values say the same number: half of it would show."""
    return {
        "price": float(number),
        "vector": [float(number)] * 3,
        "item": number % 100,
        "hour": float(number % 24),
        "brand": str(number),
        "topics": [number % 100] * (number % 9),
        "path": [number % 100] * (number % 4),
        "tags": [str(number)] * (number % 4),
    }


@pytest.mark.parametrize("memory_bytes", [None, 2**16])
def test_threads_see_whole_rows_and_never_one_older_than_the_last_finished_update(memory_bytes):
    """One writer counts each row up, removing and growing on the way; readers check what they see."""
    num_ids, num_rounds = 40, 150
    store = FeatureStore(stored.SPEC, misses="default", memory_bytes=memory_bytes)
    finished = [0] * num_ids  # by id: the newest number whose update has returned
    put(store, {i: telling_row(0) for i in range(num_ids)})
    stop, faults, num_seen = threading.Event(), [], [0]

    def read():
        while not stop.is_set():
            ids = list(range(num_ids))
            least = list(finished)
            for i, row in zip(ids, joined(store, ids), strict=True):
                number = int(row["price"])
                if row == stored.DEFAULT_ROW:
                    if memory_bytes is None:
                        faults.append((i, "absent"))
                elif row != telling_row(number) or number < least[i]:
                    faults.append((i, row, least[i]))
            num_seen[0] += 1

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    rng = np.random.default_rng(9)
    try:
        for number in range(1, num_rounds):
            some = [int(i) for i in rng.permutation(num_ids)[:17]]
            put(store, {i: telling_row(number) for i in some})
            for i in some:
                finished[i] = number
            others = [int(i) for i in rng.integers(1000, 1000 + 20 * number, 60)]
            put(store, {i: telling_row(number) for i in others})
            store.remove(others[:40])
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert not faults, faults[:3]
    assert num_seen[0] > 10
