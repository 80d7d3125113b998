"""CPU work per request: tables, preprocessing, hashing, gather. The native kernel is in native/."""

from xlarank.host._extension import native_available
from xlarank.host.device_rows import DeviceRows
from xlarank.host.feature_file import FeatureFile, FeatureFileWriter
from xlarank.host.feature_options import FeatureOptions
from xlarank.host.feature_schema import FeatureSchema, checked_columns, select_features
from xlarank.host.feature_source import FeatureRows, FeatureSource, FileSource, UpdatableSource
from xlarank.host.feature_store import FeatureStore, FeatureStoreStats, MissPolicy
from xlarank.host.gather import BoundRequest, Gatherer, Segment
from xlarank.host.hashing import hash_int64, hash_strings
from xlarank.host.infer_message import InferForms, RawMessage
from xlarank.host.memory import HugePages, TableMemory, huge_empty
from xlarank.host.preprocessing import model_inputs, to_dense, to_rows, truncate
from xlarank.host.row_codec import check_tables, decode_rows, encode_rows
from xlarank.host.shared_rows import SharedRows
from xlarank.host.strings import split_bytes_tensor
from xlarank.host.tables import HostTable, aligned_empty
from xlarank.host.updates import checked_update

__all__ = [
    "BoundRequest",
    "DeviceRows",
    "FeatureFile",
    "FeatureFileWriter",
    "FeatureOptions",
    "FeatureRows",
    "FeatureSchema",
    "FeatureSource",
    "FeatureStore",
    "FeatureStoreStats",
    "FileSource",
    "Gatherer",
    "HostTable",
    "HugePages",
    "InferForms",
    "MissPolicy",
    "RawMessage",
    "Segment",
    "SharedRows",
    "TableMemory",
    "UpdatableSource",
    "aligned_empty",
    "check_tables",
    "checked_columns",
    "checked_update",
    "decode_rows",
    "encode_rows",
    "hash_int64",
    "hash_strings",
    "huge_empty",
    "model_inputs",
    "native_available",
    "select_features",
    "split_bytes_tensor",
    "to_dense",
    "to_rows",
    "truncate",
]
