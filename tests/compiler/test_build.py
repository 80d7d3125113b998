"""From a module to a bundle: what is published is proven, what can't be proven is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shop
from flax import linen, nnx

from xlarank.bundle import open_bundle
from xlarank.compiler import analyze, build_bundle, random_requests, reference_scores
from xlarank.compiler.program import Traces
from xlarank.compiler.split import split_module
from xlarank.errors import BundleError, ConfigError, ModelError, VerifyError
from xlarank.runtime import Engine
from xlarank.spec import Bucket, FeatureSpec, ModelSpec, RankRequest, Signature, TaskSpec

BUCKETS = (4, 64)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    model, tables = shop.Shop(rngs=nnx.Rngs(0)), shop.make_tables()
    path = build_bundle(model, shop.SPEC, tables, out=tmp_path_factory.mktemp("repo"), buckets=BUCKETS)
    return path, model, tables


def refuse(tmp_path, module, error, message, spec=shop.SPEC, tables=None, **options):
    tables = shop.make_tables() if tables is None else tables
    with pytest.raises(error, match=message):
        build_bundle(module, spec, tables, out=tmp_path, **({"buckets": (8,), "tune_seconds": 0} | options))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "nothing is left behind"


def test_the_reference_is_the_model_applied_to_the_repeated_context(built):
    _, model, tables = built
    requests = random_requests(shop.SPEC, 5, num_candidates=7, seed=1)
    scores = reference_scores(model, shop.SPEC, tables, requests)
    for number, request in enumerate(requests):
        for task, expected in shop.numpy_scores(model, request, tables).items():
            np.testing.assert_allclose(scores[task][number], expected, rtol=1e-4, atol=1e-6)


def test_a_bundle_scores_as_the_model_computed_by_hand(built):
    path, model, tables = built
    requests = random_requests(shop.SPEC, 12, num_candidates=29, seed=2)
    with Engine.load(path) as engine:
        futures = [engine.submit(request) for request in requests]
        for request, future in zip(requests, futures, strict=True):
            for task, expected in shop.numpy_scores(model, request, tables).items():
                np.testing.assert_allclose(future.result().scores[task], expected, rtol=1e-4, atol=1e-6)


def test_every_bucket_has_a_proven_and_timed_program(built):
    manifest = open_bundle(built[0]).manifest
    buckets = [entry.bucket for entry in manifest.programs]
    everything = [Bucket(4, 1), Bucket(4, 4), Bucket(64, 1), Bucket(64, 2), Bucket(64, 64)]
    assert set(buckets) <= set(everything)
    assert {Bucket(4, 4), Bucket(64, 64)} <= set(buckets), "any mix of requests fits"
    for entry in manifest.programs:
        assert set(entry.max_error) == {"click", "spend"}
        assert max(entry.max_error.values()) <= 1e-5
        assert min(entry.seconds.values()) > 0


@pytest.mark.once
def test_versions_ascend_and_an_explicit_one_is_kept(built, tmp_path):
    _, model, tables = built
    paths = [
        build_bundle(model, shop.SPEC, tables, out=tmp_path, buckets=[4], tune_seconds=0, version=v)
        for v in (None, 7)
    ]
    paths.append(build_bundle(model, shop.SPEC, tables, out=tmp_path, buckets=[4], tune_seconds=0))
    assert [path.name for path in paths] == ["1", "7", "8"]
    with pytest.raises(BundleError, match=r"shop/7: exists already"):
        build_bundle(model, shop.SPEC, tables, out=tmp_path, buckets=[4], tune_seconds=0, version=7)


def test_the_report_shows_buckets_layers_and_tables(built):
    report = (built[0] / "report.html").read_text()
    for text in ("hidden", "items", "tags", "shop.py"):
        assert text in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert "<script src" not in report


def test_flops_and_parameters_are_those_of_the_layers(built):
    _, model, _ = built
    requests = random_requests(shop.SPEC, 8)
    found = analyze(Traces(split_module(model), shop.SPEC), Signature.of_model(shop.SPEC), requests)
    width = 1 + 8 + 8 + 5 + 2
    assert found.num_parameters == (width * 32 + 32) + 4 * 32 + (32 * 2 + 2)
    assert sum(matmul.flops for matmul in found.matmuls) == 2 * (width * 32 + 32 * 2)
    lookups = {table.name: table.lookups_per_candidate for table in found.tables}
    assert lookups["items"] == 1.0
    num_tags = sum(int(request.columns[3].lengths.sum()) for request in requests)
    assert lookups["tags"] == num_tags / sum(request.num_candidates for request in requests)


def test_a_model_written_for_one_task_alone_with_no_context_or_table_compiles(tmp_path):
    spec = ModelSpec(
        name="plain",
        features=(FeatureSpec(name="x", kind="dense", scope="candidate", width=3),),
        tasks=(TaskSpec(name="y", kind="regression"),),
    )

    class Sum(nnx.Module):
        def __call__(self, features):
            return {"y": features["x"].sum(axis=1)}

    with Engine.load(build_bundle(Sum(), spec, {}, out=tmp_path, buckets=[4], tune_seconds=0)) as engine:
        x = np.arange(30, dtype=np.float32).reshape(10, 3)
        np.testing.assert_allclose(engine.score(RankRequest(spec, {"x": x}))["y"], x.sum(axis=1))


def test_weights_of_any_dtype_come_through(tmp_path):
    spec = ModelSpec(
        name="mixed",
        features=(FeatureSpec(name="x", kind="dense", scope="candidate", width=3),),
        tasks=(TaskSpec(name="y", kind="regression"),),
    )

    class Mixed(nnx.Module):
        def __init__(self):
            self.half = nnx.Param(jnp.array([0.5, 1.5, 2.5], jnp.bfloat16))
            self.pick = nnx.Variable(jnp.array([2, 0, 1], jnp.int32))
            self.on = nnx.Variable(jnp.array(True))

        def __call__(self, features):
            x = features["x"][:, self.pick[...]] * self.half[...].astype(jnp.float32)
            return {"y": jnp.where(self.on[...], x.sum(axis=1), 0.0)}

    with Engine.load(build_bundle(Mixed(), spec, {}, out=tmp_path, buckets=[4], tune_seconds=0)) as engine:
        scores = engine.score(RankRequest(spec, {"x": [[1.0, 2.0, 3.0]]}))
    np.testing.assert_allclose(scores["y"], [3 * 0.5 + 1 * 1.5 + 2 * 2.5])


def test_scalar_weights_keep_their_shape(tmp_path):
    spec = ModelSpec(
        name="scalars",
        features=(FeatureSpec(name="x", kind="dense", scope="candidate", width=3),),
        tasks=(TaskSpec(name="y", kind="regression"),),
    )

    class Scalars(nnx.Module):
        def __init__(self):
            self.a, self.b = nnx.Param(jnp.float32(1.0)), nnx.Param(jnp.float32(2.0))
            self.pick, self.on = nnx.Variable(jnp.int32(1)), nnx.Variable(jnp.array(True))

        def __call__(self, features):
            weights = jax.nn.softmax(jnp.stack([self.a[...], self.b[...]]))
            x = features["x"] * weights[self.pick[...]]
            return {"y": jax.lax.cond(self.on[...], lambda: x.sum(axis=1), lambda: x[:, 0])}

    with Engine.load(build_bundle(Scalars(), spec, {}, out=tmp_path, buckets=[4], tune_seconds=0)) as engine:
        scores = engine.score(RankRequest(spec, {"x": [[1.0, 2.0, 3.0]]}))
    np.testing.assert_allclose(scores["y"], [6 * np.exp(2) / (np.exp(1) + np.exp(2))], rtol=1e-6)


@pytest.mark.parametrize("keeps_rngs", [True, False])
def test_a_linen_module_comes_in_through_the_bridge(tmp_path, keeps_rngs):
    spec = ModelSpec(
        name="linen",
        features=(FeatureSpec(name="x", kind="dense", scope="candidate", width=3),),
        tasks=(TaskSpec(name="y", kind="regression"),),
    )

    class Linen(linen.Module):
        @linen.compact
        def __call__(self, features):
            hidden = linen.relu(linen.Dense(8)(features["x"]))
            hidden = linen.Dropout(0.5, deterministic=True)(hidden)
            return {"y": linen.Dense(1)(hidden)[:, 0]}

    x = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    if keeps_rngs:
        module = nnx.bridge.ToNNX(Linen(), rngs=nnx.Rngs(0)).lazy_init({"x": x})
    else:
        module = nnx.bridge.ToNNX(Linen()).lazy_init({"x": x}, rngs=nnx.Rngs(0))
    expected = np.asarray(module({"x": x})["y"])
    with Engine.load(build_bundle(module, spec, {}, out=tmp_path, buckets=[4], tune_seconds=0)) as engine:
        np.testing.assert_allclose(engine.score(RankRequest(spec, {"x": x}))["y"], expected, atol=1e-5)


class BatchMean(shop.Shop):
    def __call__(self, features):
        hidden = self.hidden_of(features)
        out = self.out(hidden - hidden.mean(axis=0))
        return {"click": out[:, 0], "spend": out[:, 1]}


class Listwise(shop.Shop):
    def __call__(self, features):
        logits = super().__call__(features)
        return {"click": jax.nn.log_softmax(logits["click"]), "spend": logits["spend"]}


class TrainingNorm(shop.Shop):
    def hidden_of(self, features):
        self.norm.use_running_average = False
        return super().hidden_of(features)


class Neighbours(shop.Shop):
    def __call__(self, features):
        out = self.out(self.hidden_of(features))
        before = jnp.roll(out[:, 0], 1)  # rows move here
        return {"click": out[:, 0] + before, "spend": out[:, 1]}


@pytest.mark.parametrize(
    ("module", "operation"),
    [
        (BatchMean, r"reduce_sum \(.*\) at .*test_build\.py:\d+.*BatchMean"),
        (Listwise, r"reduce_max \(\[8\] -> \[\]\) at .*test_build\.py:\d+.*Listwise"),
        (
            Neighbours,
            rf"(add|add_any) .* at .*test_build\.py:\d+ \(Neighbours.*, after \w+ at .*test_build\.py:"
            rf"{Neighbours.__call__.__code__.co_firstlineno + 2} \(Neighbours.__call__\) moved rows$",
        ),
    ],
)
def test_a_model_whose_rows_touch_is_refused_with_the_operation(tmp_path, module, operation):
    refuse(
        tmp_path, module(rngs=nnx.Rngs(0)), ModelError, r"a row's score depends on other rows.*" + operation
    )


class FirstUser(shop.Shop):
    """The common mistake: the context is the same on every row, so the first row's will do."""

    def __call__(self, features):
        out = self.out(self.hidden_of(features | {"age": features["age"][:1] + 0 * features["age"]}))
        return {"click": out[:, 0], "spend": out[:, 1]}


class FirstRow(shop.Shop):
    def __call__(self, features):
        hidden = self.hidden_of(features)
        out = self.out(hidden - hidden[0])
        return {"click": out[:, 0], "spend": out[:, 1]}


class NanMaximum(shop.Shop):
    def __call__(self, features):
        out = self.out(self.hidden_of(features))
        return {"click": out[:, 0], "spend": out[:, 1] - jnp.nanmax(features["price"])}


class LongestHistory(shop.Shop):
    def __call__(self, features):
        out = self.out(self.hidden_of(features))
        longest = features["history.mask"].sum(axis=1).max()
        return {"click": out[:, 0] / (1.0 + longest), "spend": out[:, 1]}


class AnyDear(shop.Shop):
    def __call__(self, features):
        out = self.out(self.hidden_of(features))
        factor = jax.lax.cond((features["price"] > 30).any(), lambda: 2.0, lambda: 1.0)
        return {"click": out[:, 0], "spend": out[:, 1] * factor}


class AnyPositive(shop.Shop):
    def __call__(self, features):
        out = self.out(self.hidden_of(features))
        factor = jax.lax.cond((features["price"] > 0).any(), lambda: 2.0, lambda: 1.0)
        return {"click": out[:, 0], "spend": out[:, 1] * factor}


@pytest.mark.parametrize("module", [FirstUser, FirstRow, NanMaximum, LongestHistory, AnyDear, AnyPositive])
@pytest.mark.parametrize("num_golden", [pytest.param(1, marks=pytest.mark.once), 64])
def test_rows_that_meet_in_one_row_or_behind_a_guard_are_found_whatever_the_goldens(
    tmp_path, module, num_golden
):
    golden = random_requests(shop.SPEC, num_golden, num_candidates=1)
    refuse(
        tmp_path,
        module(rngs=nnx.Rngs(0)),
        ModelError,
        r"a row's score depends on other rows.* crosses rows: \w+ .* at .*(test_build|shop)\.py:\d+",
        golden=golden,
    )


class Chatty(shop.Shop):
    def __call__(self, features):
        jax.debug.print("age {}", features["age"].sum())
        return super().__call__(features)


class Caller(shop.Shop):
    def __call__(self, features):
        logits = super().__call__(features)
        shape = jax.ShapeDtypeStruct(logits["click"].shape, jnp.float32)
        return {"click": jax.pure_callback(lambda x: x, shape, logits["click"]), "spend": logits["spend"]}


class Constant(shop.Shop):
    def __call__(self, features):
        return super().__call__(features) | {"spend": 1.0}


class Narrow(shop.Shop):
    def __call__(self, features):
        out = self.out(self.hidden_of(features))
        return {"click": out[:, :1], "spend": out[:, 1]}


class Forgetful(shop.Shop):
    def __call__(self, features):
        return {"click": super().__call__(features)["click"]}


class Tuple(shop.Shop):
    def __call__(self, features):
        return tuple(super().__call__(features).values())


class Concrete(shop.Shop):
    def __call__(self, features):
        if features["age"].sum() > 1e9:
            return {}
        return super().__call__(features)


class Drifting(shop.Shop):
    def __call__(self, features):
        traced = isinstance(features["age"], jax.core.Tracer)
        logits = super().__call__(features)
        return {"click": logits["click"] + (1e-3 if traced else 0.0), "spend": logits["spend"]}


class Overflowing(shop.Shop):
    def __call__(self, features):
        logits = super().__call__(features)
        return {"click": logits["click"], "spend": logits["spend"] / 0.0}


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (
            Narrow,
            ModelError,
            r"task 'click' as floats of shape \[B\] .* got float32 of shape \[\d+, 1\]; it comes from "
            r"slice at .*test_build\.py:\d+ \(Narrow.__call__\)",
        ),
        (
            TrainingNorm,
            ModelError,
            r"writes to its variable 'norm.mean' when it scores: \w+ at .*shop\.py:\d+.*; a served program",
        ),
        (Chatty, ModelError, r"calls back to the host: debug_\w+ at .*test_build\.py:\d+"),
        (Caller, ModelError, r"calls back to the host: pure_callback at .*test_build\.py:\d+"),
        (Constant, ModelError, r"task 'spend' as an array \[B\], got float"),
        (
            Forgetful,
            ModelError,
            r"task 'spend' is missing from its answer \['click'\]; it comes from .*test_build\.py:",
        ),
        (Tuple, ModelError, r"expected a dict of logits by task, got tuple"),
        (Concrete, ModelError, r"can't be traced: TracerBool.* \(at .*test_build\.py:\d+ \(__call__\)\)"),
        pytest.param(
            Drifting,
            VerifyError,
            r"task 'click', bucket 8x8 .* form 'plain', over all golden rows: .* differ from the reference",
            marks=pytest.mark.once,
        ),
        pytest.param(
            Overflowing,
            ModelError,
            r"task 'spend': the reference score of golden request 0 is",
            marks=pytest.mark.once,
        ),
    ],
)
def test_a_model_that_breaks_the_contract_is_refused_by_name(tmp_path, module, error, message):
    refuse(tmp_path, module(rngs=nnx.Rngs(0)), error, message)


def test_wrong_tables_buckets_and_goldens_are_refused(tmp_path):
    model = shop.Shop(rngs=nnx.Rngs(0))
    tables = shop.make_tables()
    refuse(tmp_path, model, ConfigError, "tags", tables={"items": tables["items"]})
    refuse(tmp_path, model, ConfigError, "items", tables=tables | {"items": tables["items"][:, :3]})
    refuse(tmp_path, model, ConfigError, "row counts must be an integer .*; was 0", buckets=(0,))
    refuse(tmp_path, model, ConfigError, "golden requests with candidates, got none", golden=[])
    refuse(tmp_path, model, ConfigError, "golden request 0: expected a RankRequest, got dict", golden=[{}])
    refuse(tmp_path, model, ConfigError, "tables: expected arrays by table name, got list", tables=[])
    refuse(tmp_path, model, ConfigError, "spec: expected a ModelSpec, got dict", spec={})
    refuse(tmp_path, model, ConfigError, "version: expected an integer >= 1, got True", version=True)
    refuse(tmp_path, model, ConfigError, "expected at least one", buckets=())
    refuse(tmp_path, object(), ModelError, "expected a flax.nnx.Module, got object")


def test_the_compiled_programs_hold_no_weights(built):
    path, model, _ = built
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    sizes = [file.stat().st_size for file in (path / "programs").iterdir()]
    assert max(sizes) < 30_000 + num_bytes / 4
    names = {file.name for file in (path / "programs").iterdir()}
    assert {"64x64.stablehlo", "prepare.stablehlo"} <= names
