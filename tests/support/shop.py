"""A small model of the tests' own, in plain Flax, its tables, and its scores computed by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import xxhash
from flax import nnx

from xlarank.spec import FeatureSpec, ModelSpec, RankRequest, TableSpec, TaskSpec

SPEC = ModelSpec(
    name="shop",
    features=(
        FeatureSpec(name="age", kind="dense", scope="context", preprocessing=("log1p",)),
        FeatureSpec(
            name="history", kind="sequence", scope="context", table="items", max_length=4, default=()
        ),
        FeatureSpec(name="item", kind="id", scope="candidate", table="items"),
        FeatureSpec(
            name="tags",
            kind="id_list",
            scope="candidate",
            table="tags",
            dtype="string",
            combiner="mean",
            preprocessing=("hash",),
        ),
        FeatureSpec(name="price", kind="dense", scope="candidate", width=2),
    ),
    tables=(TableSpec(name="items", dim=8, rows=50), TableSpec(name="tags", dim=5, rows=20)),
    tasks=(TaskSpec(name="click"), TaskSpec(name="spend", kind="regression")),
)


class Shop(nnx.Module):
    """Two towers over a masked mean, with a batch norm and a dropout that evaluation must turn off."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(1 + 8 + 8 + 5 + 2, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(32, 2, rngs=rngs)
        self.norm.mean[...] = jnp.linspace(-1.0, 1.0, 32)  # as if it had been trained

    def hidden_of(self, features):
        mask = features["history.mask"][..., None]  # [B, L, 1]
        count = jnp.maximum(mask.sum(axis=1), 1).astype(jnp.float32)  # [B, 1]
        history = (features["history"] * mask).sum(axis=1) / count  # [B, D]
        parts = [features["age"], history, features["item"], features["tags"], features["price"]]
        return self.dropout(nnx.relu(self.norm(self.hidden(jnp.concatenate(parts, axis=1)))))  # [B, 32]

    def __call__(self, features):
        out = self.out(self.hidden_of(features))  # [B, 2]
        return {"click": out[:, 0], "spend": out[:, 1]}


def make_tables(seed: int = 3) -> dict[str, np.ndarray]:
    """Random tables of the spec."""
    rng = np.random.default_rng(seed)
    return {t.name: rng.standard_normal((t.num_rows, t.dim)).astype(np.float32) for t in SPEC.tables}


def numpy_scores(model: Shop, request: RankRequest, tables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The model by hand in float64: independent of JAX, of the collection, of host and of the compiler."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
    state = {".".join(map(str, path)): np.asarray(leaf[...], np.float64) for path, leaf in flat}
    age, history, item, tags, price = request.columns
    history_ids = history.values[-4:]
    mean = tables["items"][history_ids].mean(axis=0) if len(history_ids) else np.zeros(8)
    begins = np.concatenate([[0], np.cumsum(tags.lengths)])
    words = tags.values.to_bytes()
    rows = []
    for i in range(request.num_candidates):
        bag = [tables["tags"][xxhash.xxh64_intdigest(word) % 20] for word in words[begins[i] : begins[i + 1]]]
        pooled = np.mean(bag, axis=0) if bag else np.zeros(5)
        rows.append(np.concatenate([np.log1p(age[0]), mean, tables["items"][item[i]], pooled, price[i]]))
    hidden = np.array(rows) @ state["hidden.kernel"] + state["hidden.bias"]
    scale = state["norm.scale"] / np.sqrt(state["norm.var"] + 1e-5)
    hidden = np.maximum((hidden - state["norm.mean"]) * scale + state["norm.bias"], 0)
    out = hidden @ state["out.kernel"] + state["out.bias"]
    return {"click": 1 / (1 + np.exp(-out[:, 0])), "spend": out[:, 1]}
