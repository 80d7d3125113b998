"""The Grafana dashboard asks for series that a server has, by labels that they have."""

import json
import re
from pathlib import Path

import linear
import pytest
from prometheus_client.parser import text_string_to_metric_families
from xlarank_serving.refusals import Refusals

from xlarank.errors import AccessError
from xlarank.runtime import Metrics, ModelRepository
from xlarank.runtime import metrics as metrics_module

DASHBOARD = Path(__file__).parents[2] / "serving" / "deploy" / "grafana.json"

NAME = re.compile(r"\b(?:nv|xlarank|process)_\w+")
LABELS = re.compile(r"\b(?:by|without) \(([^)]*)\)")
SELECTOR = re.compile(r"(\w+)\{([^}]*)\}")


def queries():
    board = json.loads(DASHBOARD.read_text())
    listed = [variable["query"] for variable in board["templating"]["list"] if variable["type"] == "query"]
    return listed + [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]


@pytest.fixture(scope="module")
def series(linear_version):
    """Label names by series of a server that has answered; those of features are known without a store."""
    metrics = Metrics()
    refusals = Refusals()
    refusals.count(AccessError("no token", is_known_caller=False))
    metrics.register(refusals)
    repository = ModelRepository.open(linear_version.parents[1], num_devices=1, metrics=metrics)
    with repository.lease("linear") as engine:
        engine.score(engine.request(linear.features(5)))
    text = metrics.text().decode()
    repository.close()
    found = {name: set() for name in re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE)}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
            # Triton's counters have no suffix, which the parser adds.
            found.setdefault(sample.name.removesuffix("_total"), set()).update(sample.labels)
    documented = re.findall(r"\bxlarank_\w+", metrics_module.__doc__)
    return {name: {"model", "version", "table"} for name in documented if name not in found} | found


def test_every_series_of_the_dashboard_is_one_that_the_server_has(series):
    asked = {name for query in queries() for name in NAME.findall(query)}
    assert len(asked) > 25
    assert asked - series.keys() == set()
    assert "xlarank_requests_refused_total" in asked
    assert {"xlarank_device_rows", "xlarank_batch_rows_total", "xlarank_padding_rows_total"} <= asked
    assert any("by (model, bucket)" in query and "xlarank_padding_rows_total" in query for query in queries())


def test_every_label_that_the_dashboard_groups_or_selects_by_is_one_that_the_series_has(series):
    for query in queries():
        names = NAME.findall(query)
        grouped = {label.strip() for labels in LABELS.findall(query) for label in labels.split(",")}
        for name in names:
            assert grouped - {"le"} <= (series[name] or grouped), query
        for name, selector in SELECTOR.findall(query):
            selected = set(re.findall(r"(\w+)\s*[=!]~?", selector))
            assert selected <= (series[name] or selected), query


def test_a_query_for_what_is_not_there_would_be_seen(series):
    assert "xlarank_no_such_thing" not in series
    assert "colour" not in series["xlarank_queue_rows"]
