"""Rows/s of the server in closed loop, against the bare compiled executable on the same bucket.

Three processes: `xlarank serve` on one device; a client that sends it requests of 500 candidates over gRPC,
encoded beforehand, a few at a time; and the bare executable, called back to back on a batch that is already
gathered. Server and executable take turns of some seconds; while one works the other sleeps.

    python tools/bench_server.py build/models/dcn_v2/1 --turns 5 --seconds 4

The bundle's largest bucket must hold one such request and no more, so that both run the same program.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from server_process import server_samples, serving
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.encoding import add_inputs
from xlarank_serving.layout import SERVICE_NAME

from xlarank import device
from xlarank.bundle import Verify, open_bundle
from xlarank.compiler import random_requests
from xlarank.host import DeviceRows, Gatherer, Segment
from xlarank.spec import Bucket, ModelSpec, RankRequest

__all__ = ["closed_loop", "encode", "load_executable", "measure"]

NUM_CANDIDATES = 500
BUCKET = Bucket(512, 1)

_NUM_REQUESTS = 16
_WARM_SECONDS = 0.5


def measure(bundle: Path, *, turns: int, seconds: float, outstanding: int) -> dict[str, Any]:
    """Lets server and executable take turns.

    Args:
      bundle: version folder ``<repository>/<model>/<version>``, alone in its repository.
      turns: of each.
      seconds: of a turn, half a second of warming up not counted.
      outstanding: requests that the client keeps under way.

    Returns:
      ``server`` and ``executable``: calls/s by turn, neighbours in time at the same place; ``gather_ms`` and
      ``execute_ms``: the server's own means a batch; ``num_candidates``, ``bucket_rows``; ``how``: the method
      in words.

    Raises:
      RuntimeError: if the two give different scores, or the server ran another bucket than `BUCKET` or
        compiled on the request path.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ready = stack.enter_context(serving(bundle.parents[1], folder))
        executable = stack.enter_context(_Worker("executable", bundle, str(folder)))
        client = stack.enter_context(_Worker("client", bundle, ready["grpc"], str(outstanding)))
        np.testing.assert_allclose(client.first, executable.first, rtol=0, atol=1e-6)
        rates: dict[str, Any] = {"server": [], "executable": []}
        for turn in range(turns):
            workers = [("server", client), ("executable", executable)]
            for name, worker in workers if turn % 2 == 0 else reversed(workers):
                rates[name].append(worker.calls_a_second(seconds))
        how = (
            f"closed loop of {outstanding} requests under way, {NUM_CANDIDATES} candidates each, one raw "
            f"tensor a feature, encoded beforehand by a client process, to `xlarank serve --devices 1`; over "
            f"the bare compiled executable of bucket {BUCKET} on one device, called back to back in a "
            f"process of its own with NumPy inputs already gathered"
        )
        return {
            **rates,
            **_server_means(ready["http"]),
            "num_candidates": NUM_CANDIDATES,
            "bucket_rows": BUCKET.rows,
            "how": how,
        }


class _Worker:
    """This file as a process in a role: says how it scores the first request, then works when it is told."""

    def __init__(self, role: str, bundle: Path, *words: str) -> None:
        command = [sys.executable, __file__, str(bundle), "--role", role, *words]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.first = self._answer()
        """[N] scores of the first request."""

    def calls_a_second(self, seconds: float) -> float:
        """Works for so long."""
        assert self._process.stdin is not None
        print(seconds, file=self._process.stdin, flush=True)
        return self._answer()

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)  # closes its input, which ends it

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args}: ended with status {self._process.wait()}")
        return json.loads(line)


def _server_means(http: str) -> dict[str, float]:
    samples = server_samples(http)
    totals = {name: float(value) for name, _, value in samples}  # one model: one sample a name, but buckets'
    buckets = {labels for name, labels, _ in samples if name == "xlarank_bucket_batches_total"}
    if not all(f'bucket="{BUCKET}"' in labels for labels in buckets):
        raise RuntimeError(f"expected batches of bucket {BUCKET} alone, the server ran {sorted(buckets)}")
    if totals["xlarank_request_path_compiles_total"]:
        raise RuntimeError("the server compiled on the request path")
    batches = totals["nv_inference_exec_count"]
    return {
        "gather_ms": 1e3 * totals["xlarank_gather_seconds_total"] / batches,
        "execute_ms": 1e3 * totals["xlarank_execute_seconds_total"] / batches,
    }


def _requests(spec: ModelSpec) -> list[RankRequest]:
    """The same ones in every process."""
    return random_requests(spec, _NUM_REQUESTS, num_candidates=NUM_CANDIDATES)


def load_executable(bundle_folder: Path, cache: Path) -> tuple[Callable[[], None], Callable[[], np.ndarray]]:
    """The bare executable of `BUCKET` on one device, and a request of `NUM_CANDIDATES` for it.

    Args:
      bundle_folder: version folder.
      cache: compilation cache.

    Returns:
      What gathers the request, in one thread, and what runs the program on what was gathered: [N] scores of
      the first task.
    """
    device.configure(num_devices=1, compile_cache=cache)
    bundle = open_bundle(bundle_folder, verify=Verify.SIZES)
    manifest = bundle.manifest
    gatherer = Gatherer(
        bundle.spec,
        bundle.tables(),
        unused=manifest.unused_features,
        activations=manifest.activations,
        device_rows=DeviceRows.of_bundle(manifest.placements, bundle.device_rows()),
    )
    (entry,) = [entry for entry in manifest.programs if entry.bucket == BUCKET]
    program = device.BucketProgram(device.deserialize_program(bundle.program(entry)), entry.prepared)
    data, target = bundle.prepare(), device.devices(1)[0]
    prepare = None if data is None else device.deserialize_program(data)
    prepared = device.prepare_weights(target, prepare, list(bundle.params().values()))
    (tables,) = device.place_tables([target], gatherer.device_arrays())
    replica = device.Replica(target, gatherer.signature, {BUCKET: program}, (*prepared, *tables))
    leaves = device.BatchBuffers(gatherer.signature, manifest.ladder).leaves(BUCKET)
    segments = [Segment(gatherer.bind(_requests(bundle.spec)[0]), 0, NUM_CANDIDATES)]
    task = bundle.spec.tasks[0].name
    return (
        lambda: gatherer.gather(segments, BUCKET, leaves),
        lambda: replica.run(BUCKET, leaves)[task][:NUM_CANDIDATES],
    )


def _be_the_executable(bundle_folder: Path, cache: str) -> None:
    gather, run = load_executable(bundle_folder, Path(cache))
    gather()
    print(json.dumps(run().tolist()), flush=True)
    for line in sys.stdin:
        _count_calls(run, _WARM_SECONDS)
        num_calls, seconds = _count_calls(run, float(line))
        print(json.dumps(num_calls / seconds), flush=True)


def _count_calls(call: Any, seconds: float) -> tuple[int, float]:
    num_calls, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        call()
        num_calls += 1
    return num_calls, elapsed


def _be_the_client(bundle_folder: Path, address: str, outstanding: int) -> None:
    spec = open_bundle(bundle_folder, verify=Verify.SIZES).spec
    encoded = [encode(spec, request) for request in _requests(spec)]
    with grpc.insecure_channel(address) as channel:
        infer = channel.unary_unary(f"/{SERVICE_NAME}/ModelInfer")  # bytes to bytes
        answer = messages.ModelInferResponse.FromString(infer(encoded[0]))
        print(json.dumps(np.frombuffer(answer.raw_output_contents[0], "<f4").tolist()), flush=True)
        for line in sys.stdin:
            print(json.dumps(closed_loop(infer, encoded, outstanding, float(line))), flush=True)


def encode(spec: ModelSpec, request: RankRequest) -> bytes:
    """A ModelInfer message, one raw tensor a feature."""
    message = messages.ModelInferRequest(model_name=spec.name)
    add_inputs(message, spec, request)
    return message.SerializeToString()


def closed_loop(infer: Any, encoded: list[bytes], outstanding: int, seconds: float) -> float:
    """Answers a second, counted from the first answer after warming up to the last one."""
    begin = time.perf_counter() + _WARM_SECONDS
    answered: list[float] = []

    def ask(first: int) -> None:
        number = first
        while time.perf_counter() < begin + seconds:
            infer(encoded[number % len(encoded)])
            answered.append(time.perf_counter())
            number += outstanding

    with concurrent.futures.ThreadPoolExecutor(outstanding) as threads:
        for done in [threads.submit(ask, i) for i in range(outstanding)]:
            done.result()
    counted = sorted(at for at in answered if at >= begin)
    if len(counted) < 2:
        raise RuntimeError(f"expected at least 2 answers within {seconds} s to count, got {len(counted)}")
    return (len(counted) - 1) / (counted[-1] - counted[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="version folder of a bundle, alone in its repository")
    parser.add_argument("--turns", type=int, default=5, help="of each (%(default)s)")
    parser.add_argument("--seconds", type=float, default=4, help="of a turn (%(default)s)")
    parser.add_argument("--outstanding", type=int, default=3, help="requests under way (%(default)s)")
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)  # of the processes that it starts
    args = parser.parse_args()
    match args.role:
        case ["executable", cache]:
            _be_the_executable(args.bundle, cache)
        case ["client", address, outstanding]:
            _be_the_client(args.bundle, address, int(outstanding))
        case _:
            result = measure(
                args.bundle, turns=args.turns, seconds=args.seconds, outstanding=args.outstanding
            )
            print(json.dumps(result))


if __name__ == "__main__":
    main()
