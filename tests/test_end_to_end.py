"""From a folder of data to scores over gRPC, through the command alone, each step a process of its own."""

import contextlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from served import complaints_in
from xlarank_serving.client import RankingClient

from xlarank.bundle import open_bundle
from xlarank.cli import main
from xlarank.compiler.reference import reference_scores
from xlarank.spec import Ragged, StringColumn
from xlarank.spec.config import load_config
from xlarank.training.checkpoint import restore
from xlarank.training.feed import FeedSize, read, write_feed

SIZE = FeedSize(users=80, videos=120, creators=15, train=(200, 8), validation=(70, 5), test=(12, 100))
TEST_ROWS = 12 * 100

# The model of configs/ in small: its features, its tables and its code stay.
SMALLER = {
    "num_experts = 4": "num_experts = 2",
    "expert_hidden = [128, 64]": "expert_hidden = [16]",
    "tower_hidden = [32]": "tower_hidden = []",
    "num_cross_layers = 2": "num_cross_layers = 1",
    "cross_rank = 64": "cross_rank = 8",
    "epochs = 6": "epochs = 2",
    "batch_size = 512": "batch_size = 100",
}


def small_config():
    text = (Path(__file__).parents[1] / "configs/feed.toml").read_text()
    for old, new in SMALLER.items():
        assert old in text, f"configs/feed.toml has no {old!r} any more"
        text = text.replace(old, new)
    return text + "\n[buckets]\nrows = [32]\n"


class Shell:
    """Runs the command in a folder, as a user would."""

    def __init__(self, folder):
        self.folder = folder
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "XDG_CACHE_HOME": str(folder / "home"),
        }
        # The package sets it where it is needed; a user doesn't.
        self.environment.pop("TF_CPP_MIN_LOG_LEVEL", None)

    def popen(self, *words):
        command = [sys.executable, "-m", "xlarank.cli", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, **pipes)

    def result(self, *words):
        """The JSON object on the last line."""
        with self.popen(*words, "--json") as process:
            out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        for noise in ("Traceback", "Warning", "WARNING", "SIGILL"):
            assert noise not in err
        return json.loads(out.splitlines()[-1])

    @contextlib.contextmanager
    def serving(self, *words):
        """The process and its ready line; it must end with 0 on SIGTERM."""
        with self.popen("serve", *words, "--port", "0", "--http-port", "0", "--json") as process:
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                assert line, process.communicate(timeout=60)[1]
                yield process, json.loads(line)
                process.send_signal(signal.SIGTERM)
                _, err = process.communicate(timeout=60)
                assert process.returncode == 0
                assert complaints_in(err) == []
            finally:
                process.kill()


def told_here(folder, *words):
    """`Shell.result` in this process, which has all imports already."""
    out = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out):
        assert main.main(main.parse(["xlarank", *words, "--json"])) == 0
    return json.loads(out.getvalue().splitlines()[-1])


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """What every step of the way said, and where it lies; what only reads is asked in this process."""
    shell = Shell(tmp_path_factory.mktemp("feed"))
    write_feed(shell.folder / "data", seed=4, size=SIZE)
    (shell.folder / "feed.toml").write_text(small_config())
    data = ("--data", "data")
    return SimpleNamespace(
        shell=shell,
        folder=shell.folder,
        train=shell.result("train", "feed.toml", *data, "--out", "checkpoint"),
        compile=shell.result(
            *("compile", "feed.toml", "--checkpoint", "checkpoint", "--out", "models", "--devices", "2"),
            *("--precision", "float32", "--table-precision", "float32", "--tune-seconds", "2", "--explain"),
        ),
        inspect=told_here(shell.folder, "inspect", "models/feed"),
        score=shell.result("score", "models/feed/1", *data, "--out", "scores.parquet", "--devices", "2"),
        of_checkpoint=told_here(shell.folder, "evaluate", "feed.toml", "--checkpoint", "checkpoint", *data),
        of_bundle=told_here(shell.folder, "evaluate", "models/feed", *data),
    )


@pytest.fixture(scope="module")
def reference(chain):
    """Requests of the test split with their scores by the Flax model, op by op and without the compiler."""
    module, spec, tables = restore(load_config(chain.folder / "feed.toml"), chain.folder / "checkpoint")
    data = read(chain.folder / "data").test
    requests = list(data.requests(spec))
    scores = reference_scores(module, spec, tables, requests)
    return SimpleNamespace(spec=spec, data=data, requests=requests, scores=scores)


@pytest.fixture(scope="module")
def server(chain):
    with chain.shell.serving("models", "--devices", "2") as (_, ready):
        assert ready["models"] == ["feed/1"]
        yield ready


def run_here(capsys, *words):
    """Exit status, output and errors of the command in this process, which has all imports already."""
    try:
        status = main.main(main.parse(["xlarank", *map(str, words)]))
    except SystemExit as ended:
        status = ended.code
    return status, *capsys.readouterr()


def test_training_tells_its_rows_and_leaves_64_labelled_requests(chain):
    assert chain.train["checkpoint"] == "checkpoint"
    assert chain.train["rows"] == {"train": 1600, "validation": 350, "test": TEST_ROWS}
    epochs = chain.train["epochs"]
    assert [epoch["epoch"] for epoch in epochs] == [1, 2]
    best = min(epochs, key=lambda epoch: epoch["validation_loss"])
    assert chain.train["best_epoch"] == best["epoch"]
    assert chain.inspect["golden"] == {"requests": 64, "rows": 64 * 5}


def test_every_bucket_is_compiled_timed_and_proven(chain):
    assert (chain.compile["model"], chain.compile["version"]) == ("feed", 1)
    assert chain.compile["path"] == "models/feed/1"
    buckets = {(b["rows"], b["requests"]) for b in chain.compile["buckets"]}
    dropped = {(b["rows"], b["requests"]) for b in chain.compile["dropped_buckets"]}
    assert buckets | dropped == {(32, 1), (32, 32)}
    assert not buckets & dropped
    for bucket in chain.compile["buckets"]:
        assert bucket["seconds"]["cpu"] > 0
        assert set(bucket["max_error"]) == {"finish", "share"}
        assert max(bucket["max_error"].values()) <= 1e-5


def test_inspect_says_what_compile_wrote(chain):
    shown = chain.inspect
    assert (shown["model"], shown["version"], shown["verified"]) == ("feed", 1, True)
    names = ("rows", "requests", "form", "precision", "seconds", "max_error", "p99_error")
    told = [[{name: b[name] for name in names} for b in said["buckets"]] for said in (shown, chain.compile)]
    assert told[0] == told[1]
    features = {f["name"]: f for f in shown["features"]}
    assert list(features) == [f.name for f in load_config(chain.folder / "feed.toml").spec.features]
    assert features["country"]["scope"] == "context"
    assert features["history"]["max_length"] == 30
    # Fitted to the data: age has a mean now, and the vocabulary of videos at most all of them.
    assert "mean=" in " ".join(features["age"]["preprocessing"])
    tables = {t["name"]: t for t in shown["tables"]}
    assert 100 < tables["videos"]["rows"] <= SIZE.videos + 1
    assert tables["creators"]["rows"] == 1000
    assert shown["params"]["values"] == chain.compile["parameters"]
    files = [path for path in (chain.folder / "models/feed/1").rglob("*") if path.is_file()]
    on_disk = sum(path.stat().st_size for path in files if path.name != "manifest.json")
    assert shown["bytes"]["total"] == on_disk


def test_scores_in_a_file_are_those_of_the_flax_model(chain, reference):
    assert chain.score == {"out": "scores.parquet", "requests": 12, "rows": TEST_ROWS}
    table = pyarrow.parquet.read_table(chain.folder / "scores.parquet")
    assert table.column_names == ["request", "row", "finish", "share"]
    np.testing.assert_array_equal(table["request"], np.repeat(np.arange(12), 100))
    np.testing.assert_array_equal(table["row"], np.tile(np.arange(100), 12))
    for task, scores in reference.scores.items():
        np.testing.assert_allclose(table[task], np.concatenate(scores), rtol=0, atol=1e-5)
        assert np.ptp(table[task]) > 0.01  # a model, not a constant


def test_a_csv_file_holds_the_same_scores(chain, capsys):
    out = chain.folder / "scores.csv"
    words = ("score", chain.folder / "models/feed", "--data", chain.folder / "data", "--out", out)
    status, told, _ = run_here(capsys, *words, "--json")
    assert status == 0
    assert json.loads(told.splitlines()[-1]) == {"out": str(out), "requests": 12, "rows": TEST_ROWS}
    table = pyarrow.csv.read_csv(out)
    expected = pyarrow.parquet.read_table(chain.folder / "scores.parquet")
    assert table.column_names == expected.column_names
    for name in table.column_names:
        np.testing.assert_allclose(table[name], expected[name], rtol=0, atol=1e-6)


def test_checkpoint_bundle_and_server_are_judged_alike(chain, server):
    of_server = chain.shell.result("evaluate", "feed.toml", "--server", server["grpc"], "--data", "data")
    for report in (chain.of_checkpoint, chain.of_bundle, of_server):
        assert report["rows"] == TEST_ROWS
        assert set(report) == {"tasks", "rows"}
        assert list(report["tasks"]) == ["finish", "share"]
        for task, entry in report["tasks"].items():
            assert {"auc", "gauc", "log_loss", "normalised_entropy", "baseline"} <= set(entry)
            for name in ("auc", "gauc", "log_loss", "normalised_entropy"):
                assert math.isclose(
                    entry[name], chain.of_checkpoint["tasks"][task][name], abs_tol=1e-5
                )  # one pair of rows in another order
            assert entry["baseline"]["auc"] == chain.of_checkpoint["tasks"][task]["baseline"]["auc"]


def test_the_reported_auc_is_that_of_the_scores_in_the_file(chain, reference):
    table = pyarrow.parquet.read_table(chain.folder / "scores.parquet")
    for task, entry in chain.of_bundle["tasks"].items():
        labels, scores = reference.data.labels[task], np.asarray(table[task])
        positives, negatives = scores[labels == 1], scores[labels == 0]
        # By definition: the share of pairs in order, ties by half.
        wins = (positives[:, None] > negatives).mean() + (positives[:, None] == negatives).mean() / 2
        assert entry["auc"] == pytest.approx(wins, abs=1e-9)


def test_our_client_gets_the_scores_of_the_flax_model(server, reference):
    with RankingClient(server["grpc"]) as client:
        for number in range(len(reference.requests)):
            scores = client.score("feed", reference.data.features_of(number), packed=number % 2 == 1)
            for task, expected in reference.scores.items():
                np.testing.assert_allclose(scores[task], expected[number], rtol=0, atol=1e-5)


def tensor(name, array, datatype):
    made = triton.InferInput(name, array.shape, datatype)
    made.set_data_from_numpy(array)
    return made


def triton_inputs(features, metadata):
    """What a stranger with tritonclient sends, going by the model's metadata."""
    inputs = []
    for described in metadata["inputs"]:
        name, datatype = described["name"], described["datatype"]
        if name.endswith(".lengths"):
            inputs.append(tensor(name, features[name.removesuffix(".lengths")].lengths, datatype))
            continue
        column = features[name]
        column = column.values if isinstance(column, Ragged) else column
        if isinstance(column, StringColumn):
            column = np.array(column.to_bytes(), np.object_)
        inputs.append(tensor(name, column, datatype))
    return inputs


def test_tritonclient_as_published_gets_the_scores_of_the_flax_model(server, reference):
    with triton.InferenceServerClient(server["grpc"]) as client:
        metadata = client.get_model_metadata("feed", as_json=True)
        for number in (0, 5):
            answer = client.infer("feed", triton_inputs(reference.data.features_of(number), metadata))
            assert answer is not None
            for task, expected in reference.scores.items():
                scores = answer.as_numpy(task)
                assert scores is not None
                np.testing.assert_allclose(scores, expected[number], rtol=0, atol=1e-5)


def metrics_of(ready):
    with urllib.request.urlopen(f"http://{ready['http']}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in samples}


def test_the_server_is_healthy_and_its_metrics_tell_what_it_did(server, reference):
    with grpc.insecure_channel(server["grpc"]) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    before = metrics_of(server)
    with RankingClient(server["grpc"]) as client:
        for number in (0, 1, 2):
            client.score("feed", reference.data.features_of(number))
    after = metrics_of(server)

    def grown(name):
        """Of all series of the name."""
        return sum(value - before.get(one, 0) for one, value in after.items() if one.startswith(f"{name}{{"))

    assert grown("nv_inference_request_success") == 3
    assert grown("nv_inference_count") == grown("xlarank_batch_rows_total") == 300
    assert after['xlarank_request_path_compiles_total{model="feed",version="1"}'] == 0


def test_what_was_published_holds_the_checkpoint_s_tables(chain):
    bundle = open_bundle(chain.folder / "models/feed/1")
    _, _, tables = restore(load_config(chain.folder / "feed.toml"), chain.folder / "checkpoint")
    for name, table in bundle.tables().items():
        np.testing.assert_array_equal(table, tables[name])


def damaged_copy(chain, target, pattern):
    """A copy of the repository with one bit of one file turned over; gives the file's name."""
    shutil.copytree(chain.folder / "models", target)
    file = min((target / "feed/1").glob(pattern))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file.relative_to(target)


@pytest.mark.parametrize("pattern", ["manifest.json", "params.safetensors", "programs/*", "tables/*"])
def test_a_damaged_bundle_is_neither_served_nor_scored_with(chain, tmp_path, capsys, pattern):
    file = damaged_copy(chain, tmp_path / "models", pattern)
    ports = ("--port", "0", "--http-port", "0")
    data = ("--data", chain.folder / "data")
    for words in (
        ("serve", tmp_path / "models", *ports),
        ("score", tmp_path / "models/feed", *data, "--out", tmp_path / "scores.csv"),
        ("evaluate", tmp_path / "models/feed", *data),
        ("inspect", tmp_path / "models/feed"),
    ):
        status, _, err = run_here(capsys, *words)
        assert status == 1
        where = f"xlarank {words[0]}: {tmp_path / 'models' / file}: "
        # A server reads its tables when it loads the model, and says first that it does.
        *said, told = err.splitlines()
        assert told.startswith((f"{where}damaged", f"{where}not whole"))
        assert said == (["loading feed 1: tables"] if words[0] == "serve" and "tables" in pattern else [])
    assert not (tmp_path / "scores.csv").exists()


def compiled_here(chain, capsys, monkeypatch, *words):
    monkeypatch.chdir(chain.folder)
    monkeypatch.setenv("COLUMNS", "160")
    status, out, err = run_here(capsys, "compile", "feed.toml", "--checkpoint", "checkpoint", *words)
    return status, " ".join(out.split()), err


@pytest.mark.once
def test_compile_tells_a_person_what_was_tried_chosen_and_explained(chain, capsys, monkeypatch, tmp_path):
    (tmp_path / "sizes.txt").write_text("30\n30\n14\n")
    words = (
        "--out",
        tmp_path / "models",
        "--devices",
        "1",
        "--explain",
        "--tune-seconds",
        "0",
        "--golden",
        "data",
    )
    status, out, _ = compiled_here(
        chain,
        capsys,
        monkeypatch,
        *words,
        "--buckets",
        "auto",
        "--sizes",
        tmp_path / "sizes.txt",
        "--num-buckets",
        "2",
    )
    assert status == 0
    for text in (
        "plain ms",
        "chosen ms",
        "published ms",
        "gain",
        "rows/s",
        "error finish",
        "tried (ms)",
        "prepared arrays of all buckets",
    ):
        assert text in out
    for text in (
        "hoist_context: ",
        " can run once a request",
        "sequences.py:",
        "sibling matmuls, the first at",
    ):
        assert text in out
    assert "context values repeated for their candidates" in out
    manifest = open_bundle(tmp_path / "models" / "feed" / "1").manifest
    rows = {bucket.rows for bucket in manifest.ladder.buckets}
    assert {32} <= rows <= {16, 32}, "30 fits 32; 14 has 16 if that is faster here"
    golden, values = open_bundle(tmp_path / "models" / "feed" / "1").golden()
    assert len(golden) == 70
    assert set(values["labels"]) == {"finish", "share"}


@pytest.mark.once
def test_the_same_checkpoint_again_says_what_it_reused(chain, capsys, monkeypatch, tmp_path):
    words = ("--out", tmp_path, "--devices", "2", "--tune-seconds", "0", "--buckets", "8")
    assert compiled_here(chain, capsys, monkeypatch, *words)[0] == 0
    status, out, _ = compiled_here(chain, capsys, monkeypatch, *words)
    assert status == 0
    assert "same architecture as version 1: its programs, forms, times and compiled code were reused" in out


@pytest.mark.once
def test_a_precision_whose_scores_leave_the_limit_is_kept_for_study_alone(
    chain, capsys, monkeypatch, tmp_path
):
    words = (
        "--out",
        tmp_path / "models",
        "--devices",
        "1",
        "--buckets",
        "8",
        "--precision",
        "int8",
        "--tune-seconds",
        "0",
    )
    limits = ("--max-score-error", "1e-7", "--keep-failed", tmp_path / "failed")
    status, _, err = compiled_here(chain, capsys, monkeypatch, *words, *limits)
    assert status == 1
    assert err.startswith("xlarank compile: model 'feed', task 'finish', bucket 8x")
    assert "int8', 99th percentile over all golden rows: scores differ from the reference by " in err
    assert err.endswith(f"kept for study in {tmp_path}/failed/feed/1\n")
    assert not (tmp_path / "models" / "feed" / "1").exists()
    assert run_here(capsys, "inspect", tmp_path / "failed" / "feed")[0] == 0


# Arguments that fit what the chain left, and what is told of them in one line.
MISTAKES = {
    "compile feed.toml --checkpoint checkpoint --out out --buckets auto": "--buckets auto needs --sizes FILE",
    "compile feed.toml --checkpoint checkpoint --out out --sizes s": "--sizes s goes with --buckets auto",
    "compile feed.toml --checkpoint checkpoint --out out --buckets auto --sizes none": "none: can't be read",
    "compile feed.toml --checkpoint checkpoint --out o --keep-failed o": "expected another folder than o",
    "compile feed.toml --checkpoint data --out out": "{folder}/data: no checkpoint here; expected spec.json",
    "compile other.toml --checkpoint checkpoint --out out": "{folder}/checkpoint: tables differ: config",
    "compile feed.toml --checkpoint checkpoint --out feed.toml": "feed.toml/feed: can't be written",
    "compile feed.toml --checkpoint checkpoint --out models --version 1": "models/feed/1: exists already",
    "compile feed.toml --checkpoint checkpoint --out out --golden none": "none: can't be read: No such file",
    "compile feed.toml --checkpoint checkpoint --out out --devices 0": "num_devices must be >= 1; was 0",
    "score models --data data --out s.csv": "models: expected a bundle or a model, found a repository",
    "score models/feed/2 --data data --out s.csv": "models/feed/2: expected the folder of a bundle",
    "score models/feed --data models --out s.csv": "models/train/contexts.parquet: no such file",
    "score models/feed --data data --out none/s.csv": "--out none/s.csv: expected a folder to write into",
    "score models/feed --data data --out s.csv --devices 3": "3 devices were asked for",
    "score models/feed --data data --out s.csv --config none.toml": "none.toml: no such config file",
    "train feed.toml --data none --out out": "none/train/contexts.parquet: no such file; expected a feed",
    "train feed.toml --data data --out models": "{folder}/models: expected an empty folder or a checkpoint",
    "train other_key.toml --data data --out out": "unknown options ['num_expert']; it has ['num_experts'",
    "evaluate feed.toml --data data": "feed.toml: expected one of --checkpoint and --server",
    "evaluate models/feed --checkpoint checkpoint --data data": "models/feed is a folder, so a bundle",
    "evaluate feed.toml --checkpoint models --data data": "{folder}/models: no checkpoint here",
    "evaluate feed.toml --checkpoint checkpoint --data none": "none/train/contexts.parquet: no such file",
    "serve models --host-threads 0": "host_threads must be in [1, 1024]; was 0",
    "serve data": "repository data: expected bundles as <model>/<version>, found none",
}


@pytest.mark.parametrize(("words", "told"), MISTAKES.items())
def test_a_mistake_is_told_in_one_line_and_nothing_is_left_behind(chain, capsys, monkeypatch, words, told):
    monkeypatch.chdir(chain.folder)
    text = small_config()
    Path("other.toml").write_text(text.replace('name = "videos"\ndim = 16', 'name = "videos"\ndim = 12'))
    Path("other_key.toml").write_text(text.replace("num_experts", "num_expert"))
    before = {path.name for path in chain.folder.iterdir()}
    ports = ("--port", "0", "--http-port", "0") if words.startswith("serve") else ()
    status, _, err = run_here(capsys, *words.split(), *ports)
    assert status == 1
    assert told.format(folder=chain.folder) in err
    assert err.startswith(f"xlarank {words.split()[0]}: ")
    assert err.count("\n") == 1
    assert {path.name for path in chain.folder.iterdir()} == before
