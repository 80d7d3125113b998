"""Ranking models as their papers and users write them: plain JAX and Flax, no layer of xlarank's.

Each is small, reads both scopes, and is made with its own spec: `MODELS` by name, `foreign_odd.py` has the
odd ones. A model is what the compiler gets, `DenseModel`; its `reference` is the author's own call.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax import lax

from xlarank.compiler.split import DenseModel, split_function, split_module
from xlarank.spec import FeatureSpec, ModelSpec, TableSpec, TaskSpec

__all__ = [
    "MODELS",
    "SPEC",
    "Foreign",
    "fields_of",
    "foreign",
    "mlp",
    "mlp_params",
    "random_params",
    "spec_of",
]


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A model, its spec and how to make it."""

    name: str
    spec: ModelSpec
    make: Callable[[], DenseModel]


MODELS: dict[str, Foreign] = {}


def spec_of(dim=4, length=5, *, tasks=("click", "buy"), regression=(), dense=(3, 2)) -> ModelSpec:
    """Context: age, user, interests, history. Candidate: item, tags, price. Fields of one width."""

    def lookup(name, kind, scope, **rest):
        return FeatureSpec(name=name, kind=kind, scope=scope, table="items", **rest)

    return ModelSpec(
        name="foreign",
        features=(
            FeatureSpec(name="age", kind="dense", scope="context", width=dense[0]),
            lookup("item", "id", "candidate"),
            lookup("user", "id", "context"),
            lookup("history", "sequence", "context", max_length=length),
            FeatureSpec(name="price", kind="dense", scope="candidate", width=dense[1]),
            lookup("interests", "id_list", "context", combiner="mean"),
            lookup("tags", "id_list", "candidate", combiner="sum"),
        ),
        tables=(TableSpec(name="items", dim=dim, rows=50),),
        tasks=tuple(
            TaskSpec(name=name, kind="regression" if name in regression else "binary") for name in tasks
        ),
    )


SPEC = spec_of()


def foreign(make_params=None, spec=SPEC):
    """Registers ``apply(params, features)`` with `make_params()`, or a function that makes a module."""

    def register(function):
        def make() -> DenseModel:
            if make_params is None:
                return split_module(function())
            return split_function(function, make_params())

        MODELS[function.__name__] = Foreign(function.__name__, spec, make)
        return function

    return register


def random_params(seed=0, **shapes):
    """Normal arrays by name, of variance one over the second axis from the last."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        scale = np.sqrt(shape[-2]) if len(shape) > 1 else 3.0
        return (rng.standard_normal(shape) / scale).astype(np.float32)

    return {name: draw(shape) for name, shape in shapes.items()}


def mlp_params(name, *sizes):
    """Shapes of a perceptron's weights and biases, for `random_params`."""
    shapes = {f"{name}w{i}": pair for i, pair in enumerate(itertools.pairwise(sizes))}
    return shapes | {f"{name}b{i}": (n,) for i, n in enumerate(sizes[1:])}


def mlp(params, name, x):
    """Relu between layers, none after the last."""
    number = 0
    while f"{name}w{number}" in params:
        x = x if number == 0 else jax.nn.relu(x)
        x = x @ params[f"{name}w{number}"] + params[f"{name}b{number}"]
        number += 1
    return x


def fields_of(features):
    """[B, F, D], context and candidate fields in turn."""
    return jnp.stack([features[name] for name in ("user", "item", "interests", "tags")], axis=1)


def masked_mean(sequence, mask):
    """[B, D] of [B, L, D]."""
    mask = mask[..., None].astype(sequence.dtype)
    return (sequence * mask).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1.0)


def two_tasks(out):
    """Logits of the two tasks from [B, 2]."""
    return {"click": out[:, 0], "buy": out[:, 1]}


def layer_norm(x, scale, bias):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred * lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * scale + bias


def _deepfm_params():
    return random_params(1, linear=(5, 1), dense=(5, 8), **mlp_params("deep", 4 * 4 + 8, 16, 2))


@foreign(_deepfm_params)
def deepfm(params, features):
    """Guo et al., IJCAI 2017."""
    fields = fields_of(features)  # [B, F, D]
    dense = jnp.concatenate([features["age"], features["price"]], axis=-1)
    sum_square = jnp.square(fields.sum(axis=1))
    square_sum = jnp.square(fields).sum(axis=1)
    fm = 0.5 * (sum_square - square_sum).sum(axis=-1)  # [B]
    deep_in = jnp.concatenate([fields.reshape(fields.shape[0], -1), dense @ params["dense"]], axis=1)
    deep = mlp(params, "deep", deep_in)
    first_order = (dense @ params["linear"])[:, 0]
    return {"click": fm + first_order + deep[:, 0], "buy": fm - first_order + deep[:, 1]}


@foreign(lambda: random_params(2, w1=(6, 4, 4), w2=(5, 4, 6), out=(11, 2)))
def xdeepfm(params, features):
    """The compressed interaction network of Lian et al., KDD 2018."""
    first = fields_of(features)  # [B, F, D]
    hidden, pooled = first, []
    for weight in (params["w1"], params["w2"]):
        outer = jnp.einsum("bhd,bmd->bhmd", hidden, first)
        hidden = jax.nn.relu(jnp.einsum("bhmd,nhm->bnd", outer, jnp.moveaxis(weight, -1, 1)))
        pooled.append(hidden.sum(axis=-1))
    return two_tasks(jnp.concatenate(pooled, axis=1) @ params["out"])


def _autoint_params():
    shapes = {f"{n}{layer}": (d, 2, 4) for layer, d in ((0, 4), (1, 8)) for n in "qkvr"}
    norms = {f"{n}{layer}": (8,) for layer in (0, 1) for n in ("scale", "bias")}
    return random_params(3, **shapes, **norms, out=(4 * 8, 2))


@foreign(_autoint_params)
def autoint(params, features):
    """Song et al., CIKM 2019: self-attention over fields."""
    x = fields_of(features)  # [B, F, D]
    for layer in range(2):
        q, k, v = (jnp.einsum("bfd,dhe->bhfe", x, params[f"{n}{layer}"]) for n in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bhqe,bhke->bhqk", q, k) / 2.0, axis=-1)
        mixed = jnp.einsum("bhqk,bhke->bqhe", weights, v).reshape(x.shape[0], 4, 8)
        residual = x @ params[f"r{layer}"].reshape(-1, 8)
        x = layer_norm(jax.nn.relu(mixed + residual), params[f"scale{layer}"], params[f"bias{layer}"])
    return two_tasks(x.reshape(x.shape[0], -1) @ params["out"])


class _MaskBlock(nnx.Module):
    def __init__(self, num_in, width, rngs):
        self.norm = nnx.LayerNorm(num_in, rngs=rngs)
        self.wide = nnx.Linear(width, 16, rngs=rngs)
        self.mask = nnx.Linear(16, num_in, rngs=rngs)
        self.hidden = nnx.Linear(num_in, 8, rngs=rngs)
        self.after = nnx.LayerNorm(8, rngs=rngs)

    def __call__(self, x, embedding):
        mask = self.mask(nnx.relu(self.wide(embedding)))
        return nnx.relu(self.after(self.hidden(self.norm(x) * mask)))


class _MaskNet(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([_MaskBlock(n, 21, rngs) for n in (21, 8)])
        self.out = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, features):
        names = ("user", "item", "interests", "tags", "age", "price")
        embedding = jnp.concatenate([features[n] for n in names], axis=-1)
        x = embedding
        for block in self.blocks:
            x = block(x, embedding)
        return two_tasks(self.out(x))


@foreign()
def masknet():
    """Wang et al., DLP-KDD 2021: an instance-guided mask."""
    return _MaskNet(nnx.Rngs(4))


def _din_params():
    return random_params(5, alpha=(8,), **mlp_params("unit", 16, 8, 1), **mlp_params("top", 17, 8, 2))


@foreign(_din_params)
def din(params, features):
    """Zhou et al., KDD 2018: an attention unit over the history, dice-like activation."""
    history, mask = features["history"], features["history.mask"]
    query = jnp.tile(features["item"][:, None, :], (1, history.shape[1], 1))
    pairs = jnp.concatenate([query, history, query - history, query * history], axis=-1)
    scores = mlp(params, "unit", pairs)[..., 0]  # [B, L]
    scores = jnp.where(mask, scores, -(2.0**32) + 1)
    weights = jax.nn.softmax(scores / jnp.sqrt(4.0))
    pooled = jnp.matmul(weights[:, None, :], history)[:, 0]
    top = jnp.concatenate(
        [features["age"], features["user"], pooled, features["item"], features["price"]], axis=1
    )
    return two_tasks(mlp(params, "top", top))


class _Encoder(nnx.Module):
    """A transformer over the history, then attention of the candidate over it."""

    def __init__(self, rngs):
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (1, 5, 8)))
        self.embed = nnx.Linear(4, 8, rngs=rngs)
        self.query = nnx.Linear(4, 8, rngs=rngs)
        self.inner = nnx.MultiHeadAttention(2, 8, qkv_features=8, decode=False, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(8, rngs=rngs) for _ in range(2)])
        self.feed = nnx.List([nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)])
        self.target = nnx.MultiHeadAttention(2, 8, qkv_features=8, decode=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(8 + 4 + 3, 2, rngs=rngs)

    def __call__(self, features):
        x = self.embed(features["history"]) + self.positions[...]  # [B, L, 8]
        mask = features["history.mask"].at[:, -1].set(True)[:, None, None, :]
        x = x + self.dropout(self.inner(self.norms[0](x), mask=mask))
        x = x + self.feed[1](nnx.gelu(self.feed[0](self.norms[1](x))))
        query = self.query(features["item"])[:, None, :]
        seen = self.target(query, x, x, mask=mask)[:, 0]
        return two_tasks(self.out(jnp.concatenate([seen, features["user"], features["age"]], axis=-1)))


@foreign()
def history_transformer():
    return _Encoder(nnx.Rngs(6))


def _bst_params():
    return random_params(
        7, cls=(1, 1, 4), positions=(7, 4), q=(4, 2, 4), k=(4, 2, 4), v=(4, 2, 4), o=(2, 4, 4),
        **mlp_params("top", 7 * 4 + 5, 8, 2),
    )  # fmt: skip


@foreign(_bst_params)
def bst(params, features):
    """Chen et al., DLP-KDD 2019: history and candidate in one sequence, after a token of the model's own."""
    num_rows = features["item"].shape[0]
    cls = jnp.tile(params["cls"], (num_rows, 1, 1))
    x = jnp.concatenate([cls, features["history"], features["item"][:, None]], axis=1)  # [B, 7, 4]
    seen = jnp.concatenate(
        [jnp.ones((num_rows, 1), bool), features["history.mask"], jnp.ones((num_rows, 1), bool)], axis=1
    )
    x = x + params["positions"]
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, params[n]) for n in "qkv")
    logits = jnp.einsum("bqhe,bkhe->bhqk", q, k) * 0.5
    weights = jax.nn.softmax(jnp.where(seen[:, None, None, :], logits, -1e9))
    x = x + jnp.einsum("bhqk,bkhe,hed->bqd", weights, v, params["o"])
    flat = x.reshape(num_rows, -1)
    return two_tasks(mlp(params, "top", jnp.concatenate([flat, features["age"], features["price"]], axis=1)))


def _gru_params():
    return random_params(8, wi=(4, 24), wh=(8, 24), **mlp_params("top", 8 + 4 + 2, 8, 2))


@foreign(_gru_params)
def gru4rec(params, features):
    """A GRU over the history by scan, a perceptron over its last state and the candidate."""

    def cell(state, step):
        inputs, mask = step
        gates_in, gates = inputs @ params["wi"], state @ params["wh"]
        reset = jax.nn.sigmoid(gates_in[:, :8] + gates[:, :8])
        update = jax.nn.sigmoid(gates_in[:, 8:16] + gates[:, 8:16])
        new = jnp.tanh(gates_in[:, 16:] + reset * gates[:, 16:])
        state = jnp.where(mask[:, None], (1 - update) * new + update * state, state)
        return state, state

    start = jnp.zeros((features["history"].shape[0], 8))
    steps = (jnp.moveaxis(features["history"], 1, 0), features["history.mask"].T)
    last, _ = lax.scan(cell, start, steps)
    top = jnp.concatenate([last, features["item"], features["price"]], axis=1)
    return two_tasks(mlp(params, "top", top))


def _ple_params():
    experts = {f"{level}{g}{e}": n for level, n in ((0, 21), (1, 6)) for g in "abs" for e in (0, 1)}
    shapes = {}
    for name, width in experts.items():
        shapes |= mlp_params(f"e{name}", width, 8, 6)
    for level, width in ((0, 21), (1, 6)):
        shapes |= {f"g{level}{g}": (width, 6 if g == "s" else 4) for g in "abs"}
    return random_params(9, **shapes, **mlp_params("ta", 6, 4, 1), **mlp_params("tb", 6, 4, 1))


@foreign(_ple_params)
def ple(params, features):
    """Tang et al., RecSys 2020: two levels, experts of each task and shared ones, gates over subsets."""
    names = ("user", "interests", "age", "item", "tags", "price")
    x = jnp.concatenate([features[n] for n in names], axis=1)
    inputs = dict.fromkeys("abs", x)
    for level in (0, 1):
        experts = {g: [jax.nn.relu(mlp(params, f"e{level}{g}{e}", inputs[g])) for e in (0, 1)] for g in "abs"}
        mixed = {}
        for g in "abs":
            seen = experts["a"] + experts["b"] + experts["s"] if g == "s" else experts[g] + experts["s"]
            gate = jax.nn.softmax(inputs[g] @ params[f"g{level}{g}"], axis=-1)
            mixed[g] = jnp.einsum("be,bed->bd", gate, jnp.stack(seen, axis=1))
        inputs = mixed
    return {"click": mlp(params, "ta", inputs["a"])[:, 0], "buy": mlp(params, "tb", inputs["b"])[:, 0]}


def _mmoe_params():
    return random_params(10, w1=(5, 21, 8), b1=(5, 8), w2=(5, 8, 6), gates=(2, 21, 5), towers=(2, 6))


@foreign(_mmoe_params)
def mmoe_stacked(params, features):
    """Ma et al., KDD 2018, its experts in one array."""
    x = jnp.concatenate([features[n] for n in ("age", "item", "user", "price", "interests", "tags")], axis=1)
    hidden = jax.nn.relu(jnp.einsum("bi,eih->beh", x, params["w1"]) + params["b1"])
    experts = jax.nn.relu(jnp.einsum("beh,eho->beo", hidden, params["w2"]))
    gates = jax.nn.softmax(jnp.einsum("bi,tie->bte", x, params["gates"]))
    mixed = jnp.einsum("bte,beo->bto", gates, experts)
    return two_tasks((mixed * params["towers"]).sum(axis=-1))


def _two_tower_params():
    return random_params(11, **mlp_params("u", 15, 8, 6), **mlp_params("i", 10, 8, 6), temperature=())


@foreign(_two_tower_params, spec=spec_of(tasks=("click", "price"), regression=("price",)))
def two_tower(params, features):
    """A normalised dot product; its second task knows nothing of the context."""
    user = jnp.hstack(
        [features["age"], masked_mean(features["history"], features["history.mask"]), features["user"],
         features["interests"]]
    )  # fmt: skip
    item = jnp.hstack([features["item"], features["tags"], features["price"]])
    user, item = mlp(params, "u", user), mlp(params, "i", item)
    user = user / jnp.linalg.norm(user, axis=1, keepdims=True)
    item = item / jnp.linalg.norm(item, axis=1, keepdims=True)
    dot = jnp.einsum("bd,bd->b", user, item)
    return {"click": dot * jnp.exp(params["temperature"]), "price": item.sum(axis=1)}


class _LinenWide(linen.Module):
    @linen.compact
    def __call__(self, features):
        x = jnp.concatenate([features[n] for n in ("user", "age", "item", "tags", "price")], axis=1)
        x = linen.BatchNorm(use_running_average=True)(linen.Dense(16)(x))
        x = linen.Dropout(0.5, deterministic=True)(linen.swish(x))
        history = linen.Conv(4, kernel_size=(3,))(features["history"])
        pooled = jnp.where(features["history.mask"][..., None], history, -jnp.inf).max(axis=1)
        pooled = jnp.where(jnp.isfinite(pooled), pooled, 0.0)
        return two_tasks(linen.Dense(2)(jnp.concatenate([x, pooled], axis=1)))


@foreign()
def linen_wide():
    """Linen behind `nnx.bridge`: a batch norm, a convolution over the history, a maximum of what is there."""
    spec, dim = SPEC, 4
    example = {"age": jnp.zeros((3, 3)), "price": jnp.zeros((3, 2)), "history.mask": jnp.ones((3, 5), bool)}
    example |= {f.name: jnp.zeros((3, dim)) for f in spec.features if f.is_lookup}
    example["history"] = jnp.zeros((3, 5, dim))
    return nnx.bridge.ToNNX(_LinenWide(), rngs=nnx.Rngs(12)).lazy_init(example)
