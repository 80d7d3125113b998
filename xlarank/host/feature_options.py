"""One feature file and how it is served: `FeatureOptions`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from xlarank.errors import ConfigError
from xlarank.host.feature_file import FeatureFile
from xlarank.host.feature_source import FileSource
from xlarank.host.feature_store import FeatureStore, MissPolicy, check_cache_bounds
from xlarank.spec import ModelSpec
from xlarank.spec.fields import from_words

__all__ = ["FeatureOptions"]

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

    max_age_seconds: float | None = None
    """A row of that cache is read from the file again after so long; None: never for its age. For `fetch`
    alone."""

    def __post_init__(self) -> None:
        for field in ("memory_bytes", "max_age_seconds"):
            if getattr(self, field) is not None and self.misses is not MissPolicy.FETCH:
                raise ConfigError(
                    f"features {self.path}: {field} bounds the cache of misses 'fetch'; misses is "
                    f"{self.misses.value!r}"
                )
        check_cache_bounds(f"features {self.path}", self.memory_bytes, self.max_age_seconds)

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        misses: MissPolicy = MissPolicy.ERROR,
        memory_bytes: int | None = None,
        max_age_seconds: float | None = None,
    ) -> FeatureOptions:
        """What one file's text says, such as ``feed.features,misses=fetch,max_age_seconds=60``.

        Args:
          text: the path; behind it, each after a comma, the other fields that are this file's own.
          misses: if the text doesn't say.
          memory_bytes: likewise, of files whose misses are `fetch`.
          max_age_seconds: likewise.

        Raises:
          ConfigError: for a field that there isn't, or that is no such value.
        """
        readers = {"misses": MissPolicy, "memory_bytes": int, "max_age_seconds": float}
        path, fields = from_words("features", text, "PATH", readers)
        misses = fields.setdefault("misses", misses)
        if misses is MissPolicy.FETCH:
            fields = {"memory_bytes": memory_bytes, "max_age_seconds": max_age_seconds, **fields}
        return cls(path=Path(path), **fields)

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
            source=FileSource(file, file.schema.max_lengths(spec)),
            without=[f.name for f in spec.candidate_features if f.name not in file.schema.names],
            misses=self.misses,
            memory_bytes=_DEFAULT_MEMORY_BYTES if self.memory_bytes is None else self.memory_bytes,
            max_age_seconds=self.max_age_seconds,
        )
