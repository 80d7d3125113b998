"""The models of a repository, loaded and answering: `ModelRepository`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from xlarank import device
from xlarank.bundle import Verify, list_versions, open_bundle
from xlarank.errors import ConfigError, ModelNotFoundError, UnavailableError
from xlarank.host import TableMemory, native_available
from xlarank.runtime.engine import Engine
from xlarank.runtime.features import FeatureOptions, stores_by_model
from xlarank.runtime.metrics import Metrics
from xlarank.runtime.pool import DevicePool
from xlarank.runtime.tables import TableBytes

__all__ = ["ModelRepository", "VersionStatus"]


@dataclasses.dataclass(frozen=True)
class VersionStatus:
    """One version of a model, as the repository's index has it."""

    model: str
    version: int
    state: str
    """READY, LOADING, UNLOADING or UNAVAILABLE."""

    reason: str
    """Why it isn't ready; "" if there is nothing to say."""


class ModelRepository:
    """The latest version of every model in a folder, on shared devices. Any thread may call it."""

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        num_devices: int | None = None,
        host_threads: int | None = None,
        compile_cache: Path | None = None,
        use_bundle_code: bool = True,
        table_memory: TableMemory | str | None = None,
        allow_reference_gather: bool = False,
        metrics: Metrics | None = None,
        features: Sequence[FeatureOptions] = (),
        on_progress: Callable[[str], None] | None = None,
        on_table_bytes: TableBytes | None = None,
    ) -> ModelRepository:
        """Loads every model; when this returns all of them are ready.

        Args:
          path: ``<path>/<model>/<version>`` are the bundles.
          num_devices, host_threads, compile_cache, use_bundle_code, table_memory, metrics, on_progress,
            on_table_bytes: see `Engine.load`.
          allow_reference_gather: serve without the native kernel, slowly.
          features: feature files to open, each for the model that it was built for.

        Raises:
          ConfigError: if the folder holds no bundle, the native kernel isn't built, memory doesn't suffice,
            or a feature file is of no model here or of other features than the model's.
          BundleError: if a bundle or a feature file is damaged.
          VerifyError: if a bundle's golden requests get other scores here.
        """
        if not native_available() and not allow_reference_gather:
            raise ConfigError(
                "the native gather kernel isn't built and the NumPy one is far slower: build it with "
                "`pip install .`, or serve all the same with --allow-reference-gather"
            )
        root = Path(path)
        if not root.is_dir():
            raise ConfigError(f"repository {root}: expected a folder of models, found none")
        versions = {model: numbers[-1] for model, numbers in list_versions(root).items() if numbers}
        if not versions and any(path.name.isdigit() for path in (root.resolve(), *root.iterdir())):
            raise ConfigError(
                f"repository {root}: expected a folder of models, found a model; serve its parent"
            )
        if not versions:
            raise ConfigError(
                f"repository {root}: expected bundles as <model>/<version>, found none; "
                f"`xlarank compile` writes them"
            )
        stores = stores_by_model(features, versions)
        device.configure(num_devices=num_devices, compile_cache=compile_cache)
        pool = DevicePool(len(device.devices(num_devices)))
        repository = cls(pool)
        try:
            for model, version in sorted(versions.items()):
                spec = open_bundle(root / model / str(version), verify=Verify.SIZES).spec
                if spec.name != model:
                    raise ConfigError(
                        f"repository {root}: folder {model!r} holds model {spec.name!r}; clients ask by "
                        f"folder and metrics count by name, so the two must be equal"
                    )
                repository._engines[model] = Engine.load(
                    root / model / str(version),
                    host_threads=host_threads,
                    use_bundle_code=use_bundle_code,
                    table_memory=table_memory,
                    pool=pool,
                    metrics=metrics,
                    features=stores[model](spec) if model in stores else None,
                    on_progress=on_progress,
                    on_table_bytes=on_table_bytes,
                )
        except BaseException:
            repository.close()
            raise
        return repository

    def __init__(self, pool: DevicePool) -> None:
        """Use `open`."""
        self._pool = pool
        self._engines: dict[str, Engine] = {}  # by model; complete before anybody else sees it
        self._is_open = True  # moves one way

    @property
    def is_ready(self) -> bool:
        """Whether every model is loaded, none has failed and none is draining."""
        return all(is_ready for _, _, is_ready in self.models()) and self._is_open

    @property
    def num_devices(self) -> int:
        """Devices that the models share."""
        return self._pool.num_devices

    def models(self) -> list[tuple[str, int, bool]]:
        """Name, version and readiness of every loaded model."""
        return [
            (name, engine.version, self._is_open and engine.fault is None)
            for name, engine in self._engines.items()
        ]

    def engine(self, name: str, version: str = "") -> Engine:
        """The engine that answers for a model.

        Args:
          name: of the model.
          version: a number, or "" for the latest.

        Raises:
          ModelNotFoundError: if there is no such model or version.
          UnavailableError: if the repository is closing, or the model has failed since it was loaded.
        """
        engine = self._engines.get(name)
        if engine is None:
            raise ModelNotFoundError(f"Request for unknown model: '{name}' is not found")
        if version and version != str(engine.version):
            raise ModelNotFoundError(
                f"Request for unknown model: '{name}' version {version} is not found; "
                f"version {engine.version} is served"
            )
        if not self._is_open:
            raise UnavailableError(f"model '{name}' is shutting down")
        if engine.fault is not None:
            raise UnavailableError(f"model '{name}' version {engine.version} has failed: {engine.fault}")
        return engine

    def index(self) -> list[VersionStatus]:
        """Every version that was loaded and its state."""
        return [
            VersionStatus(
                name, version, "READY" if is_ready else "UNAVAILABLE", self._engines[name].fault or ""
            )
            for name, version, is_ready in self.models()
        ]

    @contextlib.contextmanager
    def lease(self, name: str, version: str = "", key: str | None = None) -> Iterator[Engine]:
        """The engine for a request, kept open until the request is submitted; errors as `engine`.

        Args:
          name, version: see `engine`.
          key: requests of one key go to one version; there is one here.
        """
        yield self.engine(name, version)

    def close(self) -> None:
        """Finishes what was accepted, then stops everything."""
        self._is_open = False
        for engine in self._engines.values():
            engine.close()
        self._pool.close()
