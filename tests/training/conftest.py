"""Small data sets in each test's own folder."""

import numpy as np
import pytest

from xlarank.spec import Ragged, StringColumn
from xlarank.training.data import RankingData, Splits

CONFIG = """
name = "tiny"
model = "xlarank.models.mmoe:build"
tables = [{ name = "users", dim = 4 }, { name = "items", dim = 4 }, { name = "colours", dim = 2 }]
tasks = [{ name = "like" }, { name = "stars", kind = "regression" }]

[[features]]
name = "user"
kind = "id"
scope = "context"
table = "users"
preprocessing = ["vocabulary"]

[[features]]
name = "history"
kind = "sequence"
scope = "context"
table = "items"
max_length = 3
preprocessing = ["vocabulary"]

[[features]]
name = "item"
kind = "id"
scope = "candidate"
table = "items"
preprocessing = ["vocabulary"]

[[features]]
name = "colour"
kind = "id_list"
scope = "candidate"
dtype = "string"
table = "colours"
combiner = "sum"
preprocessing = ["vocabulary"]

[[features]]
name = "price"
kind = "dense"
scope = "candidate"
preprocessing = ["standardise"]

[model_options]
num_experts = 2
expert_hidden = [32]
tower_hidden = []
num_cross_layers = 1
dropout = 0.05

[data]
reader = "tiny_reader:read"

[training]
epochs = 3
batch_size = 16
learning_rate = 0.02
"""


def make_data(num_requests, seed, *, candidates=4):
    """Users like the item of their own number, of 7."""
    rng = np.random.default_rng(seed)
    user = rng.integers(0, 7, num_requests)
    owner = np.repeat(np.arange(num_requests), candidates)
    item = rng.integers(0, 7, len(owner))
    like = (item == user[owner]).astype(np.float32)
    lengths = rng.integers(0, 6, num_requests).astype(np.int32)
    colours = [["red", "blue", "green"][: 1 + i % 3] for i in item]
    return RankingData(
        contexts={
            "user": 100 + user,
            "history": Ragged(rng.integers(0, 7, lengths.sum()), lengths),
            "unused": StringColumn.from_strings(["x"] * num_requests),
        },
        candidates={
            "item": item,
            "colour": Ragged.from_bags(colours),
            "price": rng.normal(3, 2, len(owner)).astype(np.float32),
        },
        request_of_row=owner,
        labels={"like": like, "stars": 1 + 4 * like},
        groups=user,
        items=item,
    )


@pytest.fixture
def splits():
    return Splits(train=make_data(250, 1), validation=make_data(20, 2), test=make_data(20, 3))


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(CONFIG)
    return path
