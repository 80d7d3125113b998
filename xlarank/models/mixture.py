"""The multi-gate mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from xlarank.models.layers import MLP

__all__ = ["MixtureOfExperts"]


class MixtureOfExperts(nnx.Module):
    """Experts shared by tasks, mixed by a softmax gate a task (Ma et al., KDD 2018,
    https://dl.acm.org/doi/10.1145/3219819.3220007).

    Task k gets ``sum_e softmax(W_k x)_e expert_e(x)``. Experts are written one by one, as an author would;
    joining their layers into wider matmuls is the compiler's work.
    """

    def __init__(
        self,
        in_dim: int,
        num_experts: int,
        hidden: Sequence[int],
        num_tasks: int,
        *,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes experts and gates.

        Args:
          in_dim: width of the input.
          num_experts: E.
          hidden: widths of an expert's layers, at least one.
          num_tasks: T, number of gates.
          dropout: in the experts, while training, in [0, 1).
          rngs: streams ``params`` and, with dropout, ``dropout``.
        """
        self.experts = nnx.List(MLP(in_dim, hidden, dropout=dropout, rngs=rngs) for _ in range(num_experts))
        self.gates = nnx.List(
            nnx.Linear(in_dim, num_experts, use_bias=False, rngs=rngs) for _ in range(num_tasks)
        )
        self.out_dim = hidden[-1]

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """Maps [B, in_dim] float32 to one [B, out_dim] float32 a task."""
        experts = jnp.stack([expert(x) for expert in self.experts], axis=1)  # [B, E, H]
        return [
            jnp.einsum("be,beh->bh", nnx.softmax(gate(x), axis=-1), experts)  # [B, H]
            for gate in self.gates
        ]
