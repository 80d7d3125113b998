"""What `build_bundle` takes, what it leaves out, what it refuses and with which words."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xlarank import device
from xlarank.bundle import open_bundle
from xlarank.compiler import BuildOptions, build, build_bundle, random_requests, reference_scores
from xlarank.compiler.program import Traces
from xlarank.compiler.split import split_module
from xlarank.errors import ConfigError, ModelError, VerifyError
from xlarank.runtime import Engine
from xlarank.spec import (
    ErrorBudget,
    FeatureSpec,
    ModelSpec,
    Precision,
    PrecisionPolicy,
    RankRequest,
    TaskSpec,
)

SPEC = ModelSpec(
    name="pair",
    features=(
        FeatureSpec(name="user", kind="dense", scope="context", width=3),
        FeatureSpec(name="item", kind="dense", scope="candidate", width=4),
        FeatureSpec(name="age", kind="dense", scope="context"),
    ),
    tasks=(TaskSpec(name="like"),),
)


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    layers = [rng.standard_normal(shape).astype(np.float32) * 0.5 for shape in ((7, 16), (16,), (16, 1))]
    return {"layers": layers[:2], "out": {"kernel": layers[2]}}


def apply(params, features):
    x = jnp.concatenate([features["user"], features["item"]], axis=1)
    kernel, bias = params["layers"]
    return {"like": (jax.nn.relu(x @ kernel + bias) @ params["out"]["kernel"])[:, 0]}


def by_hand(params, request):
    user = np.repeat(request.columns[0], request.num_candidates, axis=0)
    kernel, bias = params["layers"]
    hidden = np.maximum(np.concatenate([user, request.columns[1]], axis=1) @ kernel + bias, 0)
    return 1 / (1 + np.exp(-(hidden @ params["out"]["kernel"])[:, 0]))


def refuse(tmp_path, function, error, message, **arguments):
    arguments = {"params": make_params(), "buckets": (4,), "tune_seconds": 0.0} | arguments
    with pytest.raises(error, match=message):
        build_bundle(function, SPEC, {}, out=tmp_path, **arguments)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "nothing is left behind"


def test_a_plain_function_comes_in_with_its_params(tmp_path):
    params = make_params()
    path = build_bundle(apply, SPEC, {}, out=tmp_path, params=params, buckets=(4, 32), tune_seconds=2.0)
    assert set(open_bundle(path).manifest.params) == {"layers.0", "layers.1", "out.kernel"}
    with Engine.load(path) as engine:
        for request in random_requests(SPEC, 4, num_candidates=19, seed=3):
            scores = engine.score(request)["like"]
            np.testing.assert_allclose(scores, by_hand(params, request), rtol=1e-4, atol=1e-6)


def test_params_of_a_function_are_arrays(tmp_path):
    message = "params: 'out.kernel': expected an array, got str"
    refuse(tmp_path, apply, ConfigError, message, params=make_params() | {"out": {"kernel": "a"}})
    refuse(tmp_path, 7, ModelError, "expected a flax.nnx.Module, got int")


def test_a_feature_that_no_score_depends_on_is_not_looked_up_but_still_checked(tmp_path):
    path = build_bundle(apply, SPEC, {}, out=tmp_path, params=make_params(), buckets=(4,), tune_seconds=0.0)
    assert open_bundle(path).manifest.unused_features == ("age",)
    with Engine.load(path) as engine:
        assert "age" not in engine._gatherer.signature.slots
        features = {"user": np.ones((1, 3), np.float32), "item": np.ones((2, 4), np.float32)}
        ages = [engine.score(RankRequest(SPEC, features | {"age": age}))["like"] for age in (1.0, 99.0)]
        np.testing.assert_array_equal(*ages)
        with pytest.raises(Exception, match="age"):
            RankRequest(SPEC, features)


def live_dropout(params, features):
    key = jax.random.key(0)
    return {"like": apply(params, features)["like"] + jax.random.normal(key, (features["item"].shape[0],))}


class Dropping(nnx.Module):
    """Dropout that evaluation mode doesn't switch off."""

    def __init__(self, *, rngs):
        self.rngs = rngs.fork() if hasattr(rngs, "fork") else rngs

    def __call__(self, features):
        x = features["item"].sum(axis=1)
        return {"like": x * jax.random.bernoulli(self.rngs.dropout(), 0.5, x.shape[1:])}


class Counting(nnx.Module):
    def __init__(self):
        self.calls = nnx.Variable(jnp.float32(0))

    def __call__(self, features):
        self.calls[...] = self.calls[...] + 1
        return {"like": features["item"].sum(axis=1)}


class Flipping(Counting):
    """Writes a weight made of weights alone, and another one each time."""

    def __call__(self, features):
        self.calls[...] = 1 - self.calls[...]
        return {"like": features["item"].sum(axis=1) * self.calls[...]}


class Remembering(nnx.Module):
    """Writes a feature as it came, by no operation."""

    def __init__(self):
        self.last = nnx.Variable(jnp.zeros((8, 4), jnp.float32))

    def __call__(self, features):
        self.last.set_value(features["item"])
        return {"like": features["item"].sum(axis=1)}


def picks_rows(params, features):
    kept = jnp.nonzero(features["item"][:, 0] > 0)
    return {"like": features["item"][kept].sum(axis=1)}


def masks_rows(params, features):
    return {"like": features["item"][features["item"][:, 0] > 0].sum(axis=1)}


def leaves_jax(params, features):
    return {"like": jnp.asarray(np.asarray(features["item"]).sum(axis=1))}


def adds_rows(params, features):
    total = jnp.cumsum(features["item"], axis=0)
    return {"like": total.sum(axis=1)}


def counts_rows(params, features):
    return {"like": apply(params, features)["like"] * (2.0 if features["item"].shape[0] < 8 else 1.0)}


def turns_rows(params, features):
    return {"like": apply(params, features)["like"][::-1]}


def numbers_rows(params, features):
    own = features["item"][jnp.arange(features["item"].shape[0]), 1]  # picks each row's own value: harmless
    return {"like": apply(params, features)["like"] + own + jnp.arange(features["item"].shape[0])}


def weighs_rows(params, features):
    weights = np.linspace(0, 1, features["item"].shape[0], dtype=np.float32)
    return {"like": apply(params, features)["like"] * weights}


def draws_rows(params, features):
    noise = jax.random.normal(jax.random.key(0), (features["item"].shape[0], 2))
    return {"like": apply(params, features)["like"] + noise[:, 0]}


def sums_up_places(params, features):
    def step(place, row):
        return place + 1, row.sum() * place

    return {"like": jax.lax.scan(step, jnp.float32(1), features["item"])[1]}


def tells_a_dear_batch(params, features):
    """What no poison shows: a poisoned row alone doesn't meet the condition."""
    x = features["item"]
    is_dear = ((x > 0.2) & (x < 0.9)).sum() >= x.size // 8
    return {"like": jnp.where(is_dear, 1.0, 0.5) * x.sum(axis=1)}


def means_contexts(params, features):
    mean = features["user"].mean(axis=0).sum()
    return {"like": apply(params, features)["like"] + mean}


def misspells(params, features):
    return {"like": features["usr"].sum(axis=1)}


def forgets(params, features):
    return {"love": apply(params, features)["like"]}


def prints_in_a_loop(params, features):
    def step(total, x):
        jax.debug.print("{}", x)
        return total + x, None

    total, _ = jax.lax.scan(step, apply(params, features)["like"], jnp.ones(3))
    return {"like": total}


def place_message(operation, function):
    return (
        rf"model 'pair', task 'like': a row's score depends on the row's place in the batch: {operation} at "
        rf".*test_inputs\.py:\d+ \({function}\) gives rows that are alike other values; .*: use no arange"
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (counts_rows, r"task 'like': a row's score depends on the number of rows: called with 1, the model"),
        (
            turns_rows,
            r"a row's score depends on other rows.*rev at .*test_inputs\.py:\d+ .*, which moves rows",
        ),
        (numbers_rows, place_message("iota", "numbers_rows")),
        (weighs_rows, place_message("mul", "weighs_rows")),
        (live_dropout, place_message("random_bits", "live_dropout")),
        (draws_rows, place_message("random_bits", "draws_rows")),
        (sums_up_places, place_message("scan", "sums_up_places")),
        (
            tells_a_dear_batch,
            r"other rows of the batch: reduce_sum at .*test_inputs\.py:\d+ \(tells_a_dear_batch\) is",
        ),
        (means_contexts, r"context \d.* What crosses rows: reduce_sum .* at .*test_inputs\.py:\d+"),
        (
            misspells,
            r"KeyError: 'usr \(the features are user, item, age; the weights are layers, out\)' "
            r"\(at .*test_inputs\.py:\d+ \(misspells",
        ),
        (
            forgets,
            r"'like' is missing from its answer \['love'\]; it comes from .*test_inputs\.py:\d+ \(forgets\)$",
        ),
        (prints_in_a_loop, r"calls back to the host: debug_\w+ at .*test_inputs\.py:\d+"),
        (
            Dropping(rngs=nnx.Rngs(0, dropout=1)),
            r"draws random numbers when it scores: random_\w+ at .*test_inputs",
        ),
        (
            Counting(),
            r"writes to its variable 'calls' when it scores: add at .*test_inputs\.py:\d+ .*use_running",
        ),
        (Flipping(), r"writes to its variable 'calls' when it scores: sub at .*test_inputs\.py:\d+"),
        (Remembering(), r"writes to its variable 'last' when it scores: its call"),
        (picks_rows, r"can't be traced: .* \(at .*test_inputs\.py:\d+ \(picks_rows\)\).*jnp.where"),
        (
            masks_rows,
            r"NonConcreteBoolean.* \(at .*test_inputs\.py:\d+ \(masks_rows\)\).*use jnp.where or a mask",
        ),
        (
            leaves_jax,
            r"TracerArrayConversion.* \(at .*test_inputs\.py:\d+ \(leaves_jax\)\).*use jnp in place",
        ),
        (
            adds_rows,
            r"a row's score depends on other rows.*What crosses rows: \w+ .* at .*test_inputs\.py:\d+",
        ),
    ],
)
def test_what_can_t_be_served_is_refused_with_operation_line_and_remedy(tmp_path, model, message):
    refuse(
        tmp_path, model, ModelError, message, params=None if isinstance(model, nnx.Module) else make_params()
    )


def test_loops_over_rows_score_as_without_and_are_not_run_step_by_step():
    params, steps = make_params(), []

    def a_row(row):
        steps.append(row)
        return apply(params, {name: value[None] for name, value in row.items()})["like"][0]

    requests = random_requests(SPEC, 4, num_candidates=100, seed=4)
    told = []
    mapped = reference_scores(
        lambda features: {"like": jax.lax.map(a_row, features)},
        SPEC,
        {},
        requests,
        on_progress=lambda *numbers: told.append(numbers),
    )
    plain = reference_scores(lambda features: apply(params, features), SPEC, {}, requests)
    for loop, whole in zip(mapped["like"], plain["like"], strict=True):
        np.testing.assert_allclose(loop, whole, atol=1e-6)
    assert len(steps) < 5, "the body is traced, not called for each of the 400 rows"
    assert told == [(0, 4)], "all four fit one call"


def test_a_loop_whose_body_is_jitted_takes_one_while_and_one_scan():
    def loops(features):
        x = features["item"]
        x = jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jax.nn.silu(s[1])), (0, x))[1]
        total, _ = jax.lax.scan(jax.jit(lambda total, column: (total + column, None)), x[:, 0] * 0, x.T)
        return {"like": total}

    def written_out(features):
        return {"like": jax.nn.silu(jax.nn.silu(jax.nn.silu(features["item"]))).sum(axis=1)}

    requests = random_requests(SPEC, 3, num_candidates=700, seed=4)
    told = []
    looped = reference_scores(loops, SPEC, {}, requests, on_progress=lambda *numbers: told.append(numbers))
    expected = reference_scores(written_out, SPEC, {}, requests)
    for a, b in zip(looped["like"], expected["like"], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert told == [(0, 3), (1, 3), (2, 3)]


class Jitted(nnx.Module):
    """Transformed by Flax, which writes every variable back as it was; a norm with running averages."""

    def __init__(self, *, rngs):
        self.hidden = nnx.Linear(7, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.out = nnx.Linear(16, 1, rngs=rngs)

    @nnx.jit
    def __call__(self, features):
        x = jnp.concatenate([features["user"], features["item"]], axis=1)
        x = nnx.remat(lambda norm, x: norm(x))(self.norm, self.hidden(x))
        return {"like": self.out(nnx.relu(x))[:, 0]}


class Scanned(nnx.Module):
    """Layers under a scan that hold a dropout: their random state is dead code inside of a loop."""

    def __init__(self, *, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def blocks(rngs):
            return Block(rngs=rngs)

        self.blocks = blocks(rngs)

    def __call__(self, features):
        x = jnp.concatenate([features["user"], features["item"]], axis=1)
        x = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        return {"like": x.sum(axis=1)}


class Block(nnx.Module):
    def __init__(self, *, rngs):
        self.linear = nnx.Linear(7, 7, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(jnp.tanh(self.linear(x)))


class Normalised(nnx.Module):
    """Flax's own normalisations of weights, which write the normalised weights back in every call."""

    def __init__(self, *, rngs):
        self.hidden = nnx.WeightNorm(nnx.Linear(7, 16, rngs=rngs), rngs=rngs)
        self.out = nnx.SpectralNorm(nnx.Linear(16, 1, rngs=rngs), rngs=rngs)
        scale = next(iter(self.hidden.scales.values()))
        scale[...] = jnp.linspace(0.5, 2.0, 16)

    def __call__(self, features):
        x = jnp.concatenate([features["user"], features["item"]], axis=1)
        return {"like": self.out(jnp.tanh(self.hidden(x)))[:, 0]}


@pytest.mark.parametrize("module", [Jitted, Scanned, Normalised])
def test_modules_that_flax_transforms_score_as_their_author_calls_them(tmp_path, module):
    model = module(rngs=nnx.Rngs(0, dropout=1))
    path = build_bundle(model, SPEC, {}, out=tmp_path, buckets=(4,), tune_seconds=0)
    with Engine.load(path) as engine:
        (request,) = random_requests(SPEC, 1, num_candidates=3, seed=5)
        repeated = [np.repeat(c, 3, axis=0) if len(c) == 1 else c for c in request.columns]
        features = dict(zip(("user", "item", "age"), map(jnp.asarray, repeated), strict=True))
        expected = jax.nn.sigmoid(model(features)["like"])
        np.testing.assert_allclose(engine.score(request)["like"], expected, atol=1e-5)


class Halves(nnx.Module):
    """Computes in bfloat16 of its own accord."""

    def __init__(self, *, rngs):
        self.first = nnx.Linear(7, 16, dtype=jnp.bfloat16, rngs=rngs)
        self.norm = nnx.LayerNorm(16, dtype=jnp.bfloat16, rngs=rngs)
        self.last = nnx.Linear(16, 1, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, features):
        x = jnp.concatenate([features["user"], features["item"]], axis=1)
        logits = self.last(self.norm(nnx.gelu(self.first(x))))
        return {"like": logits[:, 0].astype(jnp.float32)}


# jax.random.key(3), without a compile: workers import this at the same time, and share a compilation cache.
KEY = jax.random.wrap_key_data(np.array([0, 3, 0, 3], np.uint32), impl="rbg")


def projects_at_random(params, features):
    """A fixed projection, drawn with a key that the function closes over."""
    kernel = jax.random.normal(KEY, (7, 16))
    x = jnp.concatenate([features["user"], features["item"]], axis=1)
    return {"like": (jax.nn.relu(x @ kernel) @ params["out"]["kernel"])[:, 0]}


def test_a_model_knows_the_narrow_formats_that_it_computes_in_itself():
    """Devices round those otherwise than the reference does."""
    halves = Traces(split_module(Halves(rngs=nnx.Rngs(0))), SPEC)
    assert halves.at(4).narrow_floats == ("bfloat16",)
    assert Traces(split_module(Normalised(rngs=nnx.Rngs(0))), SPEC).at(4).narrow_floats == ()


@pytest.mark.parametrize("model", [Halves(rngs=nnx.Rngs(0)), projects_at_random], ids=["bfloat16", "key"])
def test_models_of_their_own_precision_or_with_fixed_keys_score_as_their_author_calls_them(tmp_path, model):
    params = make_params()
    is_module = isinstance(model, nnx.Module)
    arguments = {} if is_module else {"params": params}
    path = build_bundle(model, SPEC, {}, out=tmp_path, buckets=(16,), tune_seconds=1.0, **arguments)
    with Engine.load(path) as engine:
        for request in random_requests(SPEC, 3, num_candidates=9, seed=5):
            repeated = [np.repeat(c, 9, axis=0) if len(c) == 1 else c for c in request.columns]
            features = dict(zip(("user", "item", "age"), map(jnp.asarray, repeated), strict=True))
            logits = (model(features) if is_module else model(params, features))["like"]
            np.testing.assert_allclose(engine.score(request)["like"], jax.nn.sigmoid(logits), atol=1e-5)


def test_labels_are_one_a_golden_row_of_a_task_that_there_is(tmp_path):
    requests = random_requests(SPEC, 2, num_candidates=3)
    for labels, message in (
        ({"like": np.zeros(5)}, r"labels of task 'like': expected 6, one a golden row, got .* \[5\]"),
        ({"love": np.zeros(6)}, r"labels: the model has no task 'love'; it has \['like'\]"),
    ):
        refuse(tmp_path, apply, ConfigError, message, golden=requests, labels=labels)


def options_of(precision, *, error=2e-3, auc=5e-4, **fields):
    policy = PrecisionPolicy(precision, budget=ErrorBudget(error, auc))
    return BuildOptions(bucket_rows=(4, 32), policy=policy, tune_seconds=0.0, num_devices=1, **fields)


def labelled(num_requests=32):
    requests = random_requests(SPEC, num_requests, num_candidates=24)
    scores = np.concatenate([by_hand(make_params(), request) for request in requests])
    drawn = np.random.default_rng(0).random(len(scores)) < scores
    return requests, {"like": drawn.astype(np.float32)}


@pytest.fixture(autouse=True)
def configured():
    device.configure()


@pytest.mark.parametrize("labels", [None, {"like": np.full(96, np.nan, np.float32)}], ids=["none", "unknown"])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_without_labels_auto_is_float32_and_says_why(tmp_path, labels):
    requests = random_requests(SPEC, 4, num_candidates=24)
    result = build(
        apply, SPEC, {}, out=tmp_path, params=make_params(), golden=requests, labels=labels,
        options=options_of(None, error=0.5, auc=0.5),
    )  # fmt: skip
    assert {entry.precision for entry in result.manifest.programs} == {Precision.FLOAT32}
    assert "no labels of both classes for like" in result.tuning.precision_note


def test_a_precision_asked_for_is_served_within_its_budget_and_its_errors_are_told(tmp_path):
    requests, labels = labelled()
    params = make_params()
    result = build(
        apply, SPEC, {}, out=tmp_path, params=params, golden=requests, labels=labels,
        options=options_of(Precision.INT8, error=0.05, auc=0.05),
    )  # fmt: skip
    for entry in result.manifest.programs:
        assert entry.precision is Precision.INT8
        assert 0 < entry.p99_error["like"] <= entry.max_error["like"] < 0.1
    assert result.reference_auc["like"] > 0.6
    with Engine.load(result.path) as engine:
        errors = [np.abs(engine.score(r)["like"] - by_hand(params, r)) for r in requests]
    worst = max(entry.max_error["like"] for entry in result.manifest.programs)
    assert 1e-5 < np.concatenate(errors).max() <= worst * 1.01 + 1e-6


def test_bfloat16_asked_for_crosses_to_the_device_in_bfloat16(tmp_path):
    requests, labels = labelled()
    result = build(
        apply, SPEC, {}, out=tmp_path, params=make_params(), golden=requests, labels=labels,
        options=options_of(Precision.BFLOAT16, error=0.05, auc=0.05),
    )  # fmt: skip
    assert result.manifest.activations == "bfloat16"
    with Engine.load(result.path) as engine:
        assert {leaf.dtype for leaf in engine._gatherer.signature.leaves} == {"bfloat16", "int32"}
        for request in requests[:3]:
            scores = engine.score(request)["like"]
            np.testing.assert_allclose(scores, by_hand(make_params(), request), atol=0.05)


def crosses_fields(params, features):
    """The dot interaction of DLRM: XLA's CPU backend can't run the next matmul in bfloat16."""
    fields = jnp.concatenate([features["user"], features["item"], features["user"]], axis=1)[:, :10]
    fields = fields.reshape(-1, 5, 2)
    i, j = np.tril_indices(5, -1)
    crossed = (fields @ fields.swapaxes(1, 2))[:, i, j]  # [B, 10]
    hidden = jax.nn.relu(crossed @ params["layers"][0][:1].repeat(10, axis=0))
    return {"like": (hidden @ params["out"]["kernel"])[:, 0]}


def test_a_precision_that_the_device_can_t_run_is_refused_in_words(tmp_path):
    told, precisions = "", set()
    try:
        result = build(
            crosses_fields, SPEC, {}, out=tmp_path, params=make_params(),
            options=options_of(Precision.BFLOAT16, error=0.05, auc=0.05),
        )  # fmt: skip
        precisions = {entry.precision for entry in result.manifest.programs}
    except ModelError as error:  # this device can't
        told = str(error)
    refused = r"lowered forms can't run on this device, the first .* in bucket \d+x\d+: .*; ask for another"
    assert precisions == {Precision.BFLOAT16} or re.search(refused, told)


def test_scores_that_leave_the_budget_are_refused_by_task_bucket_form_and_error(tmp_path):
    requests, labels = labelled()
    keep = tmp_path / "failed"
    options = options_of(Precision.INT8, error=1e-6, keep_failed=keep)
    message = (
        r"task 'like', bucket \d+x\d+ .*, form '.*int8', 99th percentile over all golden rows: scores differ "
        r"from the reference by \S+, expected 1e-06 or less; raise max_score_error \(--max-score-error\), .*"
        r"kept for study in .*failed/pair/1"
    )
    with pytest.raises(VerifyError, match=message):
        build(
            apply, SPEC, {}, out=tmp_path / "models", params=make_params(), options=options, golden=requests,
            labels=labels,
        )  # fmt: skip
    assert not list((tmp_path / "models").rglob("manifest.json")), "never published"
    manifest = open_bundle(keep / "pair" / "1").manifest
    assert "differ from the reference" in manifest.refusal
    with pytest.raises(VerifyError, match=r"was refused when it was compiled: .*expected 1e-06 or less"):
        Engine.load(keep / "pair" / "1")


def test_an_auc_that_falls_too_far_is_refused(tmp_path):
    requests = random_requests(SPEC, 64, num_candidates=100)
    options = dataclasses.replace(options_of(Precision.INT8, error=0.9, auc=1e-12), bucket_rows=(4,))
    scores = np.concatenate([by_hand(make_params(), request) for request in requests])
    # Labels that the reference orders perfectly: whatever changes an order loses AUC.
    labels = {"like": (scores > np.median(scores)).astype(np.float32)}
    with pytest.raises(
        VerifyError, match=r"task 'like', .*int8', AUC over all golden rows: .* expected 1e-12 or"
    ):
        build(
            apply,
            SPEC,
            {},
            out=tmp_path,
            params=make_params(),
            options=options,
            golden=requests,
            labels=labels,
        )
