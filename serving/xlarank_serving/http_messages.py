"""ModelInfer as HTTP carries it, JSON with or without binary tensors behind, to and from the gRPC messages.

A body is JSON, or JSON and then the bytes of tensors back to back; the header
`Inference-Header-Content-Length` says how long the JSON is. An input's `data` is in the JSON, or its
parameter `binary_data_size` says how many of the bytes are its. Whatever came becomes a ModelInferRequest
with raw contents: what is wrong with a tensor is found, and said, where gRPC's are read.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from google.protobuf.message import Message

from xlarank.errors import RequestError
from xlarank.spec import StringColumn
from xlarank_serving._proto import grpc_service_pb2 as messages
from xlarank_serving.config import LimitConfig
from xlarank_serving.encoding import bytes_tensor
from xlarank_serving.limits import check_structure
from xlarank_serving.tensors import DTYPES

__all__ = ["HEADER_LENGTH", "HttpRequest", "encode_response", "json_of", "parse_object", "parse_request"]

HEADER_LENGTH = "Inference-Header-Content-Length"
"""Header: bytes of the JSON that stands before binary tensors."""

_MAX_DEPTH = 8
"""Lists in lists that an input's data may be."""

_MAX_VALUES = 1000
"""Of a tensor that are written as JSON in one call, which no other thread interrupts: about 1 ms."""

_BINARY_OUTPUT = "binary_data_output"
_BINARY_SIZE = "binary_data_size"
_BINARY = "binary_data"

_JSON_TYPES = {"U": (int,), "I": (int,), "F": (int, float), "B": (bool,)}
"""What JSON may give for a datatype, by its first letter; of exactly these types: a bool is no int."""


@dataclasses.dataclass(frozen=True)
class HttpRequest:
    """One request and how its answer should look."""

    message: messages.ModelInferRequest

    binary_outputs: Mapping[str, bool]
    """Whether to answer an output as binary, of those that say."""

    is_binary: bool
    """Whether to answer the others as binary."""


def parse_request(
    body: bytes, header_length: str | None, limits: LimitConfig, *, model: str, version: str
) -> HttpRequest:
    """Reads the body of an infer request.

    Args:
      body: of the HTTP request.
      header_length: the header `HEADER_LENGTH`, if there is one.
      limits: of ranking requests; JSON is bounded before it is parsed.
      model: its name, of the path.
      version: of the path; "" for none.

    Raises:
      RequestError: for a body that isn't such a request.
    """
    end = _header_end(header_length, len(body))
    check_structure(end, limits, "of JSON")
    head = parse_object(body[:end])
    message = messages.ModelInferRequest(
        model_name=model, model_version=version, id=_get(head, "the request", "id", str, "")
    )
    parameters = dict(_get(head, "the request", "parameters", dict, {}))
    is_binary = _pop_bool("the request", parameters, _BINARY_OUTPUT)
    _set_parameters("the request", message.parameters, parameters)
    position = end
    for i, value in enumerate(_get(head, "the request", "inputs", list, [])):
        position = _add_input(message, f"input {i}", value, body, position)
    if position != len(body):
        raise RequestError(
            f"expected {position} bytes, those of the JSON and of inputs with {_BINARY_SIZE!r}, got "
            f"{len(body)}"
        )
    binary_outputs = {}
    for i, value in enumerate(_get(head, "the request", "outputs", list, [])):
        where = f"output {i}"
        output = _object(where, value)
        name = _get(output, where, "name", str)
        parameters = dict(_get(output, where, "parameters", dict, {}))
        if (own := _pop_bool(where, parameters, _BINARY)) is not None:
            binary_outputs[name] = own
        _set_parameters(where, message.outputs.add(name=name).parameters, parameters)
    return HttpRequest(message, binary_outputs, bool(is_binary))


def parse_object(text: bytes) -> dict[str, Any]:
    """A JSON object; RequestError for anything else."""
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"expected JSON, got {len(text)} bytes that aren't: {error}") from None
    except RecursionError:
        raise RequestError("expected JSON, got lists and objects that are nested too deeply") from None
    except ValueError:  # of int()
        limit = sys.get_int_max_str_digits()
        raise RequestError(f"expected JSON, got an integer of more than {limit:,} digits") from None
    return _object("the request", value)


def _pop_bool(where: str, parameters: dict[str, Any], name: str) -> bool | None:
    """Takes a flag out; None without one."""
    value = parameters.pop(name, None)
    if value is not None and type(value) is not bool:
        raise RequestError(f"{where}: parameter {name!r}: expected a bool, got {json.dumps(value)[:100]}")
    return value


def encode_response(response: messages.ModelInferResponse, request: HttpRequest) -> tuple[bytes, int | None]:
    """Writes an answer.

    Args:
      response: the answer, raw.
      request: says which outputs are binary.

    Returns:
      The body, and how much of it is JSON if tensors follow.
    """
    head: dict[str, Any] = {"model_name": response.model_name, "model_version": response.model_version}
    if response.id:
        head["id"] = response.id
    if response.parameters:
        head["parameters"] = {
            name: getattr(value, value.WhichOneof("parameter_choice"))
            for name, value in response.parameters.items()
        }
    outputs: list[bytes] = []
    binaries = []
    for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        output = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        if request.binary_outputs.get(tensor.name, request.is_binary):
            output["parameters"] = {_BINARY_SIZE: len(raw)}
            binaries.append(raw)
            outputs.append(json.dumps(output).encode())
        else:
            data = _json_list(np.frombuffer(raw, DTYPES[tensor.datatype]))
            outputs.append(_with_member(output, "data", data))
    text = _with_member(head, "outputs", b"[%b]" % b", ".join(outputs))
    return b"".join([text, *binaries]), len(text) if binaries else None


def _with_member(head: dict[str, Any], name: str, value: bytes) -> bytes:
    """JSON of an object that isn't empty, and of a last member that is JSON already."""
    return b'%b, "%b": %b}' % (json.dumps(head)[:-1].encode(), name.encode(), value)


def _json_list(values: np.ndarray) -> bytes:
    """[V] as JSON; other threads have turns meanwhile."""
    parts = (values[i : i + _MAX_VALUES].tolist() for i in range(0, len(values), _MAX_VALUES))
    return b"[%b]" % b", ".join([json.dumps(part)[1:-1].encode() for part in parts])


def json_of(message: Message) -> dict[str, Any]:
    """A message with every field that has no presence of its own, numbers as numbers, enums by name.

    Not protobuf's JSON form, which writes 64-bit integers as strings: the protocol's HTTP clients read
    numbers.
    """
    out: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            continue
        value: Any = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            out[field.name] = {key: json_of(value[key]) for key in value}
        elif field.is_repeated:
            out[field.name] = [_json_value(field, one) for one in value]
        else:
            out[field.name] = _json_value(field, value)
    return out


def _json_value(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return json_of(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    return value


def _header_end(header_length: str | None, num_bytes: int) -> int:
    if header_length is None:
        return num_bytes
    if not (header_length.isascii() and header_length.isdecimal()) or len(header_length) > 18:
        raise RequestError(f"header {HEADER_LENGTH}: expected a number of bytes, got {header_length[:100]!r}")
    end = int(header_length)
    if end > num_bytes:
        raise RequestError(
            f"header {HEADER_LENGTH}: expected at most the {num_bytes} bytes of the body, got {end}"
        )
    return end


def _add_input(
    message: messages.ModelInferRequest, where: str, value: Any, body: bytes, position: int
) -> int:
    """Appends an input whose binary tensor, if it has one, begins at `position`; returns where it ends."""
    head = _object(where, value)
    name = _get(head, where, "name", str)
    where = f"input {name[:100]!r}"
    datatype = _get(head, where, "datatype", str)
    shape = _get(head, where, "shape", list)
    if not all(type(size) is int and -(2**63) <= size < 2**63 for size in shape):
        raise RequestError(f"{where}: expected a shape of integers, got {str(shape)[:100]}")
    parameters = dict(_get(head, where, "parameters", dict, {}))
    num_bytes = parameters.pop(_BINARY_SIZE, None)
    tensor = message.inputs.add(name=name, datatype=datatype, shape=shape)
    _set_parameters(where, tensor.parameters, parameters)
    if num_bytes is None:
        if "data" not in head:
            raise RequestError(
                f"unable to find data for input tensor {name[:100]!r}: expected 'data' or parameter "
                f"{_BINARY_SIZE!r}, got neither"
            )
        message.raw_input_contents.append(_raw(where, datatype, head["data"]))
        return position
    if type(num_bytes) is not int or not 0 <= num_bytes <= len(body) - position:
        raise RequestError(
            f"{where}: expected {_BINARY_SIZE!r} of at most the {len(body) - position} bytes that are left "
            f"of the body, got {str(num_bytes)[:100]}"
        )
    if "data" in head:
        raise RequestError(f"{where}: expected 'data' or parameter {_BINARY_SIZE!r}, got both")
    message.raw_input_contents.append(body[position : position + num_bytes])
    return position + num_bytes


def _raw(where: str, datatype: str, data: Any) -> bytes:
    """JSON data as raw contents; of a datatype that doesn't exist, none: the codec refuses it by name."""
    values = _flat(where, data)
    if datatype == "BYTES":
        try:
            return bytes_tensor(StringColumn.from_strings(_checked(where, datatype, values, (str,))))
        except UnicodeEncodeError as error:
            raise RequestError(f"{where}: expected strings, got one without UTF-8: {error.reason}") from None
    if datatype in ("FP16", "BF16"):
        raise RequestError(f"{where}: expected {datatype} as binary data, as JSON has no such type")
    if datatype not in DTYPES:
        return b""
    values = _checked(where, datatype, values, _JSON_TYPES[datatype[0]])
    try:
        with np.errstate(over="ignore"):
            return np.array(values, DTYPES[datatype]).tobytes()
    except OverflowError:
        raise RequestError(f"{where}: expected values that {datatype} holds; {_largest(values)}") from None


def _checked(where: str, datatype: str, values: list[Any], types: tuple[type, ...]) -> list[Any]:
    if set(map(type, values)) <= set(types):
        return values
    wrong = next(value for value in values if type(value) not in types)
    raise RequestError(f"{where}: expected data for {datatype}, got {json.dumps(wrong)[:100]}")


def _largest(values: list[Any]) -> str:
    return f"they go from {str(min(values))[:30]} to {str(max(values))[:30]}"


def _flat(where: str, data: Any) -> list[Any]:
    values = data if type(data) is list else [data]
    for _ in range(_MAX_DEPTH):
        if list not in set(map(type, values)):
            return values
        values = [one for value in values for one in (value if type(value) is list else (value,))]
    raise RequestError(f"{where}: expected at most {_MAX_DEPTH} lists in lists, got more")


def _set_parameters(where: str, parameters: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        _encodable(f"{where}: name of a parameter", name)
        if type(value) is bool:
            parameters[name].bool_param = value
        elif type(value) is int and -(2**63) <= value < 2**63:
            parameters[name].int64_param = value
        elif type(value) is int and 0 <= value < 2**64:
            parameters[name].uint64_param = value
        elif type(value) is float:
            parameters[name].double_param = value
        elif type(value) is str:
            parameters[name].string_param = _encodable(f"{where}: parameter {name[:100]!r}", value)
        else:
            raise RequestError(
                f"{where}: parameter {name[:100]!r}: expected a bool, a 64-bit integer, a number or a "
                f"string, got {json.dumps(value)[:100]}"
            )


def _object(where: str, value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise RequestError(f"{where}: expected a JSON object, got {json.dumps(value)[:100]}")
    return value


def _get(head: Mapping[str, Any], where: str, key: str, kind: type, default: Any = None) -> Any:
    """A member of an object; required if there is no default."""
    value = head.get(key, default)
    if type(value) is not kind:
        names = {str: "a string", list: "a list", dict: "an object"}
        got = "nothing" if key not in head else json.dumps(value)[:100]
        raise RequestError(f"{where}: expected {key!r} to be {names[kind]}, got {got}")
    return _encodable(f"{where}: {key!r}", value) if kind is str else value


def _encodable(where: str, text: str) -> str:
    """JSON may hold half a surrogate pair, which no protobuf string can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{where}: expected UTF-8, got {text[:100]!r}: {error.reason}") from None
    return text
