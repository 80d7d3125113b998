"""Pooling of sequences: the mean of what is there, and attention towards a candidate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

__all__ = ["TargetAttention", "masked_mean"]


def masked_mean(sequence: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the steps that the mask keeps.

    Args:
      sequence: [B, L, D] float32.
      mask: [B, L] bool.

    Returns:
      [B, D] float32; zeros for a row whose mask is all False.
    """
    total = jnp.where(mask[:, :, None], sequence, 0.0).sum(axis=1)  # [B, D]
    count = jnp.maximum(mask.sum(axis=1, dtype=jnp.int32), 1).astype(total.dtype)  # [B]
    return total / count[:, None]


class TargetAttention(nnx.Module):
    """What of a history matters for this candidate, after Deep Interest Network (Zhou et al., KDD 2018,
    arXiv 1706.06978), with the scaled dot product of arXiv 1706.03762 in place of its small network.

    ``sum_l softmax_l(q . k_l / sqrt(D)) k_l`` with ``q = W candidate`` and the steps as both keys and values.
    """

    def __init__(self, query_dim: int, dim: int, *, rngs: nnx.Rngs) -> None:
        """Makes the query projection.

        Args:
          query_dim: width of the candidate's vector.
          dim: D of the sequence.
          rngs: stream ``params``.
        """
        self.query = nnx.Linear(query_dim, dim, kernel_init=nnx.initializers.glorot_normal(), rngs=rngs)
        self.dim = dim

    def __call__(self, candidate: jax.Array, sequence: jax.Array, mask: jax.Array) -> jax.Array:
        """Pools a history.

        Args:
          candidate: [B, query_dim] float32.
          sequence: [B, L, D] float32.
          mask: [B, L] bool.

        Returns:
          [B, D] float32; zeros for a row whose mask is all False.
        """
        query = self.query(candidate) * np.float32(1 / np.sqrt(self.dim))  # [B, D]
        scores = jnp.einsum("bd,bld->bl", query, sequence)  # [B, L]
        # A finite floor, because an infinite one makes NaN of a row without any step.
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        weights = jnp.where(mask, nnx.softmax(scores, axis=-1), 0.0)  # [B, L]
        return jnp.einsum("bl,bld->bd", weights, sequence)
