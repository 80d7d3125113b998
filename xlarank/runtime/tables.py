"""A bundle's tables in the memory that a server looks them up in: `load_tables`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np

from xlarank.bundle import Bundle, Manifest, ReadPace, TableFile
from xlarank.errors import BundleError, ConfigError
from xlarank.host import HostTable, HugePages, TableMemory, huge_empty
from xlarank.host.memory import AvailableMemory, available_memory, huge_pages_enabled, huge_pages_of
from xlarank.host.shared_rows import SharedRows
from xlarank.runtime.table_check import TableCheck

__all__ = ["HeldTables", "LoadedTables", "load_tables", "memory_beside"]

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

    memory: Mapping[str, TableMemory]
    """By name: where each is."""

    huge_pages: HugePages | None
    """What was had of them; None if all tables are mapped."""

    check: TableCheck
    """Of their content; finished for those that aren't mapped."""

    manifest: Manifest
    """Of the bundle that they are of."""

    shared_rows: Mapping[str, SharedRows] = dataclasses.field(default_factory=dict)
    """Of updatable tables that processes forked later update together, by name."""

    def are_of(self, bundle: Bundle) -> bool:
        """Whether they are a bundle's, and not of one that lay there before."""
        return bundle.manifest == self.manifest

    def check_bundle(self, bundle: Bundle) -> None:
        """Raises BundleError if they are another's: programs and weights of one bundle over tables of another
        would give scores of neither."""
        if not self.are_of(bundle):
            raise BundleError(
                f"{bundle.path}: holds another bundle than the one that its tables were loaded from: give "
                f"what is new a version of its own, or start the server anew"
            )

    def __str__(self) -> str:
        """Where they are, such as ``tables in huge: users, videos; in mmap: words``."""
        names = {memory: [n for n, m in self.memory.items() if m is memory] for memory in TableMemory}
        return "tables " + "; ".join(f"in {memory}: {', '.join(n)}" for memory, n in names.items() if n)


@dataclasses.dataclass
class HeldTables:
    """Tables that another process has loaded, for the versions that this one is to serve."""

    tables: Mapping[tuple[str, int], LoadedTables]
    """By model and version."""

    is_beside: bool = False
    """Whether other processes of the server serve other versions meanwhile."""

    loading: tuple[str, int] | None = None
    """The version that is being loaded, or was when it failed; None once all are. Written by the thread that
    loads."""

    def take(self, model: str, version: int) -> LoadedTables:
        """Those of a version that is loaded now."""
        self.loading = model, version
        return self.tables[model, version]


def load_tables(
    bundle: Bundle,
    memory: TableMemory | None,
    *,
    num_threads: int,
    platforms: Sequence[str] = (),
    num_processes: int = 1,
    pace: ReadPace = lambda read: read(),
    on_bytes: TableBytes | None = None,
    available: Callable[[], AvailableMemory] = available_memory,
    is_for_forks: bool = False,
) -> LoadedTables:
    """Reads tables into huge pages, every byte checked on its way, or maps them.

    Args:
      bundle: opened; its tables need not have been verified.
      memory: where to; None for huge pages if the kernel has them and the tables fit, else mapped. What is
        mapped from a file can't be written, so updatable tables are read into memory whatever it is.
      num_threads: threads that read and check.
      platforms: of each device that will hold the bundle's rows of tables, such as "cpu": their copies are
        counted too.
      num_processes: each with such devices, and copies, of its own.
      pace: what has a single thread read each piece.
      on_bytes: told of progress in the caller's thread.
      available: how much memory there is.
      is_for_forks: whether this process looks nothing up, and those that it forks do: rows of updatable
        tables are then in memory that all of them write to, those of others in memory that none may write to.

    Returns:
      The tables; of mapped ones a sample has been checked, and `LoadedTables.check` does the others once it
      is started.

    Raises:
      BundleError: if a file isn't what it was written as.
      ConfigError: if memory doesn't suffice for huge pages that were asked for, for updatable tables, or for
        the devices' rows; says how much there is.
    """
    files, room = bundle.table_files(), available()
    updatable = [table.name for table in bundle.spec.tables if table.updatable]
    read = list(files) if memory is not TableMemory.MMAP else updatable
    copies = _device_bytes(bundle, platforms, num_processes)
    refusal = _refusal(bundle, read, copies, room)
    if memory is None and len(read) > len(updatable):
        why = refusal or ("" if huge_pages_enabled() else f"{bundle.path}: the kernel gives no huge pages")
        if why:
            _log.warning("tables are mapped from their files%s: %s", _but(updatable), why)
            read = updatable
            refusal = _refusal(bundle, read, copies, room)
    if refusal:
        raise ConfigError(refusal)
    mapped = {name: file for name, file in files.items() if name not in read}
    check = TableCheck(mapped.values(), num_read_bytes=sum(files[name].num_bytes for name in read))
    check.sample()
    arrays = {name: file.map() for name, file in mapped.items()}
    pages = None
    if read:
        shared = updatable if is_for_forks else []
        own, pages = _read(
            {name: files[name] for name in read}, shared, num_threads, pace, on_bytes or (lambda _d, _t: None)
        )
        arrays |= own
        _log.info("tables of %s: %s", bundle.path, pages)
    places = {name: TableMemory.MMAP if name in mapped else TableMemory.HUGE for name in files}
    tables = _tables(bundle, arrays)
    shared_rows = {}
    if is_for_forks:
        shared_rows = {name: SharedRows(tables[name].rows) for name in updatable}
        for name in tables.keys() - shared_rows.keys():
            tables[name].rows.flags.writeable = False
    return LoadedTables(tables, places, pages, check, bundle.manifest, shared_rows)


def memory_beside(
    asked: TableMemory | None, others: Iterable[Mapping[str, TableMemory]]
) -> TableMemory | None:
    """Where a version's tables are to go, beside those of other versions of its model.

    A swap doesn't change silently where lookups go: beside tables in memory of their own the next ones are
    refused if they don't fit, and not mapped instead.

    Args:
      asked: where tables are to be; None for wherever they fit.
      others: by version, where each of its tables is; see `LoadedTables.memory`.
    """
    if asked is None and any(set(memory.values()) == {TableMemory.HUGE} for memory in others):
        return TableMemory.HUGE
    return asked


def _tables(bundle: Bundle, arrays: Mapping[str, np.ndarray]) -> dict[str, HostTable]:
    """Arrays in the form that they are stored in, as tables; nothing is copied."""
    return {
        table.name: HostTable(arrays[table.name].view(np.uint8), table.dtype, table.dim)
        for table in bundle.spec.tables
    }


@dataclasses.dataclass(frozen=True)
class _DeviceCopies:
    """What devices' rows take of the host's memory."""

    held: int
    """Bytes for good."""

    passing: int
    """Bytes for a moment beside that."""

    where: str
    """On what, in words."""


def _refusal(bundle: Bundle, read: Collection[str], copies: _DeviceCopies, available: AvailableMemory) -> str:
    """Why memory doesn't suffice; empty if it does.

    Args:
      bundle: whose tables.
      read: names of those that are read into memory.
      copies: of the devices.
      available: memory.
    """
    num_bytes = sum(file.num_bytes for name, file in bundle.table_files().items() if name in read)
    if _HEADROOM * num_bytes + copies.held + copies.passing <= available.bytes:
        return ""
    needs = [f"tables of {_gib(num_bytes)} need {_gib(_HEADROOM * num_bytes)} of memory"] if num_bytes else []
    if copies.held:
        needs.append(f"their rows on {copies.where} {_gib(copies.held)}")
    if copies.passing:
        needs.append(f"placing or updating rows on devices {_gib(copies.passing)} for as long")
    remedies = []
    updatable = [table.name for table in bundle.spec.tables if table.updatable]
    if set(read) - set(updatable):
        remedies.append(
            f"with table memory mmap (--table-memory mmap) they stay in their files{_but(updatable)}"
        )
    if copies.held + copies.passing:
        remedies.append("a bundle with fewer rows on devices (--device-table-bytes of compile) needs less")
    if not remedies:
        remedies.append("updatable tables can't stay in their files")
    return (
        f"{bundle.path}: {', '.join(needs)}, available are {_gib(available.bytes)} ({available}); "
        f"{'; '.join(remedies)}"
    )


def _device_bytes(bundle: Bundle, platforms: Sequence[str], num_processes: int) -> _DeviceCopies:
    """What devices' rows take.

    CPU devices of a process share one copy of a table (see `xlarank.device.place_tables`) until an update
    gives each its own; of what goes to an accelerator one table at a time is copied. An update of rows holds
    up to two more arrays of the table while it is under way (`xlarank.device.TableWriter`).
    """
    num_cpus, held, passing = platforms.count("cpu"), 0, 0
    for placement in bundle.manifest.placements:
        table, own = bundle.spec.table_by_name[placement.table], placement.num_bytes(bundle.spec)
        if num_cpus:
            held += own * (num_cpus if table.updatable else 1)
            passing = max(passing, 2 * own if table.updatable else 0)
        if num_cpus < len(platforms):
            passing = max(passing, own)
    where = f"{num_cpus} CPU devices" if num_processes == 1 else f"CPU devices of {num_processes} processes"
    return _DeviceCopies(num_processes * held, num_processes * passing, where)


def _but(updatable: Sequence[str]) -> str:
    return f", but {list(updatable)}, which are updatable" if updatable else ""


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _read(
    files: Mapping[str, TableFile],
    shared: Collection[str],
    num_threads: int,
    pace: ReadPace,
    on_bytes: TableBytes,
) -> tuple[dict[str, np.ndarray], HugePages]:
    """Tables by name, and what was had of huge pages; those named as shared in memory of that kind."""
    arrays: dict[str, np.ndarray] = {}
    num_done, num_bytes = 0, sum(file.num_bytes for file in files.values())

    def advance(num_read: int) -> None:
        nonlocal num_done
        num_done += num_read
        on_bytes(num_done, num_bytes)

    asked = got = 0
    for is_shared in (False, True):
        own = {name: file for name, file in files.items() if (name in shared) is is_shared}
        if not own:
            continue
        # All in one piece of memory: hundreds of small ones would each round up to a huge page.
        begins = _places(own)
        memory = huge_empty(begins.pop(""), is_shared=is_shared)
        for name, file in own.items():
            rows = memory[begins[name] : begins[name] + file.num_bytes]
            file.read_into(rows, num_threads=num_threads, pace=pace, on_bytes=advance)
            arrays[name] = rows.view(file.dtype).reshape(file.shape)
        pages = huge_pages_of(memory)
        asked, got = asked + pages.asked, got + pages.got
    return arrays, HugePages(asked, got)


def _places(files: Mapping[str, TableFile]) -> dict[str, int]:
    """Where each table begins, by name, and under "" the end of all."""
    begins: dict[str, int] = {}
    end = 0
    for name, file in files.items():
        begins[name] = end
        end += file.num_bytes + -file.num_bytes % _ALIGNMENT
    return begins | {"": end}
