"""One build from reference scores to publication: `Builder`."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from xlarank import device
from xlarank.bundle import BundleWriter, Manifest, ProgramEntry, TableError, Verify, open_bundle, stored_form
from xlarank.compiler.analyze import Analysis, analyze
from xlarank.compiler.architecture import (
    TUNING_FILE,
    Reusable,
    architecture_of,
    find_reusable,
    latest_profile,
)
from xlarank.compiler.autotune import tune
from xlarank.compiler.bench import DeviceBench
from xlarank.compiler.forms import PLAIN, Form, FormMaker
from xlarank.compiler.golden import random_requests
from xlarank.compiler.golden_set import GoldenSet, Judgement
from xlarank.compiler.limits import MachineLimits, measure_limits
from xlarank.compiler.lower import lower_prepare
from xlarank.compiler.options import BuildOptions
from xlarank.compiler.placement import plan_placement
from xlarank.compiler.prepare import PreparedArrays, weight_key
from xlarank.compiler.program import Traces, plain_program
from xlarank.compiler.reference import check_row_counts, reference_scores
from xlarank.compiler.report import render_report
from xlarank.compiler.report_plots import load_plotting
from xlarank.compiler.result import BucketResult, BuildResult, Tuning
from xlarank.compiler.row_places import explain_rows
from xlarank.compiler.selection import (
    check_named,
    failure_note,
    lower_precisions,
    notes_of,
    worthwhile_choices,
)
from xlarank.compiler.split import DenseModel
from xlarank.compiler.table_formats import TableChoice
from xlarank.compiler.tables import float32_tables, requests_of, settle_tables
from xlarank.compiler.traffic import measure_rows
from xlarank.compiler.verify import verify_bucket
from xlarank.errors import ModelError, VerifyError, XlarankError
from xlarank.host import DeviceRows, Gatherer, HostTable
from xlarank.spec import (
    Bucket,
    BucketLadder,
    ModelSpec,
    Precision,
    RankRequest,
    Signature,
)
from xlarank.spec.ladder import SMALL_ROWS, plan_ladder, seconds_by_rows

__all__ = ["Builder", "Progress"]

_PREPARE_FILE = "prepare.stablehlo"

Progress = Callable[[str, int, int], None]
"""Told what is done, and how many of how many are: buckets, requests for the reference scores."""


class Builder:
    """One build: what every step of it reads."""

    def __init__(
        self,
        model: DenseModel,
        spec: ModelSpec,
        tables: Mapping[str, np.ndarray],
        requests: Sequence[RankRequest],
        labels: Mapping[str, np.ndarray],
        options: BuildOptions,
        on_progress: Progress,
    ) -> None:
        # Until the tables' formats are settled, the model is the one that was trained.
        self.stated, self.spec, self.float32_tables = spec, float32_tables(spec), tables
        self.model, self.requests = model, requests_of(self.spec, requests)
        self.labels, self.options, self.on_progress = labels, options, on_progress
        self.targets = device.devices(options.num_devices)
        self.kind = device.device_kind(self.targets[0])
        self.process_cache = device.compile_cache_folder()
        self.traces = Traces(model, self.spec)
        self.unused = self.traces.unused_features()
        self.activations = self._activations_format()
        self.plan_note = ""
        # Until the tables are placed, all on the host.
        self.signature = Signature.of_model(self.spec, self.unused, self.activations)

    def _activations_format(self) -> str:
        """bfloat16 where that was asked for and some matmul is in it; it halves what crosses to the
        device."""
        if self.options.policy.precision is not Precision.BFLOAT16:
            return "float32"
        signature = Signature.of_model(self.spec, self.unused)
        lowered = FormMaker(self.traces, signature).program(Bucket(2, 1), Form(precision=Precision.BFLOAT16))
        return "float32" if lowered is None else "bfloat16"

    def build(self, out: Path, writer: BundleWriter) -> BuildResult:
        """Reference, search, proof, report, publication."""
        options = self.options
        analysis = analyze(self.traces, self.signature, self.requests)
        scores = reference_scores(
            self.model.reference,
            self.spec,
            self.float32_tables,
            self.requests,
            on_progress=functools.partial(self.on_progress, "reference scores"),
        )
        self.architecture = architecture_of(self.traces, self.signature, options, self._labelled())
        reusable = find_reusable(out, self.spec, self.architecture, options) if options.reuse else None
        tables_failure = self._settle_tables(scores, reusable)
        if tables_failure is not None and options.keep_failed is None:
            raise tables_failure
        built: _Built | None = None
        failure: VerifyError | None = None
        note = ""
        if reusable is not None and self._differs_on_devices(reusable):
            note = f"version {reusable.version} was not reused: devices hold other rows, or other formats"
            reusable = None
        if reusable is not None:
            try:
                built = self._reuse(reusable, writer)
            except VerifyError as error:
                note = f"version {reusable.version} was not reused: with the new weights, {error}"
        if built is None:
            built, failure = self._search(out, writer)
        note = "; ".join(filter(None, (note, self.plan_note)))
        failure = tables_failure or failure
        if failure is not None:
            if options.keep_failed is None:
                raise failure
            with BundleWriter(options.keep_failed, self.spec.name) as failed:
                path = self._publish(failed, built, analysis, note, refusal=str(failure)).path
            raise VerifyError(f"{failure}; kept for study in {path}") from failure
        return self._publish(writer, built, analysis, note)

    def _differs_on_devices(self, reusable: Reusable) -> bool:
        """Whether devices hold other rows than an earlier version's, or rows of other formats: its programs
        decode what they look up."""
        held = self.gatherer.device_rows
        return reusable.device_rows != tuple(held.values()) or any(
            reusable.table_formats[name] is not self.spec.table_by_name[name].dtype for name in held
        )

    def _settle_tables(
        self, scores: Mapping[str, Sequence[np.ndarray]], reusable: Reusable | None
    ) -> VerifyError | None:
        """Takes the tables in the formats that they will be served in; gives back why they may not be.

        Args:
          scores: reference scores with float32 tables.
          reusable: an earlier version, whose formats are tried first.
        """
        self.on_progress("formats of the tables", 0, 1)
        settled = settle_tables(
            self.traces,
            self.stated,
            self.float32_tables,
            self.requests,
            scores,
            self.labels,
            self.options,
            target=self.targets[0],
            start=None if reusable is None else reusable.table_formats,
            labelled=self._labelled(),
        )
        self.spec, self.tables = settled.spec, settled.tables
        self.requests, self.scores = settled.requests, settled.scores
        self.exact = {task: np.concatenate(parts) for task, parts in scores.items()}
        self.gatherer = Gatherer(
            self.spec,
            self.tables,
            unused=self.unused,
            activations=self.activations,
            device_rows=self._placed(reusable),
            is_updated=False,
        )
        self.signature = self.gatherer.signature
        self.weights = (*self.model.params, *self.gatherer.device_arrays())
        golden = self._golden_set(1)
        judged = golden.judge_reference()
        formats = {table.name: table.dtype for table in self.spec.tables}
        self.table_choice = TableChoice(formats, judged.budget_errors, judged.auc_loss, settled.note)
        try:
            golden.check_budget(judged, f"tables, {self.table_choice}", "another table precision")
        except VerifyError as error:
            return error
        return None

    def _placed(self, reusable: Reusable | None) -> Sequence[DeviceRows]:
        """Rows of the tables that devices hold: an earlier version's, whose programs take so many."""
        formats = {table.name: table.dtype for table in self.spec.tables}
        if (
            reusable is not None
            and reusable.table_formats == formats
            and not self.options.placement.has_trace
        ):
            return reusable.device_rows
        return plan_placement(
            self.spec,
            self.unused,
            self.requests,
            self.options.placement,
            device_memory=device.device_memory(self.targets[0]),
        )

    def _golden_set(self, max_rows: int) -> GoldenSet:
        replay = device.GoldenReplay(self.gatherer, self.requests, self.scores, max_rows)
        return GoldenSet(self.spec, replay, self.labels, self.options.policy, self.exact)

    def _labelled(self) -> list[str]:
        """Tasks with labels of both classes: without them "auto" lowers nothing."""
        known = {task: values[~np.isnan(values)] for task, values in self.labels.items()}
        return [task for task, values in known.items() if values.size and values.min() < values.max()]

    def _take_ladder(self, ladder: BucketLadder) -> None:
        """Makes buffers and golden batches for the buckets of a ladder."""
        self.ladder = ladder
        self.buffers = device.BatchBuffers(self.signature, ladder)
        self.golden = self._golden_set(ladder.max_rows)
        random = random_requests(self.spec, seed=1)
        no_scores = {
            t.name: [np.zeros(r.num_candidates, np.float32) for r in random] for t in self.spec.tasks
        }
        self.probes = [device.GoldenReplay(self.gatherer, random, no_scores, ladder.max_rows)]

    def _ladder_asked_for(self, out: Path) -> BucketLadder:
        """Of the row counts that were named, or that suit the traffic by the times measured of this model."""
        traffic = self.options.traffic
        if traffic is None:
            return BucketLadder.of_rows(self.options.bucket_rows)
        params = dict(zip(self.model.names, self.model.params, strict=True))
        known = latest_profile(out, self.spec, self.kind, self.architecture, params)
        # One that doesn't reach down to small batches would keep every later ladder from having them.
        if known is None or min(bucket.rows for bucket in known.profile.seconds) > SMALL_ROWS:
            profile = measure_rows(
                self.traces, self.gatherer, self.requests, lambda text: self.on_progress(text, 0, 1)
            )
        else:
            profile = known.profile
            if not known.is_same_architecture:
                self.plan_note = (
                    f"the buckets were planned by the times of version {known.version}, whose weights have "
                    f"the same shapes and whose operations may be others"
                )
        plan = plan_ladder(
            traffic.sizes,
            seconds_by_rows(profile),
            num_buckets=traffic.num_buckets,
            max_rows=traffic.max_rows,
        )
        return BucketLadder.of_rows(plan.rows)

    def _search(self, out: Path, writer: BundleWriter) -> tuple[_Built, VerifyError | None]:
        """Tries forms, then proves the chosen ones as they will serve."""
        self._take_ladder(self._ladder_asked_for(out))
        limits = measure_limits(self.targets[0])
        with device.compile_cache_at(writer.cache_dir):
            return self._tune(writer, limits)

    def _tune(self, writer: BundleWriter, limits: MachineLimits) -> tuple[_Built, VerifyError | None]:
        policy = self.options.policy
        forms = FormMaker(self.traces, self.signature)
        prepared = PreparedArrays(
            plain_program(self.traces, self.signature, self.ladder.buckets[0]).weight_avals
        )
        bench = DeviceBench(
            forms,
            self.weights,
            prepared,
            self.golden,
            self.signature,
            self.buffers,
            self.targets[0],
            writer.cache_dir,
        )
        self._check_model(bench)
        lower, note = lower_precisions(
            policy.precision, limits, device.half_precision(self.targets[0]), self.golden.unlabelled
        )
        choices = tune(
            self.ladder.buckets,
            bench,
            precisions=lower,
            is_precision_named=policy.precision is not None,
            seconds=self.options.tune_seconds,
            clock=time.monotonic,
            on_progress=self.on_progress,
        )
        check_named(self.spec.name, policy.precision, choices, bench)
        choices = worthwhile_choices(choices, bench, self.signature, limits, self.on_progress)
        bench.forget_losers({choice.bucket: choice.form for choice in choices})
        found = [bench.candidate(choice.bucket, choice.form) for choice in choices]
        num_params = len(self.model.params)
        tables = [weight_key(index) for index in range(num_params, len(self.weights))]
        taken = dict.fromkeys(key for candidate in found for key in candidate.parted.keys)
        made = [key for key in taken if key not in tables]
        prepare = lower_prepare(prepared.program(made, num_params))
        keys = [*made, *tables]
        programs = {
            choice.bucket: (candidate.data, tuple(keys.index(key) for key in candidate.parted.keys))
            for choice, candidate in zip(choices, found, strict=True)
        }
        kept = {choice.bucket for choice in choices}
        tuning = Tuning(
            choices=tuple(choices),
            notes=tuple(notes_of(forms, choice) for choice in choices),
            dropped=tuple(bucket for bucket in self.ladder.buckets if bucket not in kept),
            limits=limits,
            prepared_bytes=tuple(prepared.num_bytes(candidate.parted.keys) for candidate in found),
            total_prepared_bytes=prepared.num_bytes(keys),
            param_bytes=sum(param.nbytes for param in self.model.params),
            seconds=self.options.tune_seconds,
            precision_note="; ".join(filter(None, (note, failure_note(bench)))),
        )
        placed_at = range(len(made), len(keys))
        return self._prove(prepare, programs, len(keys), placed_at, tuning)

    def _reuse(self, reusable: Reusable, writer: BundleWriter) -> _Built:
        """Takes an earlier version's programs and forms, and proves them with these weights."""
        self.on_progress(f"programs of version {reusable.version}", 0, len(reusable.programs))
        self._take_ladder(BucketLadder(tuple(reusable.programs)))
        self.probes = []  # the same programs were poisoned with them before; a third of a refresh's proof
        reusable.copy_cache(writer.cache_dir)
        # Nothing is timed here, so what the report needs is imported beside the proof, which waits for XLA.
        with ThreadPoolExecutor(1) as beside, device.compile_cache_at(writer.cache_dir):
            beside.submit(load_plotting)
            built, failure = self._prove(
                reusable.prepare,
                reusable.programs,
                reusable.num_prepared,
                reusable.placed_at,
                reusable.tuning,
                reusable.seconds,
            )
        if failure is not None:
            raise failure
        return dataclasses.replace(built, reused=reusable.version)

    def _prove(
        self,
        prepare: bytes,
        programs: Mapping[Bucket, tuple[bytes, tuple[int, ...]]],
        num_prepared: int,
        placed_at: Sequence[int],
        tuning: Tuning,
        known_seconds: Mapping[Bucket, float] | None = None,
    ) -> tuple[_Built, VerifyError | None]:
        """Loads programs as a server does, on every device, and proves each bucket; the first failure is
        given back with what was built."""
        loaded = {
            bucket: device.BucketProgram(device.deserialize_program(data), takes)
            for bucket, (data, takes) in programs.items()
        }
        exported = device.deserialize_program(prepare)
        replicas = []
        num_params = len(self.model.params)
        tables = device.place_tables(self.targets, self.weights[num_params:])
        for target, placed in zip(self.targets, tables, strict=True):
            arrays = device.prepare_weights(target, exported, self.weights[:num_params])
            replicas.append(device.Replica(target, self.signature, loaded, (*arrays, *placed)))
        failure: VerifyError | None = None
        judgements: dict[Bucket, Judgement] = {}
        for number, (bucket, form) in enumerate(tuning.forms.items()):
            self.on_progress(f"proof of {bucket}", number, len(programs))
            leaves = self.buffers.leaves(bucket)
            try:
                judgements[bucket] = verify_bucket(
                    self.signature,
                    bucket,
                    replicas[0],
                    lambda bucket=bucket: plain_program(self.traces, self.signature, bucket),
                    self.weights,
                    self.golden,
                    self.probes,
                    self.buffers,
                    form=form.label,
                    precision=form.precision,
                )
            except VerifyError as error:
                failure = failure or error
                judgements[bucket] = self.golden.judge(replicas[0], bucket, leaves)
        seconds = known_seconds
        if seconds is None:
            seconds = device.measure_profile(replicas[0], self.golden.replay, self.buffers).seconds
        results = [
            BucketResult(
                bucket=bucket,
                form=form,
                seconds=seconds[bucket],
                judgement=judgements[bucket],
                cost=replicas[0].executables[bucket].cost(),
            )
            for bucket, form in tuning.forms.items()
        ]
        return _Built(prepare, programs, num_prepared, tuple(placed_at), tuning, tuple(results)), failure

    def _check_model(self, bench: DeviceBench) -> None:
        """Refuses a model whose rows touch or are counted, before any pass may hide it."""
        whole = [
            bucket for bucket in self.ladder.buckets if bucket.requests == bucket.rows and bucket.rows > 1
        ]
        bucket = (whole or list(self.ladder.buckets))[0]
        replica = bench.candidate(bucket, PLAIN).replica

        def counts_rows() -> None:
            # No program of the bundle: what is compiled for it is found again by the next build.
            with device.compile_cache_at(self.process_cache):
                tolerance = self.options.policy.tolerance
                check_row_counts(self.traces, self.float32_tables, self.requests[0], tolerance)

        try:
            verify_bucket(
                self.signature,
                bucket,
                replica,
                lambda: plain_program(self.traces, self.signature, bucket),
                self.weights,
                self.golden,
                self.probes,
                self.buffers,
                form=str(PLAIN),
                precision=Precision(self.activations),
            )
        except VerifyError as error:
            self._raise_row_fault(error)
            counts_rows()  # the reason, if it is one
            narrow, platform = self.traces.at(bucket.rows).narrow_floats, replica.device.platform
            if narrow and platform != "cpu":
                raise VerifyError(
                    f"{error}; the model computes in {narrow[0]} of its own accord, which a {platform} "
                    f"rounds otherwise: let it compute in float32, and ask for --precision {narrow[0]}"
                ) from error
            raise
        try:
            counts_rows()
        except ModelError as error:
            self._raise_row_fault(error)  # with the operation, where it shows at one row count
            raise

    def _raise_row_fault(self, error: XlarankError) -> None:
        """Raises ModelError in place of an error that a row's place, or its neighbours, explain."""
        fault = explain_rows(self.traces, self.float32_tables, self.requests)
        if fault is not None:
            raise ModelError(f"model {self.spec.name!r}, {fault}") from error

    def _publish(
        self, writer: BundleWriter, built: _Built, analysis: Analysis, note: str, *, refusal: str = ""
    ) -> BuildResult:
        """Writes everything and renames."""
        spec = self.spec
        writer.add_params(dict(zip(self.model.names, self.model.params, strict=True)))
        for table in spec.tables:
            rows = self.tables[table.name]
            if isinstance(rows, HostTable):
                rows = rows.rows.view(stored_form(table)[0])
            writer.add_table(table.name, rows)
        held = {name: rows.numbers for name, rows in self.gatherer.device_rows.items()}
        if split := {name: numbers for name, numbers in held.items() if numbers is not None}:
            writer.add_device_rows(split)
        rows = {task: np.concatenate(parts) for task, parts in self.scores.items()}
        values = {"scores": rows} | ({"labels": dict(self.labels)} if self.labels else {})
        writer.add_golden(self.requests, values)
        entries = [
            ProgramEntry(
                bucket=result.bucket,
                form=str(result.form),
                prepared=built.programs[result.bucket][1],
                file=writer.add_program(f"{result.bucket}.stablehlo", built.programs[result.bucket][0]),
                precision=result.form.precision,
                max_error={task: _finite(e.max) for task, e in result.judgement.errors.items()},
                p99_error={task: _finite(e.p99) for task, e in result.judgement.errors.items()},
                seconds={self.kind: result.seconds},
            )
            for result in built.results
        ]
        writer.add_text("analysis.json", json.dumps(analysis.to_dict(), indent=1))
        writer.add_text(TUNING_FILE, json.dumps(built.tuning.to_dict(), indent=1))
        reused = {} if built.reused is None else {"reused_version": str(built.reused)}
        manifest = Manifest(
            spec=spec,
            placements=tuple(rows.placement for rows in self.gatherer.device_rows.values()),
            placed_at=built.placed_at,
            programs=tuple(entries),
            params=self.model.names,
            prepare=writer.add_program(_PREPARE_FILE, built.prepare),
            num_prepared=built.num_prepared,
            unused_features=self.unused,
            activations=self.activations,
            tolerance=self.options.policy.tolerance,
            budget=self.options.policy.budget,
            table_errors={
                task: TableError(_finite(e.p99), _finite(e.max), self.table_choice.auc_loss.get(task))
                for task, e in self.table_choice.errors.items()
            },
            refusal=refusal,
            architecture=self.architecture,
            provenance=_provenance() | dict(self.options.provenance) | reused,
            fingerprint=device.fingerprint(),
        )
        result = BuildResult(
            manifest=manifest,
            analysis=analysis,
            tuning=built.tuning,
            results=built.results,
            reference_auc=self.golden.reference_auc,
            tables=self.table_choice,
            reused=built.reused,
            note=note,
        )
        writer.add_text("report.html", render_report(result, self.requests))
        path = writer.publish(manifest)
        published = open_bundle(path, verify=Verify.SIZES).manifest
        return dataclasses.replace(result, path=path, manifest=published)


@dataclasses.dataclass(frozen=True)
class _Built:
    """Programs of every bucket, proven or about to be refused."""

    prepare: bytes
    programs: Mapping[Bucket, tuple[bytes, tuple[int, ...]]]
    num_prepared: int
    placed_at: tuple[int, ...]
    """Of the tables on devices: places of their arrays among the prepared."""

    tuning: Tuning
    results: tuple[BucketResult, ...]
    reused: int | None = None


def _finite(error: float) -> float:
    """For the manifest of a bundle that failed: JSON has no infinity."""
    return min(error, 1e30)


def _provenance() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in ("flax", "jaxlib")}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from a source tree
        versions["xlarank"] = importlib.metadata.version("xlarank")
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"created": created, "python": platform.python_version(), "jax": jax.__version__, **versions}
