"""Models full of odd operations: they join `foreign.MODELS` when this is imported.

Loops, indices, row axes in strange places, programs inside programs, tricks that depend on the row count.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from foreign import (
    fields_of,
    foreign,
    layer_norm,
    masked_mean,
    mlp,
    mlp_params,
    random_params,
    spec_of,
    two_tasks,
)
from jax import lax

_TOP = mlp_params("top", 14, 8, 2)


def _top(params, context, features):
    """A perceptron over 8 columns of context and the candidate's item and price."""
    return two_tasks(
        mlp(params, "top", jnp.concatenate([context, features["item"], features["price"]], axis=-1))
    )


@foreign(lambda: random_params(20, w=(4, 4), **_TOP))
def carry_from_candidate(params, features):
    """A scan over the history that begins with the candidate."""

    def step(state, inputs):
        state = jnp.tanh(state @ params["w"] + inputs)
        return state, state.sum(axis=-1)

    last, sums = lax.scan(step, features["item"], jnp.swapaxes(features["history"], 0, 1))
    return _top(params, jnp.concatenate([last, sums.T[:, :4]], axis=1), features)


@foreign(lambda: random_params(21, switch=(), w=(4, 4), **_TOP))
def loops(params, features):
    """cond, fori_loop, while_loop, cumsum and associative_scan over the context."""
    history = features["history"]
    history = lax.cond(params["switch"] > 0, lambda h: h @ params["w"], lambda h: jnp.sin(h), history)
    total = lax.fori_loop(
        0, history.shape[1], lambda i, state: 0.5 * state + history[:, i], jnp.zeros_like(features["user"])
    )
    _, grown = lax.while_loop(
        lambda state: state[0] < 3, lambda state: (state[0] + 1, jnp.tanh(state[1] @ params["w"])), (0, total)
    )
    sums = jnp.cumsum(history, axis=1)[:, -2]
    decayed = lax.associative_scan(jnp.maximum, history, axis=1)[:, 3]
    return _top(params, jnp.concatenate([grown + sums, decayed * total], axis=1), features)


@foreign(lambda: random_params(22, **_TOP))
def crossing_loop(params, features):
    """A while loop that goes on until every row is done; rows that are done stay as they are."""

    def go_on(state):
        return jnp.any(jnp.abs(state).max(axis=1) > 0.5)

    def halve(state):
        return jnp.where(jnp.abs(state).max(axis=1, keepdims=True) > 0.5, state * 0.5, state)

    small = lax.while_loop(go_on, halve, jnp.concatenate([features["user"], features["interests"]], axis=1))
    return _top(params, small, features)


@foreign(lambda: random_params(23, w1=(8, 17), b1=(8,), w2=(2, 8)))
def batch_last(params, features):
    """Everything transposed: rows are the last axis."""
    names = ("user", "item", "age", "interests", "price")
    x = jnp.concatenate([features[n].T for n in names], axis=0)  # [D, B]
    hidden = jax.nn.relu(jnp.einsum("hd,db->hb", params["w1"], x) + params["b1"][:, None])
    out = params["w2"] @ hidden  # [2, B]
    return {"click": out[0], "buy": out[1]}


@foreign(lambda: random_params(24, w=(4, 4), v=(4, 8), u=(4, 4), **_TOP))
def merged_batch(params, features):
    """[B * L, D] and [L * B, D], of the history and of fields of both scopes."""
    history = features["history"]
    num_rows, length, dim = history.shape
    major = jax.nn.relu(history.reshape(-1, dim) @ params["w"])
    major = major - (jnp.arange(num_rows * length) % length)[:, None] * 0.1
    minor = history.transpose(1, 0, 2).reshape(length * num_rows, dim) @ params["v"]
    minor = (minor + jnp.zeros((length * num_rows, 1))).reshape(length, num_rows, -1)
    pooled = (
        jnp.concatenate([major.reshape(num_rows, length, dim)] * 2, axis=-1) * minor.swapaxes(0, 1)
    ).mean(1)
    fields = (fields_of(features).reshape(num_rows * 4, dim) @ params["u"]).reshape(num_rows, 4, dim)
    return _top(params, pooled + jnp.tile(fields.max(axis=1), (1, 2)), features)


@foreign(lambda: random_params(25, table=(6, 4), **_TOP))
def indices(params, features):
    """zeros, ones, arange, take_along_axis, one_hot, argsort, top_k, where, clip, scatter."""
    num_rows, length = features["history.mask"].shape
    rows = jnp.arange(num_rows)
    last = jnp.maximum(features["history.mask"].sum(axis=1) - 1, 0)  # [B]
    newest = features["history"][rows, last]  # [B, D]
    oldest = jnp.take_along_axis(features["history"], (length - 1 - last)[:, None, None], axis=1)[:, 0]
    counts = jax.nn.one_hot(jnp.clip(last, 0, 3), 4) + params["table"][jnp.minimum(last, 5)]
    order = jnp.argsort(features["user"], axis=1)
    ranked = jnp.take_along_axis(features["user"], order, axis=1)
    best, _ = lax.top_k(features["interests"] * features["item"], 2)
    marks = jnp.zeros((num_rows, length)).at[rows, last].set(1.0).at[:, 0].add(2.0)[:, :4]
    context = jnp.concatenate([newest + counts + ranked, oldest * jnp.ones((num_rows, 4)) + marks], axis=1)
    context = jnp.where(features["age"][:, :1] > 0, context, jnp.zeros((num_rows, 8)))
    return _top(params, context.at[:, :2].add(best), features)


@foreign(lambda: random_params(26, **_TOP))
def candidate_by_context_index(params, features):
    """A column of the candidate chosen by the context, with the row's own number in the index."""
    num_rows = features["item"].shape[0]
    rows = jnp.arange(num_rows)
    column = jnp.argmax(features["user"], axis=1)
    chosen = features["item"][rows, column][:, None]
    flat = features["tags"].reshape(-1)[column + 4 * rows]
    spread = jnp.zeros((num_rows, 4)).at[rows, column].add(features["price"][:, 0])
    return _top(
        params, jnp.concatenate([chosen * features["user"], spread + flat[:, None]], axis=1), features
    )


@foreign(lambda: random_params(27, w=(3, 8, 8), **_TOP))
def sorted_experts(params, features):
    """Rows sorted by expert, multiplied in blocks, and put back: rows meet, and part again."""
    x = jnp.concatenate([features["user"], features["interests"]], axis=1)
    expert = jnp.argmax(features["age"], axis=1)
    order = jnp.argsort(expert)
    sorted_x, sorted_expert = x[order], expert[order]
    products = jnp.einsum("bd,edh->ebh", sorted_x, params["w"])
    mixed = products[sorted_expert, jnp.arange(x.shape[0])]
    return _top(params, mixed[jnp.argsort(order)] + features["item"].sum(axis=1, keepdims=True), features)


@foreign(lambda: random_params(28, scale=(19,), bias=(19,), **mlp_params("out", 19, 8, 2)))
def fast_variance(params, features):
    """A layer norm by E[x²] - E[x]² over both scopes, far from zero."""
    x = jnp.concatenate([features[n] for n in ("user", "item", "interests", "age", "tags")], axis=1) + 3.0
    mean = x.mean(axis=-1, keepdims=True)
    variance = jnp.maximum((x * x).mean(axis=-1, keepdims=True) - mean * mean, 0.0)
    x = (x - mean) * lax.rsqrt(variance + 1e-5) * params["scale"] + params["bias"]
    return two_tasks(mlp(params, "out", x))


@jax.custom_jvp
def _softsign(x):
    return x / (1.0 + jnp.abs(x))


_softsign.defjvp(lambda x, dx: (_softsign(*x), dx[0] / jnp.square(1.0 + jnp.abs(x[0]))))


@jax.custom_vjp
def _clipped(x):
    return jnp.clip(x, -1.0, 1.0)


_clipped.defvjp(lambda x: (_clipped(x), None), lambda _, g: (g,))

_MIX = np.linalg.qr(np.arange(64, dtype=np.float64).reshape(8, 8) % 7 + np.eye(8))[0].astype(np.float32)
# jax.random.key(3), without a compile: workers import this at the same time, and share a compilation cache.
_KEY = jax.random.wrap_key_data(np.array([0, 3, 0, 3], np.uint32), impl="rbg")


@jax.jit
def _block(weight, x):
    return _softsign(x @ weight) @ jnp.asarray(_MIX)[: weight.shape[1]]


@foreign(lambda: random_params(29, a=(8, 8), b=(8, 6), c=(6, 8), **_TOP))
def programs_in_programs(params, features):
    """jit used twice, remat, custom derivatives, a constant matrix, projections of fixed random numbers."""
    context = jnp.concatenate([features["user"], features["interests"]], axis=1)
    both = jnp.concatenate([features["user"], features["item"]], axis=1)
    context = _block(params["a"], context) + context @ jax.random.normal(jax.random.key(0), (8, 8))
    both = _clipped(_block(params["b"], both) + both @ jax.random.normal(_KEY, (8, 8)))
    deep = jax.checkpoint(lambda x, w: jax.nn.silu(x @ w) @ params["c"])(both, params["b"])
    return _top(params, jax.checkpoint(jnp.sin)(context) * 0.3 + deep, features)


@foreign(lambda: random_params(30, kernel=(3, 4, 8), **_TOP))
def convolution(params, features):
    """A convolution, a running maximum and a filter in the frequency domain over the history."""
    history = features["history"]
    out = lax.conv_general_dilated(
        history, params["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    peaks = lax.reduce_window(out, -jnp.inf, lax.max, (1, 2, 1), (1, 2, 1), "VALID")
    waves = jnp.fft.irfft(jnp.fft.rfft(history, axis=1) * params["kernel"][:, :, 0], n=5, axis=1)
    return _top(params, peaks.mean(axis=1) + jnp.tile(waves[:, 2], (1, 2)), features)


@foreign(lambda: random_params(31, w=(8, 8), scorer=(4, 1), **_TOP))
def squeezes(params, features):
    """Squeezes that take the rows' axis away at one row."""
    context = jnp.concatenate([features["user"], features["interests"]], axis=1)
    hidden = jnp.atleast_2d(jnp.squeeze(context @ params["w"]))
    scores = jnp.squeeze(features["history"] @ params["scorer"])
    weights = jax.nn.softmax(scores.reshape(hidden.shape[0], -1), axis=-1)
    pooled = jnp.einsum("bl,bld->bd", weights, features["history"])
    cls = jnp.broadcast_to(params["scorer"].T, pooled.shape)
    return _top(params, hidden + jnp.concatenate([pooled, cls], axis=1), features)


_EIGHT = spec_of(dim=8, length=8, dense=(8, 8))


def _eight_params():
    return random_params(32, wq=(8, 8), wk=(8, 8), square=(8, 8, 8), out=(16, 2), bias=(8,))


@foreign(_eight_params, spec=_EIGHT)
def all_eight(params, features):
    """Eight rows, fields, positions, heads and columns."""
    names = ("user", "item", "age", "price", "interests", "tags", "user", "item")
    fields = jnp.stack([features[n] for n in names], axis=1)  # [B, 8, 8]
    logits = jnp.einsum("bfd,bld->bfl", fields @ params["wq"], features["history"] @ params["wk"])
    logits = jnp.where(features["history.mask"][:, None, :], logits, -1e9)
    seen = jax.nn.softmax(logits / 8.0) @ features["history"] + fields  # [B, 8, 8]
    mixed = jnp.einsum("bfd,fde->bfe", seen, params["square"]) + params["bias"]
    square = jnp.einsum("bfd,bgd->bfg", features["history"], features["history"])
    both = jnp.concatenate([mixed.max(axis=1), square.swapaxes(1, 2).mean(axis=2) * features["age"]], axis=-1)
    return two_tasks(both @ params["out"])


@foreign(lambda: random_params(33, w=(6, 8), v=(8, 1), u=(15, 1)))
def one_scope_a_task(params, features):
    """One task reads the candidate alone, the other the context alone."""
    item = jnp.concatenate([features["item"], features["price"]], axis=1)
    click = (jnp.tanh(item @ params["w"]) @ params["v"])[:, 0]
    context = [features["user"], features["interests"], features["age"]]
    context.append(masked_mean(features["history"], features["history.mask"]))
    return {"click": click, "buy": (jnp.concatenate(context, axis=1) @ params["u"])[:, 0]}


@foreign(lambda: random_params(34, w=(6, 2)))
def context_ignored(params, features):
    """Asks for a context and never reads it."""
    return two_tasks(jnp.concatenate([features["item"], features["price"]], axis=1) @ params["w"])


@foreign(lambda: random_params(35, codes=(7, 4), **_TOP))
def whole_numbers(params, features):
    """Integer and boolean arithmetic, bit by bit."""
    sign = features["user"] > 0  # [B, 4]
    code = (sign.astype(jnp.int32) << jnp.arange(4)).sum(axis=1)  # [B]
    other = jnp.sum((features["item"] > 0) * jnp.array([1, 2, 4, 8]), axis=1)
    matches = lax.population_count(jnp.bitwise_xor(code, other))
    parity = (code % 2 == 0) ^ jnp.any(features["history.mask"], axis=1)
    coded = params["codes"][code % 7] + params["codes"][(code * 3 + other) // 4]
    flags = jnp.concatenate([sign & ~parity[:, None], features["item"] > 0.5], axis=1)
    every = jnp.all(flags, axis=1) | (matches >= 2)
    context = jnp.concatenate([coded, flags[:, 2:6].astype(jnp.float32)], axis=1)
    return _top(params, jnp.where(every[:, None], context, -context), features)


@foreign(lambda: random_params(36, w=(4, 4), **_TOP))
def one_row_at_a_time(params, features):
    """A model of one row, mapped: by vmap, and by lax.map for its context."""

    def score(row):
        attended = jax.nn.softmax(row["history"] @ (params["w"] @ row["item"])) @ row["history"]
        start = jnp.argmax(row["history.mask"])
        pair = lax.dynamic_slice(row["history"], (start, 0), (2, 4)).mean(axis=0)
        return mlp(params, "top", jnp.concatenate([attended, pair, row["item"], row["price"]]))

    def of_context(row):
        return jnp.tanh(row @ params["w"]).sum()

    return two_tasks(jax.vmap(score)(features) + lax.map(of_context, features["user"])[:, None])


@foreign(lambda: random_params(37, w=(4, 6), **mlp_params("top", 28, 8, 2)))
def siamese(params, features):
    """User and item encoded as one batch of twice the rows, then taken apart."""
    num_rows = features["user"].shape[0]
    both = jnp.concatenate([features["user"], features["interests"], features["item"], features["tags"]])
    encoded = jax.nn.relu(both @ params["w"])  # [4 B, 6]
    user, interests, item, tags = jnp.split(encoded, 4)
    wide = encoded.reshape(4, num_rows, 6).mean(axis=0)[:, :4]
    columns = [user, interests, item, tags, wide]
    return two_tasks(mlp(params, "top", jnp.concatenate(columns, axis=1)))


def _own_inputs_params():
    shapes = {}
    for number in range(3):
        shapes |= mlp_params(f"e{number}", 13, 6, 4)
    return random_params(38, **shapes, gate=(9, 3), tower=(4, 2))


@foreign(_own_inputs_params)
def experts_of_their_own(params, features):
    """Experts that each put their input together, gated by half precision."""

    def expert(number):
        x = jnp.concatenate([features["user"], features["item"], features["age"], features["price"]], axis=1)
        return mlp(params, f"e{number}", x)

    gate_in = jnp.concatenate([features["age"], features["item"], features["price"]], axis=1)
    gate = gate_in.astype(jnp.bfloat16) @ params["gate"].astype(jnp.bfloat16)
    gate = jax.nn.softmax(gate.astype(jnp.float32))
    experts = jnp.stack([expert(n) for n in range(3)], axis=1)
    return two_tasks((gate[..., None] * experts).sum(axis=1) @ params["tower"])


@foreign(lambda: random_params(39, scale=(4,), **_TOP))
def counts_its_rows(params, features):
    """Reads the row count, in ways that take it out again."""
    num_rows = features["user"].shape[0]
    user = features["user"] * num_rows / float(num_rows)
    interests = features["interests"] + jnp.full((num_rows, 1), 1.0 / num_rows) * num_rows
    centred = (features["user"] - features["user"].mean(axis=0)) + features["user"].mean(axis=0)
    normed = layer_norm(user + interests, params["scale"], 0.0)
    return _top(params, jnp.concatenate([normed, centred], axis=1), features)


def _bilinear_params():
    return random_params(40, w=(4, 4), **mlp_params("top", 24, 8, 2))


@foreign(_bilinear_params)
def fibinet(params, features):
    """All pairs of fields, read at constant indices, in FiBiNET's shared bilinear form."""
    fields = fields_of(features)
    left, right = np.triu_indices(4, 1)
    pairs = (fields[:, left] @ params["w"]) * fields[:, right]
    return two_tasks(mlp(params, "top", pairs.reshape(len(pairs), -1)))


@foreign(lambda: random_params(41, **mlp_params("top", 25, 8, 2)))
def assembled(params, features):
    """Columns written in place, padded and put in another order."""
    x = jnp.zeros((len(features["item"]), 20))
    for place, name in enumerate(("user", "item", "interests", "tags")):
        x = x.at[:, 4 * place + 1 : 4 * place + 5].set(features[name])
    x = lax.dynamic_update_slice(x, features["price"], (0, 17))
    x = x.at[:, 19].set(features["age"][:, 0])
    x = jnp.pad(jnp.tanh(x), ((0, 0), (2, 3)), constant_values=0.5)
    return two_tasks(mlp(params, "top", x[:, np.random.default_rng(0).permutation(25)]))
