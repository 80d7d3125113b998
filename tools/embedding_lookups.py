"""Pooled lookups that the embedding benchmark lets take turns: ours, those of others, and their like.

Each is a function of `LOOKUPS`: from a shape, the ids [S, T, B, P] int64 of S batches, P ids a bag, and a
number of threads to a call that looks one batch up in every table and pools by sum in float32. torch and
fbgemm are imported by those that measure them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import itertools
import mmap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from xlarank.host import Gatherer, HostTable, Segment, aligned_empty, encode_rows, huge_empty
from xlarank.host._extension import native
from xlarank.host.plan import native_table
from xlarank.host.prefetch import DISTANCES, fastest
from xlarank.host.traces import Hotness, trace
from xlarank.spec import Bucket, ModelSpec, Ragged, RankRequest, RowFormat

__all__ = [
    "LOOKUPS",
    "NUM_BAGS",
    "NUM_THREADS",
    "SHAPES",
    "Lookup",
    "Shape",
    "available",
    "draw_ids",
    "huge_tables",
    "ours",
]

NUM_THREADS = 2
NUM_BAGS = 512
"""Bags a table in a batch: the candidates of a request."""

_BLOCK_ROWS = 1 << 16

_CEILING_S = 1.0
"""To find the best distance of the prefetch."""

_PARTS = 4
"""Of a table's ids in a batch, for threads to share: none waits for one that got no core."""

Lookup = Callable[[int], Any]
"""From the number of a batch to its pooled vectors [B, T * D], or [B, D] a table."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Tables alike. Hashes by value."""

    name: str
    """As figures call it."""

    num_tables: int
    """T."""

    num_rows: int
    """R of each."""

    dim: int
    """D."""

    @property
    def row_bytes(self) -> int:
        """Of a float32 row."""
        return 4 * self.dim


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="8x2Mx64", num_tables=8, num_rows=2_000_000, dim=64),
        Shape(name="12x500Kx128", num_tables=12, num_rows=500_000, dim=128),
        Shape(name="8x250Kx64", num_tables=8, num_rows=250_000, dim=64),  # of the short form
    )
}


def draw_ids(shape: Shape, hotness: Hotness, num_ids: int) -> np.ndarray:
    """[T, num_ids] int64: an access trace of each table."""
    rng = np.random.default_rng(0)
    return np.stack([trace(shape.num_rows, num_ids, hotness, rng) for _ in range(shape.num_tables)])


def available(name: str) -> bool:
    """Whether what a lookup measures is installed."""
    needs = {"torch": "torch", "fbgemm": "fbgemm_gpu"}.get(name.partition("_")[0])
    return needs is None or importlib.util.find_spec(needs) is not None


def ours(shape: Shape, ids: np.ndarray, num_threads: int = NUM_THREADS) -> Lookup:
    """`Gatherer.bind` and `Gatherer.gather` on tables in huge pages, as they are served."""
    return _gather(shape, huge_tables(shape), ids, num_threads)


def ours_int8(shape: Shape, ids: np.ndarray, num_threads: int = NUM_THREADS) -> Lookup:
    """`ours` with int8 rows."""
    return _gather(shape, huge_tables(shape, RowFormat.INT8), ids, num_threads)


def ours_int4(shape: Shape, ids: np.ndarray, num_threads: int = NUM_THREADS) -> Lookup:
    """`ours` with int4 rows."""
    return _gather(shape, huge_tables(shape, RowFormat.INT4), ids, num_threads)


def ours_neither(shape: Shape, ids: np.ndarray, num_threads: int = NUM_THREADS) -> Lookup:
    """`ours` without prefetch, on tables in small pages."""
    return _gather(shape, _small_page_tables(shape), ids, num_threads, lines_ahead=0)


def ours_small_pages(shape: Shape, ids: np.ndarray, num_threads: int = NUM_THREADS) -> Lookup:
    """`ours` on tables in small pages."""
    return _gather(shape, _small_page_tables(shape), ids, num_threads)


def torch_bag(shape: Shape, ids: np.ndarray, num_threads: int = NUM_THREADS) -> Lookup:
    """`torch.nn.functional.embedding_bag`, a call a table, on tables in small pages, as torch allocates them.

    The vectors of the tables aren't joined, which ours are.
    """
    return _torch(_small_page_tables(shape), ids, num_threads)


def torch_huge_pages(shape: Shape, ids: np.ndarray, num_threads: int = NUM_THREADS) -> Lookup:
    """`torch_bag` on the very memory of `ours`."""
    return _torch(huge_tables(shape), ids, num_threads)


def fbgemm(shape: Shape, ids: np.ndarray, num_threads: int = NUM_THREADS) -> Lookup:
    """fbgemm's table-batched inference op in float32: all tables in one call, int32 ids, no bounds check."""
    return _fbgemm(_fbgemm_operator(shape, "FP32"), ids, num_threads)


def fbgemm_int8(shape: Shape, ids: np.ndarray, num_threads: int = NUM_THREADS) -> Lookup:
    """`fbgemm` with rows of 8 bits, scale and bias in float16 before each; it gives float32 too."""
    return _fbgemm(_fbgemm_operator(shape, "INT8"), ids, num_threads)


def ceiling(shape: Shape, ids: np.ndarray, num_threads: int = NUM_THREADS) -> Lookup:
    """Reads the rows of `ours` and pools nothing: threads share the ids, at the best prefetch distance."""
    return _read(huge_tables(shape), ids, num_threads)


def ceiling_int8(shape: Shape, ids: np.ndarray, num_threads: int = NUM_THREADS) -> Lookup:
    """`ceiling` of int8 rows."""
    return _read(huge_tables(shape, RowFormat.INT8), ids, num_threads)


LOOKUPS: dict[str, Callable[[Shape, np.ndarray, int], Lookup]] = {
    "ceiling": ceiling,
    "ceiling_int8": ceiling_int8,
    "fbgemm": fbgemm,
    "fbgemm_int8": fbgemm_int8,
    "ours": ours,
    "ours_int4": ours_int4,
    "ours_int8": ours_int8,
    "ours_neither": ours_neither,
    "ours_small_pages": ours_small_pages,
    "torch": torch_bag,
    "torch_huge_pages": torch_huge_pages,
}


@functools.cache
def _block(dim: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((_BLOCK_ROWS, dim), np.float32)


def _fill(table: np.ndarray, block: np.ndarray) -> np.ndarray:
    """One random block, repeated: the values cost no time, their addresses do."""
    for begin in range(0, len(table), _BLOCK_ROWS):
        table[begin : begin + _BLOCK_ROWS] = block[: len(table) - begin]
    return table


@functools.cache
def huge_tables(shape: Shape, row_format: RowFormat = RowFormat.FLOAT32) -> list[HostTable]:
    """The tables of `ours`, in huge pages."""
    return _tables(shape, row_format, huge_empty)


@functools.cache
def _small_page_tables(shape: Shape) -> list[HostTable]:
    return _tables(shape, RowFormat.FLOAT32, _small_pages)


def _tables(shape: Shape, row_format: RowFormat, empty: Callable[[int], np.ndarray]) -> list[HostTable]:
    block = encode_rows(_block(shape.dim), row_format).rows
    tables = []
    for _ in range(shape.num_tables):
        memory = empty(shape.num_rows * block.shape[1])
        rows = _fill(memory.reshape(shape.num_rows, -1), block)
        tables.append(HostTable(rows, row_format, shape.dim))
    return tables


def _small_pages(num_bytes: int) -> np.ndarray:
    """[num_bytes] uint8, as a library allocates it or maps it from a file; NumPy asks for huge pages."""
    pages = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, np.uint8)


def _spec(shape: Shape, row_format: RowFormat) -> ModelSpec:
    names = [f"f{i}" for i in range(shape.num_tables)]
    return ModelSpec.from_dict(
        {
            "name": "lookup",
            "features": [
                {"name": n, "kind": "id_list", "scope": "candidate", "table": n, "combiner": "sum"}
                for n in names
            ],
            "tables": [
                {"name": n, "dim": shape.dim, "rows": shape.num_rows, "dtype": row_format.value}
                for n in names
            ],
            "tasks": [{"name": "score"}],
        }
    )


def _gather(
    shape: Shape,
    tables: Sequence[HostTable],
    ids: np.ndarray,
    num_threads: int,
    *,
    lines_ahead: int | None = None,
) -> Lookup:
    spec = _spec(shape, tables[0].format)
    gatherer = Gatherer(
        spec,
        {f"f{index}": table for index, table in enumerate(tables)},
        num_threads=num_threads,
        backend="native",
        lines_ahead=lines_ahead,
    )
    bucket = Bucket(NUM_BAGS, 1)
    out = {leaf.name: aligned_empty(leaf.shape(bucket), leaf.dtype) for leaf in gatherer.signature.leaves}
    lengths = np.full(NUM_BAGS, ids.shape[3], np.int32)
    requests = [
        RankRequest(
            spec,
            {f"f{i}": Ragged(table.reshape(-1), lengths) for i, table in enumerate(batch)},
            check=gatherer.check,
        )
        for batch in ids
    ]

    def look_up(index: int) -> np.ndarray:
        gatherer.gather([Segment(gatherer.bind(requests[index]), 0, NUM_BAGS)], bucket, out)
        return out["candidate"]

    return look_up


def _read(tables: list[HostTable], ids: np.ndarray, num_threads: int) -> Lookup:
    assert native is not None
    read_rows = native.read_rows
    forms = {lines: [native_table(table, lines) for table in tables] for lines in DISTANCES}
    # For each batch the parts of all tables, (table, int32 rows).
    parts = [
        [(at, part.copy()) for at, of in enumerate(batch) for part in np.array_split(of, _PARTS)]
        for batch in ids.reshape(len(ids), len(tables), -1).astype(np.int32)
    ]
    helpers = ThreadPoolExecutor(max(1, num_threads - 1))

    def read(left: Iterator[tuple[int, np.ndarray]], lines: int) -> None:
        for at, rows in left:
            read_rows(forms[lines][at], rows)  # without the GIL

    def look_up(index: int, lines: int) -> None:
        left = iter(parts[index])  # each part goes to one of the threads
        waiting = [helpers.submit(read, left, lines) for _ in range(num_threads - 1)]
        read(left, lines)
        for helper in waiting:
            if not helper.cancel():
                helper.result()

    turns = itertools.cycle(range(len(ids)))
    best = fastest(lambda lines: look_up(next(turns), lines), DISTANCES, budget_s=_CEILING_S, min_gain=0.0)
    return lambda index: look_up(index, best)


def _torch(tables: list[HostTable], ids: np.ndarray, num_threads: int) -> Lookup:
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(num_threads)
    weights = [torch.from_numpy(table.rows.view(np.float32)) for table in tables]
    batches = torch.from_numpy(ids.reshape(*ids.shape[:2], -1))
    offsets = torch.arange(0, (NUM_BAGS + 1) * ids.shape[3], ids.shape[3])
    embedding_bag = torch.nn.functional.embedding_bag

    @torch.inference_mode()
    def look_up(index: int) -> list[Any]:
        return [
            embedding_bag(bags, weight, offsets, mode="sum", include_last_offset=True)
            for weight, bags in zip(weights, batches[index], strict=True)
        ]

    return look_up


def _fbgemm(operator: Any, ids: np.ndarray, num_threads: int) -> Lookup:
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(num_threads)
    batches = torch.from_numpy(ids.reshape(len(ids), -1).astype(np.int32))
    offsets = torch.arange(0, ids[0].size + 1, ids.shape[3], dtype=torch.int32)

    @torch.inference_mode()
    def look_up(index: int) -> Any:
        return operator(batches[index], offsets)

    return look_up


@functools.cache
def _fbgemm_operator(shape: Shape, precision: str) -> Any:
    importlib.import_module("fbgemm_gpu")  # loads the operators
    modules = "fbgemm_gpu.split_table_batched_embeddings_ops"
    precisions: Any = importlib.import_module("fbgemm_gpu.split_embedding_configs").SparseType
    common: Any = importlib.import_module(f"{modules}_common")
    inference: Any = importlib.import_module(f"{modules}_inference")
    rows = precisions[precision]
    operator = inference.IntNBitTableBatchedEmbeddingBagsCodegen(
        [
            (f"f{i}", shape.num_rows, shape.dim, rows, common.EmbeddingLocation.HOST)
            for i in range(shape.num_tables)
        ],
        device="cpu",
        bounds_check_mode=common.BoundsCheckMode.NONE,
        output_dtype=precisions.FP32,
    )
    operator.initialize_weights()
    block = _block(shape.dim)
    encoded = block.view(np.uint8) if rows is precisions.FP32 else _fbgemm_int8_rows(block)
    for weights, _ in operator.split_embedding_weights(split_scale_shifts=False):
        _fill(weights.numpy()[:, : encoded.shape[1]], encoded)
    return operator


def _fbgemm_int8_rows(values: np.ndarray) -> np.ndarray:
    """[n, 4 + D] uint8: float16 scale and bias, then the quantised values."""
    low = values.min(axis=1, keepdims=True).astype(np.float16)
    scale = ((values.max(axis=1, keepdims=True) - low) / 255).astype(np.float16)
    levels = np.clip(np.rint((values - low) / scale.astype(np.float32)), 0, 255).astype(np.uint8)
    return np.concatenate([scale.view(np.uint8), low.view(np.uint8), levels], axis=1)
