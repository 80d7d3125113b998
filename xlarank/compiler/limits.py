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
_FEW_ROWS, _WIDE = 8, 2048
"""A small bucket's matmul: its weights leave the caches, so their bytes are its time."""

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
    """By lower precision: how much faster than in float32 the same matmul is, conversions not counted. Of a
    large one, which is arithmetic, and one of 8 rows, which reads weights: whichever gains more."""

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
        return lambda x, w: jax.lax.dot(x, w, precision=precision, preferred_element_type=accumulated)

    square, few, wide_weights = (_SIZE, _SIZE), (_FEW_ROWS, _WIDE), (_WIDE, _WIDE)
    shapes = {"large": (square, square), "few": (few, wide_weights)}
    long = jax.ShapeDtypeStruct((_READ_BYTES // 4,), np.dtype(np.float32))
    short = jax.ShapeDtypeStruct((8,), np.dtype(np.float32))
    products, factors = {}, {}
    for precision, (dtype, accumulated) in _FORMATS.items():
        for size, pair in shapes.items():
            avals = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in pair]
            products[precision, size] = compiled(product(dtype, accumulated), *avals)
            factors[precision, size] = [
                jax.device_put(np.ones(aval.shape, aval.dtype), device) for aval in avals
            ]
    largest = compiled(jnp.max, long)
    nothing = compiled(lambda x: x + 1, short)
    y, z = jax.device_put(np.ones(long.shape, np.float32), device), np.ones(8, np.float32)
    seconds = time_in_turns(
        {
            **{key: lambda k=key: products[k](*factors[k]).block_until_ready() for key in products},
            "largest": lambda: largest(y).block_until_ready(),
            "nothing": lambda: np.asarray(nothing(z)),
        },
        budget_seconds=_BUDGET_SECONDS,
    )
    # What a device can do at most: on a busy machine the median is others' doing.
    least = {name: min(values) for name, values in seconds.items()}
    return MachineLimits(
        flops_a_second=2 * _SIZE**3 / least[Precision.FLOAT32, "large"],
        bytes_a_second=_READ_BYTES / least["largest"],
        launch_seconds=least["nothing"],
        lower_gain={
            p.value: max(least[Precision.FLOAT32, size] / least[p, size] for size in shapes)
            for p in _FORMATS
            if p is not Precision.FLOAT32
        },
    )
