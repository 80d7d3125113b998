"""Chooses a form for every bucket by measurement, within a budget of time: `tune`.

Pure but for the bench that it is given, which compiles, times and judges: the same timings give the same
choices.

Buckets are searched in stages, each against the best so far: structure (plain or hoisted), then merged forms
of the faster one, then lower precisions; the finalists run once more, in turns. Buckets that tell most come
first: the largest and the smallest of each sort (one request, some, a request a row). When the time is up the
rest take the form of the nearest bucket of their sort. Time that is left goes to the combinations not tried
yet.
"""

from __future__ import annotations

import collections
import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from xlarank.compiler.forms import PLAIN, Form
from xlarank.compiler.passes import Fusion
from xlarank.spec import Bucket, Precision

__all__ = ["Bench", "Choice", "Trial", "choose", "tune", "worthwhile"]

MIN_TIE, MAX_TIE = 0.02, 0.05
"""Share by which two forms may differ and still be as fast as each other: on a calm and on a noisy
machine."""

_FINALISTS = 5
_FINAL_RATIO = 1.3
_HOISTED = Form(hoisted=True)
_MERGED = (Fusion.WIDE, Fusion.EXPERT_MAJOR, Fusion.ROW_MAJOR)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A form that was tried in a bucket."""

    form: Form
    seconds: float
    """Median of the last runs in turns with others."""

    spread: float
    """Interquartile range of the same, in seconds."""

    refusal: str = ""
    """Why its scores may not be served; empty if they may, or nobody asked."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The form of a bucket and how it was found."""

    bucket: Bucket
    form: Form
    trials: tuple[Trial, ...]
    """In the order in which they were tried."""

    reason: str
    """In words."""

    def seconds_of(self, form: Form) -> float | None:
        """Measured time of a form; None when it was not tried."""
        return next((trial.seconds for trial in self.trials if trial.form == form), None)

    @property
    def plain_seconds(self) -> float | None:
        """The plain form's time; None when it was not tried."""
        return self.seconds_of(PLAIN)

    def to_dict(self) -> dict[str, Any]:
        """JSON values for `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Choice:
        """Reads `to_dict`'s values."""
        trials = tuple(
            Trial(Form.from_dict(t["form"]), t["seconds"], t["spread"], t["refusal"]) for t in value["trials"]
        )
        bucket = Bucket(value["bucket"]["rows"], value["bucket"]["requests"])
        return cls(bucket, Form.from_dict(value["form"]), trials, value["reason"])


class Bench(Protocol):
    """Where forms are tried."""

    def has(self, bucket: Bucket, form: Form) -> bool:
        """Whether the form applies; compiles it if so."""
        ...

    def times(self, bucket: Bucket, forms: Sequence[Form]) -> dict[Form, list[float]]:
        """Seconds of full batches, run in turns: equally many of each form, neighbours in time at one
        place."""
        ...

    def new_bytes(self, bucket: Bucket, form: Form) -> int:
        """Bytes of prepared arrays that no bucket decided so far has."""
        ...

    def refusal(self, bucket: Bucket, form: Form) -> str:
        """Why the form's scores may not be served, in words; empty if they may."""
        ...

    def release(self, bucket: Bucket, kept: Form) -> None:
        """Lets go of what a bucket's forms hold but for one; they may be asked for again."""
        ...

    def decide(self, bucket: Bucket, form: Form) -> None:
        """Tells what was chosen."""
        ...


def choose(samples: Mapping[Form, Sequence[float]], new_bytes: Mapping[Form, int]) -> list[Form]:
    """Forms from best to worst.

    Forms as fast as the fastest come first: arrays already prepared before new ones, then the simpler before
    the more complex. As fast is: the median of the paired ratios is within half their interquartile range of
    1, that taken to be `MIN_TIE` at least and `MAX_TIE` at most.

    Args:
      samples: seconds by form, equally many, neighbours in time at one place.
      new_bytes: by form, of prepared arrays that nobody has yet.
    """
    medians = {form: statistics.median(seconds) for form, seconds in samples.items()}
    fastest = min(medians, key=lambda form: (medians[form], form.complexity))
    reference = np.asarray(samples[fastest])

    def is_tied(form: Form) -> bool:
        ratios = np.asarray(samples[form]) / reference
        low, high = np.percentile(ratios, (25, 75))
        return float(np.median(ratios)) - 1 <= min(max(MIN_TIE, (high - low) / 2), MAX_TIE)

    tied = sorted((f for f in samples if is_tied(f)), key=lambda f: (new_bytes[f] > 0, f.complexity))
    rest = sorted((f for f in samples if f not in tied), key=lambda f: (medians[f], f.complexity))
    return tied + rest


def tune(
    buckets: Sequence[Bucket],
    bench: Bench,
    *,
    precisions: Sequence[Precision],
    is_precision_named: bool,
    seconds: float,
    clock: Callable[[], float],
    on_progress: Callable[[str, int, int], None] = lambda _text, _done, _total: None,
) -> list[Choice]:
    """Chooses a form for every bucket.

    Args:
      buckets: of the ladder.
      bench: see `Bench`.
      precisions: lower ones that may be chosen; with `is_precision_named` the one that must be where it
        applies.
      is_precision_named: whether the user asked for that one precision.
      seconds: most time to spend on trying; 0 tries nothing and takes the hoisted form where it applies.
      clock: monotonic seconds.
      on_progress: told what is tried, and how many buckets of how many are done.

    Returns:
      One choice a bucket, in the order of `buckets`.
    """
    search = _Search(bench, precisions, is_precision_named, clock, clock() + seconds, seconds > 0)
    order = _most_telling_first(buckets)
    for name, stage in (
        ("structure", search.try_structures),
        ("merging", search.try_merged),
        ("precision", search.try_lowered),
    ):
        for number, bucket in enumerate(order):
            on_progress(f"{name} of {bucket}", number, len(buckets))
            stage(bucket)
    choices: dict[Bucket, Choice] = {}
    for number, bucket in enumerate(order):
        on_progress(f"choice of {bucket}", number, len(buckets))
        choices[bucket] = search.choice(bucket, choices)
        bench.decide(bucket, choices[bucket].form)
    for bucket in order:
        if search.has_time and choices[bucket].trials:
            on_progress(f"{bucket}, other combinations", len(buckets), len(buckets))
            choices[bucket] = search.others(choices[bucket])
            bench.decide(bucket, choices[bucket].form)
    return [choices[bucket] for bucket in buckets]


def worthwhile(seconds: Mapping[Bucket, float], bytes_a_context: int, host_bandwidth: float) -> list[Bucket]:
    """The buckets worth keeping: of each row count the one with most requests, and those that are faster.

    A bucket of fewer requests is dropped when the next one kept serves the same batch as fast: counted are
    the device's time and the host's for writing the contexts that pad it.

    Args:
      seconds: measured service time by bucket.
      bytes_a_context: gathered bytes of one context.
      host_bandwidth: bytes/s that the host writes.

    Returns:
      Ascending.
    """
    kept: list[Bucket] = []
    for bucket in sorted(seconds, key=lambda b: (b.rows, -b.requests)):
        larger = kept[-1] if kept and kept[-1].rows == bucket.rows else None
        if larger is not None:
            padding = (larger.requests - bucket.requests) * bytes_a_context / host_bandwidth
            if seconds[bucket] >= (1 - MIN_TIE) * (seconds[larger] + padding):
                continue
        kept.append(bucket)
    return sorted(kept)


def _sort_of(bucket: Bucket) -> int:
    """0: one request; 1: some; 2: a request a row. What hoisting can win differs between them."""
    if bucket.requests == bucket.rows:
        return 2
    return 0 if bucket.requests == 1 else 1


def _most_telling_first(buckets: Sequence[Bucket]) -> list[Bucket]:
    """The largest of each sort, the smallest of each, then what lies between, halving the gaps."""
    by_sort = [sorted(b for b in buckets if _sort_of(b) == sort) for sort in (0, 1, 2)]
    queues = [_spread_out(group) for group in by_sort]
    longest = max(len(queue) for queue in queues)
    return [queue[i] for i in range(longest) for queue in queues if i < len(queue)]


def _spread_out(group: Sequence[Bucket]) -> list[Bucket]:
    ends = [group[-1], group[0]] if len(group) > 1 else list(group)
    gaps, order = [(0, len(group) - 1)], list(ends)
    while gaps:
        low, high = gaps.pop(0)
        middle = (low + high) // 2
        if low < middle < high:
            order.append(group[middle])
            gaps += [(middle, high), (low, middle)]
    return order


class _Search:
    """Tries forms bucket by bucket until the time is up."""

    def __init__(
        self,
        bench: Bench,
        precisions: Sequence[Precision],
        is_precision_named: bool,
        clock: Callable[[], float],
        deadline: float,
        is_tuning: bool,
    ) -> None:
        self._bench = bench
        self._precisions = tuple(precisions)
        self._is_named = is_precision_named
        self._clock = clock
        self._deadline = deadline
        self._is_tuning = is_tuning
        self._samples: dict[Bucket, dict[Form, list[float]]] = collections.defaultdict(dict)

    @property
    def has_time(self) -> bool:
        """Whether another form may be tried."""
        return self._clock() < self._deadline

    def try_structures(self, bucket: Bucket) -> None:
        """Plain and hoisted: what hoisting wins is the most that there is to win."""
        if self.has_time:
            self._stage(bucket, [PLAIN, _HOISTED])

    def try_merged(self, bucket: Bucket) -> None:
        """Merged forms of the faster structure."""
        if self._samples[bucket]:
            best = self._best(self._samples[bucket])
            self._stage(bucket, [dataclasses.replace(best, fusion=fusion) for fusion in _MERGED])

    def try_lowered(self, bucket: Bucket) -> None:
        """Lower precisions of the two fastest structures."""
        if self._samples[bucket]:
            self._try_lowered(bucket, self._samples[bucket])
            self._bench.release(bucket, self._best(self._samples[bucket]))

    def choice(self, bucket: Bucket, decided: Mapping[Bucket, Choice]) -> Choice:
        """The choice for a bucket, from what was tried in it or from its nearest neighbour."""
        samples = self._samples[bucket]
        return self._finish(bucket, samples) if samples else self._untuned(bucket, decided)

    def _stage(self, bucket: Bucket, forms: Sequence[Form]) -> None:
        self._try(bucket, forms, self._samples[bucket])
        if self._samples[bucket]:
            self._bench.release(bucket, self._best(self._samples[bucket]))

    def others(self, choice: Choice) -> Choice:
        """The choice again, after the combinations of structure and merging not tried yet."""
        bucket = choice.bucket
        samples = {trial.form: [trial.seconds] for trial in choice.trials}
        missing = [
            Form(hoisted, fusion)
            for hoisted in (False, True)
            for fusion in Fusion
            if Form(hoisted, fusion) not in samples
        ]
        before = set(samples)
        self._try(bucket, missing, samples)
        if set(samples) == before:
            return choice
        self._try_lowered(bucket, samples)
        return self._finish(bucket, samples, choice.trials)

    def _try(self, bucket: Bucket, forms: Sequence[Form], samples: dict[Form, list[float]]) -> None:
        """Times forms in turns with the best so far, as long as there is time to compile them."""
        known = [self._best(samples)] if samples else []
        new = [form for form in forms if form not in samples]
        # The first two are compiled whatever the time: without them nothing could be compared.
        new = [form for form in new if (self.has_time or not samples) and self._bench.has(bucket, form)]
        if new:
            samples |= self._bench.times(bucket, [*known, *new])

    def _try_lowered(self, bucket: Bucket, samples: dict[Form, list[float]]) -> None:
        """Lower precisions of the two fastest structures."""
        wide = [form for form in samples if form.precision is Precision.FLOAT32]
        fastest = sorted(wide, key=lambda form: statistics.median(samples[form]))[:2]
        for precision in self._precisions:
            lowered = [dataclasses.replace(form, precision=precision) for form in fastest]
            if self._is_named and not any(form.precision is precision for form in samples):
                # Asked for, so tried whatever the time.
                found = [form for form in lowered if self._bench.has(bucket, form)]
                if found:
                    samples |= self._bench.times(bucket, [fastest[0], *found])
            else:
                self._try(bucket, lowered, samples)

    @staticmethod
    def _best(samples: Mapping[Form, Sequence[float]]) -> Form:
        eligible = {f: s for f, s in samples.items() if f.precision is Precision.FLOAT32} or samples
        return min(eligible, key=lambda form: (statistics.median(eligible[form]), form.complexity))

    def _finish(
        self, bucket: Bucket, samples: dict[Form, list[float]], earlier: Sequence[Trial] = ()
    ) -> Choice:
        """Lets the finalists run in turns, ranks them, and takes the first whose scores may be served."""
        eligible = self._eligible(samples)
        finalists = self._finalists({form: samples[form] for form in eligible})
        if len(finalists) > 1:
            samples |= self._bench.times(bucket, finalists)
        medians = {form: statistics.median(samples[form]) for form in eligible}
        ranked = choose(
            {form: samples[form] for form in finalists},
            {form: self._bench.new_bytes(bucket, form) for form in finalists},
        )
        fastest = min(finalists, key=lambda form: (medians[form], form.complexity))
        ranked += sorted((f for f in eligible if f not in finalists), key=lambda f: medians[f])
        refusals = {trial.form: trial.refusal for trial in earlier}
        chosen = self._first_allowed(bucket, ranked, refusals, samples)
        trials = tuple(
            Trial(
                form,
                statistics.median(s),
                float(np.subtract(*np.percentile(s, (75, 25)))),
                refusals.get(form, ""),
            )
            for form, s in samples.items()
        )
        reason = "fastest" if chosen == fastest else "as fast as the fastest, and simpler or prepared already"
        if any(refusals.get(form) for form in ranked[: ranked.index(chosen) if chosen in ranked else None]):
            reason = "fastest whose scores may be served"
        return Choice(bucket, chosen, trials, reason)

    @staticmethod
    def _finalists(samples: Mapping[Form, Sequence[float]]) -> list[Form]:
        """The fastest so far, by least times, which a busy spell can't spoil; the best in float32 among
        them."""
        least = {form: min(seconds) for form, seconds in samples.items()}
        ordered = sorted(least, key=lambda form: (least[form], form.complexity))
        near = [form for form in ordered if least[form] <= _FINAL_RATIO * least[ordered[0]]][:_FINALISTS]
        wide = [form for form in ordered if form.precision is Precision.FLOAT32][:1]
        return list(dict.fromkeys([*near, *wide]))

    def _eligible(self, samples: Mapping[Form, Sequence[float]]) -> list[Form]:
        if self._is_named:
            lowered = [form for form in samples if form.precision in self._precisions]
            return lowered or list(samples)
        return list(samples)

    def _first_allowed(
        self,
        bucket: Bucket,
        ranked: Sequence[Form],
        refusals: dict[Form, str],
        samples: dict[Form, list[float]],
    ) -> Form:
        for form in ranked:
            refusals[form] = self._bench.refusal(bucket, form)
            if not refusals[form]:
                return form
            whole = dataclasses.replace(form, whole_reductions=True)
            if form.hoisted and not form.whole_reductions and self._bench.has(bucket, whole):
                refusals[whole] = self._bench.refusal(bucket, whole)
                if not refusals[whole]:
                    samples |= self._bench.times(bucket, [whole])
                    return whole
        # A precision that was asked for and holds in no form: verify has the last word.
        return ranked[0] if self._is_named else PLAIN

    def _untuned(self, bucket: Bucket, decided: Mapping[Bucket, Choice]) -> Choice:
        """The nearest bucket's form, or the hoisted one, as far as it applies and may be served."""
        alike = [c for b, c in decided.items() if _sort_of(b) == _sort_of(bucket) and c.trials]
        precision = self._precisions[0] if self._is_named and self._precisions else Precision.FLOAT32
        wanted, why = dataclasses.replace(_HOISTED, precision=precision), "not tuned"
        if alike:
            nearest = min(alike, key=lambda c: (abs(np.log(c.bucket.rows / bucket.rows)), c.bucket))
            wanted, why = nearest.form, f"as bucket {nearest.bucket}: the time for tuning was up"
        elif self._is_tuning:
            why = "not tuned: the time for tuning was up"
        fallbacks = [
            wanted,
            dataclasses.replace(wanted, fusion=Fusion.UNROLLED),
            Form(hoisted=wanted.hoisted, whole_reductions=wanted.hoisted),
            dataclasses.replace(PLAIN, precision=precision),
        ]
        for form in dict.fromkeys(fallbacks):
            if self._bench.has(bucket, form):
                named = self._is_named and form.precision is not Precision.FLOAT32
                if named or not self._bench.refusal(bucket, form):
                    return Choice(bucket, form, (), why)
        return Choice(bucket, PLAIN, (), why)
