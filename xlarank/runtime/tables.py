"""A bundle's tables in the memory that a server looks them up in: `load_tables`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping

import numpy as np

from xlarank.bundle import Bundle, TableFile
from xlarank.errors import ConfigError
from xlarank.host import HostTable, HugePages, TableMemory, huge_empty
from xlarank.host.memory import AvailableMemory, available_memory, huge_pages_enabled, huge_pages_of
from xlarank.runtime.table_check import TableCheck

__all__ = ["LoadedTables", "load_tables"]

_log = logging.getLogger(__name__)

_HEADROOM = 1.1
"""What is asked to be available, over the tables' bytes: the server needs a little beside them."""

_ALIGNMENT = 64

TableBytes = Callable[[int, int], None]
"""Told the bytes of tables that are read and right, of how many."""


@dataclasses.dataclass(frozen=True)
class LoadedTables:
    """Tables ready to be looked up in."""

    tables: Mapping[str, HostTable]
    """By name; their rows are writable if in memory of their own, read-only if mapped."""

    memory: TableMemory
    """Where they are."""

    huge_pages: HugePages | None
    """What was had of them; None for mapped tables."""

    check: TableCheck
    """Of their content; finished, unless they are mapped."""


def load_tables(
    bundle: Bundle,
    memory: TableMemory | None,
    *,
    num_threads: int,
    on_bytes: TableBytes | None = None,
    available: Callable[[], AvailableMemory] = available_memory,
) -> LoadedTables:
    """Reads tables into huge pages, every byte checked on its way, or maps them.

    Args:
      bundle: opened; its tables need not have been verified.
      memory: where to; None for huge pages if the kernel has them and the tables fit, else mapped.
      num_threads: threads that read and check.
      on_bytes: told of progress in the caller's thread.
      available: how much memory there is.

    Returns:
      The tables; of mapped ones a sample has been checked, and `LoadedTables.check` does the others once it
      is started.

    Raises:
      BundleError: if a file isn't what it was written as.
      ConfigError: if huge pages were asked for and memory doesn't suffice; says how much there is.
    """
    files = bundle.table_files()
    num_bytes = sum(file.num_bytes for file in files.values())
    refusal = _refusal(bundle, num_bytes, available())
    updatable = [table.name for table in bundle.spec.tables if table.updatable]
    if updatable and memory is TableMemory.MMAP:
        raise ConfigError(
            f"{bundle.path}: tables {updatable} are updatable, and what is mapped from a file can't be "
            f"written: expected table memory huge, got mmap"
        )
    if updatable:
        memory = TableMemory.HUGE
    if memory is TableMemory.HUGE and refusal:
        raise ConfigError(refusal)
    if memory is None and files:
        if not huge_pages_enabled():
            refusal = f"{bundle.path}: the kernel gives no huge pages"
        if refusal:
            _log.warning("tables are mapped from their files: %s", refusal)
    if memory is TableMemory.MMAP or refusal:
        check = TableCheck(files.values())
        check.sample()
        return LoadedTables(_tables(bundle, bundle.tables()), TableMemory.MMAP, None, check)
    arrays, pages = _read(files, num_threads, on_bytes or (lambda _done, _total: None))
    _log.info("tables of %s: %s", bundle.path, pages)
    check = TableCheck(files.values(), is_done=True)
    return LoadedTables(_tables(bundle, arrays), TableMemory.HUGE, pages, check)


def _tables(bundle: Bundle, arrays: Mapping[str, np.ndarray]) -> dict[str, HostTable]:
    """Arrays in the form that they are stored in, as tables; nothing is copied."""
    return {
        table.name: HostTable(arrays[table.name].view(np.uint8), table.dtype, table.dim)
        for table in bundle.spec.tables
    }


def _refusal(bundle: Bundle, num_bytes: int, available: AvailableMemory) -> str:
    """Why the tables can't be read into memory; empty if they can."""
    if _HEADROOM * num_bytes <= available.bytes:
        return ""
    return (
        f"{bundle.path}: tables of {num_bytes / 2**30:.2f} GiB need {_HEADROOM * num_bytes / 2**30:.2f} GiB "
        f"of memory, available are {available.bytes / 2**30:.2f} GiB ({available}); with table memory mmap "
        f"(--table-memory mmap) they stay in their files"
    )


def _read(
    files: Mapping[str, TableFile], num_threads: int, on_bytes: TableBytes
) -> tuple[dict[str, np.ndarray], HugePages]:
    """All tables in one piece of memory: hundreds of small ones would each round up to a huge page."""
    begins: dict[str, int] = {}
    end = 0
    for name, file in files.items():
        begins[name] = end
        end += file.num_bytes + -file.num_bytes % _ALIGNMENT
    memory = huge_empty(end)
    arrays: dict[str, np.ndarray] = {}
    num_done, num_bytes = 0, sum(file.num_bytes for file in files.values())

    def advance(num_read: int) -> None:
        nonlocal num_done
        num_done += num_read
        on_bytes(num_done, num_bytes)

    for name, file in files.items():
        own = memory[begins[name] : begins[name] + file.num_bytes]
        file.read_into(own, num_threads=num_threads, on_bytes=advance)
        arrays[name] = own.view(file.dtype).reshape(file.shape)
    return arrays, huge_pages_of(memory)
