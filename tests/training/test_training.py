"""From a config and data to a checkpoint and back."""

import dataclasses
import json

import numpy as np
import pytest

from xlarank.bundle.requests import read_requests
from xlarank.errors import ConfigError, ModelError
from xlarank.spec import RankRequest
from xlarank.spec.config import load_config
from xlarank.spec.metrics import auc
from xlarank.training import checkpoint
from xlarank.training.evaluate import evaluate, score_requests
from xlarank.training.examples import Examples
from xlarank.training.scoring import Scorer, to_scores
from xlarank.training.trainer import train


def with_training(config, **changes):
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **changes))


@pytest.fixture(scope="module")
def trained_once():
    return {}


@pytest.fixture
def config(config_file):
    return load_config(config_file)


@pytest.fixture
def trained(config, splits, trained_once):
    """Trained well enough to know who likes what."""
    if not trained_once:
        trained_once["model"] = train(with_training(config, epochs=12, patience=12), splits)
    return trained_once["model"]


def test_it_learns_what_the_data_hold(trained, splits):
    rows = Examples(trained.spec, splits.test)
    logits = Scorer(trained.spec, trained.ranker).logits(rows)
    assert auc(rows.labels["like"], logits["like"]) > 0.9
    assert np.mean((logits["stars"] - rows.labels["stars"]) ** 2) < 0.7 * rows.labels["stars"].var()


def test_the_best_epoch_is_what_is_kept(trained, splits):
    rows = Examples(trained.spec, splits.validation)
    logits = Scorer(trained.spec, trained.ranker).logits(rows)
    probability = to_scores(trained.spec, logits)["like"].astype(np.float64)
    like = rows.labels["like"]
    cross_entropy = -np.mean(like * np.log(probability) + (1 - like) * np.log1p(-probability))
    squared_error = np.mean((logits["stars"] - rows.labels["stars"]) ** 2)
    best = min(epoch.validation_loss for epoch in trained.epochs)
    assert trained.epochs[trained.best_epoch - 1].validation_loss == best
    assert (cross_entropy + squared_error) / 2 == pytest.approx(best, rel=1e-5)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(config, splits):
    def tables(seed):
        return train(with_training(config, seed=seed, epochs=1), splits).ranker.embeddings.to_numpy()

    first, again, other = tables(3), tables(3), tables(4)
    for name, table in first.items():
        np.testing.assert_array_equal(again[name], table)
        assert np.abs(other[name] - table).max() > 0


def test_training_stops_when_patience_or_time_is_up(config, splits):
    stuck = train(with_training(config, epochs=20, patience=2, learning_rate=1e-12), splits)
    assert len(stuck.epochs) < 20
    assert len(stuck.epochs) == stuck.best_epoch + 2
    seconds = iter(range(1000))
    timed = train(with_training(config, epochs=20, max_seconds=1.5), splits, clock=lambda: next(seconds))
    assert len(timed.epochs) == 1


def test_a_refit_learns_from_validation_rows_for_as_many_epochs_as_were_best(config, splits):
    reports = []
    model = train(with_training(config, refit=True), splits, progress=reports.append)
    refit = [report for report in reports if report.is_refit]
    assert len(refit) == model.best_epoch
    assert [report.epoch for report in refit] == list(range(1, model.best_epoch + 1))
    plain = train(config, splits)
    assert plain.best_epoch == model.best_epoch
    tables = model.ranker.embeddings.to_numpy()
    assert np.abs(tables["items"] - plain.ranker.embeddings.to_numpy()["items"]).max() > 1e-4


def test_a_loss_that_explodes_is_an_error_that_names_the_rate(config, splits):
    with pytest.raises(
        ModelError, match=r"model 'tiny': the loss of epoch \d is (nan|inf); lower learning_rate"
    ):
        train(with_training(config, learning_rate=1e30), splits)


def test_outputs_that_are_no_logits_are_refused(config, splits, tmp_path):
    (tmp_path / "bad_models.py").write_text(
        "from flax import nnx\n"
        "class Wide(nnx.Module):\n"
        "    def __call__(self, features):\n"
        "        return {'like': features['item'], 'stars': features['item'][:, 0]}\n"
        "class Short(nnx.Module):\n"
        "    def __call__(self, features):\n"
        "        return {'like': features['item'][:, 0]}\n"
        "def wide(spec, *, rngs): return Wide()\n"
        "def short(spec, *, rngs): return Short()\n"
    )
    for build, message in (
        ("wide", r"task 'like': expected logits of shape \[16\], one a row, got \[16, 4\]"),
        ("short", r"no logits of task 'stars'; it gave \['like'\]"),
    ):
        broken = dataclasses.replace(config, model=f"bad_models:{build}", options={})
        with pytest.raises(ModelError, match=message):
            train(broken, splits)


def test_scoring_requests_one_by_one_is_scoring_all_rows(trained, splits):
    spec, scorer = trained.spec, Scorer(trained.spec, trained.ranker)
    together = to_scores(spec, scorer.logits(Examples(spec, splits.test)))
    one_by_one = score_requests(
        splits.test,
        lambda features: scorer.score(RankRequest(spec, features)),
        features=tuple(f.name for f in spec.features),
        tasks=spec.tasks,
    )
    for task, scores in together.items():
        np.testing.assert_allclose(one_by_one[task], scores, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_comes_back_bit_by_bit(config, trained, splits, tmp_path):
    out = tmp_path / "checkpoint"
    checkpoint.save(out, config, trained, splits.validation)
    checkpoint.save(out, config, trained, splits.validation)  # replaces the first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "tiny.toml"]
    spec, ranker = checkpoint.load_ranker(config, out)
    assert spec == trained.spec
    rows = Examples(spec, splits.test)
    expected = Scorer(spec, trained.ranker).logits(rows)
    for task, logits in Scorer(spec, ranker).logits(rows).items():
        np.testing.assert_array_equal(logits, expected[task])
    module, _, tables = checkpoint.restore(config, out)
    assert type(module) is type(trained.ranker.model)
    for name, table in trained.ranker.embeddings.to_numpy().items():
        np.testing.assert_array_equal(tables[name], table)
    assert json.loads((out / "training.json").read_text())["best_epoch"] == trained.best_epoch


def test_labelled_validation_requests_lie_beside_a_checkpoint(config, trained, splits, tmp_path):
    checkpoint.save(tmp_path / "checkpoint", config, trained, splits.validation)
    requests, values = read_requests(tmp_path / "checkpoint" / checkpoint.VALIDATION_FILE, trained.spec)
    assert len(requests) == 20
    np.testing.assert_array_equal(values["labels"]["like"], splits.validation.labels["like"])


def test_a_checkpoint_of_another_config_is_refused(config, trained, splits, tmp_path):
    out = tmp_path / "checkpoint"
    checkpoint.save(out, config, trained, splits.validation)
    other = dataclasses.replace(config, options={**config.options, "expert_hidden": [9]})
    with pytest.raises(
        ConfigError, match=r"makes float32 of shape \[9\], the checkpoint has float32 of shape \[32\]"
    ):
        checkpoint.restore(other, out)
    spec = dataclasses.replace(config.spec, tasks=config.spec.tasks[:1])
    with pytest.raises(ConfigError, match="tasks differ"):
        checkpoint.restore(dataclasses.replace(config, spec=spec), out)


def test_a_folder_that_is_no_checkpoint_is_neither_read_nor_replaced(config, trained, splits, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"precious: no checkpoint here; expected spec\.json"):
        checkpoint.restore(config, tmp_path / "precious")
    with pytest.raises(ConfigError, match="precious: expected an empty folder or a checkpoint to replace"):
        checkpoint.save(tmp_path / "precious", config, trained, splits.validation)
    assert (tmp_path / "precious" / "thesis.txt").exists()


def test_a_report_has_every_metric_beside_the_baseline_and_is_json(trained, splits):
    test = splits.test
    scores = {"like": test.labels["like"] * np.float32(0.5), "stars": test.labels["stars"] + np.float32(2)}
    report = json.loads(json.dumps(evaluate(trained.spec.tasks, splits, scores), allow_nan=False))
    assert report["rows"] == test.num_rows
    like, stars = report["tasks"]["like"], report["tasks"]["stars"]
    assert set(like) == {"auc", "gauc", "log_loss", "normalised_entropy", "baseline"}
    assert (like["auc"], like["gauc"]) == (1, 1)
    assert 0.3 < like["baseline"]["auc"] < 1
    assert stars["mean_squared_error"] == pytest.approx(4)
    assert stars["baseline"]["mean_squared_error"] > 0


def test_a_metric_that_cannot_be_computed_is_null(trained, splits):
    ones = np.ones(splits.test.num_rows, np.float32)
    labels = {"like": ones, "stars": ones}
    one_class = dataclasses.replace(splits, test=dataclasses.replace(splits.test, labels=labels))
    report = evaluate(trained.spec.tasks, one_class, labels)
    assert report["tasks"]["like"]["auc"] is None
    assert report["tasks"]["like"]["normalised_entropy"] is None
