"""Sources of one's own, named by a word of `--features`."""

import re

import pytest
import stored

from xlarank.errors import ConfigError
from xlarank.host import FeatureOptions, MissPolicy

MODULE = """
from xlarank.host import FeatureRows
import numpy as np

class Catalogue:
    def fetch(self, ids):
        return FeatureRows(ids, {"price": ids.astype(np.float32)})

def opened(spec):
    return Catalogue()

def takes_nothing():
    return Catalogue()

def gives_rows(spec):
    return [1, 2]

def fails(spec):
    raise ConnectionError(f"no catalogue of {spec.name}")
"""


def options(tmp_path, function="opened", words=""):
    (tmp_path / "rows.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("raise OSError('no licence')")
    reference = function if ":" in function else f"rows:{function}"
    return FeatureOptions.parse(f"{tmp_path / 'stored'},source={reference}{words}")


def test_a_source_implies_fetch_and_its_words_reach_the_store(tmp_path):
    words = f",without=vector+item,memory_bytes=70000,fetch_timeout_ms={stored.PATIENT_MS}"
    own = options(tmp_path, words=words)
    assert own.misses is MissPolicy.FETCH
    assert own.open() == ("stored", None)
    store = own.store(None, stored.SPEC)
    assert set(store.names) == {f.name for f in stored.STORED} - {"vector", "item"}
    assert store.join([5, 3], {})["price"].tolist() == [[5.0], [3.0]]
    assert 0 < store.stats().bytes <= 70000


def test_a_source_is_fetched_from_whatever_becomes_of_the_misses_of_files():
    own = FeatureOptions.parse("films,source=a:b", misses=MissPolicy.DEFAULT, max_age_seconds=5.0)
    assert (own.misses, own.max_age_seconds) == (MissPolicy.FETCH, 5.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("films,source=a:b,misses=default", "features films: a source is asked under misses 'fetch'; misses"),
        ("a.features,without=x", "features a.features: a file says itself which features it is without"),
        ("films,source=a:b,fetch_timeout_ms=0", "features films: fetch_timeout_ms must be > 0; was 0.0"),
    ],
)
def test_words_that_don_t_go_together_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        FeatureOptions.parse(text)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nowhere:opened", "'nowhere:opened': no file nowhere.py in "),
        ("closed", r"'rows:closed': module 'rows' \(.*\) has no function 'closed'"),
        ("takes_nothing", "source 'rows:takes_nothing' can't be called with the model's spec: too many"),
        ("broken:opened", "source 'broken:opened' failed: OSError: no licence"),
    ],
)
def test_a_source_that_can_t_be_is_found_before_it_is_needed(tmp_path, function, message):
    with pytest.raises(ConfigError, match=message):
        options(tmp_path, function).open()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "gives_rows",
            "source 'rows:gives_rows': expected a FeatureSource, with a method fetch(ids), got list",
        ),
        ("fails", "source 'rows:fails' failed: ConnectionError: no catalogue of stored"),
    ],
)
def test_what_makes_no_source_says_so(tmp_path, function, message):
    own = options(tmp_path, function)
    own.open()
    with pytest.raises(ConfigError, match=re.escape(message)):
        own.store(None, stored.SPEC)
