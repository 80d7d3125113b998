"""Where the rows of a batch lie in every value of a model, equation by equation: `follow`.

A model is traced at two row counts. A value whose rows lie along one axis, each made of its own row's inputs
and alike for every row, may be computed once a request and repeated for its candidates. Where that can't be
shown (rows meet, a row's number is used, an operation has no rule) nothing is claimed.
"""

from xlarank.compiler.passes.rows.follow import first_difference, follow, follow_program, layout_of_constant
from xlarank.compiler.passes.rows.layout import SAME, Counts, Layout, Place, RowAxis
from xlarank.compiler.passes.rows.pair import Pair
from xlarank.compiler.passes.rows.shapes import ELEMENTWISE

__all__ = [
    "ELEMENTWISE",
    "SAME",
    "Counts",
    "Layout",
    "Pair",
    "Place",
    "RowAxis",
    "first_difference",
    "follow",
    "follow_program",
    "layout_of_constant",
]
