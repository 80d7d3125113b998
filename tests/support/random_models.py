"""Random models, tables and requests for the gather."""

import numpy as np
import pytest

from xlarank.host import decode_rows, encode_rows, native_available
from xlarank.spec import (
    FeatureSpec,
    ModelSpec,
    OutOfRange,
    Ragged,
    RankRequest,
    RowFormat,
    StringColumn,
    TableSpec,
    TaskSpec,
)

needs_native = pytest.mark.skipif(not native_available(), reason="the native kernel isn't built")

WORDS = ["", "a", "ab", "naïve", "x" * 31, "y" * 32, "z" * 33, "w" * 100]
DIMS = [1, 2, 3, 4, 5, 8, 12, 16, 17, 31, 32, 48, 64, 100, 128, 129, 256, 260]
DENSE_CHAINS = [
    (),
    ({"op": "log1p"},),
    ({"op": "clip", "low": -0.5, "high": 2.0},),
    ({"op": "clip", "low": -0.5, "high": 2.0}, {"op": "log1p"}),
    ({"op": "standardise", "mean": 0.3, "std": 1.7},),
    (
        {"op": "log1p"},
        {"op": "standardise", "mean": 0.1, "std": 0.2},
        {"op": "clip", "low": -1, "high": 1e39},
    ),
]


def random_table(rng, index):
    return TableSpec(
        name=f"t{index}",
        dim=int(rng.choice(DIMS)),
        rows=int(rng.integers(len(WORDS) + 2, 40)),
        dtype=RowFormat(str(rng.choice(list(RowFormat)))),
        out_of_range=OutOfRange(str(rng.choice(["error", "zero", "clip", "hash"]))),
    )


def random_feature(rng, index, scope, tables):
    kind = str(rng.choice(["dense", "id", "id", "id_list", "id_list", "sequence"]))
    fields: dict = {"name": f"f{index}", "kind": kind, "scope": scope}
    chain = DENSE_CHAINS[rng.integers(len(DENSE_CHAINS))]
    if kind == "dense":
        fields |= {"width": int(rng.integers(1, 4)), "preprocessing": chain}
        if rng.random() < 0.5:
            fields["default"] = 0.25
        return FeatureSpec(**fields)
    fields["table"] = str(rng.choice([table.name for table in tables]))
    if kind == "id_list":
        fields["combiner"] = str(rng.choice(["sum", "mean", "sqrtn"]))
    if kind == "sequence" or (kind == "id_list" and rng.random() < 0.5):
        fields["max_length"] = int(rng.integers(1, 6))
    source = rng.choice(["id", "hash", "hash_string", "vocabulary", "vocabulary_string", "bucketise"])
    if source == "bucketise" and kind == "id":
        boundaries = [-0.3, 0.0, 0.5, 1.0]
        fields["preprocessing"] = (*chain, {"op": "bucketise", "boundaries": boundaries})
        fields["default"] = 0.75
    elif source.startswith("hash"):
        fields["preprocessing"] = ({"op": "hash", "seed": int(rng.integers(2**63))},)
    elif source == "vocabulary":
        fields["preprocessing"] = ({"op": "vocabulary", "values": [7, -3, 2**62, 0]},)
    elif source == "vocabulary_string":
        fields["preprocessing"] = ({"op": "vocabulary", "values": WORDS[1:]},)
    if source.endswith("string"):
        fields["dtype"] = "string"
    return FeatureSpec(**fields)


def random_spec(rng):
    tables = [random_table(rng, i) for i in range(3)]
    features = [random_feature(rng, i, "context", tables) for i in range(int(rng.integers(0, 6)))]
    features += [random_feature(rng, i + 10, "candidate", tables) for i in range(int(rng.integers(1, 7)))]
    used = {feature.table for feature in features}
    return ModelSpec(
        name="m",
        features=tuple(features),
        tables=tuple(table for table in tables if table.name in used),
        tasks=(TaskSpec(name="like"),),
    )


def random_values(rng, spec, feature, count):
    if feature.dtype == "string":
        return StringColumn.from_strings([WORDS[i] for i in rng.integers(len(WORDS), size=count)])
    if feature.dtype == "float32":
        shape = (count, feature.width) if feature.kind == "dense" else (count,)
        values = rng.uniform(-0.9, 3, shape).astype(np.float32)
        if feature.default is not None:
            values[rng.random(shape) < 0.3] = np.nan
        return values
    num_rows = spec.table_of(feature).num_rows
    ids = rng.integers(0, num_rows, count)
    ids[rng.random(count) < 0.2] = rng.choice([0, num_rows - 1])
    strict = spec.table_of(feature).out_of_range == "error"
    if not strict or feature.hash or feature.vocabulary:
        wild = rng.random(count) < 0.3
        extremes = np.array([-1, num_rows, 2**31, -(2**63), 2**63 - 1, 7, -3, 2**62])
        ids[wild] = rng.choice(extremes, wild.sum())
    return ids


def random_request(rng, spec, num_candidates):
    features = {}
    for feature in spec.features:
        rows = 1 if feature.scope == "context" else num_candidates
        if feature.is_ragged:
            lengths = rng.choice([0, 1, 2, 3, 9], rows).astype(np.int32)
            features[feature.name] = Ragged(random_values(rng, spec, feature, int(lengths.sum())), lengths)
        else:
            features[feature.name] = random_values(rng, spec, feature, rows)
    return RankRequest(spec, features)


def random_tables(rng, spec):
    values = {t.name: rng.standard_normal((t.num_rows, t.dim)).astype(np.float32) for t in spec.tables}
    return {
        t.name: values[t.name] if t.dtype == "float32" else encode_rows(values[t.name], t.dtype)
        for t in spec.tables
    }


def decoded(table):
    return table if isinstance(table, np.ndarray) else decode_rows(table)


def random_parts(rng, spec, num_requests=4, most=9):
    parts = []
    for _ in range(num_requests):
        request = random_request(rng, spec, int(rng.integers(1, most)))
        begin = int(rng.integers(request.num_candidates))
        parts.append((request, begin, int(rng.integers(begin, request.num_candidates)) + 1))
    return parts


def rows_of(parts):
    return sum(end - begin for _, begin, end in parts)


def assert_equal(ours, expected):
    assert ours.keys() == expected.keys()
    for name, values in expected.items():
        assert (ours[name].dtype, ours[name].shape) == (values.dtype, values.shape)
        # As bits: -0 is not 0, and a NaN is itself.
        np.testing.assert_array_equal(ours[name].view(np.uint8), values.view(np.uint8), err_msg=name)
