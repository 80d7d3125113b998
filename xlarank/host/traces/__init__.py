"""Which rows of an embedding table get read: made-up traces, public ones, and how local they are."""

from xlarank.host.traces.files import read_trace
from xlarank.host.traces.locality import REUSE_EDGES, TOP_ROWS, TraceStatistics
from xlarank.host.traces.synthesis import Hotness, Popularity, lognormal_lengths, popularity, trace

__all__ = [
    "REUSE_EDGES",
    "TOP_ROWS",
    "Hotness",
    "Popularity",
    "TraceStatistics",
    "lognormal_lengths",
    "popularity",
    "read_trace",
    "trace",
]
