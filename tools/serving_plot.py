"""Draws latency against load, ours beside Triton's rule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter
from queue_server import OURS
from serving_rules import RULES, Curves

__all__ = ["draw"]

_STYLES = {0.5: ":", 0.99: "-"}


def draw(curves: Sequence[Curves], path: Path) -> None:
    """Writes a picture: a panel a model, a line a rule and quantile.

    Args:
      curves: at least one.
      path: .png or .svg.
    """
    # Not of pyplot, which keeps figures and looks for a display.
    picture = Figure(figsize=(5.2 * len(curves), 4.6), layout="constrained")
    panels = picture.subplots(1, len(curves), squeeze=False)[0]
    for axes, curve in zip(panels, curves, strict=True):
        for place, rule in enumerate(RULES):
            name = "xlarank" if rule == OURS else f"fixed delay, {int(rule) / 1000:g} ms"
            loads = sorted(curve.seconds[rule])
            for quantile, style in _STYLES.items():
                values = [1e3 * curve.latency(rule, load, quantile) for load in loads]
                axes.plot(
                    loads, values, style, color=f"C{place}", marker=".", label=f"{name}, p{quantile * 100:g}"
                )
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(axis="y", alpha=0.3)
        axes.set_xlabel("load, share of our capacity")
        axes.set_title(curve.model)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("ms, simulated with measured times")
    picture.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    picture.savefig(path, dpi=120)
