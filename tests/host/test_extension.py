"""Without the built extension everything works in NumPy, and one warning says so."""

import subprocess
import sys

from xlarank.host import native_available

_PROGRAM = """
import sys
sys.modules["xlarank.host._native"] = None  # as if it weren't built
import numpy as np
from xlarank.errors import ConfigError
from xlarank.host import Gatherer, Segment, aligned_empty, hash_int64, native_available, split_bytes_tensor
from xlarank.spec import Bucket, ModelSpec, RankRequest
assert not native_available()
spec = ModelSpec.from_dict({
    "name": "m",
    "features": [{"name": "item", "kind": "id", "scope": "candidate", "table": "t",
                  "preprocessing": [{"op": "vocabulary", "values": [5, 6]}]}],
    "tables": [{"name": "t", "dim": 2, "rows": 3}],
    "tasks": [{"name": "like"}],
})
tables = {"t": np.array([[1, 2], [3, 4], [5, 6]], np.float32)}
gatherer = Gatherer(spec, tables)
assert gatherer.backend == "numpy"
request = RankRequest(spec, {"item": [6, 9]}, check=gatherer.check)
out = {leaf.name: aligned_empty(leaf.shape(Bucket(2, 1)), leaf.dtype) for leaf in gatherer.signature.leaves}
gatherer.gather([Segment(gatherer.bind(request), 0, 2)], Bucket(2, 1), out)
assert out["candidate"].tolist() == [[5, 6], [1, 2]]
halves = {leaf.name: aligned_empty(leaf.shape(Bucket(2, 1)), leaf.dtype)
          for leaf in Gatherer(spec, tables, activations="bfloat16").signature.leaves}
assert (halves["candidate"].dtype.name, halves["candidate"].nbytes) == ("bfloat16", 8)
assert split_bytes_tensor(b"\\x01\\0\\0\\0a").to_bytes() == [b"a"]
assert hash_int64(np.array([1]), 0).dtype == np.uint64
try:
    Gatherer(spec, tables, backend="native")
except ConfigError as error:
    print(error)
"""


def test_the_kernel_is_built_so_that_no_test_of_it_is_skipped_unseen():
    assert native_available()


def test_everything_works_in_numpy_with_one_warning():
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", _PROGRAM],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "backend 'native' was asked for but the kernel isn't built" in result.stdout
    assert result.stderr.count("the native kernel of xlarank is not available") == 1
