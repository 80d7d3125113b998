"""Chooses a form for some buckets of a benchmark model, then times every form in turns.

    python tools/bench_forms.py mmoe 512x1 512x16 --rounds 15
    python tools/bench_forms.py dlrm --ladder 8,32,128,512,1024
    python tools/bench_forms.py mmoe 512x1 --max-score-error 0.01

Models have random weights. mmoe: 8 experts 512-256, 3 tasks, width 1024 of which 635 are the context's. dlrm:
MLPerf's DLRM-DCNv2 with tables of dim 16, 13 of 26 ids and 7 of 13 counters the context's. attention: target
attention of a candidate over a context history of 100 x 64. The last line of the output is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xlarank import device  # first: it sets the environment that JAX reads at import

# isort: split
import jax
import numpy as np
from flax import nnx
from quick_compiles import quickly_compiled

from xlarank.compiler import random_requests, reference_scores
from xlarank.compiler.autotune import Choice, tune
from xlarank.compiler.bench import DeviceBench
from xlarank.compiler.forms import PLAIN, Form, FormMaker
from xlarank.compiler.golden_set import GoldenSet
from xlarank.compiler.passes import Fusion
from xlarank.compiler.prepare import PreparedArrays
from xlarank.compiler.program import Traces, plain_program
from xlarank.compiler.split import split_module
from xlarank.host import Gatherer
from xlarank.models import DLRM, DLRMConfig, MMoE, MMoEConfig, TargetAttention
from xlarank.models.dlrm import Interaction
from xlarank.spec import (
    Bucket,
    BucketLadder,
    ErrorBudget,
    FeatureKind,
    FeatureSpec,
    ModelSpec,
    Precision,
    PrecisionPolicy,
    Scope,
    Signature,
    TableSpec,
    TaskSpec,
)

__all__ = ["MODELS", "measure"]


def mmoe() -> tuple[nnx.Module, ModelSpec]:
    """Width 1024, 62% context."""
    spec = ModelSpec(
        name="mmoe",
        features=(
            FeatureSpec(name="user", kind=FeatureKind.DENSE, scope=Scope.CONTEXT, width=635),
            FeatureSpec(name="item", kind=FeatureKind.DENSE, scope=Scope.CANDIDATE, width=389),
        ),
        tasks=tuple(TaskSpec(name=name) for name in ("click", "like", "share")),
    )
    config = MMoEConfig(num_experts=8, expert_hidden=(512, 256), tower_hidden=(64,))
    return MMoE(spec, config, rngs=nnx.Rngs(0)), spec


def dlrm() -> tuple[nnx.Module, ModelSpec]:
    """MLPerf DLRM-DCNv2 (mlcommons/training recommendation_v2): low-rank cross of 512, dim 16 in place of
    128."""
    ids = [f"c{i}" for i in range(26)]
    spec = ModelSpec(
        name="dlrm",
        features=(
            FeatureSpec(name="user_counters", kind=FeatureKind.DENSE, scope=Scope.CONTEXT, width=7),
            FeatureSpec(name="item_counters", kind=FeatureKind.DENSE, scope=Scope.CANDIDATE, width=6),
            *(
                FeatureSpec(
                    name=name,
                    kind=FeatureKind.ID,
                    scope=Scope.CONTEXT if i < 13 else Scope.CANDIDATE,
                    table=name,
                )
                for i, name in enumerate(ids)
            ),
        ),
        tables=tuple(TableSpec(name=name, rows=1000, dim=16) for name in ids),
        tasks=(TaskSpec(name="click"),),
    )
    config = DLRMConfig(
        bottom_hidden=(512, 256),
        top_hidden=(1024, 1024, 512, 256),
        interaction=Interaction.CROSS,
        num_cross_layers=3,
        cross_rank=512,
    )
    return DLRM(spec, config, rngs=nnx.Rngs(0)), spec


class _Attention(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.attention = TargetAttention(64, 64, rngs=rngs)
        self.output = nnx.Linear(64, 1, rngs=rngs)

    def __call__(self, features: dict[str, jax.Array]) -> dict[str, jax.Array]:
        pooled = self.attention(features["item"], features["history"], features["history.mask"])
        return {"click": self.output(pooled)[:, 0]}


def attention() -> tuple[nnx.Module, ModelSpec]:
    """512 candidates over one history of 100 x 64."""
    spec = ModelSpec(
        name="attention",
        features=(
            FeatureSpec(
                name="history",
                kind=FeatureKind.SEQUENCE,
                scope=Scope.CONTEXT,
                table="items",
                max_length=100,
            ),
            FeatureSpec(name="item", kind=FeatureKind.ID, scope=Scope.CANDIDATE, table="items"),
        ),
        tables=(TableSpec(name="items", rows=1000, dim=64),),
        tasks=(TaskSpec(name="click"),),
    )
    return _Attention(rngs=nnx.Rngs(0)), spec


MODELS: dict[str, Callable[[], tuple[nnx.Module, ModelSpec]]] = {
    "mmoe": mmoe,
    "dlrm": dlrm,
    "attention": attention,
}


def measure(
    name: str,
    buckets: Sequence[Bucket],
    *,
    rounds: int,
    tune_seconds: float,
    num_golden: int,
    max_score_error: float | None,
    every_form: bool,
) -> dict[str, Any]:
    """Tunes each bucket alone, as `xlarank compile` would with time to spare, then times forms in turns.

    Args:
      name: of `MODELS`.
      buckets: sizes.
      rounds: runs of each form.
      tune_seconds: to find the form of a bucket, at most.
      num_golden: requests of 100 candidates that prove each form.
      max_score_error: None for float32 alone; else the budget of lower precisions, with labels drawn from the
        reference scores.
      every_form: whether to time all float32 forms beside the chosen one, or the plain one alone.

    Returns:
      By bucket: ``chosen`` and ``labels`` of forms, ``seconds`` by label (equally many, in turns), ``errors``
      and ``auc_loss`` of the chosen form.
    """
    with quickly_compiled():  # any weights will do
        module, spec = MODELS[name]()
    rng = np.random.default_rng(0)
    tables = {
        table.name: rng.standard_normal((table.num_rows, table.dim)).astype(np.float32) * np.float32(0.1)
        for table in spec.tables
    }
    model = split_module(module)
    requests = random_requests(spec, num_golden, num_candidates=100)
    scores = reference_scores(model.reference, spec, tables, requests)
    labels = {
        task: (rng.random(sum(map(len, parts))) < np.concatenate(parts)).astype(np.float32)
        for task, parts in scores.items()
    }
    policy = PrecisionPolicy(Precision.FLOAT32)
    precisions: list[Precision] = []
    if max_score_error is not None:
        policy = PrecisionPolicy(budget=ErrorBudget(max_score_error, 1e-3))
        precisions = [device.half_precision(device.devices()[0]), Precision.INT8]
    traces, signature = Traces(model, spec), Signature.of_model(spec)
    ladder = BucketLadder(tuple(sorted(buckets)))
    replay = device.GoldenReplay(Gatherer(spec, tables), requests, scores, ladder.max_rows)
    buffers = device.BatchBuffers(signature, ladder)
    golden = GoldenSet(spec, replay, labels, policy)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, device.compile_cache_at(Path(folder)):
        for bucket in ladder.buckets:
            forms = FormMaker(traces, signature)
            prepared = PreparedArrays(plain_program(traces, signature, bucket).weight_avals)
            target = device.devices()[0]
            bench = DeviceBench(
                forms, model.params, prepared, golden, signature, buffers, target, Path(folder)
            )
            (choice,) = tune(
                [bucket],
                bench,
                precisions=precisions,
                is_precision_named=False,
                seconds=tune_seconds,
                clock=time.monotonic,
            )
            found[str(bucket)] = _timed(bench, choice, golden, buffers, rounds, every_form)
    return found


def _timed(
    bench: DeviceBench,
    choice: Choice,
    golden: GoldenSet,
    buffers: device.BatchBuffers,
    rounds: int,
    every_form: bool,
) -> dict[str, Any]:
    bucket = choice.bucket
    wanted = [choice.form, PLAIN]
    if every_form:
        wanted += [Form(hoisted, fusion) for hoisted in (False, True) for fusion in Fusion]
        wanted += [trial.form for trial in choice.trials]
    forms = [form for form in dict.fromkeys(wanted) if bench.has(bucket, form)]
    leaves = buffers.leaves(bucket)
    golden.replay.fill(leaves, bucket, bucket.rows)
    replicas = {form: bench.candidate(bucket, form).replica for form in forms}
    seconds: dict[Form, list[float]] = {form: [] for form in forms}
    for _ in range(rounds + 1):
        for form in forms:
            start = time.perf_counter()
            replicas[form].run(bucket, leaves)
            seconds[form].append(time.perf_counter() - start)
    judgement = golden.judge(replicas[choice.form], bucket, leaves)
    return {
        "chosen": choice.form.label,
        "hoisted": {form.label: form.hoisted for form in forms},
        "precision": {form.label: form.precision.value for form in forms},
        "seconds": {form.label: values[1:] for form, values in seconds.items()},
        "p99_error": {task: error.p99 for task, error in judgement.errors.items()},
        "max_error": {task: error.max for task, error in judgement.errors.items()},
        "auc_loss": dict(judgement.auc_loss),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("buckets", nargs="*", help="such as 512x1: rows and requests")
    parser.add_argument("--ladder", help="row counts, each with buckets of 1, B/32 and B requests")
    parser.add_argument("--rounds", type=int, default=15, help="runs of each form (%(default)s)")
    parser.add_argument(
        "--tune-seconds", type=float, default=600, help="to find the form of a bucket, at most (%(default)s)"
    )
    parser.add_argument("--golden", type=int, default=64, help="requests that prove a form (%(default)s)")
    parser.add_argument("--max-score-error", type=float, help="try lower precisions within this budget")
    parser.add_argument(
        "--plain-only", action="store_true", help="time the plain form alone beside the chosen"
    )
    args = parser.parse_args()
    device.configure()
    buckets = [Bucket(*map(int, text.split("x"))) for text in args.buckets]
    if args.ladder:
        buckets += BucketLadder.of_rows(map(int, args.ladder.split(","))).buckets
    found = measure(
        args.model,
        buckets,
        rounds=args.rounds,
        tune_seconds=args.tune_seconds,
        num_golden=args.golden,
        max_score_error=args.max_score_error,
        every_form=not args.plain_only,
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
