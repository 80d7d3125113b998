import numpy as np
import pytest

from xlarank.host import Segment, aligned_empty


def _outputs(gatherer, bucket):
    arrays = {leaf.name: aligned_empty(leaf.shape(bucket), leaf.dtype) for leaf in gatherer.signature.leaves}
    for array in arrays.values():
        array.view(np.uint8)[...] = 0xFF if array.dtype != bool else 1
    return arrays


def _gather(gatherer, parts, bucket):
    out = _outputs(gatherer, bucket)
    bound = {id(request): gatherer.bind(request) for request, _, _ in parts}
    gatherer.gather([Segment(bound[id(r)], begin, end) for r, begin, end in parts], bucket, out)
    return out


@pytest.fixture(scope="session")
def outputs():
    """(gatherer, bucket) → arrays of a batch, full of what an earlier batch might have left."""
    return _outputs


@pytest.fixture(scope="session")
def gather():
    """(gatherer, [(request, begin, end)], bucket) → filled arrays of that batch."""
    return _gather
