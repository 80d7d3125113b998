"""Figures of the optimizing compiler: what each pass buys, what tuning misses, what a refresh costs.

    python tools/bench_compiler.py --out bench/compiler.json    about ten minutes on two idle cores
    python tools/bench_compiler.py --short                      about a minute: fewer sizes and rounds

Forms are timed in turns in one process; a figure is the median of ratios of neighbours in time.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from figures import Figure, Goal, command, environment, ratio_figure, report, run_tool
from rich.console import Console

ROOT = Path(__file__).parent.parent
MAX_LOAD = 0.5
"""Load average above which a run says that others' work is in its figures."""

console = Console()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much to measure."""

    note: str
    """Opens every figure's `how`."""

    rounds: int
    """Runs of each form."""

    tune_seconds: float
    """To find the form of a bucket, at most; the search ends long before 600."""

    num_golden: int
    """Requests that prove each form."""

    regret_rows: tuple[int, ...]
    """Row counts of `moe_regret`."""

    dlrm_rows: tuple[int, ...]
    """Row counts of the ladder of `dlrm_worst`."""

    refreshes: int
    """Pairs of a first compile and a refresh; 0 leaves the figure out, and int8_512, which takes as long."""


FULL = Sizes(
    note="",
    rounds=31,
    tune_seconds=600,
    num_golden=64,
    regret_rows=(1, 8, 64, 512, 1024),
    dlrm_rows=(8, 32, 128, 512, 1024),
    refreshes=3,
)

SHORT = Sizes(
    note="short form, fewer sizes and rounds than the target is meant for; ",
    rounds=5,
    tune_seconds=5,
    num_golden=8,
    regret_rows=(512,),  # of a bucket that the others time too
    dlrm_rows=(8,),
    refreshes=0,
)


HOIST_BUCKETS = ("512x1", "512x16")


def mmoe_forms(sizes: Sizes) -> dict[str, Any]:
    """Forms of the MMoE in float32, by bucket: for `hoist` and `moe_regret`, in one process."""
    buckets = dict.fromkeys([*HOIST_BUCKETS, *(f"{rows}x1" for rows in sizes.regret_rows)])
    return _forms(sizes, "mmoe", *buckets, "--rounds", sizes.rounds)


def hoist(sizes: Sizes, forms: dict[str, Any], figure: str, bucket: str, target: float) -> Figure:
    """The chosen form in float32 against the fastest that doesn't hoist.

    Args:
      sizes: how much was measured.
      forms: of `mmoe_forms`.
      figure: its id.
      bucket: of `HOIST_BUCKETS`.
      target: or more.
    """
    found = forms[bucket]
    seconds = found["seconds"]
    unhoisted = [label for label, hoisted in found["hoisted"].items() if not hoisted]
    fastest = min(unhoisted, key=lambda label: statistics.median(seconds[label]))
    return ratio_figure(
        figure,
        seconds[fastest],
        seconds[found["chosen"]],
        target=target,
        goal=Goal.AT_LEAST,
        how=_how(
            sizes,
            f"MMoE of 8 experts 512-256, 3 tasks, width 1024 of which 635 are the context's, bucket "
            f"{bucket}, float32: time of the fastest form without hoisting ({fastest}) over that of the "
            f"chosen one ({found['chosen']}), {sizes.rounds} runs in turns",
        ),
        beside={"median ms": _medians(seconds)},
    )


def dlrm_worst(sizes: Sizes) -> Figure:
    """The chosen form against the plain one in the bucket where it does worst."""
    rows = ",".join(map(str, sizes.dlrm_rows))
    words = ["dlrm", "--ladder", rows, "--rounds", 2 * sizes.rounds, "--plain-only"]
    found = _forms(sizes, *words)
    figures = {}
    for bucket, result in found.items():
        seconds = result["seconds"]
        figures[bucket] = ratio_figure(
            "dlrm_worst",
            seconds["plain"],
            seconds[result["chosen"]],
            target=0.97,
            goal=Goal.AT_LEAST,
            how=_how(
                sizes,
                f"MLPerf DLRM-DCNv2 with tables of dim 16, buckets of {rows} rows and 1, B/32 and B "
                f"requests: speed of the chosen form against the plain one in the worst bucket, {bucket} "
                f"({result['chosen']}), {2 * sizes.rounds} runs in turns",
            ),
        )
    worst = min(figures.values(), key=lambda figure: figure.value)
    beside = {bucket: f"{figures[bucket].value:.3f} ({found[bucket]['chosen']})" for bucket in found}
    return dataclasses.replace(worst, beside=beside)


def moe_regret(sizes: Sizes, found: dict[str, Any]) -> Figure:
    """The chosen form against the best of all, in the row count where it does worst.

    Args:
      sizes: how much was measured.
      found: of `mmoe_forms`.
    """
    buckets = [f"{rows}x1" for rows in sizes.regret_rows]
    figures, beside = [], {}
    for bucket in buckets:
        seconds, chosen = found[bucket]["seconds"], found[bucket]["chosen"]
        best = min(seconds, key=lambda label: statistics.median(seconds[label]))
        figures.append(
            ratio_figure(
                "moe_regret",
                seconds[chosen],
                seconds[best],
                target=1.1,
                goal=Goal.AT_MOST,
                how=_how(
                    sizes,
                    f"the same MMoE in float32, one request of {', '.join(map(str, sizes.regret_rows))} "
                    f"rows: time of the chosen form over the fastest of all {len(seconds)} forms measured in "
                    f"turns ({sizes.rounds} runs), in the worst bucket, {bucket}: {chosen} over {best}",
                ),
            )
        )
        beside[bucket] = f"{figures[-1].value:.3f}: chose {chosen}, best {best}; ms: {_medians(seconds)}"
    return dataclasses.replace(max(figures, key=lambda figure: figure.value), beside=beside)


def int8_512(sizes: Sizes, movielens: Path | None) -> Figure:
    """Lower precisions within 0.01 of score error against the form chosen in float32."""
    words = ["mmoe", "512x1", "--rounds", sizes.rounds, "--max-score-error", "0.01"]
    found = _forms(sizes, *words)["512x1"]
    seconds = found["seconds"]
    wide = [label for label, precision in found["precision"].items() if precision == "float32"]
    fastest = min(wide, key=lambda label: statistics.median(seconds[label]))
    beside = {
        "p99 error of the chosen form": _texts(found["p99_error"]),
        "largest error": _texts(found["max_error"]),
        "AUC loss, labels drawn from the reference scores": _texts(found["auc_loss"]),
        "median ms": _medians(seconds),
    }
    if movielens is not None:
        beside |= _movielens(movielens)
    return ratio_figure(
        "int8_512",
        seconds[fastest],
        seconds[found["chosen"]],
        target=1.8,
        goal=Goal.AT_LEAST,
        how=_how(
            sizes,
            f"the same MMoE, bucket 512x1, --precision auto --max-score-error 0.01: time of the fastest "
            f"float32 form ({fastest}) over that of the chosen one ({found['chosen']}), {sizes.rounds} runs "
            f"in turns",
        ),
        beside=beside,
    )


def attention_512x100(sizes: Sizes) -> Figure:
    """Target attention over one request's history, without its batch axis."""
    found = _forms(sizes, "attention", "512x1", "--rounds", sizes.rounds)["512x1"]
    seconds = found["seconds"]
    return ratio_figure(
        "attention_512x100",
        seconds["plain"],
        seconds["hoisted"],
        target=3,
        goal=Goal.AT_LEAST,
        how=_how(
            sizes,
            f"target attention of 512 candidates over one context history of 100 x 64: time of the plain "
            f"form over the hoisted one, {sizes.rounds} runs in turns",
        ),
        beside={"median ms": _medians(seconds)},
    )


def refresh(sizes: Sizes) -> Figure:
    """A checkpoint of an architecture compiled before, against its first compile without tuning."""
    firsts, seconds = [], []
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        _run(sys.executable, "-c", _WRITE_FEED, folder / "data")
        config, checkpoint = ROOT / "configs" / "feed.toml", folder / "checkpoint"
        _xlarank(folder, "train", config, "--data", folder / "data", "--out", checkpoint)
        for number in range(sizes.refreshes):
            place = folder / f"round-{number}"  # its own repository and compilation cache: a first compile
            words = ["compile", config, "--checkpoint", checkpoint, "--out", place / "models"]
            words += ["--devices", 2, "--tune-seconds", 0]
            firsts.append(_xlarank(place, *words))
            seconds.append(_xlarank(place, *words))
    return ratio_figure(
        "refresh",
        seconds,
        firsts,
        target=0.5,
        goal=Goal.AT_MOST,
        how=_how(
            sizes,
            f"`xlarank compile configs/feed.toml --devices 2 --tune-seconds 0` as a process, again over the "
            f"first time in an empty repository with an empty compilation cache; {sizes.refreshes} pairs",
        ),
        beside={
            "seconds in all, first and again": f"{statistics.median(firsts):.1f} and "
            f"{statistics.median(seconds):.1f} (10 or less asked for)"
        },
    )


_WRITE_FEED = "import sys; from xlarank.training.feed import write_feed; write_feed(sys.argv[1])"


def _movielens(data: Path) -> dict[str, str]:
    """AUC loss and speed of the MovieLens model compiled with lower precisions allowed."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder, config = Path(name), ROOT / "configs" / "movielens.toml"
        _xlarank(folder, "train", config, "--data", data, "--out", folder / "checkpoint")
        words = ["compile", config, "--checkpoint", folder / "checkpoint", "--out", folder / "models"]
        words += [
            "--golden",
            data,
            "--buckets",
            "512",
            "--tune-seconds",
            300,
            "--max-score-error",
            0.01,
            "--json",
        ]
        line = _run(sys.executable, "-m", "xlarank.cli", *words, cache=folder).splitlines()[-1]
    (bucket,) = [b for b in json.loads(line)["buckets"] if b["requests"] == 1] or json.loads(line)["buckets"][
        -1:
    ]
    tried = {trial["form"]: trial["seconds"] for trial in bucket["tried"]}
    wide = {form: s for form, s in tried.items() if not form.endswith(("bfloat16", "float16", "int8"))}
    chosen = (
        bucket["form"] if bucket["precision"] == "float32" else f"{bucket['form']}, {bucket['precision']}"
    )
    fastest = min(wide, key=lambda form: wide[form])
    speed = wide[fastest] / tried.get(chosen, wide[fastest])
    return {
        "MovieLens, same options, 512 rows": f"chose {chosen}, {speed:.2f} times as fast as {fastest}; "
        f"AUC loss {_texts(bucket['auc_loss'])}; p99 error {_texts(bucket['p99_error'])}"
    }


def _xlarank(cache: Path, *words: object) -> float:
    """Seconds of a subcommand as a process with a compilation cache of its own."""
    cache.mkdir(exist_ok=True)
    start = time.perf_counter()
    _run(sys.executable, "-m", "xlarank.cli", *words, cache=cache)
    return time.perf_counter() - start


def _run(*words: object, cache: Path | None = None) -> str:
    environ = dict(os.environ) if cache is None else {**os.environ, "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run([str(word) for word in words], env=environ, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{words[:4]} ended with status {done.returncode}: {done.stdout[-2000:]}")
    return done.stdout


def _forms(sizes: Sizes, *words: object) -> dict[str, Any]:
    given = ["--tune-seconds", sizes.tune_seconds, "--golden", sizes.num_golden]
    return run_tool("bench_forms.py", *words, *given)


def _medians(seconds: dict[str, list[float]]) -> str:
    medians = {label: statistics.median(values) * 1e3 for label, values in seconds.items()}
    return ", ".join(f"{label} {ms:.2f}" for label, ms in sorted(medians.items(), key=lambda item: item[1]))


def _texts(values: dict[str, float]) -> str:
    return ", ".join(f"{task} {value:.1e}" for task, value in values.items())


def _how(sizes: Sizes, text: str) -> str:
    return f"{sizes.note}{command()}: {text}; {environment()}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--short", action="store_true", help="fewer sizes and rounds")
    parser.add_argument(
        "--movielens", type=Path, help="folder of MovieLens 100K, for what stands beside int8_512"
    )
    parser.add_argument("--only", metavar="NAME,...", help="figures to measure, by name")
    args = parser.parse_args()
    sizes = SHORT if args.short else FULL
    load = os.getloadavg()[0]
    sizes = dataclasses.replace(sizes, note=f"{sizes.note}load average {load:.1f} before the run; ")
    if load > MAX_LOAD:
        console.print(f"The machine is busy (load average {load:.1f}): these figures are not final.")
    movielens = args.movielens if args.movielens and (args.movielens / "u.data").is_file() else None
    mmoe = functools.cache(lambda: mmoe_forms(sizes))
    steps: dict[str, Any] = {
        "hoist_1x512": lambda: hoist(sizes, mmoe(), "hoist_1x512", HOIST_BUCKETS[0], 1.65),
        "hoist_16x32": lambda: hoist(sizes, mmoe(), "hoist_16x32", HOIST_BUCKETS[1], 1.55),
        "dlrm_worst": lambda: dlrm_worst(sizes),
        "moe_regret": lambda: moe_regret(sizes, mmoe()),
        "attention_512x100": lambda: attention_512x100(sizes),
    }
    if sizes.refreshes:
        steps["int8_512"] = lambda: int8_512(sizes, movielens)
        steps["refresh"] = lambda: refresh(sizes)
    names = list(steps) if args.only is None else args.only.split(",")
    if unknown := set(names) - set(steps):
        parser.error(f"--only: expected names among {', '.join(steps)}, got {', '.join(sorted(unknown))}")
    figures = []
    with console.status("") as status:
        for name in names:
            status.update(name)
            figures.append(steps[name]())
    report(figures, args.out, console=console)


if __name__ == "__main__":
    main()
