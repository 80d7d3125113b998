"""Memory for tables, on this machine's kernel, and what a machine of other kinds would say."""

import gc
import re
from pathlib import Path

import numpy as np
import pytest

from xlarank.errors import ConfigError
from xlarank.host import HugePages, TableMemory, huge_empty
from xlarank.host import memory as memory_module
from xlarank.host.memory import (
    AvailableMemory,
    available_memory,
    huge_pages_enabled,
    huge_pages_of,
    interleave,
)

MIB = 2**20


def resident_bytes():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


def flags_of(memory):
    """What the kernel was asked of the mapping of an array."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= memory.ctypes.data < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()
    return []


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, 2 * MIB, 5 * MIB + 7])
def test_huge_memory_is_an_ordinary_array_of_zeros_at_a_multiple_of_2_mib(num_bytes):
    memory = huge_empty(num_bytes)
    assert (memory.shape, memory.dtype) == ((num_bytes,), np.uint8)
    assert memory.flags.writeable
    assert memory.flags.c_contiguous
    assert not num_bytes or memory.ctypes.data % (2 * MIB) == 0
    assert not memory.any()
    memory[:] = 255
    assert (memory == 255).all()


def test_huge_memory_is_resident_when_written_and_gone_with_its_last_view():
    gc.collect()
    before = resident_bytes()
    memory = huge_empty(64 * MIB)
    assert resident_bytes() - before < 8 * MIB
    memory[:] = 1
    rows = memory.view(np.float32).reshape(-1, 16)
    del memory
    assert resident_bytes() - before > 60 * MIB
    assert rows[-1].tobytes() == b"\1" * 64
    del rows
    gc.collect()
    assert resident_bytes() - before < 8 * MIB


def test_the_report_is_of_what_the_kernel_gave():
    memory = huge_empty(16 * MIB)
    assert huge_pages_of(memory) == HugePages(16 * MIB, 0)
    memory[: 8 * MIB] = 1
    assert 0 <= huge_pages_of(memory).got <= 8 * MIB  # none where memory is in pieces
    assert huge_pages_enabled() == ("hg" in flags_of(memory))
    assert str(HugePages(16 * MIB, 6 * MIB)) == "6 of 16 MiB in huge pages"


def test_a_look_at_the_pages_finds_what_the_list_of_all_mappings_tells(monkeypatch):
    """The former needs Linux 6.7; before it both are the latter."""
    monkeypatch.setattr(memory_module, "_NUM_REGIONS", 2)
    memory = huge_empty(40 * MIB)
    # Runs of one page and of two, each apart from the next: more than one call returns.
    for page in (0, 3, 4, 7, 9, 11, 12, 18):
        memory[2 * MIB * page : 2 * MIB * (page + 1)] = 1
    seen = [huge_pages_of(part) for part in (memory, memory[: 7 * MIB], memory[9 * MIB :], memory[:0])]
    monkeypatch.setattr(memory_module, "_PAGEMAP", Path("nowhere"))
    assert seen[0] == huge_pages_of(memory)
    assert seen[3] == HugePages(0, 0)
    if seen[0].got == 16 * MIB:
        assert seen[1] == HugePages(7 * MIB, 3 * MIB)
        assert seen[2] == HugePages(31 * MIB, 11 * MIB)


SMAPS = """\
7f0000000000-7f0000a00000 rw-p 00000000 00:00 0
Rss:               10240 kB
AnonHugePages:      {huge} kB
7f0000a00000-7f0000b00000 r--p 00000000 fe:00 260386                     /usr/lib/x.so
AnonHugePages:         0 kB
"""


def test_a_mapping_that_neighbours_share_counts_no_more_than_the_array_s_own_bytes(tmp_path, monkeypatch):
    memory = huge_empty(4 * MIB)
    begin = memory.ctypes.data
    text = SMAPS.replace("7f0000000000-7f0000a00000", f"{begin - 2 * MIB:x}-{begin + 8 * MIB:x}")
    smaps = tmp_path / "smaps"
    monkeypatch.setattr(memory_module, "_PAGEMAP", tmp_path / "none")
    monkeypatch.setattr(memory_module, "_SMAPS", smaps)
    smaps.write_text(text.format(huge=10240))
    assert huge_pages_of(memory) == HugePages(4 * MIB, 4 * MIB)
    smaps.write_text(text.format(huge=2048))
    assert huge_pages_of(memory) == HugePages(4 * MIB, 2 * MIB)
    smaps.unlink()
    assert huge_pages_of(memory) == HugePages(4 * MIB, 0)


@pytest.mark.parametrize(
    ("text", "enabled"),
    [
        ("[always] madvise never\n", True),
        ("always [madvise] never\n", True),
        ("always madvise [never]\n", False),
    ],
)
def test_the_kernel_s_mode_decides_whether_huge_pages_are_enabled(tmp_path, monkeypatch, text, enabled):
    monkeypatch.setattr(memory_module, "_ENABLED", tmp_path / "enabled")
    assert not huge_pages_enabled()  # no such file: a kernel without them
    (tmp_path / "enabled").write_text(text)
    assert huge_pages_enabled() is enabled


def test_pages_take_turns_between_nodes_if_the_system_agrees():
    memory = huge_empty(4 * MIB)
    agreed = interleave(memory, (0,))
    memory[:] = 1
    maps = Path("/proc/self/numa_maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    policies = {int(line.split()[0], 16): line.split()[1] for line in lines}
    assert agreed == (policies.get(memory.ctypes.data) == "interleave:0")


def test_a_node_that_is_not_there_is_refused_by_the_system_and_logged(caplog):
    assert not interleave(huge_empty(2 * MIB), (1000,))
    assert re.search(r"tables are not spread over NUMA nodes \[1000\]: \w+", caplog.text)


@pytest.mark.parametrize("nodes", ["0-1\n", "0,2-3\n"])
def test_memory_is_spread_where_several_nodes_have_some(tmp_path, monkeypatch, nodes):
    (tmp_path / "has_memory").write_text(nodes)
    spread = []
    monkeypatch.setattr(memory_module, "_NODES", tmp_path / "has_memory")
    monkeypatch.setattr(memory_module, "interleave", lambda memory, nodes: spread.append(nodes))
    huge_empty(1)
    assert spread == [(0, 1) if "-1" in nodes else (0, 2, 3)]
    (tmp_path / "has_memory").write_text("0\n")
    huge_empty(1)
    assert len(spread) == 1


def test_sizes_that_can_not_be_had_are_refused():
    with pytest.raises(ConfigError, match="huge_empty: num_bytes must be >= 0; was -1"):
        huge_empty(-1)
    with pytest.raises(
        ConfigError, match="huge_empty: the system has no 1152921504606846976 bytes to give: "
    ):
        huge_empty(2**60)
    with pytest.raises(ConfigError, match="the system has no"):
        huge_empty(2**70)


def test_the_machine_says_how_much_is_available():
    available = available_memory()
    assert available.machine is not None
    assert 0 < available.bytes <= available.machine
    assert "MemAvailable" in str(available)


@pytest.fixture
def system(tmp_path):
    """A machine of 8 GiB available whose process is in group /a/b."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\n")

    def write(folder, **files):
        path = tmp_path / "cgroup" / folder
        path.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (path / name.replace("__", ".")).write_text(f"{text}\n")

    def available(group):
        (tmp_path / "proc/self/cgroup").write_text(f"{group}\n")
        return available_memory(tmp_path / "proc", tmp_path / "cgroup")

    return write, available


def test_the_tightest_limit_of_the_groups_counts_and_files_pages_make_room(system):
    write, available = system
    stat = f"anon 5\ninactive_file {MIB}\n"
    write("a/b", memory__max="max", memory__current=500)
    assert available("0::/a/b") == AvailableMemory(8 << 30, None)
    write("a", memory__max=100 * MIB, memory__current=31 * MIB, memory__stat=stat)
    assert available("0::/a/b") == AvailableMemory(8 << 30, 70 * MIB)
    write("a/b", memory__max=20 * MIB, memory__current=21 * MIB)
    assert available("0::/a/b").bytes == 0
    assert str(available("0::/a/b")) == "MemAvailable 8.00 GiB, control group 0.00 GiB"


def test_in_a_container_the_group_is_the_root_whatever_it_is_called_outside(system):
    write, available = system
    write("", memory__max=100 * MIB, memory__current=40 * MIB)
    assert available("0::/").cgroup == 60 * MIB
    assert available("0::/docker/0123").cgroup == 60 * MIB


def test_version_1_of_control_groups_is_read_too(system):
    write, available = system
    write("memory/a", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=1)
    assert available("4:memory:/a\n1:cpu:/\n0::/").cgroup is None
    stat = f"total_inactive_file {2 * MIB}"
    write("memory/a", memory__limit_in_bytes=10 * MIB, memory__usage_in_bytes=3 * MIB, memory__stat=stat)
    assert available("4:memory:/a\n1:cpu:/\n0::/").cgroup == 9 * MIB


def test_a_system_that_says_nothing_has_no_limit(tmp_path):
    available = available_memory(tmp_path, tmp_path)
    assert available.bytes == float("inf")
    assert str(available) == "MemAvailable unknown, control group no limit"


def test_table_memory_is_named_or_refused():
    assert TableMemory.named("huge") is TableMemory.HUGE
    assert TableMemory.named(TableMemory.MMAP) is TableMemory.MMAP
    with pytest.raises(ConfigError, match=r"table memory: expected one of \['huge', 'mmap'\], got 'ram'"):
        TableMemory.named("ram")
