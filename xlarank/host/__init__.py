"""CPU work per request: tables, preprocessing, hashing, gather. The native kernel is in native/."""

from xlarank.host._extension import native_available
from xlarank.host.gather import BoundRequest, Gatherer, Segment
from xlarank.host.hashing import hash_int64, hash_strings
from xlarank.host.memory import HugePages, TableMemory, huge_empty
from xlarank.host.preprocessing import model_inputs, to_dense, to_rows, truncate
from xlarank.host.strings import split_bytes_tensor
from xlarank.host.tables import aligned_empty, check_tables

__all__ = [
    "BoundRequest",
    "Gatherer",
    "HugePages",
    "Segment",
    "TableMemory",
    "aligned_empty",
    "check_tables",
    "hash_int64",
    "hash_strings",
    "huge_empty",
    "model_inputs",
    "native_available",
    "split_bytes_tensor",
    "to_dense",
    "to_rows",
    "truncate",
]
