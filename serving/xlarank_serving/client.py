"""A client for any xlarank server: `RankingClient`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
import numpy as np

from xlarank.errors import FeatureError, RequestError, UnavailableError
from xlarank.spec import (
    CANDIDATE_IDS,
    Column,
    Combiner,
    FeatureKind,
    FeatureSpec,
    Hash,
    ModelSpec,
    RankRequest,
    Scope,
    TableSpec,
    TaskSpec,
    ValueType,
    check_candidate_ids,
)
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.channel import ClientTls, open_channel, token_metadata
from xlarank_serving.encoding import add_inputs
from xlarank_serving.layout import LENGTHS_SUFFIX, SERVICE_NAME
from xlarank_serving.parameters import AFFINITY_KEY
from xlarank_serving.status import error_of_call

__all__ = ["ModelInputs", "RankingClient"]

_DTYPES = {"FP32": ValueType.FLOAT32, "INT64": ValueType.INT64, "BYTES": ValueType.STRING}

_ANSWERS = {"FP32": np.dtype("<f4"), "INT32": np.dtype("<i4")}

_TABLE = "ids"

_STAND_IN = "stand_in"
"""Candidate feature of the spec of a request that sends none; with underscores behind if a model has it."""


class RankingClient:
    """Scores candidates on a server. Any thread; a context manager.

    It asks the server once for a model's inputs, so it needs no ModelSpec.

        with RankingClient("localhost:8001") as client:
            scores = client.score("feed", {"age": 31.0, "video": [5, 8, 13]})
            scores = client.score("feed", {"age": 31.0}, candidate_ids=[5, 8, 13])  # with a feature store
    """

    def __init__(
        self,
        address: str,
        *,
        timeout: float | None = 60.0,
        tls: ClientTls | None = None,
        token: str | None = None,
    ) -> None:
        """
        Args:
          address: host:port. Nothing is sent until a method is called.
          timeout: seconds a call may take unless it says otherwise; None for no limit.
          tls: for a server with TLS; None for one without.
          token: what the server knows this client by.

        Raises:
          ConfigError: if a file of `tls` can't be read.
        """
        self._timeout = timeout
        self._metadata = token_metadata(token)
        self._channel = open_channel(address, tls)
        self._calls = {
            name: self._channel.unary_unary(
                f"/{SERVICE_NAME}/{name}",
                request_serializer=getattr(messages, f"{name}Request").SerializeToString,
                response_deserializer=getattr(messages, f"{name}Response").FromString,
            )
            for name in ("ServerReady", "ModelReady", "ModelMetadata", "ModelInfer")
        }
        # By model name and version. Any thread may add an entry; a lost race asks the server twice.
        self._inputs: dict[tuple[str, str], ModelInputs] = {}

    def score(
        self,
        model_name: str,
        features: Mapping[str, Any],
        *,
        candidate_ids: Any = None,
        version: str | int = "",
        timeout: float | None = None,
        packed: bool = False,
        priority: int | None = None,
        affinity_key: str | None = None,
        top_k: int | None = None,
        top_k_by: str | Mapping[str, float] | None = None,
    ) -> dict[str, np.ndarray]:
        """Scores the candidates of one request.

        Args:
          model_name: a model of the server.
          features: a value for each feature by name, as `RankRequest` takes them; one that the model has
            a default for may be left out or None.
          candidate_ids: [N] integers, for a model that is served with a feature store: candidate features
            that are left out come from there, those that are given go before.
          version: a version of it; by default as its labels' traffic says, without any the newest ready.
          timeout: seconds; the client's by default.
          packed: sends the features of a scope in one tensor a type; saves the server time from some
            dozens of features on.
          priority: 1 (highest) to 4; 2 by default.
          affinity_key: requests of one key, a user's say, go to one device while it isn't busier.
          top_k: answer the best k candidates alone.
          top_k_by: by which output, or the weight of each output in a sum; a model of one needs none.

        Returns:
          {task output: [N] float32}; with `top_k` {"top_k.indices": [k] int32 positions in the request, best
          first, "top_k.scores": [k] float32}.

        Raises:
          RequestError: the request is refused (FeatureError: before it was sent).
          ModelNotFoundError: no such model or version.
          UnavailableError: the server can't be reached, is loading or stopping.
          OverloadError: the server is full; `retry_after_seconds` is when it asks to be asked again.
          XlarankError: anything else, the deadline included.
        """
        key = (model_name, str(version))
        message = messages.ModelInferRequest(model_name=model_name, model_version=str(version))
        ids = None if candidate_ids is None else check_candidate_ids(candidate_ids)
        model, request = self._request(key, features, ids, timeout)
        add_inputs(message, model, request, packed=packed, candidate_ids=ids)
        _add_parameters(message, priority, affinity_key, top_k, top_k_by)
        try:
            response = self._call("ModelInfer", message, timeout)
        except RequestError:
            # A newer version may have other features; ask again next time.
            self._inputs.pop(key, None)
            raise
        return {
            output.name: np.frombuffer(raw, _ANSWERS[output.datatype]).astype(
                _ANSWERS[output.datatype].newbyteorder("=")
            )
            for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
        }

    def is_ready(
        self, model_name: str = "", *, version: str | int = "", timeout: float | None = None
    ) -> bool:
        """Whether a model is ready, or the whole server if none is named; False if it can't be reached.

        Raises:
          ModelNotFoundError: no such model or version.
        """
        try:
            if model_name:
                request = messages.ModelReadyRequest(name=model_name, version=str(version))
                return self._call("ModelReady", request, timeout).ready
            return self._call("ServerReady", messages.ServerReadyRequest(), timeout).ready
        except UnavailableError:
            return False

    def metadata(
        self, model_name: str, *, version: str | int = "", timeout: float | None = None
    ) -> messages.ModelMetadataResponse:
        """Inputs, outputs and ready versions of a model, asked for anew; of its newest version by default.

        Raises:
          ModelNotFoundError: no such model or version.
          UnavailableError: the server can't be reached, is loading or stopping.
        """
        request = messages.ModelMetadataRequest(name=model_name, version=str(version))
        return self._call("ModelMetadata", request, timeout)

    def close(self) -> None:
        """Closes the connection; calls under way are cancelled."""
        self._channel.close()

    def __enter__(self) -> RankingClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(
        self,
        key: tuple[str, str],
        features: Mapping[str, Any],
        ids: np.ndarray | None,
        timeout: float | None,
    ) -> tuple[ModelSpec, RankRequest]:
        inputs = self._inputs.get(key)
        if inputs is not None:
            with contextlib.suppress(FeatureError):  # what is known may be of an older version
                return inputs.spec, inputs.request(features, ids)
        name, version = key
        inputs = ModelInputs(self.metadata(name, version=version, timeout=timeout))
        self._inputs[key] = inputs
        return inputs.spec, inputs.request(features, ids)

    def _call(self, name: str, request: Any, timeout: float | None) -> Any:
        try:
            seconds = self._timeout if timeout is None else timeout
            return self._calls[name](request, timeout=seconds, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of_call(error) from None  # a failed call is its own status


class ModelInputs:
    """What a server says of a model's inputs, as a ModelSpec: what matters on the wire, the rest made up."""

    def __init__(self, metadata: messages.ModelMetadataResponse) -> None:
        shapes = {tensor.name: list(tensor.shape) for tensor in metadata.inputs}
        features = [
            _feature(tensor.name, tensor.datatype, shapes)
            for tensor in metadata.inputs
            if not tensor.name.endswith(LENGTHS_SUFFIX) and tensor.name != CANDIDATE_IDS
        ]
        self._takes_ids = CANDIDATE_IDS in shapes
        tasks = tuple(TaskSpec(name=f"task_{i}", output=o.name) for i, o in enumerate(metadata.outputs))
        self.spec = _spec(metadata.name, features, tasks)
        self._spec_of_some = functools.lru_cache(maxsize=64)(self._build_spec_of_some)

    def request(self, features: Mapping[str, Any], ids: np.ndarray | None) -> RankRequest:
        """The features that are given, in the form that RankRequest gives them; the server checks values.

        Without candidate features it has one in their stead that isn't the model's.
        """
        given = {name: value for name, value in features.items() if value is not None}
        if unknown := sorted(set(features) - set(self.spec.feature_by_name)):
            raise FeatureError(
                f"model {self.spec.name!r} has no feature {unknown[0]!r}; "
                f"it has {list(self.spec.feature_by_name)}"
            )
        if ids is not None and not self._takes_ids:
            raise FeatureError(
                f"model {self.spec.name!r}: got candidate_ids, but it is served without a feature store"
            )
        spec = self._spec_of_some(frozenset(given), ids is not None)
        return RankRequest(spec, given, num_candidates=None if ids is None else len(ids), check=_accept)

    def _build_spec_of_some(self, given: frozenset[str], has_ids: bool) -> ModelSpec:
        some = [feature for feature in self.spec.features if feature.name in given]
        if all(feature.is_context for feature in some):
            if has_ids:
                return _spec(self.spec.name, [*some, self._stand_in()], self.spec.tasks)
            names = [feature.name for feature in self.spec.candidate_features]
            raise FeatureError(
                f"model {self.spec.name!r}: expected at least one of the candidate features {names}, got "
                f"none; the number of candidates is unknown"
            )
        return _spec(self.spec.name, some, self.spec.tasks)

    def _stand_in(self) -> FeatureSpec:
        name = _STAND_IN
        while name in self.spec.feature_by_name:
            name += "_"
        return FeatureSpec(name=name, kind=FeatureKind.DENSE, scope=Scope.CANDIDATE, default=0.0)


def _add_parameters(
    message: messages.ModelInferRequest,
    priority: int | None,
    affinity_key: str | None,
    top_k: int | None,
    top_k_by: str | Mapping[str, float] | None,
) -> None:
    if priority is not None:
        message.parameters["priority"].int64_param = priority
    if affinity_key is not None:
        message.parameters[AFFINITY_KEY].string_param = affinity_key
    if top_k is not None:
        message.parameters["top_k"].int64_param = top_k
    if isinstance(top_k_by, str):
        message.parameters["top_k_task"].string_param = top_k_by
    elif top_k_by is not None:
        weights = ",".join(f"{name}:{float(weight)!r}" for name, weight in top_k_by.items())
        message.parameters["top_k_weights"].string_param = weights


def _spec(name: str, features: Sequence[FeatureSpec], tasks: tuple[TaskSpec, ...]) -> ModelSpec:
    has_table = any(feature.is_lookup for feature in features)
    tables = (TableSpec(name=_TABLE, dim=1),) if has_table else ()
    return ModelSpec(name=name, features=tuple(features), tables=tables, tasks=tasks)


def _feature(name: str, datatype: str, shapes: Mapping[str, list[int]]) -> FeatureSpec:
    is_ragged = name + LENGTHS_SUFFIX in shapes
    rows = shapes[name + LENGTHS_SUFFIX if is_ragged else name][0]
    scope = Scope.CONTEXT if rows == 1 else Scope.CANDIDATE
    dtype = _DTYPES[datatype]
    if dtype is ValueType.FLOAT32:
        width = shapes[name][1] if len(shapes[name]) == 2 else 1
        return FeatureSpec(name=name, kind=FeatureKind.DENSE, scope=scope, width=width)
    return FeatureSpec(
        name=name,
        kind=FeatureKind.ID_LIST if is_ragged else FeatureKind.ID,
        scope=scope,
        dtype=dtype,
        table=_TABLE,
        combiner=Combiner.SUM if is_ragged else None,
        preprocessing=(Hash(),) if dtype is ValueType.STRING else (),
    )


def _accept(spec: ModelSpec, columns: Sequence[Column]) -> None:
    """The server knows ranges, defaults and policies; the client doesn't."""
