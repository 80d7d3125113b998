"""The nouns of xlarank, one definition each: features, request, buckets, signature, precision, profile.

numpy and the standard library only.
"""

from xlarank.spec.buckets import DEFAULT_ROWS, Bucket, BucketLadder
from xlarank.spec.columns import Column, Ragged, StringColumn, join_columns, take
from xlarank.spec.features import (
    CANDIDATE_IDS,
    Combiner,
    FeatureKind,
    FeatureSpec,
    OutOfRange,
    Scope,
    TableSpec,
    TaskKind,
    TaskSpec,
    ValueType,
)
from xlarank.spec.model import ModelSpec, rows_needed
from xlarank.spec.options import DEFAULT_PRIORITY, NUM_PRIORITIES, RequestOptions
from xlarank.spec.placement import Placement, TablePlacement
from xlarank.spec.platforms import PlatformOptions
from xlarank.spec.precision import ErrorBudget, Precision, PrecisionPolicy, Tolerance
from xlarank.spec.preprocessing import (
    Bucketise,
    Clip,
    Hash,
    Log1p,
    Operation,
    Standardise,
    Vocabulary,
    operation_from_dict,
    operation_to_dict,
)
from xlarank.spec.profile import LatencyProfile
from xlarank.spec.request import (
    ContentCheck,
    RankRequest,
    check_by_name,
    check_candidate_ids,
    check_contents,
    default_column,
)
from xlarank.spec.row_format import RowFormat
from xlarank.spec.serving import CaptureConfig, DispatchPolicy, FaultConfig, QueueConfig
from xlarank.spec.signature import (
    MASK_SUFFIX,
    REQUEST_OF_ROW,
    DeviceLookup,
    DeviceTable,
    Leaf,
    Signature,
    Slot,
)

__all__ = [
    "CANDIDATE_IDS",
    "DEFAULT_PRIORITY",
    "DEFAULT_ROWS",
    "MASK_SUFFIX",
    "NUM_PRIORITIES",
    "REQUEST_OF_ROW",
    "Bucket",
    "BucketLadder",
    "Bucketise",
    "CaptureConfig",
    "Clip",
    "Column",
    "Combiner",
    "ContentCheck",
    "DeviceLookup",
    "DeviceTable",
    "DispatchPolicy",
    "ErrorBudget",
    "FaultConfig",
    "FeatureKind",
    "FeatureSpec",
    "Hash",
    "LatencyProfile",
    "Leaf",
    "Log1p",
    "ModelSpec",
    "Operation",
    "OutOfRange",
    "Placement",
    "PlatformOptions",
    "Precision",
    "PrecisionPolicy",
    "QueueConfig",
    "Ragged",
    "RankRequest",
    "RequestOptions",
    "RowFormat",
    "Scope",
    "Signature",
    "Slot",
    "Standardise",
    "StringColumn",
    "TablePlacement",
    "TableSpec",
    "TaskKind",
    "TaskSpec",
    "Tolerance",
    "ValueType",
    "Vocabulary",
    "check_by_name",
    "check_candidate_ids",
    "check_contents",
    "default_column",
    "join_columns",
    "operation_from_dict",
    "operation_to_dict",
    "rows_needed",
    "take",
]
