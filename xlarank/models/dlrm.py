"""DLRM (Naumov et al., arXiv 1906.00091) and, with a cross in place of dot products, MLPerf's DLRM-DCNv2."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xlarank.errors import ConfigError
from xlarank.models.inputs import FeatureVectors
from xlarank.models.interactions import CrossNetwork, DotInteraction
from xlarank.models.layers import MLP
from xlarank.models.options import check_attention, check_dropout, check_positive, check_widths, from_options
from xlarank.spec import ModelSpec

__all__ = ["DLRM", "DLRMConfig", "Interaction", "build"]


class Interaction(enum.StrEnum):
    """How the feature vectors meet."""

    DOT = "dot"
    """Dot products of all pairs, beside the bottom network's result."""

    CROSS = "cross"
    """A DCN-v2 cross network over all of them side by side."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DLRMConfig:
    """Options of DLRM."""

    bottom_hidden: tuple[int, ...] = (512, 256)
    """Widths of the bottom network's hidden layers; its last layer has the embeddings' dim."""

    top_hidden: tuple[int, ...] = (512, 256)
    """Widths of the top network's layers before its outputs."""

    interaction: Interaction = Interaction.DOT
    """dot or cross."""

    num_cross_layers: int = 3
    """Cross layers, with interaction = cross."""

    cross_rank: int | None = None
    """Rank of the cross layers' weights; left out for full rank."""

    dropout: float = 0.0
    """Share dropped after each top layer while training."""

    attention: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Sequence feature → candidate feature it is attended with; other sequences are averaged."""

    def __post_init__(self) -> None:
        where = "model dlrm"
        try:
            object.__setattr__(self, "interaction", Interaction(self.interaction))
        except ValueError:
            allowed = [i.value for i in Interaction]
            raise ConfigError(
                f"{where}: interaction must be one of {allowed}; was {self.interaction!r}"
            ) from None
        check_widths(where, "bottom_hidden", self.bottom_hidden)
        check_widths(where, "top_hidden", self.top_hidden)
        check_positive(where, "num_cross_layers", self.num_cross_layers)
        if self.cross_rank is not None:
            check_positive(where, "cross_rank", self.cross_rank)
        check_dropout(where, "dropout", self.dropout)
        check_attention(where, self.attention)


class DLRM(nnx.Module):
    """Bottom network over dense features, interaction with the embeddings, top network."""

    def __init__(self, spec: ModelSpec, config: DLRMConfig, *, rngs: nnx.Rngs) -> None:
        """Makes the layers for a spec's features and tasks.

        Raises:
          ConfigError: unless all embeddings have one dim.
        """
        self.task_names = tuple(task.name for task in spec.tasks)
        self.inputs = FeatureVectors(spec, attention=config.attention, rngs=rngs)
        self.lookup_names = tuple(f.name for f in spec.features if f.is_lookup)
        dims = {self.inputs.widths[name] for name in self.lookup_names}
        if len(dims) != 1:
            raise ConfigError(f"model dlrm: expected embeddings of one dim, got {sorted(dims)}")
        (dim,) = dims
        num_dense = self.inputs.num_dense
        self.bottom = MLP(num_dense, (*config.bottom_hidden, dim), rngs=rngs) if num_dense else None
        num_vectors = len(self.lookup_names) + (1 if num_dense else 0)
        if config.interaction is Interaction.DOT:
            self.interaction = DotInteraction(num_vectors)
            top_in = self.interaction.out_dim + (dim if num_dense else 0)
        else:
            top_in = num_vectors * dim
            self.interaction = CrossNetwork(
                top_in, config.num_cross_layers, rank=config.cross_rank, rngs=rngs
            )
        if top_in == 0:
            raise ConfigError("model dlrm: one embedding and no dense feature leave nothing to interact")
        self.top = MLP(top_in, config.top_hidden, dropout=config.dropout, rngs=rngs)
        self.output = nnx.Linear(self.top.out_dim, len(self.task_names), rngs=rngs)

    def __call__(self, features: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Maps activations of B rows (see `xlarank.models`) to logits [B] float32 by task name."""
        by_name = self.inputs.vectors(features)
        vectors = [by_name[name] for name in self.lookup_names]  # F times [B, D]
        if self.bottom is not None:
            dense = jnp.concatenate([by_name[name] for name in self.inputs.dense_names], axis=1)  # [B, K]
            vectors = [self.bottom(dense), *vectors]
        if isinstance(self.interaction, DotInteraction):
            x = self.interaction(jnp.stack(vectors, axis=1))  # [B, pairs]
            if self.bottom is not None:
                x = jnp.concatenate([vectors[0], x], axis=1)  # [B, D + pairs]
        else:
            x = self.interaction(jnp.concatenate(vectors, axis=1))  # [B, n D]
        logits = self.output(self.top(x))  # [B, T]
        return {name: logits[:, index] for index, name in enumerate(self.task_names)}


def build(spec: ModelSpec, *, rngs: nnx.Rngs, **options: Any) -> DLRM:
    """Makes a fresh DLRM; `options` are the fields of `DLRMConfig`."""
    return DLRM(spec, from_options(DLRMConfig, options, "model dlrm"), rngs=rngs)
