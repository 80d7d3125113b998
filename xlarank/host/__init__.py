"""CPU work per request: tables, preprocessing, hashing, gather. The native kernel is in native/."""

from xlarank.host._extension import native_available
from xlarank.host.gather import BoundRequest, Gatherer, Segment
from xlarank.host.hashing import hash_int64, hash_strings
from xlarank.host.memory import HugePages, TableMemory, huge_empty
from xlarank.host.preprocessing import model_inputs, to_dense, to_rows, truncate
from xlarank.host.row_codec import check_tables, decode_rows, encode_rows
from xlarank.host.strings import split_bytes_tensor
from xlarank.host.tables import HostTable, aligned_empty

__all__ = [
    "BoundRequest",
    "Gatherer",
    "HostTable",
    "HugePages",
    "Segment",
    "TableMemory",
    "aligned_empty",
    "check_tables",
    "decode_rows",
    "encode_rows",
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
