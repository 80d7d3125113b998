"""Requests/s of the server with candidate ids alone against all features sent.

One `xlarank serve --features` on one device over configs/light.toml; a client in a process of its own, this
one, sends it requests of 500 candidates, encoded beforehand, a few at a time. The forms take turns of some
seconds:

    ids        context features and `candidate_ids`; the store has the rest
    by_name    all features, one raw tensor each
    packed     all features, one raw tensor a type and scope

    python tools/bench_features.py --turns 8 --seconds 3

Before anything is timed all forms must get the same scores, by a bit. It prints the figure `ids_only`,
against the faster of the two others, and as its last line a JSON object of what was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from bench_server import closed_loop
from figures import Figure, Goal, command, environment, ratio_figure, report, run_tool
from server_process import server_samples, serving
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.encoding import add_inputs
from xlarank_serving.layout import SERVICE_NAME

from xlarank.bundle import open_bundle
from xlarank.compiler import random_requests
from xlarank.host import FeatureFile, FeatureFileWriter, FeatureSchema, FeatureStore
from xlarank.spec import Column, ModelSpec, RankRequest, take

__all__ = ["ids_only", "measure"]

CONFIG = Path(__file__).parent.parent / "configs" / "light.toml"
NUM_CANDIDATES = 500
BUCKET_ROWS = (512,)
"""Two requests of 500 candidates never share a batch: every form runs the same program."""

FORMS = ("ids", "by_name", "packed")

_NUM_REQUESTS = 32
_NUM_LOOKUPS = 200


def measure(*, stored: int, turns: int, seconds: float, outstanding: int) -> dict[str, Any]:
    """Lets the forms take turns.

    Args:
      stored: candidates in the store.
      turns: of each form.
      seconds: of a turn, half a second of warming up not counted.
      outstanding: requests that the client keeps under way.

    Returns:
      Under each of `FORMS` requests/s by turn, neighbours in time at the same place; ``bytes``: of a request
      by form; ``cpu_ms``: the server's CPU time a request by form and turn, which others' work on the
      machine changes less; ``join_us``: median of a lookup of 500 ids in this process; ``how``: the method
      in words.

    Raises:
      RuntimeError: if the server can't be started.
      AssertionError: if the forms get different scores.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        words = ["--out", folder / "models", "--buckets", ",".join(map(str, BUCKET_ROWS))]
        spec = open_bundle(Path(run_tool("random_bundle.py", CONFIG, *words)["path"])).spec
        ids, columns = _write_features(spec, stored, folder / "features")
        encoded = _encode(spec, ids, columns)
        ready = stack.enter_context(
            serving(folder / "models", folder / "cache", "--features", folder / "features")
        )
        channel = stack.enter_context(grpc.insecure_channel(ready["grpc"]))
        infer = channel.unary_unary(f"/{SERVICE_NAME}/ModelInfer")  # bytes to bytes
        _check_same_scores(infer, encoded)
        rates: dict[str, Any] = {form: [] for form in FORMS}
        cpu_ms: dict[str, list[float]] = {form: [] for form in FORMS}
        for turn in range(turns):
            for form in FORMS if turn % 2 == 0 else reversed(FORMS):
                before = _cpu_and_requests(ready["http"])
                rates[form].append(closed_loop(infer, encoded[form], outstanding, seconds))
                cpu, requests = _cpu_and_requests(ready["http"]) - before
                cpu_ms[form].append(1e3 * cpu / requests)
        sizes = {form: round(statistics.mean(map(len, encoded[form]))) for form in FORMS}
        how = (
            f"configs/{CONFIG.name} with random weights, {stored} candidates in the store; closed loop of "
            f"{outstanding} requests under way, {NUM_CANDIDATES} random candidates each, encoded beforehand "
            f"by a client process, to `xlarank serve --features --devices 1`; bytes of a request {sizes}; "
            f"{turns} turns of {seconds:g} s each"
        )
        join_us = _join_us(spec, ids, folder / "features")
        return {**rates, "cpu_ms": cpu_ms, "bytes": sizes, "join_us": join_us, "how": how}


def ids_only(result: dict[str, Any]) -> Figure:
    """The figure of what `measure` returned."""
    medians = {form: statistics.median(result[form]) for form in FORMS}
    best = max(("by_name", "packed"), key=medians.__getitem__)
    return ratio_figure(
        "ids_only",
        result["ids"],
        result[best],
        target=1.5,
        goal=Goal.AT_LEAST,
        how=f"{command()}: {result['how']}; over all features sent {best}, the faster form; {environment()}",
        beside={
            **{f"over {form}, of CPU of the server": f"{_cpu_ratio(result, form):.3f}" for form in FORMS[1:]},
            "requests/s, median": ", ".join(f"{form} {rate:,.0f}" for form, rate in medians.items()),
            "CPU of the server a request, median": ", ".join(
                f"{form} {statistics.median(times):.2f} ms" for form, times in result["cpu_ms"].items()
            ),
            "bytes a request": ", ".join(f"{form} {size:,}" for form, size in result["bytes"].items()),
            "join of 500 ids, median": f"{result['join_us']:.0f} us",
        },
    )


def _cpu_ratio(result: dict[str, Any], form: str) -> float:
    times = result["cpu_ms"]
    return statistics.median(a / b for a, b in zip(times[form], times["ids"], strict=True))


def _write_features(spec: ModelSpec, stored: int, path: Path) -> tuple[np.ndarray, dict[str, Column]]:
    """Random rows of a store; their ids [stored], and columns of all features by name."""
    request = random_requests(spec, 1, num_candidates=stored)[0]
    columns = dict(zip([feature.name for feature in spec.features], request.columns, strict=True))
    ids = np.random.default_rng(0).permutation(10 * stored)[:stored]
    schema = FeatureSchema.of(spec.candidate_features)
    with FeatureFileWriter(path, schema, model=spec.name) as writer:
        writer.add(ids, [columns[name] for name in schema.names])
    return ids, columns


def _encode(spec: ModelSpec, ids: np.ndarray, columns: dict[str, Column]) -> dict[str, list[bytes]]:
    """The same requests in every form."""
    encoded: dict[str, list[bytes]] = {form: [] for form in FORMS}
    rng = np.random.default_rng(1)
    for _ in range(_NUM_REQUESTS):
        rows = rng.integers(0, len(ids), NUM_CANDIDATES)
        values = {
            f.name: columns[f.name] if f.is_context else take(columns[f.name], rows) for f in spec.features
        }
        request = RankRequest(spec, values)
        for form in FORMS:
            message = messages.ModelInferRequest(model_name=spec.name)
            add_inputs(message, spec, request, packed=form == "packed")
            if form == "ids":
                message = _without_candidates(message, spec, ids[rows])
            encoded[form].append(message.SerializeToString())
    return encoded


def _without_candidates(message: Any, spec: ModelSpec, ids: np.ndarray) -> messages.ModelInferRequest:
    context = {feature.name for feature in spec.context_features}
    kept = messages.ModelInferRequest(model_name=spec.name)
    for tensor, raw in zip(message.inputs, message.raw_input_contents, strict=True):
        if tensor.name.partition(".")[0] in context:
            kept.inputs.append(tensor)
            kept.raw_input_contents.append(raw)
    kept.inputs.add(name="candidate_ids", datatype="INT64", shape=ids.shape)
    kept.raw_input_contents.append(ids.astype("<i8").tobytes())
    return kept


def _check_same_scores(infer: Any, encoded: dict[str, list[bytes]]) -> None:
    for place in range(_NUM_REQUESTS):
        answers = [messages.ModelInferResponse.FromString(infer(encoded[form][place])) for form in FORMS]
        scores = [np.frombuffer(answer.raw_output_contents[0], "<f4") for answer in answers]
        for other in scores[1:]:
            np.testing.assert_array_equal(scores[0], other)


def _cpu_and_requests(http: str) -> np.ndarray:
    totals = {name: float(value) for name, _, value in server_samples(http)}
    return np.array([totals["process_cpu_seconds_total"], totals["nv_inference_request_success"]])


def _join_us(spec: ModelSpec, ids: np.ndarray, path: Path) -> float:
    store, rng, times = FeatureStore(spec, file=FeatureFile.open(path)), np.random.default_rng(2), []
    for _ in range(_NUM_LOOKUPS):
        some = rng.choice(ids, NUM_CANDIDATES)
        begin = time.perf_counter()
        store.join(some, {})
        times.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file of the figure")
    parser.add_argument("--stored", type=int, default=200_000, help="candidates in the store (%(default)s)")
    parser.add_argument("--turns", type=int, default=8, help="of each form (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3, help="of a turn (%(default)s)")
    parser.add_argument("--outstanding", type=int, default=3, help="requests under way (%(default)s)")
    args = parser.parse_args()
    result = measure(stored=args.stored, turns=args.turns, seconds=args.seconds, outstanding=args.outstanding)
    report([ids_only(result)], args.out)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
