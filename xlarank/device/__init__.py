"""The one place that runs a program: compile or load, place parameters, dispatch, time, replay goldens.

What the compiler proves and what the server runs is this code.
"""

from xlarank.device.buffers import BatchBuffers, BatchLeaves, BufferRing
from xlarank.device.compiles import CompileCounter, num_compiled
from xlarank.device.pace import Pace, at_once
from xlarank.device.platform import (
    compile_cache_at,
    compile_cache_files,
    compile_cache_folder,
    compiler_options,
    configure,
    default_compile_cache,
    device_kind,
    device_memory,
    devices,
    export_platform,
    fingerprint,
    half_precision,
    has_own_memory,
    platforms_of,
    seed_compile_cache,
)
from xlarank.device.programs import (
    Compile,
    ProgramLibrary,
    compile_prepare,
    compile_row_program,
    deserialize_program,
)
from xlarank.device.replay import GoldenReplay, ScoreError, check_errors, row_errors, score_errors
from xlarank.device.replica import (
    BucketProgram,
    Executable,
    ProgramCost,
    Replica,
    place_tables,
    prepare_weights,
)
from xlarank.device.table_writer import TableWriter, compile_update
from xlarank.device.timing import measure_profile, time_in_turns

__all__ = [
    "BatchBuffers",
    "BatchLeaves",
    "BucketProgram",
    "BufferRing",
    "Compile",
    "CompileCounter",
    "Executable",
    "GoldenReplay",
    "Pace",
    "ProgramCost",
    "ProgramLibrary",
    "Replica",
    "ScoreError",
    "TableWriter",
    "at_once",
    "check_errors",
    "compile_cache_at",
    "compile_cache_files",
    "compile_cache_folder",
    "compile_prepare",
    "compile_row_program",
    "compile_update",
    "compiler_options",
    "configure",
    "default_compile_cache",
    "deserialize_program",
    "device_kind",
    "device_memory",
    "devices",
    "export_platform",
    "fingerprint",
    "half_precision",
    "has_own_memory",
    "measure_profile",
    "num_compiled",
    "place_tables",
    "platforms_of",
    "prepare_weights",
    "row_errors",
    "score_errors",
    "seed_compile_cache",
    "time_in_turns",
]
