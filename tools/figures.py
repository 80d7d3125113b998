"""What every benchmark ends in: figures, each a measured value beside its target.

A benchmark makes `Figure`s, usually of two interleaved series with `ratio_figure`, of tails with
`quantile_figure`, and calls `report` with them: a table for people, and a JSON list of ``{"figure", "value",
"target", "spread", "how"}`` for programs, with ``"beside"`` where more was measured.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

__all__ = [
    "Figure",
    "Goal",
    "command",
    "environment",
    "quantile_figure",
    "ratio_figure",
    "report",
    "run_tool",
]

_ID = re.compile(r"[a-z][a-z0-9_]*")

_SPREAD_PERCENTILES = (10, 90)

_NUM_DIGITS = 4
"""Significant digits of what is written."""


class Goal(enum.Enum):
    """Which side of the target is the good one."""

    AT_LEAST = "or more"
    AT_MOST = "or less"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured value."""

    figure: str
    """Its id, [a-z][a-z0-9_]*."""

    value: float
    """What was measured."""

    target: float
    """What it should be, or better."""

    goal: Goal
    """Better is more, or less."""

    spread: tuple[float, float]
    """Lowest and highest that it came out at within the run; see `ratio_figure` and `quantile_figure`."""

    how: str
    """Sizes, repeats and what was counted, in words, so that a stranger could measure it again."""

    beside: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What else is worth seeing, by name; shown below the table."""

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.figure):
            raise ValueError(f"figure: expected an id of the form {_ID.pattern}, got {self.figure!r}")
        for name, number in (("value", self.value), ("target", self.target), *_named(self.spread)):
            if not math.isfinite(number):
                raise ValueError(f"figure {self.figure!r}: {name} must be finite; was {number!r}")
        if not self.spread[0] <= self.value <= self.spread[1]:
            raise ValueError(
                f"figure {self.figure!r}: expected a spread around {self.value!r}, got {self.spread!r}"
            )

    @property
    def is_met(self) -> bool:
        """Whether the value reaches the target."""
        if self.goal is Goal.AT_LEAST:
            return self.value >= self.target
        return self.value <= self.target

    def to_dict(self) -> dict[str, Any]:
        """The JSON object; numbers are rounded to four significant digits."""
        return {
            "figure": self.figure,
            "value": _rounded(self.value),
            "target": self.target,
            "spread": [_rounded(end) for end in self.spread],
            "how": self.how,
            **({"beside": dict(self.beside)} if self.beside else {}),
        }


def ratio_figure(
    figure: str,
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    target: float,
    goal: Goal,
    how: str,
    beside: Mapping[str, str] | None = None,
) -> Figure:
    """A ratio of two things that took turns.

    The value is the median of the ratios of neighbours in time, which share whatever else the machine was
    doing; the spread is the 10th and 90th percentile of these ratios.

    Args:
      figure: id.
      numerators: at least one, >= 0.
      denominators: the neighbour of each numerator, at the same place, > 0.
      target, goal, how, beside: see `Figure`.

    Raises:
      ValueError: if the two don't pair up, or hold anything but finite numbers, >= 0 over > 0.
    """
    if len(numerators) != len(denominators) or not numerators:
        raise ValueError(
            f"figure {figure!r}: expected as many numerators as denominators and at least one, got "
            f"{len(numerators)} and {len(denominators)}"
        )
    for number in (*numerators, *denominators):
        if not 0 <= number < math.inf:
            raise ValueError(f"figure {figure!r}: expected finite numbers >= 0 to compare, got {number!r}")
    if not all(denominators):
        raise ValueError(f"figure {figure!r}: expected numbers > 0 to compare with, got {denominators!r}")
    ratios = np.divide(numerators, denominators)
    low, high = np.percentile(ratios, _SPREAD_PERCENTILES)
    return Figure(
        figure=figure,
        value=float(np.median(ratios)),
        target=target,
        goal=goal,
        spread=(float(low), float(high)),
        how=how,
        beside=beside or {},
    )


def quantile_figure(
    figure: str,
    latencies: Sequence[np.ndarray],
    yardsticks: Sequence[np.ndarray],
    *,
    quantile: float = 0.99,
    target: float,
    goal: Goal,
    how: str,
    beside: Mapping[str, str] | None = None,
) -> Figure:
    """A quantile of latencies over the same quantile of what they are held against.

    The value is of the requests of all runs together: the 99th percentile of a few dozen is the longest one.
    The spread is from the lowest to the highest of the runs' own ratios and of that; `beside` says how many
    requests there were.

    Args:
      figure: id.
      latencies: of each run, at least one of one request, in units that make runs alike.
      yardsticks: of each run, in the same units.
      quantile: in [0, 1].
      target, goal, how, beside: see `Figure`.

    Raises:
      ValueError: if a run has no requests or no yardstick, or there is no run.
    """
    if len(latencies) != len(yardsticks) or not latencies or not all(map(len, (*latencies, *yardsticks))):
        raise ValueError(
            f"figure {figure!r}: expected runs with latencies and yardsticks, got "
            f"{list(map(len, latencies))} and {list(map(len, yardsticks))}"
        )
    runs = [
        float(np.quantile(measured, quantile) / np.quantile(yardstick, quantile))
        for measured, yardstick in zip(latencies, yardsticks, strict=True)
    ]
    pooled = np.quantile(np.concatenate(latencies), quantile)
    value = float(pooled / np.quantile(np.concatenate(yardsticks), quantile))
    counts = list(map(len, latencies))
    return Figure(
        figure=figure,
        value=value,
        target=target,
        goal=goal,
        spread=(min(*runs, value), max(*runs, value)),
        how=f"{how}; of the requests of all runs together (spread: of each run)",
        beside={"requests, all and of each run": f"{sum(counts)}: {', '.join(map(str, counts))}"}
        | dict(beside or {}),
    )


def environment() -> str:
    """Versions and machine, in words: part of every figure's `how`."""
    jax = importlib.metadata.version("jax")
    return (
        f"{platform.python_implementation()} {platform.python_version()}, jax {jax}, "
        f"{_cpu_model()}, {os.cpu_count()} cores"
    )


def command() -> str:
    """What was typed, as far as this process can tell: part of every figure's `how`."""
    return shlex.join(["python", *sys.argv])


def run_tool(script: str, *words: object) -> Any:
    """Runs a script of this folder as a process of its own and returns the JSON of its last line.

    So no benchmark's memory, threads or JAX settings weigh on the next one's.

    Args:
      script: its file name, or the path of one elsewhere.
      words: its arguments.

    Raises:
      RuntimeError: if it fails; what it had to say went to stderr.
    """
    line = [sys.executable, str(Path(__file__).parent / script), *map(str, words)]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(line)} ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def report(figures: Sequence[Figure], out: Path | None, *, console: Console | None = None) -> None:
    """Prints the table and writes the JSON list, whole or not at all.

    Args:
      figures: of one benchmark, ids distinct.
      out: the JSON file, its folder made if need be; None to print alone.
      console: where to print; standard output by default.

    Raises:
      ValueError: if two figures have the same id.
    """
    names = [figure.figure for figure in figures]
    if len(set(names)) != len(names):
        raise ValueError(f"expected figures with distinct ids, got {names}")
    console = console or Console()
    console.print(_table(figures))
    for figure in figures:
        for name, text in figure.beside.items():
            line = f"{figure.figure}: {name}: {text}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if out is not None:
        _write_whole(out, json.dumps([figure.to_dict() for figure in figures], indent=1) + "\n")
        console.print(f"written to {out}", highlight=False, markup=False, soft_wrap=True)


def _table(figures: Sequence[Figure]) -> Table:
    table = Table()
    table.add_column("figure")
    for name in ("value", "target", "met", "spread"):
        table.add_column(name, justify="right")
    for figure in figures:
        low, high = (_rounded(end) for end in figure.spread)
        table.add_row(
            figure.figure,
            str(_rounded(figure.value)),
            f"{figure.target:g} {figure.goal.value}",
            "[green]yes[/green]" if figure.is_met else "[red]no[/red]",
            f"{low} to {high}",
        )
    return table


def _write_whole(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as beside:
        beside.write(text)
    os.chmod(beside.name, 0o644)  # a temporary file is its owner's alone
    os.replace(beside.name, path)


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def _named(spread: tuple[float, float]) -> list[tuple[str, float]]:
    return [("lower end of the spread", spread[0]), ("upper end of the spread", spread[1])]


def _rounded(number: float) -> float:
    return float(f"{number:.{_NUM_DIGITS}g}")
