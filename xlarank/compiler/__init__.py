"""Offline: analyze, split, lower, verify and build a Flax model into a bundle."""

from xlarank.compiler.analyze import Analysis, analyze
from xlarank.compiler.build import BuildOptions, BuildResult, build, build_bundle
from xlarank.compiler.golden import random_requests
from xlarank.compiler.reference import reference_scores

__all__ = [
    "Analysis",
    "BuildOptions",
    "BuildResult",
    "analyze",
    "build",
    "build_bundle",
    "random_requests",
    "reference_scores",
]
