"""Who answers a request that names a model and perhaps a version: `Routes`, `ServedVersion`."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping
from typing import Any

from xlarank.errors import ModelNotFoundError, UnavailableError
from xlarank.runtime.engine import Engine
from xlarank.spec.versions import ModelPolicy

__all__ = ["Routes", "ServedVersion", "not_ready"]


class ServedVersion:
    """An engine that requests may be on their way to. Any thread.

    Who takes the engine for a request leases it until the request is submitted, and it is closed only once
    nobody does: so no request finds that its engine has closed since it was picked.
    """

    def __init__(self, engine: Engine) -> None:
        """Takes the engine over; `drain` closes it."""
        self.engine = engine
        self._condition = threading.Condition()
        self._num_leases = 0  # guarded by _condition
        self._is_retired = False  # guarded by _condition; moves one way

    def try_lease(self) -> bool:
        """Keeps the engine open until `release`; False if it is to close, then another version answers."""
        with self._condition:
            if self._is_retired:
                return False
            self._num_leases += 1
            return True

    def release(self) -> None:
        """Ends a lease."""
        with self._condition:
            self._num_leases -= 1
            if self._is_retired and not self._num_leases:
                self._condition.notify_all()

    def drain(self) -> None:
        """Leases no more, waits until everything that was accepted is answered, and closes the engine."""
        with self._condition:
            self._is_retired = True
            self._condition.wait_for(lambda: not self._num_leases)
        self.engine.close()


@dataclasses.dataclass(frozen=True)
class Routes:
    """Versions of one model that answer, of one moment. Never changed: a swap puts another in its place."""

    model: str
    """Its name."""

    policy: ModelPolicy
    """Labels, and who gets what."""

    versions: Mapping[int, ServedVersion]
    """By number; some may have a fault."""

    others: Callable[[], Mapping[int, str]] = dict
    """Versions that a request may name and that don't answer now, and why, as far as there is a reason."""

    def pick(self, version: str, position: float | None) -> ServedVersion:
        """The version for a request, or for a change.

        Args:
          version: a number, a label, or "" for what the labels' traffic says, without any the newest.
          position: of the request, see `ModelPolicy.version_for`; None for the newest whatever labels say.

        Raises:
          ModelNotFoundError: if there is no such version.
          UnavailableError: if it isn't ready, or has failed since it was loaded.
        """
        if not version:
            return self._default(position)
        label = self.policy.label(version)
        number = label.version if label else _number(version)
        what = f"'{self.model}' version {version}" + (f", which is {number}," if label else "")
        if number is not None and number in self.versions:
            return self._undamaged(number)
        others = self.others()
        if number is not None and (label or number in others):
            raise not_ready(what, others.get(number, ""))
        served = ", ".join(map(str, sorted(self.versions)))
        many = "versions {} are" if len(self.versions) > 1 else "version {} is"
        hint = f"; {many.format(served)} served" if self.versions else ""
        raise ModelNotFoundError(f"Request for unknown model: {what} is not found{hint}")

    def _default(self, position: float | None) -> ServedVersion:
        healthy = [number for number, served in self.versions.items() if served.engine.damage is None]
        if position is None:
            number = max(healthy, default=None)
        else:
            number = self.policy.version_for(position, healthy)
        if number is not None:
            return self.versions[number]
        if self.versions:
            return self._undamaged(max(self.versions))
        if others := self.others():
            raise not_ready(f"'{self.model}'", others)
        raise ModelNotFoundError(f"Request for unknown model: '{self.model}' has no available versions")

    def _undamaged(self, number: int) -> ServedVersion:
        served = self.versions[number]
        if served.engine.damage is not None:
            raise UnavailableError(
                f"model '{self.model}' version {number} has failed: {served.engine.damage}"
            )
        return served


def not_ready(what: str, why: str | Mapping[Any, str]) -> UnavailableError:
    """The error for what somebody could expect to answer, and doesn't now.

    Args:
      what: the model, or a version of it, in words.
      why: the reason, empty where there is none; of a model that by version.
    """
    if not isinstance(why, str):
        why = "; ".join(f"version {version}: {reason}" for version, reason in why.items() if reason)
    return UnavailableError(f"Request for unknown model: {what} is not at ready state{why and f': {why}'}")


def _number(version: str) -> int | None:
    """Of a version as it is written in a folder's name."""
    is_plain = version.isascii() and version.isdigit() and not version.startswith("0") and len(version) < 19
    return int(version) if is_plain else None
