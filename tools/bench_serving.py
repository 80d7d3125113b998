"""Figures of serving: batching, latency, overload, rules compared, CPU of a request.

    python tools/bench_serving.py --out bench/serving.json    a quarter of an hour on two idle cores
    python tools/bench_serving.py --short                     less than a minute: few figures, short runs

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
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from figures import Figure, Goal, command, environment, ratio_figure, report, run_tool
from rich.console import Console
from serving_lab import Lab, Served, build, demo_model
from serving_latency import MD1_LOADS, SIMULATED_LOADS, Point, measure_points, p99_over_md1, simulator_error
from serving_overload import batching_gain, overload_figures, overload_of
from serving_plot import draw
from serving_rules import RULES, Curves, affinity, serve_rules, simulate_rules, vs_fixed_delay
from serving_swaps import measure_swaps, swap_p99

__all__ = ["FULL", "GROUPS", "SHORT", "Sizes", "groups_of"]

GROUPS = {
    "heavy_efficiency": ("heavy_efficiency",),
    "light_efficiency": ("light_efficiency",),
    "batching": ("batching_gain",),
    "latency": ("p99_over_md1", "simulator_error"),
    "rules": ("vs_fixed_delay",),
    "overload": ("overload_goodput", "overload_p99"),
    "overload_light": ("overload_goodput_light", "overload_p99_light"),
    "swaps": ("swap_p99",),
    "affinity": ("affinity_throughput", "affinity_p99"),
    "request_cpu": ("request_cpu_us",),
}
"""What is measured together: the figures of each group."""

NETWORKS = {
    "bare": '{"hidden": [8], "num_cross_layers": 1, "cross_rank": 2}',
    "light_b": '{"hidden": [264, 128]}',
    "light_c": '{"hidden": [272, 128]}',
}
"""In place of the light model's: hardly any, to see all else; other programs."""

OTHER_PROGRAMS = ("light_b", "light_c")

SWAP_LADDER = (64, 512)
"""Of models that are swapped."""

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

    groups: tuple[str, ...]
    """Of `GROUPS`, where --only names none."""

    has_heavy: bool
    """Whether the heavy model is compiled; else the light one stands in for it."""

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

    num_programs: int
    """Other programs to swap to, at most as many as `OTHER_PROGRAMS`."""

    num_warm: int
    """Servers that swap with a warm compile cache alone."""

    num_cold: int
    """Servers that swap with a cold one first."""


FULL = Sizes(
    note="",
    ladder=(8, 16, 64, 128, 256, 512),
    alone=(512,),
    groups=tuple(GROUPS),
    has_heavy=True,
    runs=3,
    heavy_seconds=10,
    light_seconds=4,
    turn_seconds=2,
    num_simulated=6000,
    is_plotted=True,
    cpu_requests=1500,
    num_programs=2,
    num_warm=1,
    num_cold=2,
)

SHORT = Sizes(
    note="short form, shorter and fewer runs than the target is meant for; ",
    ladder=(16, 512),
    alone=(16, 512),
    groups=("light_efficiency", "batching", "overload_light", "affinity"),
    has_heavy=False,
    runs=1,
    heavy_seconds=1.5,
    light_seconds=0.8,
    turn_seconds=0.6,
    num_simulated=400,
    is_plotted=False,
    cpu_requests=200,
    num_programs=1,
    num_warm=0,
    num_cold=1,
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

    def figures(self, group: str) -> list[Figure]:
        """One of `GROUPS`."""
        return getattr(self, f"_{group}")()

    def _heavy_efficiency(self) -> list[Figure]:
        return [self._efficiency("heavy", 0.9)]

    def _light_efficiency(self) -> list[Figure]:
        return [self._efficiency("light", 0.7)]

    def _efficiency(self, name: str, target: float) -> Figure:
        served = self._model(name, self._sizes.alone)
        self._tell(f"{name}_efficiency")
        words = ["--turns", 2 * self._sizes.runs, "--seconds", self._sizes.turn_seconds]
        result = run_tool("bench_server.py", served.bundle, *words)
        medians = {side: statistics.median(result[side]) for side in ("server", "executable")}
        return ratio_figure(
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

    def _batching(self) -> list[Figure]:
        heavy = self._model("heavy")
        self._tell("batching_gain")
        sizes = self._sizes
        gain = batching_gain(
            self._lab, heavy, turns=2 * sizes.runs, seconds=sizes.turn_seconds, how=self._how(heavy)
        )
        return [gain]

    def _latency(self) -> list[Figure]:
        sizes = self._sizes
        self._tell("the demo model")
        demo = demo_model(self._lab.folder)
        # Many short runs, as what else the machine does comes in spells of seconds.
        of_demo = self._points(demo, 3 * sizes.runs, sizes.light_seconds / 3, SIMULATED_LOADS)
        others = {
            name: self._points(self._model(name), sizes.runs, seconds, MD1_LOADS)
            for name, seconds in (("heavy", sizes.heavy_seconds), ("light", sizes.light_seconds))
        }
        text = "500 candidates a request, Poisson arrivals, one device"
        return [
            p99_over_md1(*others.values(), how=f"{self._how(self._model('heavy'))}; {text}"),
            simulator_error(of_demo, others, how=f"{self._how(demo)}; {text}"),
        ]

    def _points(self, served: Served, runs: int, seconds: float, loads: Sequence[float]) -> list[Point]:
        self._tell(f"latency of the {served.name} model")
        return measure_points(self._lab, served, runs=runs, seconds=seconds, loads=loads)

    def _rules(self) -> list[Figure]:
        sizes, light = self._sizes, self._model("light")
        self._tell("Triton's rule, served")
        rounds, turns, seconds = sizes.runs, 2 * len(RULES), sizes.light_seconds / 2
        served = serve_rules(self._lab, light, rounds=rounds, turns=turns, seconds=seconds)
        for name in ("heavy", "light") if sizes.has_heavy else ("light",):
            served_model = self._model(name)
            self._tell(f"Triton's rule, simulated with the {name} model")
            plan = self._lab.plan(served_model)
            self.curves.append(
                simulate_rules(served_model, plan, sizes.num_simulated, is_plotted=sizes.is_plotted)
            )
        return [vs_fixed_delay(self.curves, light, served, how=self._how())]

    def _overload(self) -> list[Figure]:
        return self._overload_of("heavy", "", 0.9, self._sizes.heavy_seconds)

    def _overload_light(self) -> list[Figure]:
        return self._overload_of("light", "_light", 0.75, self._sizes.light_seconds)

    def _overload_of(self, name: str, suffix: str, target: float, seconds: float) -> list[Figure]:
        served = self._model(name)
        self._tell(f"overload of the {name} model")
        runs = overload_of(self._lab, served, runs=2 * self._sizes.runs - 1, seconds=seconds)
        return overload_figures(suffix, runs, target=target, how=self._how(served))

    def _swaps(self) -> list[Figure]:
        sizes = self._sizes
        names = ("light", *OTHER_PROGRAMS)[: 1 + sizes.num_programs]
        builds = [self._model(name, SWAP_LADDER) for name in names]
        runs = measure_swaps(
            self._lab,
            builds,
            num_warm=sizes.num_warm,
            num_cold=sizes.num_cold,
            quiet_seconds=sizes.light_seconds / 2,
            tell=self._tell,
        )
        return [swap_p99(runs, how=self._how(builds[0]))]

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

        def less(echo: str) -> list[float]:
            turns = zip(result["server"], result["gather_execute"], result[echo], strict=True)
            return [server - inside - other for server, inside, other in turns]

        values = less("parse")
        kilobytes, num_tensors = result["bytes_a_request"] / 1e3, result["num_tensors"]
        text = (
            f"CPU of the server's process a request (500 candidates, {kilobytes:.0f} KB in {num_tensors} "
            f"tensors, closed loop of 2), less that of gather and execute (of the thread that calls them, "
            f"while it does, and of XLA's own threads), less that of a gRPC server with the same threads "
            f"that reads the same messages and answers as many scores; one CPU each, {len(values)} turns of "
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
                "less an echo's of the bytes, unparsed": f"{statistics.median(less('bytes')):.0f} us",
                "us, medians": ", ".join(
                    f"{name} {statistics.median(result[name]):.0f}"
                    for name in ("server", "gather_execute", "parse", "bytes")
                ),
            },
        )
        return [figure]

    def _model(self, name: str, ladder: Sequence[int] = ()) -> Served:
        """Compiled when it is first asked for."""
        ladder = ladder or self._sizes.ladder
        if name == "heavy" and not self._sizes.has_heavy:
            name = "light"
        key = "-".join(map(str, (name, *ladder)))
        if key not in self._served:
            self._tell(f"compiling the {name} model")
            config = f"ranker_{'heavy' if name == 'heavy' else 'light'}.toml"
            folder = self._lab.folder / "models"
            self._served[key] = build(key, folder, ladder, config=config, options=NETWORKS.get(name))
        return self._served[key]

    def _how(self, served: Served | None = None, text: str = "") -> str:
        words = [f"{self._sizes.note}{command()}: {environment()}"]
        if served is not None:
            words.append(f"model {served.words}, buckets {served.ladder}")
        return "; ".join([*words, text] if text else words)


_TEXT = "; ".join(f"{group} ({', '.join(figures)})" for group, figures in GROUPS.items())


def groups_of(text: str) -> list[str]:
    """The groups to measure for names of groups and figures with commas between, each once.

    Raises:
      argparse.ArgumentTypeError: for another name.
    """
    names = text.split(",")
    known = {name for group, figures in GROUPS.items() for name in (group, *figures)}
    if unknown := set(names) - known:
        raise argparse.ArgumentTypeError(f"expected groups or figures, got {sorted(unknown)}: {_TEXT}")
    return [group for group, figures in GROUPS.items() if {group, *figures} & set(names)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write; the plot goes beside it, as .png")
    parser.add_argument("--short", action="store_true", help="shorter and fewer runs")
    parser.add_argument("--only", type=groups_of, metavar="NAME,...", help=f"groups or figures: {_TEXT}")
    args = parser.parse_args()
    sizes = SHORT if args.short else FULL
    load = os.getloadavg()[0]
    if load > MAX_LOAD:
        console.print(f"The machine is busy (load average {load:.1f}): these figures are not final.")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, console.status("") as status:
        noted = dataclasses.replace(sizes, note=f"{sizes.note}load average {load:.1f} before the run; ")
        bench = Bench(Path(folder), noted, status.update)
        figures = []
        try:
            for group in args.only or sizes.groups:
                begin = time.monotonic()
                figures += bench.figures(group)
                console.print(f"{group}: {time.monotonic() - begin:.0f} s", highlight=False)
        finally:  # a failure doesn't lose what was measured before it
            report(figures, args.out, console=console)
    if args.out is not None and bench.curves:
        plot = args.out.with_suffix(".png")
        draw(bench.curves, plot)
        console.print(f"plot in {plot}", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
