"""The config file of a server while it runs: `ConfigFile`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from xlarank_serving.reloading import file_stamp

from xlarank.cli.sections import options_of
from xlarank.cli.serve_config import ServeConfig
from xlarank.errors import ConfigError
from xlarank.spec.versions import ModelPolicy

__all__ = ["ConfigFile"]

_log = logging.getLogger(__name__)


class ReadConfig(Protocol):
    """Reads a file with the flags beside it; see `read_sections`."""

    def __call__(self, *, expects_section: bool = False) -> tuple[ServeConfig | None, list[str]]: ...


class ConfigFile:
    """What a server was started with, and the policies that its file says now. One thread at a time.

    A file that has changed is read once two looks in a row have found it the same: half a file may be a whole
    one with fewer policies.

    Attributes:
      config: of the start.
    """

    def __init__(self, path: Path | None, read: ReadConfig) -> None:
        """
        Args:
          path: of the file; None if there is none, then nothing changes.
          read: reads it.

        Raises:
          ConfigError: if something is wrong.
        """
        self._path = path
        self._read = read
        self._seen = self._taken = self._stamp()  # before it is read: no change is missed
        config, problems = read()
        if config is None:
            raise ConfigError(problems[0])
        self.config = config
        self._policies = config.versions.models
        self._told: list[str] = []  # options that the log has said to wait for the next start

    def changed_policies(self) -> tuple[ModelPolicy, ...] | None:
        """Policies that aren't those of the last call; None if they are, or the file is wrong, which the log
        says once a change."""
        stamp, before = self._stamp(), self._seen
        self._seen = stamp
        if stamp == self._taken or stamp != before:
            return None
        self._taken = stamp
        try:
            # One that says nothing would be right, and the end of all policies.
            config, problems = self._read(expects_section=True)
        except Exception as error:  # what serves must not end for a file, whatever is in it
            config, problems = None, [str(error) if isinstance(error, ConfigError) else repr(error)]
        if config is None:
            wrong = "; ".join(problem.removeprefix(f"{self._path}: ") for problem in problems)
            _log.error("%s: the last good policies stay in use: %s", self._path, wrong)
            return None
        waiting = list(self._waiting(config))
        if waiting and waiting != self._told:
            _log.warning("%s: %s: take effect at the next start", self._path, ", ".join(waiting))
        self._told = waiting
        before, self._policies = self._policies, config.versions.models
        changed = {policy.name for policy in {*before} ^ {*self._policies}}
        if not changed:
            return None
        names = sorted(name or "all others" for name in changed)
        _log.warning(
            "%s: policies are followed that have changed, of models: %s", self._path, ", ".join(names)
        )
        return self._policies

    def _waiting(self, config: ServeConfig) -> Iterator[str]:
        """Options that the server goes without until it is started anew."""
        for option in options_of(ServeConfig):
            if (option.section, option.name) == ("versions", "models"):
                continue
            started, now = (getattr(getattr(c, option.section), option.name) for c in (self.config, config))
            if started != now:
                yield f"[{option.section}] {option.name}"

    def _stamp(self) -> tuple[int, int, int] | None:
        return None if self._path is None else file_stamp(self._path)
