"""DCN-v2: a cross network and a deep network (Wang et al., WWW 2021, arXiv 2008.13535)."""

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
from xlarank.models.interactions import CrossNetwork
from xlarank.models.layers import MLP
from xlarank.models.options import check_attention, check_dropout, check_positive, check_widths, from_options
from xlarank.spec import ModelSpec

__all__ = ["DCNv2", "DCNv2Config", "Structure", "build"]


class Structure(enum.StrEnum):
    """How cross and deep network are put together."""

    PARALLEL = "parallel"
    """Both read the input; the tasks read both results side by side."""

    STACKED = "stacked"
    """The deep network reads the cross network's result."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DCNv2Config:
    """Options of DCN-v2."""

    structure: Structure = Structure.PARALLEL
    """parallel or stacked."""

    num_cross_layers: int = 3
    """Cross layers."""

    cross_rank: int | None = None
    """Rank of the cross layers' weights; left out for full rank."""

    hidden: tuple[int, ...] = (512, 256)
    """Widths of the deep network's layers."""

    dropout: float = 0.0
    """Share dropped after each deep layer while training."""

    input_dropout: float = 0.0
    """Share of the concatenated input dropped while training."""

    attention: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Sequence feature → candidate feature it is attended with; other sequences are averaged."""

    def __post_init__(self) -> None:
        where = "model dcn_v2"
        try:
            object.__setattr__(self, "structure", Structure(self.structure))
        except ValueError:
            allowed = [s.value for s in Structure]
            raise ConfigError(
                f"{where}: structure must be one of {allowed}; was {self.structure!r}"
            ) from None
        check_positive(where, "num_cross_layers", self.num_cross_layers)
        if self.cross_rank is not None:
            check_positive(where, "cross_rank", self.cross_rank)
        check_widths(where, "hidden", self.hidden)
        check_dropout(where, "dropout", self.dropout)
        check_dropout(where, "input_dropout", self.input_dropout)
        check_attention(where, self.attention)


class DCNv2(nnx.Module):
    """Cross and deep network over all features, with one linear output for every task."""

    def __init__(self, spec: ModelSpec, config: DCNv2Config, *, rngs: nnx.Rngs) -> None:
        """Makes the layers for a spec's features and tasks."""
        self.task_names = tuple(task.name for task in spec.tasks)
        self.is_stacked = config.structure is Structure.STACKED
        self.inputs = FeatureVectors(spec, attention=config.attention, rngs=rngs)
        width = self.inputs.width
        self.input_dropout = nnx.Dropout(config.input_dropout, rngs=rngs) if config.input_dropout else None
        self.cross = CrossNetwork(width, config.num_cross_layers, rank=config.cross_rank, rngs=rngs)
        self.deep = MLP(width, config.hidden, dropout=config.dropout, rngs=rngs)
        out_dim = self.deep.out_dim + (0 if self.is_stacked else width)
        self.output = nnx.Linear(out_dim, len(self.task_names), rngs=rngs)

    def __call__(self, features: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Maps activations of B rows (see `xlarank.models`) to logits [B] float32 by task name."""
        x = self.inputs(features)  # [B, W]
        if self.input_dropout is not None:
            x = self.input_dropout(x)
        crossed = self.cross(x)  # [B, W]
        deep = self.deep(crossed if self.is_stacked else x)  # [B, H]
        joined = deep if self.is_stacked else jnp.concatenate([crossed, deep], axis=1)  # [B, W + H]
        logits = self.output(joined)  # [B, T]
        return {name: logits[:, index] for index, name in enumerate(self.task_names)}


def build(spec: ModelSpec, *, rngs: nnx.Rngs, **options: Any) -> DCNv2:
    """Makes a fresh DCN-v2; `options` are the fields of `DCNv2Config`."""
    return DCNv2(spec, from_options(DCNv2Config, options, "model dcn_v2"), rngs=rngs)
