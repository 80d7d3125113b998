"""A load generator: requests at given times whatever becomes of those before, in a process of its own.

Latencies count from the time that a request was meant to start, so that a server which stalls, or a generator
that has fallen behind, is seen in the latency of every request that had to wait for it (no co-ordinated
omission). Requests are encoded beforehand; the process has two threads that work: one sends, gRPC's takes the
answers. What it does is bounded in time (each request has a timeout) and in number (`max_open`). A third
thread waits for commands, which come as lines of JSON; one that comes while requests are played ends that.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import math
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from xlarank_serving.layout import SERVICE_NAME

__all__ = ["UNSENT", "ClosedLoop", "LoadGenerator", "Played", "play", "save_requests"]

UNSENT = "UNSENT"
"""Status of a request that the generator didn't send, as too many were open."""

_LEAD_SECONDS = 0.05
"""From the command to the first request."""

_EXTRA_SECONDS = 5.0
"""How much longer than its timeout an answer may take to be noticed."""


@dataclasses.dataclass(frozen=True)
class Played:
    """What became of requests."""

    at: np.ndarray
    """[A] float64 seconds at which they were meant to start."""

    latencies: np.ndarray
    """[A] float64 seconds from then to the answer, whatever it was; NaN for one that was not sent."""

    codes: list[str]
    """[A] names of gRPC's status codes, or `UNSENT`."""

    lags: np.ndarray
    """[A] float64 seconds by which they were sent late; NaN for one that was not sent."""

    began_at: float = 0.0
    """Second 0 of `at` on the machine's monotonic clock, which all of its processes share."""

    @property
    def is_ok(self) -> np.ndarray:
        """[A] bool."""
        return np.array([code == "OK" for code in self.codes], bool)

    @property
    def counts(self) -> Counter[str]:
        """Requests by status code."""
        return Counter(self.codes)

    @property
    def answered(self) -> np.ndarray:
        """Latencies of the requests that were answered with scores."""
        return self.latencies[self.is_ok]

    def latency(self, quantile: float) -> float:
        """Seconds, of the answered ones; NaN when there is none."""
        return float(np.quantile(self.answered, quantile)) if self.is_ok.any() else math.nan

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "at": self.at.tolist(),
            "latencies": self.latencies.tolist(),
            "codes": self.codes,
            "lags": self.lags.tolist(),
            "began_at": self.began_at,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Played:
        """Reads what `to_json` gives."""
        arrays = {name: np.array(values[name], np.float64) for name in ("at", "latencies", "lags")}
        return cls(codes=values["codes"], began_at=values["began_at"], **arrays)


def play(
    send: Callable[..., Any],
    encoded: Sequence[bytes],
    at: Sequence[float],
    choices: Sequence[int],
    *,
    timeout: float,
    max_open: int = 4096,
    is_over: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Played:
    """Sends requests at their times, waits for no answer before the last one is sent, then for all.

    Args:
      send: starts a request: takes its bytes and `timeout`, gives a `grpc.Future` and doesn't wait.
      encoded: requests.
      at: [A] seconds from the start, ascending.
      choices: [A] which request goes out then, by its place in `encoded`.
      timeout: seconds of each.
      max_open: requests without an answer; past it they are not sent, and counted as `UNSENT`.
      is_over: asked when a request is due; once it says so, that one and the later ones are left out.
      clock: seconds, monotonic.
      sleep: waits.

    Raises:
      TimeoutError: if an answer doesn't come well after its timeout.
    """
    latencies, lags = np.full(len(at), np.nan), np.full(len(at), np.nan)
    codes = [UNSENT] * len(at)
    changed = threading.Condition()
    num_open, num_due = 0, 0
    begin = clock() + _LEAD_SECONDS

    def on_answer(number: int, call: Any) -> None:
        nonlocal num_open
        latencies[number] = clock() - begin - at[number]
        codes[number] = call.code().name
        with changed:
            num_open -= 1
            changed.notify()

    for number, (start, choice) in enumerate(zip(at, choices, strict=True)):
        seconds = begin + start - clock()
        if seconds > 0:
            sleep(seconds)
        if is_over():
            break
        num_due += 1
        with changed:
            if num_open >= max_open:
                continue
            num_open += 1
        lags[number] = clock() - begin - start
        call = send(encoded[choice], timeout=timeout)
        call.add_done_callback(functools.partial(on_answer, number))
    with changed:
        if not changed.wait_for(lambda: num_open == 0, timeout + _EXTRA_SECONDS):
            raise TimeoutError(f"{num_open} of {num_due} requests without an answer after {timeout} s")
    starts = np.array(at, np.float64)
    return Played(starts[:num_due], latencies[:num_due], codes[:num_due], lags[:num_due], begin)


@dataclasses.dataclass(frozen=True)
class ClosedLoop:
    """What a number of requests under way, each followed by the next, came to."""

    rate: float
    """Answers a second, after warming up."""

    num_answers: int
    """Of all, warming up included."""

    counts: dict[str, int]
    """By status code, likewise."""


def closed_loop(
    send: Callable[..., Any],
    encoded: Sequence[bytes],
    choices: Sequence[int],
    *,
    outstanding: int,
    seconds: float,
    warm_seconds: float,
    timeout: float,
) -> ClosedLoop:
    """Keeps so many requests under way for a while.

    Args:
      send, encoded, timeout: see `play`.
      choices: which requests go out, over and over.
      outstanding: requests under way.
      seconds: counted.
      warm_seconds: before that.

    Raises:
      RuntimeError: if there were too few answers to count.
      TimeoutError: if an answer doesn't come well after its timeout.
    """
    counts: Counter[str] = Counter()
    counted: list[float] = []
    changed = threading.Condition()
    num_sent, num_open = 0, outstanding
    begin = time.perf_counter() + warm_seconds

    def ask() -> None:
        nonlocal num_sent
        with changed:
            choice, num_sent = choices[num_sent % len(choices)], num_sent + 1
        send(encoded[choice], timeout=timeout).add_done_callback(on_answer)

    def on_answer(call: Any) -> None:
        nonlocal num_open
        now = time.perf_counter()
        code = call.code().name
        with changed:
            counts[code] += 1
            if code == "OK" and now >= begin:
                counted.append(now)
            if now >= begin + seconds:
                num_open -= 1
                changed.notify()
                return
        ask()

    for _ in range(outstanding):
        ask()
    with changed:
        if not changed.wait_for(lambda: num_open == 0, warm_seconds + seconds + timeout + _EXTRA_SECONDS):
            raise TimeoutError(f"{num_open} requests without an answer after {timeout} s")
    within = [at for at in counted if at < begin + seconds]
    if len(within) < 2:
        raise RuntimeError(
            f"expected at least 2 answers within {seconds} s to count, got {len(within)}: {counts}"
        )
    return ClosedLoop((len(within) - 1) / (within[-1] - within[0]), counts.total(), dict(counts))


def save_requests(path: Path, encoded: Sequence[bytes]) -> None:
    """Writes encoded requests for a `LoadGenerator`."""
    blob = np.frombuffer(b"".join(encoded), np.uint8)
    np.savez(path, blob=blob, ends=np.cumsum([len(data) for data in encoded]))


def _load_requests(path: Path) -> list[bytes]:
    with np.load(path) as file:
        blob, ends = file["blob"].tobytes(), file["ends"].tolist()
    return [blob[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


class LoadGenerator:
    """The process. One caller at a time; it sleeps while it isn't told to work."""

    def __init__(self, address: str, requests: Path) -> None:
        """
        Args:
          address: host:port of the server.
          requests: a file of `save_requests`.
        """
        command = [sys.executable, __file__, address, str(requests)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()  # it is ready

    def play(
        self, at: Sequence[float], choices: Sequence[int], *, timeout: float = 30.0, max_open: int = 4096
    ) -> Played:
        """See `play`."""
        self._tell(do="play", at=list(at), choices=list(choices), timeout=timeout, max_open=max_open)
        return Played.from_json(self._answer())

    @contextlib.contextmanager
    def playing(
        self, at: Sequence[float], choices: Sequence[int], *, timeout: float = 30.0, max_open: int = 4096
    ) -> Iterator[list[Played]]:
        """As `play`, while the context is open: what isn't due at its end is left out.

        Yields:
          A list that has what was played once the context has ended.
        """
        played: list[Played] = []
        self._tell(do="play", at=list(at), choices=list(choices), timeout=timeout, max_open=max_open)
        try:
            yield played
        finally:
            self._tell(do="stop")
            played.append(Played.from_json(self._answer()))

    def closed_loop(
        self,
        choices: Sequence[int],
        *,
        outstanding: int,
        seconds: float,
        warm_seconds: float = 0.5,
        timeout: float = 30.0,
    ) -> ClosedLoop:
        """See `closed_loop`."""
        self._tell(
            do="closed_loop",
            choices=list(choices),
            outstanding=outstanding,
            seconds=seconds,
            warm_seconds=warm_seconds,
            timeout=timeout,
        )
        return ClosedLoop(**self._answer())

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate(timeout=60)  # closes its input, which ends it

    def __enter__(self) -> LoadGenerator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tell(self, **command: Any) -> None:
        assert self._process.stdin is not None
        print(json.dumps(command), file=self._process.stdin, flush=True)

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args}: ended with status {self._process.wait()}")
        return json.loads(line)


def _work(address: str, requests: Path) -> None:
    """What the process does: a line of JSON in, a line of JSON out, but for "stop"."""
    encoded = _load_requests(requests)
    options = [("grpc.enable_retries", 0), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(address, options=options) as channel:
        send = channel.unary_unary(f"/{SERVICE_NAME}/ModelInfer").future  # bytes to bytes
        grpc.channel_ready_future(channel).result(timeout=30)
        gc.freeze()
        gc.disable()  # a collection would be taken for the server's latency
        commands: queue.SimpleQueue[str] = queue.SimpleQueue()  # "" at the end
        threading.Thread(target=_read_commands, args=(commands,), daemon=True).start()
        print(json.dumps("ready"), flush=True)
        while line := commands.get():
            command = json.loads(line)
            match command.pop("do"):
                case "stop":  # it has ended what was played, if that hadn't ended by itself
                    continue
                case "play":
                    result = play(send, encoded, **command, is_over=lambda: not commands.empty()).to_json()
                case _:
                    result = dataclasses.asdict(closed_loop(send, encoded, **command))
            print(json.dumps(result), flush=True)
            gc.collect()


def _read_commands(commands: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        commands.put(line)
    commands.put("")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", help="host:port of the server")
    parser.add_argument("requests", type=Path, help="file of encoded requests")
    args = parser.parse_args()
    _work(args.address, args.requests)


if __name__ == "__main__":
    main()
