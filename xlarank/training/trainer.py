"""The trainer: preprocessing fitted, tables and model learnt together, the best epoch kept."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from xlarank.device import compiler_options
from xlarank.errors import ConfigError, ModelError
from xlarank.spec import ModelSpec, TaskKind
from xlarank.spec.config import Metric, ModelConfig, TrainingConfig
from xlarank.spec.metrics import auc
from xlarank.training.data import Splits, concatenate
from xlarank.training.examples import Examples
from xlarank.training.fit import fit_spec
from xlarank.training.ranker import Ranker, make_ranker
from xlarank.training.scoring import Scorer, check_outputs

__all__ = ["EpochReport", "TrainedModel", "train"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochReport:
    """One pass over the training rows."""

    epoch: int
    """From 1."""

    num_epochs: int
    """Most epochs there will be."""

    train_loss: float
    """Mean over tasks and steps, dropout included."""

    validation_loss: float
    """Mean over tasks; NaN in the refit, where nothing is held back."""

    seconds: float
    """Since training began."""

    is_refit: bool
    """Whether this is the second round, over train and validation rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """What `train` gives."""

    spec: ModelSpec
    """Fitted."""

    ranker: Ranker
    """In evaluation mode."""

    epochs: tuple[EpochReport, ...]
    """In the order they ran."""

    best_epoch: int
    """The best by the config's metric on the validation rows."""

    seconds: float
    """Wall time of training, compilation included."""


def train(
    config: ModelConfig,
    splits: Splits,
    *,
    progress: Callable[[EpochReport], None] = lambda report: None,
    clock: Callable[[], float] = time.perf_counter,
) -> TrainedModel:
    """Fits a spec's preprocessing and learns its parameters; deterministic by ``config.training.seed``.

    Training stops when `metric` on the validation rows hasn't improved for `patience` epochs, or time is
    up. With ``refit`` a fresh model is then trained on train and validation rows, for as many epochs as the
    best one took and with a learning rate that falls to zero over them: the latest rows say the most about
    what comes next.

    Args:
      config: model, options and training settings.
      splits: train and validation are read, test isn't.
      progress: called after every epoch.
      clock: seconds; monotonic.

    Raises:
      ConfigError: when config and data don't fit together.
      ModelError: when the model's outputs aren't logits [B] by task, or the loss becomes NaN.
    """
    started = clock()
    settings = config.training
    if settings.metric is Metric.AUC and any(t.kind is not TaskKind.BINARY for t in config.spec.tasks):
        raise ConfigError(
            f"model {config.spec.name!r}: metric = 'auc' is for binary tasks; it has a regression"
        )
    data = concatenate([splits.train, splits.validation]) if settings.refit else splits.train
    # Vocabularies and statistics see the rows that the last round learns from.
    spec = fit_spec(config.spec, data)
    reports: list[EpochReport] = []

    def report(**fields: Any) -> None:
        reports.append(EpochReport(seconds=clock() - started, **fields))
        progress(reports[-1])

    validation_rows = Examples(spec, splits.validation)
    max_seconds = settings.max_seconds / 2 if settings.refit else settings.max_seconds
    learner = _Learner(config, spec, Examples(spec, splits.train))
    scorer = Scorer(spec, learner.ranker())
    best_cost, best_epoch, best = math.inf, 0, learner.state
    for epoch in range(1, settings.epochs + 1):
        train_loss = learner.run_epoch(epoch, settings.epochs)
        scorer.load(*learner.state)
        logits = scorer.logits(validation_rows)
        loss = _validation_loss(spec, logits, validation_rows)
        cost = loss
        if settings.metric is Metric.AUC:
            cost = -_validation_auc(spec, logits, validation_rows)
        report(
            epoch=epoch,
            num_epochs=settings.epochs,
            train_loss=train_loss,
            validation_loss=loss,
            is_refit=False,
        )
        if cost < best_cost:
            best_cost, best_epoch, best = cost, epoch, learner.state
        if epoch - best_epoch >= settings.patience or clock() - started >= max_seconds:
            break
    if settings.refit:
        learner.restart(Examples(spec, data))
        for epoch in range(1, best_epoch + 1):
            train_loss = learner.run_epoch(epoch, best_epoch)
            report(
                epoch=epoch,
                num_epochs=best_epoch,
                train_loss=train_loss,
                validation_loss=math.nan,
                is_refit=True,
            )
        best = learner.state
    ranker = learner.ranker(best)
    ranker.eval()
    return TrainedModel(
        spec=spec, ranker=ranker, epochs=tuple(reports), best_epoch=best_epoch, seconds=clock() - started
    )


_State = tuple[nnx.State, nnx.State]
"""Parameters, and everything else a module holds: batch statistics, random counters."""


class _Learner:
    """A ranker's parameters and their optimizer, moved one epoch at a time."""

    def __init__(self, config: ModelConfig, spec: ModelSpec, examples: Examples) -> None:
        self._spec = spec
        self._settings = config.training
        ranker = make_ranker(config, spec, seed=config.training.seed)
        ranker.train()
        self._graphdef, *fresh = nnx.split(ranker, nnx.Param, ...)
        self._fresh: _State = (fresh[0], fresh[1])
        self._optimizer = _optimizer(config.training)
        self._step = jax.jit(self._take_step, compiler_options=compiler_options(jax.default_backend()))
        self.restart(examples)

    def restart(self, examples: Examples) -> None:
        """Goes back to fresh parameters, with these rows to learn from; nothing is compiled again."""
        if not examples.num_rows:
            raise ConfigError(f"model {self._spec.name!r}: expected training rows, got none")
        self._examples = examples
        self._batch_size = min(self._settings.batch_size, examples.num_rows)
        self._num_steps = examples.num_rows // self._batch_size
        self.state = self._fresh  # arrays are never changed in place, so that the best epoch's stay
        self._moments = self._optimizer.init(self.state[0])

    def ranker(self, state: _State | None = None) -> Ranker:
        """A ranker of its own with these parameters, or with those of now."""
        return nnx.merge(self._graphdef, *(state or self.state), copy=True)

    def run_epoch(self, epoch: int, num_epochs: int) -> float:
        """Learns from every row once, but for those that don't fill a batch; returns the mean loss."""
        settings = self._settings
        order = np.random.default_rng([settings.seed, epoch]).permutation(self._examples.num_rows)
        total = jnp.zeros(())
        for step in range(self._num_steps):
            rows = order[step * self._batch_size : (step + 1) * self._batch_size]
            # Half a cosine from the peak to zero over all epochs that there may be.
            done = ((epoch - 1) + step / self._num_steps) / num_epochs
            rate = settings.learning_rate * (1 + math.cos(math.pi * done)) / 2
            self.state, self._moments, loss = self._step(
                self.state,
                self._moments,
                np.float32(rate),
                self._examples.inputs(rows),
                self._examples.labels_of(rows),
            )
            total = total + loss
        mean = float(total) / self._num_steps
        if not math.isfinite(mean):
            raise ModelError(
                f"model {self._spec.name!r}: the loss of epoch {epoch} is {mean}; lower learning_rate"
            )
        return mean

    def _take_step(
        self, state: _State, moments: Any, rate: jax.Array, inputs: Any, labels: dict[str, jax.Array]
    ) -> tuple[_State, Any, jax.Array]:
        """One step of AdamW on a batch; the loss is the mean over rows and tasks."""

        def loss_of(params: nnx.State) -> tuple[jax.Array, nnx.State]:
            # A copy of this trace: dropout counts its draws, and batch norm its means, in place.
            ranker = nnx.merge(self._graphdef, params, state[1], copy=True)
            logits = ranker(inputs)
            check_outputs(self._spec, logits, self._batch_size)
            losses = [
                _row_losses(task.kind, logits[task.name], labels[task.name]).mean()
                for task in self._spec.tasks
            ]
            _, _, rest = nnx.split(ranker, nnx.Param, ...)
            return jnp.stack(losses).mean(), rest

        (loss, rest), gradients = jax.value_and_grad(loss_of, has_aux=True)(state[0])
        updates, moments = self._optimizer.update(gradients, moments, state[0])
        params = jax.tree.map(lambda p, u: p - rate * u, state[0], updates)
        return (params, rest), moments, loss


def _optimizer(settings: TrainingConfig) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) at a learning rate of -1, with a decay of its own for tables."""

    def is_table(path: Any) -> bool:
        return any(getattr(key, "key", None) == "embeddings" for key in path)

    def tables(params: nnx.State) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, leaf: is_table(path), params)

    def matrices(params: nnx.State) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: not is_table(path) and leaf.ndim > 1, params
        )

    return optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(settings.weight_decay, matrices),
        optax.add_decayed_weights(settings.table_weight_decay, tables),
    )


def _row_losses(kind: TaskKind, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """[B]: cross entropy of binary tasks, squared error of regressions."""
    if kind is TaskKind.BINARY:
        return optax.sigmoid_binary_cross_entropy(logits, labels)
    return jnp.square(logits - labels)


def _validation_auc(spec: ModelSpec, logits: dict[str, np.ndarray], examples: Examples) -> float:
    """Mean over tasks."""
    mean = float(np.mean([auc(examples.labels[t.name], logits[t.name]) for t in spec.tasks]))
    if not math.isfinite(mean):
        raise ConfigError(
            f"model {spec.name!r}: the validation rows of a task are all of one class; use metric = 'loss'"
        )
    return mean


def _validation_loss(spec: ModelSpec, logits: dict[str, np.ndarray], examples: Examples) -> float:
    """Mean over rows and tasks."""
    losses = [
        _row_losses(task.kind, jnp.asarray(logits[task.name]), jnp.asarray(examples.labels[task.name])).mean()
        for task in spec.tasks
    ]
    return float(jnp.stack(losses).mean())
