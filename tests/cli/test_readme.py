"""The lines of README.md, as they stand there, in a folder of a user's own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import xlarank
from xlarank.cli import main
from xlarank.training.feed import FeedSize, read, write_feed

README = Path(__file__).parents[2] / "README.md"
MAX_PYTHON_LINES = 30

pytestmark = pytest.mark.once


def blocks(heading, language):
    """Code under a heading, by language."""
    section = README.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)


def run(*command, folder):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "XDG_CACHE_HOME": str(folder)}
    ended = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_python_example_runs_and_is_short(tmp_path):
    (example,) = blocks("From Python", "python")
    assert len([line for line in example.splitlines() if line.strip()]) <= MAX_PYTHON_LINES
    (tmp_path / "example.py").write_text(example)
    out = run("example.py", folder=tmp_path)
    scores = re.fullmatch(r"\{'like': array\(\[(.*)\], dtype=float32\)\}\n", out)
    assert scores, out
    # Dot products of the tables that the example draws.
    rng = np.random.default_rng(0)
    users = rng.normal(size=(1000, 16)).astype(np.float32)
    films = rng.normal(size=(5000, 16)).astype(np.float32)
    user = users[7] + films[[3, 14, 15]].mean(axis=0)
    expected = 1 / (1 + np.exp(-(films[[92, 65, 35]] @ user)))
    np.testing.assert_allclose([float(text) for text in scores[1].split(",")], expected, rtol=1e-5, atol=1e-6)


def test_the_model_of_your_own_is_trained_compiled_and_scored(tmp_path):
    (model,) = blocks("A model of your own", "python")
    (config,) = blocks("A model of your own", "toml")
    (tmp_path / "towers.py").write_text(model)
    (tmp_path / "towers.toml").write_text(config)
    size = FeedSize(users=50, videos=60, creators=9, train=(60, 8), validation=(20, 4), test=(3, 40))
    write_feed(tmp_path / "artifacts/demo/data", size=size)
    section = README.read_text(encoding="utf-8").split("\n## A model of your own\n")[1]
    shown = re.search(r"`xlarank (train towers\.toml [^`]+)`", section)
    assert shown, section
    words = shown[1].split()
    run("-m", "xlarank.cli", *words, folder=tmp_path)
    checkpoint = words[words.index("--out") + 1]
    words = [
        "compile",
        "towers.toml",
        "--checkpoint",
        checkpoint,
        "--out",
        "models",
        "--buckets",
        "8",
        "--tune-seconds",
        "0",
        "--json",
    ]
    compiled = json.loads(run("-m", "xlarank.cli", *words, folder=tmp_path).splitlines()[-1])
    assert compiled["path"] == "models/towers/1"
    assert max(max(bucket["max_error"].values()) for bucket in compiled["buckets"]) <= 1e-5
    test = read(tmp_path / "artifacts/demo/data").test
    with xlarank.Engine.load(tmp_path / compiled["path"]) as engine:
        for request in test.requests(engine.spec):
            scores = engine.score(request)
            assert {task: len(values) for task, values in scores.items()} == {"finish": 40, "share": 40}


@pytest.mark.parametrize(
    "text", re.findall(r"^\$ (xlarank .*)$", README.read_text(encoding="utf-8"), re.MULTILINE)
)
def test_the_commands_shown_are_commands(text):
    words = text.split("#")[0].split()
    assert main.parse(words).command == words[1]
