"""Feature files that are replaced while a repository serves, and stores that versions share."""

import os
import shutil

import linear
import numpy as np
import pytest

from xlarank.host import FeatureFileWriter, FeatureSchema, MissPolicy, checked_columns
from xlarank.runtime import FeatureOptions, ModelRepository, VersionOptions

IDS = np.arange(5) + 100


def write(path, like, model="linear"):
    """A feature file at the path: candidates 100 to 104 with likes of `like` and 0, and no topics."""
    schema = FeatureSchema.of(linear.SPEC.candidate_features)
    beside = path.with_name("beside")
    with FeatureFileWriter(beside, schema, model=model) as writer:
        writer.add(IDS, checked_columns(schema.rows_spec(linear.SPEC), IDS, rows(like, len(IDS))))
    shutil.rmtree(path, ignore_errors=True)
    os.rename(beside, path)


def rows(like, count):
    return {"likes": [[like, 0.0]] * count, "topics": [[]] * count}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "linear.features"
    write(path, 1.0)
    return path


SOURCE = """
from xlarank.host import FeatureRows

class Catalogue:
    def fetch(self, ids):
        return FeatureRows(ids, {"likes": [[1.0, 0.0]] * len(ids), "topics": [[]] * len(ids)})

def open_catalogue(spec):
    return Catalogue()
"""


@pytest.fixture(params=["error", "fetch"])
def repository(request, path, publish, root):
    publish(1)
    fetch = {"misses": MissPolicy.FETCH, "fetch_timeout_ms": 3.6e6}
    options = FeatureOptions(path=path, **(fetch if request.param != "error" else {}))
    if request.param == "source":
        path.with_name("catalogue.py").write_text(SOURCE)
        model = path.with_name("linear")
        options = FeatureOptions(path=model, source="catalogue:open_catalogue", **fetch)
    with_versions = VersionOptions(watch_seconds=3600.0, warm_share=1.0)
    repository = ModelRepository.open(root, num_devices=1, features=[options], versions=with_versions)
    yield repository
    repository.close()


def ask(repository, candidate):
    """The version that answers, and the stored like of a candidate, from its score."""
    with repository.lease("linear") as engine:
        future = engine.submit(engine.request({"age": 3.0}, candidate_ids=[candidate]))
    return engine.version, float(future.result(timeout=60).scores["value"][0]) - 3.0 * engine.version


def update(repository, candidate, like):
    with repository.lease("linear") as engine:
        engine.update_features([candidate], rows(like, 1))


def test_a_version_reads_the_file_that_lies_there_when_it_loads(repository, path, publish, caplog):
    update(repository, 100, 7.0)
    assert (ask(repository, 100), ask(repository, 101)) == ((1, 7.0), (1, 1.0))
    write(path, 2.0)
    assert (ask(repository, 100), ask(repository, 101)) == ((1, 7.0), (1, 1.0)), "version 1 has its own"
    publish(2)
    repository.poll()
    assert (ask(repository, 100), ask(repository, 101)) == ((2, 2.0), (2, 2.0))
    assert "has another feature file than the version before: the 1 updates" in caplog.text


@pytest.mark.parametrize("repository", ["error", "fetch", "source"], indirect=True)
def test_versions_share_a_store_while_the_file_is_the_same(repository, path, publish, caplog):
    update(repository, 100, 7.0)
    write(path, 1.0)  # built again, of the same rows
    publish(2)
    repository.poll()
    assert (ask(repository, 100), ask(repository, 101)) == ((2, 7.0), (2, 1.0))
    assert "are not in its store" not in caplog.text


@pytest.mark.parametrize("repository", ["error"], indirect=True)
def test_a_version_whose_file_is_damaged_or_another_model_s_fails_and_says_so(repository, path, publish):
    write(path, 2.0, model="other")
    publish(2)
    repository.poll()
    (reason,) = [status.reason for status in repository.index() if status.version == 2]
    assert f"features {path}: was replaced by a file of model 'other'" in reason
    write(path, 2.0)
    os.truncate(path / "records.bin", 8)
    publish(3)
    repository.poll()
    (reason,) = [status.reason for status in repository.index() if status.version == 3]
    assert f"{path / 'records.bin'}: truncated: expected" in reason
    assert ask(repository, 101) == (1, 1.0)
