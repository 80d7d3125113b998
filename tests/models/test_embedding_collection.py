"""The plain JAX lookup against NumPy."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from xlarank.errors import ConfigError
from xlarank.models import EmbeddingCollection
from xlarank.spec import Combiner, ModelSpec, Ragged


@pytest.fixture
def collection(spec):
    return EmbeddingCollection(spec, rngs=nnx.Rngs(0))


def rows_of(table, rows):
    """Table rows by number; -1 is zeros."""
    return np.stack([table[row] if row >= 0 else np.zeros_like(table[0]) for row in rows])


@pytest.mark.parametrize("combiner", list(Combiner))
def test_a_bag_is_pooled_over_its_length(spec, inputs, combiner):
    features = tuple(
        dataclasses.replace(f, combiner=combiner) if f.name == "tags" else f for f in spec.features
    )
    collection = EmbeddingCollection(dataclasses.replace(spec, features=features), rngs=nnx.Rngs(0))
    table = collection.to_numpy()["items"]
    inputs["tags"][3, 0] = -1  # inside the bag: reads as zeros and counts
    pooled = np.asarray(collection(inputs)["tags"])
    for row, length in enumerate(inputs["tags.lengths"]):
        total = rows_of(table, inputs["tags"][row, :length]).sum(axis=0) if length else np.zeros(8)
        divisor = {Combiner.SUM: 1, Combiner.MEAN: length, Combiner.SQRTN: np.sqrt(length)}[combiner]
        np.testing.assert_allclose(pooled[row], total / max(divisor, 1), rtol=1e-6, atol=1e-7)


def test_an_empty_bag_gives_zeros(collection, inputs):
    assert not np.asarray(collection(inputs)["tags"])[1].any()


def test_a_sequence_keeps_its_steps_and_is_zero_beyond_its_length(collection, inputs):
    activations = collection(inputs)
    table = collection.to_numpy()["items"]
    lengths = inputs["history.lengths"]
    mask = np.arange(5) < lengths[:, None]
    np.testing.assert_array_equal(activations["history.mask"], mask)
    assert activations["history.mask"].dtype == bool
    for row, length in enumerate(lengths):
        expected = np.zeros((5, 8), np.float32)
        if length:
            expected[:length] = rows_of(table, inputs["history"][row, :length])
        np.testing.assert_array_equal(activations["history"][row], expected)


def test_ids_give_table_rows_and_floats_pass(collection, inputs):
    inputs["user"][2] = -1
    activations = collection(inputs)
    np.testing.assert_array_equal(
        activations["user"], rows_of(collection.to_numpy()["users"], inputs["user"])
    )
    np.testing.assert_array_equal(activations["age"], inputs["age"])


def test_the_lookup_takes_what_preprocessing_gives(spec):
    from xlarank.host.preprocessing import model_inputs

    columns = (
        np.ones((2, 3), np.float32),
        np.array([0, 6]),
        Ragged.from_bags([[1, 2, 3, 4, 5, 6], []]),
        np.array([10, 0]),
        Ragged.from_bags([[], [3, 3]]),
    )
    collection = EmbeddingCollection(spec, rngs=nnx.Rngs(0))
    table = collection.to_numpy()["items"]
    activations = collection(model_inputs(spec, columns))
    np.testing.assert_array_equal(activations["history"][0], table[[2, 3, 4, 5, 6]])  # the last max_length
    np.testing.assert_allclose(activations["tags"], np.stack([np.zeros(8), table[3]]), rtol=1e-6)


def test_given_tables_come_back_as_they_were(spec):
    tables = {"users": np.arange(56, dtype=np.float32).reshape(7, 8), "items": np.ones((11, 8), np.float32)}
    exported = EmbeddingCollection(spec, tables=tables).to_numpy()
    for name, table in tables.items():
        np.testing.assert_array_equal(exported[name], table)
        assert exported[name].dtype == np.float32
        assert exported[name].flags.c_contiguous


def test_tables_of_another_shape_are_refused(spec):
    tables = {"users": np.ones((7, 8)), "items": np.ones((11, 9))}
    with pytest.raises(ConfigError, match=r"table 'items': expected shape \[11, 8\], got \[11, 9\]"):
        EmbeddingCollection(spec, tables=tables)
    with pytest.raises(ConfigError, match=r"expected tables \['users', 'items'\], got \['users'\]"):
        EmbeddingCollection(spec, tables={"users": tables["users"]})


def test_unfitted_tables_are_refused(spec):
    tables = tuple(dataclasses.replace(table, rows=None) for table in spec.tables)
    with pytest.raises(ConfigError, match="table 'users': rows are not fitted"):
        EmbeddingCollection(dataclasses.replace(spec, tables=tables), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", ["items", "keys", "values", "get", "pop", "update", "train", "eval"])
def test_a_table_may_be_named_like_a_method(name):
    spec = ModelSpec.from_dict(
        {
            "name": "named",
            "features": [{"name": "f", "kind": "id", "scope": "candidate", "table": name}],
            "tables": [{"name": name, "dim": 2, "rows": 3}],
            "tasks": [{"name": "t"}],
        }
    )
    collection = EmbeddingCollection(spec, rngs=nnx.Rngs(0))
    collection.eval()
    assert name in repr(collection)
    restored = nnx.merge(*nnx.split(collection))
    looked_up = restored({"f": np.array([2], np.int32)})["f"]
    np.testing.assert_array_equal(looked_up[0], collection.to_numpy()[name][2])
