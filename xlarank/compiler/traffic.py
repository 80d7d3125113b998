"""Times of a model that was never compiled, to plan a ladder by: `measure_rows`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from xlarank import device
from xlarank.compiler.forms import PLAIN, Form, FormMaker
from xlarank.compiler.lower import lower_row_program
from xlarank.compiler.prepare import PreparedArrays, part
from xlarank.compiler.program import Traces
from xlarank.host import Gatherer
from xlarank.spec import Bucket, BucketLadder, LatencyProfile, RankRequest

__all__ = ["measure_rows"]

_MEASURED_ROWS = (8, 64, 256, 1024)


def measure_rows(
    traces: Traces,
    gatherer: Gatherer,
    requests: Sequence[RankRequest],
    on_progress: Callable[[str], None] = lambda _text: None,
) -> LatencyProfile:
    """Times one-request buckets of a few row counts, for a model that was never compiled.

    Args:
      traces: of the model.
      gatherer: of its tables.
      requests: that fill the batches.
      on_progress: told each row count.
    """
    ladder = BucketLadder(tuple(Bucket(rows, 1) for rows in _MEASURED_ROWS))
    target, signature = device.devices(1)[0], gatherer.signature
    forms = FormMaker(traces, signature)
    no_scores = {
        task.name: [np.zeros(request.num_candidates, np.float32) for request in requests]
        for task in traces.spec.tasks
    }
    golden = device.GoldenReplay(gatherer, requests, no_scores, ladder.max_rows)
    buffers = device.BatchBuffers(signature, ladder)
    seconds: dict[Bucket, float] = {}
    for bucket in ladder.buckets:
        on_progress(f"timing {bucket.rows} rows")
        program = forms.program(bucket, Form(hoisted=True)) or forms.program(bucket, PLAIN)
        assert program is not None
        prepared = PreparedArrays(program.weight_avals)
        parted = part(program, prepared)
        exported = device.deserialize_program(lower_row_program(parted, traces.spec, signature))
        arrays = prepared.make(parted.keys, traces.model.params)
        programs = {bucket: device.BucketProgram(exported, tuple(range(len(arrays))))}
        replica = device.Replica(target, signature, programs, arrays)
        seconds |= device.measure_profile(replica, golden, buffers).seconds
    return LatencyProfile(seconds)
