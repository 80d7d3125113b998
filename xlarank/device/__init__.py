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
    device_memory,
    devices,
    fingerprint,
    half_precision,
    seed_compile_cache,
)
from xlarank.device.replay import GoldenReplay, ScoreError, check_errors, row_errors, score_errors
from xlarank.device.replica import (
    BucketProgram,
    Executable,
    ProgramCost,
    Replica,
    deserialize_program,
    prepare_weights,
)
from xlarank.device.table_writer import TableWriter
from xlarank.device.timing import measure_profile, time_in_turns

__all__ = [
    "BatchBuffers",
    "BucketProgram",
    "BufferRing",
    "CompileCounter",
    "Executable",
    "GoldenReplay",
    "ProgramCost",
    "Replica",
    "ScoreError",
    "TableWriter",
    "check_errors",
    "compile_cache_at",
    "compiler_options",
    "configure",
    "default_compile_cache",
    "deserialize_program",
    "device_kind",
    "device_memory",
    "devices",
    "fingerprint",
    "half_precision",
    "measure_profile",
    "prepare_weights",
    "row_errors",
    "score_errors",
    "seed_compile_cache",
    "time_in_turns",
]
