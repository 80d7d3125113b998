"""What the `xlarank` command says of itself and of mistakes that it needs no model to see."""

import contextlib
import os
import socket
import subprocess
import sys

import pytest

from xlarank.cli import main

COMMANDS = ("train", "compile", "plan", "simulate", "inspect", "score", "evaluate", "serve", "replay")

CONFIG = """
name = "tiny"
model = "xlarank.models.dlrm:build"
features = [{ name = "price", kind = "dense", scope = "candidate" }]
tasks = [{ name = "like" }]
"""


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs a command line in a folder of its own; gives its status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        try:
            status = main.main(main.parse(["xlarank", *words]))
        except SystemExit as ended:
            status = ended.code
        return status, *capsys.readouterr()

    return run


def test_the_command_as_a_process_shows_the_way_and_its_subcommands():
    command = [sys.executable, "-m", "xlarank.cli", "--help"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    assert "example, from data to a server:" in lines
    for name in COMMANDS:
        assert any(line.split()[:1] == [name] for line in lines)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_subcommand_s_help_has_an_example_that_parses(run, name):
    status, out, err = run(name, "--help")
    assert (status, err) == (0, "")
    assert "--json" in out
    examples = [line.split() for line in out.splitlines() if line.strip().startswith(f"xlarank {name} ")]
    assert examples
    for words in examples:
        # A remark may follow, set off by more than a space.
        args = main.parse(words[: 3 if name == "inspect" else None])
        assert (args.command, args.json) == (name, False)


@pytest.mark.parametrize(
    ("words", "told"),
    {
        "": "the following arguments are required: COMMAND",
        "publish": "invalid choice: 'publish'",
        "train": "the following arguments are required: CONFIG, --data, --out",
        "compile c.toml": "the following arguments are required: --checkpoint, --out",
        "score models/feed": "the following arguments are required: --data, --out",
        "evaluate c.toml": "the following arguments are required: --data",
        "inspect models/feed --spam": "unrecognized arguments: --spam",
        "compile c.toml --checkpoint c --out o --buckets 8,x": (
            "expected row counts like 8,32,128, or auto, got '8,x'"
        ),
        "compile c.toml --checkpoint c --out o --buckets 8,": (
            "expected row counts like 8,32,128, or auto, got '8,'"
        ),
        "compile c.toml --checkpoint c --out o --precision int4": (
            "argument --precision: invalid choice: 'int4'"
        ),
        "compile c.toml --checkpoint c --out o --max-score-error 0": "expected a number > 0, got '0'",
        "compile c.toml --checkpoint c --out o --max-auc-loss nan": "expected a finite number, got 'nan'",
        "compile c.toml --checkpoint c --out o --tune-seconds -1": "expected seconds >= 0, got '-1'",
        "compile c.toml --checkpoint c --out o --buckets 32,8": "ascending row counts >= 1, got '32,8'",
        "compile c.toml --checkpoint c --out o --buckets 8,8": "ascending row counts >= 1, got '8,8'",
        "compile c.toml --checkpoint c --out o --buckets 0,8": "ascending row counts >= 1, got '0,8'",
        "score b --data d --out s.csv --split best": "invalid choice: 'best'",
        "serve models --devices none": "argument --devices: expected an integer or 'all', got 'none'",
        "serve models --port http": "argument --port: expected an integer, got 'http'",
        "serve models --grace soon": "argument --grace: expected a number, got 'soon'",
        "serve models --table-memory swap": (
            "argument --table-memory: expected one of ['huge', 'mmap'] or 'auto', got 'swap'"
        ),
    }.items(),
)
def test_wrong_usage_ends_with_2_and_says_what_is_wrong(run, words, told):
    status, out, err = run(*words.split())
    assert (status, out) == (2, "")
    assert err.startswith("usage: xlarank")
    assert told in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "told"),
    {
        "train none.toml --data d --out o": "none.toml: no such config file",
        "train . --data d --out o": ".: expected a TOML file",
        "train broken.toml --data d --out o": "broken.toml: expected a TOML file",
        "train spam.toml --data d --out o": "spam.toml: unknown keys ['spam']; expected of ['name',",
        "train tiny.toml --data d --out o": "tiny.toml: the config has no [data] table",
        "compile none.toml --checkpoint c --out o": "none.toml: no such config file",
        "compile tiny.toml --checkpoint none --out o": "none: no checkpoint here; expected spec.json",
        "inspect none": "none: expected the folder of a bundle or of a model, found nothing",
        "inspect tiny.toml": "tiny.toml: expected the folder of a bundle or of a model, found a file",
        "inspect empty": "empty: expected a bundle or a model, found neither manifest.json nor versions",
        "score none --data d --out s.csv": "none: expected the folder of a bundle or of a model",
        "score none --data d --out s.txt": "--out: expected a .parquet or .csv file, got 's.txt'",
        "score none --data d --out scores": "--out: expected a .parquet or .csv file, got 'scores'",
        "evaluate none.toml --checkpoint c --data d": "none.toml: no such config file",
        "evaluate empty --data d": "empty: expected a bundle or a model, found neither",
        "evaluate tiny.toml --checkpoint none --data d": "none: no checkpoint here; expected spec.json",
        "serve": "expected a repository, named on the command line or as repository in [models] of the file",
        "serve --config none.toml": "none.toml: no such config file",
        "serve --config broken.toml": "broken.toml: expected a TOML file",
        "serve --config spam.toml": "spam.toml: sections: unknown keys ['model', 'name', 'spam', 'tasks']",
        "serve none --devices 0": "models: devices must be in [1, 1024]; was 0",
        "serve none --feature-memory 9": "features: memory_bytes is for the cache of misses 'fetch'; misses",
        "serve none": "repository none: expected a folder of models, found none",
        "serve empty": "repository empty: expected bundles as <model>/<version>, found none",
        "serve empty --port 65536": "server: port must be in [0, 65535]; was 65536",
        "serve empty --threads 0": "server: num_threads must be >= 1; was 0",
        "serve empty --grace -1": "server: grace_seconds must be >= 0; was -1.0",
        "serve empty --host 203.0.113.1": "on 203.0.113.1: expected a free port, got Cannot assign requested",
    }.items(),
)
def test_a_mistake_ends_with_1_and_one_line(run, tmp_path, words, told):
    (tmp_path / "empty").mkdir()
    (tmp_path / "tiny.toml").write_text(CONFIG)
    (tmp_path / "spam.toml").write_text(CONFIG + "spam = 1\n")
    (tmp_path / "broken.toml").write_text("name = [")
    ports = ("--port", "0", "--http-port", "0") if words.startswith("serve") and "--port" not in words else ()
    status, out, err = run(*words.split(), *ports)
    assert (status, out) == (1, "")
    assert err.startswith(f"xlarank {words.split()[0]}: ")
    assert told in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("what", "option"), [("grpc", "--port"), ("http", "--http-port")])
def test_a_port_in_use_is_refused_before_a_model_is_looked_at(run, what, option):
    other = "--http-port" if option == "--port" else "--port"
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        status, _, err = run("serve", "none", option, port, other, "0")
    assert status == 1
    told = (
        f"xlarank serve: {what} port {port} on 127.0.0.1: expected a free port, got Address already in use\n"
    )
    assert err == told


def test_what_the_system_refuses_is_told_in_one_line_too(run, tmp_path):
    (tmp_path / "tiny.toml").mkdir()
    (tmp_path / "tiny.toml" / "x").write_text("")
    status, _, err = run("compile", "tiny.toml/x/y", "--checkpoint", "c", "--out", "o")
    assert status == 1
    assert err == "xlarank compile: [Errno 20] Not a directory: 'tiny.toml/x/y'\n"
