"""Golden requests replayed while rows of tables are updated: their scores are no longer known."""

import dataclasses

import linear
import numpy as np
import pytest

from xlarank import device
from xlarank.bundle import open_bundle
from xlarank.errors import VerifyError
from xlarank.runtime.loading import Loader
from xlarank.runtime.tables import load_tables

TABLES = (dataclasses.replace(linear.SPEC.tables[0], updatable=True),)

ROWS = np.arange(10)
"""All of the table's."""


@pytest.fixture
def bundle(publish):
    device.configure()
    return open_bundle(publish(1, spec=dataclasses.replace(linear.SPEC, tables=TABLES)))


def load(bundle, tables=None):
    return Loader(bundle, devices=device.devices(1), host_threads=1, tables=tables).load()


def write(model, value):
    """An update that hasn't been counted: it isn't complete yet, or its process was killed."""
    model.gatherer.update_rows("topics", ROWS, np.full((len(ROWS), 3), value, np.float32))


def test_who_takes_over_tables_that_a_killed_process_was_updating_can_prove_its_programs(bundle):
    tables = load_tables(bundle, None, num_threads=1, platforms=["cpu"], is_for_forks=True)
    killed = load(bundle, tables)
    assert killed.report.max_error["value"] < 1e-3
    write(killed, 100.0)
    assert tables.shared_rows["topics"].state[:2] == (0, 0)
    assert load(bundle, tables).report.max_error["value"] > 1
    write(killed, 3e38)
    with pytest.raises(
        VerifyError, match=r"golden replay on .*, on updated tables: scores differ from the reference by inf"
    ):
        load(bundle, tables)


def check(model, run):
    buffers = device.BatchBuffers(model.gatherer.signature, model.ladder)
    return model.golden_check(run, buffers, where="golden replay")["value"]


def test_a_device_is_not_blamed_for_scores_of_an_update_that_has_not_ended(bundle):
    model = load(bundle)
    write(model, 100.0)
    assert check(model, model.replicas[0].run) > 1


def test_a_device_is_not_blamed_for_scores_of_an_update_that_begins_meanwhile(bundle):
    model = load(bundle)

    def run(*words):
        scores = model.replicas[0].run(*words)
        write(model, 100.0)
        return scores

    assert check(model, run) > 1


def test_a_device_is_blamed_for_wrong_scores_of_tables_as_they_were_loaded(bundle):
    model = load(bundle)

    def run(*words):
        return {task: values + 1 for task, values in model.replicas[0].run(*words).items()}

    with pytest.raises(VerifyError, match=r", golden replay: scores differ from the reference by"):
        check(model, run)
