"""What a model scores with its tables in other row formats: `DecodedTables`,
`TableTrial`."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from xlarank import device
from xlarank.compiler.bench import compile_on
from xlarank.compiler.golden_set import GoldenSet, Judgement
from xlarank.compiler.prepare import PreparedArrays, part
from xlarank.compiler.program import Traces, plain_program
from xlarank.compiler.table_formats import Formats
from xlarank.host import Gatherer, decode_rows, encode_rows, model_inputs
from xlarank.spec import (
    Bucket,
    BucketLadder,
    ModelSpec,
    PrecisionPolicy,
    RankRequest,
    RowFormat,
    Signature,
    join_columns,
)

if TYPE_CHECKING:  # jax.Device is this class, under a name that type checkers don't take
    from jaxlib._jax import Device

__all__ = ["DecodedTables", "TableTrial", "rows_read"]

_MAX_ROWS = 1024
"""Of a batch that tries formats."""


class DecodedTables:
    """Float32 tables whose rows went through other formats: those that golden requests read.

    The other rows are zeros that no memory stands behind.

    Attributes:
      tables: [R, D] float32 by name, as last set.
    """

    def __init__(
        self, spec: ModelSpec, tables: Mapping[str, np.ndarray], requests: Sequence[RankRequest]
    ) -> None:
        """
        Args:
          spec: of the requests.
          tables: [R, D] float32 by name.
          requests: golden ones.
        """
        self._rows = rows_read(spec, requests)
        self._values = {name: tables[name][rows] for name, rows in self._rows.items()}
        self._formats: dict[str, RowFormat] = {}
        self.tables = {table.name: _unbacked_zeros((table.num_rows, table.dim)) for table in spec.tables}

    def set(self, formats: Formats) -> None:
        """Writes the rows as they read in these formats; tables not named are float32."""
        for name, rows in self._rows.items():
            row_format = formats.get(name, RowFormat.FLOAT32)
            if self._formats.get(name) is not row_format and len(rows):
                self.tables[name][rows] = decode_rows(encode_rows(self._values[name], row_format))
                self._formats[name] = row_format


class TableTrial:
    """Scores the golden requests with tables in any formats, by the model's plain program."""

    def __init__(
        self,
        traces: Traces,
        decoded: DecodedTables,
        requests: Sequence[RankRequest],
        scores: Mapping[str, Sequence[np.ndarray]],
        labels: Mapping[str, np.ndarray],
        policy: PrecisionPolicy,
        target: Device,
    ) -> None:
        """Compiles the program.

        Args:
          traces: of the model, whose spec has float32 tables.
          decoded: its tables; set by every trial.
          requests: golden ones.
          scores: their reference scores with float32 tables.
          labels: as `GoldenSet` takes them.
          policy: likewise.
          target: device to run on.
        """
        spec, unused = traces.spec, traces.unused_features()
        self._decoded = decoded
        num_rows = min(_MAX_ROWS, 1 << (sum(r.num_candidates for r in requests) - 1).bit_length())
        self._bucket = Bucket(num_rows, num_rows)
        signature = Signature.of_model(spec, unused)
        self._leaves = device.BatchBuffers(signature, BucketLadder((self._bucket,))).leaves(self._bucket)
        # Most rows of these tables aren't there: nothing to measure the prefetch on.
        gatherer = Gatherer(spec, decoded.tables, unused=unused, lines_ahead=8)
        replay = device.GoldenReplay(gatherer, requests, scores, num_rows)
        self._golden = GoldenSet(spec, replay, labels, policy)
        program = plain_program(traces, signature, self._bucket)
        prepared = PreparedArrays(program.weight_avals)
        parted = part(program, prepared)
        weights = traces.model.params
        _, self._replica = compile_on(target, self._bucket, parted, prepared, weights, spec, signature)

    def judge(self, formats: Formats) -> Judgement:
        """Scores every golden row with the tables in these formats; those not named are float32."""
        self._decoded.set(formats)
        return self._golden.judge(self._replica, self._bucket, self._leaves)


def rows_read(spec: ModelSpec, requests: Sequence[RankRequest]) -> dict[str, np.ndarray]:
    """Row numbers by table that some request reads, ascending, each once."""
    columns = [
        join_columns([request.columns[place] for request in requests]) for place in range(len(spec.features))
    ]
    inputs = model_inputs(spec, columns)
    read: dict[str, list[np.ndarray]] = {table.name: [] for table in spec.tables}
    for feature in spec.features:
        if feature.table is not None:
            read[feature.table].append(inputs[feature.name].ravel())
    unique = {name: np.unique(np.concatenate(rows)) for name, rows in read.items()}
    return {name: rows[rows >= 0] for name, rows in unique.items()}


def _unbacked_zeros(shape: tuple[int, int]) -> np.ndarray:
    """Float32 zeros that take memory where they are written, a small page at a time: NumPy would ask for huge
    ones."""
    num_values = math.prod(shape)
    pages = mmap.mmap(-1, max(1, 4 * num_values), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, np.float32, num_values).reshape(shape)
