"""ModelInfer messages to ranking requests, and scores to ModelInfer messages: `ModelCodec`.

`layout` says which tensors there are, `tensors` reads one. Raw contents become numpy views without a copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xlarank.errors import FeatureError, RequestError
from xlarank.host import FeatureStore
from xlarank.runtime import Answer
from xlarank.spec import CANDIDATE_IDS, ContentCheck, ModelSpec, Ragged, RankRequest, Scope
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.layout import (
    CANDIDATE_IDS_INPUT,
    LENGTHS_SUFFIX,
    WireInput,
    feature_inputs,
    float_features,
    id_features,
    packed_inputs,
)
from xlarank_serving.parameters import InferParameters
from xlarank_serving.parsing import InferMessage
from xlarank_serving.tensors import from_raw, from_typed
from xlarank_serving.top_k import INDICES, SCORES
from xlarank_serving.wire_columns import WireColumns

__all__ = ["ModelCodec"]

_UNSUPPORTED_PARAMETERS = ("shared_memory_region", "classification")

_MAX_SHOWN_DIMS = 8


class ModelCodec:
    """Reads the requests of one model and writes its responses. Immutable; any thread.

    Attributes:
      spec: the model.
    """

    def __init__(
        self,
        spec: ModelSpec,
        features: FeatureStore | None = None,
        *,
        max_candidates: int | None = None,
        max_joined_bytes: int | None = None,
    ) -> None:
        """
        Args:
          spec: the model.
          features: gives the candidate features of requests that bring ids; None for none.
          max_candidates: that a request may have; None for any number.
          max_joined_bytes: of the features that come with its ids from the store; None for any number.
        """
        self.spec = spec
        self._max_candidates = max_candidates
        self._max_joined_bytes = max_joined_bytes
        self._features = features
        self._listed_inputs = list(feature_inputs(spec))
        if features is not None:
            self._listed_inputs.append(CANDIDATE_IDS_INPUT)
        self._inputs = {i.name: i for i in [*self._listed_inputs, *packed_inputs(spec)]}
        self._plain_names = frozenset(f.name for f in spec.features if not f.is_ragged)
        self._ragged_names = [f.name for f in spec.features if f.is_ragged]
        self._floats = {scope: float_features(spec, scope) for scope in Scope}
        self._ids = {scope: id_features(spec, scope) for scope in Scope}
        self._columns = WireColumns(spec, takes_ids=features is not None, max_candidates=max_candidates)
        self._task_of_output = {task.output: task.name for task in spec.tasks}

    def metadata(self, versions: Sequence[int]) -> messages.ModelMetadataResponse:
        """Per-feature inputs and the outputs; `versions` are those that are ready.

        Inputs that end in `candidate_ids` say that a store is loaded, and candidate features are optional.
        """
        response = messages.ModelMetadataResponse(
            name=self.spec.name, versions=[str(version) for version in versions], platform="xlarank"
        )
        for wire in self._listed_inputs:
            response.inputs.add(name=wire.name, datatype=wire.datatype, shape=wire.metadata_shape)
        for output in self._task_of_output:
            response.outputs.add(name=output, datatype="FP32", shape=[-1])
        return response

    def requested_outputs(
        self, request: messages.ModelInferRequest, parameters: InferParameters
    ) -> list[str]:
        """Names of the outputs to answer, each once, in the order asked for.

        All when none is named; with `top_k` its two alone when none is named, and they come first when only
        others are.

        Raises:
          RequestError: for an output that the model doesn't have.
        """
        own = [] if parameters.top_k is None else [INDICES, SCORES]
        names = []
        for output in request.outputs:
            if output.name not in self._task_of_output and output.name not in own:
                hint = "; it is an output of requests with parameter 'top_k'"
                raise RequestError(
                    f"model {self.spec.name!r} has no output {output.name!r}; "
                    f"it has {list(self._task_of_output)}{hint if output.name in (INDICES, SCORES) else ''}"
                )
            if output.parameters:
                _check_parameters(f"output {output.name!r}", output.parameters)
            names.append(output.name)
        if own and not any(name in own for name in names):
            names = [*own, *names]
        return list(dict.fromkeys(names)) or list(self._task_of_output)

    def read(self, message: InferMessage, *, check: ContentCheck | None = None) -> RankRequest:
        """Reads the inputs in place if they are in the usual form, else as `decode`, which parses them.

        Raises:
          FeatureError: as `decode`; for too many candidates before anything is parsed.
          RequestError: if the message is malformed.
        """
        found = None if message.raw is None else self._columns.read(message.raw)
        if found is None:
            return self.decode(message.parsed(), check=check)
        columns, ids = found
        if ids is None:
            return RankRequest.of_columns(self.spec, columns, check=check)
        values = {f.name: c for f, c in zip(self.spec.features, columns, strict=True) if c is not None}
        return self._joined(ids, values, check)

    def decode(
        self, request: messages.ModelInferRequest, *, check: ContentCheck | None = None
    ) -> RankRequest:
        """Reads the inputs. Arrays of raw contents are views of the message's bytes.

        Args:
          request: inputs raw or typed, per feature or packed.
          check: as for RankRequest.

        Raises:
          FeatureError: names the feature or input, what was expected and what came.
          RequestError: if its ids ask for more features than a request may have.
        """
        arrays = self._arrays(request)
        ids, values = arrays.get(CANDIDATE_IDS), self._values(arrays)
        if ids is None:
            return RankRequest(self.spec, values, check=check)
        return self._joined(ids, values, check)

    def _joined(self, ids: Any, values: Mapping[str, Any], check: ContentCheck | None) -> RankRequest:
        """A request of candidate ids and of the features that came with them."""
        assert self._features is not None  # else the input would be unknown
        joined = self._features.join(ids, values, max_bytes=self._max_joined_bytes)
        return RankRequest(self.spec, joined, num_candidates=len(ids), check=check)

    def decode_rows(self, request: messages.ModelInferRequest) -> tuple[np.ndarray, dict[str, Any]]:
        """Reads rows to store: [n] ids, and values by feature name as `FeatureStore.update` takes them.

        Raises:
          FeatureError: as `decode`, and without `candidate_ids`.
        """
        arrays = self._arrays(request)
        if CANDIDATE_IDS not in arrays:
            raise FeatureError(
                f"{CANDIDATE_IDS_INPUT.where}: expected {CANDIDATE_IDS_INPUT.expected}, the ids of the rows; "
                f"got none"
            )
        return arrays[CANDIDATE_IDS], self._values(arrays)

    def encode_response(
        self,
        request: messages.ModelInferRequest,
        *,
        version: int,
        outputs: Sequence[str],
        parameters: InferParameters,
        answer: Answer,
        decode_seconds: float,
    ) -> messages.ModelInferResponse:
        """Writes an answer, raw.

        Args:
          request: its id is echoed.
          version: the version that answered.
          outputs: names from `requested_outputs`.
          parameters: of the request.
          answer: the engine's.
          decode_seconds: what reading the request took.
        """
        response = messages.ModelInferResponse(
            model_name=request.model_name, model_version=str(version), id=request.id
        )
        best: dict[str, np.ndarray] = {}
        if parameters.top_k is not None:
            best = dict(zip((INDICES, SCORES), parameters.top_k.select(answer.scores), strict=True))
        for name in outputs:
            values = best[name] if name in best else answer.scores[self._task_of_output[name]]
            datatype, dtype = ("INT32", "<i4") if name == INDICES and best else ("FP32", "<f4")
            response.outputs.add(name=name, datatype=datatype, shape=values.shape)
            response.raw_output_contents.append(values.astype(dtype, copy=False).tobytes())
        if parameters.wants_timings:
            timings = dataclasses.asdict(answer.timings) | {"decode": decode_seconds}
            for stage, seconds in timings.items():
                response.parameters[f"{stage}_us"].int64_param = round(seconds * 1e6)
        return response

    def _arrays(self, request: messages.ModelInferRequest) -> dict[str, Any]:
        """Arrays and string columns by input name, each of a datatype and shape that its input allows."""
        raws = request.raw_input_contents
        num_raws = len(raws)
        arrays: dict[str, Any] = {}
        for position, tensor in enumerate(request.inputs):
            name = tensor.name
            wire = self._inputs.get(name)
            if wire is None:
                raise FeatureError(
                    f"model {self.spec.name!r} has no input {name!r}; "
                    f"it has {[i.name for i in self._listed_inputs]}"
                )
            if name in arrays:
                raise FeatureError(f"{wire.where}: expected once, got it again as input {position}")
            datatype, shape = tensor.datatype, tuple(tensor.shape)
            if tensor.parameters:
                _check_parameters(wire.where, tensor.parameters)
            if datatype not in wire.accepted or not wire.allows(shape):
                raise _unexpected(wire, datatype, shape)
            if self._max_candidates is not None:
                wire.check_rows(shape, self._max_candidates)
            if num_raws:
                if tensor.HasField("contents"):
                    raise FeatureError(
                        f"contents field must not be specified when using raw_input_contents for "
                        f"{name!r} for model {self.spec.name!r}"
                    )
                if position >= num_raws:
                    raise FeatureError(
                        f"{wire.where}: unable to find data for input tensor {name!r}: expected "
                        f"{len(request.inputs)} entries of raw_input_contents, got {num_raws}"
                    )
                arrays[name] = from_raw(wire, datatype, shape, raws[position])
            else:
                arrays[name] = from_typed(wire, datatype, shape, tensor.contents)
        if num_raws > len(request.inputs):
            raise FeatureError(
                f"model {self.spec.name!r}: expected one entry of raw_input_contents for each of "
                f"{len(request.inputs)} inputs, got {num_raws}"
            )
        return arrays

    def _values(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Values by feature name."""
        features: dict[str, Any] = {
            name: values for name, values in arrays.items() if name in self._plain_names
        }
        for name in self._ragged_names:
            lengths_name = name + LENGTHS_SUFFIX
            if (name in arrays) != (lengths_name in arrays):
                came, missing = (name, lengths_name) if name in arrays else (lengths_name, name)
                raise FeatureError(
                    f"feature {name!r}: expected input {missing!r} beside input {came!r}, got none; "
                    f"it is {self._inputs[missing].expected}"
                )
            if name in arrays:
                features[name] = Ragged(arrays[name], arrays[lengths_name])
        for scope in Scope:
            packed = self._packed_floats(scope, arrays) | self._packed_ids(scope, arrays)
            if twice := [name for name in packed if name in features]:
                raise FeatureError(
                    f"feature {twice[0]!r}: expected once, got it by name and in the packed inputs of "
                    f"scope {scope.value}"
                )
            features |= packed
        return features

    def _packed_floats(self, scope: Scope, arrays: Mapping[str, Any]) -> dict[str, Any]:
        dense = arrays.get(f"{scope.value}.dense")
        if dense is None:
            return {}
        features, column = {}, 0
        for feature in self._floats[scope]:
            values = dense[:, column : column + feature.width]  # [n, K_f]
            features[feature.name] = values[:, 0] if feature.is_lookup else values
            column += feature.width
        return features

    def _packed_ids(self, scope: Scope, arrays: Mapping[str, Any]) -> dict[str, Any]:
        names = (f"{scope.value}.values", scope.value + LENGTHS_SUFFIX)
        values, lengths = (arrays.get(name) for name in names)  # [V] and [F, n]
        if values is None and lengths is None:
            return {}
        if values is None or lengths is None:
            came, missing = names if lengths is None else names[::-1]
            raise FeatureError(
                f"input {missing!r}: expected {self._inputs[missing].expected} beside {came!r}, got none"
            )
        if lengths.size and lengths.min() < 0:
            row, column = (int(i) for i in np.argwhere(lengths < 0)[0])
            raise FeatureError(
                f"feature {self._ids[scope][row].name!r}: expected lengths >= 0, got "
                f"{lengths[row, column]} in row {column} of input {names[1]!r}"
            )
        ends = np.cumsum(lengths.sum(axis=1, dtype=np.int64)).tolist()  # [F]
        if ends[-1] != len(values):
            raise FeatureError(
                f"input {names[1]!r}: expected lengths that add up to the {len(values)} values of "
                f"{names[0]!r}, got a sum of {ends[-1]}"
            )
        is_one_each = (lengths == 1).all(axis=1).tolist()  # [F]
        features: dict[str, Any] = {}
        begin = 0
        for i, (feature, end) in enumerate(zip(self._ids[scope], ends, strict=True)):
            own_values, own_lengths = values[begin:end], lengths[i]
            begin = end
            if feature.is_ragged:
                features[feature.name] = Ragged(own_values, own_lengths)
            elif is_one_each[i]:
                features[feature.name] = own_values
            elif own_lengths.any() or not (feature.default is not None or CANDIDATE_IDS in arrays):
                row = int(np.argmax(own_lengths != 1))
                raise FeatureError(
                    f"feature {feature.name!r}: expected length 1 in every row, as it is one id, got "
                    f"{own_lengths[row]} in row {row} of input {names[1]!r}"
                )
        return features


def _check_parameters(where: str, parameters: Mapping[str, Any]) -> None:
    for name in _UNSUPPORTED_PARAMETERS:
        if name in parameters:
            raise RequestError(f"{where}: parameter {name!r} is not supported")


def _unexpected(wire: WireInput, datatype: str, shape: tuple[int, ...]) -> FeatureError:
    shown = ", ".join(map(str, shape[:_MAX_SHOWN_DIMS])) + (", ..." if len(shape) > _MAX_SHOWN_DIMS else "")
    hint = ""
    if wire.scope is Scope.CONTEXT and datatype in wire.accepted:
        hint = "; its scope is context, so it is sent once a request"
    return FeatureError(f"{wire.where}: expected {wire.expected}, got {datatype} of shape [{shown}]{hint}")
