"""report.html of a bundle: what was built, proven and measured, for who decides whether to serve it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from importlib import resources

import jinja2
from markupsafe import Markup

from xlarank.compiler.costs import Rate
from xlarank.compiler.report_facts import BucketFacts, Facts
from xlarank.compiler.report_plots import plot_forms, plot_throughput
from xlarank.compiler.result import BuildResult
from xlarank.spec import RankRequest

__all__ = ["render_report"]

_TEMPLATE = "report.html.j2"
_DASH = "–"
_SAME = 0.02
"""Share by which two times may differ and be told as equal."""

_NO_AUC_LOSS = 5e-7
"""Told as no loss: what float32 may do to the order of two rows."""

_SOURCE = re.compile(r"(?P<path>.*):(?P<line>\d+) \((?P<function>.*)\)", re.DOTALL)


def render_report(result: BuildResult, requests: Sequence[RankRequest]) -> str:
    """A page of one file: it loads nothing, runs nothing, and is read in light, in dark and on paper.

    Args:
      result: of the build; its path need not be set.
      requests: the golden ones, whose sizes stand for the traffic.

    Returns:
      HTML, equal for equal arguments. Whatever comes from the model or its author is escaped.
    """
    facts = Facts.of(result, requests)
    timed = [facts for facts in facts.buckets if facts.trials]
    return (
        _environment()
        .get_template(_TEMPLATE)
        .render(
            result=result,
            manifest=result.manifest,
            placements={placement.table: placement for placement in result.manifest.placements},
            analysis=result.analysis,
            tuning=result.tuning,
            facts=facts,
            rates=Rate,
            verdict=verdict(result, facts),
            forms_plot=Markup(plot_forms(facts.buckets)) if timed else None,
            throughput_plot=Markup(plot_throughput(_narrowest(facts.buckets))),
        )
    )


def verdict(result: BuildResult, facts: Facts) -> list[str]:
    """What was won and what it cost, a sentence each."""
    return [
        _speed_sentence(facts),
        _precision_sentence(facts),
        *_error_sentences(result, facts),
        *filter(None, [result.timing_note]),
    ]


def _speed_sentence(facts: Facts) -> str:
    knee = facts.knee
    at = f"At the knee, bucket {knee.bucket}, "
    if knee.gain is None:
        told = f"{at}a full batch takes {_ms(knee.seconds)} ms; the plain form was not timed there"
    elif knee.gain > 1 + _SAME:
        told = (
            f"{at}a full batch takes {_ms(knee.tuned_seconds)} ms instead of {_ms(knee.plain_seconds)} ms: "
            f"{knee.gain:.2f} times as fast as the plain form"
        )
    else:
        told = f"{at}nothing beat the plain form, which takes {_ms(knee.plain_seconds)} ms a full batch"
    others = [bucket.gain for bucket in facts.buckets if bucket.gain is not None and bucket is not knee]
    if others:
        span = dict.fromkeys((f"{min(others):.2f}", f"{max(others):.2f}"))
        told += f"; in the other buckets that were tuned the gain is {' to '.join(span)}"
    return told + "."


def _precision_sentence(facts: Facts) -> str:
    if not facts.lowered:
        return "Every bucket computes in float32."
    names = ", ".join(dict.fromkeys(bucket.form.precision.value for bucket in facts.lowered))
    return f"A lower precision ({names}) serves {len(facts.lowered)} of {len(facts.buckets)} buckets."


def _error_sentences(result: BuildResult, facts: Facts) -> Iterable[str]:
    bucket, error = facts.worst
    held, what = (error.p99, "99th percentile") if error.is_p99_held else (error.max, "maximum")
    yield (
        f"The error that comes closest to its allowance is {_error(held)} ({what}, task {error.task}, bucket "
        f"{bucket.bucket}); {_error(error.allowed)} is allowed."
    )
    pairs = [(b.bucket, e) for b in facts.buckets for e in b.errors]
    losses = [(e.auc_loss, e.task, bucket) for bucket, e in pairs if e.auc_loss is not None]
    if not losses:
        yield "AUC was not checked: the golden rows have no labels of both classes."
    elif max(losses)[0] > _NO_AUC_LOSS:
        loss, task, at = max(losses)
        allowed = result.manifest.budget.max_auc_loss
        yield (
            f"The most AUC that a bucket loses is {_error(loss)} (task {task}, bucket {at}); a lower "
            f"precision may lose {_error(allowed)}."
        )
    else:
        yield "No bucket loses AUC on the labelled golden rows."


def _narrowest(buckets: Sequence[BucketFacts]) -> list[BucketFacts]:
    """Of each row count the bucket of fewest requests, which a request alone runs in."""
    found: dict[int, BucketFacts] = {}
    for bucket in buckets:
        found.setdefault(bucket.bucket.rows, bucket)
    return list(found.values())


def _environment() -> jinja2.Environment:
    """Escapes all that isn't `Markup`, shows a dash for None and fails on a name that doesn't exist."""
    environment = jinja2.Environment(
        autoescape=True,
        finalize=lambda value: _DASH if value is None else value,
        loader=jinja2.FunctionLoader(_template),
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals["dash"] = _DASH
    environment.filters |= {
        "bytes": _bytes,
        "count": lambda number: f"{number:,}",
        "error": _error,
        "factor": lambda ratio: _DASH if ratio is None else f"{ratio:.2f}×",
        "mflop": _mflop,
        "ms": _ms,
        "percent": _percent,
        "sentence": _sentence,
        "signed": _signed,
        "source": _source,
        "width": lambda share: f"{100 * min(1.0, max(0.0, share)):.1f}%",
    }
    return environment


def _template(name: str) -> str:
    return resources.files("xlarank.compiler").joinpath(name).read_text("utf-8")


def _ms(seconds: float | None) -> str:
    """Three digits or so."""
    if seconds is None:
        return _DASH
    ms = 1e3 * seconds
    digits = 0 if ms >= 100 else 1 if ms >= 10 else 2 if ms >= 1 else 3
    return f"{ms:,.{digits}f}"


def _mflop(flops: float) -> str:
    mflop = flops / 1e6
    if mflop >= 100:
        return f"{mflop:,.0f}"
    return f"{mflop:.3g}"


def _bytes(num_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def _error(error: float | None) -> str:
    if error is None:
        return _DASH
    if not math.isfinite(error):
        return "not finite"
    return "0" if error == 0 else f"{error:.1e}"


def _signed(loss: float | None) -> str:
    """An AUC loss; a gain is negative."""
    if loss is None:
        return _DASH
    if not math.isfinite(loss):
        return "not finite"
    return f"{loss:+.6f}" if abs(loss) > _NO_AUC_LOSS else "0"


def _percent(share: float | None) -> str:
    if share is None:
        return _DASH
    return f"{100 * share:.1f}%" if 0 < share < 0.1 else f"{100 * share:.0f}%"


def _sentence(text: str) -> str:
    """Begun with a capital and ended with a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def _source(text: str) -> Markup:
    """The file's name, line and function; the whole path on hovering."""
    match = _SOURCE.fullmatch(text)
    if match is None:
        return Markup("<code>{}</code>").format(text or _DASH)
    name = re.split(r"[/\\]", match["path"])[-1]
    short = f"{name}:{match['line']}"
    return Markup('<code title="{}">{} <i>{}</i></code>').format(text, short, match["function"])
