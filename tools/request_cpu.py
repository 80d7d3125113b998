"""CPU of a request in the server process, beside gather, execute and what gRPC and the messages take anyhow.

Three processes take turns, each held to one CPU, so that XLA and gather have one thread and nobody spins:
  server      the server, 500 candidates a request in closed loop: CPU of the process a request
  executable  gather and execute of the same bucket, back to back: CPU of the process a call, all threads
  echo        a gRPC server with the same threads that reads the same messages and answers as many scores:
              CPU of the process a request

    python tools/request_cpu.py build/models/bare/1 --turns 5 --requests 1000
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
from bench_server import NUM_CANDIDATES, encode, load_executable
from open_loop import LoadGenerator, save_requests
from queue_server import queue_server
from server_process import started
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.layout import SERVICE_NAME
from xlarank_serving.server import ServerConfig, stop_on_signals
from xlarank_serving.threads import ServerThreads, on_threads

from xlarank.bundle import Verify, open_bundle
from xlarank.compiler import random_requests

__all__ = ["measure", "process_cpu_seconds"]

_OUTSTANDING = 2
_NUM_REQUESTS = 16
_TICK = os.sysconf("SC_CLK_TCK")


def process_cpu_seconds(pid: int) -> float:
    """CPU that a process has used so far, all of its threads, in user and kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK  # utime, stime


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
      bundle: version folder; its network should weigh little, as the difference is of the whole.
      turns: of each.
      num_requests: of a turn.

    Returns:
      ``server``, ``executable``, ``parse`` (the echo) and ``bytes`` (an echo that doesn't read the messages):
      microseconds of CPU a request, by turn.
    """
    spec = open_bundle(bundle, verify=Verify.SIZES).spec
    encoded = [
        encode(spec, request)
        for request in random_requests(spec, _NUM_REQUESTS, num_candidates=NUM_CANDIDATES)
    ]
    results: dict[str, Any] = {name: [] for name in ("server", "executable", "parse", "bytes")}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_requests(folder / "requests.npz", encoded)
        server = queue_server(bundle, folder / "cache", host_threads=1)
        runs: dict[str, Callable[[], float]] = {}
        for name, context in (("server", server), ("parse", _echo("parse")), ("bytes", _echo("bytes"))):
            with _one_cpu():
                ready = stack.enter_context(context)
            generator = stack.enter_context(LoadGenerator(ready["grpc"], folder / "requests.npz"))
            runs[name] = _requests_cpu(generator, ready["pid"], num_requests)
        with _one_cpu():
            executable = _Executable(bundle, folder / "cache")
        stack.callback(executable.close)
        runs["executable"] = lambda: executable.cpu(num_requests)
        for run in runs.values():
            run()  # warms up
        for turn in range(turns):
            for name in runs if turn % 2 == 0 else reversed(runs):
                results[name].append(1e6 * runs[name]())
    return {**results, "bytes_a_request": len(encoded[0]), "num_tensors": len(spec.features)}


def _requests_cpu(generator: LoadGenerator, pid: int, num_requests: int) -> Callable[[], float]:
    def run() -> float:
        before = process_cpu_seconds(pid)
        num_answers = 0
        while num_answers < num_requests:
            # In bursts: the generator counts by time, this by requests.
            result = generator.closed_loop(
                range(_NUM_REQUESTS), outstanding=_OUTSTANDING, seconds=0.3, warm_seconds=0.0
            )
            num_answers += result.num_answers
        return (process_cpu_seconds(pid) - before) / num_answers

    return run


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


class _Executable:
    """The process that gathers and executes."""

    def __init__(self, bundle: Path, cache: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "executable", str(bundle), str(cache)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def cpu(self, num_calls: int) -> float:
        """Seconds of CPU a call."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(num_calls, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args}: ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.communicate(timeout=60)


def _be_the_executable(bundle: Path, cache: Path) -> None:
    gather, run = load_executable(bundle, cache)
    for line in sys.stdin:
        num_calls, before = int(line), time.process_time()
        for _ in range(num_calls):
            gather()
            run()
        print(json.dumps((time.process_time() - before) / num_calls), flush=True)


def main() -> None:
    match sys.argv[1:]:
        case ["echo", kind]:
            _be_the_echo(kind)
        case ["executable", bundle, cache]:
            _be_the_executable(Path(bundle), Path(cache))
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
