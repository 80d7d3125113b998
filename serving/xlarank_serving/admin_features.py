"""Changing candidate features while a server serves: `feature_methods` of the service, `FeatureCalls`."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from google.protobuf.message import Message

from xlarank.errors import FeatureError, RequestError
from xlarank.host import FeatureStore
from xlarank.spec import ModelSpec, RankRequest, check_candidate_ids, take
from xlarank_serving._proto import admin_pb2 as messages
from xlarank_serving._proto import grpc_service_pb2 as inference
from xlarank_serving.client import ModelInputs
from xlarank_serving.codec import ModelCodec
from xlarank_serving.encoding import add_inputs

__all__ = ["FEATURE_RPCS", "MAX_PART_BYTES", "FeatureCalls", "feature_methods"]

MAX_PART_BYTES = 16 << 20
"""What is larger a client sends in several calls, each far below the largest message that servers take."""

FEATURE_RPCS: dict[str, tuple[type[Message], type[Message]]] = {
    "UpdateFeatures": (inference.ModelInferRequest, messages.UpdateFeaturesResponse),
    "RemoveFeatures": (messages.RemoveFeaturesRequest, messages.RemoveFeaturesResponse),
    "FeatureMetadata": (inference.ModelMetadataRequest, inference.ModelMetadataResponse),
}
"""RPCs by name: the messages that they take and give."""


class _Engine(Protocol):
    @property
    def version(self) -> int: ...

    @property
    def features(self) -> FeatureStore | None: ...

    def update_features(self, ids: object, features: Mapping[str, object]) -> None: ...

    def remove_features(self, ids: object) -> int: ...


class _Repository(Protocol):
    def lease(
        self, name: str, version: str, *, by_traffic: bool
    ) -> contextlib.AbstractContextManager[Any]: ...


def feature_methods(repository: _Repository) -> dict[str, Callable[[Any, Any], Message]]:
    """The methods of `FEATURE_RPCS` by name, each from a request and the call's context to the response.

    Args:
      repository: whose models' feature stores may be changed.
    """

    # One codec an engine, dropped with it; not a store, which its codec would keep. A lost race builds one
    # twice, and they are equal.
    codecs: weakref.WeakKeyDictionary[_Engine, ModelCodec] = weakref.WeakKeyDictionary()

    def codec_of(engine: _Engine, store: FeatureStore) -> ModelCodec:
        codec = codecs.get(engine)
        if codec is None:
            codec = codecs[engine] = ModelCodec(store.rows_spec, store)
        return codec

    def update(request: inference.ModelInferRequest, _: object) -> messages.UpdateFeaturesResponse:
        with _served(repository, request.model_name, request.model_version) as (engine, store):
            ids, features = codec_of(engine, store).decode_rows(request)
            if len(ids):
                engine.update_features(ids, features)
            return messages.UpdateFeaturesResponse(
                model_version=str(engine.version), store_version=store.stats().version
            )

    def remove(request: messages.RemoveFeaturesRequest, _: object) -> messages.RemoveFeaturesResponse:
        with _served(repository, request.model_name, request.model_version) as (engine, _store):
            ids = np.array(request.candidate_ids, np.int64)
            num_removed = engine.remove_features(ids) if len(ids) else 0
            return messages.RemoveFeaturesResponse(model_version=str(engine.version), num_removed=num_removed)

    def metadata(request: inference.ModelMetadataRequest, _: object) -> inference.ModelMetadataResponse:
        with _served(repository, request.name, request.version) as (engine, store):
            return codec_of(engine, store).metadata([engine.version])

    return {"UpdateFeatures": update, "RemoveFeatures": remove, "FeatureMetadata": metadata}


class FeatureCalls:
    """A client's side of the same RPCs. Any thread."""

    def __init__(self, call: Callable[[str, Message], Any]) -> None:
        """
        Args:
          call: makes one of `FEATURE_RPCS`, by its name.
        """
        self._call = call

    def update(self, model_name: str, candidate_ids: Any, features: Mapping[str, Any], version: str) -> int:
        """Puts rows in, in as many calls as `MAX_PART_BYTES` asks for.

        Args:
          model_name: of the repository.
          candidate_ids: [n] integers.
          features: a value for each stored feature by name, n rows, as `RankRequest` takes them.
          version: of the model; empty for the newest. The one that takes the first part takes all of them.

        Returns:
          The store's version.

        Raises:
          FeatureError: for what can't be sent.
          RequestError: for what the server refuses; parts sent before stay.
        """
        ids = check_candidate_ids(candidate_ids)
        asked = inference.ModelMetadataRequest(name=model_name, version=version)
        inputs = ModelInputs(self._call("FeatureMetadata", asked))
        rows = inputs.request(features, ids)
        return self._send(inputs.spec, rows, ids, (model_name, version)).store_version

    def remove(self, model_name: str, candidate_ids: Any, version: str) -> int:
        """Takes rows out; returns how many there were. RequestError for what the server refuses."""
        ids = check_candidate_ids(candidate_ids)
        num_removed, step = 0, MAX_PART_BYTES // 10  # an id takes up to ten bytes
        for begin in range(0, max(1, len(ids)), step):
            request = messages.RemoveFeaturesRequest(
                model_name=model_name, model_version=version, candidate_ids=ids[begin : begin + step].tolist()
            )
            response = self._call("RemoveFeatures", request)
            version, num_removed = response.model_version, num_removed + response.num_removed
        return num_removed

    def _send(self, model: ModelSpec, rows: RankRequest, ids: np.ndarray, key: tuple[str, str]) -> Any:
        message = inference.ModelInferRequest(model_name=key[0], model_version=key[1])
        add_inputs(message, model, rows, candidate_ids=ids)
        if message.ByteSize() <= MAX_PART_BYTES:
            return self._call("UpdateFeatures", message)
        if len(ids) == 1:
            raise FeatureError(
                f"features of candidate {ids[0]}: expected a row of at most {MAX_PART_BYTES} bytes, got "
                f"{message.ByteSize()}"
            )
        del message
        response = None
        for part in np.array_split(np.arange(len(ids)), 2):
            columns = [take(column, part) for column in rows.columns]
            values = dict(zip([f.name for f in rows.spec.features], columns, strict=True))
            some = RankRequest(
                rows.spec, values, num_candidates=len(part), check=lambda _spec, _columns: None
            )
            response = self._send(model, some, ids[part], key)
            key = key[0], response.model_version
        return response


@contextlib.contextmanager
def _served(repository: _Repository, name: str, version: str) -> Iterator[tuple[_Engine, FeatureStore]]:
    """A model's engine, kept open meanwhile, and its feature store; RequestError if it has none."""
    with repository.lease(name, version, by_traffic=False) as engine:
        if engine.features is None:
            raise RequestError(
                f"model {name!r} is served without a feature store: start the server with --features"
            )
        yield engine, engine.features
