"""ModelConfig, ModelStatistics and the repository RPCs, through the published client where it has a call."""

import grpc
import pytest
import tritonclient.grpc as triton
from xlarank_serving.admin import AdminClient, AdminServer
from xlarank_serving.service import InferenceService

from xlarank.errors import AccessError, RequestError, UnavailableError, UnsupportedError
from xlarank.runtime import Timings
from xlarank.spec import Bucket


@pytest.fixture
def client(serving):
    with triton.InferenceServerClient(serving.server.address) as client:
        yield client


def test_model_config_says_how_a_model_is_served(serving, client):
    config = client.get_model_config("feed").config
    assert (config.name, config.platform, config.backend) == ("feed", "xlarank", "xlarank")
    assert config.max_batch_size == 0  # tensors state their sizes in full
    metadata = client.get_model_metadata("feed")
    assert [(i.name, list(i.dims)) for i in config.input] == [
        (i.name, list(i.shape)) for i in metadata.inputs
    ]
    assert [(o.name, list(o.dims)) for o in config.output] == [
        (o.name, list(o.shape)) for o in metadata.outputs
    ]
    types = {i.name: type(config).DESCRIPTOR.file.enum_types_by_name["DataType"] for i in config.input}
    named = {i.name: types[i.name].values_by_number[i.data_type].name for i in config.input}
    assert named["age"] == "TYPE_FP32"
    assert named["country"] == "TYPE_STRING"
    assert named["watched"] == "TYPE_INT64"
    assert named["watched.lengths"] == "TYPE_INT32"
    assert {i.name for i in config.input if i.optional} == {"mood", "fresh"}
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 32]
    assert (config.dynamic_batching.priority_levels, config.dynamic_batching.default_priority_level) == (4, 2)
    assert config.dynamic_batching.default_queue_policy.allow_timeout_override
    assert config.dynamic_batching.default_queue_policy.default_timeout_microseconds == 0
    assert config.parameters["buckets"].string_value == "8x1, 32x1, 32x32"
    assert list(config.version_policy.specific.versions) == [3]
    assert not config.model_transaction_policy.decoupled


def test_model_config_tells_the_servers_own_timeout(serving, wire):
    service = InferenceService(serving.repository, default_timeout_seconds=0.25)
    config = service.model_config(wire.messages.ModelConfigRequest(name="feed"), None).config
    assert config.dynamic_batching.default_queue_policy.default_timeout_microseconds == 250_000


def test_model_config_of_an_unknown_model_is_not_found(client):
    with pytest.raises(triton.InferenceServerException, match="unknown model: 'food' is not found") as info:
        client.get_model_config("food")
    assert info.value.status() == "StatusCode.NOT_FOUND"


def duration(value):
    return int(value["count"]) if value else 0, int(value.get("ns", 0))


def test_statistics_are_what_the_metrics_count(serving, client, wire):
    metrics = serving.engine.metrics
    metrics.record_batch(Bucket(32, 1), 20, 1, 0.002, 0.004)
    metrics.record_batch(Bucket(32, 32), 30, 4, 0.003, 0.005)
    metrics.record_batch(Bucket(8, 1), 8, 1, 0.001, 0.001)
    metrics.record_success(20, Timings(queue=0.001, gather=0.002, execute=0.004, total=0.010))
    metrics.record_success(38, Timings(queue=0.002, gather=0.003, execute=0.005, total=0.020))
    metrics.record_failure("REJECTED", 0.5)
    serving.refusal(wire.raw(age=("FP32", [1], b"")))  # its time counts too
    metrics.set_tables(places={"videos": ("huge", 4096)}, huge_page_bytes=0, checked_bytes=lambda: 0)
    ((stats,),) = client.get_inference_statistics("feed", as_json=True).values()
    assert (stats["name"], stats["version"]) == ("feed", "3")
    assert (stats["inference_count"], stats["execution_count"]) == ("58", "3")
    stages = stats["inference_stats"]
    assert duration(stages["success"]) == (2, 30_000_000)
    assert duration(stages["queue"]) == (2, 3_000_000)
    assert duration(stages["compute_input"]) == (2, 5_000_000)
    assert duration(stages["compute_infer"]) == (2, 9_000_000)
    assert duration(stages["compute_output"]) == (2, 30_000_000 - 3_000_000 - 5_000_000 - 9_000_000)
    failures, nanoseconds = duration(stages["fail"])
    assert failures == 2
    assert 500_000_000 < nanoseconds < 10_500_000_000
    by_size = {int(one["batch_size"]): one for one in stats["batch_stats"]}
    assert sorted(by_size) == [8, 32]
    assert duration(by_size[32]["compute_input"]) == (2, 5_000_000)
    assert duration(by_size[32]["compute_infer"]) == (2, 9_000_000)
    assert duration(by_size[8]["compute_infer"]) == (1, 1_000_000)
    assert stats["memory_usage"] == [{"type": "CPU", "byte_size": "4096"}]
    assert 1.7e12 < int(stats["last_inference"]) < 1e14  # milliseconds since 1970


def test_statistics_of_all_models_and_versions(serving, client, wire):
    serving.repository.add(wire.spec, 12)
    other = type(wire.spec)(
        name="other", features=wire.spec.features, tables=wire.spec.tables, tasks=wire.spec.tasks
    )
    serving.repository.add(other, 1)

    def listed(*of):
        return [(stats.name, stats.version) for stats in client.get_inference_statistics(*of).model_stats]

    assert listed() == [("feed", "3"), ("feed", "12"), ("other", "1")]
    assert listed("feed") == [("feed", "3"), ("feed", "12")]
    assert listed("feed", "12") == [("feed", "12")]
    serving.repository.loading.add(("feed", 12))
    assert listed("feed") == [("feed", "3")]
    serving.repository.loading.add(("feed", 3))
    with pytest.raises(triton.InferenceServerException, match="not at ready state"):
        listed("feed")
    with pytest.raises(triton.InferenceServerException, match="unknown model: 'food'"):
        listed("food")


def test_extensions_are_those_that_answer(client):
    assert list(client.get_server_metadata().extensions) == [
        "model_configuration",
        "model_repository",
        "parameters",
        "schedule_policy",
        "statistics",
    ]


def test_the_index_lists_every_version_and_why_one_is_not_ready(serving, client, wire):
    status = type(serving.repository.index()[0])
    serving.repository.failed = [status("feed", 4, "UNAVAILABLE", "golden request 3 gets other scores")]
    serving.repository.add(wire.spec, 5)
    serving.repository.loading.add(("feed", 5))
    models = client.get_model_repository_index().models
    assert [(m.name, m.version, m.state, m.reason) for m in models] == [
        ("feed", "3", "READY", ""),
        ("feed", "5", "LOADING", ""),
        ("feed", "4", "UNAVAILABLE", "golden request 3 gets other scores"),
    ]
    ready = serving.call("RepositoryIndex", wire.messages.RepositoryIndexRequest(ready=True))
    assert [m.version for m in ready.models] == ["3"]


def test_models_are_not_changed_over_the_main_port(serving, client):
    for change in (client.load_model, client.unload_model):
        with pytest.raises(
            triton.InferenceServerException, match="administrative RPCs are off on this port"
        ) as info:
            change("feed")
        assert info.value.status() == "StatusCode.PERMISSION_DENIED"
    assert serving.repository.calls == []


def test_models_are_loaded_and_unloaded_over_the_administrative_port(serving):
    repository = serving.repository
    with (
        AdminServer(repository, 0, manager=repository) as server,
        triton.InferenceServerClient(server.address) as admin,
    ):
        admin.load_model("feed")
        admin.unload_model("feed")
        assert repository.calls == [("load", "feed"), ("unload", "feed")]
        assert [m.name for m in admin.get_model_repository_index().models] == ["feed"]
        with pytest.raises(triton.InferenceServerException, match="'food' is not found") as info:
            admin.load_model("food")
        assert info.value.status() == "StatusCode.NOT_FOUND"


def test_models_are_rolled_back_over_the_administrative_port_where_they_may_be(serving):
    repository = serving.repository
    with AdminServer(repository, 0, manager=repository) as server, AdminClient(server.address) as admin:
        assert [admin.rollback("feed"), admin.rollback("feed", 1)] == [2, 1]
        with pytest.raises(RequestError, match=r"^model 'feed': rollback is for policies latest and all$"):
            admin.rollback("feed", 9)
    assert repository.calls == [("rollback", "feed", None), ("rollback", "feed", 1)]
    with (
        AdminServer(repository, 0) as server,
        AdminClient(server.address) as admin,
        pytest.raises(AccessError, match="models can't be rolled back on this port"),
    ):
        admin.rollback("feed")
    with (
        AdminServer(repository, 0, manager=repository, is_one_of_many=True) as server,
        AdminClient(server.address) as admin,
        pytest.raises(UnsupportedError, match="publish the older version again under a number above"),
    ):
        admin.rollback("feed")
    assert len(repository.calls) == 2


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("feed", {"config": "{}"}, "parameter 'config': a model is loaded from the server's own folder"),
        ("feed", {"config": "{}", "files": {"file:1/model.py": b"x"}}, "no file comes from a caller"),
        ("../feed", {}, "model '../feed': expected the name of a model"),
        ("/etc", {}, "model '/etc': expected the name"),
        ("a\0b", {}, "expected the name of a model"),
        ("", {}, "model '': expected the name"),
    ],
)
def test_no_path_and_no_file_comes_from_a_caller(serving, name, options, text):
    repository = serving.repository
    with (
        AdminServer(repository, 0, manager=repository) as server,
        triton.InferenceServerClient(server.address) as admin,
    ):
        with pytest.raises(triton.InferenceServerException, match=text) as info:
            admin.load_model(name, **options)
        assert info.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert repository.calls == []


def test_there_is_one_repository(serving, wire):
    with pytest.raises(grpc.RpcError, match="repository 'other': expected no name") as info:
        serving.call("RepositoryIndex", wire.messages.RepositoryIndexRequest(repository_name="other"))
    assert info.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_model_that_goes_away_meanwhile_is_left_out(serving, wire):
    class Leaving(type(serving.repository)):
        def models(self):
            return [("feed", 3, True), ("gone", 1, True)]

        def engine(self, name, version):
            if name == "gone":
                raise UnavailableError("model 'gone' is shutting down")
            return serving.engine

    service = InferenceService(Leaving(serving.metrics))
    stats = service.model_statistics(wire.messages.ModelStatisticsRequest(), None).model_stats
    assert [one.name for one in stats] == ["feed"]
