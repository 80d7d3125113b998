"""Compiles, times and judges forms on the device that tunes: `DeviceBench`."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from xlarank import device
from xlarank.compiler.forms import Form, FormMaker
from xlarank.compiler.golden_set import GoldenSet
from xlarank.compiler.lower import lower_row_program
from xlarank.compiler.prepare import Parted, PreparedArrays, part
from xlarank.errors import VerifyError
from xlarank.spec import Bucket, BucketLadder, ModelSpec, Precision, Signature

if TYPE_CHECKING:  # jax.Device is this class, under a name that type checkers don't take
    from jaxlib._jax import Device

__all__ = ["Candidate", "DeviceBench", "compile_on"]

_SECONDS_A_ROUND_OF_FORMS = 0.15
"""Time in turns, for each form."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A form compiled for a bucket."""

    parted: Parted
    data: bytes
    """The row program, exported."""

    replica: device.Replica
    cache_files: tuple[str, ...]
    """Names of the files of compiled code that it left when it was compiled first."""


def compile_on(
    target: Device,
    bucket: Bucket,
    parted: Parted,
    prepared: PreparedArrays,
    weights: Sequence[Any],
    spec: ModelSpec,
    signature: Signature,
) -> tuple[bytes, device.Replica]:
    """Lowers and compiles one row program as it would serve.

    Args:
      target: the device.
      bucket: of the program.
      parted: the program.
      prepared: knows how its arrays are made.
      weights: of the model, best on the device.
      spec: names the outputs.
      signature: layout of the leaves.

    Returns:
      The exported program, and a replica that holds nothing else.
    """
    data = lower_row_program(parted, spec, signature)
    with jax.default_device(target):
        arrays = prepared.make(parted.keys, weights)
    arrays = tuple(jax.device_put(array, target) for array in arrays)
    program = device.BucketProgram(device.deserialize_program(data), tuple(range(len(arrays))))
    return data, device.Replica(target, signature, {bucket: program}, arrays)


class DeviceBench:
    """The `Bench` of a real device.

    Attributes:
      failures: what XLA said of lowered forms that it can't compile or run here.
    """

    def __init__(
        self,
        forms: FormMaker,
        weights: Sequence[np.ndarray],
        prepared: PreparedArrays,
        golden: GoldenSet,
        signature: Signature,
        buffers: device.BatchBuffers,
        target: Device,
        cache: Path,
    ) -> None:
        """
        Args:
          forms: makes programs.
          weights: of the model.
          prepared: collects the expressions of all that is compiled.
          golden: fills the batches and judges.
          signature: layout of the leaves.
          buffers: written and read here.
          target: the device.
          cache: the folder that JAX's compilation cache is at.
        """
        self._forms = forms
        self._weights = weights
        self._prepared = prepared
        self._golden = golden
        self._signature = signature
        self._buffers = buffers
        self._target = target
        self._cache = cache
        self._candidates: dict[tuple[Bucket, Form], Candidate | None] = {}
        self._files: dict[tuple[Bucket, Form], tuple[str, ...]] = {}  # once a form was compiled, it hits
        self._decided: dict[Bucket, Form] = {}
        self.failures: dict[tuple[Bucket, Form], str] = {}
        with jax.default_device(target):
            self._placed = tuple(jax.device_put(weight, target) for weight in weights)

    def candidate(self, bucket: Bucket, form: Form) -> Candidate:
        """A form that applies, compiled."""
        found = self._compiled(bucket, form)
        assert found is not None
        return found

    def has(self, bucket: Bucket, form: Form) -> bool:
        """Whether the form applies; compiles it if so."""
        return self._compiled(bucket, form) is not None

    def times(self, bucket: Bucket, forms: Sequence[Form]) -> dict[Form, list[float]]:
        """Seconds of full batches, run in turns."""
        leaves = self._buffers.leaves(bucket)
        self._golden.replay.fill(leaves, bucket, bucket.rows)
        replicas = {form: self.candidate(bucket, form).replica for form in forms}
        return device.time_in_turns(
            {form: lambda r=replica: r.run(bucket, leaves) for form, replica in replicas.items()},
            budget_seconds=_SECONDS_A_ROUND_OF_FORMS * len(forms),
        )

    def in_turns(self, forms: Mapping[Bucket, Form]) -> dict[Bucket, float]:
        """Median seconds of full batches of several buckets of one row count, run in turns."""
        runs = {}
        for bucket in forms:
            # Buffers of its own: in those that buckets share the last one filled would stand.
            leaves = device.BatchBuffers(self._signature, BucketLadder((bucket,))).leaves(bucket)
            self._golden.replay.fill(leaves, bucket, bucket.rows)
            replica = self.candidate(bucket, forms[bucket]).replica
            runs[bucket] = lambda r=replica, b=bucket, given=leaves: r.run(b, given)
        seconds = device.time_in_turns(runs, budget_seconds=_SECONDS_A_ROUND_OF_FORMS * len(runs))
        return {bucket: statistics.median(values) for bucket, values in seconds.items()}

    def new_bytes(self, bucket: Bucket, form: Form) -> int:
        """Bytes of prepared arrays that no bucket decided so far has."""
        known = {
            key
            for other, chosen in self._decided.items()
            if other != bucket
            for key in self.candidate(other, chosen).parted.keys
        }
        return self._prepared.num_bytes(
            [k for k in self.candidate(bucket, form).parted.keys if k not in known]
        )

    def refusal(self, bucket: Bucket, form: Form) -> str:
        """Why the form's scores may not be served, in words; empty if they may."""
        judgement = self._golden.judge(
            self.candidate(bucket, form).replica, bucket, self._buffers.leaves(bucket)
        )
        try:
            self._golden.check(judgement, form.precision, f"bucket {bucket}, form {form.label!r}")
        except VerifyError as error:
            return str(error)
        return ""

    def decide(self, bucket: Bucket, form: Form) -> None:
        """Tells what was chosen."""
        self._decided[bucket] = form
        self.release(bucket, form)

    def release(self, bucket: Bucket, kept: Form) -> None:
        """Lets go of a bucket's executables and arrays but for one form; their code stays in the cache."""
        losers = [key for key in self._candidates if key[0] == bucket and key[1] != kept]
        for key in losers:
            del self._candidates[key]
        self._prepared.keep(
            {key for found in self._candidates.values() if found for key in found.parted.keys}
        )

    def forget_losers(self, chosen: Mapping[Bucket, Form]) -> None:
        """Removes all compiled code from the cache but that of the chosen forms."""
        kept = {name for bucket, form in chosen.items() for name in self.candidate(bucket, form).cache_files}
        for path in self._cache.iterdir():
            if path.name not in kept:
                path.unlink()

    def _compiled(self, bucket: Bucket, form: Form) -> Candidate | None:
        key = (bucket, form)
        if key not in self._candidates:
            self._candidates[key] = self._compile(bucket, form)
        return self._candidates[key]

    def _compile(self, bucket: Bucket, form: Form) -> Candidate | None:
        program = self._forms.program(bucket, form)
        if program is None:
            return None
        parted = part(program, self._prepared)
        before = {path.name for path in self._cache.iterdir()}
        try:
            data, replica = compile_on(
                self._target, bucket, parted, self._prepared, self._placed, self._golden.spec, self._signature
            )
            if form.precision is not Precision.FLOAT32:
                # XLA's CPU backend compiles some matmuls of bfloat16 that it refuses when they run.
                leaves = self._buffers.leaves(bucket)
                self._golden.replay.fill(leaves, bucket, bucket.rows)
                replica.run(bucket, leaves)
        except jax.errors.JaxRuntimeError as error:
            if form.precision is Precision.FLOAT32:
                raise
            self.failures[bucket, form] = " ".join(str(error).split())
            return None
        after = {path.name for path in self._cache.iterdir()}
        files = self._files.setdefault((bucket, form), tuple(sorted(after - before)))
        return Candidate(parted, data, replica, files)
