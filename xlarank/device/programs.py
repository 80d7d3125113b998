"""Compiling exported programs: `compile_prepare`, `compile_row_program`, and those that versions of a model
share: `ProgramLibrary`."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import export

from xlarank.device.layout import BatchLayout
from xlarank.device.platform import (
    compile_cache_at,
    compiler_options,
    export_platform,
    has_own_memory,
    seed_compile_cache,
)
from xlarank.errors import ModelError

if TYPE_CHECKING:  # jax.Device is this class, under a name that type checkers don't take
    from jaxlib._jax import Device

__all__ = [
    "Compile",
    "ProgramLibrary",
    "compile_lowered",
    "compile_prepare",
    "compile_row_program",
    "deserialize_program",
    "has_int8",
    "takes_words",
]

_log = logging.getLogger(__name__)

Compile = Callable[[export.Exported, "Device"], jax.stages.Compiled]
"""Compiles a program for a device."""


def deserialize_program(data: bytes) -> export.Exported:
    """Reads a program as `xlarank.compiler.lower` wrote it (StableHLO in jax.export's container)."""
    return export.deserialize(bytearray(data))


def compile_prepare(program: export.Exported, device: Device) -> jax.stages.Compiled:
    """Compiles the program that prepares weights for a device, or finds it in the compilation cache.

    Args:
      program: what to compile.
      device: where it will run.

    Raises:
      ModelError: if it was exported for other platforms than the device's.
    """
    return _compile(program.call, _arguments(program), program, device, "xlarank_prepare")


def compile_row_program(
    program: export.Exported, device: Device, *, is_packed: bool | None = None
) -> jax.stages.Compiled:
    """Compiles a bucket's program for a device, or finds it in the compilation cache.

    Args:
      program: takes (prepared, context, candidates, request_of_row).
      device: where it will run.
      is_packed: whether what is compiled takes (prepared, words) instead, the leaves in one array as
        `BatchLayout` has them. None: on devices that have memory of their own, where each array is a transfer
        that costs more than its bytes.

    Raises:
      ModelError: if it was exported for other platforms than the device's.
    """
    arguments = _arguments(program)
    if not (has_own_memory(device) if is_packed is None else is_packed):
        return _compile(program.call, arguments, program, device, "xlarank_program")
    prepared, *by_scope = arguments
    leaves, tree = jax.tree.flatten(by_scope)
    layout = BatchLayout(tuple(leaf.shape for leaf in leaves), tuple(np.dtype(leaf.dtype) for leaf in leaves))

    def call(prepared, words):
        return program.call(prepared, *jax.tree.unflatten(tree, layout.unpack(words)))

    words = jax.ShapeDtypeStruct((layout.num_words,), np.uint32)
    return _compile(call, (prepared, words), program, device, "xlarank_program")


def takes_words(compiled: jax.stages.Compiled) -> bool:
    """Whether a compiled row program takes its leaves in one array; see `compile_row_program`."""
    arguments, _ = compiled.args_info
    return len(arguments) == 2


def _arguments(program: export.Exported) -> tuple[Any, ...]:
    """Shapes and dtypes of a program's arguments, in their containers."""
    avals = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in program.in_avals]
    arguments, _ = jax.tree.unflatten(program.in_tree, avals)
    return arguments


def _compile(
    run: Callable[..., Any], arguments: Sequence[Any], program: export.Exported, device: Device, name: str
) -> jax.stages.Compiled:
    """Compiles what calls a program, under a name that shows in profiles and in the names of cache files."""
    if (here := export_platform(device)) not in program.platforms:
        raise ModelError(
            f"{name}: expected a program for {here}, got one for {' and '.join(program.platforms)}; serve it "
            f"there, or compile the model on {here}"
        )

    def call(*args):
        return run(*args)

    call.__name__ = name
    sharding = jax.sharding.SingleDeviceSharding(device)
    lowered = jax.jit(call, in_shardings=sharding, out_shardings=sharding).lower(*arguments)
    return compile_lowered(lowered, device)


def compile_lowered(lowered: jax.stages.Lowered, device: Device) -> jax.stages.Compiled:
    """Compiles for a device, or finds it in the compilation cache; replaces a file there that can't be read.

    JAX writes in place, so a process that is killed may leave a file that is cut off; and it never writes a
    file that is there, so this program would be compiled anew at each start.

    Args:
      lowered: what to compile.
      device: where it will run.
    """
    options = compiler_options(device.platform, has_int8=device.platform == "gpu" and has_int8(lowered))
    try:
        with _cache_errors_raised():
            return lowered.compile(compiler_options=options)
    except OSError:  # a disk that is full or can't be read: JAX warns, and does without the cache
        return lowered.compile(compiler_options=options)
    except Exception as error:  # of whatever reads the cache, or the compiler's, which comes again
        with tempfile.TemporaryDirectory(prefix="xlarank-compile-") as empty:
            with compile_cache_at(Path(empty)):
                compiled = lowered.compile(compiler_options=options)
            seed_compile_cache(Path(empty).iterdir(), is_newer=True)
        _log.warning("a file of the compile cache couldn't be read, and is replaced: %s", error)
        return compiled


def has_int8(lowered: jax.stages.Lowered) -> bool:
    """Whether a program has arrays of int8."""
    return "xi8>" in lowered.as_text()


_CACHE_ERRORS = threading.Lock()


@contextlib.contextmanager
def _cache_errors_raised() -> Iterator[None]:
    with _CACHE_ERRORS:  # the setting is the process's: two at once would leave it as neither found it
        before = jax.config.jax_raise_persistent_cache_errors
        jax.config.update("jax_raise_persistent_cache_errors", True)
        try:
            yield
        finally:
            jax.config.update("jax_raise_persistent_cache_errors", before)


class ProgramLibrary:
    """Compiled programs by content and device, for as long as somebody holds them. Any thread.

    New weights of a model that serves take its programs as they are: nothing is traced, read from the
    compilation cache or linked again, and the code is in memory once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Guarded by _lock. By digest, device and what compiles.
        self._compiled: weakref.WeakValueDictionary[tuple[str, Device, Compile], jax.stages.Compiled] = (
            weakref.WeakValueDictionary()
        )

    def compiled(
        self, digest: str, read: Callable[[], export.Exported], device: Device, compile_: Compile
    ) -> jax.stages.Compiled:
        """The program, compiled unless it is in use already.

        Args:
          digest: of the program's content.
          read: gives the program; called if it must be compiled.
          device: where it will run.
          compile_: `compile_row_program` or `compile_prepare`.
        """
        key = digest, device, compile_
        with self._lock:
            known = self._compiled.get(key)
        if known is None:
            known = compile_(read(), device)
            with self._lock:
                known = self._compiled.setdefault(key, known)
        return known
