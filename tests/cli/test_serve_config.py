"""The server's config file, and `xlarank serve --check`."""

import contextlib
import dataclasses
import inspect
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import typing
from pathlib import Path

import numpy as np
import pytest
from bundles import publish

from xlarank.cli import main, serve_config, serve_start
from xlarank.cli.sections import config_text, options_of, read_sections
from xlarank.cli.serve_check import UNCHECKED
from xlarank.cli.serve_config import ServeConfig, port_problems
from xlarank.errors import ConfigError
from xlarank.runtime import ModelPolicy, ModelRepository, VersionOptions
from xlarank.spec import PlatformOptions

EXAMPLE = Path(__file__).parents[2] / "configs" / "server.toml"

# Every option that the command line had before there was a file.
KNOWN_FLAGS = (
    "--host --port --http-port --admin-port --port-file --devices --host-threads --compile-cache "
    "--no-bundle-code --table-memory --allow-reference-gather --features --feature-misses --feature-memory "
    "--threads --grace"
)


def parse(*words):
    return main.parse(["xlarank", "serve", *words])


@pytest.fixture
def check(capsys):
    """Runs `serve --check`; gives its status and the problems told."""

    def check(*words):
        try:
            status = main.main(parse(*words, "--check"))
        except SystemExit as ended:
            status = ended.code
        out, err = capsys.readouterr()
        assert all(line.startswith("xlarank serve: ") for line in err.splitlines())
        return status, out, [line.removeprefix("xlarank serve: ") for line in err.splitlines()]

    return check


@pytest.fixture
def repository(tmp_path):
    publish(tmp_path / "models", {"items": np.zeros((4, 2), np.float32)})
    return tmp_path / "models"


OK = f"ok; not checked: {UNCHECKED}\n"
FREE = ("--port", "0", "--http-port", "0")


def test_the_example_says_every_option_and_is_the_defaults():
    assert read_sections(ServeConfig, parse(), EXAMPLE) == (ServeConfig(), [])
    text = EXAMPLE.read_text(encoding="utf-8")
    assert text.endswith(config_text(ServeConfig())), (
        "after a change: xlarank serve --print-config, below the opening comment of configs/server.toml"
    )


def test_sections_are_small_frozen_and_documented():
    for cls in typing.get_type_hints(ServeConfig).values():
        assert cls.__dataclass_params__.frozen
        assert len(dataclasses.fields(cls)) <= 8
        assert inspect.getdoc(cls)
    flags = {option.flag for option in options_of(ServeConfig)} | {"--no-bundle-code"}
    assert set(KNOWN_FLAGS.split()) <= flags


def test_print_config_prints_what_would_be_used(capsys, tmp_path):
    file = tmp_path / "server.toml"
    file.write_text('[models]\nrepository = "models"\n[limits]\nmax_inputs = 7\n')
    assert main.main(parse("--config", str(file), "--port", "5", "--print-config")) == 0
    printed = tmp_path / "printed.toml"
    printed.write_text(capsys.readouterr().out)
    config, problems = read_sections(ServeConfig, parse(), printed)
    assert problems == []
    assert (config.server.port, config.limits.max_inputs) == (5, 7)
    assert config.models.repository == tmp_path / "models"


def test_a_printed_config_says_the_same_wherever_it_is_put(capsys, tmp_path, monkeypatch):
    """A file's paths are from its own folder on, the command line's from the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    file = tmp_path / "conf" / "server.toml"
    file.write_text('[server]\nport_file = "port"\n[access_log]\npath = "-"\n')
    assert main.main(parse("models", "--config", "conf/server.toml", "--print-config")) == 0
    printed = tmp_path / "conf" / "printed.toml"
    printed.write_text(capsys.readouterr().out)
    config, problems = read_sections(ServeConfig, parse(), printed)
    assert problems == []
    assert config.models.repository == tmp_path / "models"
    assert config.server.port_file == tmp_path / "conf" / "port"
    assert str(config.access_log.path) == "-"  # the standard output, no file beside the config


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[server]\nport_file = "a\\u0000b"', r"[server] port_file must be without NUL; was 'a\x00b'"),
        ('[security]\ntokens = "a\\u0000b"', r"[security] tokens must be without NUL; was 'a\x00b'"),
        ('[server]\nhost = "a\\u0000b"', r"[server] host must be without NUL; was 'a\x00b'"),
        ('[features]\npaths = ["a", "a\\u0000b"]', r"[features] paths must be without NUL; was 'a\x00b'"),
        (f"[connections]\nmax_connections = {2**31}", f"must be at most 2**31 - 1; was {2**31}"),
        (f"[connections]\nmax_streams = -{2**70}", f"must be at most 2**31 - 1; was -{2**70}"),
        (f"[features]\nmemory_bytes = {2**63}", f"must be at most 2**63 - 1; was {2**63}"),
        ("[models]\ndevices = 1025", "models: devices must be in [1, 1024]; was 1025"),
        ("[models]\nhost_threads = 0", "models: host_threads must be in [1, 1024]; was 0"),
        ("[http]\nport = 0\nmax_receive_seconds = inf", "http: max_receive_seconds must be a finite number"),
        (
            f'[server]\nhost = "{"a" * 64}.b"\nport = 0\nhttp_port = 0',
            "expected a free port, got no host has such a name",
        ),
    ],
)
def test_values_that_no_library_takes_are_told_by_the_check(capsys, tmp_path, repository, text, problem):
    """They ended in a traceback, some after the check had said that all is well."""
    file = tmp_path / "server.toml"
    file.write_text(text)
    with pytest.raises(SystemExit):
        main.main(parse(str(repository), "--config", str(file), "--check"))
    assert problem in capsys.readouterr().err


def test_a_repository_that_could_be_served_is_ok(check, repository):
    assert check(str(repository), *FREE) == (0, OK, [])
    status, out, problems = check(str(repository), *FREE, "--json")
    assert (status, problems) == (0, [])
    assert json.loads(out) == {"ok": True, "problems": [], "warnings": [], "unchecked": UNCHECKED}


def test_a_check_loads_no_jax(repository):
    words = ["serve", str(repository), *FREE, "--check"]
    code = (
        "import sys; from xlarank.cli import main; "
        f"main.main(main.parse(['xlarank', *{words!r}])); "
        "print([name for name in ('jax', 'flax') if name in sys.modules])"
    )
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": ""}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout == f"{OK}[]\n"


def test_the_versions_that_are_checked_are_those_that_would_be_served(check, repository, tmp_path):
    shutil.copytree(repository / "bare" / "1", repository / "bare" / "2")
    manifest = repository / "bare" / "2" / "manifest.json"
    manifest.write_text(manifest.read_text()[:-20])
    (tmp_path / "server.toml").write_text(
        '[models]\nrepository = "models"\n[[versions.models]]\nname = "bare"\npolicy = "specific"\n'
        "versions = [1]\n"
    )
    options = ("--config", str(tmp_path / "server.toml"), *FREE)
    assert check(*options)[2] == []
    text = (tmp_path / "server.toml").read_text()
    (tmp_path / "server.toml").write_text(text.replace("[1]", "[1, 2]"))
    assert [problem.startswith(f"{manifest}: ") for problem in check(*options)[2]] == [True]
    (tmp_path / "server.toml").write_text(text.replace("[1]", "[7]"))
    (problem,) = check(*options)[2]
    assert "model 'bare': its policy names versions [7], found [1, 2]" in problem
    (tmp_path / "server.toml").write_text(text.replace("[1]", "[7]").replace("bare", ""))
    (problem,) = check(*options)[2]
    assert "model 'bare': its policy wants none of the versions [1, 2]" in problem


def test_no_command_waits_for_grpc_to_be_imported():
    code = "import sys, xlarank.cli.main; print([n for n in ('grpc', 'jax', 'uvicorn') if n in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout == "[]\n"


def test_every_problem_is_told_in_a_line_of_its_own(check, repository, tmp_path):
    manifest = repository / "bare" / "1" / "manifest.json"
    manifest.write_text(manifest.read_text()[:-20])
    (tmp_path / "tokens").write_text("short\n")
    (tmp_path / "key.pem").write_text("no key")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        file = tmp_path / "server.toml"
        file.write_text(
            f"""
            [server]
            port = {port}
            http_port = 0
            port_file = "nowhere/ports.json"
            [http]
            port = {port}
            [access_log]
            path = "nowhere/access.log"
            [captures]
            folder = "tokens/kept"
            [security]
            tls_certificate = "none.pem"
            tls_key = "key.pem"
            tokens = "tokens"
            [models]
            repository = "models"
            [features]
            paths = ["none.features"]
            """
        )
        status, out, problems = check("--config", str(file))
        assert (
            check("--config", str(file), "--json")[1]
            == json.dumps({"ok": False, "problems": problems, "warnings": [], "unchecked": UNCHECKED}) + "\n"
        )
    assert (status, out) == (1, "")
    expected = [
        f"grpc port {port} on 127.0.0.1: expected a free port, got Address already in use",
        f"rest port {port} on 127.0.0.1: expected a port of its own, got that of grpc",
        f"security: tokens {tmp_path}/tokens: line 1: expected a token of at least 16 printable ASCII ",
        f"security: tls_certificate {tmp_path}/none.pem: can't be read: No such file or directory",
        f"server: port_file {tmp_path}/nowhere/ports.json: expected a path in a folder, got none",
        f"access_log: path {tmp_path}/nowhere/access.log: expected a path in a folder, got none",
        f"captures: folder {tmp_path}/tokens/kept: expected a path in a folder, got none",
        f"{manifest}: ",
        f"{tmp_path}/none.features",
    ]
    assert len(problems) == len(expected)
    for problem, opening in zip(problems, expected, strict=True):
        assert problem.startswith(opening)


@pytest.fixture
def unwritable(tmp_path):
    """Paths by the name of what is there."""
    paths = {"folder": tmp_path / "folder", "pipe": tmp_path / "pipe", "file": tmp_path / "file"}
    paths["folder"].mkdir()
    os.mkfifo(paths["pipe"])
    paths["file"].touch()
    return paths | {"system": Path("/proc/kept")}


UNWRITABLE = [
    ("--port-file", "folder", "server: port_file {}: expected a file, got a folder"),
    ("--port-file", "system", "server: port_file {}: expected a folder that may be written, got /proc: "),
    ("--access-log", "folder", "access log {}: Is a directory"),
    ("--access-log", "pipe", "access log {}: nobody reads this pipe"),
    ("--access-log", "system", "access"),
    ("--captures", "file", "captures: folder {}: "),
    ("--captures", "system", "captures: folder {}: "),
]


@pytest.mark.parametrize(("flag", "what", "told"), UNWRITABLE)
def test_what_can_not_be_written_is_a_problem_and_the_server_does_not_start(
    check, repository, unwritable, monkeypatch, capsys, flag, what, told
):
    monkeypatch.setattr(serve_start, "_open_repository", None)  # nothing is loaded for it
    words = (str(repository), *FREE, flag, str(unwritable[what]))
    status, _, problems = check(*words)
    assert (status, len(problems)) == (1, 1)
    assert main.main(parse(*words)) == 1
    for text in (problems[0], capsys.readouterr().err.removeprefix("xlarank serve: ")):
        assert text.startswith(told.format(unwritable[what]))
    assert sorted(path.name for path in repository.parent.iterdir()) == ["file", "folder", "models", "pipe"]


def test_what_is_written_already_and_pipes_that_are_read_are_no_problem(check, repository, tmp_path):
    pipe, port_file, log = (tmp_path / name for name in ("pipe", "ports.json", "access.log"))
    os.mkfifo(pipe)
    port_file.touch()
    log.write_text("a line\n")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (pipe, log, Path("/dev/null")):
        words = (
            "--port-file",
            str(port_file),
            "--access-log",
            str(path),
            "--captures",
            str(tmp_path / "a/b"),
        )
        assert check(str(repository), *FREE, *words) == (0, OK, [])
    os.close(reader)
    assert log.read_text() == "a line\n"
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("ports", "problem"),
    [
        ([("grpc", "127.0.0.1", 0), ("http", "127.0.0.1", 0)], None),
        ([("grpc", "localhost", 1), ("http", "127.0.0.1", 1)], "http port 1 on 127.0.0.1: {} grpc"),
        ([("grpc", "0.0.0.0", 1), ("admin", "127.0.0.1", 1)], "admin port 1 on 127.0.0.1: {} grpc"),
        ([("grpc", "127.0.0.2", 1), ("admin", "127.0.0.1", 1)], None),
    ],
)
def test_a_port_is_given_to_one_service_only(monkeypatch, ports, problem):
    monkeypatch.setattr(serve_config, "port_problem", lambda *_: None)  # whatever this machine listens on
    expected = [] if problem is None else [problem.format("expected a port of its own, got that of")]
    assert port_problems(ports) == expected


def test_a_server_with_one_port_for_two_services_does_not_start(repository, capsys):
    assert main.main(parse(str(repository), "--port", "1", "--http-port", "1")) != 0
    text = "http port 1 on 127.0.0.1: expected a port of its own, got that of grpc"
    assert text in capsys.readouterr().err


def test_processes_need_a_folder_for_temporary_files_with_room_for_a_socket(check, repository, monkeypatch):
    """The kernel says: AF_UNIX path too long."""
    for name, is_good in (("/" + 85 * "t", False), ("/" + 84 * "t", True)):
        monkeypatch.setattr(tempfile, "tempdir", name)
        told = [
            "processes: num_processes: expected a folder for temporary files of at most 85 "
            f"characters, in which there is room for the name of a socket, got {name}: set TMPDIR to another"
        ]
        status, _, problems = check(str(repository), *FREE, "--processes", "2")
        assert (status, problems) == ((0, []) if is_good else (1, told))
        assert check(str(repository), *FREE)[0] == 0


@pytest.mark.parametrize("num_processes", ["1", "2"])
def test_the_port_file_of_an_earlier_run_is_gone_before_anything_is_loaded(tmp_path, capsys, num_processes):
    ports = tmp_path / "ports.json"
    ports.write_text("{}")
    words = [str(tmp_path / "models"), "--port-file", str(ports), "--processes", num_processes]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main.main(parse(*words, "--port", port, "--http-port", "0")) == 1
    assert ports.exists()  # it may be that of the server on the port
    assert main.main(parse(*words, *FREE)) == 1
    assert not ports.exists()
    assert "expected a folder of models, found none" in capsys.readouterr().err
    ports.mkdir()
    assert main.main(parse(*words, *FREE)) == 1
    assert f"server: port_file {ports}: expected a file, got a folder" in capsys.readouterr().err


@pytest.mark.parametrize("num_processes", ["1", "2"])
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--tokens",), "security: tokens {}: line 1: expected a token of at least 16 printable ASCII "),
        (
            ("--tls-certificate", "--tls-key"),
            "security: tls_certificate {0} and tls_key {0}: expected a PEM certificate",
        ),
    ],
)
def test_tokens_and_certificates_are_looked_at_before_anything_is_loaded(
    repository, tmp_path, capsys, num_processes, options, told
):
    bad, ports = tmp_path / "bad", tmp_path / "ports.json"
    bad.write_text("short\n")
    ports.write_text("{}")
    words = [word for option in options for word in (option, str(bad))]
    words += ["--processes", num_processes, "--port-file", str(ports)]
    assert main.main(parse(str(repository), *FREE, *words)) == 1
    assert ports.exists()
    err = capsys.readouterr().err
    assert told.format(bad) in err
    assert "loading" not in err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--grace", "1e10"), "server: grace_seconds must be <= 2000000.0; was 10000000000.0"),
        (("--watch-seconds", "1e10"), "versions: watch_seconds must be <= 1e+08; was 10000000000.0"),
        (("--drain-seconds", "1e10"), "versions: drain_seconds must be <= 1e+08; was 10000000000.0"),
        (("--watchdog-seconds", "1e10"), "faults: watchdog_seconds must be <= 1e+08; was 10000000000.0"),
        (("--default-timeout-ms", "1e12"), "queue: default_timeout_ms must be <= 1e+11; was 1000000000000.0"),
    ],
)
def test_nobody_waits_for_longer_than_threads_can(check, repository, words, problem):
    status, _, problems = check(str(repository), *FREE, *words)
    assert (status, problems) == (1, [problem])


def test_a_server_s_threads_wait_less_for_the_interpreter_and_the_setting_is_put_back(monkeypatch):
    """A request waits for it several times, at most for so long behind a thread that loads a version."""
    seen = []

    def open_repository(*_):
        seen.append(sys.getswitchinterval())
        raise ConfigError("enough")

    monkeypatch.setattr(serve_start, "_open_repository", open_repository)
    before = sys.getswitchinterval()
    with pytest.raises(ConfigError, match="enough"), serve_start.running_server(ServeConfig()):
        pass
    assert seen == [pytest.approx(5e-4)]
    assert sys.getswitchinterval() == before


def test_a_repository_that_is_watched_may_be_empty(check, tmp_path):
    assert check(str(tmp_path), *FREE, "--watch-seconds", "1") == (0, OK, [])


def test_what_a_check_leaves_unchecked_is_said(check, repository, capsys):
    (table,) = (repository / "bare" / "1" / "tables").glob("*.npy")
    with table.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    status, out, _ = check(str(repository), *FREE)
    assert (status, "not checked: what the bundles' files hold beyond their sizes" in out) == (0, True)
    with pytest.raises(SystemExit):
        parse("--help")
    assert "compares files' sizes, not what they hold" in " ".join(capsys.readouterr().out.split())


def test_a_config_that_can_t_be_read_is_told_whole(check, tmp_path):
    (tmp_path / "server.toml").write_text("[servers]\n[limits]\nmax_inputs = 0\n")
    status, _, problems = check("--config", str(tmp_path / "server.toml"), "--port", "-1")
    assert status == 1
    assert [problem.rpartition("server.toml: ")[2] for problem in problems] == [
        "sections: unknown keys ['servers']; expected of ['server', 'processes', 'limits', 'connections', "
        "'security', 'http', 'access_log', 'tracing', 'models', 'versions', 'tables', 'features', 'queue', "
        "'faults', 'captures']",
        "server: port must be in [0, 65535]; was -1",
        "limits: max_inputs must be >= 1; was 0",
    ]


@pytest.mark.parametrize("words", [(), ("none",), (".",)])
def test_a_repository_that_can_t_be_served_is_a_problem(check, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    status, _, (problem,) = check(*words, *FREE)
    assert status == 1
    assert "expected" in problem
    assert "repository" in problem


def test_a_policy_of_a_model_that_isn_t_there_is_a_problem_unless_it_may_come(check, repository, tmp_path):
    file = tmp_path / "server.toml"
    file.write_text('[[versions.models]]\nname = "bear"\n')
    words = (str(repository), *FREE, "--config", str(file))
    told = f"repository {repository}: versions: policies of models ['bear'], found ['bare']"
    assert check(*words) == (1, "", [told])
    assert check(*words, "--watch-seconds", "1") == (0, OK, [])
    with pytest.raises(ConfigError, match=re.escape(told)):  # as the server says it
        ModelRepository.open(repository, versions=VersionOptions(models=(ModelPolicy(name="bear"),)))


def test_a_version_that_a_policy_names_and_isn_t_there_is_a_problem_or_if_it_may_come_a_warning(
    check, repository, tmp_path
):
    file = tmp_path / "server.toml"
    file.write_text(
        '[[versions.models]]\nname = "bare"\n'
        'labels = [{name = "stable", version = 9, traffic = 0.9}, {name = "new", version = 1, traffic = 0.1}]'
    )
    words = (str(repository), *FREE, "--config", str(file))
    told = f"repository {repository}: versions: model 'bare': its policy names versions [9], found [1]"
    assert check(*words) == (1, "", [told])
    assert check(*words, "--processes", "2")[2] == [told]
    warning = (
        "warning: model bare: labels {'stable': 9} lead to versions that aren't served, and their share of "
        "the requests goes to others: [1]"
    )
    assert check(*words, "--watch-seconds", "1") == (0, OK, [warning])
    _, out, _ = check(*words, "--watch-seconds", "1", "--json")
    assert json.loads(out)["warnings"] == [warning.removeprefix("warning: ")]


@pytest.mark.parametrize(
    ("words", "module", "package", "extra"),
    [
        (("--rest-port", "0"), "http_server", "uvicorn", "http"),
        (("--otlp-endpoint", "http://localhost:1"), "tracing", "opentelemetry", "otel"),
    ],
)
def test_an_extra_that_isn_t_installed_is_a_problem(
    check, repository, monkeypatch, words, module, package, extra
):
    assert check(str(repository), *FREE, *words) == (0, OK, [])
    monkeypatch.delitem(sys.modules, f"xlarank_serving.{module}")
    monkeypatch.setitem(sys.modules, package, None)
    status, _, (problem,) = check(str(repository), *FREE, *words)
    assert status == 1
    assert f"expected {package} to be installed" in problem
    assert f"pip install 'xlarank[{extra}]'" in problem
    assert check(str(repository), *FREE) == (0, OK, [])


def test_a_bundle_in_a_folder_of_another_name_is_a_problem(check, repository):
    (repository / "bare").rename(repository / "other")
    assert check(str(repository), *FREE)[2] == [
        f"{repository}/other/1: expected model 'other', as the folder is named, got 'bare'"
    ]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--processes", "0"), "processes: num_processes must be >= 1; was 0"),
        (
            ("--processes", "3", "--process-devices", "MIG-a", "--process-devices", "MIG-b"),
            "processes: devices names those of each process: expected 3, got 2",
        ),
        (
            ("--processes", "2", "--max-age-seconds", "0"),
            "connections: max_age_seconds must be > 0 with several processes",
        ),
    ],
)
def test_processes_that_cannot_serve_together_are_a_problem(check, repository, words, problem):
    status, _, (told,) = check(str(repository), *FREE, *words)
    assert status == 1
    assert told.startswith(problem)


def test_platforms_are_taken_in_the_order_that_they_are_named_in():
    config, _ = read_sections(ServeConfig, parse("--platform", "cuda", "--platform", "cpu,cost=0.1"), None)
    assert config.models.platform_options == (
        PlatformOptions(name="cuda"),
        PlatformOptions(name="cpu", cost=0.1),
    )


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (
            ("--platform", "cpu,size=2"),
            "platform cpu,size=2: expected NAME,FIELD=VALUE,... of ['cost', 'devices'], got ['size']",
        ),
        (
            ("--platform", "cpu", "--platform", "cpu,devices=2"),
            "models: platforms: expected each once, got ['cpu', 'cpu']",
        ),
        (
            ("--platform", "cuda", "--devices", "2"),
            "models: devices are those of JAX's default platform; with platforms say it of each, as in "
            "cuda,devices=2",
        ),
    ],
)
def test_platforms_that_can_not_be_meant_are_a_problem(check, repository, words, problem):
    assert check(str(repository), *FREE, *words)[2] == [problem]


def test_rows_on_devices_are_not_updated_by_several_processes(check, tmp_path):
    table = np.zeros((4, 2), np.float32)
    bundle = publish(tmp_path, {"a": table, "b": table}, updatable=["a"], on_devices=["a", "b"])
    assert check(str(tmp_path), *FREE) == (0, OK, [])
    status, _, problems = check(str(tmp_path), *FREE, "--processes", "2")
    assert status == 1
    assert problems == [
        f"{bundle}: tables ['a'] are updatable and devices hold rows of them, which an update in another "
        "process wouldn't reach: compile with --device-table-bytes 0, or serve with --processes 1"
    ]
