"""Whose measured times a subcommand goes by: `profile_of`."""

from __future__ import annotations

from xlarank.bundle import Manifest
from xlarank.errors import ConfigError
from xlarank.spec import LatencyProfile

__all__ = ["profile_of"]


def profile_of(manifest: Manifest, path: str, kind: str | None) -> tuple[str, LatencyProfile]:
    """The device kind that is meant, and its times; ConfigError where that isn't clear."""
    kinds = sorted(manifest.latency)
    if kind is None and len(kinds) > 1:
        raise ConfigError(f"{path}: has times of the device kinds {kinds}; choose one with --device-kind")
    if kind is not None and kind not in kinds:
        raise ConfigError(f"{path}: expected --device-kind of {kinds}, got {kind!r}")
    chosen = kinds[0] if kind is None else kind
    return chosen, manifest.latency[chosen]
