"""How many candidates requests have, from a file: `read_sizes`."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from xlarank.errors import ConfigError
from xlarank.spec.ladder import CANDIDATES_METRIC, SizeHistogram

__all__ = ["read_sizes"]

_SERIES = f"{CANDIDATES_METRIC}_bucket"
_PAGE = re.compile(rf"^(# TYPE \S+ \w+\s*$|{CANDIDATES_METRIC})", re.MULTILINE)
_SIZE = re.compile(r"[0-9]{1,10}")
_SHOWN = 80  # characters of a wrong line in a message


def read_sizes(path: Path, *, model: str | None = None, largest: int | None = None) -> SizeHistogram:
    """Reads how many candidates requests have.

    The file is one of two:

    - One candidate count a line; blank lines, and what follows a ``#``, are skipped.
    - A saved page of a server's /metrics, with its histogram ``xlarank_request_candidates``. Versions of a
      model are added up, and so are the pages of several servers, one after the other. A request counts with
      the upper edge of its range, the most candidates that it can have had: a bucket planned for it holds it.

    The range above the last edge has no such reading. Counted as that edge, its requests would get buckets
    too small and times too short, without a word; so a page with such requests is refused unless `largest`
    says what to count them as.

    Args:
      path: the file.
      model: whose requests to read from a page; None where the page has one model. A list of counts is of no
        model.
      largest: candidates to count a request as that is above a page's last edge; more than that edge. Used
        only if there is one.

    Raises:
      ConfigError: if the file can't be read, is neither of the two, has no requests, or leaves open which
        model or size is meant; names the file, the line, what was expected and what came.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected a text file, got other bytes at {error.start}") from None
    if not _PAGE.search(text):
        return SizeHistogram.of_sizes(_listed_sizes(path, text))
    model, versions = _versions_of(path, _read_series(path, text), model)
    counts: Counter[int] = Counter()
    for version, cumulative in versions.items():
        counts += _range_counts(f"{path}: model {model!r} version {version!r}", cumulative, largest)
    if not counts:
        raise ConfigError(f"{path}: model {model!r} has had no requests; expected a page after some")
    return SizeHistogram(counts)


def _listed_sizes(path: Path, text: str) -> list[int]:
    sizes: list[int] = []
    for number, line in enumerate(text.split("\n"), start=1):
        word = line.partition("#")[0].strip()
        if not word:
            continue
        if not _SIZE.fullmatch(word) or not 1 <= int(word) < 2**31:
            raise ConfigError(
                f"{path}:{number}: expected one candidate count, a whole number in [1, 2**31), "
                f"got {word[:_SHOWN]!r}"
            )
        sizes.append(int(word))
    if not sizes:
        raise ConfigError(
            f"{path}: expected one candidate count a line, or a page of /metrics, got no line of either"
        )
    return sizes


def _read_series(path: Path, text: str) -> dict[tuple[str, str], dict[float, int]]:
    """Cumulative requests by upper edge, of each model and version of a page."""
    series: dict[tuple[str, str], dict[float, int]] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.startswith((f"{_SERIES}{{", f"{_SERIES} ")):
            continue
        try:
            (family,) = text_string_to_metric_families(line)
            (sample,) = family.samples
            labels, count, edge = sample.labels, float(sample.value), float(sample.labels["le"])
            key = (labels["model"], labels["version"])
        # What prometheus_client raises for a line that it can't read; a missing label is a KeyError.
        except (ValueError, IndexError, KeyError):
            raise ConfigError(
                f'{path}:{number}: expected {_SERIES}{{le="...",model="...",version="..."}} COUNT, '
                f"got {line[:_SHOWN]!r}"
            ) from None
        if not (edge == math.inf or (edge.is_integer() and 1 <= edge < 2**31)):
            raise ConfigError(
                f"{path}:{number}: expected an edge le of +Inf or a whole number in [1, 2**31), "
                f"got {labels['le']!r}"
            )
        if not (count.is_integer() and 0 <= count < 2**53):
            raise ConfigError(f"{path}:{number}: expected a whole count >= 0, got {sample.value!r}")
        up_to = series.setdefault(key, {})
        up_to[edge] = up_to.get(edge, 0) + int(count)
    if not series:
        raise ConfigError(
            f"{path}: a page of metrics without {_SERIES}; expected the /metrics of an xlarank server with "
            f"a model, or one candidate count a line"
        )
    return series


def _versions_of(
    path: Path, series: Mapping[tuple[str, str], dict[float, int]], model: str | None
) -> tuple[str, dict[str, dict[float, int]]]:
    """The model that is meant, and its series by version."""
    models = sorted({name for name, _ in series})
    if model is None and len(models) > 1:
        raise ConfigError(f"{path}: has requests of the models {models}; expected --model to choose one")
    if model is not None and model not in models:
        raise ConfigError(f"{path}: expected requests of model {model!r}, got those of {models}")
    name = models[0] if model is None else model
    return name, {version: counts for (of, version), counts in series.items() if of == name}


def _range_counts(where: str, cumulative: Mapping[float, int], largest: int | None) -> Counter[int]:
    """Requests by the upper edge of their range, from the requests up to each edge."""
    edges = sorted(cumulative)
    counts = [cumulative[edge] for edge in edges]
    if counts != sorted(counts):
        raise ConfigError(f"{where}: expected counts that don't fall with the edge le, got {counts}")
    if edges[-1] != math.inf or len(edges) == 1:
        shown = [f"{edge:g}" for edge in edges]
        raise ConfigError(f'{where}: expected edges that end with le="+Inf", got {shown}; is the page whole?')
    last_edge, num_open = int(edges[-2]), counts[-1] - counts[-2]
    if num_open and largest is None:
        raise ConfigError(
            f"{where}: {num_open} of {counts[-1]} requests have more than {last_edge} candidates, and a page "
            f"doesn't say how many; count them as N with --largest N, or list candidate counts, one a line"
        )
    if num_open and largest is not None and largest <= last_edge:
        raise ConfigError(
            f"{where}: expected --largest of more than {last_edge}, the last edge; got {largest}"
        )
    ranges = [above - below for below, above in itertools.pairwise([0, *counts])]
    sizes = [*map(int, edges[:-1]), largest or 0]
    return Counter({size: count for size, count in zip(sizes, ranges, strict=True) if count})
