"""Sends broken ranking requests to a real server and looks whether it stays right.

    python tools/fuzz_model_infer.py --cases 100000 --seed 1
    python tools/fuzz_model_infer.py --seed 1 --case 4711      # one of them again, shown

A case is a valid request broken by its structure (names, datatypes, shapes, sizes, contents, parameters) or
in its serialised bytes; the seed and its number say all of it. Every one goes over gRPC. A run fails if

  - a status comes that the mutation doesn't allow: INTERNAL, UNKNOWN, CANCELLED and UNAVAILABLE never are;
  - an answer is late, or an accepted one isn't well formed;
  - a mutation that keeps the meaning, or a valid request after each batch, gets other scores;
  - the server ends, logs a traceback, or its memory grows past --max-growth-mib.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from fuzz_bundle import make_bundle  # first: it sets the environment that JAX reads at import
from mutations import mutated, mutated_bytes, to_typed
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.encoding import add_inputs
from xlarank_serving.layout import SERVICE_NAME

from xlarank.bundle import open_bundle
from xlarank.spec import ModelSpec, RankRequest

__all__ = ["FuzzFailure", "Fuzzer", "Valid", "valid_requests"]

_BATCH = 64
"""Broken requests under way at a time; then a valid one is sent."""

_TIMEOUT_SECONDS = 60.0
_WARM_CASES = 2048  # memory pools and caches have filled by then
_CASES_A_LINE = 10_240
_SHARE_OF_BYTES = 0.2
_TOLERANCE = 1e-4


class FuzzFailure(Exception):
    """The server did what it must not; says what, and how to see it again."""


@dataclasses.dataclass(frozen=True)
class Valid:
    """A request that is right and its scores."""

    message: messages.ModelInferRequest
    scores: Mapping[str, np.ndarray]
    """[N] float32 by output."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One broken request."""

    number: int
    valid: Valid
    data: bytes
    allowed: frozenset[str]


def valid_requests(
    spec: ModelSpec, requests: Sequence[RankRequest], scores: Sequence[Mapping[str, np.ndarray]]
) -> list[Valid]:
    """Every request in each way that it may be sent: by name, packed, typed.

    Args:
      spec: the model.
      requests: of it.
      scores: of each, by output.
    """
    valid = []
    for request, expected in zip(requests, scores, strict=True):
        for packed in (False, True):
            message = messages.ModelInferRequest(model_name=spec.name, id="valid")
            add_inputs(message, spec, request, packed=packed)
            valid += [Valid(message, expected), Valid(to_typed(message), expected)]
    return valid


class Fuzzer:
    """Sends cases over a channel. Repeatable by its seed."""

    def __init__(self, channel: grpc.Channel, valid: Sequence[Valid], seed: int) -> None:
        self.outcomes: Counter[str] = Counter()  # by status
        self._valid = valid
        self._seed = seed
        self._infer = channel.unary_unary(f"/{SERVICE_NAME}/ModelInfer")

    def case(self, number: int) -> Case:
        """The broken request of a number."""
        rng = np.random.default_rng((self._seed, number))
        valid = self._valid[int(rng.integers(len(self._valid)))]
        if rng.random() < _SHARE_OF_BYTES:
            data, allowed = mutated_bytes(valid.message.SerializeToString(), rng)
        else:
            message = messages.ModelInferRequest()
            message.CopyFrom(valid.message)
            allowed = mutated(message, rng)
            # Sorted, so that a map of parameters gives the same bytes in every process.
            data = message.SerializeToString(deterministic=True)
        return Case(number, valid, data, allowed)

    def run(self, numbers: Sequence[int]) -> None:
        """Sends cases, a batch at a time, a valid request after each; raises FuzzFailure."""
        for begin in range(0, len(numbers), _BATCH):
            cases = [self.case(number) for number in numbers[begin : begin + _BATCH]]
            calls = [self._infer.future(case.data, timeout=_TIMEOUT_SECONDS) for case in cases]
            for case, call in zip(cases, calls, strict=True):
                self._check(case, call)
            valid = self._valid[begin // _BATCH % len(self._valid)]
            whole = Case(
                numbers[begin], valid, valid.message.SerializeToString(), frozenset(("OK", "SAME_SCORES"))
            )
            self._check(
                whole, self._infer.future(whole.data, timeout=_TIMEOUT_SECONDS), "a valid request after "
            )

    def _check(self, case: Case, call: Any, what: str = "") -> None:
        status = call.code().name
        if not what:
            self.outcomes[status] += 1
        if status not in case.allowed:
            self._fail(case, f"{what}got {status}: {call.details()!r}; expected of {sorted(case.allowed)}")
        if status == "OK":
            problem = _problem(case, call.result())
            if problem:
                self._fail(case, f"{what}got an answer that is wrong: {problem}")

    def _fail(self, case: Case, problem: str) -> None:
        file = Path(tempfile.gettempdir()) / f"fuzz_{self._seed}_{case.number}.bin"
        file.write_bytes(case.data)
        raise FuzzFailure(
            f"seed {self._seed} case {case.number}: {problem}\nits bytes are in {file}; again: "
            f"python tools/fuzz_model_infer.py --seed {self._seed} --case {case.number}"
        )


def _problem(case: Case, data: bytes) -> str:
    """What is wrong with an answer; empty if nothing is."""
    answer = messages.ModelInferResponse.FromString(data)
    if len(answer.outputs) != len(answer.raw_output_contents):
        return f"{len(answer.outputs)} outputs and {len(answer.raw_output_contents)} contents"
    scores = {}
    for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
        dtype = {"FP32": "<f4", "INT32": "<i4"}[output.datatype]
        scores[output.name] = np.frombuffer(raw, dtype)
        if list(output.shape) != [len(scores[output.name])]:
            return f"{output.name}: shape {list(output.shape)} and {len(scores[output.name])} elements"
        if not np.isfinite(scores[output.name]).all():
            return f"{output.name}: not finite"
    if "SAME_SCORES" not in case.allowed:
        return ""
    if answer.id != messages.ModelInferRequest.FromString(case.data).id:
        return f"id {answer.id[:50]!r}"
    if set(scores) != set(case.valid.scores):
        return f"outputs {sorted(scores)}"
    for name, expected in case.valid.scores.items():
        if not np.allclose(scores[name], expected, rtol=_TOLERANCE, atol=_TOLERANCE):
            return f"{name}: {scores[name]}; expected {expected}"
    return ""


def _golden(path: Path) -> list[Valid]:
    """The golden requests of a bundle with their reference scores."""
    bundle = open_bundle(path)
    requests, values = bundle.golden()
    ends = np.cumsum([request.num_candidates for request in requests])[:-1]
    by_output = {task.output: np.split(values["scores"][task.name], ends) for task in bundle.spec.tasks}
    scores = [{name: parts[i] for name, parts in by_output.items()} for i in range(len(requests))]
    return valid_requests(bundle.spec, requests, scores)


@contextlib.contextmanager
def _server(models: Path, log: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server process and its address; stopped at the end, which must go well."""
    command = [sys.executable, "-m", "xlarank.cli", "serve", str(models), "--json"]
    command += ["--port", "0", "--http-port", "0", "--devices", "2"]
    with (
        log.open("w") as err,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise FuzzFailure(f"the server didn't start: {log.read_text()}")
            yield process, json.loads(line)["grpc"]
            process.send_signal(signal.SIGTERM)
            if process.wait(timeout=60) != 0:
                raise FuzzFailure(f"the server ended with status {process.returncode}: {log.read_text()}")
        finally:
            process.kill()


def _resident_mib(process: subprocess.Popen) -> float:
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise FuzzFailure("the server has ended")


def fuzz(numbers: Sequence[int], seed: int, max_growth_mib: float) -> dict[str, Any]:
    """Fuzzes a server process of its own; what came of it. Raises FuzzFailure."""
    with tempfile.TemporaryDirectory() as folder:
        path = make_bundle(Path(folder) / "models")
        log = Path(folder) / "server.log"
        with _server(path.parents[1], log) as (process, address), grpc.insecure_channel(address) as channel:
            fuzzer = Fuzzer(channel, _golden(path), seed)
            start = time.monotonic()
            fuzzer.run(numbers[:_WARM_CASES])
            before = _resident_mib(process)
            for begin in range(_WARM_CASES, len(numbers), _CASES_A_LINE):
                fuzzer.run(numbers[begin : begin + _CASES_A_LINE])
                done = min(begin + _CASES_A_LINE, len(numbers))
                print(f"{done:,} cases, {done / (time.monotonic() - start):,.0f} a second", file=sys.stderr)
            growth = _resident_mib(process) - before
            if growth > max_growth_mib:
                raise FuzzFailure(
                    f"seed {seed}: the server grew by {growth:.0f} MiB, more than {max_growth_mib:.0f}"
                )
        text = log.read_text()
        if "Traceback" in text or "internal error" in text:
            raise FuzzFailure(f"seed {seed}: the server logged an error: {text[-5000:]}")
    return {
        "seed": seed,
        "cases": len(numbers),
        "statuses": dict(sorted(fuzzer.outcomes.items())),
        "growth_mib": round(growth, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--max-growth-mib", type=float, default=300.0, help="(%(default)s)")
    args = parser.parse_args()
    print(f"seed {args.seed}", file=sys.stderr)
    numbers = range(args.cases) if args.case is None else [args.case]
    try:
        print(json.dumps(fuzz(numbers, args.seed, args.max_growth_mib)))
    except FuzzFailure as failure:
        raise SystemExit(f"FAILED: {failure}") from None


if __name__ == "__main__":
    main()
