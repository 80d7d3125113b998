"""A bundle's programs and weights on one device: `Replica`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax import export

from xlarank.device.buffers import BatchLeaves
from xlarank.device.layout import BatchLayout
from xlarank.device.programs import compile_prepare, compile_row_program, takes_words
from xlarank.spec import REQUEST_OF_ROW, Bucket, Signature

if TYPE_CHECKING:  # jax.Device is this class, under a name that type checkers don't take
    from jaxlib._jax import Device

__all__ = [
    "BucketProgram",
    "Executable",
    "ProgramCost",
    "Replica",
    "place_tables",
    "prepare_weights",
]


def prepare_weights(
    device: Device,
    prepare: export.Exported | jax.stages.Compiled | None,
    params: Sequence[np.ndarray],
) -> tuple[jax.Array, ...]:
    """Places the dense weights and lays them out for the row programs, once.

    Args:
      device: where they go.
      prepare: the program from params to prepared arrays; None where programs take the params as they are.
      params: in the manifest's order.

    Returns:
      The prepared arrays on the device; params that nobody takes are not kept.
    """
    placed = tuple(jax.device_put(param, device) for param in params)
    if prepare is None:
        return placed
    if isinstance(prepare, export.Exported):
        prepare = compile_prepare(prepare, device)
    return tuple(prepare(*placed))


def place_tables(devices: Sequence[Device], arrays: Iterable[np.ndarray]) -> list[tuple[jax.Array, ...]]:
    """Places rows of tables on devices, one table at a time.

    Args:
      devices: where they go. CPU devices keep an array that is 64-byte aligned as it is and share it, so
        nobody may write it any more.
      arrays: of `Gatherer.device_arrays`.

    Returns:
      By device, its arrays.
    """
    placed: list[list[jax.Array]] = [[] for _ in devices]
    for array in arrays:
        for own, device in zip(placed, devices, strict=True):
            own.append(jax.device_put(array, device).block_until_ready())
        del array  # before the next is made
    return [tuple(own) for own in placed]


@dataclasses.dataclass(frozen=True)
class BucketProgram:
    """The row program of a bucket and the prepared arrays that it takes."""

    program: export.Exported | jax.stages.Compiled
    """Exported, or compiled for the replica's device already."""

    takes: tuple[int, ...]
    """Places among the prepared arrays, in the order of the program's first argument."""


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """XLA's own analysis of a compiled program, for one batch."""

    flops: float
    """Floating point operations."""

    bytes_accessed: float
    """Read and written, fused results not counted."""


@dataclasses.dataclass(frozen=True)
class Executable:
    """One program compiled for one bucket and device, with its weights in place."""

    bucket: Bucket
    """The size it was compiled for."""

    compiled: jax.stages.Compiled
    """Takes (prepared, context, candidates, request_of_row), or (prepared, words)."""

    prepared: tuple[jax.Array, ...]
    """Prepared weights on the device."""

    context_names: tuple[str, ...]
    """Leaves of the second argument."""

    candidate_names: tuple[str, ...]
    """Leaves of the third argument."""

    layout: BatchLayout | None
    """Of the words; None where it takes the leaves themselves."""

    @functools.cached_property
    def _names(self) -> tuple[str, ...]:
        """Of all leaves, in the order of the arguments."""
        return (*self.context_names, *self.candidate_names, REQUEST_OF_ROW)

    def cost(self) -> ProgramCost:
        """What XLA says that a batch costs."""
        analysis = self.compiled.cost_analysis() or {}
        return ProgramCost(float(analysis.get("flops", 0)), float(analysis.get("bytes accessed", 0)))

    def __call__(self, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs one batch and waits for it.

        Args:
          leaves: arrays of ``leaf.shape(bucket)`` by leaf name.

        Returns:
          Scores [B] float32 by task, padding included, in host memory.
        """
        # JAX reads the arrays after the call too: a CPU's program in place, a GPU's client from a thread that
        # copies them to pinned memory (kImmutableZeroCopy of jaxlib/py_values.cc). A program starts when all
        # that it takes has arrived, so once its outputs are here nobody reads them any more.
        if self.layout is None:
            outputs = self.compiled(
                self.prepared,
                tuple(leaves[name] for name in self.context_names),
                tuple(leaves[name] for name in self.candidate_names),
                leaves[REQUEST_OF_ROW],
            )
        else:
            outputs = self.compiled(self.prepared, self._words(self.layout, leaves))
            for scores in outputs.values():  # all on their way before the first is waited for
                scores.copy_to_host_async()
        # np.asarray first, slice later: slicing a jax.Array compiles a program for each new size.
        return {task: np.asarray(scores) for task, scores in outputs.items()}

    def _words(self, layout: BatchLayout, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        """The leaves in one array: the memory that they lie in, or copies if they lie anywhere."""
        if isinstance(leaves, BatchLeaves) and leaves.layout == layout and leaves.names == self._names:
            return leaves.words
        return layout.pack(self._names, [leaves[name] for name in self._names])


class Replica:
    """All executables of a bundle on one device. One thread at a time may run it."""

    def __init__(
        self,
        device: Device,
        signature: Signature,
        programs: Mapping[Bucket, BucketProgram],
        prepared: Sequence[jax.Array],
        prepare: jax.stages.Compiled | None = None,
        *,
        is_packed: bool | None = None,
    ) -> None:
        """Compiles (or finds in the compilation cache) every bucket.

        Args:
          device: where it runs.
          signature: the programs' inputs.
          programs: one a bucket.
          prepared: arrays on the device, of `prepare_weights` and after them those of `place_tables`.
          prepare: what made them, held for the next weights of the model; see `ProgramLibrary`.
          is_packed: how exported programs take a batch; see `compile_row_program`.
        """
        self.device = device
        self.prepare = prepare
        self._prepared = tuple(prepared)
        self._takes = {bucket: program.takes for bucket, program in programs.items()}
        context = tuple(leaf.name for leaf in signature.context_leaves)
        candidate = tuple(leaf.name for leaf in signature.candidate_leaves)
        self.executables = {}
        for bucket, program in programs.items():
            compiled = program.program
            if isinstance(compiled, export.Exported):
                compiled = compile_row_program(compiled, device, is_packed=is_packed)
            self.executables[bucket] = Executable(
                bucket,
                compiled,
                tuple(prepared[place] for place in program.takes),
                context,
                candidate,
                BatchLayout.of(signature, bucket) if takes_words(compiled) else None,
            )

    @property
    def prepared(self) -> tuple[jax.Array, ...]:
        """The prepared arrays."""
        return self._prepared

    def replace(self, place: int, array: jax.Array) -> None:
        """Takes another array for one of the prepared: batches that start after this see it, those that run
        keep what they have. One thread at a time.

        Args:
          place: among the prepared.
          array: of the same shape and dtype, on this device.
        """
        self._prepared = (*self._prepared[:place], array, *self._prepared[place + 1 :])
        self.executables = {
            bucket: dataclasses.replace(
                executable, prepared=tuple(self._prepared[p] for p in self._takes[bucket])
            )
            for bucket, executable in self.executables.items()
        }

    def run(self, bucket: Bucket, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs one batch; see `Executable.__call__`."""
        return self.executables[bucket](leaves)
