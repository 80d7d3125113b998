"""Tensors of a file written by `torch.save`, without torch and without unpickling.

Such a file is a zip: ``<name>/data.pkl``, a pickle that describes the objects, and ``<name>/data/<key>``, the
bytes of each tensor. The pickle is read as a list of opcodes by a small machine that knows tuples, lists,
numbers, strings and the one call that describes a tensor. It imports nothing and calls nothing; whatever else
a file asks for is refused by name.
"""

from __future__ import annotations

import dataclasses
import math
import pickletools
import zipfile
from typing import Any, BinaryIO

import numpy as np

from xlarank.errors import ConfigError

__all__ = ["read_torch_tensors"]

_MAX_PICKLE_BYTES = 1 << 20
"""Of data.pkl: hundreds of times what a few tensors need."""

_REBUILD = "torch._utils _rebuild_tensor_v2"
_HOOKS = "collections OrderedDict"
_DTYPES = {
    "torch ByteStorage": "|u1",
    "torch CharStorage": "|i1",
    "torch ShortStorage": "<i2",
    "torch IntStorage": "<i4",
    "torch LongStorage": "<i8",
    "torch HalfStorage": "<f2",
    "torch FloatStorage": "<f4",
    "torch DoubleStorage": "<f8",
}

_PUSHES = {"BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


@dataclasses.dataclass(frozen=True)
class _Global:
    """A name that a pickle asks for; never looked up."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """What a pickle says of one tensor."""

    dtype: str
    key: str
    offset: int
    """In items from the beginning of its storage."""
    shape: tuple[int, ...]


def read_torch_tensors(file: BinaryIO, name: str) -> list[np.ndarray]:
    """Maps the tensors of a tuple or list that `torch.save` wrote, torch 1.6 or later.

    Args:
      file: a real file, open; it may be closed once this returns.
      name: of the file, for messages.

    Returns:
      The tensors in order, read-only and mapped.

    Raises:
      ConfigError: if the file isn't such a zip, is cut short, or asks for anything but contiguous tensors of
        numbers.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            (entry,) = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
            root = entry.filename.removesuffix("data.pkl")
            if entry.file_size > _MAX_PICKLE_BYTES:
                raise ConfigError(
                    f"{name}: expected a data.pkl of a few tensors, got {entry.file_size} bytes"
                )
            tensors = _Machine(name).run(archive.read(entry))
            if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
                raise ConfigError(f"{name}: expected little-endian tensors, got big-endian ones")
            return [_map(file, archive, f"{root}data/{tensor.key}", tensor, name) for tensor in tensors]
    except (zipfile.BadZipFile, EOFError, KeyError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{name}: expected a zip of tensors as torch.save writes it from torch 1.6 on: {error}"
        ) from error


def _map(file: BinaryIO, archive: zipfile.ZipFile, path: str, tensor: _Tensor, name: str) -> np.ndarray:
    entry = archive.getinfo(path)
    dtype = np.dtype(tensor.dtype)
    num_bytes = (tensor.offset + math.prod(tensor.shape)) * dtype.itemsize
    if entry.compress_type != zipfile.ZIP_STORED or num_bytes > entry.file_size:
        raise ConfigError(
            f"{name}: {path}: expected {num_bytes} bytes, stored as they are, got {entry.file_size} by "
            f"zip method {entry.compress_type}"
        )
    if not math.prod(tensor.shape):
        return np.empty(tensor.shape, dtype)
    archive.open(entry).close()  # checks the local header
    file.seek(entry.header_offset + 26)
    name_bytes, extra_bytes = np.frombuffer(file.read(4), "<u2").tolist()
    begin = entry.header_offset + 30 + name_bytes + extra_bytes + tensor.offset * dtype.itemsize
    return np.asarray(np.memmap(file, dtype, "r", begin, tensor.shape))


class _Machine:
    """Runs the opcodes of one pickle; see the top of this file."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> list[_Tensor]:
        """The tensors of the tuple or list that a pickle describes.

        Raises:
          ConfigError: for anything else.
        """
        try:
            for opcode, argument, _ in pickletools.genops(data):
                self._step(opcode.name, argument)
            (found,) = self._stack
        except (IndexError, KeyError, ValueError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise self._refused(f"a damaged pickle ({error!r})") from error
        if not isinstance(found, (tuple, list)) or not all(isinstance(item, _Tensor) for item in found):
            raise self._refused(f"{type(found).__name__}")
        return list(found)

    def _step(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "MARK":
                stack.append(_MARK)
            case "TUPLE":
                stack.append(tuple(self._pop_to_mark()))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                self._extend([stack.pop()])
            case "APPENDS":
                self._extend(self._pop_to_mark())
            case "GLOBAL":
                stack.append(self._global(argument))
            case "STACK_GLOBAL":
                name = stack.pop()
                stack.append(self._global(f"{stack.pop()} {name}"))
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(self._reduce(stack.pop(), arguments))
            case _ if opcode in _PUSHES:
                stack.append(argument)
            case _ if opcode in _CONSTANTS:
                stack.append(_CONSTANTS[opcode])
            case _ if opcode in _TUPLES:
                stack[-_TUPLES[opcode] :] = [tuple(stack[-_TUPLES[opcode] :])]
            case _:
                raise self._refused(f"pickle opcode {opcode}")

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise ValueError("items for what is no list")
        self._stack[-1].extend(items)

    def _pop_to_mark(self) -> list[Any]:
        items = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _global(self, name: str) -> _Global:
        if name not in (_REBUILD, _HOOKS, *_DTYPES):
            raise self._refused(f"{name.replace(' ', '.')}, which was not looked up")
        return _Global(name)

    def _storage(self, identity: Any) -> tuple[str, str]:
        kind, storage, key, _device, _num_items = identity
        if kind != "storage" or not isinstance(storage, _Global) or not isinstance(key, str):
            raise ValueError(f"storage {identity!r}")
        return _DTYPES[storage.name], key

    def _reduce(self, call: Any, arguments: Any) -> _Tensor | None:
        if call == _Global(_HOOKS) and arguments == ():
            return None  # the tensor's backward hooks
        if call != _Global(_REBUILD):
            raise self._refused(f"a call of {call!r}")
        (dtype, key), offset, shape, stride = arguments[:4]
        if not all(type(number) is int and number >= 0 for number in (offset, *shape, *stride)):
            raise ValueError(f"offset {offset!r}, shape {shape!r} and stride {stride!r}")
        contiguous = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        if math.prod(shape) and any(
            size > 1 and step != right for size, step, right in zip(shape, stride, contiguous, strict=True)
        ):
            raise self._refused(f"a tensor of shape {list(shape)} with strides {list(stride)}")
        return _Tensor(dtype, key, offset, tuple(shape))

    def _refused(self, what: str) -> ConfigError:
        return ConfigError(
            f"{self._name}: expected a tuple of contiguous tensors of numbers and nothing else, got {what}"
        )
