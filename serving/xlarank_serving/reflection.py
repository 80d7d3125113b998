"""grpc.reflection.v1alpha, for grpcurl and its like."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from xlarank_serving._proto import admin_pb2, grpc_service_pb2
from xlarank_serving.receiving import ReceiveWatch
from xlarank_serving.threads import ServerThreads, on_threads

__all__ = ["SERVICE_NAME", "reflection_handlers"]

SERVICE_NAME = reflection.SERVICE_NAME


def reflection_handlers(
    service_names: Iterable[str], threads: ServerThreads, watch: ReceiveWatch
) -> dict[str, grpc.RpcMethodHandler]:
    """A handler a method, by name.

    Args:
      service_names: what is served beside reflection.
      threads: a thread of `reflection` is held by each open stream.
      watch: ends streams that are silent or unread.
    """
    # One pool of all that is served: our messages are in a private one, gRPC's own in the default one.
    pool = descriptor_pool.DescriptorPool()
    for module in (grpc_service_pb2, admin_pb2, health_pb2, reflection_pb2):
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    servicer = reflection.ReflectionServicer([*service_names, SERVICE_NAME], pool=pool)

    def info(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        awaited = iter(functools.partial(watch.receive, requests, context), None)
        for response in servicer.ServerReflectionInfo(awaited, context):
            with watch.awaiting(context):
                yield response

    handler = grpc.stream_stream_rpc_method_handler(
        on_threads(info, threads.reflection),
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return {"ServerReflectionInfo": handler}
