"""`xlarank replay` scores requests again that an engine kept."""

import json

import numpy as np
import pytest
import shop
from flax import nnx

from xlarank.cli import main
from xlarank.compiler import build_bundle, random_requests
from xlarank.runtime import Captures, Engine
from xlarank.spec import CaptureConfig


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A repository and a folder with a slow request of its model, and one that is said to have failed."""
    folder = tmp_path_factory.mktemp("kept")
    build_bundle(
        shop.Shop(rngs=nnx.Rngs(0)), shop.SPEC, shop.make_tables(), out=folder, buckets=[8], tune_seconds=0
    )
    captures = Captures(CaptureConfig(folder=folder / "captures", slow_ms=1e-6))
    with Engine.load(folder / "shop", num_devices=1, captures=captures) as engine:
        first, second = random_requests(shop.SPEC, 2, num_candidates=20)
        engine.score(first)
        captures.keep_fault("shop", 1, second, "row 3: overflow")
    captures.close()
    return folder


@pytest.fixture
def run(capsys, kept):
    def run(*words):
        status = main.main(main.parse(["xlarank", "replay", *map(str, words)]))
        return status, *capsys.readouterr()

    return run


def test_kept_requests_get_the_scores_that_they_got(run, kept):
    _, out, _ = run(kept / "captures", "--bundle", kept / "shop", "--json", "--repeats", "2")
    facts = json.loads(out)
    by_reason = {entry["reason"]: entry for entry in facts["requests"]}
    assert set(by_reason) == {"slow", "fault"}
    assert by_reason["slow"]["max_difference"] <= 1e-6
    assert by_reason["slow"]["candidates"] == 20
    assert by_reason["slow"]["ms"] > 0
    assert by_reason["fault"]["max_difference"] is None
    assert by_reason["fault"]["then"] == "row 3: overflow"
    assert by_reason["fault"]["error"] is None


def test_the_page_says_what_is_different(run, kept, tmp_path):
    status, out, _ = run(kept / "captures", "--bundle", kept / "shop")
    assert status == 0
    assert "shop version 1: 2 requests scored again" in out
    assert "the same scores within" in out
    assert "row 3: overflow" in out
    other = {name: table * np.float32(2) for name, table in shop.make_tables().items()}
    build_bundle(shop.Shop(rngs=nnx.Rngs(0)), shop.SPEC, other, out=tmp_path, buckets=[8], tune_seconds=0)
    _, out, _ = run(kept / "captures", "--bundle", tmp_path / "shop")
    assert "scores differ by up to" in out


def test_what_can_not_be_replayed_is_told(run, kept, tmp_path):
    assert "expected kept requests (*.safetensors), found none" in run(tmp_path, "--bundle", kept / "shop")[2]
    assert "--repeats must be >= 1; was 0" in run(tmp_path, "--bundle", kept / "shop", "--repeats", "0")[2]
    (file,) = (kept / "captures").glob("*-slow-*.safetensors")
    (tmp_path / "a.safetensors").write_bytes(file.read_bytes())
    (tmp_path / "a.json").write_text("{")
    assert "expected the facts of a kept request" in run(tmp_path, "--bundle", kept / "shop")[2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"cut off", "a.safetensors"),
        ("a.json", b"{", "expected the facts of a kept request"),
        ("a.json", b"[]", "expected the facts of a kept request: expected an object, got list"),
    ],
)
def test_a_damaged_file_is_told_beside_the_others(run, kept, tmp_path, name, content, message):
    (file,) = (kept / "captures").glob("*-slow-*.safetensors")
    for stem in ("a", "b"):
        (tmp_path / f"{stem}.safetensors").write_bytes(file.read_bytes())
    (tmp_path / name).write_bytes(content)
    status, out, _ = run(tmp_path, "--bundle", kept / "shop")
    assert status == 0
    assert "unreadable: " in out
    assert "the same scores within" in out
    damaged, whole = json.loads(run(tmp_path, "--bundle", kept / "shop", "--json")[1])["requests"]
    assert message in damaged["error"]
    assert damaged["candidates"] is damaged["ms"] is None
    assert whole["error"] is None


def test_a_file_of_several_requests_is_no_kept_one(run, kept):
    (golden,) = (kept / "shop").glob("*/golden.safetensors")
    _, _, err = run(golden, "--bundle", kept / "shop")
    assert "golden.safetensors: expected one kept request, got" in err
