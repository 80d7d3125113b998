"""Rewrites of a row program that don't change its scores, one a file; each takes and gives flat equations."""

from xlarank.compiler.passes.fuse_experts import Fusion, fuse_experts, siblings_of
from xlarank.compiler.passes.hoist_context import Expansion, Hoisted, hoist_context
from xlarank.compiler.passes.lower_precision import lower_precision
from xlarank.compiler.passes.sensitivity import sensitive_matmuls

__all__ = [
    "Expansion",
    "Fusion",
    "Hoisted",
    "fuse_experts",
    "hoist_context",
    "lower_precision",
    "sensitive_matmuls",
    "siblings_of",
]
