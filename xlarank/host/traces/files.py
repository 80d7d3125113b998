"""Reads traces in the form of the public dlrm_datasets: indices, offsets and lengths."""

from __future__ import annotations

import gzip
import lzma
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from xlarank.errors import ConfigError
from xlarank.host.traces.torch_file import read_torch_tensors
from xlarank.spec import Ragged

__all__ = ["read_trace"]

_DAMAGE = (
    ValueError,
    TypeError,
    AttributeError,  # an array by itself, not a zip of some
    EOFError,
    OSError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
"""What zipfile and NumPy raise for bytes that may say anything of sizes, versions and methods."""

_NAMES = ("indices", "offsets", "lengths")


def read_trace(path: Path | str) -> list[Ragged]:
    """Reads the bags of every table.

    A file holds ``indices`` [V], the ids of all bags, table by table; ``offsets`` [T * B + 1], where each bag
    begins and the last ends; and ``lengths`` [T, B], which must agree with them. Without lengths, or with
    lengths [B], it is of one table.

    - ``.npz`` and ``.safetensors``: integer arrays of these names;
    - ``.pt`` and ``.pt.gz``: a tuple of these tensors in this order, as `torch.save` writes it from torch 1.6
      on. The ids are mapped, not copied; a ``.gz`` is unpacked into a temporary file first (the public files
      of 2022: 11 GB each). Torch isn't needed, and nothing that the file names is imported or called.

    Args:
      path: the file.

    Returns:
      T tables of B bags each: values int64, lengths int32.

    Raises:
      ConfigError: names the file, what was expected and what came.
      OSError: if it can't be read.
    """
    path = Path(path)
    if path.name.endswith((".pt", ".pt.gz")):
        arrays = _torch(path)
    elif path.suffix in (".npz", ".safetensors"):
        arrays = _named(path, _npz(path) if path.suffix == ".npz" else _safetensors(path))
    else:
        raise ConfigError(f"{path}: expected a trace in .npz, .safetensors, .pt or .pt.gz")
    for name, array in zip(_NAMES, arrays, strict=False):
        if array.dtype.kind not in "iu":
            raise ConfigError(f"{path}: expected integers, {name} are {array.dtype}")
    return _tables(path, *arrays)


def _npz(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as opened:
        try:
            with np.load(opened, allow_pickle=False) as file:
                return {name: file[name] for name in _NAMES if name in file}
        except _DAMAGE as error:
            raise ConfigError(f"{path}: expected arrays as numpy.savez writes them: {error}") from error


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{path}: expected a safetensors file: {error}") from error


def _named(path: Path, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    if not {"indices", "offsets"} <= arrays.keys():
        raise ConfigError(f"{path}: expected arrays indices, offsets and maybe lengths, got {sorted(arrays)}")
    return [arrays[name] for name in _NAMES if name in arrays]


def _torch(path: Path) -> list[np.ndarray]:
    if path.suffix == ".pt":
        with path.open("rb") as file:
            arrays = read_torch_tensors(file, str(path))
    else:
        # The list of what a zip holds stands at its end, and a mapping needs a file without gzip.
        with tempfile.TemporaryFile() as file:
            try:
                with gzip.open(path) as packed:
                    shutil.copyfileobj(packed, file, 1 << 24)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise ConfigError(f"{path}: expected a gzip file: {error}") from error
            file.flush()
            arrays = read_torch_tensors(file, str(path))
    if len(arrays) not in (2, 3):
        raise ConfigError(
            f"{path}: expected the tensors indices, offsets and maybe lengths, got {len(arrays)}"
        )
    return arrays


def _tables(
    path: Path, indices: np.ndarray, offsets: np.ndarray, lengths: np.ndarray | None = None
) -> list[Ragged]:
    if indices.ndim != 1 or offsets.ndim != 1 or not len(offsets):
        raise ConfigError(
            f"{path}: expected indices [V] and offsets [T * B + 1], got shapes {list(indices.shape)} and "
            f"{list(offsets.shape)}"
        )
    found = np.diff(offsets.astype(np.int64))
    if offsets[0] != 0 or offsets[-1] != len(indices) or (found < 0).any():
        raise ConfigError(
            f"{path}: expected offsets that grow from 0 to the number of indices, {len(indices)}, got "
            f"{int(offsets[0])} to {int(offsets[-1])}{', falling between' if (found < 0).any() else ''}"
        )
    shape = (1, len(found)) if lengths is None or lengths.ndim == 1 else lengths.shape
    if len(shape) != 2 or (lengths is not None and not np.array_equal(lengths.reshape(-1), found)):
        raise ConfigError(
            f"{path}: expected lengths [T, B] that are the differences of the {len(offsets)} offsets, got "
            f"others, of shape {list(shape)}"
        )
    if len(indices) and (indices.min() < 0 or indices.max() >= 2**63):
        found_id = indices.min() if indices.min() < 0 else indices.max()
        raise ConfigError(f"{path}: expected ids in [0, 2**63), got {int(found_id)}")
    num_tables, num_bags = shape
    ends = offsets[:: num_bags or 1] if num_bags else np.zeros(num_tables + 1, np.int64)
    return [
        Ragged(
            indices[int(ends[table]) : int(ends[table + 1])].astype(np.int64, copy=False),
            found[table * num_bags : (table + 1) * num_bags].astype(np.int32),
        )
        for table in range(num_tables)
    ]
