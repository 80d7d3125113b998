"""Compiling exported programs: `compile_program`, and the programs that versions of a model share:
`ProgramLibrary`."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
from jax import export

from xlarank.device.platform import compiler_options, export_platform
from xlarank.errors import ModelError

if TYPE_CHECKING:  # jax.Device is this class, under a name that type checkers don't take
    from jaxlib._jax import Device

__all__ = ["PREPARE_NAME", "PROGRAM_NAME", "ProgramLibrary", "compile_program", "deserialize_program"]

PROGRAM_NAME, PREPARE_NAME = "xlarank_program", "xlarank_prepare"
"""Of row programs and of those that prepare weights, in profiles and in the compilation cache."""


def deserialize_program(data: bytes) -> export.Exported:
    """Reads a program as `xlarank.compiler.lower` wrote it (StableHLO in jax.export's container)."""
    return export.deserialize(bytearray(data))


def compile_program(program: export.Exported, device: Device, name: str) -> jax.stages.Compiled:
    """Compiles for a device, or finds it in the compilation cache.

    Args:
      program: what to compile.
      device: where it will run.
      name: shows in profiles and in the names of cache files.

    Raises:
      ModelError: if it was exported for other platforms than the device's.
    """
    if (here := export_platform(device)) not in program.platforms:
        raise ModelError(
            f"{name}: expected a program for {here}, got one for {' and '.join(program.platforms)}; serve it "
            f"there, or compile the model on {here}"
        )

    def call(*args):
        return program.call(*args)

    call.__name__ = name
    sharding = jax.sharding.SingleDeviceSharding(device)
    avals = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in program.in_avals]
    args, _ = jax.tree.unflatten(program.in_tree, avals)
    lowered = jax.jit(call, in_shardings=sharding, out_shardings=sharding).lower(*args)
    return lowered.compile(compiler_options=compiler_options(device.platform))


class ProgramLibrary:
    """Compiled programs by content and device, for as long as somebody holds them. Any thread.

    New weights of a model that serves take its programs as they are: nothing is traced, read from the
    compilation cache or linked again, and the code is in memory once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Guarded by _lock. By digest, device and name.
        self._compiled: weakref.WeakValueDictionary[tuple[str, Device, str], jax.stages.Compiled] = (
            weakref.WeakValueDictionary()
        )

    def compiled(
        self, digest: str, read: Callable[[], export.Exported], device: Device, name: str
    ) -> jax.stages.Compiled:
        """The program, compiled unless it is in use already; see `compile_program`.

        Args:
          digest: of the program's content.
          read: gives the program; called if it must be compiled.
          device, name: see there.
        """
        key = digest, device, name
        with self._lock:
            known = self._compiled.get(key)
        if known is None:
            known = compile_program(read(), device, name)
            with self._lock:
                known = self._compiled.setdefault(key, known)
        return known
