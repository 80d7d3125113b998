"""MMoE over an optional DCN-v2 cross: experts shared by the tasks, a gate and a tower a task.

Ma et al., KDD 2018, https://dl.acm.org/doi/10.1145/3219819.3220007; the cross of arXiv 2008.13535.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from xlarank.models.inputs import FeatureVectors
from xlarank.models.interactions import CrossNetwork
from xlarank.models.layers import MLP
from xlarank.models.mixture import MixtureOfExperts
from xlarank.models.options import check_attention, check_dropout, check_positive, check_widths, from_options
from xlarank.spec import ModelSpec

__all__ = ["MMoE", "MMoEConfig", "build"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MMoEConfig:
    """Options of MMoE."""

    num_experts: int = 8
    """E, experts shared by all tasks."""

    expert_hidden: tuple[int, ...] = (512, 256)
    """Widths of an expert's layers."""

    tower_hidden: tuple[int, ...] = (64,)
    """Widths of a task tower's hidden layers."""

    num_cross_layers: int = 0
    """DCN-v2 cross layers before the experts."""

    cross_rank: int | None = None
    """Rank of the cross layers' weights; left out for full rank."""

    dropout: float = 0.0
    """Share dropped after each layer of experts and towers while training."""

    input_dropout: float = 0.0
    """Share of the concatenated input dropped while training."""

    attention: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Sequence feature → candidate feature it is attended with; other sequences are averaged."""

    def __post_init__(self) -> None:
        where = "model mmoe"
        check_positive(where, "num_experts", self.num_experts)
        check_widths(where, "expert_hidden", self.expert_hidden, min_layers=1)
        check_widths(where, "tower_hidden", self.tower_hidden)
        check_positive(where, "num_cross_layers", self.num_cross_layers, least=0)
        if self.cross_rank is not None:
            check_positive(where, "cross_rank", self.cross_rank)
        check_dropout(where, "dropout", self.dropout)
        check_dropout(where, "input_dropout", self.input_dropout)
        check_attention(where, self.attention)


class MMoE(nnx.Module):
    """Multi-gate mixture of experts over all features."""

    def __init__(self, spec: ModelSpec, config: MMoEConfig, *, rngs: nnx.Rngs) -> None:
        """Makes the layers for a spec's features and tasks."""
        self.task_names = tuple(task.name for task in spec.tasks)
        num_tasks = len(self.task_names)
        self.inputs = FeatureVectors(spec, attention=config.attention, rngs=rngs)
        width = self.inputs.width
        self.input_dropout = nnx.Dropout(config.input_dropout, rngs=rngs) if config.input_dropout else None
        self.cross = CrossNetwork(width, config.num_cross_layers, rank=config.cross_rank, rngs=rngs)
        self.mixture = MixtureOfExperts(
            width, config.num_experts, config.expert_hidden, num_tasks, dropout=config.dropout, rngs=rngs
        )
        self.towers = nnx.List(
            MLP(self.mixture.out_dim, config.tower_hidden, dropout=config.dropout, rngs=rngs)
            for _ in range(num_tasks)
        )
        self.outputs = nnx.List(nnx.Linear(tower.out_dim, 1, rngs=rngs) for tower in self.towers)

    def __call__(self, features: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Maps activations of B rows (see `xlarank.models`) to logits [B] float32 by task name."""
        x = self.inputs(features)  # [B, W]
        if self.input_dropout is not None:
            x = self.input_dropout(x)
        mixed = self.mixture(self.cross(x))  # T times [B, H]
        return {
            name: output(tower(h))[:, 0]
            for name, h, tower, output in zip(self.task_names, mixed, self.towers, self.outputs, strict=True)
        }


def build(spec: ModelSpec, *, rngs: nnx.Rngs, **options: Any) -> MMoE:
    """Makes a fresh MMoE; `options` are the fields of `MMoEConfig`."""
    return MMoE(spec, from_options(MMoEConfig, options, "model mmoe"), rngs=rngs)
