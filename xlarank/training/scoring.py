"""Scores by the Flax module itself, jitted: `Scorer`. What `xlarank evaluate CONFIG --checkpoint` runs."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx

from xlarank.device import compiler_options
from xlarank.errors import ModelError
from xlarank.host.preprocessing import model_inputs
from xlarank.models.embedding import LENGTHS_SUFFIX
from xlarank.spec import FeatureKind, ModelSpec, RankRequest, TaskKind
from xlarank.training.examples import Examples
from xlarank.training.ranker import Ranker

__all__ = ["Scorer", "to_scores"]

_MAX_ROWS = 4096
_MIN_SIZE = 8


class Scorer:
    """Scores rows with a ranker in evaluation mode.

    Rows and open-ended bags are padded to powers of two, so that few sizes are compiled.
    """

    def __init__(self, spec: ModelSpec, ranker: Ranker) -> None:
        """Puts the ranker into evaluation mode and takes its parameters as they are now.

        Args:
          spec: the fitted spec.
          ranker: of that spec.
        """
        self._spec = spec
        ranker.eval()
        graphdef, self._state = nnx.split(ranker)
        self._forward = jax.jit(
            lambda state, inputs: nnx.merge(graphdef, state)(inputs),
            compiler_options=compiler_options(jax.default_backend()),
        )
        # Bags without a max_length are as long as the longest one at hand.
        self._open_bags = {
            f.name for f in spec.features if f.kind is FeatureKind.ID_LIST and f.max_length is None
        }

    def load(self, *states: nnx.State) -> None:
        """Takes other parameters of the same ranker, as `nnx.split` gives them."""
        self._state = nnx.merge_state(*states)

    def logits(self, examples: Examples) -> dict[str, np.ndarray]:
        """[num_rows] float32 by task, for all rows of a data set."""
        parts = []
        for begin in range(0, examples.num_rows, _MAX_ROWS):
            rows = np.arange(begin, min(begin + _MAX_ROWS, examples.num_rows))
            parts.append(self._run(examples.inputs(rows), len(rows)))
        if not parts:
            return self._no_rows()
        return {task.name: np.concatenate([part[task.name] for part in parts]) for task in self._spec.tasks}

    def score(self, request: RankRequest) -> dict[str, np.ndarray]:
        """Scores of one request, [N] float32 by task: probabilities of binary tasks."""
        num_rows = request.num_candidates
        if not num_rows:
            return self._no_rows()
        inputs = model_inputs(self._spec, request.columns)
        for feature in self._spec.context_features:
            for name in (feature.name, feature.name + LENGTHS_SUFFIX):
                if name in inputs:
                    inputs[name] = np.repeat(inputs[name], num_rows, axis=0)
        return to_scores(self._spec, self._run(inputs, num_rows))

    def _run(self, inputs: dict[str, np.ndarray], num_rows: int) -> dict[str, np.ndarray]:
        """Logits [num_rows] by task; rows are padded with copies of the last one."""
        padding = _padded(num_rows) - num_rows
        padded = {}
        for name, array in inputs.items():
            if name in self._open_bags:
                more = _padded(array.shape[1]) - array.shape[1]
                array = np.pad(array, ((0, 0), (0, more)), constant_values=-1)
            padded[name] = np.concatenate([array, np.repeat(array[-1:], padding, axis=0)])
        with jax.default_matmul_precision("highest"):  # the reference is true float32 on every device
            outputs = self._forward(self._state, padded)
        check_outputs(self._spec, outputs, _padded(num_rows))
        return {task.name: np.asarray(outputs[task.name])[:num_rows] for task in self._spec.tasks}

    def _no_rows(self) -> dict[str, np.ndarray]:
        return {task.name: np.zeros(0, np.float32) for task in self._spec.tasks}


def check_outputs(spec: ModelSpec, outputs: object, num_rows: int) -> None:
    """Raises ModelError unless a module's `outputs` are logits [num_rows] for every task.

    Also usable while tracing.
    """
    if not isinstance(outputs, dict):
        raise ModelError(
            f"model {spec.name!r}: expected a dict of logits by task, got {type(outputs).__name__}"
        )
    for task in spec.tasks:
        if task.name not in outputs:
            raise ModelError(
                f"model {spec.name!r}: no logits of task {task.name!r}; it gave {sorted(outputs)}"
            )
        shape = outputs[task.name].shape
        if shape != (num_rows,):
            raise ModelError(
                f"model {spec.name!r}, task {task.name!r}: expected logits of shape [{num_rows}], one a row, "
                f"got {list(shape)}"
            )


def to_scores(spec: ModelSpec, logits: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Turns logits [n] float32 into scores [n] float32: sigmoid for binary tasks, as is for regression."""
    scores = {}
    for task in spec.tasks:
        values = np.asarray(logits[task.name], np.float32)
        if task.kind is TaskKind.BINARY:
            # In double precision exp can't overflow for any float32 that a sane logit takes.
            with np.errstate(over="ignore"):
                values = (1 / (1 + np.exp(-values.astype(np.float64)))).astype(np.float32)
        scores[task.name] = values
    return scores


def _padded(size: int) -> int:
    """The next power of two, at least 8."""
    return max(_MIN_SIZE, 1 << (size - 1).bit_length())
