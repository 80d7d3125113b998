"""What a server makes of its config file while it runs."""

import functools
import re

import pytest

from xlarank.cli import main
from xlarank.cli.sections import read_sections
from xlarank.cli.serve_config import ServeConfig
from xlarank.cli.serve_file import ConfigFile
from xlarank.errors import ConfigError
from xlarank.spec.versions import ModelPolicy

PINNED = '[[versions.models]]\nname = "feed"\npolicy = "specific"\nversions = [1]\n'


@pytest.fixture
def file(tmp_path):
    """A function: the file with a text, and a flag beside it."""
    path = tmp_path / "server.toml"

    def file(text):
        path.write_text(text)
        args = main.parse(["xlarank", "serve", "--config", str(path), "--max-queue-ms", "5"])
        return ConfigFile(path, functools.partial(read_sections, ServeConfig, args, path))

    return file


def changed(file, text):
    """What the file tells once it has this text."""
    assert file.changed_policies() is None
    file._path.write_text(text)
    assert file.changed_policies() is None  # it may be half of what is being written
    told = file.changed_policies()
    assert file.changed_policies() is None
    return told


def test_policies_of_a_file_that_has_changed_are_told_once(file, caplog):
    file = file("")
    policies = changed(file, PINNED)
    assert [(policy.name, policy.versions) for policy in policies] == [("feed", (1,))]
    assert changed(file, "# the same\n" + PINNED) is None
    both = changed(file, PINNED + "[[versions.models]]\nnum_versions = 2\n")
    assert both == (policies[0], ModelPolicy(num_versions=2))
    assert changed(file, "[versions]") == ()
    where = f"{file._path}: policies are followed that have changed, of models: "
    assert caplog.messages == [where + names for names in ("feed", "all others", "all others, feed")]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[versions", r"expected a TOML file: Expected ']' at the end of a table.*"),
        ("[versions]\nmodel = 1\n[nothing]", r"sections: .*\['nothing'\].*; \[versions\]: .*\['model'\].*"),
        (
            '[[versions.models]]\npolicy = "specific"',
            r"models: policy specific lists versions and no .*",
        ),
        ("[processes]\nnum_processes = 2\n[connections]\nmax_age_seconds = 0", r"connections: max_age.*"),
    ],
)
def test_a_file_that_is_wrong_changes_nothing_and_is_told_once_a_change(file, caplog, text, problem):
    file = file(PINNED)
    assert changed(file, text) is None
    (line,) = caplog.messages
    where = re.escape(f"{file._path}: the last good policies stay in use: ")
    assert re.fullmatch(where + problem, line)
    assert changed(file, "[versions]") == ()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "says nothing"),
        (" \n# models\n", "says nothing"),
        (f"[queue]\nmax_queue_ms = 1{400 * '0'}", "[queue] max_queue_ms must be a finite number; was 1000"),
    ],
)
def test_no_file_whatever_is_in_it_ends_a_server_or_its_policies(file, caplog, text, problem):
    file = file(PINNED)
    assert changed(file, text) is None
    (line,) = caplog.messages
    assert line.startswith(f"{file._path}: the last good policies stay in use: {problem}")


def test_a_file_that_vanishes_changes_nothing(file, caplog):
    file = file(PINNED)
    file._path.unlink()
    assert [file.changed_policies() for _ in range(4)] == [None] * 4
    assert caplog.messages == [f"{file._path}: the last good policies stay in use: no such config file"]
    assert changed(file, PINNED) is None


def test_options_that_wait_for_the_next_start_are_named_once(file, caplog):
    file = file("")
    text = "[queue]\nmax_queued_rows = 5\nmax_queue_ms = 7\n[versions]\nwarm_share = 0.5\n"
    assert changed(file, text) is None
    # The flag goes before the file's max_queue_ms.
    assert caplog.messages == [
        f"{file._path}: [versions] warm_share, [queue] max_queued_rows: take effect at the next start"
    ]
    assert len(changed(file, text + PINNED)) == 1
    assert len(caplog.messages) == 2
    assert changed(file, PINNED) is None
    assert len(caplog.messages) == 2


def test_a_server_does_not_start_with_a_file_that_is_wrong(file):
    with pytest.raises(ConfigError, match=r"server\.toml: sections: unknown"):
        file("[nothing]")
