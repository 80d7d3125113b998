"""Figures of serving: batching, latency, overload, rules compared, CPU of a request.

    python tools/bench_serving.py --out bench/serving.json    about ten minutes on two idle cores
    python tools/bench_serving.py --short                     less than a minute: shorter and fewer runs

Load comes from a process of its own: open loop, Poisson arrivals, latencies from the intended start. Every
yardstick is measured in the same run, in turns with what it is held against. Beside the JSON file goes a plot
of latency against load, ours and Triton's rule.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from figures import Figure, Goal, command, environment, ratio_figure, report, run_tool
from rich.console import Console
from serving_lab import Lab, Served, build
from serving_latency import measure_points, p99_over_md1, simulator_error
from serving_overload import batching_gain, overload_figures, overload_of
from serving_plot import draw
from serving_rules import Curves, affinity, serve_rules, simulate_rules, vs_fixed_delay

__all__ = ["FULL", "NAMES", "SHORT", "Sizes"]

NAMES = ("efficiency", "batching", "latency", "rules", "overload", "affinity", "request_cpu")
"""What --only takes."""

BARE_NETWORK = '{"hidden": [8], "num_cross_layers": 1, "cross_rank": 2}'
"""Of a model whose requests weigh as much as the others', and its network hardly anything."""

MAX_LOAD = 0.5
"""Load average above which a run says that others' work is in its figures."""

console = Console()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much to measure. Seconds are of one run or turn."""

    note: str
    """Opens every figure's `how`."""

    ladder: tuple[int, ...]
    """Row counts of the bundles."""

    alone: tuple[int, ...]
    """Of those served beside the bare executable, such that both run the same program."""

    heavy_options: str | None
    """Of the heavy model's network, JSON; its config's by default."""

    runs: int
    """Of everything that is repeated."""

    heavy_seconds: float
    light_seconds: float
    turn_seconds: float
    """Of closed loops in turns."""

    num_simulated: int
    """Requests of a simulation."""

    is_plotted: bool
    """Whether loads between those of the figure are simulated too."""

    cpu_requests: int
    """Of a turn of request_cpu_us."""


FULL = Sizes(
    note="",
    ladder=(8, 16, 64, 128, 256, 512),
    alone=(512,),
    heavy_options=None,
    runs=3,
    heavy_seconds=14,
    light_seconds=4,
    turn_seconds=3,
    num_simulated=6000,
    is_plotted=True,
    cpu_requests=1500,
)

SHORT = Sizes(
    note="short form, shorter and fewer runs than the target is meant for; ",
    ladder=(16, 512),
    alone=(16, 512),
    heavy_options='{"hidden": [512, 256]}',
    runs=1,
    heavy_seconds=1.5,
    light_seconds=0.8,
    turn_seconds=0.6,
    num_simulated=400,
    is_plotted=False,
    cpu_requests=200,
)


class Bench:
    """One run of the benchmark: what its figures share."""

    def __init__(self, folder: Path, sizes: Sizes, tell: Callable[[str], None]) -> None:
        """
        Args:
          folder: to work in.
          sizes: how much.
          tell: what is being done.
        """
        self._sizes = sizes
        self._tell = tell
        self._lab = Lab(folder)
        self._served: dict[str, Served] = {}
        self.curves: list[Curves] = []

    def figures(self, name: str) -> list[Figure]:
        """One of `NAMES`."""
        return getattr(self, f"_{name}")()

    def _efficiency(self) -> list[Figure]:
        figures = []
        for name, target in (("heavy", 0.9), ("light", 0.7)):
            served = self._model(name, self._sizes.alone)
            self._tell(f"{name}_efficiency")
            words = ["--turns", 2 * self._sizes.runs, "--seconds", self._sizes.turn_seconds]
            result = run_tool("bench_server.py", served.bundle, *words)
            medians = {name: statistics.median(result[name]) for name in ("server", "executable")}
            figure = ratio_figure(
                f"{name}_efficiency",
                result["server"],
                result["executable"],
                target=target,
                goal=Goal.AT_LEAST,
                how=self._how(
                    served, f"{result['how']}; candidates are counted on both sides, padding on neither"
                ),
                beside={
                    "rows/s, median": ", ".join(
                        f"{side} {result['num_candidates'] * rate:,.0f}" for side, rate in medians.items()
                    ),
                    "a batch in the server, mean": f"gather {result['gather_ms']:.2f} ms, execute "
                    f"{result['execute_ms']:.2f} ms; bare executable {1e3 / medians['executable']:.2f} ms",
                },
            )
            figures.append(figure)
        return figures

    def _batching(self) -> list[Figure]:
        heavy = self._model("heavy")
        self._tell("batching_gain")
        sizes = self._sizes
        gain = batching_gain(
            self._lab, heavy, turns=2 * sizes.runs, seconds=sizes.turn_seconds, how=self._how(heavy)
        )
        return [gain]

    def _latency(self) -> list[Figure]:
        points = []
        for name, seconds in (("heavy", self._sizes.heavy_seconds), ("light", self._sizes.light_seconds)):
            served = self._model(name)
            self._tell(f"latency of the {name} model")
            points.append(measure_points(self._lab, served, runs=self._sizes.runs, seconds=seconds))
        how = f"{self._how(self._model('heavy'))}; 500 candidates a request, Poisson arrivals, one device"
        return [p99_over_md1(*points, how=how), simulator_error(*points, how=how)]

    def _rules(self) -> list[Figure]:
        sizes, light = self._sizes, self._model("light")
        self._tell("Triton's rule, served")
        served = serve_rules(self._lab, light, runs=sizes.runs, seconds=sizes.light_seconds)
        for name in ("heavy", "light"):
            served_model = self._model(name)
            self._tell(f"Triton's rule, simulated with the {name} model")
            plan = self._lab.plan(served_model)
            self.curves.append(
                simulate_rules(served_model, plan, sizes.num_simulated, is_plotted=sizes.is_plotted)
            )
        return [vs_fixed_delay(self.curves, light, served, how=self._how())]

    def _overload(self) -> list[Figure]:
        figures = []
        for name, suffix, target, seconds in (
            ("heavy", "", 0.9, self._sizes.heavy_seconds),
            ("light", "_light", 0.75, self._sizes.light_seconds),
        ):
            served = self._model(name)
            self._tell(f"overload of the {name} model")
            runs = overload_of(self._lab, served, runs=self._sizes.runs, seconds=seconds)
            figures += overload_figures(suffix, runs, target=target, how=self._how(served))
        return figures

    def _affinity(self) -> list[Figure]:
        served = [self._model(name) for name in ("heavy", "light")]
        self._tell("affinity and spread")
        models = [(model, self._lab.plan(model)) for model in served]
        return affinity(models, self._sizes.num_simulated // 2, how=self._how())

    def _request_cpu(self) -> list[Figure]:
        served = self._model("bare", self._sizes.alone)
        self._tell("request_cpu_us")
        words = ["--turns", 2 * self._sizes.runs + 1, "--requests", self._sizes.cpu_requests]
        result = run_tool("request_cpu.py", served.bundle, *words)
        turns = list(zip(result["server"], result["executable"], result["parse"], strict=True))
        values = [server - executable - echo for server, executable, echo in turns]
        kilobytes, num_tensors = result["bytes_a_request"] / 1e3, result["num_tensors"]
        text = (
            f"CPU of the server's process a request (500 candidates, {kilobytes:.0f} KB in {num_tensors} "
            f"tensors, closed loop of 2), less that of gather and execute back to back in a process of their "
            f"own, less that of a gRPC server with the same threads that reads the same messages and answers "
            f"as many scores; each on one CPU, {len(turns)} turns of "
            f"{self._sizes.cpu_requests} requests or more (spread: lowest and highest turn)"
        )
        figure = Figure(
            figure="request_cpu_us",
            value=statistics.median(values),
            target=250,
            goal=Goal.AT_MOST,
            spread=(min(values), max(values)),
            how=self._how(served, text),
            beside={
                "us, medians": ", ".join(
                    f"{name} {statistics.median(result[name]):.0f}"
                    for name in ("server", "executable", "parse", "bytes")
                )
            },
        )
        return [figure]

    def _model(self, name: str, ladder: Sequence[int] = ()) -> Served:
        """Compiled when it is first asked for."""
        ladder = ladder or self._sizes.ladder
        options = {"heavy": self._sizes.heavy_options, "light": None, "bare": BARE_NETWORK}[name]
        key = "-".join(map(str, (name, *ladder)))
        if key not in self._served:
            self._tell(f"compiling the {name} model")
            config = f"ranker_{'light' if name == 'bare' else name}.toml"
            folder = self._lab.folder / "models"
            self._served[key] = build(key, folder, ladder, config=config, options=options)
        return self._served[key]

    def _how(self, served: Served | None = None, text: str = "") -> str:
        words = [f"{self._sizes.note}{command()}: {environment()}"]
        if served is not None:
            words.append(f"model {served.words}, buckets {served.ladder}")
        return "; ".join([*words, text] if text else words)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write; the plot goes beside it, as .png")
    parser.add_argument("--short", action="store_true", help="shorter and fewer runs")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="some of it (all)")
    args = parser.parse_args()
    sizes = SHORT if args.short else FULL
    load = os.getloadavg()[0]
    if load > MAX_LOAD:
        console.print(f"The machine is busy (load average {load:.1f}): these figures are not final.")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, console.status("") as status:
        noted = dataclasses.replace(sizes, note=f"{sizes.note}load average {load:.1f} before the run; ")
        bench = Bench(Path(folder), noted, status.update)
        figures = [figure for name in args.only for figure in bench.figures(name)]
        curves = bench.curves
    report(figures, args.out, console=console)
    if args.out is not None and curves:
        plot = args.out.with_suffix(".png")
        draw(curves, plot)
        console.print(f"plot in {plot}", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
