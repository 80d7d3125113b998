"""The form that every benchmark ends in: what a ratio is, what is written, what is shown."""

import io
import json
import subprocess
import sys
from pathlib import Path

import figures
import numpy as np
import pytest
from figures import Figure, Goal, quantile_figure, ratio_figure, report, run_tool
from rich.console import Console

pytestmark = pytest.mark.once


def make(**changes):
    fields = {
        "figure": "lookup",
        "value": 5.0,
        "target": 5.0,
        "goal": Goal.AT_LEAST,
        "spread": (4.0, 6.0),
        "how": "by hand",
    }
    return Figure(**(fields | changes))


def shown(*some, out=None):
    text = io.StringIO()
    report(some, out, console=Console(file=text, width=120))
    return text.getvalue()


def test_a_ratio_is_the_median_over_neighbours_so_that_a_slow_moment_of_the_machine_cancels():
    # Everything took ten times as long in the second and third turn, on both sides.
    ours, theirs = [1.0, 10.0, 10.0, 2.0, 1.0], [4.0, 50.0, 60.0, 10.0, 7.0]
    figure = ratio_figure("lookup", theirs, ours, target=5, goal=Goal.AT_LEAST, how="by hand")
    assert figure.value == 5.0  # of 4, 5, 6, 5, 7
    assert figure.spread == pytest.approx((4.4, 6.6))  # percentiles 10 and 90 of five, interpolated
    assert figure.is_met


def test_a_quantile_is_of_the_requests_of_all_runs_together():
    """Nine of a run are too few for a 99th percentile; the second run alone would have 12."""
    runs = [np.arange(1.0, 10.0), np.array([12.0]), np.arange(1.0, 1000.0)]
    held_against = [np.array([1.0, 2.0]), np.array([1.0]), np.array([2.0])]
    figure = quantile_figure(
        "tail", runs, held_against, quantile=0.5, target=1, goal=Goal.AT_MOST, how="x", beside={"more": "y"}
    )
    assert figure.value == pytest.approx(np.median(np.concatenate(runs)) / 1.5)
    assert figure.spread == pytest.approx((5 / 1.5, figure.value))
    assert figure.beside == {"requests, all and of each run": "1009: 9, 1, 999", "more": "y"}
    assert figure.how == "x; of the requests of all runs together (spread: of each run)"


@pytest.mark.parametrize("runs", [[], [np.ones(3)], [np.ones(3), np.ones(0)]])
def test_a_run_without_requests_has_no_quantile(runs):
    with pytest.raises(
        ValueError, match=r"figure 'tail': expected runs with latencies and yardsticks, got \["
    ):
        quantile_figure("tail", runs, [np.ones(1)] * 2, target=1, goal=Goal.AT_MOST, how="x")


def test_one_pair_is_its_own_spread():
    figure = ratio_figure("load", [3.0], [12.0], target=0.3, goal=Goal.AT_MOST, how="by hand")
    assert (figure.value, figure.spread) == (0.25, (0.25, 0.25))


@pytest.mark.parametrize(
    ("numerators", "denominators", "message"),
    [
        ([1.0, 2.0], [1.0], "figure 'load': expected as many numerators as denominators .* got 2 and 1"),
        ([], [], "at least one, got 0 and 0"),
        ([1.0], [0.0], r"figure 'load': expected numbers > 0 to compare with, got \[0\.0\]"),
        ([float("nan")], [1.0], "got nan"),
        ([1.0], [float("inf")], "got inf"),
    ],
)
def test_what_can_not_be_compared_is_refused(numerators, denominators, message):
    with pytest.raises(ValueError, match=message):
        ratio_figure("load", numerators, denominators, target=1, goal=Goal.AT_MOST, how="by hand")


@pytest.mark.parametrize(
    ("goal", "value", "is_met"),
    [
        (Goal.AT_LEAST, 4.9, False),
        (Goal.AT_LEAST, 5.0, True),
        (Goal.AT_LEAST, 5.1, True),
        (Goal.AT_MOST, 4.9, True),
        (Goal.AT_MOST, 5.0, True),
        (Goal.AT_MOST, 5.1, False),
    ],
)
def test_a_goal_says_which_side_of_the_target_is_the_good_one(goal, value, is_met):
    assert make(goal=goal, value=value).is_met is is_met
    assert (" yes " if is_met else " no ") in shown(make(goal=goal, value=value))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"figure": "Lookup time"}, "expected an id of the form .* got 'Lookup time'"),
        ({"value": float("nan")}, "figure 'lookup': value must be finite; was nan"),
        ({"target": float("inf")}, "target must be finite; was inf"),
        ({"spread": (4.0, float("inf"))}, "upper end of the spread must be finite; was inf"),
        ({"spread": (6.0, 4.0)}, r"expected a spread around 5.0, got \(6.0, 4.0\)"),
        ({"spread": (5.5, 6.0)}, r"expected a spread around 5.0, got \(5.5, 6.0\)"),
    ],
)
def test_a_figure_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_a_report_writes_the_five_keys_and_nothing_else(tmp_path):
    out = tmp_path / "bench" / "main.json"
    text = shown(
        make(value=5.123456, spread=(4.98765, 6.0), beside={"medians": "1.80 ms [bold]"}),
        make(figure="load", value=0.2, target=0.3, spread=(0.1, 0.4), goal=Goal.AT_MOST),
        out=out,
    )
    assert json.loads(out.read_text()) == [
        {
            "figure": "lookup",
            "value": 5.123,
            "target": 5.0,
            "spread": [4.988, 6.0],
            "how": "by hand",
            "beside": {"medians": "1.80 ms [bold]"},
        },
        {"figure": "load", "value": 0.2, "target": 0.3, "spread": [0.1, 0.4], "how": "by hand"},
    ]
    assert [path.name for path in out.parent.iterdir()] == ["main.json"]
    assert "lookup: medians: 1.80 ms [bold]" in text
    assert "5 or more" in text
    assert "0.3 or less" in text
    assert "0.1 to 0.4" in text


def test_a_report_replaces_the_one_before(tmp_path):
    out = tmp_path / "main.json"
    out.write_text("the one before, longer than what follows " * 100)
    shown(make(), out=out)
    assert [figure["figure"] for figure in json.loads(out.read_text())] == ["lookup"]


def test_two_figures_of_one_id_are_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"distinct ids, got \['lookup', 'lookup'\]"):
        shown(make(), make(), out=tmp_path / "main.json")
    assert list(tmp_path.iterdir()) == []


def test_the_environment_names_versions_and_machine():
    import jax

    text = figures.environment()
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}." in text
    assert f"jax {jax.__version__}" in text
    assert text.endswith(" cores")


def test_a_tool_answers_with_the_json_of_its_last_line(tmp_path):
    tool = tmp_path / "tool.py"
    tool.write_text("import json, sys\nprint('on the way')\nprint(json.dumps(sys.argv[1:]))\n")
    assert run_tool(str(tool), "--rows", 8) == ["--rows", "8"]


def test_a_tool_that_fails_is_named_with_its_status(tmp_path):
    tool = tmp_path / "tool.py"
    tool.write_text("raise SystemExit(3)\n")
    with pytest.raises(RuntimeError, match=r"tool\.py --short ended with status 3"):
        run_tool(str(tool), "--short")


@pytest.mark.parametrize(
    "script",
    ["bench_main", "bench_lookup", "bench_server", "bench_load", "bench_embedding", "bench_embedding_turns"],
)
def test_every_benchmark_says_what_it_measures(script):
    path = Path(figures.__file__).with_name(f"{script}.py")
    done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, check=True)
    assert f"tools/{script}.py" in done.stdout
