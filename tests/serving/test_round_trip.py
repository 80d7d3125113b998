"""Requests in every form through a real server."""

import dataclasses
import threading

import numpy as np
import pytest
from xlarank_serving.client import RankingClient

from xlarank.errors import DeadlineError, FeatureError, ModelNotFoundError, RequestError, UnavailableError
from xlarank.spec import FeatureSpec, Ragged, RankRequest, StringColumn

TYPED = {
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "BYTES": "bytes_contents",
}


def scores_of(response):
    raws = response.raw_output_contents
    return {o.name: np.frombuffer(raw, "<f4") for o, raw in zip(response.outputs, raws, strict=True)}


def as_typed(request, wire):
    """The same request with typed contents."""
    typed = wire.messages.ModelInferRequest(model_name=request.model_name)
    dtypes = {"FP32": "<f4", "FP64": "<f8", "INT32": "<i4", "INT64": "<i8"}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.datatype == "BYTES":
            values, position = [], 0
            while position < len(raw):
                size = int.from_bytes(raw[position : position + 4], "little")
                values.append(raw[position + 4 : position + 4 + size])
                position += 4 + size
        else:
            values = np.frombuffer(raw, dtypes[tensor.datatype]).tolist()
        copy = typed.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        getattr(copy.contents, TYPED[tensor.datatype]).extend(values)
    return typed


@pytest.mark.parametrize("packed", [False, True])
def test_client_gets_the_scores_of_exactly_what_it_sent(shared, wire, candidates, packed):
    scores = shared.client.score("feed", candidates, packed=packed)
    expected = wire.expected(RankRequest(wire.spec, candidates))
    assert list(scores) == ["finish", "share.score"]
    np.testing.assert_array_equal(scores["finish"], expected["finish"])
    np.testing.assert_array_equal(scores["share.score"], expected["share"])
    assert scores["finish"].dtype == np.float32
    assert scores["finish"].flags.writeable


@pytest.mark.parametrize("packed", [False, True])
def test_the_server_sees_the_very_columns_that_the_client_was_given(serving, wire, candidates, packed):
    serving.client.score("feed", candidates, packed=packed)
    (seen,) = serving.engine.requests
    for ours, theirs in zip(RankRequest(wire.spec, candidates).columns, seen.columns, strict=True):
        assert type(ours) is type(theirs)
        for a, b in zip(flat(ours), flat(theirs), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def flat(column):
    if isinstance(column, Ragged):
        return [*flat(column.values), column.lengths]
    if isinstance(column, StringColumn):
        return [column.blob, column.offsets]
    return [column]


@pytest.mark.parametrize("packed", [False, True])
def test_features_with_a_default_may_be_left_out(shared, wire, candidates, packed):
    del candidates["mood"]
    candidates["fresh"] = None
    scores = shared.client.score("feed", candidates, packed=packed)
    expected = wire.expected(RankRequest(wire.spec, candidates))
    np.testing.assert_array_equal(scores["finish"], expected["finish"])


@pytest.mark.parametrize("packed", [False, True])
def test_no_candidates_give_an_empty_answer(shared, candidates, packed):
    for name in ("video", "topics", "tags", "likes", "hour", "fresh"):
        candidates[name] = []
    candidates["vector"] = np.zeros((0, 3), np.float32)
    scores = shared.client.score("feed", candidates, packed=packed)
    assert {name: values.shape for name, values in scores.items()} == {"finish": (0,), "share.score": (0,)}


def test_raw_and_typed_contents_mean_the_same(shared, wire):
    raw = wire.raw(**wire.valid(5))
    typed = as_typed(raw, wire)
    assert not typed.raw_input_contents
    answers = [scores_of(shared.infer(request)) for request in (raw, typed)]
    assert len(answers[0]["finish"]) == 5
    np.testing.assert_array_equal(answers[0]["finish"], answers[1]["finish"])


@pytest.mark.parametrize("typed", [False, True])
def test_typed_and_raw_empty_tensors_are_accepted(shared, wire, typed):
    request = wire.raw(**wire.valid(0))
    response = shared.infer(as_typed(request, wire) if typed else request)
    assert [list(output.shape) for output in response.outputs] == [[0], [0]]


def test_fp64_and_int32_are_converted(shared, wire):
    narrow = wire.valid(4)
    wide = dict(narrow)
    for name in ("age", "likes", "vector", "hour"):
        wide[name] = narrow[name].astype(np.float64)
    for name in ("watched", "video", "topics"):
        wide[name] = narrow[name].astype(np.int32)
    first, second = (scores_of(shared.infer(wire.raw(**inputs))) for inputs in (narrow, wide))
    np.testing.assert_array_equal(first["finish"], second["finish"])


def test_a_column_of_width_one_may_be_a_matrix(shared, wire):
    inputs = wire.valid(4)
    vector = scores_of(shared.infer(wire.raw(**inputs)))
    inputs["likes"] = inputs["likes"][:, None]
    inputs["age"] = inputs["age"][:, None]
    matrix = scores_of(shared.infer(wire.raw(**inputs)))
    np.testing.assert_array_equal(vector["finish"], matrix["finish"])


def test_packed_and_named_tensors_may_be_mixed(shared, wire, candidates):
    request = RankRequest(wire.spec, candidates)
    inputs = {
        "age": np.array([31.5], np.float32),
        "mood": np.array([[0.25, 0.75]], np.float32),
        "country": [b"de"],
        "context__values": np.array([5, 6, 7], np.int64),
        "context__lengths": np.array([[3]], np.int32),
        # likes, vector, hour; then video, topics, fresh: in the order of the ModelSpec.
        "candidate__dense": np.array([[0.5, 1, 2, 3, 3], [1.5, 4, 5, 6, 9], [2.5, 7, 8, 9, 23]], np.float32),
        "candidate__values": np.array([8, 0, 99, 1, 2, 2**40, 4, 5, 6], np.int64),
        "candidate__lengths": np.array([[1, 1, 1], [2, 0, 1], [1, 1, 1]], np.int32),
        "tags": [b"a", b"b", b"ccc"],
        "tags__lengths": np.array([1, 2, 0], np.int32),
    }
    scores = scores_of(shared.infer(wire.raw(**inputs)))
    np.testing.assert_array_equal(scores["finish"], wire.expected(request)["finish"])


def test_a_packed_id_of_length_zero_in_every_row_takes_its_default(shared, wire, candidates):
    del candidates["fresh"]
    expected = wire.expected(RankRequest(wire.spec, candidates))
    inputs = wire.valid(3) | {
        "age": np.array([31.5], np.float32),
        "mood": np.array([[0.25, 0.75]], np.float32),
        "candidate__values": np.array([8, 0, 99, 1, 2, 2**40], np.int64),
        "candidate__lengths": np.array([[1, 1, 1], [2, 0, 1], [0, 0, 0]], np.int32),
        "tags": [b"a", b"b", b"ccc"],
        "tags__lengths": np.array([1, 2, 0], np.int32),
        "likes": np.array([0.5, 1.5, 2.5], np.float32),
        "vector": np.arange(1, 10, dtype=np.float32).reshape(3, 3),
        "hour": np.array([3, 9, 23], np.float32),
    }
    for name in ("video", "topics", "topics__lengths"):
        del inputs[name]
    scores = scores_of(shared.infer(wire.raw(**inputs)))
    np.testing.assert_array_equal(scores["finish"], expected["finish"])


def test_the_response_carries_id_version_and_raw_scores(shared, wire):
    request = wire.raw(**wire.valid(3))
    request.id = "request-7"
    response = shared.infer(request)
    assert (response.model_name, response.model_version, response.id) == ("feed", "3", "request-7")
    assert [(o.name, o.datatype, list(o.shape)) for o in response.outputs] == [
        ("finish", "FP32", [3]),
        ("share.score", "FP32", [3]),
    ]
    assert [len(raw) for raw in response.raw_output_contents] == [12, 12]
    assert not any(output.HasField("contents") for output in response.outputs)


def test_only_requested_outputs_are_answered(shared, wire):
    request = wire.raw(**wire.valid(2))
    request.outputs.add(name="share.score")
    request.outputs.add(name="share.score")
    response = shared.infer(request)
    assert [output.name for output in response.outputs] == ["share.score"]
    assert len(response.raw_output_contents) == 1


def test_a_version_may_be_named_and_the_latest_answers_otherwise(serving, wire):
    serving.repository.add(wire.spec, 12)
    request = wire.raw(**wire.valid(1))
    assert serving.infer(request).model_version == "12"
    request.model_version = "3"
    assert serving.infer(request).model_version == "3"
    assert list(serving.client.metadata("feed").versions) == ["3", "12"]


def test_client_refuses_what_the_model_has_no_input_for(shared, candidates):
    with pytest.raises(
        FeatureError, match=r"model 'feed' has no feature 'heigth'; it has \['age', 'country'"
    ):
        shared.client.score("feed", candidates | {"heigth": 1.0})
    with pytest.raises(FeatureError, match=r"feature 'vector': expected float32 of shape \[N, 3\]"):
        shared.client.score("feed", candidates | {"vector": [[1.0], [2.0], [3.0]]})
    with pytest.raises(FeatureError, match="expected at least one of the candidate features"):
        shared.client.score("feed", {"age": 1.0})


def test_client_raises_what_the_server_says(shared, candidates):
    with pytest.raises(RequestError, match=r"feature 'video': expected ids in \[0, 100\) of table 'videos'"):
        shared.client.score("feed", candidates | {"video": [1, 2, 100]})
    with pytest.raises(ModelNotFoundError, match="Request for unknown model: 'food' is not found"):
        shared.client.score("food", candidates)
    with pytest.raises(ModelNotFoundError, match="'feed' version 4 is not found"):
        shared.client.score("feed", candidates, version=4)
    assert len(shared.client.score("feed", candidates, version=3)["finish"]) == 3


def test_client_learns_of_inputs_that_a_newer_version_added(serving, wire, candidates):
    shares = FeatureSpec(name="shares", kind="dense", scope="candidate")
    spec = dataclasses.replace(wire.spec, features=(*wire.spec.features, shares))
    serving.client.score("feed", candidates)
    with pytest.raises(FeatureError, match="model 'feed' has no feature 'shares'"):
        serving.client.score("feed", candidates | {"shares": [1.0, 2.0, 3.0]})
    serving.repository.add(spec, 4)
    assert len(serving.client.score("feed", candidates | {"shares": [1.0, 2.0, 3.0]})["finish"]) == 3


def test_client_learns_of_inputs_that_a_newer_version_dropped(serving, wire, candidates):
    serving.client.score("feed", candidates)
    serving.repository.add(dataclasses.replace(wire.spec, features=wire.spec.features[:-1]), 4)
    with pytest.raises(RequestError, match="model 'feed' has no input 'fresh'"):
        serving.client.score("feed", candidates)
    del candidates["fresh"]
    assert len(serving.client.score("feed", candidates)["finish"]) == 3


def test_a_deadline_that_passes_is_told_and_cancels_the_request(serving, candidates):
    serving.client.score("feed", candidates)  # so that the inputs are known
    serving.engine.hold()
    with pytest.raises(DeadlineError, match="Deadline Exceeded"):
        serving.client.score("feed", candidates, timeout=0.5)
    ((future, _),) = serving.engine.held
    gone = threading.Event()
    future.add_done_callback(lambda _: gone.set())
    assert gone.wait(timeout=10)
    assert future.cancelled()  # so the engine drops it, and its thread is free again
    serving.engine.release()
    assert len(serving.client.score("feed", candidates)["finish"]) == 3


def test_client_says_when_nobody_answers(wire, candidates):
    running = wire.start()
    address = running.server.address
    running.channel.close()
    running.client.close()
    running.server.stop(0)
    with RankingClient(address) as client:
        assert not client.is_ready()
        with pytest.raises(UnavailableError):
            client.score("feed", candidates)
