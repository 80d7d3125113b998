"""From activations by feature to the vectors that a model's first layer reads: `FeatureVectors`."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from xlarank.errors import ConfigError
from xlarank.models.sequences import TargetAttention, masked_mean
from xlarank.spec import MASK_SUFFIX, FeatureKind, ModelSpec

__all__ = ["FeatureVectors"]


class FeatureVectors(nnx.Module):
    """One vector a feature, in the order of the ModelSpec; sequences pooled.

    A sequence named in `attention` is pooled by `TargetAttention` towards the feature named there, others
    by their masked mean.

    Attributes:
      widths: width of each feature's vector by name, in order.
      num_dense: K, floats of all dense features.
      width: sum of all widths.
    """

    def __init__(self, spec: ModelSpec, *, attention: Mapping[str, str], rngs: nnx.Rngs) -> None:
        """Checks the attention pairs and makes their projections.

        Args:
          spec: the model; its tables need not be fitted.
          attention: sequence feature → the looked-up feature that its query comes from.
          rngs: stream ``params``.

        Raises:
          ConfigError: when a pair names no sequence, or no feature with an embedding.
        """
        by_name = spec.feature_by_name
        self.widths = {f.name: spec.table_of(f).dim if f.is_lookup else f.width for f in spec.features}
        self.dense_names = tuple(f.name for f in spec.features if not f.is_lookup)
        self.sequence_names = tuple(f.name for f in spec.features if f.kind is FeatureKind.SEQUENCE)
        for sequence, query in attention.items():
            if sequence not in self.sequence_names:
                raise ConfigError(
                    f"model {spec.name!r}: attention names {sequence!r}; expected a sequence of "
                    f"{list(self.sequence_names)}"
                )
            if query not in by_name or by_name[query].kind not in (FeatureKind.ID, FeatureKind.ID_LIST):
                raise ConfigError(
                    f"model {spec.name!r}: attention of {sequence!r} reads {query!r}; expected a feature of "
                    f"kind 'id' or 'id_list'"
                )
        self.query_names = dict(attention)
        self.attention = nnx.Dict(
            {
                f"{sequence}_attention": TargetAttention(self.widths[query], self.widths[sequence], rngs=rngs)
                for sequence, query in attention.items()
            }
        )
        self.num_dense = sum(self.widths[name] for name in self.dense_names)
        self.width = sum(self.widths.values())

    def vectors(self, features: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """[B, width of the feature] float32 by feature name, in order."""
        vectors = {}
        for name in self.widths:
            if name in self.query_names:
                query = features[self.query_names[name]]
                vectors[name] = self.attention[f"{name}_attention"](
                    query, features[name], features[name + MASK_SUFFIX]
                )
            elif name in self.sequence_names:
                vectors[name] = masked_mean(features[name], features[name + MASK_SUFFIX])
            else:
                vectors[name] = features[name]
        return vectors

    def __call__(self, features: Mapping[str, jax.Array]) -> jax.Array:
        """All vectors side by side, [B, width] float32."""
        return jnp.concatenate(list(self.vectors(features).values()), axis=1)
