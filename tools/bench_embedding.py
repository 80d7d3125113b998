"""Figures of the embedding engine: pooled lookups against torch, fbgemm and what the memory allows.

    python tools/bench_embedding.py --out bench/embedding.json    about ten minutes on two idle cores, 10 GB
    python tools/bench_embedding.py --short                       15 seconds: small tables, ours alone

Each figure's value is of uniformly random ids on the first shape of tables, far above the caches; every other
cell, by shape, pooling and hotness, stands below the table and in the plot beside the JSON file. Figures
against a library that isn't installed are left out and named.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import statistics
from pathlib import Path
from typing import Any

import bench_features
import bench_updates
from embedding_lookups import NUM_BAGS, NUM_THREADS, SHAPES, available
from embedding_plot import draw
from figures import Figure, Goal, command, environment, ratio_figure, report, run_tool
from rich.console import Console

from xlarank.host.traces import Hotness

MAX_LOAD = 0.5
"""Load average above which a run says that others' work is in its figures."""

console = Console()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One figure: how many times the time of `fast` another lookup takes."""

    figure: str
    """Its id."""

    slow: str
    """Lookup of `embedding_lookups.LOOKUPS` whose time is the numerator."""

    fast: str
    """The denominator."""

    pooling: int
    """P."""

    target: float
    """Or more."""


COMPARISONS = (
    Comparison(figure="vs_torch_pool1", slow="torch", fast="ours", pooling=1, target=1),
    Comparison(figure="vs_torch_pool20", slow="torch", fast="ours", pooling=20, target=1.5),
    Comparison(figure="vs_torch_pool150", slow="torch", fast="ours", pooling=150, target=1.5),
    Comparison(figure="vs_fbgemm_f32", slow="fbgemm", fast="ours", pooling=20, target=1.5),
    Comparison(figure="vs_fbgemm_int8", slow="fbgemm_int8", fast="ours_int8", pooling=20, target=1.2),
    Comparison(figure="prefetch_hugepages", slow="ours_neither", fast="ours", pooling=20, target=1.5),
    Comparison(figure="share_of_ceiling", slow="ceiling", fast="ours", pooling=20, target=0.8),
    Comparison(figure="int8_vs_f32", slow="ours", fast="ours_int8", pooling=20, target=1.8),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Lookups that take turns in a process of their own, so that their tables fit into memory together."""

    lookups: tuple[str, ...]
    """Of `embedding_lookups.LOOKUPS`; those that aren't installed are left out."""

    poolings: tuple[int, ...] = (1, 20, 150)
    """P."""

    presets: tuple[Hotness, ...] = tuple(Hotness)
    """Of the ids."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much to measure."""

    note: str
    """Opens every figure's `how`."""

    shapes: tuple[str, ...]
    """Of `embedding_lookups.SHAPES`; the first gives the figures."""

    runs: tuple[Run, ...]
    """Each on every shape."""

    seconds: float
    """A cell."""


_RANDOM = (Hotness.RANDOM,)

FULL = Sizes(
    note="",
    shapes=("8x2Mx64", "12x500Kx128"),
    runs=(
        Run(lookups=("ours", "ceiling", "torch", "torch_huge_pages")),
        Run(lookups=("ours", "fbgemm"), poolings=(20,)),
        Run(lookups=("ours_int8", "ceiling_int8", "fbgemm_int8", "ours"), poolings=(20,)),
        Run(lookups=("ours", "ours_neither"), poolings=(20,)),
    ),
    seconds=4,
)

SHORT = Sizes(
    note="short form, smaller tables and fewer turns than the target is meant for; ",
    shapes=("8x250Kx64",),
    runs=(Run(lookups=("ours", "ours_int8", "ours_neither", "ceiling"), poolings=(20,), presets=_RANDOM),),
    seconds=1.5,
)


def measure(sizes: Sizes) -> list[dict[str, Any]]:
    """Every cell: as `bench_embedding_turns.py` prints them, and the name of the ``shape``."""
    cells = []
    with console.status("") as status:
        for shape in sizes.shapes:
            for run in sizes.runs:
                names = [name for name in run.lookups if available(name)]
                if len(names) < 2:
                    continue
                status.update(f"{shape}: {', '.join(names)}")
                words = [shape, *names, "--seconds", sizes.seconds]
                words += ["--poolings", ",".join(map(str, run.poolings))]
                words += ["--hotness", ",".join(preset.value for preset in run.presets)]
                found = run_tool("bench_embedding_turns.py", *words)
                cells += [{"shape": shape, **cell} for cell in found]
    return cells


def figure_of(comparison: Comparison, cells: list[dict[str, Any]], note: str) -> Figure | None:
    """The figure of a comparison; None if its lookups weren't measured.

    Args:
      comparison: what over what.
      cells: of all runs; the first of random ids with its pooling gives the value.
      note: opens `how`.
    """
    both = [cell for cell in cells if {comparison.slow, comparison.fast} <= cell["ms"].keys()]
    both = [cell for cell in both if cell["pooling"] == comparison.pooling]
    chosen = next((cell for cell in both if cell["hotness"] == Hotness.RANDOM.value), None)
    if chosen is None:
        return None
    shape = SHAPES[chosen["shape"]]
    slow, fast = chosen["ms"][comparison.slow], chosen["ms"][comparison.fast]
    return ratio_figure(
        comparison.figure,
        slow,
        fast,
        target=comparison.target,
        goal=Goal.AT_LEAST,
        how=(
            f"{note}{command()}: time of {comparison.slow} over that of {comparison.fast} (tools/"
            f"embedding_lookups.py says what each is), {shape.num_tables} tables x {shape.num_rows} x "
            f"{shape.dim}, batch {NUM_BAGS}, {comparison.pooling} ids a bag, sum, random ids, "
            f"{NUM_THREADS} threads each; "
            f"{len(slow)} bursts of each in turns; {environment()}{_versions()}"
        ),
        beside={_name(cell): _beside(cell, comparison) for cell in both},
    )


def _name(cell: dict[str, Any]) -> str:
    return f"{cell['shape']}, {cell['pooling']} ids a bag, {cell['hotness']}"


def _beside(cell: dict[str, Any], comparison: Comparison) -> str:
    """The ratio, and what each lookup of the cell takes and reaches."""
    pairs = zip(cell["ms"][comparison.slow], cell["ms"][comparison.fast], strict=True)
    ratio = statistics.median(slow / fast for slow, fast in pairs)
    medians = {name: statistics.median(samples) for name, samples in cell["ms"].items()}
    rates = {name: cell["num_rows"] / ms / 1e3 for name, ms in medians.items()}
    shown = ", ".join(f"{name} {ms:.3f} ms ({rates[name]:.1f} M rows/s)" for name, ms in medians.items())
    shares = [
        f"{ours} at {medians[top] / medians[ours]:.2f} of {top}"
        for ours, top in (("ours", "ceiling"), ("ours_int8", "ceiling_int8"))
        if {ours, top} <= medians.keys()
    ]
    return f"{ratio:.2f}: {'; '.join([shown, *shares])}"


def _versions() -> str:
    names = [name for name in ("torch", "fbgemm-gpu-cpu") if available(name.partition("-")[0])]
    return "".join(f", {name} {importlib.metadata.version(name)}" for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write; the plot goes beside it, as .png")
    parser.add_argument("--short", action="store_true", help="small tables, ours alone")
    args = parser.parse_args()
    sizes = SHORT if args.short else FULL
    load = os.getloadavg()[0]
    note = f"{sizes.note}load average {load:.1f} before the run; "
    if load > MAX_LOAD:
        console.print(f"The machine is busy (load average {load:.1f}): these figures are not final.")
    cells = measure(sizes)
    found = {c.figure: figure_of(c, cells, note) for c in COMPARISONS}
    missing = [name for name, figure in found.items() if figure is None]
    if missing:
        console.print(f"not measured: {', '.join(missing)}")
    figures = [figure for figure in found.values() if figure is not None]
    figures.append(bench_updates.update_p99(bench_updates.SHORT if args.short else bench_updates.FULL))
    if not args.short:
        figures.append(bench_features.ids_only(run_tool("bench_features.py")))
    report(figures, args.out, console=console)
    if args.out is not None:
        plot = args.out.with_suffix(".png")
        draw(cells, plot)
        console.print(f"plot in {plot}", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
