"""Some thousand broken requests to a server of a fake engine; `make fuzz` sends 100,000 to a real process."""

import grpc
import numpy as np
import pytest
from fuzz_model_infer import Fuzzer, FuzzFailure, valid_requests
from mutations import MUTATIONS

from xlarank.errors import FeatureError
from xlarank.spec import RankRequest

NUM_CASES = 2000
SEED = 5


@pytest.fixture
def valid(wire, candidates):
    """Requests of 0 to 5 candidates in every form, with their scores."""
    requests = [RankRequest(wire.spec, {**candidates, **few(candidates, n)}) for n in (0, 1, 3)]
    return valid_requests(wire.spec, requests, [by_output(wire.expected(request)) for request in requests])


def few(candidates, n):
    names = ("video", "topics", "tags", "likes", "vector", "hour", "fresh")
    few = {name: candidates[name][:n] for name in names}
    return few if n else few | {"vector": np.zeros((0, 3), np.float32)}


def by_output(scores):
    return {"finish": scores["finish"], "share.score": scores["share"]}


def test_no_request_crashes_the_server_or_gets_a_wrong_status(shared, valid):
    fuzzer = Fuzzer(shared.channel, valid, SEED)
    fuzzer.run(range(NUM_CASES))
    assert fuzzer.outcomes.total() == NUM_CASES
    # It looks where it is meant to: most are refused, and enough are let pass to see their scores.
    assert fuzzer.outcomes["INVALID_ARGUMENT"] > NUM_CASES / 3
    assert fuzzer.outcomes["NOT_FOUND"] > NUM_CASES / 50
    assert fuzzer.outcomes["OK"] > NUM_CASES / 10


def test_a_case_is_the_same_every_time(shared, valid):
    cases = [[Fuzzer(shared.channel, valid, seed).case(n) for n in range(200)] for seed in (1, 1, 2)]
    data = [[(case.data, case.allowed) for case in each] for each in cases]
    assert data[0] == data[1]
    assert data[0] != data[2]
    assert len({case.data for case in cases[0]}) > 150


def test_every_mutation_is_met_and_changes_requests(valid):
    rng = np.random.default_rng(0)
    for mutation in MUTATIONS:
        changed = 0
        for each in valid:
            message = type(each.message)()
            message.CopyFrom(each.message)
            mutation(message, rng)
            changed += message != each.message
        assert changed >= len(valid) / 4, mutation.__name__


@pytest.mark.parametrize(
    ("error", "told"),
    [(ZeroDivisionError("boom"), "got INTERNAL: 'internal error: ZeroDivisionError: boom'; expected of")],
)
def test_a_crash_is_found(serving, valid, error, told):
    serving.engine.error = error
    with pytest.raises(FuzzFailure, match=told) as caught:
        Fuzzer(serving.channel, valid, 3).run(range(200))
    assert "seed 3 case " in str(caught.value)
    assert "--seed 3 --case " in str(caught.value)


def test_a_wrong_score_is_found(serving, valid):
    submit = serving.engine.submit

    def wrong(request, options=None):
        future = submit(request, options)
        for scores in future.result().scores.values():
            scores += 1
        return future

    serving.engine.submit = wrong
    with pytest.raises(FuzzFailure, match="got an answer that is wrong: finish: "):
        Fuzzer(serving.channel, valid, 3).run(range(200))


def test_a_refusal_of_a_valid_request_is_found(serving, valid):
    serving.engine.error = FeatureError("no")
    with pytest.raises(FuzzFailure, match=r"a valid request after got INVALID_ARGUMENT: 'no'|SAME_SCORES"):
        Fuzzer(serving.channel, valid, 3).run(range(200))


def test_a_server_that_is_gone_is_found(valid):
    with grpc.insecure_channel("127.0.0.1:1") as channel, pytest.raises(FuzzFailure, match="got UNAVAILABLE"):
        Fuzzer(channel, valid, 3).run(range(10))
