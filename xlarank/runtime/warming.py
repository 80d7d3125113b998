"""The process that compiles for one that serves (`CompileHelper` starts it, at the lowest priority):

    python -m xlarank.runtime.warming --compile-cache FOLDER --platform cpu,devices=2 BUNDLE ...

compiles every program of the bundles for every device into the compilation cache and reads no table. The
server that started it then finds all of them there.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xlarank import device
from xlarank.bundle import Bundle, Verify, open_bundle
from xlarank.errors import ModelError, XlarankError
from xlarank.runtime.loading import fingerprint_differences, read_programs
from xlarank.runtime.program_key import updatable_tables
from xlarank.spec import PlatformOptions

if TYPE_CHECKING:  # jax.Device is this class, under a name that type checkers don't take
    from jaxlib._jax import Device

__all__ = ["compile_into_cache", "main"]

_PRIVATE = ".warming-"
_ABANDONED_SECONDS = 24 * 3600


def compile_into_cache(bundle: Bundle, *, devices: Sequence[Device], use_bundle_code: bool = True) -> None:
    """Compiles what loading a bundle compiles into the process's compilation cache.

    Code becomes visible in the cache whole or not at all, also if the process is killed: JAX would keep a
    file that was cut off, and compile anew each time.

    Args:
      bundle: its tables aren't read.
      devices: code is compiled for each.
      use_bundle_code: whether compiled code in the bundle may be used where the fingerprint is the same.

    Raises:
      ModelError: if the cache doesn't keep what is compiled.
    """
    folder = device.compile_cache_folder()
    if use_bundle_code and not fingerprint_differences(bundle, devices):
        device.seed_compile_cache(bundle.cache_files())
    _remove_abandoned(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=_PRIVATE) as private:
        # Files that other processes are writing begin with a dot, and may be renamed meanwhile.
        known = [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]
        linked: dict[str, int] = {}
        for file in known:
            with contextlib.suppress(FileNotFoundError):
                os.link(file, link := Path(private) / file.name)
                linked[file.name] = link.stat().st_ino
        with device.compile_cache_at(Path(private)):
            _compile(bundle, devices)
        # Those that are new, and those that took the place of what couldn't be read.
        made = [file for file in Path(private).iterdir() if file.stat().st_ino != linked.get(file.name)]
        device.seed_compile_cache(made, is_newer=True)
    before = device.num_compiled()
    _compile(bundle, devices)
    if missed := device.num_compiled() - before:
        raise ModelError(
            f"{bundle.path}: compile cache {folder}: expected it to keep what is compiled, {missed} programs "
            f"weren't there afterwards; is the disk full?"
        )


def _compile(bundle: Bundle, devices: Sequence[Device]) -> None:
    programs, prepare = read_programs(bundle)
    updatable = updatable_tables(bundle)
    for target in devices:
        library = device.ProgramLibrary()
        if prepare is not None:
            prepare.compiled(library, target, device.compile_prepare)
        for program in programs.values():
            program.compiled(library, target, device.compile_row_program)
        for table, _ in updatable.values():
            device.compile_update(target, table.shape, np.dtype(table.dtype))


def _remove_abandoned(folder: Path) -> None:
    """What a process that was killed left of its private cache."""
    for path in folder.glob(f"{_PRIVATE}*"):
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The helper process; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m xlarank.runtime.warming", description=__doc__)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE", help="folder of a version")
    parser.add_argument("--compile-cache", type=Path, help="where compiled code goes")
    parser.add_argument("--devices", type=int, help="compile for so many of the default platform (all)")
    parser.add_argument(
        "--platform",
        type=PlatformOptions.parse,
        action="append",
        default=[],
        help="instead of that, compile for its devices, as in cpu,devices=2",
    )
    parser.add_argument("--no-bundle-code", action="store_true", help="compile programs/ whatever there is")
    args = parser.parse_args(arguments)
    # On all cores: XLA:CPU compiles for as many as it may run on, and the server runs on all of its own.
    try:
        device.configure(num_devices=args.devices, platforms=args.platform, compile_cache=args.compile_cache)
        devices = device.devices(args.devices, args.platform)
        for path in args.bundles:
            bundle = open_bundle(path, verify=Verify.ALL_BUT_TABLES)
            compile_into_cache(bundle, devices=devices, use_bundle_code=not args.no_bundle_code)
    except XlarankError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
