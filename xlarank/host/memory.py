"""Memory for tables: anonymous huge pages, spread over NUMA nodes; how much was had, how much there is."""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import fcntl
import logging
import mmap
import os
import platform
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from xlarank.errors import ConfigError

__all__ = [
    "AvailableMemory",
    "HugePages",
    "TableMemory",
    "available_memory",
    "huge_empty",
    "huge_pages_enabled",
    "huge_pages_of",
]

_LOGGER = logging.getLogger(__name__)

_HUGE_PAGE = 2 << 20
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_SMAPS = Path("/proc/self/smaps")
_NODES = Path("/sys/devices/system/node/has_memory")

_MBIND = {"x86_64": 237, "aarch64": 235}  # by machine: number of the system call
_MPOL_INTERLEAVE = 3

_PAGEMAP = Path("/proc/self/pagemap")
_PAGEMAP_SCAN = 0xC0606610
_SCAN_FORM = struct.Struct("12Q")
_PAGE_IS_HUGE = 1 << 6
_NUM_REGIONS = 512


class TableMemory(enum.StrEnum):
    """Where a server keeps its tables."""

    HUGE = "huge"
    """Read into memory of its own, in huge pages as far as the kernel has them."""

    MMAP = "mmap"
    """Mapped from the files: shared between processes, may be larger than memory."""

    @classmethod
    def named(cls, name: str) -> TableMemory:
        """Raises ConfigError for a name that is none of them."""
        try:
            return cls(name)
        except ValueError:
            raise ConfigError(
                f"table memory: expected one of {[m.value for m in cls]}, got {name!r}"
            ) from None


@dataclasses.dataclass(frozen=True)
class HugePages:
    """What became of a request for huge pages."""

    asked: int
    """Bytes."""

    got: int
    """Bytes of them that lie in huge pages; memory that was never written counts as not had."""

    def __str__(self) -> str:
        return f"{self.got / 2**20:.0f} of {self.asked / 2**20:.0f} MiB in huge pages"


def huge_empty(num_bytes: int, *, is_shared: bool = False) -> np.ndarray:
    """Memory for which huge pages were asked: zeros, freed with the last array that looks into it.

    Where the machine has several NUMA nodes with memory, the pages take turns between them: threads of
    every node read every table.

    Args:
      num_bytes: >= 0.
      is_shared: whether processes forked later write into it together, and not each into a copy. The kernel
        seldom has huge pages for such memory.

    Returns:
      [num_bytes] uint8, writable; its first byte lies at a multiple of 2 MiB. Nothing is resident until it is
      written.

    Raises:
      ConfigError: for a negative size, or if the system refuses the memory.
    """
    if num_bytes < 0:
        raise ConfigError(f"huge_empty: num_bytes must be >= 0; was {num_bytes}")
    try:
        kind = mmap.MAP_SHARED if is_shared else mmap.MAP_PRIVATE
        pages = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=kind | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise ConfigError(f"huge_empty: the system has no {num_bytes} bytes to give: {error}") from error
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux
    if advice is not None and huge_pages_enabled():
        pages.madvise(advice)
    memory = np.frombuffer(pages, np.uint8)
    begin = -memory.ctypes.data % _HUGE_PAGE
    memory = memory[begin : begin + num_bytes]
    nodes = _numbers(_read(_NODES))
    if len(nodes) > 1 and num_bytes:
        interleave(memory, nodes)
    return memory


def huge_pages_enabled() -> bool:
    """Whether the kernel gives huge pages to memory that asks for them."""
    return any(f"[{mode}]" in _read(_ENABLED) for mode in ("always", "madvise"))


def huge_pages_of(memory: np.ndarray) -> HugePages:
    """How much of an array lies in huge pages now, as the kernel counts it.

    Args:
      memory: of `huge_empty`, written.
    """
    begin, end = memory.ctypes.data, memory.ctypes.data + memory.nbytes
    try:
        found = list(_huge_regions(begin, end))
    except OSError:  # Linux before 6.7
        found = list(_mappings(_read(_SMAPS)))
    got = sum(
        min(huge, min(last, end) - max(first, begin))
        for first, last, huge in found
        if first < end and begin < last
    )
    return HugePages(memory.nbytes, got)


def interleave(memory: np.ndarray, nodes: tuple[int, ...]) -> bool:
    """Asks that pages of an array not yet written take turns between NUMA nodes.

    Args:
      memory: begins at a page.
      nodes: their numbers.

    Returns:
      Whether the system agreed; a refusal (containers may forbid it) costs speed alone and is logged.
    """
    number = _MBIND.get(platform.machine())
    if number is None:
        return False
    words = [0] * (max(nodes) // 64 + 1)
    for node in nodes:
        words[node // 64] |= 1 << (node % 64)
    mask = (ctypes.c_uint64 * len(words))(*words)
    library = ctypes.CDLL(None, use_errno=True)
    # The kernel reads one bit less than it is told to.
    arguments = (
        memory.ctypes.data,
        memory.nbytes,
        _MPOL_INTERLEAVE,
        ctypes.addressof(mask),
        64 * len(words) + 1,
        0,
    )
    if library.syscall(ctypes.c_long(number), *map(ctypes.c_ulong, arguments)) != 0:
        reason = os.strerror(ctypes.get_errno())
        _LOGGER.warning("tables are not spread over NUMA nodes %s: %s", list(nodes), reason)
        return False
    return True


@dataclasses.dataclass(frozen=True)
class AvailableMemory:
    """Memory that can still be taken without swapping or being killed, in bytes."""

    machine: int | None
    """MemAvailable; None where the system doesn't say."""

    cgroup: int | None
    """What the tightest limit of the process's control groups leaves; None without a limit."""

    @property
    def bytes(self) -> float:
        """The smaller of both; infinite where neither is known."""
        return min(
            (known for known in (self.machine, self.cgroup) if known is not None), default=float("inf")
        )

    def __str__(self) -> str:
        machine = "unknown" if self.machine is None else _gib(self.machine)
        cgroup = "no limit" if self.cgroup is None else _gib(self.cgroup)
        return f"MemAvailable {machine}, control group {cgroup}"


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> AvailableMemory:
    """Reads what the machine and the process's control groups (version 1 or 2) leave.

    Args:
      proc: where proc is mounted.
      cgroups: where the control groups are.
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read(proc / "meminfo"), re.MULTILINE)
    left = []
    for line in _read(proc / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
            left += _cgroup_left(cgroups, path, *names)
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            left += _cgroup_left(cgroups / "memory", path, *names)
    machine = None if found is None else 1024 * int(found[1])
    # No limit reads as "max" in version 2 and as almost 2**63 in version 1.
    return AvailableMemory(machine, min((n for n in left if n < 2**60), default=None))


def _cgroup_left(root: Path, path: str, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    """What is left of each limit from a group up to the root; in a container the group itself may be the
    root."""
    folder = root / path.lstrip("/")
    for group in (folder, *folder.parents):
        limit_text, used = _read(group / limit).strip(), _read(group / usage).strip()
        if limit_text.isdigit() and used.isdigit():
            # Pages of files count as used, and make room when asked to.
            found = re.search(rf"^{reclaimable} (\d+)$", _read(group / "memory.stat"), re.MULTILINE)
            yield max(0, int(limit_text) - int(used) + (0 if found is None else int(found[1])))
        if group == root:
            return


def _huge_regions(begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Begin, end and bytes in huge pages of each run of huge pages between two addresses.

    Looks at these addresses alone: the process's mappings are thousands, and to list them takes tens of
    milliseconds from requests. The kernel's Documentation/admin-guide/mm/pagemap.rst describes the call.
    """
    regions = (ctypes.c_uint64 * (3 * _NUM_REGIONS))()
    end += -end % mmap.PAGESIZE
    with _PAGEMAP.open("rb", buffering=0) as pagemap:
        while begin < end:
            # size, flags, begin, end, where it ended, regions, how many, pages at most, then of categories:
            # inverted, all of these, any of these, told.
            words = [96, 0, begin, end, 0, ctypes.addressof(regions), _NUM_REGIONS, 0]
            asked = bytearray(_SCAN_FORM.pack(*words, 0, _PAGE_IS_HUGE, 0, _PAGE_IS_HUGE))
            num_found = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, asked, True)
            for first, last, _ in zip(*[iter(regions[: 3 * num_found])] * 3, strict=True):
                yield first, last, last - first
            begin = _SCAN_FORM.unpack(asked)[4]


def _mappings(smaps: str) -> Iterator[tuple[int, int, int]]:
    """Begin, end and bytes in huge pages of each mapping."""
    first = last = 0
    # Thousands of mappings of twenty lines each, and threads that serve wait for this one: most lines are
    # told by their first letter. Those that begin a mapping begin with a lower case digit.
    for line in smaps.splitlines():
        if not "A" <= line[:1] <= "Z":
            begin, _, rest = line.partition("-")
            first, last = int(begin, 16), int(rest.partition(" ")[0], 16)
        elif line.startswith("AnonHugePages:"):
            yield first, last, 1024 * int(line.split()[1])


def _numbers(text: str) -> tuple[int, ...]:
    """Of a list like ``0-1,3``."""
    numbers: list[int] = []
    for part in filter(None, text.strip().split(",")):
        low, _, high = part.partition("-")
        numbers += range(int(low), int(high or low) + 1)
    return tuple(numbers)


def _read(path: Path) -> str:
    """The text of one of the system's files; nothing where there is no such file."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
