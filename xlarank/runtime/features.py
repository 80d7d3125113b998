"""Feature files of the models that a repository serves: `FeatureOptions`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from xlarank.errors import ConfigError
from xlarank.host import FeatureFile, FeatureStore, FileSource, MissPolicy
from xlarank.spec import ModelSpec

__all__ = ["FeatureOptions", "stores_by_model"]

_DEFAULT_MEMORY_BYTES = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """One feature file and how it is served."""

    path: Path
    """Folder that `xlarank features build` wrote."""

    misses: MissPolicy = MissPolicy.ERROR
    """Under `fetch` the file is the source of a cache in memory; else it is mapped and looked up itself."""

    memory_bytes: int | None = None
    """Most bytes of that cache; 1 GiB by default. For `fetch` alone."""

    def __post_init__(self) -> None:
        if self.memory_bytes is not None and self.misses is not MissPolicy.FETCH:
            raise ConfigError(
                f"features {self.path}: memory_bytes bounds the cache of misses 'fetch'; misses is "
                f"{self.misses.value!r}"
            )

    def store(self, file: FeatureFile, spec: ModelSpec) -> FeatureStore:
        """The store over the opened file.

        Raises:
          ConfigError: if the file holds other features than the model's.
        """
        if self.misses is not MissPolicy.FETCH:
            return FeatureStore(spec, file=file, misses=self.misses)
        file.schema.rows_spec(spec)
        return FeatureStore(
            spec,
            source=FileSource(file),
            without=[f.name for f in spec.candidate_features if f.name not in file.schema.names],
            misses=self.misses,
            memory_bytes=_DEFAULT_MEMORY_BYTES if self.memory_bytes is None else self.memory_bytes,
        )


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
