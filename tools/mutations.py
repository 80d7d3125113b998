"""Ways to break a ModelInferRequest, each with the statuses that may answer it: `mutated`."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from xlarank_serving._proto import grpc_service_pb2 as messages

__all__ = ["MUTATIONS", "mutated", "mutated_bytes", "to_typed"]

OK, INVALID, NOT_FOUND = "OK", "INVALID_ARGUMENT", "NOT_FOUND"
EITHER = frozenset((OK, INVALID))
REFUSED = frozenset((INVALID,))
SAME = frozenset((OK, "SAME_SCORES"))

Request = messages.ModelInferRequest
Rng = np.random.Generator
Mutation = Callable[[Request, Rng], "frozenset[str]"]

_INTS = [-(2**63), -(2**31), -1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1]
_FLOATS = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.0]
_DATATYPES = (
    *("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"),
    *("FP16", "FP32", "FP64", "BF16", "BYTES", "", "fp32", "FLOAT", "INT", "é", "FP32 ", "F" * 1000),
)
_NAMES = [
    "",
    " ",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "x\0y",
    "é\u202e",
    "context.",
    ".lengths",
    "n" * 5000,
    "%s{0}",
]
_DTYPES = {"FP32": "<f4", "INT64": "<i8", "INT32": "<i4", "FP64": "<f8"}
_FIELDS = (
    *("bool_contents", "int_contents", "int64_contents", "uint_contents", "uint64_contents"),
    *("fp32_contents", "fp64_contents"),
)


def _pick(rng: Rng, values: Any) -> Any:
    return values[int(rng.integers(len(values)))]


def _input(request: Request, rng: Rng) -> int | None:
    return int(rng.integers(len(request.inputs))) if request.inputs else None


def _raw_input(request: Request, rng: Rng, *datatypes: str) -> int | None:
    """An input with raw contents, of these datatypes if any are named."""
    places = [
        i
        for i, tensor in enumerate(request.inputs[: len(request.raw_input_contents)])
        if request.raw_input_contents[i] and (not datatypes or tensor.datatype in datatypes)
    ]
    return _pick(rng, places) if places else None


def _model_name(request: Request, rng: Rng) -> frozenset[str]:
    request.model_name = _pick(rng, [*_NAMES, request.model_name + "x", request.model_name.upper()])
    return frozenset((NOT_FOUND, INVALID))


def _model_version(request: Request, rng: Rng) -> frozenset[str]:
    request.model_version = _pick(
        rng, [*_NAMES[1:], "-1", "01", "1.0", "999999999999999999999", "latest", "+1"]
    )
    return frozenset((NOT_FOUND, INVALID))


def _id(request: Request, rng: Rng) -> frozenset[str]:
    request.id = _pick(rng, [*_NAMES[:-2], "a" * 1024, "b" * 1025, "c" * 2**16])
    return SAME if len(request.id) <= 1024 else REFUSED


def _drop_input(request: Request, rng: Rng) -> frozenset[str]:
    if (i := _input(request, rng)) is not None:
        del request.inputs[i]
        if i < len(request.raw_input_contents):
            del request.raw_input_contents[i]
    return EITHER


def _drop_input_but_not_its_bytes(request: Request, rng: Rng) -> frozenset[str]:
    if not request.raw_input_contents or not request.inputs:
        return _drop_input(request, rng)
    del request.inputs[int(rng.integers(len(request.inputs)))]
    return REFUSED


def _repeat_input(request: Request, rng: Rng) -> frozenset[str]:
    if (i := _input(request, rng)) is not None:
        request.inputs.add().CopyFrom(request.inputs[i])
        if i < len(request.raw_input_contents):
            request.raw_input_contents.append(request.raw_input_contents[i])
    return REFUSED


def _rename_input(request: Request, rng: Rng) -> frozenset[str]:
    if (i := _input(request, rng)) is None:
        return EITHER
    others = [tensor.name for j, tensor in enumerate(request.inputs) if j != i]
    request.inputs[i].name = _pick(rng, [*_NAMES, *others, request.inputs[i].name + "_", "candidate_ids"])
    return REFUSED


def _datatype(request: Request, rng: Rng) -> frozenset[str]:
    if (i := _input(request, rng)) is not None:
        request.inputs[i].datatype = _pick(rng, _DATATYPES)
    return EITHER


def _shape(request: Request, rng: Rng) -> frozenset[str]:
    if (i := _input(request, rng)) is not None:
        rank = int(rng.integers(5)) if rng.random() < 0.95 else 1000
        request.inputs[i].shape[:] = [_pick(rng, _INTS) for _ in range(rank)]
    return EITHER


def _raw_size(request: Request, rng: Rng) -> frozenset[str]:
    if (i := _raw_input(request, rng)) is None:
        return EITHER
    raw = request.raw_input_contents[i]
    if rng.random() < 0.5:
        request.raw_input_contents[i] = raw[: int(rng.integers(len(raw)))]
    else:
        request.raw_input_contents[i] = raw + rng.bytes(int(rng.integers(1, 40)))
    return REFUSED


def _raw_bytes(request: Request, rng: Rng) -> frozenset[str]:
    if (i := _raw_input(request, rng)) is not None:
        request.raw_input_contents[i] = rng.bytes(len(request.raw_input_contents[i]))
    return EITHER


def _numbers(request: Request, rng: Rng) -> frozenset[str]:
    """Some elements become odd ones: NaN, huge, negative."""
    if (i := _raw_input(request, rng, *_DTYPES)) is not None:
        dtype = _DTYPES[request.inputs[i].datatype]
        if len(request.raw_input_contents[i]) % np.dtype(dtype).itemsize:
            return EITHER
        values = np.frombuffer(request.raw_input_contents[i], dtype).copy()
        for place in rng.integers(len(values), size=int(rng.integers(1, 4))):
            if dtype[1] == "f":
                values[place] = _pick(rng, _FLOATS)
            else:
                values[place] = np.array(_pick(rng, _INTS), np.int64).astype(dtype)
        request.raw_input_contents[i] = values.tobytes()
    return EITHER


def _strings(request: Request, rng: Rng) -> frozenset[str]:
    """A BYTES tensor of odd strings, bad UTF-8 among them; the number of them may be right."""
    if (i := _raw_input(request, rng, "BYTES")) is not None:
        count = request.inputs[i].shape[0] if request.inputs[i].shape else 1
        count = int(np.clip(count + rng.integers(-1, 2), 0, 1000))
        odd = [b"", b"\xff\xfe", b"\xc3", b"\0", "é".encode(), b"a" * 70_000, b"\xed\xa0\x80"]
        strings = [_pick(rng, odd[:5] if rng.random() < 0.98 else odd) for _ in range(count)]
        request.raw_input_contents[i] = b"".join(struct.pack("<I", len(s)) + s for s in strings)
    return EITHER


def _string_length(request: Request, rng: Rng) -> frozenset[str]:
    """A string says that it is longer than what follows."""
    if (i := _raw_input(request, rng, "BYTES")) is None:
        return EITHER
    raw = request.raw_input_contents[i]
    length = _pick(rng, [2**32 - 1, 2**31, len(raw), len(raw) - 3])
    request.raw_input_contents[i] = struct.pack("<I", length) + raw[4:]
    return REFUSED


def _mix_contents(request: Request, rng: Rng) -> frozenset[str]:
    if (i := _input(request, rng)) is None:
        return EITHER
    was_raw = bool(request.raw_input_contents)
    if was_raw:
        request.inputs[i].contents.fp32_contents.append(1.0)
    else:
        request.raw_input_contents.append(b"\0" * 4)
    return REFUSED


def _raw_entries(request: Request, rng: Rng) -> frozenset[str]:
    if not request.raw_input_contents:
        return EITHER
    if rng.random() < 0.5:
        del request.raw_input_contents[-int(rng.integers(1, len(request.raw_input_contents) + 1)) :]
    else:
        request.raw_input_contents.append(rng.bytes(int(rng.integers(20))))
    return REFUSED


def _typed_contents(request: Request, rng: Rng) -> frozenset[str]:
    """Typed contents of another type, or of another number."""
    if (i := _input(request, rng)) is not None:
        contents = request.inputs[i].contents
        field = _pick(rng, _FIELDS)
        if rng.random() < 0.3:
            contents.Clear()
        getattr(contents, field).extend([1] * int(rng.integers(4)))
        if rng.random() < 0.2:
            contents.bytes_contents.extend([b"", b"\xff"])
    return EITHER


def _set_parameter(parameters: Any, rng: Rng, name: str) -> None:
    kind = int(rng.integers(6))
    if kind == 0:
        parameters[name].bool_param = bool(rng.integers(2))
    elif kind == 1:
        parameters[name].int64_param = _pick(rng, _INTS)
    elif kind == 2:
        parameters[name].string_param = _pick(rng, [*_NAMES, "click:1", "1,2", "a:nan", ":", "1e999"])
    elif kind == 3:
        parameters[name].double_param = float(_pick(rng, _FLOATS))
    elif kind == 4:
        parameters[name].uint64_param = _pick(rng, [0, 1, 4, 2**64 - 1])
    else:
        parameters[name].Clear()  # without a value


_PARAMETERS = (
    *("priority", "timeout", "user", "xlarank_affinity_key", "top_k", "top_k_task", "top_k_weights"),
    *("xlarank_timings", "sequence_id", "sequence_start", "sequence_end", "binary_data_output", "headers"),
    *("triton_enable_empty_final_response", "x"),
)


def _parameters(request: Request, rng: Rng) -> frozenset[str]:
    for _ in range(int(rng.integers(1, 4))):
        _set_parameter(request.parameters, rng, _pick(rng, _PARAMETERS))
    # A timeout of 1 µs is one.
    late = frozenset(("DEADLINE_EXCEEDED",)) if "timeout" in request.parameters else frozenset()
    return EITHER | late


def _many_parameters(request: Request, rng: Rng) -> frozenset[str]:
    for i in range(int(rng.integers(65, 200))):
        request.parameters[f"x{i}"].int64_param = i
    return REFUSED


def _tensor_parameters(request: Request, rng: Rng) -> frozenset[str]:
    names = ["shared_memory_region", "shared_memory_byte_size", "shared_memory_offset", "classification"]
    tensors = [*request.inputs, *request.outputs]
    if tensors:
        _set_parameter(_pick(rng, tensors).parameters, rng, _pick(rng, [*names, "binary_data", "x"]))
    return EITHER


def _outputs(request: Request, rng: Rng) -> frozenset[str]:
    for _ in range(int(rng.integers(1, 4))):
        request.outputs.add(name=_pick(rng, [*_NAMES, "top_k.indices"]))
    return EITHER


def _many_inputs(request: Request, rng: Rng) -> frozenset[str]:
    request.inputs.extend([Request.InferInputTensor()] * int(rng.integers(4097, 6000)))
    return REFUSED


def _reorder(request: Request, rng: Rng) -> frozenset[str]:
    """The same inputs in another order: the same scores."""
    if len(request.raw_input_contents) not in (0, len(request.inputs)):
        return EITHER
    order = [int(i) for i in rng.permutation(len(request.inputs))]
    inputs, raws = list(request.inputs), list(request.raw_input_contents)
    del request.inputs[:]
    del request.raw_input_contents[:]
    for i in order:
        request.inputs.add().CopyFrom(inputs[i])
    request.raw_input_contents.extend(raws[i] for i in order if raws)
    return SAME


MUTATIONS: tuple[Mutation, ...] = (
    *(_model_name, _model_version, _id, _drop_input, _drop_input_but_not_its_bytes, _repeat_input),
    *(_rename_input, _datatype, _shape, _raw_size, _raw_bytes, _numbers, _strings, _string_length),
    *(_mix_contents, _raw_entries, _typed_contents, _parameters, _many_parameters, _tensor_parameters),
    *(_outputs, _many_inputs, _reorder),
)


def mutated(request: Request, rng: Rng) -> frozenset[str]:
    """Breaks a request in one to three ways.

    Returns:
      The statuses that may answer it; among them "SAME_SCORES" if its meaning is the same as before.
    """
    count = int(rng.choice([1, 2, 3], p=[0.7, 0.2, 0.1]))
    chosen = [_pick(rng, MUTATIONS) for _ in range(count)]
    allowed = [mutation(request, rng) for mutation in chosen]
    if all("SAME_SCORES" in each for each in allowed):
        return SAME
    union = frozenset().union(*allowed) - {"SAME_SCORES"}
    # One may undo what the other broke.
    return union if count == 1 else union | {OK, INVALID}


def mutated_bytes(data: bytes, rng: Rng) -> tuple[bytes, frozenset[str]]:
    """Breaks a serialised request: bits, bytes, pieces left out, repeated or put in."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        kind, place = int(rng.integers(5)), int(rng.integers(len(out) + 1))
        size = int(rng.integers(1, 30))
        if kind == 0 and place < len(out):
            out[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            out[place : place + size] = rng.bytes(size)
        elif kind == 2:
            del out[place : place + size]
        elif kind == 3:
            out[place:place] = out[place : place + size]
        else:
            del out[place:]
    # A broken parameter may be a timeout that passes.
    return bytes(out), frozenset((OK, INVALID, NOT_FOUND, "DEADLINE_EXCEEDED"))


def to_typed(request: Request) -> Request:
    """The same request with typed contents."""
    typed = Request()
    typed.CopyFrom(request)
    del typed.raw_input_contents[:]
    for tensor, raw in zip(typed.inputs, request.raw_input_contents, strict=True):
        if tensor.datatype == "BYTES":
            place = 0
            while place < len(raw):
                (size,) = struct.unpack_from("<I", raw, place)
                tensor.contents.bytes_contents.append(raw[place + 4 : place + 4 + size])
                place += 4 + size
        else:
            field, dtype = {
                "FP32": ("fp32_contents", "<f4"),
                "INT64": ("int64_contents", "<i8"),
                "INT32": ("int_contents", "<i4"),
            }[tensor.datatype]
            getattr(tensor.contents, field).extend(np.frombuffer(raw, dtype).tolist())
    return typed
