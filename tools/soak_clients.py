"""What a soak's clients send: `Clients`."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
from bench_server import encode
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.admin import AdminClient
from xlarank_serving.http_messages import HEADER_LENGTH
from xlarank_serving.layout import SERVICE_NAME

from xlarank.compiler import random_requests
from xlarank.spec import ModelSpec

__all__ = ["ANSWERS", "Clients", "rest_request"]

ANSWERS = {"OK", "RESOURCE_EXHAUSTED"}
"""Statuses that a request as it should be may get."""

SIZES = (0, 1, 2, 7, 16, 17, 100, 128, 129, 500, 512, 513, 1000, 1024, 2000, 3000)

_NUM_MIXED = 4
_BURST = 300
"""Requests of 500 candidates sent at once: many times what the queue holds."""

_TIMEOUT_SECONDS = 30.0
_REST_CODES = {200: "OK", 429: "RESOURCE_EXHAUSTED", 503: "RESOURCE_EXHAUSTED"}


class Clients:
    """Threads that send requests of all kinds until they are told to stop: `_NUM_MIXED` that each wait for an
    answer before the next request, and one that sends bursts whether they are answered or not."""

    def __init__(self, ready: dict[str, Any], spec: ModelSpec, *, burst_seconds: float) -> None:
        """
        Args:
          ready: of a server with a REST and an administrative port.
          spec: of its model, one of whose tables is updatable.
          burst_seconds: from one burst to the next.
        """
        self._address, self._admin_address, self._spec = ready["grpc"], ready["admin"], spec
        self._rest_address, self._burst_seconds = ready["rest"], burst_seconds
        self._valid = {
            size: [encode(spec, r) for r in random_requests(spec, 2, num_candidates=size, seed=size)]
            for size in SIZES
        }
        self._bad = list(_bad_requests(self._valid[7][0]))
        self._table = next(table for table in spec.tables if table.updatable)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()  # guarded by _lock
        self._failures: list[str] = []  # guarded by _lock
        self._threads = [threading.Thread(target=self._mix, args=(seed,)) for seed in range(_NUM_MIXED)]
        self._threads.append(threading.Thread(target=self._burst))
        for thread in self._threads:
            thread.start()

    def stop(self) -> tuple[Counter[tuple[str, str]], list[str]]:
        """Waits for the threads; what became of the requests, and what went wrong."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        return self._counts, self._failures

    def _mix(self, seed: int) -> None:
        rng = random.Random(seed)
        kinds: list[tuple[Callable[..., None], int]] = [
            (self._valid_one, 50),
            (self._rest_one, 10),
            (self._stream, 5),
            (self._bad_one, 15),
            (self._cancelled_one, 10),
            (self._hurried_one, 10),
            (self._disconnected_ones, 2),
            (self._update, 3),
        ]
        methods, weights = zip(*kinds, strict=True)
        with grpc.insecure_channel(self._address) as channel, AdminClient(self._admin_address) as admin:
            while not self._stop.is_set():
                (method,) = rng.choices(methods, weights)
                try:
                    method(rng, channel=channel, admin=admin)
                except Exception as error:  # a thread's boundary: whatever it is, it is a failure
                    self._count("client", type(error).__name__, set(), str(error))

    def _count(self, kind: str, code: str, expected: set[str], detail: str = "") -> None:
        with self._lock:
            self._counts[kind, code] += 1
            if code not in expected and len(self._failures) < 20:
                wanted = " or ".join(sorted(expected)) or "nothing of the kind"
                self._failures.append(f"{kind}: expected {wanted}, got {code}: {detail[:300]}")

    def _valid_one(self, rng: random.Random, *, channel: grpc.Channel, admin: AdminClient) -> None:
        size = rng.choice(SIZES)
        call = _send(channel, rng.choice(self._valid[size]), _TIMEOUT_SECONDS)
        code, detail = _outcome(call)
        if code == "OK":
            answer = messages.ModelInferResponse.FromString(call.result())
            scores = np.frombuffer(answer.raw_output_contents[0], "<f4")
            if scores.shape != (size,) or not np.isfinite(scores).all():
                code, detail = "WRONG", f"expected {size} finite scores, got {scores.shape}"
        self._count("valid", code, ANSWERS, detail)

    def _rest_one(self, rng: random.Random, *, channel: grpc.Channel, admin: AdminClient) -> None:
        size = rng.choice(SIZES)
        head, body = rest_request(rng.choice(self._valid[size]))
        connection = http.client.HTTPConnection(self._rest_address, timeout=2 * _TIMEOUT_SECONDS)
        with contextlib.closing(connection):
            headers = {HEADER_LENGTH: str(len(head))}
            connection.request("POST", f"/v2/models/{self._spec.name}/infer", head + body, headers)
            answer = connection.getresponse()
            data = answer.read()
        code = _REST_CODES.get(answer.status, f"HTTP {answer.status}")
        if code == "OK":
            scores = np.array(json.loads(data)["outputs"][0]["data"], np.float32)
            if scores.shape != (size,) or not np.isfinite(scores).all():
                code = "WRONG"
        self._count("rest", code, ANSWERS, data.decode(errors="replace"))

    def _stream(self, rng: random.Random, *, channel: grpc.Channel, admin: AdminClient) -> None:
        """Of a few requests; every third one is left before its end."""
        data = [rng.choice(self._valid[rng.choice(SIZES)]) for _ in range(8)]
        method = channel.stream_stream(f"/{SERVICE_NAME}/ModelStreamInfer")
        call = method(iter(data), timeout=2 * _TIMEOUT_SECONDS)
        num_wanted = rng.randrange(8) if rng.randrange(3) == 0 else None
        num_answers = 0
        try:
            while num_answers != num_wanted:
                answer = messages.ModelStreamInferResponse.FromString(next(call))
                num_answers += 1
                status = answer.infer_response.parameters["xlarank_status"].string_param
                self._count("streamed", status or "OK", ANSWERS, answer.error_message)
        except StopIteration:
            if num_answers != len(data):
                self._count("stream", "SHORT", set(), f"{num_answers} answers to {len(data)} requests")
        except grpc.RpcError as error:
            self._count("stream", error.code().name, ANSWERS, error.details() or "")
        call.cancel()

    def _burst(self) -> None:
        """Far more at once than the server's queue holds."""
        with grpc.insecure_channel(self._address) as channel:
            while not self._stop.is_set():
                data = self._valid[500]
                calls = [_send(channel, data[n % len(data)], _TIMEOUT_SECONDS) for n in range(_BURST)]
                for call in calls:
                    code, detail = _outcome(call)
                    self._count("burst", code, ANSWERS, detail)
                self._stop.wait(self._burst_seconds)

    def _bad_one(self, rng: random.Random, *, channel: grpc.Channel, admin: AdminClient) -> None:
        data, code = rng.choice(self._bad)
        # In a burst a request is refused before anybody reads that it is bad.
        expected = {code, "RESOURCE_EXHAUSTED"}
        self._count(f"bad ({code})", *self._told(channel, data, _TIMEOUT_SECONDS, expected))

    def _cancelled_one(self, rng: random.Random, *, channel: grpc.Channel, admin: AdminClient) -> None:
        call = _send(channel, rng.choice(self._valid[rng.choice(SIZES)]), _TIMEOUT_SECONDS)
        self._stop.wait(rng.uniform(0, 0.02))
        call.cancel()
        code, detail = _outcome(call)
        self._count("cancelled", code, ANSWERS | {"CANCELLED"}, detail)

    def _hurried_one(self, rng: random.Random, *, channel: grpc.Channel, admin: AdminClient) -> None:
        data = rng.choice(self._valid[rng.choice(SIZES)])
        expected = ANSWERS | {"DEADLINE_EXCEEDED"}
        self._count("hurried", *self._told(channel, data, rng.uniform(0.001, 0.03), expected))

    def _disconnected_ones(self, rng: random.Random, *, channel: grpc.Channel, admin: AdminClient) -> None:
        own = grpc.insecure_channel(self._address, options=[("grpc.use_local_subchannel_pool", 1)])
        calls = [_send(own, rng.choice(self._valid[500]), _TIMEOUT_SECONDS) for _ in range(3)]
        self._stop.wait(rng.uniform(0, 0.02))
        own.close()
        for call in calls:
            code, detail = _outcome(call)
            self._count("disconnected", code, ANSWERS | {"CANCELLED"}, detail)

    def _update(self, rng: random.Random, *, channel: grpc.Channel, admin: AdminClient) -> None:
        rows = np.array([rng.randrange(self._table.rows or 1) for _ in range(10)])
        values = np.array([[rng.uniform(-1, 1) for _ in range(self._table.dim)] for _ in rows], np.float32)
        admin.update_rows(self._spec.name, self._table.name, rows, values)
        self._count("update", "OK", {"OK"})

    def _told(
        self, channel: grpc.Channel, data: bytes, timeout: float, expected: set[str]
    ) -> tuple[str, set[str], str]:
        code, detail = _outcome(_send(channel, data, timeout))
        return code, expected, detail


def _send(channel: grpc.Channel, data: bytes, timeout: float) -> Any:
    return channel.unary_unary(f"/{SERVICE_NAME}/ModelInfer").future(data, timeout=timeout)


def _outcome(call: Any) -> tuple[str, str]:
    with contextlib.suppress(grpc.RpcError, grpc.FutureCancelledError):
        call.exception(timeout=2 * _TIMEOUT_SECONDS)
    return call.code().name, call.details() or ""


def _bad_requests(valid: bytes) -> Iterator[tuple[bytes, str]]:
    """Bytes and the status that they must get."""

    def changed(change: Callable[[Any], object]) -> bytes:
        message = messages.ModelInferRequest.FromString(valid)
        change(message)
        return message.SerializeToString()

    yield b"\xff" * 40, "INVALID_ARGUMENT"
    yield valid[: len(valid) // 2], "INVALID_ARGUMENT"
    yield changed(lambda m: setattr(m, "model_name", "nobody")), "NOT_FOUND"
    yield changed(lambda m: setattr(m, "model_version", "99")), "NOT_FOUND"
    yield changed(lambda m: setattr(m.inputs[1], "name", "strange")), "INVALID_ARGUMENT"
    yield changed(lambda m: setattr(m.inputs[1], "datatype", "INT64")), "INVALID_ARGUMENT"
    yield changed(lambda m: m.inputs[1].shape.append(2**40)), "INVALID_ARGUMENT"
    yield changed(lambda m: m.raw_input_contents.pop()), "INVALID_ARGUMENT"


def rest_request(data: bytes) -> tuple[bytes, bytes]:
    """A ModelInfer message as HTTP carries it: JSON, and the tensors' bytes behind."""
    message = messages.ModelInferRequest.FromString(data)
    inputs = [
        {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.shape),
            "parameters": {"binary_data_size": len(raw)},
        }
        for tensor, raw in zip(message.inputs, message.raw_input_contents, strict=True)
    ]
    return json.dumps({"inputs": inputs}).encode(), b"".join(message.raw_input_contents)
