"""Where a serialised ModelInferRequest of the Open Inference Protocol has its tensors: `RawMessage`.

A parser makes an object of each input of a message and a copy of its contents. Here contents are found in
place, if the message has the usual form. What hasn't is left to the parser, and so is everything that is
wrong with a message: there are the words for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from xlarank.host._extension import native

__all__ = ["InferForms", "RawMessage"]


class RawMessage:
    """A message whose tensors were found. Immutable.

    Attributes:
      data: the message.
      rest: a message of the same type, without inputs and raw contents.
      num_inputs: in `data`.
    """

    __slots__ = ("data", "found", "num_inputs", "rest")

    @classmethod
    def read(cls, data: bytes) -> RawMessage | None:
        """Finds the tensors of a message.

        Returns:
          None for one that is malformed, or has typed contents, parameters of an input, or something else
          that is seldom sent: parse it. None for every message where the native kernel isn't built.
        """
        found = None if native is None else native.InferMessage.read(data)
        return None if found is None else cls(data, found)

    def __init__(self, data: bytes, found: Any) -> None:
        """Use `read`."""
        self.data = data
        self.found = found
        self.rest: bytes = found.rest
        self.num_inputs: int = found.num_inputs


class InferForms:
    """The inputs that a model takes, each in its usual form. Immutable; any thread."""

    def __init__(self, inputs: Iterable[tuple[str, str, int, int, bool]]) -> None:
        """
        Args:
          inputs: of each one its name, its datatype in the protocol's words, bytes of an item (0 for
            strings), items a row, and whether its shape is [rows, items]. Where that is so and it is of
            one item, [rows] will do too.
        """
        self._forms = None
        if native is not None:
            self._forms = native.InferForms()
            for each in inputs:
                self._forms.add(*each)

    def locate(self, message: RawMessage) -> list[int] | None:
        """Where a message has the raw contents of these inputs.

        Returns:
          Offset in its data, bytes and rows of each, one after the other; the offset is -1 for one that
          wasn't sent. None if the message has another input, one twice, or one in another form or size.
        """
        return None if self._forms is None else self._forms.locate(message.found)
