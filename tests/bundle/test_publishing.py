"""A version appears whole or not at all, whatever becomes of its writer."""

import dataclasses
import os
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from xlarank.bundle import BundleWriter, latest_version, list_versions, open_bundle
from xlarank.bundle.staging import Staging
from xlarank.errors import BundleError, ConfigError

# Writes versions of the model "bare"; waits for a line on stdin before it publishes each.
PUBLISHER = """
import sys
import numpy as np
from xlarank.bundle import BundleWriter, Manifest, ProgramEntry
from xlarank.spec import Bucket, ErrorBudget, ModelSpec, RankRequest, Tolerance

repository, count = sys.argv[1], int(sys.argv[2])
spec = ModelSpec.from_dict({
    "name": "bare",
    "features": [{"name": "x", "kind": "dense", "scope": "candidate"}],
    "tasks": [{"name": "like"}],
})
scores = {"scores": {"like": np.full(1, 0.5, np.float32)}}
for number in range(count):
    with BundleWriter(repository, "bare") as writer:
        file = writer.add_program("1x1.bin", f"{sys.argv[3]} {number}".encode())
        writer.add_params({})
        writer.add_golden([RankRequest(spec, {"x": [1.0]})], scores)
        print("staged", flush=True)
        if number == 0:
            sys.stdin.readline()
        program = ProgramEntry(bucket=Bucket(1, 1), form="plain", prepared=(), file=file, precision="float32",
                               max_error={"like": 0.0}, p99_error={"like": 0.0}, seconds={})
        manifest = Manifest(spec=spec, programs=(program,), params=(), num_prepared=0, tolerance=Tolerance(),
                            budget=ErrorBudget(), architecture="", provenance={}, fingerprint={})
        print(writer.publish(manifest), flush=True)
"""


@pytest.fixture
def publisher(tmp_path):
    """Starts processes that publish `count` versions each into `tmp_path`; stops what is left of them."""
    processes = []

    def start(count, name):
        process = subprocess.Popen(
            [sys.executable, "-c", PUBLISHER, str(tmp_path), str(count), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "staged\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def everything_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_versions_ascend_from_the_highest_there_is(publish, tmp_path):
    assert [publish().name, publish().name] == ["1", "2"]
    assert publish(version=9).name == "9"
    assert publish().name == "10"
    assert list_versions(tmp_path) == {"tiny": [1, 2, 9, 10]}
    assert [open_bundle(tmp_path / "tiny" / str(v)).manifest.version for v in (1, 10)] == [1, 10]


def test_a_published_version_is_never_replaced(publish, fill, tiny_manifest, tmp_path):
    publish(version=3)
    before = (tmp_path / "tiny/3/manifest.json").read_bytes()
    with pytest.raises(BundleError, match="tiny/3: exists already; a published version never changes"):
        publish(version=3)
    with BundleWriter(tmp_path, "tiny", 4) as slow:
        fill(slow)
        publish(version=4)
        with pytest.raises(BundleError, match="tiny/4: exists already"):
            slow.publish(tiny_manifest)
    assert (tmp_path / "tiny/3/manifest.json").read_bytes() == before
    assert sorted(os.listdir(tmp_path / "tiny")) == ["3", "4"]


def test_a_writer_that_loses_the_race_takes_the_next_version(publish, fill, tiny_manifest, tmp_path):
    with BundleWriter(tmp_path, "tiny") as slow:
        fill(slow)
        assert publish().name == "1"
        assert slow.publish(tiny_manifest).name == "2"
    one, other = Staging(tmp_path / "m"), Staging(tmp_path / "m")
    for staging in (one, other):
        (staging.path / "file").touch()
    assert one.publish(1) == tmp_path / "m" / "1"
    assert other.publish(1) is None
    (tmp_path / "m" / "2").mkdir()  # empty, so that a bare rename would replace it
    assert other.publish(2) is None
    assert other.publish(3) == tmp_path / "m" / "3"


def test_nothing_is_visible_before_publish_and_nothing_is_left_without_it(fill, tmp_path):
    repository = tmp_path / "repository"
    with BundleWriter(repository, "tiny") as writer:
        fill(writer)
        assert writer.staging.parent == repository / "tiny"
        assert writer.staging.name.startswith(".tmp-")
        assert list_versions(repository) == {}
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing_behind(fill, tmp_path, exception):
    def write():
        with BundleWriter(tmp_path / "repository", "tiny") as writer:
            fill(writer)
            raise exception

    with pytest.raises(exception):
        write()
    assert everything_in(tmp_path) == []


def test_a_failed_publish_leaves_the_other_versions_alone(publish, fill, tiny_manifest, tmp_path):
    publish()
    before = everything_in(tmp_path)
    with BundleWriter(tmp_path, "tiny") as writer:
        fill(writer)
        (writer.staging / "programs/4x1.bin").write_bytes(b"disk fault!")
        with pytest.raises(
            BundleError, match=r"programs/4x1\.bin: reads back different from what was written"
        ):
            writer.publish(tiny_manifest)
    assert everything_in(tmp_path) == before


def test_processes_that_publish_at_the_same_time_get_different_versions(publisher, tmp_path):
    count = 6
    processes = [publisher(count, name) for name in ("left", "right")]
    for process in processes:  # both are past their imports: now they race
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate()[0].split() for process in processes]
    published = [line for lines in answers for line in lines if line != "staged"]
    assert len(set(published)) == len(published) == 2 * count
    assert list_versions(tmp_path) == {"bare": list(range(1, 2 * count + 1))}
    programs = set()
    for path in published:
        bundle = open_bundle(path)
        assert str(bundle.manifest.version) == bundle.path.name
        programs.add(bundle.program(bundle.manifest.programs[0]).decode())
    assert programs == {f"{name} {number}" for name in ("left", "right") for number in range(count)}
    assert sorted(os.listdir(tmp_path / "bare"), key=int) == [str(v) for v in range(1, 2 * count + 1)]


def test_a_killed_writer_leaves_no_version_and_the_next_one_cleans_up_after_it(publisher, tmp_path):
    process = publisher(1, "victim")
    (abandoned,) = (tmp_path / "bare").iterdir()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert abandoned.is_dir()
    assert list_versions(tmp_path) == {}
    survivor = publisher(1, "survivor")
    assert not abandoned.exists()
    assert survivor.communicate("go\n")[0].split() == [str(tmp_path / "bare" / "1")]
    assert list_versions(tmp_path) == {"bare": [1]}


def test_the_folder_of_a_living_writer_is_left_alone(publisher, publish, fill, tiny_manifest, tmp_path):
    process = publisher(1, "slow")
    with BundleWriter(tmp_path, "bare"):
        pass
    with BundleWriter(tmp_path, "tiny") as slow:
        fill(slow)
        assert publish().name == "1"
        assert slow.publish(tiny_manifest).name == "2"
    assert process.communicate("go\n")[0].split() == [str(tmp_path / "bare" / "1")]


def test_params_and_tables_of_any_memory_order_are_written_right(tiny_golden, tiny_manifest, tmp_path):
    wide = np.arange(66, dtype=np.float32).reshape(11, 6)
    params = {
        "mlp.kernel": np.arange(24, dtype=np.float32).reshape(4, 6).T[::2],
        "bias": np.array(3, np.float32),
        "half": np.arange(5, dtype=np.float16),
        "brain": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(3, 2).T,
        "flags": np.array([True, False]),
        "a.last": np.arange(10, dtype=np.float32)[::-2],
    }
    tiny_manifest = dataclasses.replace(tiny_manifest, params=tuple(params))
    with BundleWriter(tmp_path, "tiny") as writer:
        for program in tiny_manifest.programs:
            writer.add_program(os.path.basename(program.file), b"p")
        writer.add_program("prepare.bin", b"p")
        writer.add_params(params)
        writer.add_table("users", wide[:, ::2])
        writer.add_table("items", np.asfortranarray(wide[:5, 3:4]))
        writer.add_golden(*tiny_golden)
        bundle = open_bundle(writer.publish(tiny_manifest))
    for name, array in params.items():
        np.testing.assert_array_equal(bundle.params()[name], array)
        assert bundle.params()[name].shape == array.shape
    np.testing.assert_array_equal(bundle.tables()["users"], wide[:, [0, 2, 4]])
    np.testing.assert_array_equal(bundle.tables()["items"], wide[:5, 3:4])


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (
            lambda w: w.add_table("t", np.zeros((2, 2))),
            r"table 't': expected an array \[R, n\] of float32, .*uint8, got float64",
        ),
        (lambda w: w.add_table("t", np.zeros(2, np.float32)), r"got float32 of shape \[2\]"),
        (lambda w: w.add_table("../t", np.zeros((2, 2), np.float32)), r"file name .* got '../t'"),
        (
            lambda w: w.add_params({"w": np.zeros(2)}),
            r"array 'w': expected one of .*'float32'.*, got dtype\('float64'\)",
        ),
        (lambda w: w.add_params({"w": np.zeros(2, ">f4")}), r"array 'w': .* got dtype\('>f4'\)"),
        (lambda w: w.add_program("a/b", b""), r"file name .* got 'a/b'"),
        (lambda w: w.add_program(".hidden", b""), r"file name"),
        (lambda w: w.add_text("manifest.json", ""), r"'manifest.json' is there already or the writer's own"),
        (lambda w: [w.add_text("a", ""), w.add_text("a", "")], r"'a' is there already"),
    ],
)
def test_what_the_format_can_not_hold_is_refused_when_added(tmp_path, add, message):
    with BundleWriter(tmp_path, "tiny") as writer, pytest.raises(ConfigError, match=message):
        add(writer)


def test_golden_requests_need_scores_of_every_task(tmp_path, tiny_golden):
    requests, values = tiny_golden
    like = {"like": values["scores"]["like"]}
    with BundleWriter(tmp_path, "tiny") as writer:
        with pytest.raises(ConfigError, match=r"expected scores of the tasks .* got none of \['stay'\]"):
            writer.add_golden(requests, {"scores": like, "labels": values["scores"]})
        with pytest.raises(ConfigError, match=r"golden\.safetensors: expected at least one request"):
            writer.add_golden([], values)


def test_a_manifest_that_does_not_fit_what_was_added_is_refused(tmp_path, fill, tiny_manifest, tiny_spec):
    with BundleWriter(tmp_path, "tiny") as writer:
        with pytest.raises(ConfigError, match=r"needs \['params.safetensors', .* which were not added"):
            writer.publish(tiny_manifest)
        fill(writer)
        with pytest.raises(
            ConfigError, match=r"orders the params \['bias'\], those added are \['a.last', 'b"
        ):
            writer.publish(dataclasses.replace(tiny_manifest, params=("bias",)))
        renamed = dataclasses.replace(tiny_spec, name="other")
        with pytest.raises(ConfigError, match="bundle of 'tiny': the manifest is of model 'other'"):
            writer.publish(dataclasses.replace(tiny_manifest, spec=renamed))
        users, items = tiny_spec.tables
        more_rows = dataclasses.replace(tiny_spec, tables=(users, dataclasses.replace(items, rows=6)))
        with pytest.raises(BundleError, match=r"items\.npy: expected an npy file of float32 \[6, 1\]"):
            writer.publish(dataclasses.replace(tiny_manifest, spec=more_rows))
        assert writer.publish(tiny_manifest).name == "1"
    assert latest_version(tmp_path, "tiny") == 1


@pytest.mark.parametrize(
    ("model", "version"), [("", 1), (".tmp-x", 1), ("a/b", 1), ("..", 1), ("m", 0), ("m", -3)]
)
def test_a_model_or_version_that_can_not_be_a_folder_is_refused(tmp_path, model, version):
    with pytest.raises(ConfigError, match="bundle"):
        BundleWriter(tmp_path, model, version)


def test_a_closed_writer_says_so(publish, fill, tiny_manifest, tmp_path):
    with BundleWriter(tmp_path, "tiny") as writer:
        fill(writer)
        writer.publish(tiny_manifest)
        with pytest.raises(ConfigError, match="isn't open, or has published already"):
            writer.add_text("late.txt", "")
    with pytest.raises(ConfigError, match="isn't open"):
        _ = BundleWriter(tmp_path, "tiny").staging


def test_a_repository_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match=r"file/tiny: can't be written: (Not a directory|File exists)"):
        BundleWriter(tmp_path / "file", "tiny").__enter__()
