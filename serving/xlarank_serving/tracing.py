"""OpenTelemetry spans of ranking requests: `Tracer`. It needs the extra `otel`.

A request is a span `ModelInfer` with six below it, wait, decode, queue, gather, execute and respond, made
when it is answered, from the times that were taken anyway; it continues the caller's trace where metadata has
a `traceparent`. One that dies in the queue has its time there up to its end. Requests that aren't sampled
cost one decision.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from xlarank_serving.config import TracingConfig
from xlarank_serving.request_record import RequestRecord

__all__ = ["Tracer"]

_log = logging.getLogger(__name__)

_NANOSECONDS = 1e9

_CLOSE_SECONDS = 2.0
"""How long the spans that are left may take at the end."""

_LAST_SECONDS = 0.5
"""Then how long the exporter may take to end what it has under way."""


class Tracer:
    """Sends spans to a collector until closed. A `RequestRecord` observer; any thread."""

    def __init__(self, config: TracingConfig, *, exporter: SpanExporter | None = None) -> None:
        """
        Args:
          config: where to, and how many.
          exporter: takes the spans; OTLP over gRPC to the config's endpoint by default.
        """
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(config.share)),
            resource=Resource.create({"service.name": "xlarank"}),
            shutdown_on_exit=False,
        )
        is_plain = not (config.endpoint or "").startswith("https://")
        self._exporter = exporter or OTLPSpanExporter(endpoint=config.endpoint, insecure=is_plain)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("xlarank")
        self._propagator = TraceContextTextMapPropagator()

    def __call__(self, record: RequestRecord) -> None:
        """Makes the spans of a request."""
        carrier = {} if record.trace_parent is None else {"traceparent": record.trace_parent}
        parent = self._propagator.extract(carrier)
        end = record.ended_at
        begin = end - record.total_seconds
        span = self._tracer.start_span("ModelInfer", parent, SpanKind.SERVER, start_time=_nanoseconds(begin))
        if span.is_recording():
            if record.transport == "grpc":
                span.set_attributes({"rpc.system": "grpc", "rpc.grpc.status": record.status})
            span.set_attributes(
                {
                    "xlarank.transport": record.transport,
                    "xlarank.status": record.status,
                    "xlarank.model": record.model,
                    "xlarank.version": record.version,
                    "xlarank.request_id": record.id,
                    "xlarank.candidates": -1 if record.candidates is None else record.candidates,
                }
            )
            self._add_stages(span, record, begin, end)
            if record.status != "OK":
                span.set_status(Status(StatusCode.ERROR, record.message))
        span.end(_nanoseconds(end))

    def close(self) -> None:
        """Sends what is left, for some seconds at most; the log says what a collector that doesn't answer
        hasn't got."""
        if not _ends_within(_CLOSE_SECONDS, self._provider.shutdown):
            _log.warning("tracing: the collector didn't take the last spans in time; they are lost")
            _ends_within(_LAST_SECONDS, self._exporter.shutdown)  # what still tries is told to stop

    def _add_stages(self, span: trace.Span, record: RequestRecord, begin: float, end: float) -> None:
        if record.decode_seconds is None:
            return
        stages = [("wait", record.wait_seconds), ("decode", record.decode_seconds)]
        if record.timings is not None:
            stages += [(name, getattr(record.timings, name)) for name in ("queue", "gather", "execute")]
        elif record.status == "DEADLINE_EXCEEDED":  # once it is decoded, nothing else takes its time
            stages.append(("queue", math.inf))
        context = trace.set_span_in_context(span)
        for name, seconds in stages:
            stage = self._tracer.start_span(name, context, start_time=_nanoseconds(begin))
            begin = min(begin + seconds, end)
            stage.end(_nanoseconds(begin))
        if record.timings is not None:  # what is left: scores to their requests, and the answer written
            self._tracer.start_span("respond", context, start_time=_nanoseconds(begin)).end(_nanoseconds(end))


def _nanoseconds(seconds: float) -> int:
    return int(seconds * _NANOSECONDS)


def _ends_within(seconds: float, function: Callable[[], object]) -> bool:
    """Whether a function does, on a thread that is left behind otherwise. OpenTelemetry's shutdown waits 30 s
    for its own thread, and its flush heeds no timeout."""
    thread = threading.Thread(target=function, name="tracer-close", daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
