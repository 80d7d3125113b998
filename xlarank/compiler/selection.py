"""What is tried, and what of it is kept: precisions before the search, buckets after it."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

import numpy as np

from xlarank.compiler.autotune import Choice, worthwhile
from xlarank.compiler.bench import DeviceBench
from xlarank.compiler.forms import PLAIN, Form, FormMaker
from xlarank.compiler.limits import MachineLimits
from xlarank.compiler.result import PassNotes
from xlarank.errors import ModelError
from xlarank.spec import Bucket, Precision, Signature
from xlarank.spec.wording import counted

__all__ = ["check_named", "failure_note", "lower_precisions", "notes_of", "worthwhile_choices"]

_MIN_GAIN = 1.1
"""How much faster a device's bare matmul must be in a lower precision to be worth a try."""


def lower_precisions(
    named: Precision | None, limits: MachineLimits, half: Precision, unlabelled: Sequence[str]
) -> tuple[list[Precision], str]:
    """Lower precisions that may be chosen, and what to say of it.

    Args:
      named: the one that was asked for; None: what pays.
      limits: measured of the device.
      half: the 16-bit format that suits the device.
      unlabelled: tasks whose AUC loss can't be known.
    """
    if named is not None:
        return ([named] if named is not Precision.FLOAT32 else []), ""
    if unlabelled:
        return [], (
            f"float32 alone was tried: the golden requests have no labels of both classes for "
            f"{', '.join(unlabelled)}, so the AUC loss of a lower precision can't be known; "
            f"give labels, or name a precision"
        )
    lower = [half, Precision.INT8]
    slow = [precision for precision in lower if limits.lower_gain[precision.value] < _MIN_GAIN]
    if not slow:
        return lower, ""
    gains = ", ".join(f"{limits.lower_gain[p.value]:.2f} times as fast in {p.value}" for p in slow)
    note = f"not tried, as a matmul on this device is {gains} as in float32"
    return [precision for precision in lower if precision not in slow], note


def check_named(model: str, named: Precision | None, choices: Sequence[Choice], bench: DeviceBench) -> None:
    """Refuses a build whose precision was named and can't run here: float32 would not be what was asked for.

    Raises:
      ModelError: with the bucket and the device's own words.
    """
    failed = {bucket for bucket, _ in bench.failures}
    for choice in choices:
        if named not in (None, choice.form.precision) and choice.bucket in failed:
            raise ModelError(
                f"model {model!r}: {failure_note(bench)}; ask for another precision than {named}"
            )


def worthwhile_choices(
    choices: Sequence[Choice],
    bench: DeviceBench,
    signature: Signature,
    limits: MachineLimits,
    on_progress: Callable[[str, int, int], None],
) -> list[Choice]:
    """Drops buckets that a neighbour of more requests serves as fast; keeps all where nothing was tuned."""
    untimed = {choice.bucket.rows for choice in choices if choice.seconds_of(choice.form) is None}
    forms: dict[int, dict[Bucket, Form]] = collections.defaultdict(dict)
    for choice in choices:
        if choice.bucket.rows not in untimed:
            forms[choice.bucket.rows][choice.bucket] = choice.form
    seconds: dict[Bucket, float] = {}
    for rows, found in forms.items():
        on_progress(f"request counts of {rows} rows", len(seconds), len(choices))
        seconds |= bench.in_turns(found)
    leaves = signature.context_leaves
    a_context = sum(int(np.prod(leaf.tail)) * np.dtype(leaf.dtype).itemsize for leaf in leaves)
    kept = set(worthwhile(seconds, a_context, limits.bytes_a_second))
    return [choice for choice in choices if choice.bucket in kept or choice.bucket.rows in untimed]


def notes_of(forms: FormMaker, choice: Choice) -> PassNotes:
    """What the passes say of the form that a bucket was given."""
    plain, chosen = forms.program(choice.bucket, PLAIN), forms.program(choice.bucket, choice.form)
    assert plain is not None
    assert chosen is not None
    return PassNotes.of(forms.hoisted(choice.bucket), plain, chosen)


def failure_note(bench: DeviceBench) -> str:
    """Which lowered forms can't run here, with XLA's words for the first; empty where all run."""
    if not bench.failures:
        return ""
    (bucket, form), reason = next(iter(bench.failures.items()))
    return (
        f"{counted(len(bench.failures), 'lowered form')} can't run on this device, the first {form.label!r} "
        f"in bucket {bucket}: {reason}"
    )
