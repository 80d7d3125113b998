"""Feature files of the models that a repository serves: `stores_by_model`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence

from xlarank.errors import ConfigError
from xlarank.host import FeatureFile, FeatureOptions, FeatureStore
from xlarank.spec import ModelSpec

__all__ = ["stores_by_model"]


def stores_by_model(
    features: Sequence[FeatureOptions], models: Collection[str] | None
) -> dict[str, Callable[[ModelSpec], FeatureStore]]:
    """Opens feature files, before anything slow is done.

    Args:
      features: at most one a model.
      models: names of those that are served; None where others may come.

    Returns:
      For the name of each model that has a file, what makes its store.

    Raises:
      ConfigError: for a file of a model that isn't served, or two of one.
      BundleError: if a file is damaged.
    """
    stores: dict[str, Callable[[ModelSpec], FeatureStore]] = {}
    for options in features:
        file = FeatureFile.open(options.path)
        if models is not None and file.model not in models:
            raise ConfigError(
                f"features {options.path}: was built for model {file.model!r}; served are {sorted(models)}"
            )
        if file.model in stores:
            raise ConfigError(f"features {options.path}: model {file.model!r} has a feature file already")
        stores[file.model] = functools.partial(options.store, file)
    return stores
