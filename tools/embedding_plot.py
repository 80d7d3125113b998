"""Draws the cells of the embedding benchmark: rows looked up a second, by shape, pooling and hotness."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["draw"]

_CEILINGS = ("ceiling", "ceiling_int8")


def draw(cells: list[dict[str, Any]], path: Path) -> None:
    """Writes a picture: a panel a shape and pooling, a group of bars a hotness, ceilings as lines on them.

    Args:
      cells: at least one, as `bench_embedding.measure` gives them.
      path: .png or .svg.
    """
    shapes = list(dict.fromkeys(cell["shape"] for cell in cells))
    poolings = sorted({cell["pooling"] for cell in cells})
    names = sorted({name for cell in cells for name in cell["ms"]} - set(_CEILINGS))
    colours = dict(zip(names, matplotlib.colormaps["tab10"].colors, strict=False))  # pyright: ignore
    # Not of pyplot, which keeps figures and looks for a display.
    picture = Figure(figsize=(4.6 * len(poolings), 3.4 * len(shapes) + 0.6), layout="constrained")
    panels = picture.subplots(len(shapes), len(poolings), squeeze=False)
    for row, shape in enumerate(shapes):
        for column, pooling in enumerate(poolings):
            mine = [cell for cell in cells if (cell["shape"], cell["pooling"]) == (shape, pooling)]
            _draw_panel(panels[row, column], mine, colours)
            panels[row, column].set_title(f"{shape}, {pooling} {'id' if pooling == 1 else 'ids'} a bag")
    for axes in panels[:, 0]:
        axes.set_ylabel("million rows/s")
    handles = {label: handle for axes in panels.flat for handle, label in _legend(axes)}
    picture.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False)
    picture.savefig(path, dpi=120)


def _draw_panel(axes: Axes, cells: list[dict[str, Any]], colours: dict[str, Any]) -> None:
    presets = list(dict.fromkeys(cell["hotness"] for cell in cells))
    rates: dict[str, dict[str, float]] = {}
    for cell in cells:
        for name, samples in cell["ms"].items():
            # The first run that measured it: runs are ordered by how much they measure.
            rates.setdefault(name, {}).setdefault(
                cell["hotness"], cell["num_rows"] / statistics.median(samples) / 1e3
            )
    bars = [name for name in colours if name in rates]
    width = 0.8 / max(1, len(bars))
    for place, name in enumerate(bars):
        at = [presets.index(preset) + (place - (len(bars) - 1) / 2) * width for preset in rates[name]]
        axes.bar(at, list(rates[name].values()), width, color=colours[name], label=name)
    for name, style in zip(_CEILINGS, ("-", ":"), strict=True):
        if name in rates:
            at = [presets.index(preset) for preset in rates[name]]
            ends = [x - 0.45 for x in at], [x + 0.45 for x in at]
            axes.hlines(list(rates[name].values()), *ends, colors="black", linestyles=style, label=name)
    axes.set_yscale("log")  # one row in the cache is a hundred times as fast as rows in memory
    axes.set_xticks(range(len(presets)), presets)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes) -> list[tuple[Any, str]]:
    handles, labels = axes.get_legend_handles_labels()
    return list(zip(handles, labels, strict=True))
