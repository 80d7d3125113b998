"""`xlarank serve --processes 2`: real processes, real clients."""

import contextlib
import dataclasses
import json
import os
import queue
import re
import signal
import threading
import time
from pathlib import Path

import grpc
import linear
import numpy as np
import pytest
import tritonclient.grpc as triton
from linear import expected, features
from served import metrics_of, served_by, tensors_of
from xlarank_serving.admin import AdminClient
from xlarank_serving.client import RankingClient

from xlarank.errors import ModelNotFoundError, UnavailableError, UnsupportedError
from xlarank.host import FeatureFileWriter, FeatureSchema, checked_columns

NUM_ROWS = 400_000
"""Of the tables: enough to find their memory among all the rest."""

TABLE_BYTES = NUM_ROWS * 3 * 4

PLAIN = dataclasses.replace(
    linear.SPEC, name="plain", tables=(dataclasses.replace(linear.SPEC.tables[0], rows=NUM_ROWS),)
)
FRESH = dataclasses.replace(
    PLAIN, name="fresh", tables=(dataclasses.replace(PLAIN.tables[0], updatable=True),)
)

CONFIG = """
[processes]
num_processes = 2

[connections]
max_age_seconds = 1

[versions]
watch_seconds = 0.1
"""

WITHIN_SECONDS = 180
"""A process of the lowest priority compiles meanwhile."""


def until(is_so, what):
    """Asks until it is so; for some minutes."""
    deadline = time.monotonic() + WITHIN_SECONDS
    while not (answer := is_so()):
        assert time.monotonic() < deadline, f"expected within {WITHIN_SECONDS} s: {what}"
        time.sleep(0.02)
    return answer


def children(pid):
    """Of a process, all the way down: {pid: parent}."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    below, new = {}, {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - below.keys()
        below |= {child: parents[child] for child in new}
    return below


class Served:
    """A server of two processes and its clients."""

    def __init__(self, process, folder, version):
        self.process, self.folder, self.version = process, folder, version
        self.ready = json.loads(process.stdout.readline() or "null")
        assert self.ready, process.communicate(timeout=60)[1]
        self.scale = 1  # of the newest version of `plain` that serves
        self._said = []
        threading.Thread(target=lambda: self._said.extend(process.stderr), daemon=True).start()

    def said(self, text):
        """Waits until the server has said so in its log."""
        until(lambda: any(text in line for line in self._said.copy()), f"{text!r} in {self._said}")

    def score(self, client, model="plain"):
        return client.score(model, features(5))["value"]

    def check(self, client):
        """Asks for scores of `plain`, and looks at them."""
        np.testing.assert_allclose(self.score(client), expected(5, self.scale), rtol=1e-6)

    def update(self):
        """Changes a row of `fresh`; returns the table's version."""
        with AdminClient(self.ready["admin"]) as admin:
            return admin.update_rows("fresh", "topics", np.array([1]), np.array([[100.0, 0.0, 0.0]]))

    def check_updated(self, client):
        # Topic 1 of every candidate has changed, and of the second one its own, too.
        changed = expected(5, 1) + (100 - 12) * np.array([1, 2, 1, 1, 1])
        np.testing.assert_allclose(self.score(client, "fresh"), changed, rtol=1e-6)

    def publish(self, number, spec, **options):
        return linear.publish(self.version, self.folder / "models", number, spec=spec, **options)

    def metrics(self):
        return {name: float(value) for name, value in metrics_of(self.ready).items()}

    def answered(self):
        """Requests by process."""
        values = self.metrics()
        return [values.get(f'xlarank_worker_requests_total{{process="{index}"}}', 0) for index in (0, 1)]

    def num_up(self):
        """Processes that serve."""
        values = self.metrics()
        return sum(values[f'xlarank_worker_up{{process="{index}"}}'] for index in (0, 1))

    def workers(self):
        """Pids of the two processes that serve: forks of the holder, while it has no other."""

        def found():
            holder = self.holder()
            below = children(self.process.pid)
            workers = {pid for pid, parent in below.items() if parent == holder}
            return workers if len(workers) == 2 else None

        return until(found, "two processes that serve")

    def holder(self):
        own = self.process.pid

        def found():
            return [pid for pid, parent in children(own).items() if parent == own]

        (holder,) = until(
            lambda: len(holders := found()) == 1 and holders, "one process that holds the tables"
        )
        return holder

    def both_answer(self, ask):
        """Asks over and over until each process has answered, which must not take long."""
        before = self.answered()

        def are_both_there():
            for _ in range(20):
                ask()
            return all(now > then for now, then in zip(self.answered(), before, strict=True))

        until(are_both_there, "an answer of each process to one client")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, linear_version):
    folder = tmp_path_factory.mktemp("processes")
    for spec in (PLAIN, FRESH):
        linear.publish(linear_version, folder / "models", 1, spec=spec, rows=[4], with_code=False)
    (folder / "server.toml").write_text(CONFIG)
    return folder


@contextlib.contextmanager
def started(folder, *options):
    with served_by(
        str(folder / "models"),
        "--compile-cache",
        str(folder / "cache"),
        "--config",
        str(folder / "server.toml"),
        *options,
        cwd=folder,
    ) as process:
        below = {}
        try:
            yield process
        finally:
            below = children(process.pid)
            process.kill()
            for pid in below:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def served(folder, linear_version):
    with started(folder, "--admin-port", "0") as process:
        yield Served(process, folder, linear_version)
        below = children(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert [pid for pid in below if Path(f"/proc/{pid}").exists()] == []


def test_one_channel_reaches_both_processes(served):
    with RankingClient(served.ready["grpc"]) as client:
        served.both_answer(lambda: served.check(client))


def test_what_forks_has_one_thread_and_neither_jax_nor_grpc(served):
    def mapped(pid):
        maps = Path(f"/proc/{pid}/maps").read_text()
        return [name for name in ("jaxlib", "grpc/_cython") if name in maps]

    holder = served.holder()
    assert mapped(holder) == []
    assert len(os.listdir(f"/proc/{holder}/task")) == 1
    assert [mapped(pid) for pid in served.workers()] == [["jaxlib", "grpc/_cython"]] * 2


def mappings(pid):
    """(whether shared, inode, kB, kB of it that are resident, kB that are this process's share of those)."""
    text = Path(f"/proc/{pid}/smaps").read_text()
    for block in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", text)[1:]:
        head = block.split(None, 5)
        numbers = dict(re.findall(r"(?m)^(\w+): +(\d+) kB", block))
        yield head[1].endswith("s"), head[4], int(numbers["Size"]), int(numbers["Rss"]), int(numbers["Pss"])


def test_each_table_is_in_memory_once(served):
    inodes = []
    for pid in served.workers():
        large = [found for found in mappings(pid) if found[2] * 1024 >= TABLE_BYTES]
        copied = [(rss, pss) for is_shared, _, _, rss, pss in large if not is_shared]
        # The holder has the pages too, and the other worker.
        assert [True for rss, pss in copied if rss * 1024 >= TABLE_BYTES and pss < 0.5 * rss], large
        inodes.append({inode for is_shared, inode, *_ in large if is_shared})
    assert inodes[0] == inodes[1]
    assert len(inodes[0]) == 1


def tables_in_memory(pid):
    """How much a process has in memory that huge pages were asked for, in tables: those of `plain` alone."""
    text = Path(f"/proc/{pid}/smaps").read_text()
    blocks = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", text)[1:]
    asked = [
        block for block in blocks if re.search(r"(?m)^VmFlags:.* hg\b", block) and block.split()[1][3] == "p"
    ]
    return sum(int(re.search(r"(?m)^Rss: +(\d+) kB", block)[1]) for block in asked) * 1024 / TABLE_BYTES


def test_an_update_through_one_process_is_seen_through_the_other(served):
    number = served.update()
    with RankingClient(served.ready["grpc"]) as client:
        served.both_answer(lambda: served.check_updated(client))
    values = served.metrics()
    labels = 'model="fresh",table="topics",version="1"'
    assert [values[f'xlarank_table_version{{process="{i}",{labels}}}'] for i in (0, 1)] == [number, number]
    assert values[f"xlarank_table_updated_rows_total{{{labels}}}"] == number


def test_models_are_not_loaded_and_features_not_changed_in_one_process_of_many(served):
    with triton.InferenceServerClient(served.ready["admin"]) as admin:
        for call in (admin.load_model, admin.unload_model):
            with pytest.raises(triton.InferenceServerException, match="publish or remove versions") as info:
                call("plain")
            assert info.value.status() == "StatusCode.UNIMPLEMENTED"
        index = admin.get_model_repository_index().models
        assert [(model.name, model.version, model.state) for model in index] == [
            ("fresh", "1", "READY"),
            ("plain", "1", "READY"),
        ]
    with (
        AdminClient(served.ready["admin"]) as admin,
        pytest.raises(UnsupportedError, match="feature stores can't be updated"),
    ):
        admin.remove_features("plain", np.array([1]))
    with (
        AdminClient(served.ready["admin"]) as admin,
        pytest.raises(
            UnsupportedError, match=r"rolled back .* publish the older version again under a number"
        ),
    ):
        admin.rollback("plain")


def counters(values):
    return {
        series: value
        for series, value in values.items()
        if re.search(r"_total\b|^nv_inference_|_bucket|_count\b|_sum\b", series) and "_pending_" not in series
    }


POLICIES = """
[[versions.models]]
name = "plain"
labels = [{ name = "stable", version = 1 }]
"""


def test_a_process_that_is_killed_is_started_again_and_no_counter_falls(served):
    """By the policies of now."""
    config = served.folder / "server.toml"
    with RankingClient(served.ready["grpc"]) as client:

        def ask_by_label():
            scores = client.score("plain", features(5), version="stable")["value"]
            np.testing.assert_allclose(scores, expected(5, 1), rtol=1e-6)

        def has_label():
            with contextlib.suppress(ModelNotFoundError):
                ask_by_label()
                return True

        assert not has_label()
        config.write_text(CONFIG + POLICIES)
        until(has_label, "the label")
        served.update()
        served.both_answer(lambda: served.check(client))
        before, workers = served.metrics(), served.workers()
        os.kill(min(workers), signal.SIGKILL)
        until(lambda: served.num_up() == 1, "a process less")
        for _ in range(10):  # its client is told, and comes to the other
            with contextlib.suppress(UnavailableError):
                served.check(client)
        served.check(client)
        after = served.metrics()
        assert {s: (v, after.get(s)) for s, v in counters(before).items() if after.get(s, -1) < v} == {}
        until(lambda: served.num_up() == 2, "the process again")
        after = served.metrics()
        assert {s: (v, after.get(s)) for s, v in counters(before).items() if after.get(s, -1) < v} == {}
        assert sum(after[f'xlarank_worker_restarts_total{{process="{i}"}}'] for i in (0, 1)) == 1
        assert len(served.workers() - workers) == 1
        served.both_answer(lambda: served.check_updated(client))
        served.both_answer(ask_by_label)
        config.write_text(CONFIG)
        until(lambda: not has_label(), "no label any more")
    served.said("ended: signal 9 (SIGKILL); it is started again in 1 s")


class Load:
    """Clients that ask all the time, each over its own connection."""

    def __init__(self, address, num_clients=4):
        self.errors, self.scales = [], []
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(address,)) for _ in range(num_clients)]

    def _ask(self, address):
        options = [("grpc.use_local_subchannel_pool", 1)]
        with triton.InferenceServerClient(address, channel_args=options) as client:
            while not self._is_over.wait(0.005):
                try:
                    values = client.infer("plain", tensors_of(5), client_timeout=30).as_numpy("value")
                except triton.InferenceServerException as error:
                    self.errors.append(error)
                else:
                    scale = (values[0] - expected(5, 0)[0]) / 3
                    np.testing.assert_allclose(values, expected(5, scale), rtol=1e-5)
                    self.scales.append(round(float(scale), 3))

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._is_over.set()
        for thread in self._threads:
            thread.join()


@contextlib.contextmanager
def open_stream(address):
    """A call on a connection of its own, which doesn't end."""
    requests = queue.SimpleQueue()
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        answers = stream(iter(requests.get, None))
        requests.put(b"")
        next(answers)  # that no such model is there
        yield answers
        requests.put(None)


def test_a_new_version_is_served_by_new_processes_and_no_request_fails(served):
    """Nor does any of them compile, though the version has another program: a helper has before."""
    workers = served.workers()
    programs = {file.name for file in (served.folder / "cache").glob("*xlarank_program*")}
    served.update()
    num_tables = max(tables_in_memory(pid) for pid in workers)
    with Load(served.ready["grpc"]) as load, triton.InferenceServerClient(served.ready["admin"]) as admin:

        def serves(version):
            with contextlib.suppress(triton.InferenceServerException):  # hung up on
                index = admin.get_model_repository_index().models
                ready = [m.version for m in index if m.name == "plain" and m.state == "READY"]
                return ready == [version]

        until(lambda: load.scales, "answers")
        assert serves("1")
        served.publish(2, PLAIN, with_code=False)
        with contextlib.ExitStack() as stack:
            # The old processes stay for as long as these do, which is a minute each.
            streams = [stack.enter_context(open_stream(served.ready["grpc"])) for _ in range(6)]
            deadline = time.monotonic() + WITHIN_SECONDS
            while load.scales[-1] != 2:
                assert time.monotonic() < deadline, "expected answers of version 2"
                streams.append(stack.enter_context(open_stream(served.ready["grpc"])))
                time.sleep(1)
            until(lambda: serves("2"), "one that changes the server, at a new process")
            assert all(stream.is_active() for stream in streams[-6:])
        until(
            lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), "the end of the old processes"
        )
        first = load.scales.index(2)
        until(lambda: len(load.scales) > first + 50, "more answers")
    assert load.errors == []
    assert set(load.scales) == {1, 2}
    served.scale = 2
    # None of version 1 is left. (Where the kernel has no huge pages nothing is counted.)
    assert all(tables_in_memory(pid) < num_tables + 0.5 for pid in served.workers()), num_tables
    assert num_tables < 2
    values = served.metrics()
    served.said("loading plain 2: programs")
    new = {file.name for file in (served.folder / "cache").glob("*xlarank_program*")} - programs
    assert len(new) == 2  # of the larger bucket, for one request and for more
    assert values["xlarank_serving_compiles_total"] == 0
    assert 'nv_inference_request_success{model="plain",version="2"}' in values
    assert 'nv_inference_request_success{model="plain",version="1"}' not in values
    with RankingClient(served.ready["grpc"]) as client:
        served.check_updated(client)  # of a model that didn't change


def test_a_version_that_fails_its_check_leaves_the_old_processes_alone(served):
    workers = served.workers()
    served.publish(3, PLAIN, golden_error=0.5)
    served.said("model plain version 3 isn't served: model 'plain', task 'value'")
    values = served.metrics()
    assert values['xlarank_model_load_failures_total{model="plain"}'] == 1
    assert values['xlarank_model_version_state{model="plain",state="UNAVAILABLE",version="3"}'] == 1
    served.metrics()  # by its answer the processes have heard of it, too
    with triton.InferenceServerClient(served.ready["admin"]) as admin:
        (failed,) = [one for one in admin.get_model_repository_index().models if one.version == "3"]
        assert (failed.name, failed.state) == ("plain", "UNAVAILABLE")
        assert failed.reason.startswith("model 'plain', task 'value'")
    with RankingClient(served.ready["grpc"]) as client:
        served.check(client)
    assert served.workers() == workers


def test_the_server_outlives_the_process_that_holds_the_tables(served):
    workers = served.workers()
    with Load(served.ready["grpc"]) as load:
        os.kill(served.holder(), signal.SIGKILL)
        served.said("the process that holds the tables has ended; its workers go on")
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), "new processes for the old")
    assert load.errors == []
    assert set(load.scales) == {served.scale}
    assert served.num_up() == 2


def test_a_second_server_on_the_port_ends_before_it_loads_anything(served, folder):
    port = served.ready["grpc"].rpartition(":")[2]
    with started(folder, "--port", port) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith(f"xlarank serve: grpc port {port} on 127.0.0.1: expected a free port, got")


def test_what_cannot_be_served_at_first_ends_all_with_the_reason(folder, linear_version, tmp_path):
    linear.publish(linear_version, tmp_path / "models", 1, spec=PLAIN, golden_error=0.5)
    options = ("--compile-cache", str(folder / "cache"), "--processes", "2")
    with served_by(str(tmp_path / "models"), *options) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert "xlarank serve: model 'plain', task 'value'" in err


def test_what_was_removed_serves_as_long_as_its_processes_and_holds_up_nobody(linear_version, tmp_path):
    for spec in (PLAIN, FRESH):
        linear.publish(linear_version, tmp_path / "models", 1, spec=spec, rows=[4], with_code=False)
    (tmp_path / "server.toml").write_text(CONFIG)
    with started(tmp_path) as process:
        served = Served(process, tmp_path, linear_version)
        gone = tmp_path / "models" / "fresh"
        gone.rename(tmp_path / "gone")
        served.said(f"{gone / '1'}: was removed; model fresh version 1 goes on serving")
        with RankingClient(served.ready["grpc"]) as client:
            served.both_answer(lambda: served.score(client, "fresh"))
            os.kill(min(served.workers()), signal.SIGKILL)
            served.said("ended: signal 9 (SIGKILL)")
            served.said(f"{gone / '1'}: was removed; a process that is started again doesn't serve it")
            until(lambda: served.num_up() == 2, "the process again")
            served.both_answer(lambda: served.check(client))
            # What can't be loaded for another reason is said, until it can.
            spoilt = tmp_path / "models" / "plain" / "1" / "manifest.json"
            spoilt.rename(tmp_path / "manifest.json")
            os.kill(min(served.workers()), signal.SIGKILL)
            served.said(f"can't start: plain/1: {spoilt.parent}")
            (tmp_path / "manifest.json").rename(spoilt)
            until(lambda: served.num_up() == 2, "the process once more")
            served.publish(2, PLAIN, rows=[4], with_code=False)
            served.said("versions (('plain', 2),) are served")
        with triton.InferenceServerClient(served.ready["grpc"]) as client:

            def index():
                with contextlib.suppress(triton.InferenceServerException):  # of a process that goes
                    index = client.get_model_repository_index().models
                    return {(model.name, model.version): model.state for model in index}

            expected = {("plain", "1"): "UNAVAILABLE", ("plain", "2"): "READY"}
            until(lambda: index() == expected, "an index of what new processes serve")


def test_without_the_supervisor_the_others_drain_and_end(folder, linear_version):
    with started(folder) as process:
        Served(process, folder, linear_version)
        below = children(process.pid)
        assert len(below) == 3
        process.send_signal(signal.SIGKILL)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), "the end of all processes")


def test_a_bundle_that_is_replaced_in_place_is_served_whole(tmp_path, linear_version):
    """Rows of its tables were updated, after which no golden score can tell whose they are."""
    models = tmp_path / "models"
    linear.publish(linear_version, models, 1, spec=FRESH, rows=[4], with_code=False)
    (tmp_path / "server.toml").write_text(CONFIG)
    with started(tmp_path, "--admin-port", "0") as process:
        served = Served(process, tmp_path, linear_version)
        served.update()
        with RankingClient(served.ready["grpc"]) as client:
            served.both_answer(lambda: served.check_updated(client))
            (models / "fresh" / "1").rename(tmp_path / "before")
            linear.publish(linear_version, models, 1, spec=FRESH, rows=[4], with_code=False, scale=5.0)
            served.publish(1, PLAIN, rows=[4], with_code=False)  # which comes with new processes
            served.said("fresh/1: was replaced by another bundle")

            def is_new():
                with contextlib.suppress(UnavailableError):
                    scores = served.score(client, "fresh")
                    if np.allclose(scores, expected(5, 5.0), rtol=1e-6):
                        return True
                    changed = expected(5, 1) + (100 - 12) * np.array([1, 2, 1, 1, 1])
                    np.testing.assert_allclose(scores, changed, rtol=1e-6)  # else wholly the one before
                return False

            until(is_new, "scores of the new bundle")
            until(lambda: all(is_new() for _ in range(20)), "nobody has the old one")
            served.both_answer(lambda: np.testing.assert_equal(is_new(), True))


@pytest.mark.parametrize("options", [(), ("--processes", "1")], ids=["two", "one"])
def test_a_log_that_cannot_be_written_keeps_nothing_from_being_served(tmp_path, linear_version, options):
    """Its disk is full, or what read it has ended."""
    models = tmp_path / "models"
    linear.publish(linear_version, models, 1, spec=PLAIN, rows=[4], with_code=False)
    (tmp_path / "server.toml").write_text(CONFIG)
    with started(tmp_path, *options) as process:
        ready = json.loads(process.stdout.readline())
        process.stderr.close()
        linear.publish(linear_version, models, 2, spec=PLAIN, rows=[4], with_code=False)
        with RankingClient(ready["grpc"]) as client:

            def is_new():
                with contextlib.suppress(UnavailableError):
                    return np.allclose(client.score("plain", features(5))["value"], expected(5, 2), rtol=1e-6)

            until(is_new, "the new version")


def test_a_model_that_failed_at_the_start_is_unavailable_and_keeps_the_server_from_being_ready(
    tmp_path, linear_version
):
    models = tmp_path / "models"
    linear.publish(linear_version, models, 1, spec=PLAIN, rows=[4], with_code=False)
    linear.publish(linear_version, models, 1, spec=FRESH, rows=[4], with_code=False, golden_error=1.0)
    (tmp_path / "server.toml").write_text(CONFIG)
    with started(tmp_path) as process:
        ready = json.loads(process.stdout.readline())
        with triton.InferenceServerClient(ready["grpc"]) as client:
            until(lambda: not client.is_server_ready(), "the word of the model that failed")
            assert client.is_server_live()
        with RankingClient(ready["grpc"]) as client:
            np.testing.assert_allclose(client.score("plain", features(5))["value"], expected(5, 1), rtol=1e-6)
            for version in ("", "1"):
                with pytest.raises(UnavailableError, match=r"'fresh'.* is not at ready state: .*golden"):
                    client.score("fresh", features(5), version=version)
        linear.publish(linear_version, models, 2, spec=FRESH, rows=[4], with_code=False)
        with triton.InferenceServerClient(ready["grpc"]) as client:
            until(client.is_server_ready, "a version that is right")


def test_processes_come_back_though_a_model_with_a_feature_file_was_removed(tmp_path, linear_version):
    """Nobody looks at the repository: only the start asks that each file has its model."""
    for spec in (PLAIN, FRESH):
        linear.publish(linear_version, tmp_path / "models", 1, spec=spec, rows=[4], with_code=False)
    schema = FeatureSchema.of(FRESH.candidate_features)
    with FeatureFileWriter(tmp_path / "features", schema, model="fresh") as writer:
        rows = {"likes": [[1.0, 0.0]], "topics": [[]]}
        writer.add(np.array([7]), checked_columns(schema.rows_spec(FRESH), np.array([7]), rows))
    (tmp_path / "server.toml").write_text("[processes]\nnum_processes = 2\n")
    features_of_fresh = ("--features", str(tmp_path / "features"))
    with started(tmp_path, *features_of_fresh) as process:
        served = Served(process, tmp_path, linear_version)
        before = served.workers()
        (tmp_path / "models" / "fresh").rename(tmp_path / "before")
        os.kill(min(before), signal.SIGKILL)
        until(lambda: len(served.workers() - before) == 1, "the process again")
        until(lambda: served.num_up() == 2, "both processes")
        with RankingClient(served.ready["grpc"]) as client:
            served.check(client)
    with started(tmp_path, *features_of_fresh) as process:
        out, err = process.communicate(timeout=60)
        assert (out, process.returncode) == ("", 1)
        assert "was built for model 'fresh'; served are ['plain']" in err
