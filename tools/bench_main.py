"""Figures of the main path: lookup, server and load, each against the obvious yardstick.

    python tools/bench_main.py --out bench/main.json      about five minutes on two idle cores
    python tools/bench_main.py --short                    about half a minute: smaller sizes, fewer repeats

Every yardstick is measured in the same run, in turns with what it is held against. A machine that does other
work too is no place for final figures; the spread shows it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from figures import Figure, Goal, command, environment, ratio_figure, report, run_tool
from rich.console import Console

CONFIG = Path(__file__).parent.parent / "configs" / "dcn_v2.toml"
NUM_DEVICES = 2
OUTSTANDING = 3

MAX_LOAD = 0.5
"""Load average above which a run says that others' work is in its figures. It favours the server over the
bare executable, which has fewer threads to claim a share of the CPUs with: even values above 1 come out."""

console = Console()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much to measure."""

    note: str
    """Opens every figure's `how`."""

    lookup_rows: int
    """Rows a table."""

    lookup_seconds: float
    """Measuring, both sides together."""

    server_buckets: tuple[int, ...]
    """Row counts of the bundle that is served: two requests of 500 candidates never share a batch, so that
    server and executable run the same program."""

    num_golden: int
    """Requests that prove each bucket, when it is built and at every load."""

    server_turns: int
    """Of server and executable each."""

    server_seconds: float
    """Of a turn."""

    load_buckets: tuple[int, ...] | None
    """Row counts of the bundle that is loaded; None for the default ladder."""

    load_rounds: int
    """Loads of each kind."""


FULL = Sizes(
    note="",
    lookup_rows=2_000_000,
    lookup_seconds=15,
    server_buckets=(128, 512),
    num_golden=64,
    server_turns=8,
    server_seconds=4,
    load_buckets=None,
    load_rounds=5,
)

SHORT = Sizes(
    note="short form, smaller sizes and fewer repeats than the target is meant for; ",
    lookup_rows=250_000,
    lookup_seconds=1.5,
    server_buckets=(512,),
    num_golden=4,
    server_turns=2,
    server_seconds=1,
    load_buckets=(512,),
    load_rounds=1,
)


def lookup_vs_xla(sizes: Sizes) -> Figure:
    """Native pooled lookup against XLA gather + sum."""
    samples = run_tool("bench_lookup.py", "--rows", sizes.lookup_rows, "--seconds", sizes.lookup_seconds)
    ours, xla = samples["ours_ms"], samples["xla_ms"]
    return ratio_figure(
        "lookup_vs_xla",
        xla,
        ours,
        target=5,
        goal=Goal.AT_LEAST,
        how=_how(sizes, f"{samples['how']}; {len(ours)} calls of each in turns; XLA's time over ours"),
        beside={"medians": f"native {statistics.median(ours):.2f} ms, XLA {statistics.median(xla):.2f} ms"},
    )


def server_vs_executable(sizes: Sizes, built: dict[str, Any]) -> Figure:
    """The server in closed loop against the bare compiled executable.

    Args:
      sizes: how long.
      built: of `random_bundle.py`, alone in its repository.
    """
    words = ["--turns", sizes.server_turns, "--seconds", sizes.server_seconds, "--outstanding", OUTSTANDING]
    result = run_tool("bench_server.py", built["path"], *words)
    candidates, rows = result["num_candidates"], result["bucket_rows"]
    server, executable = (statistics.median(result[name]) for name in ("server", "executable"))
    figure = ratio_figure(
        "server_vs_executable",
        result["server"],
        result["executable"],
        target=0.8,
        goal=Goal.AT_LEAST,
        how=_how(
            sizes,
            f"{_model(built)}; {result['how']}; {sizes.server_turns} turns of {sizes.server_seconds:g} s "
            f"each; {candidates} rows are counted a call on both sides, padding on neither (counting all "
            f"{rows} rows of the executable's bucket would multiply the value by {candidates / rows:.3f})",
        ),
    )
    beside = {
        f"against all {rows} rows of the bucket": f"{figure.value * candidates / rows:.3f}",
        "rows/s, median": f"server {candidates * server:,.0f}, executable {candidates * executable:,.0f}",
        "a batch in the server, mean": f"gather {result['gather_ms']:.2f} ms, "
        f"execute {result['execute_ms']:.2f} ms; bare executable {1e3 / executable:.2f} ms",
    }
    return dataclasses.replace(figure, beside=beside)


def warm_load(sizes: Sizes, built: dict[str, Any]) -> Figure:
    """Bundle to ready with a warm compilation cache against an empty one.

    Args:
      sizes: how often.
      built: of `random_bundle.py`.
    """
    words = ["--devices", NUM_DEVICES, "--rounds", sizes.load_rounds]
    result = run_tool("bench_load.py", built["path"], *words)
    loads: dict[str, list[dict[str, float]]] = result["loads"]
    ready = {kind: [load["ready"] for load in loads[kind]] for kind in loads}
    seeded = ratio_figure(
        "seeded_load", ready["seeded"], ready["cold"], target=0.3, goal=Goal.AT_MOST, how="shown beside"
    )
    beside = {"with an empty cache, filled from the bundle": f"{seeded.value:.3f}"}
    for kind, steps in loads.items():
        medians = {step: statistics.median(load[step] for load in steps) for step in steps[0]}
        beside[f"{kind}, median s"] = ", ".join(f"{step} {value:.2f}" for step, value in medians.items())
    return ratio_figure(
        "warm_load",
        ready["warm"],
        ready["cold"],
        target=0.3,
        goal=Goal.AT_MOST,
        how=_how(
            sizes,
            f"{_model(built)}, {built['num_buckets']} buckets, {NUM_DEVICES} devices; {result['how']}; "
            f"{sizes.load_rounds} loads of each kind in turns",
        ),
        beside=beside,
    )


def _build(folder: Path, sizes: Sizes, bucket_rows: tuple[int, ...] | None) -> dict[str, Any]:
    words = ["--devices", NUM_DEVICES, "--golden", sizes.num_golden]
    words += ["--buckets", ",".join(map(str, bucket_rows))] if bucket_rows else []
    return run_tool("random_bundle.py", CONFIG, "--out", folder, *words)


def _model(built: dict[str, Any]) -> str:
    return f"configs/{CONFIG.name} with random weights, {built['flops_per_row'] / 1e6:.1f} MFLOP a row"


def _how(sizes: Sizes, text: str) -> str:
    return f"{sizes.note}{command()}: {text}; {environment()}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--short", action="store_true", help="smaller sizes, fewer repeats")
    args = parser.parse_args()
    sizes = SHORT if args.short else FULL
    load = os.getloadavg()[0]
    sizes = dataclasses.replace(sizes, note=f"{sizes.note}load average {load:.1f} before the run; ")
    if load > MAX_LOAD:
        console.print(f"The machine is busy (load average {load:.1f}): these figures are not final.")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, console.status("") as status:
        status.update("lookup_vs_xla")
        figures = [lookup_vs_xla(sizes)]
        status.update("building a bundle to serve")
        served = _build(Path(folder) / "served", sizes, sizes.server_buckets)
        status.update("server_vs_executable")
        figures.append(server_vs_executable(sizes, served))
        loaded = served
        if sizes.load_buckets != sizes.server_buckets:
            status.update("building a bundle to load")
            loaded = _build(Path(folder) / "loaded", sizes, sizes.load_buckets)
        status.update("warm_load")
        figures.append(warm_load(sizes, loaded))
    report(figures, args.out, console=console)


if __name__ == "__main__":
    main()
