"""The config that a bundle was compiled from: `config_of`."""

from __future__ import annotations

from pathlib import Path

from xlarank.bundle import Verify, open_bundle
from xlarank.errors import ConfigError
from xlarank.spec.config import ModelConfig, load_config, parse_config

__all__ = ["config_of"]


def config_of(bundle: Path, config: Path | None) -> ModelConfig:
    """Reads `config`, or else the text that `xlarank compile` kept in the bundle.

    Args:
      bundle: folder of a version.
      config: a file that takes precedence; modules are looked for in its folder, else in the working
        directory.

    Raises:
      ConfigError: if the bundle was built without a config and none is given.
    """
    if config is not None:
        return load_config(config)
    text = open_bundle(bundle, verify=Verify.SIZES).manifest.provenance.get("config")
    if text is None:
        raise ConfigError(f"{bundle}: was not compiled from a config, so no reader is known; give --config")
    return parse_config(text, Path("config.toml"))
