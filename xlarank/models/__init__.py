"""Flax definitions: the embedding collection, layers, and the models DLRM, DCN-v2 and MMoE.

A model maps activations to logits: ``__call__(features: dict[str, Array]) -> {task name: [B]}``, with dense
features [B, K_f], pooled embeddings [B, D] and sequences ``h`` [B, L, D] beside ``h.mask`` [B, L] bool.
"""

from xlarank.models.dcn_v2 import DCNv2, DCNv2Config
from xlarank.models.dlrm import DLRM, DLRMConfig
from xlarank.models.embedding import EmbeddingCollection
from xlarank.models.interactions import CrossNetwork, DotInteraction
from xlarank.models.layers import MLP
from xlarank.models.loading import build_model
from xlarank.models.mixture import MixtureOfExperts
from xlarank.models.mmoe import MMoE, MMoEConfig
from xlarank.models.sequences import TargetAttention, masked_mean

__all__ = [
    "DLRM",
    "MLP",
    "CrossNetwork",
    "DCNv2",
    "DCNv2Config",
    "DLRMConfig",
    "DotInteraction",
    "EmbeddingCollection",
    "MMoE",
    "MMoEConfig",
    "MixtureOfExperts",
    "TargetAttention",
    "build_model",
    "masked_mean",
]
