"""`xlarank inspect` shows, and returns as JSON, what the bundle holds."""

import argparse
import json

import numpy as np
import pytest

from xlarank.bundle import BundleWriter, Manifest, ProgramEntry
from xlarank.cli import inspect
from xlarank.errors import BundleError
from xlarank.spec import Bucket, ErrorBudget, ModelSpec, RankRequest, Tolerance


@pytest.fixture
def bundle_path(tmp_path):
    spec = ModelSpec.from_dict(
        {
            "name": "feed",
            "features": [
                {
                    "name": "country",
                    "kind": "id",
                    "scope": "context",
                    "table": "countries",
                    "dtype": "string",
                    "default": "[red]",
                    "preprocessing": [{"op": "vocabulary", "values": ["de", "nl"]}],
                },
                {
                    "name": "topics",
                    "kind": "id_list",
                    "scope": "candidate",
                    "table": "topics",
                    "combiner": "mean",
                    "max_length": 8,
                },
                {
                    "name": "counts",
                    "kind": "dense",
                    "scope": "candidate",
                    "width": 2,
                    "preprocessing": ["log1p", {"op": "clip", "low": 0, "high": 9}],
                },
            ],
            "tables": [
                {"name": "countries", "dim": 4, "rows": 3},
                {"name": "topics", "dim": 8, "rows": 1000, "out_of_range": "zero"},
            ],
            "tasks": [{"name": "like"}, {"name": "stay", "kind": "regression", "output": "seconds"}],
        }
    )
    request = RankRequest(spec, {"topics": [[1, 2], []], "counts": np.ones((2, 2), np.float32)})
    with BundleWriter(tmp_path, "feed", 7) as writer:
        programs = tuple(
            ProgramEntry(
                bucket=bucket,
                form="plain",
                prepared=(0, 1),
                file=writer.add_program(f"{bucket}.bin", bytes(bucket.rows)),
                precision="float32",
                max_error={"like": 2.5e-7, "stay": 0.0},
                p99_error={"like": 2e-7, "stay": 0.0},
                seconds={"cpu": bucket.rows / 1024},
            )
            for bucket in (Bucket(8, 1), Bucket(2048, 1))
        )
        writer.add_params({"w": np.zeros((3, 5), np.float32), "b": np.zeros(5, np.float32)})
        for table in spec.tables:
            writer.add_table(table.name, np.zeros((table.num_rows, table.dim), np.float32))
        writer.add_golden([request], {"scores": dict.fromkeys(("like", "stay"), np.zeros(2, np.float32))})
        (writer.cache_dir / "code").write_bytes(b"code")
        return writer.publish(
            Manifest(
                spec=spec,
                programs=programs,
                params=("w", "b"),
                num_prepared=2,
                budget=ErrorBudget(),
                architecture="a1b2",
                tolerance=Tolerance(),
                provenance={"created": "2026-01-02T03:04:05Z"},
                fingerprint={"jax": "0.12.0"},
            )
        )


def inspected(*argv):
    parser = argparse.ArgumentParser()
    inspect.add_parser(parser.add_subparsers())
    args = parser.parse_args(["inspect", *map(str, argv)])
    return args.run(args)


def test_the_json_holds_what_the_bundle_holds(bundle_path):
    facts = inspected(bundle_path)
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["model"], facts["version"], facts["verified"]) == ("feed", 7, True)
    assert [feature["name"] for feature in facts["features"]] == ["country", "topics", "counts"]
    assert facts["features"][0]["preprocessing"] == ["vocabulary of 2"]
    assert facts["features"][2]["preprocessing"] == ["log1p", "clip low=0 high=9"]
    assert facts["tables"][1] == {
        "name": "topics",
        "rows": 1000,
        "dim": 8,
        "dtype": "float32",
        "out_of_range": "zero",
        "bytes": 32_000,
        "updatable": False,
        "device_rows": 0,
        "device_bytes": 0,
        "device_capacities": {},
        "features": ["topics"],
    }
    assert facts["buckets"][1] == {
        "rows": 2048,
        "requests": 1,
        "form": "plain",
        "precision": "float32",
        "program_bytes": 2048,
        "max_error": {"like": 2.5e-7, "stay": 0.0},
        "p99_error": {"like": 2e-7, "stay": 0.0},
        "seconds": {"cpu": 2.0},
    }
    assert facts["params"] == {"arrays": 2, "values": 20}
    assert facts["golden"] == {"requests": 1, "rows": 2}
    assert facts["cache"] == {"listed_files": 1, "whole_files": 1}
    assert facts["bytes"]["programs"] == 2056
    assert facts["bytes"]["total"] == sum(size for part, size in facts["bytes"].items() if part != "total")
    assert facts["fingerprint"] == {"jax": "0.12.0"}


def test_the_tables_show_it_to_a_person(bundle_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    inspected(bundle_path.parent)
    shown = capsys.readouterr().out
    assert shown.startswith(f"feed version 7: every file is whole\n{bundle_path}\n")
    for text in (
        "vocabulary of 2",
        "[red]",
        "mean 8",
        "float32 x 2",
        "31.2 KiB",
        "2000.000",
        "2.5e-07",
        "20 in 2 arrays",
        "1 with 2 candidates",
        "1 whole of 1",
        "tolerance 1e-05 on probabilities",
        "2026-01-02T03:04:05Z",
        "0.12.0",
    ):
        assert text in shown


def test_a_damaged_bundle_is_refused_unless_told_not_to_look(bundle_path, capsys):
    file = bundle_path / "programs/8x1.bin"
    file.write_bytes(b"\x01" + file.read_bytes()[1:])
    with pytest.raises(BundleError, match=r"8x1\.bin: damaged"):
        inspected(bundle_path)
    assert inspected("--no-verify", bundle_path)["verified"] is False
    assert "sizes checked, contents not" in capsys.readouterr().out


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        inspected("--help")
    assert "xlarank inspect models/movielens/3" in capsys.readouterr().out
