"""Feature interactions: the cross network of DCN-v2 and the dot products of DLRM."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

__all__ = ["CrossNetwork", "DotInteraction"]


class CrossNetwork(nnx.Module):
    """Cross layers of DCN-v2 (Wang et al., WWW 2021, arXiv 2008.13535).

    Full rank: ``x_{l+1} = x_0 * (W_l x_l + b_l) + x_l``. Low rank: ``W_l = U_l V_l`` with V_l [r, D] and
    U_l [D, r], which costs ``2 D r`` multiplications a row instead of ``D^2``.
    """

    def __init__(self, dim: int, num_layers: int, *, rank: int | None = None, rngs: nnx.Rngs) -> None:
        """Makes the layers with Glorot initialisation.

        Args:
          dim: D, width of the input.
          num_layers: how many cross layers; 0 makes the identity.
          rank: r; None for full rank.
          rngs: stream ``params``.
        """
        self.down = (
            None
            if rank is None
            else nnx.List(nnx.Linear(dim, rank, use_bias=False, rngs=rngs) for _ in range(num_layers))
        )
        self.up = nnx.List(
            nnx.Linear(
                dim if rank is None else rank, dim, kernel_init=nnx.initializers.glorot_normal(), rngs=rngs
            )
            for _ in range(num_layers)
        )

    def __call__(self, x0: jax.Array) -> jax.Array:
        """Maps [B, D] float32 to [B, D] float32."""
        x = x0
        for index, up in enumerate(self.up):
            low = x if self.down is None else self.down[index](x)  # [B, D] or [B, r]
            x = x0 * up(low) + x
        return x


class DotInteraction(nnx.Module):
    """Dot products of every pair of feature vectors, as in DLRM (Naumov et al., arXiv 1906.00091)."""

    def __init__(self, num_vectors: int) -> None:
        """Fixes the pairs.

        Args:
          num_vectors: n, how many vectors a row has.
        """
        self.num_vectors = num_vectors
        self.out_dim = num_vectors * (num_vectors - 1) // 2

    def __call__(self, vectors: jax.Array) -> jax.Array:
        """Maps [B, n, D] float32 to [B, n (n - 1) / 2] float32: the pairs (i, j), j < i, row by row."""
        products = jnp.einsum("bnd,bmd->bnm", vectors, vectors)  # [B, n, n]
        i, j = np.tril_indices(self.num_vectors, -1)
        flat = products.reshape(products.shape[0], -1)  # [B, n * n]
        return jnp.take(flat, np.int32(i * self.num_vectors + j), axis=1, mode="clip")
