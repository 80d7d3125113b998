"""What a device can do at most, measured, and what holds a program back: `MachineLimits`, `Limit`."""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from xlarank.device import ProgramCost, compiler_options, half_precision, time_in_turns
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


@functools.cache
def measure_limits(device: Device) -> MachineLimits:
    """Measures a device, once a process; takes about a second."""
    large = ((_SIZE, _SIZE), (_SIZE, _SIZE)), 2 * _SIZE**3
    few = ((_FEW_ROWS, _WIDE), (_WIDE, _WIDE)), 2 * _FEW_ROWS * _WIDE**2
    precisions = (Precision.FLOAT32, half_precision(device), Precision.INT8)
    runs: dict[Any, Callable[[], object]] = {
        (precision, flops): _product(device, precision, shapes)
        for precision in precisions
        for shapes, flops in (large, few)
    }
    runs["read"] = _run(device, jnp.max, np.ones(_READ_BYTES // 4, np.float32))
    nothing = _run(device, lambda x: x + 1, np.ones(8, np.float32))
    runs["nothing"] = lambda: np.asarray(nothing())
    seconds = time_in_turns(runs, budget_seconds=_BUDGET_SECONDS)
    # What a device can do at most: on a busy machine the median is others' doing.
    least = {name: min(values) for name, values in seconds.items()}
    return MachineLimits(
        flops_a_second=large[1] / least[Precision.FLOAT32, large[1]],
        bytes_a_second=_READ_BYTES / least["read"],
        launch_seconds=least["nothing"],
        lower_gain={
            p.value: max(least[Precision.FLOAT32, flops] / least[p, flops] for _, flops in (large, few))
            for p in precisions[1:]
        },
    )


def _product(
    device: Device, precision: Precision, shapes: tuple[tuple[int, ...], ...]
) -> Callable[[], object]:
    """A matmul of ones, ready to run."""
    dtype, accumulated = _FORMATS[precision]
    asked = "highest" if precision is Precision.FLOAT32 else None
    return _run(
        device,
        lambda x, w: jax.lax.dot(x, w, precision=asked, preferred_element_type=accumulated),
        *(np.ones(shape, jnp.dtype(dtype)) for shape in shapes),
    )


def _run(device: Device, function: Callable, *arrays: np.ndarray) -> Callable[[], object]:
    """A compiled function of arrays that lie on the device."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    lowered = jax.jit(function, in_shardings=sharding, out_shardings=sharding).lower(*arrays)
    has_int8 = any(array.dtype == np.int8 for array in arrays)
    compiled = lowered.compile(compiler_options=compiler_options(device.platform, has_int8=has_int8))
    placed = [jax.device_put(array, device) for array in arrays]
    return lambda: compiled(*placed).block_until_ready()
