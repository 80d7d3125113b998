"""Where a model's candidate features come from and how they are served: `FeatureOptions`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection
from pathlib import Path

from xlarank.errors import ConfigError, XlarankError
from xlarank.host.feature_file import FeatureFile
from xlarank.host.feature_source import FeatureSource, FileSource
from xlarank.host.feature_store import DEFAULT_FETCH_TIMEOUT_MS, FeatureStore, MissPolicy, check_cache_bounds
from xlarank.spec import ModelSpec
from xlarank.spec.fields import from_words
from xlarank.spec.references import resolve

__all__ = ["FeatureOptions"]

_DEFAULT_MEMORY_BYTES = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """One feature file, or one model's source, and how it is served."""

    path: Path
    """Folder that `xlarank features build` wrote; with `source` the name of the model."""

    source: str | None = None
    """Instead of a file, ``module:function``, called with the model's spec: gives a `FeatureSource`. The
    module is a file in the folder of `path` or the working directory, or what Python can import."""

    without: tuple[str, ...] = ()
    """Candidate features that requests bring; a file says it itself."""

    misses: MissPolicy = MissPolicy.ERROR
    """Under `fetch` the file is the source of a cache in memory; else it is mapped and looked up itself. A
    source is for `fetch` alone."""

    memory_bytes: int | None = None
    """Most bytes of that cache; 1 GiB by default. For `fetch` alone."""

    max_age_seconds: float | None = None
    """A row of that cache is read from the file again after so long; None: never for its age. For `fetch`
    alone."""

    fetch_timeout_ms: float | None = None
    """Most that a request waits for the source; 100 by default. For `fetch` alone."""

    def __post_init__(self) -> None:
        if self.source is not None and self.misses is not MissPolicy.FETCH:
            raise ConfigError(
                f"features {self.path}: a source is asked under misses 'fetch'; misses is "
                f"{self.misses.value!r}"
            )
        if self.source is None and self.without:
            raise ConfigError(f"features {self.path}: a file says itself which features it is without")
        for field in ("memory_bytes", "max_age_seconds", "fetch_timeout_ms"):
            if getattr(self, field) is not None and self.misses is not MissPolicy.FETCH:
                raise ConfigError(
                    f"features {self.path}: {field} is for the cache of misses 'fetch'; misses is "
                    f"{self.misses.value!r}"
                )
        check_cache_bounds(
            f"features {self.path}", self.memory_bytes, self.max_age_seconds, self.fetch_timeout_ms
        )

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        misses: MissPolicy = MissPolicy.ERROR,
        memory_bytes: int | None = None,
        max_age_seconds: float | None = None,
        fetch_timeout_ms: float | None = None,
    ) -> FeatureOptions:
        """What one file's text says, such as ``feed.features,misses=fetch,max_age_seconds=60``.

        Args:
          text: the path; behind it, each after a comma, the other fields that are this file's own.
          misses: if the text doesn't say, nor names a source.
          memory_bytes: likewise, of files whose misses are `fetch`.
          max_age_seconds: likewise.
          fetch_timeout_ms: likewise.

        Raises:
          ConfigError: for a field that there isn't, or that is no such value.
        """
        readers = {
            "source": str,
            "without": lambda names: tuple(names.split("+")),
            "misses": MissPolicy,
            "memory_bytes": int,
            "max_age_seconds": float,
            "fetch_timeout_ms": float,
        }
        path, fields = from_words("features", text, "PATH", readers)
        misses = fields.setdefault("misses", MissPolicy.FETCH if "source" in fields else misses)
        if misses is MissPolicy.FETCH:
            of_all = {
                "memory_bytes": memory_bytes,
                "max_age_seconds": max_age_seconds,
                "fetch_timeout_ms": fetch_timeout_ms,
            }
            fields = of_all | fields
        return cls(path=Path(path), **fields)

    def open(self) -> tuple[str, FeatureFile | None]:
        """The model's name and its file; with a source, which is then looked for but not called yet, None.

        Raises:
          ConfigError: if there is no such source.
          BundleError: if the file is damaged.
        """
        if self.source is None:
            file = FeatureFile.open(self.path)
            return file.model, file
        try:
            function = resolve(self.source, folders=[self.path.parent])
            inspect.signature(function).bind(None)
        except XlarankError:
            raise
        except TypeError as error:
            raise ConfigError(
                f"features {self.path}: source {self.source!r} can't be called with the model's spec: {error}"
            ) from error
        except Exception as error:
            raise self._failed(error) from error
        return self.path.name, None

    def model_problem(
        self, model: str, models: Collection[str] | None, others: Collection[str]
    ) -> str | None:
        """Why it can't be that model's; None if it can.

        Args:
          model: of `open`.
          models: that are served; None where others may come.
          others: models that have a file or source already.
        """
        if models is not None and model not in models:
            is_for = f"was built for model {model!r}" if self.source is None else f"is for model {model!r}"
            return f"features {self.path}: {is_for}; served are {sorted(models)}"
        if model in others:
            return f"features {self.path}: model {model!r} has a feature file or source already"
        return None

    def store(self, file: FeatureFile | None, spec: ModelSpec) -> FeatureStore:
        """The store over what `open` gave.

        Raises:
          ConfigError: if the file holds other features than the model's, or the source can't be made.
        """
        if file is not None and self.misses is not MissPolicy.FETCH:
            return FeatureStore(spec, file=file, misses=self.misses)
        if file is None:
            source, without = self._make_source(spec), self.without
        else:
            file.schema.rows_spec(spec)
            source = FileSource(file, file.schema.max_lengths(spec))
            without = [f.name for f in spec.candidate_features if f.name not in file.schema.names]
        timeout_ms = DEFAULT_FETCH_TIMEOUT_MS if self.fetch_timeout_ms is None else self.fetch_timeout_ms
        return FeatureStore(
            spec,
            source=source,
            without=without,
            misses=self.misses,
            memory_bytes=_DEFAULT_MEMORY_BYTES if self.memory_bytes is None else self.memory_bytes,
            max_age_seconds=self.max_age_seconds,
            fetch_timeout_ms=timeout_ms,
        )

    def _make_source(self, spec: ModelSpec) -> FeatureSource:
        assert self.source is not None
        function = resolve(self.source, folders=[self.path.parent])
        try:
            source = function(spec)
        except XlarankError:
            raise
        except Exception as error:
            raise self._failed(error) from error
        if not callable(getattr(source, "fetch", None)):
            raise ConfigError(
                f"features {self.path}: source {self.source!r}: expected a FeatureSource, with a method "
                f"fetch(ids), got {type(source).__name__}"
            )
        return source

    def _failed(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"features {self.path}: source {self.source!r} failed: {type(error).__name__}: {error}"
        )
