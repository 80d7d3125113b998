"""A model, a config and a reader that a user keeps in a folder of their own."""

import json

import numpy as np
import pytest
import xxhash

import xlarank
from xlarank.bundle import open_bundle
from xlarank.cli import main

MODEL = '''
"""Shops and their dishes."""

import jax.numpy as jnp
from flax import nnx


class Shops(nnx.Module):
    def __init__(self, spec, *, rngs, width):
        self.first = nnx.Linear(4 + 3 + 2, width, rngs=rngs)
        self.heads = nnx.Dict({task.name: nnx.Linear(width, 1, rngs=rngs) for task in spec.tasks})

    def __call__(self, features):
        parts = [features["town"], features["tags"], features["price"]]
        hidden = jnp.tanh(self.first(jnp.concatenate(parts, axis=1)))
        return {name: head(hidden)[:, 0] for name, head in self.heads.items()}


def build(spec, *, rngs, width):
    return Shops(spec, rngs=rngs, width=width)
'''

READER = """
import csv

import numpy as np

from xlarank.spec import Ragged, StringColumn
from xlarank.training.data import RankingData, Splits


def read(path, file):
    with open(path / file, newline="") as text:
        rows = list(csv.DictReader(text))
    return Splits(**{split: part([row for row in rows if row["split"] == split])
                     for split in ("train", "validation", "test")})


def part(rows):
    requests = sorted({int(row["request"]) for row in rows})
    town = {int(row["request"]): row["town"] for row in rows}
    return RankingData(
        contexts={"town": StringColumn.from_strings([town[request] for request in requests])},
        candidates={
            "tags": Ragged.from_bags([row["tags"].split() for row in rows]),
            "price": np.array([[float(row["price"]), float(row["price"]) ** 2] for row in rows], np.float32),
        },
        request_of_row=np.array([requests.index(int(row["request"])) for row in rows]),
        labels={
            "bought": np.array([float(row["bought"]) for row in rows], np.float32),
            "spent": np.array([float(row["spent"]) for row in rows], np.float32),
        },
        groups=np.array(requests),
    )
"""

CONFIG = """
name = "shops"
model = "my_model:build"
model_options = { width = 8 }
tables = [{ name = "towns", dim = 4 }, { name = "tags", dim = 3, rows = 32 }]
tasks = [{ name = "bought" }, { name = "spent", kind = "regression" }]

[[features]]
name = "town"
kind = "id"
scope = "context"
dtype = "string"
table = "towns"
preprocessing = ["vocabulary"]

[[features]]
name = "tags"
kind = "id_list"
scope = "candidate"
dtype = "string"
table = "tags"
combiner = "sqrtn"
preprocessing = ["hash"]

[[features]]
name = "price"
kind = "dense"
scope = "candidate"
width = 2
preprocessing = ["standardise"]

[data]
reader = "my_data:read"
file = "sales.csv"

[training]
epochs = 2
batch_size = 16

[buckets]
rows = [4]
"""

TOWNS, TAGS = ("Köln", "Ghent", "Turin"), ("hot", "vegan", "new", "large")


def sales():
    rng = np.random.default_rng(5)
    lines = ["split,request,town,tags,price,bought,spent"]
    for request in range(40):
        split = "train" if request < 24 else "validation" if request < 32 else "test"
        town = TOWNS[rng.integers(len(TOWNS))]
        for _ in range(3):
            tags = " ".join(rng.choice(TAGS, rng.integers(0, 4), replace=False))
            price = rng.uniform(1, 20)
            lines.append(f"{split},{request},{town},{tags},{price:.2f},{int(price < 9)},{price:.2f}")
    return "\n".join(lines) + "\n"


WIDE = ("--precision", "float32", "--table-precision", "float32")  # what is computed by hand is


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shops")
    for name, text in {
        "my_model.py": MODEL,
        "my_data.py": READER,
        "shops.toml": CONFIG,
        "sales.csv": sales(),
    }.items():
        (folder / name).write_text(text, encoding="utf-8")
    paths = ("--checkpoint", folder / "checkpoint", "--out", folder / "models")
    run("train", folder / "shops.toml", "--data", folder, "--out", folder / "checkpoint")
    for _ in range(2):
        run("compile", folder / "shops.toml", *paths, *WIDE)
    return folder


def run(*words):
    assert main.main(main.parse(["xlarank", *map(str, words)])) == 0


def by_hand(bundle, town, tags, price):
    """Scores of the model above in NumPy, from what lies in the bundle."""
    spec, params, tables = bundle.spec, bundle.params(), bundle.tables()
    fitted = {f.name: f.preprocessing for f in spec.features}
    (names,) = fitted["town"]
    (scale,) = fitted["price"]
    number = names.values.index(town) + 1 if town in names.values else 0  # 0 is everything unknown
    rows = []
    for bag, p in zip(tags, price, strict=True):
        looked_up = [tables["tags"][row_of_tag(tag)] for tag in bag]
        pooled = np.sum(looked_up, axis=0) / np.sqrt(len(bag)) if bag else np.zeros(3)
        dense = (np.array([p, p**2]) - scale.mean) / scale.std
        rows.append(np.concatenate([tables["towns"][number], pooled, dense]))
    hidden = np.tanh(np.array(rows) @ params["first.kernel"] + params["first.bias"])
    logits = {
        task: (hidden @ params[f"heads.{task}.kernel"] + params[f"heads.{task}.bias"])[:, 0]
        for task in ("bought", "spent")
    }
    return {"bought": 1 / (1 + np.exp(-logits["bought"])), "spent": logits["spent"]}


def row_of_tag(tag):
    return xxhash.xxh64_intdigest(tag.encode()) % 32


def test_versions_ascend_and_the_engine_scores_as_the_model_by_hand(folder):
    assert sorted(path.name for path in (folder / "models/shops").iterdir()) == ["1", "2"]
    town, tags, price = (
        "Köln",
        [["hot", "new"], [], ["vegan"], ["large", "hot", "new"], ["odd"]],
        [2, 8, 9, 11, 30],
    )
    with xlarank.Engine.load(folder / "models/shops") as engine:
        assert engine.version == 2
        for where in (town, "Atlantis"):
            features = {"town": where, "tags": tags, "price": [[p, p * p] for p in price]}
            scores = engine.score(xlarank.RankRequest(engine.spec, features))
            expected = by_hand(open_bundle(folder / "models/shops/2"), where, tags, price)
            for task in ("bought", "spent"):
                np.testing.assert_allclose(scores[task], expected[task], rtol=1e-5, atol=1e-5)


def test_the_bundle_s_data_are_read_by_the_user_s_code_only_when_they_name_its_config(folder, capsys):
    words = ("evaluate", folder / "models/shops", "--data", folder, "--json")
    assert main.main(main.parse(["xlarank", *map(str, words)])) == 1
    assert "'my_data:read', which a bundle may not choose; name its config file with --config" in (
        capsys.readouterr().err
    )
    run(*words, "--config", folder / "shops.toml")
    of_bundle = json.loads(capsys.readouterr().out.splitlines()[-1])
    words = ("evaluate", folder / "shops.toml", "--checkpoint", folder / "checkpoint", "--data", folder)
    run(*words, "--json")
    of_checkpoint = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert of_bundle["rows"] == of_checkpoint["rows"] == 8 * 3
    for task in ("bought", "spent"):
        for name, value in of_checkpoint["tasks"][task].items():
            if isinstance(value, float):
                assert of_bundle["tasks"][task][name] == pytest.approx(value, abs=1e-5)
