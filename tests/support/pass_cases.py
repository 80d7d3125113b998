"""Models to try the compiler's passes on, batches for them, and what their authors' own calls answer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import foreign
import foreign_odd  # noqa: F401  registers its models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shop
from flax import nnx
from jax.extend import core
from quick_compiles import quickly_compiled

from xlarank.compiler.passes import Hoisted, hoist_context
from xlarank.compiler.prepare import Parted
from xlarank.compiler.program import Program, Traces, plain_program, run_equations
from xlarank.compiler.split import DenseModel, split_function, split_module
from xlarank.models import build_model
from xlarank.spec import Bucket, FeatureKind, ModelSpec, Scope, Signature, TaskKind
from xlarank.spec.config import load_config

__all__ = [
    "FOREIGN",
    "HALF_PRECISION",
    "MODELS",
    "ZOO",
    "Batch",
    "Case",
    "case_from",
    "case_of",
    "check_hoisted",
    "compiled",
    "fed_by_weights",
    "flops_of",
    "hoisted_of",
    "operations",
    "plain_of",
    "run_all",
    "sampled",
    "shape_of",
    "swept",
]

_ROOT = Path(__file__).parents[2]

ZOO = ("feed", "movielens", "dlrm", "dcn_v2")
FOREIGN = tuple(foreign.MODELS)
MODELS = (*FOREIGN, "shop", *ZOO)

_SAMPLE = {"feed", "history_transformer", "indices", "linen_wide", "loops", "ple", "programs_in_programs"}


def sampled(names: Iterable[str], rest: Any, sample: Collection[str] = _SAMPLE) -> list[Any]:
    """Parameters of which all but a sample have the mark `rest`."""
    return [name if name in sample else pytest.param(name, marks=rest) for name in names]


def swept(names: Sequence[str]) -> list[Any]:
    """Parameters of a sweep, of which `make test` and CI run a sample and `make test-sweeps` the rest."""
    return sampled(names, pytest.mark.sweep)


HALF_PRECISION = frozenset({"experts_of_their_own"})
"""Models that compute in bfloat16: compiled, XLA keeps more digits than op by op."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Random activations of one bucket."""

    bucket: Bucket
    activations: dict[str, np.ndarray]
    """[Q, ...] or [B, ...] by name."""

    request_of_row: np.ndarray
    leaves: tuple[np.ndarray, ...]
    """Of the context, then of the candidates."""

    context_names: frozenset[str]

    def repeated(self) -> dict[str, np.ndarray]:
        """What the author's model reads: every context repeated for its rows."""
        return {
            name: array[self.request_of_row] if name in self.context_names else array
            for name, array in self.activations.items()
        }

    def inputs(self, weights: Sequence[Any]) -> list[Any]:
        """Arguments of a program."""
        return [*weights, *self.leaves, self.request_of_row]


class Case:
    """A model with its traces."""

    def __init__(self, name: str, spec: ModelSpec, model: DenseModel) -> None:
        self.name = name
        self.spec = spec
        self.model = model
        self.signature = Signature.of_model(spec)
        self.traces = Traces(model, spec)

    def batch(self, rows: int, requests: int, seed: int = 0, scale: float = 1.0) -> Batch:
        """Random activations, the rows of a request anywhere in the batch."""
        bucket, rng = Bucket(rows, requests), np.random.default_rng([seed, rows, requests])
        arrays: dict[str, np.ndarray] = {}
        for feature in self.spec.features:
            count = requests if feature.scope is Scope.CONTEXT else rows
            width = self.spec.table_of(feature).dim if feature.is_lookup else feature.width
            shape: tuple[int, ...] = (count, width)
            if feature.kind is FeatureKind.SEQUENCE:
                shape = (count, feature.max_length or 0, width)
                arrays[feature.name + ".mask"] = rng.random(shape[:2]) < 0.6
            arrays[feature.name] = (scale * rng.standard_normal(shape)).astype(np.float32)
        context = {f.name for f in self.spec.features if f.scope is Scope.CONTEXT}
        return Batch(
            bucket,
            arrays,
            rng.integers(0, requests, rows).astype(np.int32),
            self._leaves(arrays),
            frozenset(name for name in arrays if name.removesuffix(".mask") in context),
        )

    def _leaves(self, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        leaves = []
        for leaf in (*self.signature.context_leaves, *self.signature.candidate_leaves):
            if leaf.name in arrays:
                leaves.append(arrays[leaf.name])
                continue
            features = [
                f for f in self.spec.features if f.scope is leaf.scope and f.kind is not FeatureKind.SEQUENCE
            ]
            leaves.append(np.concatenate([arrays[f.name] for f in features], axis=1))
        return tuple(leaves)

    @quickly_compiled()
    def answers(self, batches: Sequence[Batch]) -> list[list[np.ndarray]]:
        """Scores by batch and task: the author's model, called op by op on all rows at once."""
        repeated = [batch.repeated() for batch in batches]
        names = repeated[0]
        rows = {name: jnp.asarray(np.concatenate([r[name] for r in repeated])) for name in names}
        with jax.disable_jit(), jax.default_matmul_precision("highest"):
            logits = self.model.reference(rows)
        ends = np.cumsum([batch.bucket.rows for batch in batches])[:-1]
        columns = []
        for task in self.spec.tasks:
            scores = np.asarray(logits[task.name], np.float64)
            if task.kind is TaskKind.BINARY:
                scores = 1 / (1 + np.exp(-scores))
            columns.append(np.split(scores, ends))
        return [list(scores) for scores in zip(*columns, strict=True)]

    @property
    def tolerance(self) -> dict[str, float]:
        """Of scores in float32."""
        return {"rtol": 2e-5, "atol": 1e-3 if self.name in HALF_PRECISION else 5e-6}


@functools.cache
@quickly_compiled()
def case_of(name: str) -> Case:
    """A model by its name in `MODELS`."""
    if name in foreign.MODELS:
        entry = foreign.MODELS[name]
        return Case(name, entry.spec, entry.make())
    if name == "shop":
        return Case(name, shop.SPEC, split_module(shop.Shop(rngs=nnx.Rngs(0))))
    config = load_config(_ROOT / "configs" / f"{name}.toml")
    tables = tuple(dataclasses.replace(table, rows=table.rows or 100) for table in config.spec.tables)
    spec = dataclasses.replace(config.spec, tables=tables)
    module = build_model(config.model, spec, config.options, nnx.Rngs(0), folders=[config.folder])
    return Case(name, spec, split_module(module))


def _compile(run: Callable[..., Any], *inputs: Any) -> jax.stages.Compiled:
    """As fast as XLA can: what it computes, and by its count how much, is the same."""
    return jax.jit(run).lower(*inputs).compile(compiler_options={"xla_backend_optimization_level": 0})


def compiled(run: Callable[..., Any], *inputs: Any) -> Any:
    """Runs a function, compiled."""
    return _compile(run, *inputs)(*inputs)


def run_all(
    case: Case, programs: Sequence[tuple[Program, Batch]], weights: Sequence[Any] | None = None
) -> list[Any]:
    """Scores by task of several programs, compiled as one."""
    inputs = [batch.inputs(case.model.params if weights is None else weights) for _, batch in programs]

    def run(*inputs: Any) -> list[Any]:
        return [run_equations(p.closed, i) for (p, _), i in zip(programs, inputs, strict=True)]

    return [[np.asarray(score) for score in scores] for scores in compiled(run, *inputs)]


def case_from(function: Callable[..., Any], params: Any, spec: ModelSpec | None = None) -> Case:
    """A model written in a test: ``apply(params, features)``."""
    return Case("ours", spec or foreign.spec_of(), split_function(function, params))


def plain_of(case: Case, rows: int = 8, requests: int = 2) -> Program:
    """The plain program of a bucket."""
    return plain_program(case.traces, case.signature, Bucket(rows, requests))


def hoisted_of(case: Case, rows: int = 8, requests: int = 2, **options: Any) -> Hoisted:
    """What `hoist_context` makes of a bucket."""
    return hoist_context(case.traces, case.signature, Bucket(rows, requests), **options)


def check_hoisted(case: Case, buckets: Sequence[tuple[int, int]], **options: Any) -> list[Hoisted]:
    """Hoists the context; the scores must be the author's."""
    batches = [case.batch(*bucket) for bucket in buckets]
    found = [hoisted_of(case, *bucket, **options) for bucket in buckets]
    programs = [f.program for f in found if f.program is not None]
    assert len(programs) == len(buckets)
    scores = run_all(case, list(zip(programs, batches, strict=True)))
    for ours, theirs, bucket in zip(scores, case.answers(batches), buckets, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=5e-6, err_msg=str(bucket))
    return found


def fed_by_weights(parted: Parted) -> list[Any]:
    """Equations that read prepared arrays and constants alone, but for repetitions of one."""
    jaxpr = parted.row.jaxpr
    known, constants = set(jaxpr.invars[: len(parted.keys)]), set(jaxpr.constvars)
    found = []
    for equation in jaxpr.eqns:
        atoms = [atom for atom in equation.invars if not isinstance(atom, core.Literal)]
        if all(atom in constants for atom in atoms):
            constants |= set(equation.outvars)
        elif all(atom in known or atom in constants for atom in atoms):
            known |= set(equation.outvars)
            (result,) = equation.outvars
            is_wider = result.aval.size > atoms[0].aval.size
            if equation.primitive.name != "broadcast_in_dim" or not is_wider:
                found.append((equation.primitive.name, [tuple(atom.aval.shape) for atom in atoms]))
    return found


def flops_of(case: Case, program: Program, batch: Batch) -> float:
    """As XLA counts them."""
    inputs = batch.inputs(case.model.params)
    run = _compile(lambda *inputs: run_equations(program.closed, inputs), *inputs)
    return run.cost_analysis()["flops"]


def operations(program: Program, name: str = "dot_general") -> list[Any]:
    """Equations of a program that do one operation."""
    return [e for e in program.closed.jaxpr.eqns if e.primitive.name == name]


def shape_of(atom: Any) -> tuple[int, ...]:
    """Of a variable or literal of a program."""
    return tuple(atom.aval.shape)
