"""From ``"my_file:build"`` in a config to a Flax module."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from xlarank.errors import ConfigError
from xlarank.spec import ModelSpec
from xlarank.spec.references import resolve

__all__ = ["build_model"]


def build_model(
    reference: str,
    spec: ModelSpec,
    options: Mapping[str, Any],
    rngs: nnx.Rngs,
    *,
    folders: Sequence[Path | str] = (),
) -> nnx.Module:
    """Builds the module that a config names.

    Args:
      reference: see `resolve`; the function is called as ``build(spec, rngs=rngs, **options)``.
      spec: the model.
      options: the config's ``[model_options]``.
      rngs: seeds of the fresh parameters.
      folders: see `resolve`.

    Returns:
      The fresh module.

    Raises:
      ConfigError: when the function doesn't take these arguments or returns something else than a module.
    """
    build = resolve(reference, folders=folders)
    try:
        inspect.signature(build).bind(spec, rngs=rngs, **options)
    except TypeError as error:
        call = ", ".join(["spec", "rngs=rngs", *(f"{option}=..." for option in options)])
        raise ConfigError(f"{reference!r} can't be called as build({call}): {error}") from error
    module = build(spec, rngs=rngs, **options)
    if not isinstance(module, nnx.Module):
        raise ConfigError(
            f"{reference!r}: expected build() to return an nnx.Module, got {type(module).__name__}"
        )
    return module
