"""Compiling in a process of its own, so that LLVM never runs in one that serves: `CompileHelper`,
`CompileDiedError`, `InterruptedLoadError`."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from xlarank.errors import ModelError, UnavailableError
from xlarank.runtime.process_ends import how_it_ended
from xlarank.runtime.yielding import IdleSignal, YieldingProcess
from xlarank.spec import PlatformOptions

__all__ = ["CompileDiedError", "CompileHelper", "InterruptedLoadError"]

_MAX_REASON = 2000
"""Bytes of what the process said last."""

_START = """
import ctypes
import os
import runpy
import signal
import sys

os.nice(19)
parent = int(sys.argv.pop(1))
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
if os.getppid() != parent:
    raise SystemExit(1)
try:  # where memory is short the system is to end this one, and none that serves
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
except OSError:
    pass
os.write(1, b".")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
runpy.run_module("xlarank.runtime.warming", run_name="__main__", alter_sys=True)
"""
"""What comes before JAX's import, which takes seconds of CPU: the lowest priority, and a way to end. Once it
has written a byte nothing is left of it when this process is killed, also if it is stopped."""


class InterruptedLoadError(UnavailableError):
    """A version wasn't loaded, as what was asked later goes first."""


class CompileDiedError(ModelError):
    """The process that compiles was killed, or couldn't be started: it may be no fault of the version."""


class CompileHelper:
    """Runs the helper process, one at a time, at the lowest priority. Needs no JAX in this one."""

    def __init__(
        self,
        *,
        num_devices: int | None = None,
        platforms: Sequence[PlatformOptions] = (),
        use_bundle_code: bool,
        compile_cache: Path | None,
        idle: IdleSignal | None = None,
    ) -> None:
        """
        Args:
          num_devices: that the server uses of JAX's default platform; None for all.
          platforms: instead of that, of the devices that it uses, see `xlarank.device.platforms_of`.
          use_bundle_code: whether compiled code in bundles may be used.
          compile_cache: of the server; None for the one that it takes by default.
          idle: of the requests that the process is to yield to, where they need the same cores.
        """
        self._options = [word for options in platforms for word in ("--platform", str(options))]
        self._options += [] if num_devices is None else ["--devices", str(num_devices)]
        self._options += [] if use_bundle_code else ["--no-bundle-code"]
        self._options += [] if compile_cache is None else ["--compile-cache", str(compile_cache.absolute())]
        self._idle = idle
        self._lock = threading.Lock()
        # All below guarded by _lock.
        self._process: subprocess.Popen[bytes] | None = None
        self._first: set[int] = set()  # orders of what waits for its turn, and goes before any compiling
        self._turn = 0  # the order of what is at work, if it is one of those
        self._is_closed = False  # moves one way

    def compile(self, path: Path, environment: Mapping[str, str] | None = None) -> float:
        """Fills the compilation cache for a bundle; returns the seconds that it took.

        Args:
          path: folder of the version.
          environment: variables that differ from this process's.

        Raises:
          ModelError: if the process fails; with the end of what it said.
          CompileDiedError: if it was killed, as the system does where memory is short, or can't be started.
          UnavailableError: as `check`, before it or after.
        """
        start = time.monotonic()
        # -P: what lies in the current folder isn't Python's.
        command = [sys.executable, "-P", "-c", _START, str(os.getpid())]
        command += [*self._options, str(path.absolute())]
        # A GPU's memory is the server's: this one takes what compiling needs, when it needs it.
        variables = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **(environment or {})}
        with tempfile.TemporaryFile() as said:
            with self._lock:
                self.check(path)
                try:
                    process = self._process = subprocess.Popen(
                        command,
                        env=variables,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        stderr=said,
                    )
                except OSError as error:
                    raise CompileDiedError(
                        f"{path}: the process that compiles it can't be started: {error}"
                    ) from error
            status = self._wait(process)
            with self._lock:
                self._process = None
                self.check(path)
            if status < 0:
                raise CompileDiedError(
                    f"{path}: the process that compiles it was ended by {how_it_ended(status)}; the system "
                    f"does so where memory is short"
                )
            if status:
                said.seek(max(0, said.seek(0, os.SEEK_END) - _MAX_REASON))
                reason = said.read().decode(errors="replace").strip()
                raise ModelError(f"{path}: the process that compiles it ended with status {status}: {reason}")
        return time.monotonic() - start

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        assert process.stdout is not None
        with process.stdout as started:
            started.read(1)
        if self._idle is None:
            return process.wait()
        yielding = YieldingProcess(process)
        with self._idle.told(yielding.on_idle):
            return yielding.wait()

    def check(self, path: Path) -> None:
        """Says whether a version may be loaded now.

        Raises:
          InterruptedLoadError: if something goes first: what `give_way` was for, unless it was asked before
            what is at work.
          UnavailableError: after `close`.
        """
        if self._is_closed:
            raise UnavailableError(f"{path}: not loaded: the server is stopping")
        if max(self._first, default=0) > self._turn:
            raise _interrupted(path)

    def give_way(self, order: int) -> None:
        """Ends the process, if one runs, and starts none before the `turn` of the same order.

        Args:
          order: greater than those before.
        """
        with self._lock:
            self._first.add(order)
            if self._process is not None:
                self._process.kill()

    def check_turn(self, path: Path, order: int) -> None:
        """Says whether what `give_way` of this order was for has had its turn.

        Raises:
          InterruptedLoadError: if it waits for it, the first or once more.
        """
        if order in self._first:
            raise _interrupted(path)

    @contextlib.contextmanager
    def turn(self, order: int) -> Iterator[None]:
        """What `give_way` was for is at work, one at a time; it gives way to greater orders alone.

        If it has to, it goes first again: nothing begins before its next turn.
        """
        with self._lock:
            self._first.discard(order)
            self._turn = order
        try:
            yield
        except InterruptedLoadError:
            with self._lock:
                self._first.add(order)
            raise
        finally:
            with self._lock:
                self._turn = 0

    def go_on(self, order: int) -> None:
        """What `give_way` was for has been done, or is given up. Idempotent."""
        with self._lock:
            self._first.discard(order)

    def close(self) -> None:
        """Ends the process, if one runs, and starts no more."""
        with self._lock:
            self._is_closed = True
            if self._process is not None:
                self._process.kill()


def _interrupted(path: Path) -> InterruptedLoadError:
    return InterruptedLoadError(f"{path}: not loaded: a rollback or an unload came first")
