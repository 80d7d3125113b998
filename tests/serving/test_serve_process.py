"""`xlarank serve` as a process of its own, over a real bundle."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import linear
import numpy as np
import pytest
import tritonclient.grpc as triton
import trustme
from linear import expected, features
from served import environment, metrics_of, read_until, served_by, tensors_of
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.admin import AdminClient
from xlarank_serving.channel import ClientTls
from xlarank_serving.client import RankingClient

from xlarank.errors import AccessError, ModelNotFoundError, RequestError, UnavailableError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    linear.build(folder / "models")
    return folder


def started(folder, *options):
    """A server process of the folder's models."""
    return served_by(str(folder / "models"), "--compile-cache", str(folder / "cache"), *options)


@pytest.fixture(scope="module")
def running(folder):
    with started(folder, "--port-file", str(folder / "ports.json")) as process:
        line = process.stdout.readline()
        assert line, process.communicate(timeout=60)[1]
        yield json.loads(line)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["models"] == ["linear/1"]


def test_the_ready_line_and_the_port_file_say_the_same(running, folder):
    assert json.loads((folder / "ports.json").read_text()) == running
    assert running["models"] == ["linear/1"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("num_candidates", [0, 1, 7, 16, 40])
def test_scores_over_the_wire_are_the_model_s(running, num_candidates, packed):
    with RankingClient(running["grpc"]) as client:
        scores = client.score("linear", features(num_candidates), packed=packed)
    np.testing.assert_allclose(scores["value"], expected(num_candidates), rtol=1e-5, atol=1e-4)


def test_tritonclient_gets_the_same_scores(running):
    with triton.InferenceServerClient(running["grpc"]) as client:
        scores = client.infer("linear", tensors_of(5)).as_numpy("value")
    np.testing.assert_allclose(scores, expected(5), rtol=1e-5, atol=1e-4)


def test_bad_requests_between_good_ones_harm_nobody(running):
    with RankingClient(running["grpc"]) as client:
        for _ in range(3):
            with pytest.raises(RequestError, match=r"feature 'topics': expected ids in \[0, 10\)"):
                client.score("linear", features(2) | {"topics": [[1], [10]]})
            with pytest.raises(RequestError, match="feature 'age': expected finite floats"):
                client.score("linear", features(2) | {"age": np.nan})
            with pytest.raises(ModelNotFoundError, match="'linear' version 2 is not found"):
                client.score("linear", features(2), version=2)
            scores = client.score("linear", features(9))["value"]
            np.testing.assert_allclose(scores, expected(9), rtol=1e-5, atol=1e-4)
    with (
        triton.InferenceServerClient(running["grpc"]) as client,
        pytest.raises(triton.InferenceServerException, match="'linear' version 2 is not found"),
    ):
        client.infer("linear", tensors_of(5), model_version="2")
    assert metrics_of(running)['xlarank_requests_refused_total{status="NOT_FOUND"}'] == "1.0"


def test_metrics_count_what_was_served(running):
    with RankingClient(running["grpc"]) as client:
        client.score("linear", features(3))
    values = metrics_of(running)
    labels = '{model="linear",version="1"}'
    assert float(values[f"nv_inference_request_success{labels}"]) >= 1
    assert float(values[f"nv_inference_count{labels}"]) >= 3
    assert float(values[f"xlarank_request_path_compiles_total{labels}"]) == 0


CONFIG = """
[security]
tls_certificate = "server.pem"
tls_key = "server.key"
tokens = "tokens"
admin_tokens = "admin-tokens"
open_metrics = true
plain_http = true

[models]
repository = "models"
compile_cache = "cache"

[tables]
memory = "mmap"
"""


@pytest.fixture(scope="module")
def by_config(folder):
    """Ready line of a server that all options of `CONFIG` are asked of, and how a client trusts it."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(folder / "server.key")
    issued.cert_chain_pems[0].write_to_path(folder / "server.pem")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    (folder / "tokens").write_text("a-token-of-rankers\n")
    (folder / "admin-tokens").write_text("a-token-of-admins\n")
    (folder / "server.toml").write_text(CONFIG)
    with served_by("--config", str(folder / "server.toml"), "--grace", "5") as process:
        yield json.loads(process.stdout.readline()), ClientTls(server_ca=folder / "ca.pem")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


def test_a_config_file_turns_on_tls_and_tokens(by_config):
    ready, tls = by_config
    name = 'nv_inference_request_success{model="linear",version="1"}'
    before = float(metrics_of(ready).get(name, 0))
    with RankingClient(ready["grpc"], tls=tls, token="a-token-of-rankers") as client:
        scores = client.score("linear", features(9))["value"]
    np.testing.assert_allclose(scores, expected(9), rtol=1e-5, atol=1e-4)
    with RankingClient(ready["grpc"], tls=tls) as client, pytest.raises(AccessError, match="got none"):
        client.score("linear", features(9))
    rows, values = np.array([1]), np.ones((1, 3))
    for token, error, told in (
        ("a-token-of-rankers", AccessError, "expected an admin token"),
        ("a-token-of-admins", RequestError, "'topics' .*updatable"),
    ):
        with AdminClient(ready["grpc"], tls=tls, token=token) as admin, pytest.raises(error, match=told):
            admin.update_rows("linear", "topics", rows, values)
    with (
        AdminClient(ready["grpc"], tls=tls, token="a-token-of-admins") as admin,
        pytest.raises(ModelNotFoundError, match=r"rollback: expected an older version, there are \[1\]"),
    ):
        admin.rollback("linear")
    assert float(metrics_of(ready)[name]) == before + 1


def test_mapped_tables_are_served_from_their_files_and_checked(by_config):
    ready, tls = by_config
    with RankingClient(ready["grpc"], tls=tls, token="a-token-of-rankers") as client:
        scores = client.score("linear", features(9))["value"]
    np.testing.assert_allclose(scores, expected(9), rtol=1e-5, atol=1e-4)
    values = metrics_of(ready)
    labels = '{model="linear",version="1"}'
    num_bytes = float(values[f"xlarank_table_bytes{labels}"])
    assert 0 < num_bytes <= 120  # in float32
    assert float(values[f"xlarank_table_checked_bytes{labels}"]) == num_bytes
    assert float(values[f"xlarank_table_huge_page_bytes{labels}"]) == 0


def test_sigterm_lets_accepted_requests_finish(folder):
    num_candidates = 20_000  # 1250 batches: most are still to run when the signal comes
    values = features(num_candidates)
    request = messages.ModelInferRequest(model_name="linear")
    for name, datatype, array in (
        ("age", "FP32", np.float32([3.0])),
        ("likes", "FP32", values["likes"]),
        ("topics", "INT64", np.array(values["topics"]).reshape(-1)),
        ("topics.lengths", "INT32", np.full(num_candidates, 2, np.int32)),
    ):
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    with started(folder, "--max-queued-rows", "1000000", "--max-queue-ms", "60000") as process:
        ready = json.loads(process.stdout.readline())
        with grpc.insecure_channel(ready["grpc"]) as channel:
            infer = channel.unary_unary(
                "/inference.GRPCInferenceService/ModelInfer",
                messages.ModelInferRequest.SerializeToString,
                messages.ModelInferResponse.FromString,
            )
            answers = [infer.future(request, timeout=60) for _ in range(6)]
            answers[0].result()
            process.send_signal(signal.SIGTERM)
            for answer in answers:
                (raw,) = answer.result().raw_output_contents
                scores = np.frombuffer(raw, np.float32)
                np.testing.assert_allclose(scores, expected(num_candidates), rtol=1e-5, atol=1e-4)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


HANGS = """
import threading
from xlarank.cli import main, serve_start
from xlarank_serving.server import RankingServer
serve_start._LAST_SECONDS = 0.2
RankingServer.stop = lambda self: threading.Event().wait()
main.run()
"""


def test_a_stop_that_hangs_ends_all_the_same_and_says_where(folder):
    words = [str(folder / "models"), "--compile-cache", str(folder / "cache"), "--grace", "0"]
    words += ["--port", "0", "--http-port", "0", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        [sys.executable, "-c", HANGS, "serve", *words], env=environment(), **pipes
    ) as process:
        assert process.stdout.readline(), process.communicate(timeout=60)[1]
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Timeout (0:00:00.2" in err
    assert "in <lambda>" in err.partition("most recent call first")[2]


STUCK = """
import threading
from xlarank import device
from xlarank.cli import main
run = device.Replica.run


def stuck(self, bucket, leaves):
    if bucket.rows == 16 and threading.current_thread().name == "xlarank-device-0" and is_ready.is_set():
        print("the device hangs", flush=True)
        threading.Event().wait()
    return run(self, bucket, leaves)


is_ready = threading.Event()
device.Replica.run = stuck
threading.Thread(target=lambda: (input(), is_ready.set(), print("told", flush=True)), daemon=True).start()
main.run()
"""


def test_a_stop_waits_for_no_device_that_hangs(folder):
    words = [str(folder / "models"), "--compile-cache", str(folder / "cache"), "--grace", "0.2"]
    words += ["--watchdog-seconds", "1000", "--port", "0", "--http-port", "0", "--json"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with (
        subprocess.Popen(
            [sys.executable, "-c", STUCK, "serve", *words], env=environment(), **pipes
        ) as process,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(process.kill)
        ready = json.loads(process.stdout.readline())
        process.stdin.write("hang from now on\n")
        process.stdin.flush()
        read_until(process.stdout, "told")
        client = stack.enter_context(RankingClient(ready["grpc"]))
        threads = stack.enter_context(ThreadPoolExecutor(2))
        stuck = threads.submit(client.score, "linear", features(9))
        read_until(process.stdout, "the device hangs")
        behind = threads.submit(client.score, "linear", features(3))
        process.send_signal(signal.SIGTERM)
        for answer in (stuck, behind):
            with pytest.raises(UnavailableError, match="the server is stopping"):
                answer.result(timeout=60)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Timeout (" not in err  # nobody had to end it
    assert json.loads(out.splitlines()[-1]) == ready


UNREAD = """
import threading
from xlarank.cli import main
from xlarank.runtime import lifecycle, version_loading
lifecycle._LAST_CHANGE_SECONDS = 0.2
read = version_loading.open_bundle


def open_bundle(path, **options):
    if path.name == "2":
        print("version 2 is being read", flush=True)
        threading.Event().wait()
    return read(path, **options)


version_loading.open_bundle = open_bundle
main.run()
"""


def test_a_stop_waits_for_no_file_that_never_comes(folder):
    first, models = folder / "models" / "linear" / "1", folder / "unread"
    linear.publish(first, models, 1)
    words = [str(models), "--compile-cache", str(folder / "cache"), "--watch-seconds", "0.05"]
    words += ["--port", "0", "--http-port", "0", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with (
        subprocess.Popen(
            [sys.executable, "-c", UNREAD, "serve", *words], env=environment(), **pipes
        ) as process,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(process.kill)
        ready = json.loads(process.stdout.readline())
        linear.publish(first, models, 2)
        read_until(process.stdout, "version 2 is being read")
        with RankingClient(ready["grpc"]) as client:
            scores = client.score("linear", features(9))["value"]
        np.testing.assert_allclose(scores, expected(9, 1), rtol=1e-5, atol=1e-4)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "left behind after 0.2 s, still loading: linear/2" in err
    assert json.loads(out.splitlines()[-1]) == ready


def child_of(process):
    """Process id of a server's only child, once it runs a program of its own."""
    own = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    while True:
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # has just ended
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
                if parent == process.pid and (stat.parent / "cmdline").read_bytes() not in (own, b""):
                    return int(stat.parent.name)


def test_a_stop_waits_for_no_version_that_an_administrator_loads(folder):
    first, models = folder / "models" / "linear" / "1", folder / "loading"
    linear.publish(first, models, 1, rows=[4])
    options = ("--compile-cache", str(folder / "cold"), "--no-bundle-code", "--admin-port", "0")
    with served_by(str(models), *options) as process, contextlib.ExitStack() as stack:
        ready = json.loads(process.stdout.readline())
        linear.publish(first, models, 2, rows=[16])
        admin = stack.enter_context(triton.InferenceServerClient(ready["admin"]))
        told = []

        def load():
            try:
                admin.load_model("linear")
            except triton.InferenceServerException as error:
                told.append((error.status(), error.message()))

        loading = threading.Thread(target=load)
        loading.start()
        helper = child_of(process)
        os.kill(helper, signal.SIGSTOP)  # what it compiles takes longer than anybody would wait
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        loading.join(60)
    assert process.returncode == 0, err
    assert [status for status, _ in told] == ["StatusCode.UNAVAILABLE"]
    assert not Path(f"/proc/{helper}").exists()


VERSIONS = """
[versions]
watch_seconds = 0.05

[[versions.models]]
name = "linear"
policy = "all"
labels = [{ name = "first", version = 1 }]
"""


def test_a_server_swaps_to_a_version_that_is_published_while_it_serves(folder):
    first, watched = folder / "models" / "linear" / "1", folder / "watched"
    linear.publish(first, watched, 1)
    (folder / "versions.toml").write_text(VERSIONS)
    options = ("--compile-cache", str(folder / "cache"), "--config", str(folder / "versions.toml"))
    with (
        served_by(str(watched), *options, "--admin-port", "0", cwd=folder) as process,
        contextlib.ExitStack() as stack,
    ):
        ready = json.loads(process.stdout.readline())
        client = stack.enter_context(triton.InferenceServerClient(ready["grpc"]))

        def answer(version=""):
            result = client.infer("linear", tensors_of(5), model_version=version)
            answered_by = int(result.get_response().model_version)
            np.testing.assert_allclose(result.as_numpy("value"), expected(5, answered_by), rtol=1e-6)
            return answered_by

        def index():
            models = client.get_model_repository_index().models
            return {model.version: (model.state, model.reason) for model in models}

        assert answer() == 1
        with pytest.raises(triton.InferenceServerException, match="'linear' version 2 is not found"):
            answer("2")
        linear.publish(first, watched, 2)
        read_until(process.stderr, "loading linear 2: profile")
        while not client.is_model_ready("linear", "2"):
            answer()  # the server says nothing of the moment; each answer has the scores of its own version
        assert answer() == 2
        assert answer("1") == answer("first") == 1
        assert client.get_model_metadata("linear").versions == ["1", "2"]
        read_until(process.stderr, "model linear: versions [1, 2] answer, before [1]")
        linear.publish(first, watched, 3, golden_error=0.5)
        read_until(process.stderr, "model linear version 3 isn't served: model 'linear', task 'value'")
        assert answer() == 2
        with pytest.raises(
            triton.InferenceServerException, match=r"version 3 is not at ready state: .*golden"
        ):
            answer("3")
        assert [index()[version][0] for version in "123"] == ["READY", "READY", "UNAVAILABLE"]
        assert "golden replay on" in index()["3"][1]
        own = stack.enter_context(AdminClient(ready["admin"]))
        with pytest.raises(ModelNotFoundError, match=r"expected version 3 below 2, there are \[1, 2, 3\]"):
            own.rollback("linear", 3)
        with pytest.raises(ModelNotFoundError, match="unknown model: 'linea' is not found"):
            own.rollback("linea")
        assert own.rollback("linear") == answer() == 1
        read_until(process.stderr, "model linear version 2 has ended")
        assert index()["2"] == ("UNAVAILABLE", "rolled back from, to version 1")
        admin = stack.enter_context(triton.InferenceServerClient(ready["admin"]))
        admin.unload_model("linear")
        with pytest.raises(triton.InferenceServerException, match="'linear' has no available versions"):
            answer()
        with pytest.raises(
            triton.InferenceServerException, match="failed to load 'linear': version 3: model"
        ) as caught:
            admin.load_model("linear")
        assert caught.value.status() == "StatusCode.FAILED_PRECONDITION"
        assert answer() == 2
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


POLICY = """
[versions]
watch_seconds = 0.05

[[versions.models]]
name = "linear"
"""


def shared(stable, canary):
    """A config of two labels that share the traffic."""
    labels = [f'{{ name = "stable", version = 2, traffic = {stable} }}']
    labels.append(f'{{ name = "canary", version = 3, traffic = {canary} }}')
    return f"{POLICY}labels = [{', '.join(labels)}]\n"


def test_policies_of_the_config_file_are_followed_while_the_server_runs(folder):
    models, config = folder / "policies", folder / "policies.toml"
    for version in (1, 2, 3):
        linear.publish(folder / "models" / "linear" / "1", models, version)
    config.write_text(shared(1.0, 0.0))
    options = ("--compile-cache", str(folder / "cache"), "--config", str(config))
    with served_by(str(models), *options) as process, contextlib.ExitStack() as stack:
        ready = json.loads(process.stdout.readline())
        client = stack.enter_context(triton.InferenceServerClient(ready["grpc"]))

        def answer():
            return int(client.infer("linear", tensors_of(5)).get_response().model_version)

        assert ready["models"] == ["linear/2", "linear/3"]
        assert {answer() for _ in range(5)} == {2}
        config.write_text(shared(0.0, 1.0))
        while answer() != 3:
            pass
        config.write_text(shared(0.5, 0.6))
        read_until(process.stderr, f"{config}: the last good policies stay in use: model 'linear': expected")
        assert {answer() for _ in range(5)} == {3}
        config.write_text(f'{POLICY}policy = "specific"\nversions = [1]\n[queue]\nmax_queued_rows = 7000\n')
        read_until(process.stderr, f"{config}: [queue] max_queued_rows: take effect at the next start")
        while answer() != 1:
            pass
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "stay in use" not in err
