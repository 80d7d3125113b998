"""The plots of report.html, as SVG to stand in the page: `plot_forms`, `plot_throughput`.

Drawn by matplotlib's objects alone, without pyplot and without a change to the process's settings, so that
two builds may draw at once. Colours are left to the page: a plot names CSS variables, which the page sets for
light and for dark. Equal facts give equal bytes.
"""

from __future__ import annotations

import importlib
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from xlarank.compiler.forms import Form
from xlarank.compiler.passes import Fusion
from xlarank.compiler.report_facts import BucketFacts
from xlarank.spec import Precision

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["load_plotting", "plot_forms", "plot_throughput"]

# matplotlib takes no CSS variables: each is drawn in a colour of its own, and put in its place afterwards.
_COLOURS = {
    "--ink": "#010101",
    "--muted": "#020202",
    "--rule": "#030303",
    "--page": "#040404",
    "--series-unrolled": "#050505",
    "--series-wide": "#060606",
    "--series-row_major": "#070707",
    "--series-expert_major": "#080808",
    "--band": "#090909",
}
_INK, _MUTED, _RULE, _PAGE = (_COLOURS[name] for name in ("--ink", "--muted", "--rule", "--page"))
_FUSIONS = {fusion: _COLOURS[f"--series-{fusion.value}"] for fusion in Fusion}
_MARKERS = {Precision.FLOAT32: "o", Precision.BFLOAT16: "s", Precision.FLOAT16: "s", Precision.INT8: "^"}
_FONT = "DejaVu Sans"  # comes with matplotlib
_WIDTH_INCHES = 10.2
_TEXT_POINTS = 9.0
_LABEL: dict[str, Any] = {"color": _MUTED, "fontsize": _TEXT_POINTS, "family": _FONT}
_LINE: dict[str, Any] = {"linewidth": 1.8, "marker": "o", "markersize": 4.5}


def load_plotting() -> None:
    """Imports what draws, which the first plot would wait for: a twentieth of a weights-only refresh."""
    importlib.import_module("matplotlib.backends.backend_svg")


def plot_forms(buckets: Sequence[BucketFacts]) -> str:
    """Time a batch of every form tried, one line of the plot a bucket.

    Args:
      buckets: ascending; at least one with trials.

    Returns:
      An ``<svg>`` element.
    """
    height = 1.25 + 0.44 * len(buckets)
    figure, axes = _figure(height)
    forms = sorted({t.form for b in buckets for t in b.trials}, key=lambda form: form.complexity)
    for place, facts in enumerate(buckets):
        if place % 2 == 0:
            axes.axhspan(place - 0.5, place + 0.5, color=_COLOURS["--band"], linewidth=0, zorder=0)
        _draw_bucket(axes, place, facts, forms)
    axes.set_ylim(len(buckets) - 0.5, -0.5)
    axes.set_yticks(range(len(buckets)), [str(facts.bucket) for facts in buckets])
    axes.set_xscale("log")
    _pad_log_x(axes, [s for b in buckets for s in (b.seconds, *(t.seconds for t in b.trials))])
    _tick_plainly(axes.xaxis)
    axes.set_xlabel("ms a batch (log scale); left is faster", **_LABEL)
    axes.grid(axis="x", which="major", color=_RULE, linewidth=0.7)
    any_refused = any(trial.refusal for facts in buckets for trial in facts.trials)
    _add_legend(axes, _form_keys(forms, any_refused=any_refused), columns=4)
    label = f"Time a batch of {len(forms)} forms in {len(buckets)} buckets, the chosen ones ringed"
    return _to_svg(figure, "forms", label)


def plot_throughput(buckets: Sequence[BucketFacts]) -> str:
    """Rows a second against rows, of full batches of one request, before and after.

    Args:
      buckets: ascending by rows, each with the same requests or the fewest of its rows.

    Returns:
      An ``<svg>`` element.
    """
    figure, axes = _figure(3.4)
    series: tuple[tuple[str, list[float | None], dict[str, Any]], ...] = (
        ("plain, while tuning", [b.plain_seconds for b in buckets], {"color": _MUTED, "linestyle": "--"}),
        ("chosen, while tuning", [b.tuned_seconds for b in buckets], {"color": _FUSIONS[Fusion.WIDE]}),
        ("as published", [b.seconds for b in buckets], {"color": _INK, "linestyle": ":"}),
    )
    for label, seconds, style in series:
        known = [(b.bucket.rows, b.bucket.rows / s) for b, s in zip(buckets, seconds, strict=True) if s]
        if known:
            axes.plot(*zip(*known, strict=True), label=label, **(_LINE | style))
    rows = [b.bucket.rows for b in buckets]
    axes.set_xscale("log")
    axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
    axes.minorticks_off()
    axes.set_xticks(rows, [f"{n:,}" for n in rows])
    axes.yaxis.set_major_formatter(lambda value, _place: f"{value:,.0f}")
    axes.set_xlabel("rows (log scale)", **_LABEL)
    axes.set_ylabel("rows/s", **_LABEL)
    axes.grid(color=_RULE, linewidth=0.7)
    _add_legend(axes, axes.get_legend_handles_labels()[0], columns=3)
    return _to_svg(figure, "throughput", "Rows a second against rows, before and after")


def _draw_bucket(axes: Axes, place: int, facts: BucketFacts, forms: Sequence[Form]) -> None:
    """One line of `plot_forms`: its forms keep their order from top to bottom."""
    axes.plot(
        [1e3 * facts.seconds], [place], linestyle="none", marker="|", markersize=22, color=_MUTED, zorder=2
    )
    step = 0.7 / max(1, len(forms) - 1)
    for trial in facts.trials:
        at = [1e3 * trial.seconds], [place - 0.35 + step * forms.index(trial.form)]
        if trial.form == facts.form:
            axes.plot(*at, marker="o", markersize=11, markerfacecolor="none", color=_INK, zorder=4)
        axes.plot(*at, **_marker(trial.form), zorder=3)
        if trial.refusal:
            axes.plot(*at, marker="x", markersize=9, color=_INK, markeredgewidth=0.8, zorder=5)


def _marker(form: Form) -> dict[str, Any]:
    colour = _FUSIONS[form.fusion]
    return {
        "linestyle": "none",
        "color": colour,
        "marker": _MARKERS[form.precision],
        "markersize": 5.5,
        "markerfacecolor": colour if form.hoisted else _PAGE,
        "markeredgewidth": 1.3,
    }


def _form_keys(forms: Sequence[Form], *, any_refused: bool) -> list[Any]:
    """What colours, fills and shapes mean, of those that occur."""
    from matplotlib.lines import Line2D

    def key(label: str, **style: Any) -> Any:
        return Line2D([], [], label=label, **({"linestyle": "none", "color": _INK, "markersize": 6} | style))

    fusions = [f for f in Fusion if any(form.fusion is f for form in forms)]
    keys = [key(f.value.replace("_", "-"), marker="o", color=_FUSIONS[f]) for f in fusions]
    if any(form.hoisted for form in forms):
        keys += [key("hoisted", marker="o"), key("not hoisted", marker="o", markerfacecolor=_PAGE)]
    precisions = [p for p in Precision if any(form.precision is p for form in forms)]
    if len(precisions) > 1:
        keys += [key(p.value, marker=_MARKERS[p], color=_MUTED) for p in precisions]
    keys += [key("chosen", marker="o", markersize=11, markerfacecolor="none")]
    keys += [key("chosen, as published", marker="|", markersize=12, color=_MUTED)]
    if any_refused:
        keys += [key("refused for its scores", marker="x", markersize=8)]
    return keys


def _figure(height: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    axes.tick_params(
        which="both", color=_RULE, labelcolor=_INK, labelsize=_TEXT_POINTS, labelfontfamily=_FONT, length=0
    )
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_RULE)
    axes.set_axisbelow(True)
    return figure, axes


def _pad_log_x(axes: Axes, seconds: Sequence[float]) -> None:
    axes.set_xlim(1e3 * min(seconds) / 1.25, 1e3 * max(seconds) * 1.25)


def _tick_plainly(axis: Any) -> None:
    """Ticks at 1, 2 and 5 times powers of ten, as numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:g}"))


def _add_legend(axes: Axes, handles: Sequence[Any], *, columns: int) -> None:
    axes.figure.legend(
        handles=list(handles),
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        labelcolor=_INK,
        prop={"family": _FONT, "size": _TEXT_POINTS},
        handletextpad=0.4,
        columnspacing=1.6,
    )


def _to_svg(figure: Figure, name: str, label: str) -> str:
    """The figure without XML prolog and metadata, its ids made from `name`, its colours CSS variables."""
    out = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    for variable, colour in _COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    # matplotlib's own ids are random, and those of two plots in one page could meet.
    ids = {found: f"{name}-{n}" for n, found in enumerate(dict.fromkeys(re.findall(r'\bid="([^"]+)"', svg)))}
    svg = re.sub(r'\bid="([^"]+)"', lambda match: f'id="{ids[match[1]]}"', svg)
    svg = re.sub(r'xlink:href="#([^"]+)"|url\(#([^)]+)\)', lambda match: _renamed(match, ids), svg)
    head = re.match(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', svg)
    assert head is not None
    return f'<svg role="img" aria-label="{label}" viewBox="{head[1]}">{svg[head.end() :]}'


def _renamed(match: re.Match[str], ids: dict[str, str]) -> str:
    if match[1] is not None:
        return f'href="#{ids[match[1]]}"'
    return f"url(#{ids[match[2]]})"
