"""What a server says about a model beside ModelMetadata: `config_of`, `statistics_of`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from xlarank.runtime import ModelStatistics
from xlarank.spec import DEFAULT_PRIORITY, NUM_PRIORITIES, BucketLadder, ModelSpec
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.layout import LENGTHS_SUFFIX

__all__ = ["config_of", "statistics_of"]


def config_of(
    metadata: messages.ModelMetadataResponse,
    spec: ModelSpec,
    ladder: BucketLadder,
    *,
    versions: Sequence[int],
    default_timeout_seconds: float = math.inf,
) -> messages.ModelConfig:
    """How a model is served, as Triton's clients read it.

    `max_batch_size` is 0: a request is not a row of a batch here, its tensors state their sizes in full.

    Args:
      metadata: of the model: its tensors.
      spec: the model.
      ladder: its compiled buckets.
      versions: those that are served.
      default_timeout_seconds: of requests that name none.
    """
    config = messages.ModelConfig(
        name=metadata.name, platform=metadata.platform, backend=metadata.platform, max_batch_size=0
    )
    config.version_policy.specific.versions.extend(versions)
    optional = {feature.name for feature in spec.features if feature.default is not None}
    for tensor in metadata.inputs:
        name = tensor.name.removesuffix(LENGTHS_SUFFIX)
        config.input.add(
            name=tensor.name,
            data_type=_data_type(tensor.datatype),
            dims=tensor.shape,
            optional=name in optional or name not in spec.feature_by_name,
        )
    for tensor in metadata.outputs:
        config.output.add(name=tensor.name, data_type=_data_type(tensor.datatype), dims=tensor.shape)
    batching = config.dynamic_batching
    batching.preferred_batch_size.extend(sorted({bucket.rows for bucket in ladder.buckets}))
    batching.priority_levels = NUM_PRIORITIES
    batching.default_priority_level = DEFAULT_PRIORITY
    batching.default_queue_policy.allow_timeout_override = True
    if default_timeout_seconds < math.inf:
        batching.default_queue_policy.default_timeout_microseconds = round(default_timeout_seconds * 1e6)
    config.parameters["buckets"].string_value = str(ladder)
    config.model_transaction_policy.decoupled = False
    return config


def statistics_of(name: str, version: int, counted: ModelStatistics) -> messages.ModelStatistics:
    """What a model version did; durations are of requests answered, but for `fail`.

    Args:
      name: the model's.
      version: its version.
      counted: what its metrics hold.
    """
    stats = messages.ModelStatistics(
        name=name,
        version=str(version),
        last_inference=round(counted.last_success_at * 1e3),
        inference_count=counted.num_rows,
        execution_count=counted.num_batches,
    )
    stages = stats.inference_stats
    for stage, seconds in counted.stage_seconds.items():
        field = "success" if stage == "request" else stage
        _set(getattr(stages, field), counted.num_successes, seconds)
    _set(stages.fail, counted.num_failures, counted.failure_seconds)
    for rows, batch in counted.batches.items():
        one = stats.batch_stats.add(batch_size=rows)
        _set(one.compute_input, batch.num_batches, batch.gather_seconds)
        _set(one.compute_infer, batch.num_batches, batch.execute_seconds)
    stats.memory_usage.add(type="CPU", id=0, byte_size=counted.table_bytes)
    return stats


def _data_type(datatype: str) -> str:
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"


def _set(duration: messages.StatisticDuration, count: int, seconds: float) -> None:
    duration.count, duration.ns = count, round(seconds * 1e9)
