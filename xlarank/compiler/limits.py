"""What a device can do at most, measured, and what holds a program back: `MachineLimits`, `Limit`."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from xlarank.device import ProgramCost, compiler_options, time_in_turns
from xlarank.spec import Precision

if TYPE_CHECKING:  # jax.Device is this class, under a name that type checkers don't take
    from jaxlib._jax import Device

__all__ = ["Limit", "MachineLimits", "measure_limits"]

_SIZE = 1024
_READ_BYTES = 64 << 20
_BUDGET_SECONDS = 0.5

_FORMATS = {
    Precision.FLOAT32: (np.float32, np.float32),
    Precision.BFLOAT16: (jnp.bfloat16, np.float32),
    Precision.FLOAT16: (np.float16, np.float32),
    Precision.INT8: (np.int8, np.int32),
}


class Limit(enum.StrEnum):
    """What takes most of a program's time, as far as a roofline can say (Williams et al., CACM 2009)."""

    ARITHMETIC = "arithmetic"
    MEMORY = "memory"
    LAUNCH = "launch"


@dataclasses.dataclass(frozen=True)
class MachineLimits:
    """Of one device, in float32."""

    flops_a_second: float
    """Of a 1024 x 1024 x 1024 matmul."""

    bytes_a_second: float
    """Read by a maximum over 64 MB."""

    launch_seconds: float
    """Of an empty program, results in host memory."""

    lower_gain: Mapping[str, float]
    """By lower precision: how much faster than in float32 the same matmul is, conversions not counted."""

    def limit_of(self, cost: ProgramCost) -> tuple[Limit, float]:
        """What a program of this cost is held back by, and the least time that it could take, in seconds."""
        least = {
            Limit.ARITHMETIC: cost.flops / self.flops_a_second,
            Limit.MEMORY: cost.bytes_accessed / self.bytes_a_second,
            Limit.LAUNCH: self.launch_seconds,
        }
        limit = max(least, key=lambda name: least[name])
        return limit, least[limit]


def measure_limits(device: Device) -> MachineLimits:
    """Measures a device; takes about a second."""

    def compiled(function, *avals):
        sharding = jax.sharding.SingleDeviceSharding(device)
        lowered = jax.jit(function, in_shardings=sharding, out_shardings=sharding).lower(*avals)
        return lowered.compile(compiler_options=compiler_options(device.platform))

    def product(dtype, accumulated):
        precision = "highest" if dtype == np.float32 else None
        return lambda x: jax.lax.dot(x, x, precision=precision, preferred_element_type=accumulated)

    square = jax.ShapeDtypeStruct((_SIZE, _SIZE), np.dtype(np.float32))
    long = jax.ShapeDtypeStruct((_READ_BYTES // 4,), np.dtype(np.float32))
    short = jax.ShapeDtypeStruct((8,), np.dtype(np.float32))
    products = {
        precision: compiled(product(dtype, accumulated), jax.ShapeDtypeStruct(square.shape, jnp.dtype(dtype)))
        for precision, (dtype, accumulated) in _FORMATS.items()
    }
    largest = compiled(jnp.max, long)
    nothing = compiled(lambda x: x + 1, short)
    factors = {
        precision: jax.device_put(np.ones(square.shape, jnp.dtype(dtype)), device)
        for precision, (dtype, _) in _FORMATS.items()
    }
    y, z = jax.device_put(np.ones(long.shape, np.float32), device), np.ones(8, np.float32)
    seconds = time_in_turns(
        {
            **{p: lambda p=p: products[p](factors[p]).block_until_ready() for p in products},
            "largest": lambda: largest(y).block_until_ready(),
            "nothing": lambda: np.asarray(nothing(z)),
        },
        budget_seconds=_BUDGET_SECONDS,
    )
    # What a device can do at most: on a busy machine the median is others' doing.
    least = {name: min(values) for name, values in seconds.items()}
    wide = least[Precision.FLOAT32]
    return MachineLimits(
        flops_a_second=2 * _SIZE**3 / wide,
        bytes_a_second=_READ_BYTES / least["largest"],
        launch_seconds=least["nothing"],
        lower_gain={p.value: wide / least[p] for p in _FORMATS if p is not Precision.FLOAT32},
    )
