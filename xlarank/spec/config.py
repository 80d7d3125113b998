"""A model's config file: `ModelConfig` and `load_config`."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xlarank.errors import ConfigError
from xlarank.spec.buckets import DEFAULT_ROWS
from xlarank.spec.files import parse_toml
from xlarank.spec.model import ModelSpec

__all__ = ["DataConfig", "Metric", "ModelConfig", "TrainingConfig", "load_config", "parse_config"]

_SPEC_KEYS = ("name", "features", "tables", "tasks")
_KEYS = (*_SPEC_KEYS, "model", "model_options", "buckets", "data", "training")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where a model's examples come from: the table ``[data]``."""

    reader: str
    """A reader's name, or ``module:function``; called as ``read(path, **options)``."""

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Every other key of the table."""

    def __post_init__(self) -> None:
        if not isinstance(self.reader, str) or not self.reader:
            raise ConfigError(f"data: reader must be a name or 'module:function'; was {self.reader!r}")


class Metric(enum.StrEnum):
    """How epochs are compared, by the mean over tasks on the validation rows."""

    LOSS = "loss"
    """Cross entropy or squared error, lowest."""

    AUC = "auc"
    """AUC, highest: order may still improve while probabilities grow too sure. Binary tasks only."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How `xlarank train` fits a model: the table ``[training]``."""

    epochs: int = 10
    """Most passes over the training rows."""

    max_seconds: float = 600.0
    """Training stops after the epoch in which this much time is up; half of it is for the refit, if any."""

    batch_size: int = 512
    """Rows a step; all of them when there are fewer."""

    learning_rate: float = 1e-3
    """Peak step size of AdamW; it falls to zero along a cosine over all epochs."""

    weight_decay: float = 0.0
    """Decoupled decay of the model's matrices, a step and unit of learning rate; biases have none."""

    table_weight_decay: float = 0.0
    """The same for embedding tables."""

    metric: Metric = Metric.LOSS
    """What says on the validation rows which epoch is the best one: loss or auc."""

    patience: int = 2
    """Epochs that aren't the best before training stops; the best epoch's parameters stay."""

    refit: bool = False
    """Whether a fresh model then learns from train and validation rows, for as many epochs as were best."""

    seed: int = 0
    """Seeds parameters, shuffling and dropout."""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "metric", Metric(self.metric))
        except ValueError:
            allowed = [metric.value for metric in Metric]
            raise ConfigError(f"training: metric must be one of {allowed}; was {self.metric!r}") from None
        for name in ("epochs", "batch_size", "patience"):
            _check(name, getattr(self, name), int, least=1)
        _check("seed", self.seed, int, least=0)
        for name in ("max_seconds", "learning_rate"):
            value = getattr(self, name)
            _check(name, value, (int, float), least=0)
            if value == 0:
                raise ConfigError(f"training: {name} must be > 0; was {value!r}")
        for name in ("weight_decay", "table_weight_decay"):
            _check(name, getattr(self, name), (int, float), least=0)
        if not isinstance(self.refit, bool):
            raise ConfigError(f"training: refit must be true or false; was {self.refit!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One TOML file of configs/: a model's inputs and answers, its Flax module, its data, its buckets."""

    spec: ModelSpec
    """From the keys name, features, tables and tasks; may be unfitted."""

    model: str
    """``module:build`` of the Flax module; a file beside the config or an importable module."""

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword arguments of build, from ``[model_options]``."""

    data: DataConfig | None = None
    """None when the file has no ``[data]``: such a model can be compiled but not trained."""

    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    """Defaults when the file has no ``[training]``."""

    bucket_rows: tuple[int, ...] = DEFAULT_ROWS
    """Row counts to compile for, ascending, from ``[buckets] rows``."""

    path: Path
    """The file; ``module:build`` and ``module:read`` are looked for in its folder first."""

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or ":" not in self.model:
            raise ConfigError(f"{self.path}: model must be of the form 'module:build'; was {self.model!r}")
        rows = self.bucket_rows
        object.__setattr__(self, "bucket_rows", tuple(rows) if isinstance(rows, list) else rows)
        valid = isinstance(self.bucket_rows, tuple) and bool(self.bucket_rows)
        valid = valid and all(_is(row, int) and row >= 1 for row in self.bucket_rows)
        if not valid or list(self.bucket_rows) != sorted(set(self.bucket_rows)):
            raise ConfigError(f"{self.path}: buckets.rows must be ascending integers >= 1; was {rows!r}")

    @property
    def folder(self) -> Path:
        """The folder of the file."""
        return self.path.parent

    def data_or_raise(self) -> DataConfig:
        """The data table. Raises ConfigError when the file has none."""
        if self.data is None:
            raise ConfigError(f"{self.path}: the config has no [data] table, so there is nothing to read")
        return self.data


def load_config(path: Path | str) -> ModelConfig:
    """Reads a model's config file.

    Args:
      path: a TOML file.

    Returns:
      The checked config.

    Raises:
      ConfigError: when the file is missing or isn't TOML, or a key is missing, unknown or wrong.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a TOML file: {error}") from error
    return parse_config(text, path, allow_reader_code=True)


def parse_config(text: str, path: Path, *, allow_reader_code: bool = False) -> ModelConfig:
    """Reads the text of a model's config file, such as the one that a bundle keeps.

    Args:
      text: TOML.
      path: the file that it is from, for messages and for the modules that it names.
      allow_reader_code: whether ``[data] reader`` may be ``module:function``. A bundle's config may not: who
        made the bundle would choose what code runs here.

    Raises:
      ConfigError: when the text isn't TOML, or a key is missing, unknown or wrong.
    """
    document = parse_toml(text, path)
    _check_keys(document, _KEYS, str(path))
    for key in ("name", "features", "tasks", "model"):
        if key not in document:
            raise ConfigError(f"{path}: missing key {key!r}")
    for key in ("features", "tables", "tasks"):
        _check_list_of_tables(document.get(key, []), key, path)
    buckets = _table(document, "buckets", path)
    _check_keys(buckets, ("rows",), f"{path}: [buckets]")
    try:
        data = _data(document, path)
        if data is not None and ":" in data.reader and not allow_reader_code:
            raise ConfigError(
                f"data: the bundle's data are read by code, {data.reader!r}, which a bundle may not choose; "
                f"name its config file with --config"
            )
        return ModelConfig(
            spec=ModelSpec.from_dict({key: document[key] for key in _SPEC_KEYS if key in document}),
            model=document["model"],
            options=_table(document, "model_options", path),
            data=data,
            training=_training(document, path),
            bucket_rows=buckets.get("rows", DEFAULT_ROWS),
            path=path,
        )
    except ConfigError as error:
        if str(error).startswith(str(path)):
            raise
        raise ConfigError(f"{path}: {error}") from error


def _data(document: Mapping[str, Any], path: Path) -> DataConfig | None:
    if "data" not in document:
        return None
    options = dict(_table(document, "data", path))
    if "reader" not in options:
        raise ConfigError("data: missing key 'reader'")
    return DataConfig(reader=options.pop("reader"), options=options)


def _training(document: Mapping[str, Any], path: Path) -> TrainingConfig:
    options = _table(document, "training", path)
    _check_keys(options, [field.name for field in dataclasses.fields(TrainingConfig)], f"{path}: [training]")
    return TrainingConfig(**options)


def _table(document: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    value = document.get(key, {})
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {key} must be a table; was {value!r}")
    return value


def _check_list_of_tables(value: Any, key: str, path: Path) -> None:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ConfigError(f"{path}: {key} must be a list of tables, [[{key}]]; was {value!r}")


def _check_keys(value: Mapping[str, Any], known: tuple[str, ...] | list[str], where: str) -> None:
    if unknown := sorted(set(value) - set(known)):
        raise ConfigError(f"{where}: unknown keys {unknown}; expected of {list(known)}")


def _is(value: Any, types: type | tuple[type, ...]) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def _check(name: str, value: Any, types: type | tuple[type, ...], *, least: int) -> None:
    # Written so that NaN fails too.
    if not _is(value, types) or not value >= least or value == float("inf"):
        kind = "an integer" if types is int else "a number"
        raise ConfigError(f"training: {name} must be {kind} >= {least}; was {value!r}")
