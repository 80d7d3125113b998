"""Versions that share the traffic by labels: changes and questions that name none go to the newest."""

import contextlib
import dataclasses

import linear
import numpy as np
import pytest
from xlarank_serving import admin as admin_module
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.admin import AdminClient, AdminServer
from xlarank_serving.service import InferenceService

from xlarank.errors import ModelNotFoundError, UnavailableError
from xlarank.runtime import ModelPolicy, ModelRepository, Policy, VersionLabel, VersionOptions

TABLES = (dataclasses.replace(linear.SPEC.tables[0], updatable=True),)


@pytest.fixture
def repository(linear_version, tmp_path):
    """Its version 1 gets all of the traffic; version 2 has another output and another bucket."""
    for version, rows in ((1, 4), (2, 16)):
        task = dataclasses.replace(linear.SPEC.tasks[0], output=f"value{version}")
        spec = dataclasses.replace(linear.SPEC, tables=TABLES, tasks=(task,))
        linear.publish(linear_version, tmp_path / "models", version, spec=spec, rows=[rows])
    labels = (
        VersionLabel(name="stable", version=1, traffic=1.0),
        VersionLabel(name="canary", version=2, traffic=0.0),
    )
    policy = ModelPolicy(name="linear", policy=Policy.ALL, labels=labels)
    repository = ModelRepository.open(
        tmp_path / "models", num_devices=1, versions=VersionOptions(models=(policy,))
    )
    with contextlib.closing(repository):
        with repository.lease("linear") as engine:
            assert engine.version == 1
        yield repository


@pytest.fixture
def admin(repository, monkeypatch):
    """Sends two rows a call."""
    monkeypatch.setattr(admin_module, "MAX_PART_BYTES", 2 * (10 + 4 * 3))
    with AdminServer(repository, 0) as server, AdminClient(server.address) as admin:
        yield admin


def update(admin, **version):
    return admin.update_rows("linear", "topics", np.arange(5), np.ones((5, 3)), **version)


def num_updates(repository):
    return [repository.engine("linear", version).table_versions["topics"].version for version in "12"]


def test_rows_are_written_to_the_newest_version_or_to_the_one_that_is_named(repository, admin):
    assert update(admin) == 3
    assert num_updates(repository) == [0, 3]
    assert update(admin, version=1) == 3
    assert num_updates(repository) == [3, 3]
    assert update(admin, version="canary") == 6
    assert num_updates(repository) == [3, 6]


def test_parts_of_an_update_go_to_one_version_though_another_comes_meanwhile(repository, admin):
    call = admin._call

    def end_newest(*words):
        answer = call(*words)
        if repository.models()[-1][1] == 2:
            repository.rollback("linear")
        return answer

    admin._call = end_newest
    with pytest.raises(
        (ModelNotFoundError, UnavailableError), match=r"'linear' version 2 is not (found|at ready state)"
    ):
        update(admin)
    assert repository.engine("linear").table_versions["topics"].version == 0


def test_metadata_and_config_without_a_version_are_of_the_newest(repository):
    service = InferenceService(repository)
    for version, output, rows in (("", "value2", 16), ("1", "value1", 4), ("canary", "value2", 16)):
        asked = messages.ModelMetadataRequest(name="linear", version=version)
        metadata = service.model_metadata(asked, None)
        assert [tensor.name for tensor in metadata.outputs] == [output]
        assert metadata.versions == ["1", "2"]
        config = service.model_config(messages.ModelConfigRequest(name="linear", version=version), None)
        assert [tensor.name for tensor in config.config.output] == [output]
        assert config.config.dynamic_batching.preferred_batch_size == [rows]
