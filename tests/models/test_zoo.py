"""The three models: what they accept, refuse and cost."""

import jax
import numpy as np
import pytest
from flax import nnx
from pass_cases import quickly_compiled

from xlarank.errors import ConfigError
from xlarank.models import build_model
from xlarank.models.dcn_v2 import build as build_dcn_v2
from xlarank.models.dlrm import build as build_dlrm
from xlarank.models.mmoe import build as build_mmoe
from xlarank.spec import ModelSpec

BUILDS = {
    "dcn_v2": (build_dcn_v2, {"hidden": [16], "num_cross_layers": 2}),
    "dcn_v2 stacked": (
        build_dcn_v2,
        {"structure": "stacked", "cross_rank": 3, "hidden": [16], "attention": {"history": "item"}},
    ),
    "dlrm": (build_dlrm, {"bottom_hidden": [16], "top_hidden": [16]}),
    "dlrm cross": (build_dlrm, {"interaction": "cross", "cross_rank": 3, "top_hidden": [16]}),
    "mmoe": (
        build_mmoe,
        {"num_experts": 3, "expert_hidden": [16], "tower_hidden": [8], "num_cross_layers": 1},
    ),
}


@pytest.fixture(scope="module")
def built():
    """Each model, built once: fresh weights cost more time than all the tests together."""
    return {}


@pytest.fixture(params=list(BUILDS))
def model(request, spec, built):
    """A module in evaluation mode."""
    if request.param not in built:
        build, options = BUILDS[request.param]
        with quickly_compiled():
            module = build(spec, rngs=nnx.Rngs(0), **options)
        module.eval()
        graphdef, state = nnx.split(module)
        forward = jax.jit(lambda features: nnx.merge(graphdef, state)(features))
        built[request.param] = module, forward
    return built[request.param][0]


@pytest.fixture
def forward(model, built):
    """The same module, compiled."""
    return next(forward for module, forward in built.values() if module is model)


@pytest.fixture
def activations():
    """Of 6 rows; the first has no history."""
    rng = np.random.default_rng(1)
    mask = np.arange(5) < np.arange(6)[:, None]
    sequence = rng.normal(size=(6, 5, 8)) * mask[:, :, None]
    arrays = {"age": rng.normal(size=(6, 3)), "history": sequence}
    arrays |= {name: rng.normal(size=(6, 8)) for name in ("user", "item", "tags")}
    return {name: array.astype(np.float32) for name, array in arrays.items()} | {"history.mask": mask}


def test_every_task_gets_a_logit_a_row(forward, activations):
    logits = forward(activations)
    assert list(logits) == ["finish", "share"]
    assert {logit.shape for logit in logits.values()} == {(6,)}
    assert {logit.dtype for logit in logits.values()} == {np.dtype(np.float32)}


def test_compiled_and_op_by_op_agree(model, forward, activations):
    with jax.default_matmul_precision("highest"):  # else TF32, on a GPU that has it
        jitted = forward(activations)
        with jax.disable_jit():
            plain = model(activations)
    for task, logits in plain.items():
        np.testing.assert_allclose(jitted[task], logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("feature", ["age", "user", "history", "item", "tags"])
def test_every_feature_reaches_every_task(forward, activations, feature):
    before = {task: np.asarray(logits) for task, logits in forward(activations).items()}
    changed = dict(activations)
    # A change of direction too: attention over equal steps would not notice a common scale.
    changed[feature] = np.flip(activations[feature], axis=-1) * np.float32(2) + np.float32(0.5)
    for task, logits in forward(changed).items():
        assert np.abs(np.asarray(logits) - before[task]).max() > 1e-6


def test_a_row_depends_on_itself_alone(forward, activations):
    poisoned = {
        name: np.concatenate([value[:3], np.full_like(value[3:4], np.nan), value[4:]])
        if value.dtype == np.float32
        else value
        for name, value in activations.items()
    }
    clean, dirty = forward(activations), forward(poisoned)
    others = [0, 1, 2, 4, 5]
    for task, logits in clean.items():
        np.testing.assert_array_equal(np.asarray(dirty[task])[others], np.asarray(logits)[others])


def test_gradients_are_finite_with_empty_histories(model, activations):
    graphdef, state = nnx.split(model)

    @jax.jit
    def gradient(state):
        return jax.grad(lambda s: sum(x.sum() for x in nnx.merge(graphdef, s)(activations).values()))(state)

    leaves = jax.tree.leaves(gradient(state))
    assert leaves
    assert all(np.isfinite(leaf).all() for leaf in leaves)


@pytest.mark.parametrize(
    ("reference", "options", "message"),
    [
        ("dcn_v2", {"layers": 3}, r"model dcn_v2: unknown options \['layers'\]; it has \['structure'"),
        (
            "dcn_v2",
            {"structure": "serial"},
            r"structure must be one of \['parallel', 'stacked'\]; was 'serial'",
        ),
        ("dcn_v2", {"hidden": [0]}, r"hidden must be a list of widths >= 1; was \(0,\)"),
        ("dcn_v2", {"dropout": 1.0}, r"dropout must be in \[0, 1\); was 1.0"),
        ("mmoe", {"expert_hidden": []}, r"expert_hidden must be a list of at least 1 widths >= 1"),
        ("mmoe", {"num_experts": 0}, "num_experts must be an integer >= 1; was 0"),
        (
            "mmoe",
            {"attention": {"user": "item"}},
            r"attention names 'user'; expected a sequence of \['history'\]",
        ),
        (
            "mmoe",
            {"attention": {"history": "age"}},
            "reads 'age'; expected a feature of kind 'id' or 'id_list'",
        ),
        ("mmoe", {"attention": "item"}, "attention must map a sequence feature to a feature"),
        ("dlrm", {"interaction": "fm"}, r"interaction must be one of \['dot', 'cross'\]; was 'fm'"),
        ("dlrm", {"cross_rank": True}, "cross_rank must be an integer >= 1; was True"),
    ],
)
def test_wrong_options_are_refused_by_name(spec, reference, options, message):
    with pytest.raises(ConfigError, match=message):
        build_model(f"xlarank.models.{reference}:build", spec, options, nnx.Rngs(0))


def num_parameters(build, spec, **options):
    """Elements of every Param, without allocating one."""
    module = nnx.eval_shape(lambda: build(spec, rngs=nnx.Rngs(0), **options))
    _, params, _ = nnx.split(module, nnx.Param, ...)
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def criteo(num_ids, dim, num_dense):
    features = [
        {"name": f"c{i}", "kind": "id", "scope": "candidate", "table": f"c{i}"} for i in range(num_ids)
    ]
    if num_dense:
        features.insert(0, {"name": "dense", "kind": "dense", "scope": "candidate", "width": num_dense})
    tables = [{"name": f"c{i}", "dim": dim, "rows": 10} for i in range(num_ids)]
    return ModelSpec.from_dict(
        {"name": "criteo", "features": features, "tables": tables, "tasks": [{"name": "click"}]}
    )


def test_dlrm_dcn_v2_of_mlperf_has_its_weights():
    """16.03 M multiplications a row: bottom 13-512-256-128, cross of rank 512 over 27 x 128, top to 1."""
    counted = num_parameters(
        build_dlrm,
        criteo(26, 128, 13),
        bottom_hidden=[512, 256],
        top_hidden=[1024, 1024, 512, 256],
        interaction="cross",
        num_cross_layers=3,
        cross_rank=512,
    )
    width = 27 * 128
    weights = 13 * 512 + 512 * 256 + 256 * 128 + 3 * 2 * width * 512
    weights += width * 1024 + 1024 * 1024 + 1024 * 512 + 512 * 256 + 256
    biases = 512 + 256 + 128 + 3 * width + 1024 + 1024 + 512 + 256 + 1
    assert round(weights / 1e6, 2) == 16.03
    assert counted == weights + biases


def test_dcn_v2_of_bars_has_the_published_number_of_parameters():
    """20,382,577 on Criteo_x4_001 with 39 fields of 16: what the dense part leaves are whole table rows."""
    dense = num_parameters(
        build_dcn_v2, criteo(39, 16, 0), structure="parallel", num_cross_layers=3, hidden=[1000] * 5
    )
    embeddings = 20_382_577 - dense
    assert dense == 3 * (624 * 624 + 624) + (625_000 + 4 * 1_001_000) + (624 + 1000 + 1)
    assert embeddings % 16 == 0
    assert embeddings // 16 == 911_372
