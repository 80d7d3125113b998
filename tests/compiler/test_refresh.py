"""A checkpoint of an architecture compiled before: what is reused, what is compiled anew, what is proven
again."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import shop
from flax import nnx
from pass_cases import sampled

from xlarank import device
from xlarank.bundle import open_bundle
from xlarank.compiler import BuildOptions, build, random_requests
from xlarank.compiler.architecture import KnownTimes, latest_profile
from xlarank.compiler.options import Traffic
from xlarank.errors import VerifyError
from xlarank.runtime import Engine
from xlarank.spec import ErrorBudget, Precision, PrecisionPolicy
from xlarank.spec.ladder import SizeHistogram

OPTIONS = BuildOptions(bucket_rows=(4, 16), tune_seconds=0.0, num_devices=1)


def built(out, seed=0, *, module=None, options=OPTIONS, **arguments):
    device.configure()
    module = shop.Shop(rngs=nnx.Rngs(seed)) if module is None else module
    return build(module, shop.SPEC, shop.make_tables(), out=out, options=options, **arguments)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    out = tmp_path_factory.mktemp("repository")
    built(out)
    return out


def files_of(version):
    return {file.name: file.read_bytes() for file in (version / "programs").iterdir()}


def test_new_weights_of_the_same_architecture_take_its_programs_forms_and_code(repository):
    first = open_bundle(repository / "shop" / "1").manifest
    result = built(repository, seed=1)
    assert result.reused == 1
    assert result.manifest.provenance["reused_version"] == "1"
    assert files_of(result.path) == files_of(repository / "shop" / "1")
    assert result.manifest.architecture == first.architecture
    assert [(e.form, e.precision, e.seconds) for e in result.manifest.programs] == [
        (e.form, e.precision, e.seconds) for e in first.programs
    ]
    assert set(first.cache_files) <= set(result.manifest.cache_files)
    model, tables = shop.Shop(rngs=nnx.Rngs(1)), shop.make_tables()
    with Engine.load(result.path) as engine:
        for request in random_requests(shop.SPEC, 3, num_candidates=29, seed=4):
            for task, expected in shop.numpy_scores(model, request, tables).items():
                np.testing.assert_allclose(engine.score(request)[task], expected, rtol=1e-4, atol=1e-6)


def test_a_ladder_is_planned_by_times_of_the_same_weights_and_says_of_which_version(tmp_path):
    options = dataclasses.replace(OPTIONS, bucket_rows=(8, 16), reuse=False)
    first = built(tmp_path, options=options)
    params = open_bundle(first.path).params()
    kind = device.device_kind(device.devices()[0])
    known = latest_profile(tmp_path, shop.SPEC, kind, first.manifest.architecture, params)
    assert known == KnownTimes(1, first.manifest.latency[kind], True)
    assert latest_profile(tmp_path, shop.SPEC, kind, "another", params) == dataclasses.replace(
        known, is_same_architecture=False
    )
    wider = params | {"out.bias": np.zeros(3, np.float32)}
    assert latest_profile(tmp_path, shop.SPEC, kind, "another", wider) is None
    traffic = Traffic(SizeHistogram({3: 1, 12: 1}), num_buckets=2)
    planned = built(
        tmp_path, module=Steeper(rngs=nnx.Rngs(0)), options=dataclasses.replace(options, traffic=traffic)
    )
    assert planned.note == (
        "the buckets were planned by the times of version 1, whose weights have the same shapes and whose "
        "operations may be others"
    )


class Wider(shop.Shop):
    def __init__(self, *, rngs):
        super().__init__(rngs=rngs)
        self.hidden = nnx.Linear(self.hidden.in_features, 48, rngs=rngs)
        self.norm = nnx.BatchNorm(48, rngs=rngs)
        self.out = nnx.Linear(48, 2, rngs=rngs)


class Steeper(shop.Shop):
    """Equal weights, another constant in the code."""

    def hidden_of(self, features):
        return super().hidden_of(features) * jnp.float32(1.25)


OTHERS = {
    "a layer's size": {"module": Wider(rngs=nnx.Rngs(0))},
    "an operation": {"module": Steeper(rngs=nnx.Rngs(0))},
    "the buckets": {"options": dataclasses.replace(OPTIONS, bucket_rows=(4, 32))},
    "the precision asked for": {
        "options": dataclasses.replace(OPTIONS, policy=PrecisionPolicy(Precision.FLOAT32))
    },
    "more time for tuning": {"options": dataclasses.replace(OPTIONS, tune_seconds=1.0)},
    "being told so": {"options": dataclasses.replace(OPTIONS, reuse=False)},
}


@pytest.mark.parametrize("what", sampled(OTHERS, pytest.mark.sweep, {"an operation", "the buckets"}))
def test_what_changes_programs_or_forms_compiles_anew(repository, what):
    assert built(repository, **OTHERS[what]).reused is None


def test_another_library_version_compiles_anew(repository, monkeypatch):
    there = device.fingerprint()
    monkeypatch.setattr(device, "fingerprint", lambda: there | {"jaxlib": "99.0"})
    assert built(repository).reused is None


def test_a_damaged_version_is_passed_over(tmp_path, caplog):
    built(tmp_path)
    file = next((tmp_path / "shop" / "1" / "programs").glob("4x*"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert built(tmp_path).reused is None
    assert "version 1 of shop can't be reused" in caplog.text


def test_weights_that_leave_the_budget_in_a_reused_form_are_not_served_with_it(tmp_path):
    """int8 holds for the first weights; the next ones have an outlier that makes its steps coarse."""
    requests = random_requests(shop.SPEC)
    rows = sum(request.num_candidates for request in requests)
    labels = {"click": (np.arange(rows) % 2).astype(np.float32)}
    policy = PrecisionPolicy(Precision.INT8, budget=ErrorBudget(0.05, 0.2))
    options = dataclasses.replace(OPTIONS, policy=policy)
    first = built(tmp_path, options=options, golden=requests, labels=labels)
    assert {entry.precision for entry in first.manifest.programs} == {Precision.INT8}
    coarse = shop.Shop(rngs=nnx.Rngs(0))
    kernel = np.array(coarse.hidden.kernel[...])
    kernel[0] *= 40  # the weights of one input set the scale of every channel
    coarse.hidden.kernel[...] = jnp.asarray(kernel)
    with pytest.raises(VerifyError, match=r"task '\w+', bucket \d+x\d+ .*, form '.*int8', .*99th percentile"):
        built(tmp_path, module=coarse, options=options, golden=requests, labels=labels)
    assert not (tmp_path / "shop" / "2").exists()


def test_labels_that_come_or_go_decide_anew_what_may_be_lowered(tmp_path):
    requests = random_requests(shop.SPEC)
    rows = sum(request.num_candidates for request in requests)
    labels = {"click": (np.arange(rows) % 2).astype(np.float32)}
    assert built(tmp_path, golden=requests).reused is None
    assert built(tmp_path, golden=requests, labels=labels).reused is None
    assert built(tmp_path, golden=requests, labels=labels).reused == 2
    assert built(tmp_path, golden=requests).reused == 1
