"""`xlarank serve` as a process of its own, and what a client asks it."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import urllib.request

import numpy as np
import tritonclient.grpc as triton
from linear import features


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}


@contextlib.contextmanager
def served_by(*options, cwd=None):
    """A server process; what is left of it at the end is killed.

    Args:
      options: of the command.
      cwd: its current folder; one that is given gets files with names of Python's own modules.
    """
    if cwd is not None:
        for name in ("queue", "random", "socket", "types"):
            (cwd / f"{name}.py").write_text("raise ImportError('a file of the current folder')")
    command = [
        sys.executable,
        "-P",  # as the installed command
        "-m",
        "xlarank.cli",
        "serve",
        "--json",
        "--port",
        "0",
        "--http-port",
        "0",
        *options,
    ]
    with subprocess.Popen(
        command, cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def complaints_in(err):
    """Lines of a server's stderr that tell more than what it loads, and what answers or has ended."""
    told = re.compile(r"loading |I\d{4} \S+ +\d+ \S+\] (tables of|model|versions|process) ")
    return [line for line in err.splitlines() if not told.match(line)]


def tensors_of(num_candidates, infer_input=triton.InferInput):
    """A request for tritonclient; its inputs over HTTP have another type."""
    values = features(num_candidates)
    tensors = {
        "age": ("FP32", np.float32([3.0])),
        "likes": ("FP32", values["likes"]),
        "topics": ("INT64", np.array(values["topics"]).reshape(-1)),
        "topics.lengths": ("INT32", np.full(num_candidates, 2, np.int32)),
    }
    inputs = [infer_input(name, array.shape, datatype) for name, (datatype, array) in tensors.items()]
    for tensor, (_, array) in zip(inputs, tensors.values(), strict=True):
        tensor.set_data_from_numpy(array)
    return inputs


def metrics_of(running):
    with urllib.request.urlopen(f"http://{running['http']}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))


def read_until(stream, word):
    """Reads a process's output up to the line with a word in it."""
    lines = []
    for line in stream:
        lines.append(line)
        if word in line:
            return
    raise AssertionError(f"expected {word!r}, got {lines}")
