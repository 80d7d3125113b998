"""The one place that runs a program: compile or load, place parameters, dispatch, time, replay goldens.

What the compiler proves and what the server runs is this code.
"""

from xlarank.device.buffers import BatchBuffers, BufferRing
from xlarank.device.compiles import CompileCounter
from xlarank.device.platform import (
    compile_cache_at,
    compiler_options,
    configure,
    default_compile_cache,
    device_kind,
    devices,
    fingerprint,
    seed_compile_cache,
)
from xlarank.device.replay import GoldenReplay, check_errors, score_errors
from xlarank.device.replica import Executable, Replica, deserialize_program
from xlarank.device.timing import measure_profile

__all__ = [
    "BatchBuffers",
    "BufferRing",
    "CompileCounter",
    "Executable",
    "GoldenReplay",
    "Replica",
    "check_errors",
    "compile_cache_at",
    "compiler_options",
    "configure",
    "default_compile_cache",
    "deserialize_program",
    "device_kind",
    "devices",
    "fingerprint",
    "measure_profile",
    "score_errors",
    "seed_compile_cache",
]
