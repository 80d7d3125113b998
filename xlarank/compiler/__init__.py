"""Offline: analyze, split, lower, verify and build a Flax model into a bundle."""

from xlarank.compiler.analyze import Analysis, analyze
from xlarank.compiler.build import build, build_bundle
from xlarank.compiler.golden import random_requests
from xlarank.compiler.options import BuildOptions, Traffic
from xlarank.compiler.placement import PlacementPolicy
from xlarank.compiler.reference import reference_scores
from xlarank.compiler.result import BuildResult

__all__ = [
    "Analysis",
    "BuildOptions",
    "BuildResult",
    "PlacementPolicy",
    "Traffic",
    "analyze",
    "build",
    "build_bundle",
    "random_requests",
    "reference_scores",
]
