"""One /metrics of several processes: `MergedMetrics`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.utils import floatToGoString

__all__ = ["MergedMetrics"]

_OF_ALL = {"xlarank_table_updated_rows_total"}
"""Counters of what the processes share: each tells the same, so the largest counts and not the sum."""

_VERSION = re.compile(r'[{,]model="(?:[^"\\]|\\.)*"|[{,]version="\d+"')


@dataclasses.dataclass
class _Family:
    header: list[str]
    """HELP and TYPE, as they came."""

    kind: str
    """Such as counter."""

    values: dict[str, float] = dataclasses.field(default_factory=dict)
    """By series: name and labels, as written."""


class MergedMetrics:
    """Adds up what processes say of themselves, over their deaths. For one thread at a time.

    Counters and histograms are summed; what a process that is gone had counted when it last said so goes on
    being counted, except of versions that nobody serves any more: those series end, as in one process. Each
    process's gauges stand by themselves, with a label `process`.
    """

    def __init__(self) -> None:
        self._kept: dict[str, float] = {}  # by series of a counter or histogram: of processes that are gone

    def keep(self, text: bytes) -> None:
        """A process is gone whose last words these were."""
        for family in _families(text):
            if _is_summed(family.kind):
                for series, value in family.values.items():
                    self._kept[series] = _sum(series, self._kept.get(series, 0.0), value)

    def text(self, processes: Iterable[tuple[int, bytes]], own: bytes = b"") -> bytes:
        """What /metrics answers.

        Args:
          processes: number and text of each; of two of one number, the first of which is ending, the last
            one's gauges are told.
          own: what is said of all of them; its gauges get no label.
        """
        merged: dict[str, _Family] = {}
        for process, text in [*((f'process="{number}"', text) for number, text in processes), ("", own)]:
            for family in _families(text):
                into = merged.setdefault(family.header[-1], _Family(family.header, family.kind))
                for series, value in family.values.items():
                    if _is_summed(family.kind):
                        into.values[series] = _sum(series, into.values.get(series, 0.0), value)
                    else:
                        into.values[_with_label(series, process)] = value
        self._add_kept(merged)
        lines = [
            line
            for family in merged.values()
            for line in (
                *family.header,
                *(f"{series} {floatToGoString(value)}" for series, value in family.values.items()),
            )
        ]
        return ("\n".join(lines) + "\n").encode()

    def _add_kept(self, merged: Mapping[str, _Family]) -> None:
        summed = {s: family for family in merged.values() if _is_summed(family.kind) for s in family.values}
        by_name = {_name(series): family for series, family in summed.items()}
        versions = {_version(series) for series in summed}
        # With nobody to say what is served, as while the only process starts again, nothing is forgotten.
        if any(versions):
            self._kept = {s: v for s, v in self._kept.items() if not _version(s) or _version(s) in versions}
        for series, value in self._kept.items():
            family = summed.get(series) or by_name.get(_name(series))
            if family is not None:
                family.values[series] = _sum(series, family.values.get(series, 0.0), value)


def _families(text: bytes) -> Iterator[_Family]:
    """As `prometheus_client.generate_latest` writes them: HELP, TYPE, then the series, one a line."""
    family = _Family([], "")
    header: list[str] = []
    for line in text.decode().splitlines():
        if line.startswith("#"):
            header.append(line)
            if line.startswith("# TYPE "):
                if family.header:
                    yield family
                family, header = _Family(header, line.rpartition(" ")[2]), []
        elif line:
            series, _, value = line.rpartition(" ")
            family.values[series] = float(value)
    if family.header:
        yield family


def _is_summed(kind: str) -> bool:
    return kind in ("counter", "histogram")


def _sum(series: str, one: float, other: float) -> float:
    return max(one, other) if _name(series) in _OF_ALL else one + other


def _name(series: str) -> str:
    return series.partition("{")[0]


def _version(series: str) -> tuple[str, ...]:
    """Labels of a series that say of which model's version it is; empty for a series of no version."""
    found = tuple(label[1:] for label in _VERSION.findall(series))
    return found if any(label.startswith("version=") for label in found) else ()


def _with_label(series: str, label: str) -> str:
    if not label:
        return series
    name, _, labels = series.partition("{")
    return f"{name}{{{label}{',' + labels if labels else '}'}"
