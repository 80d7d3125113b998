import grpc
import numpy as np
import pytest

from xlarank.spec import RankRequest


@pytest.mark.parametrize("packed", [False, True])
def test_client_gets_the_scores_of_exactly_what_it_sent(shared, wire, candidates, packed):
    scores = shared.client.score("feed", candidates, packed=packed)
    expected = wire.expected(RankRequest(wire.spec, candidates))
    assert list(scores) == ["finish", "share.score"]
    np.testing.assert_array_equal(scores["finish"], expected["finish"])
    np.testing.assert_array_equal(scores["share.score"], expected["share"])
    assert scores["finish"].dtype == np.float32
