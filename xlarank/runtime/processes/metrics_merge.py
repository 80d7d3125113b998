"""One /metrics of several processes: `MergedMetrics`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.utils import floatToGoString

__all__ = ["MergedMetrics"]

_OF_ALL = {"xlarank_table_updated_rows_total"}
"""Counters of what the processes share: each tells the same, so the largest counts and not the sum."""

_DEVICE = re.compile(r'[{,]device="')
"""In a series of one of a process's own devices: device 0 of each is another."""

_VERSION = re.compile(r'[{,]model="(?:[^"\\]|\\.)*"|[{,]version="\d+"')


@dataclasses.dataclass
class _Family:
    header: list[str]
    """HELP and TYPE, as they came."""

    kind: str
    """Such as counter."""

    values: dict[str, float] = dataclasses.field(default_factory=dict)
    """By series: name and labels, as written."""

    @property
    def is_summed(self) -> bool:
        return self.kind in ("counter", "histogram")

    def add(self, other: _Family, label: str = "") -> None:
        """Sums the series of a process that has this label; what isn't summed gets the label, and so does
        what is told of a device."""
        for series, value in other.values.items():
            if not self.is_summed:
                self.values[_with_label(series, label)] = value
            elif _DEVICE.search(series):
                own = _with_label(series, label)
                self.values[own] = self.values.get(own, 0.0) + value
            elif _name(series) in _OF_ALL:
                self.values[series] = max(self.values.get(series, 0.0), value)
            else:
                self.values[series] = self.values.get(series, 0.0) + value

    def lines(self) -> Iterator[str]:
        yield from self.header
        for series, value in self.values.items():
            yield f"{series} {floatToGoString(value)}"


class MergedMetrics:
    """Adds up what processes say of themselves, over their deaths. For one thread at a time.

    Counters and histograms are summed; what a process that is gone had counted when it last said so goes on
    being counted, except of versions that nobody serves any more: those series end, as in one process. Each
    process's gauges stand by themselves, with a label `process`, and so does what it tells of its devices.
    """

    def __init__(self) -> None:
        self._kept: dict[str, _Family] = {}  # by TYPE: counters and histograms of processes that are gone

    def keep(self, number: int, text: bytes) -> None:
        """A process of this number is gone whose last words these were."""
        for family in _families(text):
            if family.is_summed:
                kept = self._kept.setdefault(family.header[-1], _Family(family.header, family.kind))
                kept.add(family, _label(number))

    def text(self, processes: Iterable[tuple[int, bytes]], own: bytes = b"") -> bytes:
        """What /metrics answers.

        Args:
          processes: number and text of each; of two of one number, the first of which is ending, the last
            one's gauges are told.
          own: what is said of all of them; its gauges get no label.
        """
        merged: dict[str, _Family] = {}
        for label, text in [*((_label(number), text) for number, text in processes), ("", own)]:
            for family in _families(text):
                merged.setdefault(family.header[-1], _Family(family.header, family.kind)).add(family, label)
        self._forget_ended(merged)
        for key, family in self._kept.items():
            merged.setdefault(key, _Family(family.header, family.kind)).add(family)
        return ("\n".join(line for family in merged.values() for line in family.lines()) + "\n").encode()

    def _forget_ended(self, told: Mapping[str, _Family]) -> None:
        """Lets go of versions that nobody tells of; with nobody there to tell, as while the only process
        starts again, of none."""
        versions = {
            _version(series) for family in told.values() if family.is_summed for series in family.values
        }
        if not any(versions):
            return
        for family in self._kept.values():
            kept = {s: v for s, v in family.values.items() if not _version(s) or _version(s) in versions}
            family.values = kept


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


def _label(number: int) -> str:
    return f'process="{number}"'


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
