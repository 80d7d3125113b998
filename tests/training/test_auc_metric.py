"""Choosing the best epoch by AUC."""

import dataclasses

import pytest

from xlarank.errors import ConfigError
from xlarank.spec.config import Metric, load_config
from xlarank.spec.metrics import auc
from xlarank.training.data import Splits
from xlarank.training.examples import Examples
from xlarank.training.scoring import Scorer
from xlarank.training.trainer import train


def of_auc(config, tasks, **changes):
    return dataclasses.replace(
        config,
        spec=dataclasses.replace(config.spec, tasks=tasks),
        training=dataclasses.replace(config.training, metric=Metric.AUC, **changes),
    )


def test_the_kept_epoch_has_the_highest_auc(config_file, splits):
    config = load_config(config_file)
    # A rate so high that epochs differ wildly: the last one is hardly ever the best of both measures.
    config = of_auc(config, config.spec.tasks[:1], epochs=6, patience=6, learning_rate=0.3)
    model = train(config, splits)
    rows = Examples(model.spec, splits.validation)
    kept = auc(rows.labels["like"], Scorer(model.spec, model.ranker).logits(rows)["like"])
    shorter = dataclasses.replace(config, training=dataclasses.replace(config.training, metric=Metric.LOSS))
    by_loss = train(shorter, splits)
    other = auc(rows.labels["like"], Scorer(by_loss.spec, by_loss.ranker).logits(rows)["like"])
    # The same epochs ran; choosing by AUC can only find one of a higher AUC.
    assert [e.train_loss for e in model.epochs] == [e.train_loss for e in by_loss.epochs]
    assert kept >= other


def test_a_regression_has_no_auc(config_file, splits):
    config = load_config(config_file)
    with pytest.raises(ConfigError, match="model 'tiny': metric = 'auc' is for binary tasks"):
        train(of_auc(config, config.spec.tasks), splits)


def test_validation_rows_of_one_class_have_no_auc(config_file, splits):
    config = load_config(config_file)
    labels = {name: label * 0 for name, label in splits.validation.labels.items()}
    one_class = Splits(
        train=splits.train,
        validation=dataclasses.replace(splits.validation, labels=labels),
        test=splits.test,
    )
    with pytest.raises(ConfigError, match="the validation rows of a task are all of one class"):
        train(of_auc(config, config.spec.tasks[:1], epochs=1), one_class)
