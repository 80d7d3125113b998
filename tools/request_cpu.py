"""CPU of a request in the server process without gather and execute, beside what gRPC and the messages take.

Processes that take turns in closed loop, each held to one CPU, so that XLA and gather have one thread:
  server   the server, 500 candidates a request: CPU of the process a request, and of it gather and execute:
           that of the thread that calls them, while it does, and that of XLA's own threads
  parse    a gRPC server with the same threads that reads the same messages and answers as many scores
  bytes    the same, but it doesn't read them

    python tools/request_cpu.py build/models/ranker_light/1 --turns 5 --requests 1000
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
from bench_server import NUM_CANDIDATES, encode
from open_loop import LoadGenerator, save_requests
from queue_server import CPU_SECONDS, queue_server
from server_process import server_samples, started
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.layout import SERVICE_NAME
from xlarank_serving.server import ServerConfig, stop_on_signals
from xlarank_serving.threads import ServerThreads, on_threads

from xlarank.bundle import Verify, open_bundle
from xlarank.compiler import random_requests

__all__ = ["measure", "process_cpu_seconds"]

_OUTSTANDING = 2
_NUM_REQUESTS = 16
_NAMES = ("server", "gather_execute", "parse", "bytes")
_XLA_THREADS = "tf_XLA"


def process_cpu_seconds(pid: int, threads: str = "") -> float:
    """CPU that the living threads of a process have used so far, in user and kernel.

    Args:
      pid: of the process.
      threads: how their names begin; all by default.
    """
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            if (task / "comm").read_text().startswith(threads):
                total += int((task / "schedstat").read_text().split()[0])  # nanoseconds on a CPU
    return total / 1e9


@contextlib.contextmanager
def _one_cpu() -> Iterator[None]:
    """Processes that are started meanwhile have one CPU, the last one: pools are sized by it."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(bundle: Path, *, turns: int, num_requests: int) -> dict[str, Any]:
    """Lets them take turns.

    Args:
      bundle: version folder; a network that weighs little leaves the caches to what is measured.
      turns: of each.
      num_requests: of a turn.

    Returns:
      ``server``, ``gather_execute`` (what of it is theirs), ``parse`` and ``bytes``: microseconds of CPU a
      request, by turn.
    """
    spec = open_bundle(bundle, verify=Verify.SIZES).spec
    encoded = [
        encode(spec, request)
        for request in random_requests(spec, _NUM_REQUESTS, num_candidates=NUM_CANDIDATES)
    ]
    results: dict[str, Any] = {name: [] for name in _NAMES}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_requests(folder / "requests.npz", encoded)
        server = queue_server(bundle, folder / "cache", host_threads=1, counts_cpu=True)
        sides: list[_Side] = []
        for name, context in (("server", server), ("parse", _echo("parse")), ("bytes", _echo("bytes"))):
            with _one_cpu():
                ready = stack.enter_context(context)
            generator = stack.enter_context(LoadGenerator(ready["grpc"], folder / "requests.npz"))
            sides.append(_Side(name, ready, generator))
        for side in sides:
            side.cpu(num_requests)  # warms up
        for turn in range(turns):
            for side in sides if turn % 2 == 0 else reversed(sides):
                for name, seconds in side.cpu(num_requests).items():
                    results[name].append(1e6 * seconds)
    return {**results, "bytes_a_request": len(encoded[0]), "num_tensors": len(spec.features)}


class _Side:
    """A process that answers."""

    def __init__(self, name: str, ready: Mapping[str, Any], generator: LoadGenerator) -> None:
        self._name, self._ready, self._generator = name, ready, generator

    def cpu(self, num_requests: int) -> dict[str, float]:
        """Seconds of CPU a request, over at least so many."""
        before = self._seconds()
        num_answers = 0
        while num_answers < num_requests:
            # In bursts: the generator counts by time, this by requests.
            result = self._generator.closed_loop(
                range(_NUM_REQUESTS), outstanding=_OUTSTANDING, seconds=0.3, warm_seconds=0.0
            )
            num_answers += result.num_answers
        return {name: (value - before[name]) / num_answers for name, value in self._seconds().items()}

    def _seconds(self) -> dict[str, float]:
        pid = self._ready["pid"]
        seconds = {self._name: process_cpu_seconds(pid)}
        if self._name == "server":
            (calls,) = [v for name, _, v in server_samples(self._ready["http"]) if name == CPU_SECONDS]
            seconds["gather_execute"] = float(calls) + process_cpu_seconds(pid, _XLA_THREADS)
        return seconds


def _echo(kind: str) -> Any:
    return started([sys.executable, __file__, "echo", kind])


def _be_the_echo(kind: str) -> None:
    """A server like ours without us: the same pools, messages read and written on the pool's threads."""
    threads = ServerThreads(ServerConfig().num_threads)
    scores = bytes(4 * NUM_CANDIDATES)

    def parse(data: bytes, context: grpc.ServicerContext) -> bytes:
        request = messages.ModelInferRequest.FromString(data)
        response = messages.ModelInferResponse(
            model_name=request.model_name, model_version="1", id=request.id
        )
        response.outputs.add(name="click", datatype="FP32", shape=[NUM_CANDIDATES])
        response.raw_output_contents.append(scores)
        return response.SerializeToString()

    def answer(data: bytes, context: grpc.ServicerContext) -> bytes:
        return scores

    method = on_threads({"parse": parse, "bytes": answer}[kind], threads.rank)
    server = grpc.server(threads.rank, options=[("grpc.so_reuseport", 0)])
    handlers = {"ModelInfer": grpc.unary_unary_rpc_method_handler(method)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with stop_on_signals() as stop:
        print(json.dumps({"grpc": f"127.0.0.1:{port}"}), flush=True)
        stop.wait()
    server.stop(None).wait()
    threads.close()


def main() -> None:
    match sys.argv[1:]:
        case ["echo", kind]:
            _be_the_echo(kind)
        case _:
            parser = argparse.ArgumentParser(
                description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
            )
            parser.add_argument("bundle", type=Path, help="version folder")
            parser.add_argument("--turns", type=int, default=5, help="of each (%(default)s)")
            parser.add_argument("--requests", type=int, default=1000, help="of a turn (%(default)s)")
            args = parser.parse_args()
            print(json.dumps(measure(args.bundle, turns=args.turns, num_requests=args.requests)))


if __name__ == "__main__":
    main()
