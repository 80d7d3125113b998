"""Only files are read; of what else has a file's name nothing is waited for."""

import os
import socket

import pytest

from xlarank.spec.files import open_file, read_file


def test_a_file_is_read_whole_and_waits_as_files_do(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    (tmp_path / "link").symlink_to("a")
    assert read_file(tmp_path / "a") == read_file(tmp_path / "link") == b"0123456789"
    with open_file(tmp_path / "a") as file:
        assert os.get_blocking(file.fileno())


def test_what_is_no_file_is_named_and_closed(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    num_open = len(os.listdir("/proc/self/fd"))
    for path, found in (
        (tmp_path / "pipe", "a pipe"),
        (tmp_path / "folder", "a folder"),
        ("/dev/zero", "a device"),
    ):
        with pytest.raises(OSError, match=f"expected a file, found {found}: '{path}'"):
            open_file(path)
    assert len(os.listdir("/proc/self/fd")) == num_open
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        with pytest.raises(OSError, match="No such device or address"):
            open_file(tmp_path / "socket")
