"""Where the leaves of a batch lie in one piece of memory: `BatchLayout`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax import lax

from xlarank.errors import ConfigError
from xlarank.host import aligned_empty
from xlarank.spec import Bucket, Signature

__all__ = ["BatchLayout"]

_ALIGNMENT = 64
_WORD_BYTES = 4


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """Where the leaves of one bucket lie in one array of 32-bit words: one after the other, each 64-byte
    aligned. Static.

    Words rather than bytes: most leaves are float32 or int32, and to XLA those are a slice of words by
    another name. Out of bytes it would put every value together with shifts.
    """

    shapes: tuple[tuple[int, ...], ...]
    """Of the leaves: those of the context, those of the candidates, ``request_of_row``."""

    dtypes: tuple[np.dtype, ...]
    """Of the same; of 4 bytes at most, as JAX has them without ``jax_enable_x64``."""

    @classmethod
    def of(cls, signature: Signature, bucket: Bucket) -> BatchLayout:
        """The layout of a bucket's leaves in the order of the signature, which is that of the arguments of
        every row program."""
        return cls(
            tuple(leaf.shape(bucket) for leaf in signature.leaves),
            tuple(np.dtype(leaf.dtype) for leaf in signature.leaves),
        )

    @property
    def num_words(self) -> int:
        """Of the array."""
        return self._begins[-1] // _WORD_BYTES

    def views(self, words: np.ndarray) -> list[np.ndarray]:
        """The leaves in memory.

        Args:
          words: [W] uint32 or more, which the views share.
        """
        memory = words.view(np.uint8)
        return [
            memory[begin : begin + num_bytes].view(dtype).reshape(shape)
            for begin, num_bytes, dtype, shape in zip(
                self._begins, self._num_bytes, self.dtypes, self.shapes, strict=False
            )
        ]

    def pack(self, names: Sequence[str], arrays: Sequence[np.ndarray]) -> np.ndarray:
        """[W] uint32 with copies of leaves that lie elsewhere; new memory each time.

        Args:
          names: of the leaves, for messages.
          arrays: the leaves.

        Raises:
          ConfigError: if one has another shape or dtype.
        """
        words = aligned_empty((self.num_words,), np.uint32, _ALIGNMENT)
        for name, array, view in zip(names, arrays, self.views(words), strict=True):
            if array.shape != view.shape or array.dtype != view.dtype:
                raise ConfigError(
                    f"leaf {name!r}: expected {view.dtype}{list(view.shape)}, "
                    f"got {array.dtype}{list(array.shape)}"
                )
            view[...] = array
        return words

    def unpack(self, words: jax.Array) -> list[jax.Array]:
        """The leaves on a device, inside a program that is traced.

        Args:
          words: [W] uint32.
        """
        return [
            _leaf(words, begin // _WORD_BYTES, dtype, shape)
            for begin, dtype, shape in zip(self._begins, self.dtypes, self.shapes, strict=False)
        ]

    @functools.cached_property
    def _num_bytes(self) -> tuple[int, ...]:
        return tuple(
            math.prod(shape) * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        )

    @functools.cached_property
    def _begins(self) -> tuple[int, ...]:
        """First byte of each leaf, and after them the end of the last."""
        padded = (-(-num_bytes // _ALIGNMENT) * _ALIGNMENT for num_bytes in self._num_bytes)
        return tuple(itertools.accumulate(padded, initial=0))


def _leaf(words: jax.Array, begin: int, dtype: np.dtype, shape: tuple[int, ...]) -> jax.Array:
    num_values = math.prod(shape)
    num_words = -(-num_values * dtype.itemsize // _WORD_BYTES)
    own = lax.slice(words, (begin,), (begin + num_words,))
    is_bool = dtype.kind == "b"  # has no bits to XLA
    stored = np.dtype(np.uint8) if is_bool else dtype
    values = lax.bitcast_convert_type(own, stored).reshape(-1)  # two or four a word, where they are smaller
    values = lax.slice(values, (0,), (num_values,)).reshape(shape)
    return values != 0 if is_bool else values
