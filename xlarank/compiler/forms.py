"""The forms that a bucket's program can have, and making each: `Form`, `FormMaker`."""

from __future__ import annotations

import dataclasses

from xlarank.compiler.passes import Fusion, Hoisted, fuse_experts, hoist_context, lower_precision
from xlarank.compiler.program import Program, Traces, plain_program
from xlarank.spec import Bucket, Precision, Signature

__all__ = ["PLAIN", "Form", "FormMaker"]

_FUSIONS = tuple(Fusion)
_PRECISIONS = tuple(Precision)


@dataclasses.dataclass(frozen=True)
class Form:
    """What the passes do to the model for one bucket. Static."""

    hoisted: bool = False
    """Whether the context's share runs once a request."""

    fusion: Fusion = Fusion.UNROLLED
    """How sibling matmuls are computed."""

    precision: Precision = Precision.FLOAT32
    """What matmuls with weights multiply in."""

    whole_reductions: bool = False
    """Whether a hoisted program keeps reductions over concatenations whole, in the model's own order."""

    def __str__(self) -> str:
        """Without the precision: ``plain``, ``hoisted, wide``."""
        names = ["hoisted" if self.hoisted else ""]
        names += [self.fusion.value if self.fusion is not Fusion.UNROLLED else ""]
        names += ["whole reductions" if self.whole_reductions else ""]
        return ", ".join(name for name in names if name) or "plain"

    @property
    def label(self) -> str:
        """With the precision where it is lowered: ``hoisted, int8``."""
        return str(self) if self.precision is Precision.FLOAT32 else f"{self}, {self.precision.value}"

    @property
    def complexity(self) -> tuple[int, ...]:
        """Smaller is simpler: a tie goes to the simpler form."""
        return (
            _PRECISIONS.index(self.precision),
            _FUSIONS.index(self.fusion),
            int(self.hoisted),
            int(self.whole_reductions),
        )

    def to_dict(self) -> dict[str, object]:
        """JSON values for `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, object]) -> Form:
        """Reads `to_dict`'s values."""
        return cls(
            hoisted=bool(value["hoisted"]),
            fusion=Fusion(value["fusion"]),
            precision=Precision(value["precision"]),
            whole_reductions=bool(value["whole_reductions"]),
        )


PLAIN = Form()


class FormMaker:
    """Makes programs of one model in any form, each step once a bucket."""

    def __init__(self, traces: Traces, signature: Signature) -> None:
        """
        Args:
          traces: of the model.
          signature: layout of the leaves.
        """
        self._traces = traces
        self._signature = signature
        self._programs: dict[tuple[Bucket, Form], Program | None] = {}
        self._hoisted: dict[tuple[Bucket, bool], Hoisted] = {}

    def program(self, bucket: Bucket, form: Form) -> Program | None:
        """The program; None where the form doesn't apply to the model in this bucket.

        Raises:
          ModelError: if the model can't be traced.
        """
        key = (bucket, form)
        if key not in self._programs:
            self._programs[key] = self._make(bucket, form)
        return self._programs[key]

    def hoisted(self, bucket: Bucket, *, whole_reductions: bool = False) -> Hoisted:
        """What `hoist_context` did, with its reasons and expansions."""
        key = (bucket, whole_reductions)
        if key not in self._hoisted:
            self._hoisted[key] = hoist_context(
                self._traces, self._signature, bucket, split_reductions=not whole_reductions
            )
        return self._hoisted[key]

    def _make(self, bucket: Bucket, form: Form) -> Program | None:
        if form.precision is not Precision.FLOAT32:
            wide = self.program(bucket, dataclasses.replace(form, precision=Precision.FLOAT32))
            return None if wide is None else lower_precision(wide, form.precision)
        if form.fusion is not Fusion.UNROLLED:
            unrolled = self.program(bucket, dataclasses.replace(form, fusion=Fusion.UNROLLED))
            return None if unrolled is None else fuse_experts(unrolled, form.fusion)
        if form.hoisted:
            return self.hoisted(bucket, whole_reductions=form.whole_reductions).program
        return plain_program(self._traces, self._signature, bucket)
