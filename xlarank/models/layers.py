"""The multilayer perceptron that every model here is made of."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import jax
from flax import nnx

__all__ = ["MLP"]


class MLP(nnx.Module):
    """Dense layers, each followed by an activation and dropout.

    Attributes:
      out_dim: width of the result; the input's when there are no layers.
    """

    def __init__(
        self,
        in_dim: int,
        hidden: Sequence[int],
        *,
        dropout: float = 0.0,
        activation: Callable[[jax.Array], jax.Array] = nnx.relu,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the layers with He initialisation (arXiv 1502.01852).

        Args:
          in_dim: width of the input.
          hidden: width of each layer; empty makes the identity.
          dropout: share of activations dropped after each layer while training, in [0, 1).
          activation: element by element.
          rngs: streams ``params`` and, with dropout, ``dropout``.
        """
        widths = (in_dim, *hidden)
        self.layers = nnx.List(
            nnx.Linear(a, b, kernel_init=nnx.initializers.he_normal(), rngs=rngs)
            for a, b in itertools.pairwise(widths)
        )
        # No module without dropout: it would hold random state that a served model has no use for.
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None
        self.activation = activation
        self.out_dim = widths[-1]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, in_dim] float32 to [B, out_dim] float32."""
        for layer in self.layers:
            x = self.activation(layer(x))
            if self.dropout is not None:
                x = self.dropout(x)
        return x
