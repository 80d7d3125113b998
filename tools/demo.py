"""The main path in two minutes: make a feed, train, compile, serve, ask, check, stop.

Each step is a command that a user would type; this script only runs them and compares what they answer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from xlarank_serving.client import RankingClient

from xlarank.bundle import open_bundle
from xlarank.spec.config import load_config
from xlarank.spec.metrics import auc
from xlarank.training.checkpoint import load_ranker
from xlarank.training.feed import write_feed
from xlarank.training.readers import read_data
from xlarank.training.scoring import Scorer

CONFIG = Path(__file__).parent.parent / "configs" / "feed.toml"
WARM_REQUESTS = 20
TOP = 10
TUNE_SECONDS = 15
"""For trying forms; `xlarank compile` takes 60 unless it is told otherwise."""

# On a GPU this process, which scores the reference, shares it with those that it starts.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

console = Console()


def main() -> None:
    """Runs every step; raises on the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts/demo"))
    parser.add_argument("--devices", type=int, help="all accelerators, or 2 XLA host devices, by default")
    args = parser.parse_args()
    args.devices = args.devices or (2 if jax.default_backend() == "cpu" else jax.local_device_count())
    data, checkpoint, models = (args.artifacts / name for name in ("data", "checkpoint", "models"))
    shutil.rmtree(args.artifacts, ignore_errors=True)

    console.rule("1. a video feed with a known ground truth")
    with console.status("making the feed"):
        write_feed(data)
    splits = read_data(load_config(CONFIG), data)
    console.print(
        f"{splits.train.num_requests:,} training requests ({splits.train.num_rows:,} rows), "
        f"{splits.test.num_requests} test requests of {splits.test.num_rows // splits.test.num_requests} "
        f"candidates in {data}"
    )
    console.rule("2. train")
    xlarank("train", CONFIG, "--data", data, "--out", checkpoint)
    console.rule("3. compile for every bucket, and prove the scores")
    compiled = xlarank(
        *("compile", CONFIG, "--checkpoint", checkpoint, "--out", models, "--devices", args.devices),
        *("--table-precision", "float32", "--tune-seconds", TUNE_SECONDS),
    )
    console.rule("4. serve, and ask over gRPC")
    with serving(models, args.devices) as ready:
        ask(ready["grpc"], Path(compiled["path"]), checkpoint, splits.test)
    console.rule("done")
    console.print(
        f"The model is in [bold]{compiled['path']}[/bold], its report in {compiled['path']}/report.html. "
        f"Next, serve it yourself:\n\n  .venv/bin/xlarank serve {models}\n",
        highlight=False,
    )


def xlarank(*words: object) -> dict[str, Any]:
    """Runs a subcommand, showing what it prints; returns its JSON."""
    command = [sys.executable, "-m", "xlarank.cli", *map(str, words)]
    console.print("$ xlarank " + " ".join(map(str, words)), style="bold", highlight=False)
    process = subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = ""
    for following in process.stdout:
        if line:
            print(line, end="", flush=True)
        line = following
    if process.wait() != 0:
        print(line, end="")
        raise SystemExit(f"xlarank {words[0]} ended with status {process.returncode}")
    return json.loads(line)


@contextlib.contextmanager
def serving(models: Path, num_devices: int) -> Iterator[dict[str, Any]]:
    """A server process on free ports, stopped with SIGTERM at the end; yields its ready line."""
    words = ["serve", str(models), "--port", "0", "--http-port", "0", "--devices", str(num_devices), "--json"]
    console.print("$ xlarank " + " ".join(words), style="bold", highlight=False)
    process = subprocess.Popen(
        [sys.executable, "-m", "xlarank.cli", *words], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        with console.status("loading, proving and timing every bucket on every device"):
            line = process.stdout.readline()
        if not line:
            raise SystemExit(f"the server ended with status {process.wait()} before it was ready")
        yield json.loads(line)
    finally:
        process.send_signal(signal.SIGTERM)
        if process.wait(timeout=60) != 0:
            raise SystemExit(f"the server ended with status {process.returncode}")


def ask(address: str, bundle: Path, checkpoint: Path, test: Any) -> None:
    """Scores every test request through the public client and compares with the reference and the truth."""
    config = load_config(CONFIG)
    spec, ranker = load_ranker(config, checkpoint)
    tasks = [task.name for task in spec.tasks]
    reference = Scorer(spec, ranker)
    served: dict[str, list[np.ndarray]] = {task: [] for task in tasks}
    milliseconds: list[float] = []
    difference = 0.0
    with RankingClient(address) as client:
        for _ in range(WARM_REQUESTS):
            client.score(spec.name, test.features_of(0))
        for number in track(range(test.num_requests), "asking", console=console, transient=True):
            start = time.perf_counter()
            scores = client.score(spec.name, test.features_of(number))
            milliseconds.append((time.perf_counter() - start) * 1e3)
            for task in tasks:
                served[task].append(scores[task])
        for number, request in enumerate(test.requests(spec)):
            for task, expected in reference.score(request).items():
                difference = max(difference, float(np.abs(served[task][number] - expected).max()))
    show_top(test, served)
    table = Table(title="served scores")
    for column in ("task", "AUC", "AUC of the true probabilities"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task in tasks:
        labels = test.labels[task]
        table.add_row(
            task,
            f"{auc(labels, np.concatenate(served[task])):.4f}",
            f"{auc(labels, test.truth[task]):.4f}",
        )
    console.print(table)
    golden = open_bundle(bundle).manifest.programs
    worst = max(max(entry.max_error.values()) for entry in golden)
    p50, p99 = np.percentile(milliseconds, (50, 99))
    console.print(
        f"largest difference from the Flax reference: {difference:.1e} (at compile time {worst:.1e})"
    )
    console.print(
        f"latency at {test.num_rows // test.num_requests} candidates, measured by the client: "
        f"p50 {p50:.2f} ms, p99 {p99:.2f} ms over {len(milliseconds)} requests"
    )


def show_top(test: Any, served: dict[str, list[np.ndarray]]) -> None:
    """One user's best candidates."""
    features, rows = test.features_of(0), test.rows_of(0)
    first = next(iter(served))
    order = np.argsort(-served[first][0], kind="stable")[:TOP]
    country = features["country"].to_bytes()[0].decode()
    table = Table(
        title=f"top {TOP} of {rows.stop - rows.start} for a user of {features['age'][0]:.0f} from {country}"
    )
    for column in ("rank", "video", "creator", *served, *(f"true {task}" for task in served)):
        table.add_column(column, justify="right")
    creators = features["creator"].to_bytes()
    for rank, row in enumerate(order, start=1):
        table.add_row(
            str(rank),
            str(features["video_id"][row]),
            creators[row].decode(),
            *(f"{served[task][0][row]:.3f}" for task in served),
            *(f"{test.truth[task][rows][row]:.3f}" for task in served),
        )
    console.print(table)


if __name__ == "__main__":
    main()
