"""A bundle's programs and weights on one device: `Replica`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax import export

from xlarank.device.platform import compiler_options
from xlarank.spec import Bucket, Signature

if TYPE_CHECKING:  # jax.Device is this class, under a name that type checkers don't take
    from jaxlib._jax import Device

__all__ = ["Executable", "Replica", "deserialize_program"]


def deserialize_program(data: bytes) -> export.Exported:
    """Reads a program as `xlarank.compiler.lower` wrote it (StableHLO in jax.export's container)."""
    return export.deserialize(bytearray(data))


@dataclasses.dataclass(frozen=True)
class Executable:
    """One program compiled for one bucket and device, with its weights in place."""

    bucket: Bucket
    """The size it was compiled for."""

    compiled: jax.stages.Compiled
    """Takes (prepared, context, candidates, request_of_row)."""

    prepared: tuple[jax.Array, ...]
    """Weights on the device."""

    context_names: tuple[str, ...]
    """Leaves of the second argument."""

    candidate_names: tuple[str, ...]
    """Leaves of the third argument."""

    def __call__(self, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs one batch and waits for it.

        Args:
          leaves: arrays of ``leaf.shape(bucket)`` by leaf name.

        Returns:
          Scores [B] float32 by task, padding included, in host memory.
        """
        outputs = self.compiled(
            self.prepared,
            tuple(leaves[name] for name in self.context_names),
            tuple(leaves[name] for name in self.candidate_names),
            leaves["request_of_row"],
        )
        # np.asarray first, slice later: slicing a jax.Array compiles a program for each new size.
        return {task: np.asarray(scores) for task, scores in outputs.items()}


class Replica:
    """All executables of a bundle on one device. One thread at a time may run it."""

    def __init__(
        self,
        device: Device,
        signature: Signature,
        programs: Mapping[Bucket, export.Exported],
        params: Sequence[np.ndarray],
    ) -> None:
        """Places the weights and compiles (or finds in the compilation cache) every bucket.

        Args:
          device: where it runs.
          signature: the programs' inputs.
          programs: a deserialised program a bucket.
          params: dense weights in the programs' order.
        """
        self.device = device
        prepared = tuple(jax.device_put(param, device) for param in params)
        context = tuple(leaf.name for leaf in signature.context_leaves)
        candidate = tuple(leaf.name for leaf in signature.candidate_leaves)
        self.executables = {
            bucket: Executable(bucket, _compile(program, device), prepared, context, candidate)
            for bucket, program in programs.items()
        }

    def run(self, bucket: Bucket, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs one batch; see `Executable.__call__`."""
        return self.executables[bucket](leaves)


def _compile(program: export.Exported, device: Device) -> jax.stages.Compiled:
    def xlarank_program(*args):  # the name shows in profiles and in the names of cache files
        return program.call(*args)

    sharding = jax.sharding.SingleDeviceSharding(device)
    avals = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in program.in_avals]
    args, _ = jax.tree.unflatten(program.in_tree, avals)
    lowered = jax.jit(xlarank_program, in_shardings=sharding, out_shardings=sharding).lower(*args)
    return lowered.compile(compiler_options=compiler_options(device.platform))
