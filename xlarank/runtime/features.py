"""Feature stores of the models that a repository serves: `ModelStores`, `stores_by_model`."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from xlarank.errors import ConfigError
from xlarank.host import FeatureFile, FeatureOptions, FeatureStore
from xlarank.spec import ModelSpec

__all__ = ["ModelStores", "stores_by_model"]

_log = logging.getLogger(__name__)


class ModelStores:
    """The feature stores of one model's versions. For the thread that loads versions.

    Attributes:
      last: of the version loaded last; None before the first.
    """

    def __init__(self, options: FeatureOptions, file: FeatureFile | None) -> None:
        """
        Args:
          options: how its file or source is served.
          file: it, opened; None for a source.
        """
        self.last: FeatureStore | None = None
        self._options = options
        self._file = file

    def refresh(self) -> None:
        """Opens the file again if another lies in its place: versions loaded from then on read that one.

        Raises:
          BundleError: if nothing lies there, or what does is damaged.
          ConfigError: if it is of another model.
        """
        if self._file is None or not self._file.is_replaced():
            return
        path, file = self._options.path, FeatureFile.open(self._options.path)
        if file.model != self._file.model:
            raise ConfigError(
                f"features {path}: was replaced by a file of model {file.model!r}; expected one of model "
                f"{self._file.model!r}"
            )
        self._file = file
        _log.info("features %s: was replaced, by %d rows: versions read it from now on", path, file.num_rows)

    def store(self, path: Path, spec: ModelSpec, peers: Iterable[FeatureStore]) -> FeatureStore:
        """One store for all versions with the same features and file, so that updates of it outlive a swap.

        Another version gets a store of its own, if the file suits it, without the rows that were put into the
        one before.

        Args:
          path: of the version, for messages.
          spec: of the version.
          peers: stores of versions that are loaded.

        Raises:
          ConfigError: if the file holds other features than the model's, or the source can't be made.
        """
        for store in (*peers, *([] if self.last is None else [self.last])):
            if store.spec.features == spec.features and self._is_over_file(store):
                return store
        if self.last is not None and (num_updates := self.last.stats().version):
            same = self.last.spec.features == spec.features
            _log.warning(
                "%s: has %s than the version before: the %d updates of the feature store since the start are "
                "not in its store",
                path,
                "another feature file" if same else "other features",
                num_updates,
            )
        return self._options.store(self._file, spec)

    def _is_over_file(self, store: FeatureStore) -> bool:
        return self._file is None or (store.file is not None and store.file.digest == self._file.digest)


def stores_by_model(
    features: Sequence[FeatureOptions], models: Collection[str] | None
) -> dict[str, ModelStores]:
    """Opens feature files and looks for sources, before anything slow is done.

    Args:
      features: at most one a model.
      models: names of those that are served; None where others may come.

    Returns:
      For the name of each model that has one, what makes its stores.

    Raises:
      ConfigError: for those of a model that isn't served, two of one, or a source that there isn't.
      BundleError: if a file is damaged.
    """
    stores: dict[str, ModelStores] = {}
    for options in features:
        model, file = options.open()
        if problem := options.model_problem(model, models, stores):
            raise ConfigError(problem)
        stores[model] = ModelStores(options, file)
    return stores
