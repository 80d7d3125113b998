"""The embedding tables of a model in training: `EmbeddingCollection`."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xlarank.errors import ConfigError
from xlarank.spec import MASK_SUFFIX, Combiner, FeatureKind, FeatureSpec, ModelSpec

__all__ = ["LENGTHS_SUFFIX", "EmbeddingCollection"]

LENGTHS_SUFFIX = ".lengths"
"""An id_list or sequence ``f`` comes as ``f`` [B, L] and ``f.lengths`` [B]."""

INIT_STD = 0.05
"""Standard deviation of fresh table rows."""


class EmbeddingCollection(nnx.Module):
    """Every table of a model and the plain JAX lookup that defines what an activation is.

    Row numbers come in, activations go out; hashing, vocabularies and out-of-range policies are the
    host's work (`xlarank.host.preprocessing`). Training learns the tables here; at compile time they
    leave as host arrays and the collection isn't part of the device program.

    Attributes:
      tables: one Param [R, D] float32 a table; that of table ``x`` is called ``x_table``.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        rngs: nnx.Rngs | None = None,
        tables: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Makes fresh tables, normal with standard deviation 0.05, or takes given ones.

        Args:
          spec: a fitted spec; the rows of its tables are known.
          rngs: its stream ``params`` draws fresh rows.
          tables: [R, D] float32 by name, instead of `rngs`.

        Raises:
          ConfigError: when a table's rows are not fitted, or given tables don't fit the spec.
        """
        self.spec = spec
        if tables is None:
            if rngs is None:
                raise ConfigError(f"model {spec.name!r}: expected rngs or tables, got neither")
            init = nnx.initializers.normal(INIT_STD)
            arrays = {t.name: init(rngs.params(), (t.num_rows, t.dim), jnp.float32) for t in spec.tables}
        else:
            arrays = {name: jnp.asarray(rows) for name, rows in self._checked(tables).items()}
        self.tables = nnx.Dict({_key(name): nnx.Param(rows) for name, rows in arrays.items()})

    def __call__(self, inputs: Mapping[str, jax.Array | np.ndarray]) -> dict[str, jax.Array]:
        """Looks up and pools.

        Args:
          inputs: what `xlarank.host.preprocessing.model_inputs` gives for B rows: a dense ``f`` [B, K_f]
            float32; an id ``f`` [B] int32; an id_list or sequence ``f`` [B, L] int32, left-aligned, and
            ``f.lengths`` [B] int32, each in [0, L]. Row -1 reads as zeros; inside a bag it counts.

        Returns:
          dense [B, K_f] as it came; ids and id_lists pooled [B, D]; a sequence ``h`` [B, L, D], zeros
          beyond its length, and ``h.mask`` [B, L] bool.
        """
        activations: dict[str, jax.Array] = {}
        for feature in self.spec.features:
            values = jnp.asarray(inputs[feature.name])
            if not feature.is_lookup:
                activations[feature.name] = values
                continue
            vectors = self._rows_of(feature, values)
            if feature.kind is FeatureKind.ID:
                activations[feature.name] = vectors
                continue
            lengths = jnp.asarray(inputs[feature.name + LENGTHS_SUFFIX])
            mask = jnp.arange(values.shape[1], dtype=lengths.dtype)[None, :] < lengths[:, None]  # [B, L]
            vectors = jnp.where(mask[:, :, None], vectors, 0.0)  # [B, L, D]
            if feature.kind is FeatureKind.SEQUENCE:
                activations[feature.name] = vectors
                activations[feature.name + MASK_SUFFIX] = mask
            else:
                activations[feature.name] = _pool(feature, vectors, lengths)
        return activations

    def to_numpy(self) -> dict[str, np.ndarray]:
        """The tables by name, each [R, D] float32, C-contiguous."""
        return {
            table.name: np.ascontiguousarray(np.asarray(self.tables[_key(table.name)][...], np.float32))
            for table in self.spec.tables
        }

    def _checked(self, tables: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [table.name for table in self.spec.tables]
        if sorted(tables) != sorted(names):
            raise ConfigError(f"model {self.spec.name!r}: expected tables {names}, got {sorted(tables)}")
        checked = {name: np.asarray(tables[name], np.float32) for name in names}
        for table in self.spec.tables:
            shape = checked[table.name].shape
            if shape != (table.num_rows, table.dim):
                raise ConfigError(
                    f"table {table.name!r}: expected shape {[table.num_rows, table.dim]}, got {list(shape)}"
                )
        return checked

    def _rows_of(self, feature: FeatureSpec, rows: jax.Array) -> jax.Array:
        """Table rows of row numbers [...], as [..., D]; -1 gives zeros."""
        assert feature.table is not None
        table = self.tables[_key(feature.table)][...]  # [R, D]
        vectors = jnp.take(table, jnp.maximum(rows, 0), axis=0, mode="clip")  # [..., D]
        return jnp.where((rows >= 0)[..., None], vectors, 0.0)


def _key(table: str) -> str:
    """Entries of an nnx.Dict are its attributes: a table called "items" would hide that method."""
    return f"{table}_table"


def _pool(feature: FeatureSpec, vectors: jax.Array, lengths: jax.Array) -> jax.Array:
    """Pools [B, L, D], zeros beyond the lengths [B], into [B, D]."""
    total = vectors.sum(axis=1)  # [B, D]
    if feature.combiner is Combiner.SUM:
        return total
    # An empty bag is zeros over one, not over nothing.
    count = jnp.maximum(lengths, 1).astype(total.dtype)[:, None]  # [B, 1]
    return total / (jnp.sqrt(count) if feature.combiner is Combiner.SQRTN else count)
