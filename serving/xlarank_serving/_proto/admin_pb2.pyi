from xlarank_serving._proto import grpc_service_pb2 as _grpc_service_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class UpdateRowsRequest(_message.Message):
    __slots__ = ("model_name", "model_version", "table", "rows", "values")
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    model_name: str
    model_version: str
    table: str
    rows: _containers.RepeatedScalarFieldContainer[int]
    values: bytes
    def __init__(self, model_name: _Optional[str] = ..., model_version: _Optional[str] = ..., table: _Optional[str] = ..., rows: _Optional[_Iterable[int]] = ..., values: _Optional[bytes] = ...) -> None: ...

class UpdateRowsResponse(_message.Message):
    __slots__ = ("model_version", "table_version")
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TABLE_VERSION_FIELD_NUMBER: _ClassVar[int]
    model_version: str
    table_version: int
    def __init__(self, model_version: _Optional[str] = ..., table_version: _Optional[int] = ...) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ("model_name", "version")
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    model_name: str
    version: int
    def __init__(self, model_name: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class RollbackResponse(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class UpdateFeaturesResponse(_message.Message):
    __slots__ = ("model_version", "store_version")
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    STORE_VERSION_FIELD_NUMBER: _ClassVar[int]
    model_version: str
    store_version: int
    def __init__(self, model_version: _Optional[str] = ..., store_version: _Optional[int] = ...) -> None: ...

class RemoveFeaturesRequest(_message.Message):
    __slots__ = ("model_name", "model_version", "candidate_ids")
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_IDS_FIELD_NUMBER: _ClassVar[int]
    model_name: str
    model_version: str
    candidate_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, model_name: _Optional[str] = ..., model_version: _Optional[str] = ..., candidate_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class RemoveFeaturesResponse(_message.Message):
    __slots__ = ("model_version", "num_removed")
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_REMOVED_FIELD_NUMBER: _ClassVar[int]
    model_version: str
    num_removed: int
    def __init__(self, model_version: _Optional[str] = ..., num_removed: _Optional[int] = ...) -> None: ...
