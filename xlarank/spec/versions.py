"""Which versions of a model are served, and who gets which: `VersionOptions`, `ModelPolicy`, `VersionStatus`.

No threads, no clock and no disk here.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import math
from collections.abc import Collection, Mapping
from pathlib import Path

from xlarank.errors import ConfigError
from xlarank.spec.fields import (
    check_name,
    check_wait,
    from_mapping,
    set_enum,
    to_integer,
    to_number,
    to_tuple,
)

__all__ = [
    "ModelPolicy",
    "Policy",
    "VersionLabel",
    "VersionOptions",
    "VersionState",
    "VersionStatus",
]


class Policy(enum.StrEnum):
    """Which versions are served."""

    LATEST = "latest"
    """The newest ones."""

    SPECIFIC = "specific"
    """Those that are listed."""

    ALL = "all"
    """All that there are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VersionLabel:
    """A name for a version, such as stable or canary."""

    name: str
    """Requests may ask for it where they may ask for a version."""

    version: int
    """That it stands for; it is served whatever the policy is."""

    traffic: float = 0.0
    """Share of the requests that ask for no version, in [0, 1]; those of all labels sum to 1, or all are 0
    and the newest version answers."""

    def __post_init__(self) -> None:
        check_name("version label", self.name)
        where = f"version label {self.name!r}"
        object.__setattr__(self, "version", to_integer(where, "version", self.version, least=1))
        if not 0 <= to_number(where, "traffic", self.traffic) <= 1:
            raise ConfigError(f"{where}: traffic must be in [0, 1]; was {self.traffic!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelPolicy:
    """Which versions of one model are served."""

    name: str = ""
    """Of the model; "" for every model that has no policy of its own."""

    policy: Policy = Policy.LATEST
    """What `num_versions` or `versions` say."""

    num_versions: int = 1
    """Of policy latest: how many."""

    versions: tuple[int, ...] = ()
    """Of policy specific: which."""

    labels: tuple[VersionLabel, ...] = ()
    """Versions that are served under a name too."""

    def __post_init__(self) -> None:
        where = f"model {self.name!r}" if self.name else "models"
        if self.name != "":
            check_name("model", self.name)
        set_enum(self, "policy", Policy, where)
        object.__setattr__(
            self, "num_versions", to_integer(where, "num_versions", self.num_versions, least=1)
        )
        numbers = to_tuple(where, "versions", self.versions)
        numbers = tuple(sorted({to_integer(where, "versions", number, least=1) for number in numbers}))
        object.__setattr__(self, "versions", numbers)
        labels = tuple(
            label if isinstance(label, VersionLabel) else from_mapping(VersionLabel, label, "version label")
            for label in to_tuple(where, "labels", self.labels)
        )
        object.__setattr__(self, "labels", labels)
        self._check(where)

    def _check(self, where: str) -> None:
        if (self.policy is Policy.SPECIFIC) != bool(self.versions):
            raise ConfigError(
                f"{where}: policy specific lists versions and no other does; policy is {self.policy.value!r} "
                f"and versions are {list(self.versions)}"
            )
        if self.num_versions != 1 and self.policy is not Policy.LATEST:
            raise ConfigError(
                f"{where}: num_versions is for policy latest; policy is {self.policy.value!r} and "
                f"num_versions {self.num_versions}"
            )
        names = [label.name for label in self.labels]
        if len(set(names)) != len(names):
            raise ConfigError(f"{where}: expected distinct labels, got {names}")
        traffic = {label.name: label.traffic for label in self.labels}
        total = sum(traffic.values())
        if total and not math.isclose(total, 1.0, abs_tol=1e-9):
            raise ConfigError(
                f"{where}: expected traffic of labels that sums to 1, got {total:g} of {traffic}"
            )
        if self.labels and not self.name:
            raise ConfigError(f"{where}: labels are of one model: expected its name beside labels {names}")

    def wanted(
        self, on_disk: Collection[int], loaded: Collection[int] = (), blocked: Collection[int] = ()
    ) -> list[int]:
        """Versions to serve, newest first.

        Args:
          on_disk: versions in the folder.
          loaded: a version whose folder has vanished is wanted as before, but under policy all if there are
            others.
          blocked: that failed, or were rolled back from.
        """
        available = set(on_disk)
        if self.policy is not Policy.ALL or not on_disk:
            available |= set(loaded)
        usable = sorted(available - set(blocked), reverse=True)
        if self.policy is Policy.LATEST:
            picked = usable[: self.num_versions]
        elif self.policy is Policy.SPECIFIC:
            picked = [version for version in usable if version in self.versions]
        else:
            picked = usable
        labelled = {label.version for label in self.labels}
        return [version for version in usable if version in labelled or version in picked]

    @property
    def named(self) -> frozenset[int]:
        """Versions that it names: those that are listed, and those of labels."""
        return frozenset(self.versions) | {label.version for label in self.labels}

    def moves_at_once(self, before: ModelPolicy, ready: Collection[int]) -> bool:
        """Whether requests may go by this policy in the place of `before`, whatever is still to be loaded.

        A label that leads to a version that is ready must not lead to one that isn't; the share of a label
        that had none must not go to the others while its version isn't ready, or a canary would get what is
        the stable version's; and traffic that labels share must not go to the newest version while none of
        its own is ready.
        """
        for label in self.labels:
            if label.version in ready:
                continue
            former = before.label(label.name)
            if former is not None and former.version in ready:
                return False
            if label.traffic and (former is None or not former.traffic):
                return False
        is_shared = any(label.traffic for policy in (self, before) for label in policy.labels)
        return not is_shared or any(label.traffic and label.version in ready for label in self.labels)

    def waits_for_labels(self, before: ModelPolicy, ready: Collection[int]) -> bool:
        """Whether `before` stays in force though all that could be loaded is ready, as it is not
        `moves_at_once` for want of a version that a label of this one leads to: it failed, or never came."""
        return any(label.version not in ready for label in self.labels) and not self.moves_at_once(
            before, ready
        )

    def or_before(
        self,
        before: ModelPolicy | None,
        there: Collection[int],
        on_disk: Collection[int],
        loaded: Collection[int],
        blocked: Collection[int],
        answering: Collection[int],
    ) -> ModelPolicy:
        """The policy that says what is served, and who gets it: `before` while this one waits for labels, and
        anything can answer under it.

        Args:
          before: in force until now; None for none.
          there: versions that are ready, or can be if they aren't blocked.
          on_disk, loaded, blocked: see `wanted`.
          answering: see `held_back`.
        """
        if before is None or before == self:
            return self
        if not self.waits_for_labels(before, {*there} - {*blocked}):
            return self
        held_back = self.held_back(before, answering)
        return before if before.wanted(on_disk, loaded, {*blocked} | held_back) else self

    def held_back(self, before: ModelPolicy, answering: Collection[int]) -> set[int]:
        """Versions that `before` doesn't serve while this policy waits, as if they were blocked.

        This one says which share of the requests they get, and that one may give them all.

        Args:
          before: in force meanwhile.
          answering: versions that requests go to: those go on.
        """
        return {label.version for label in self.labels if label.traffic} - before.named - {*answering}

    def label(self, name: str) -> VersionLabel | None:
        """The label of that name."""
        return next((label for label in self.labels if label.name == name), None)

    def version_for(self, position: float, ready: Collection[int]) -> int | None:
        """The version for a request that asks for none; None if none is ready.

        The share of a label begins where that of the next newer version ends, from 0: while a new version's
        share grows, whoever was on it stays on it.

        Args:
          position: of the request, in [0, 1).
          ready: versions that may answer; the traffic of a label whose version may not goes to the others.
        """
        labels = sorted(
            (label for label in self.labels if label.traffic and label.version in ready),
            key=lambda label: (-label.version, label.name),
        )
        if not labels:
            return max(ready, default=None)
        position *= sum(label.traffic for label in labels)
        for label in labels:
            position -= label.traffic
            if position < 0:
                return label.version
        return labels[-1].version

    def position(self, key: str) -> float:
        """Where a key lies in [0, 1): the same each time, evenly spread, unrelated between models."""
        digest = hashlib.blake2b(f"{self.name}\0{key}".encode(errors="surrogatepass"), digest_size=8).digest()
        return (int.from_bytes(digest) >> 11) / 2**53


@dataclasses.dataclass(frozen=True, kw_only=True)
class VersionOptions:
    """How a server goes about versions. Policies and labels may be given as tables of TOML or JSON."""

    watch_seconds: float | None = dataclasses.field(default=None, metadata={"none": "never"})
    """How often the repository is looked at for new versions, and the config file for other policies (models
    below; its other options take effect at the next start). A file that has changed is read once two looks
    have found it the same."""

    models: tuple[ModelPolicy, ...] = ()
    """Policies of models by name, and at most one without a name for all the others."""

    warm_share: float = 0.05
    """Most of a device's time that a new version may take to be proven and timed while others answer
    requests, in (0, 1]."""

    drain_seconds: float = 60.0
    """How long the next version waits, before it is loaded, for the memory of those that end."""

    def __post_init__(self) -> None:
        where = "versions"
        if self.watch_seconds is not None and to_number(where, "watch_seconds", self.watch_seconds) <= 0:
            raise ConfigError(f"{where}: watch_seconds must be > 0; was {self.watch_seconds!r}")
        if not 0 < to_number(where, "warm_share", self.warm_share) <= 1:
            raise ConfigError(f"{where}: warm_share must be in (0, 1]; was {self.warm_share!r}")
        if to_number(where, "drain_seconds", self.drain_seconds) < 0:
            raise ConfigError(f"{where}: drain_seconds must be >= 0; was {self.drain_seconds!r}")
        for name in ("watch_seconds", "drain_seconds"):
            check_wait(where, name, getattr(self, name) or 0)
        policies = tuple(
            policy if isinstance(policy, ModelPolicy) else from_mapping(ModelPolicy, policy, "model")
            for policy in to_tuple(where, "models", self.models)
        )
        object.__setattr__(self, "models", policies)
        names = [policy.name for policy in policies]
        if len(set(names)) != len(names):
            raise ConfigError(f"{where}: expected one policy a model, got policies of {names}")

    def policy_of(self, model: str) -> ModelPolicy:
        """The model's own policy, or the one of all others."""
        by_name = {policy.name: policy for policy in self.models}
        return by_name.get(model) or by_name.get("") or ModelPolicy()

    def check_models(self, repository: Path, found: Mapping[str, Collection[int]]) -> None:
        """Refuses policies of models, and versions of a model's own policy, that aren't in a repository,
        unless they may yet come.

        Args:
          repository: a folder.
          found: versions in it, by model.

        Raises:
          ConfigError: says which, and what is there.
        """
        if self.watch_seconds is not None:
            return
        unknown = {policy.name for policy in self.models} - {"", *found}
        if unknown:
            raise ConfigError(
                f"repository {repository}: versions: policies of models {sorted(unknown)}, found "
                f"{sorted(found)}"
            )
        for policy in self.models:
            there = found.get(policy.name, ())
            if policy.name and (missing := policy.named - {*there}):
                raise ConfigError(
                    f"repository {repository}: versions: model {policy.name!r}: its policy names versions "
                    f"{sorted(missing)}, found {sorted(there)}"
                )


class VersionState(enum.StrEnum):
    """Of a version, by the names of the model repository extension."""

    READY = "READY"
    """It answers."""

    LOADING = "LOADING"
    """It is being loaded, proven and warmed, or waits for that, as the reason then says."""

    UNLOADING = "UNLOADING"
    """It finishes what it accepted."""

    UNAVAILABLE = "UNAVAILABLE"
    """It doesn't answer; the reason says why."""


@dataclasses.dataclass(frozen=True)
class VersionStatus:
    """One line of the repository's index."""

    model: str
    """Its folder's name."""

    version: int
    """Its number."""

    state: VersionState
    """What it does."""

    reason: str = ""
    """Of UNAVAILABLE, and of LOADING that hasn't begun."""
