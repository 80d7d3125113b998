"""Which versions the processes are to serve: `VersionPlan`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from xlarank.runtime.policy_words import policy_warnings, removed_warning, why_held_back, why_not_served
from xlarank.runtime.processes.messages import Version
from xlarank.runtime.watching import Listing, Told, folder_stamp
from xlarank.spec.versions import ModelPolicy, VersionOptions, VersionState, VersionStatus

__all__ = ["VersionPlan"]

_log = logging.getLogger(__name__)

_UNTIL = "other processes come, which can't load it"


@dataclasses.dataclass(frozen=True)
class _Blocked:
    stamp: str | None
    reason: str


class VersionPlan:
    """Looks at a repository and says, by the policies, what is to be served. For one thread.

    As one process goes about it (`ModelVersions`): a version that failed isn't tried again before its folder
    changes, and one whose folder vanishes is served on, though only until processes come for whatever reason:
    they can't load it.
    """

    def __init__(self, root: Path, options: VersionOptions) -> None:
        """
        Args:
          root: folder of ``<model>/<version>``.
          options: policies by model.
        """
        self._root = root
        self._options = options
        self._blocked: dict[Version, _Blocked] = {}
        self._idle: list[VersionStatus] = []  # as of the last look
        self._listing = Listing(root)
        self._found: Mapping[str, Sequence[int]] = {}  # at the last look that was one
        self._told = Told(_log)

    def wanted(
        self, served: Collection[Version], former: Iterable[ModelPolicy] = (), *, is_lost: bool = False
    ) -> tuple[Version, ...] | None:
        """What is to be served now, sorted; None if the folder can't be looked at.

        Args:
          served: what is served now.
          former: by which policies: they stay in force while a new one's labels lead nowhere.
          is_lost: whether new processes are needed for that alone.
        """
        found = self._listing.look()
        if found is None:
            return None
        self._found = found
        self._forget_changed()
        before = {policy.name: policy for policy in former}
        gone = self.gone(served)
        wanted, warnings = self._look(served, before)
        removed = [
            removed_warning(self._root / model / str(version), model, version, _UNTIL)
            for model, version in sorted(gone & {*wanted})
        ]
        if gone and (is_lost or {*wanted} != {*served}):
            left = self._look({*served} - gone, before)
            # Of nothing at all no processes are started: those that serve are better.
            wanted, warnings = left if left[0] else self._look(served, before)
        self._told.tell(removed + warnings)
        return tuple(sorted(wanted))

    def left(self, versions: Iterable[Version]) -> tuple[Version, ...]:
        """Those that are on disk now; all of them if none is, or the folder can't be looked at."""
        versions, found = tuple(versions), self._listing.look()
        if found is None:
            return versions
        self._found = found
        return tuple(v for v in versions if v[1] in found.get(v[0], ())) or versions

    def set_policies(self, models: tuple[ModelPolicy, ...]) -> None:
        """From the next `wanted` on, other policies say what is to be served."""
        self._options = dataclasses.replace(self._options, models=models)

    def policies(
        self, versions: Iterable[Version], before: Iterable[ModelPolicy] = (), *, is_all: bool = False
    ) -> tuple[ModelPolicy, ...]:
        """By which processes that have some versions are to serve them, one a model.

        Args:
          versions: that they have, and will have.
          before: by which they do: of a model whose own would have to wait for a version, see
            `ModelPolicy.moves_at_once`, it is kept. The processes that have that version go by the new one.
          is_all: whether these are all versions that are wanted now: only labels are waited for then.
        """
        former = {policy.name: policy for policy in before}
        ready: dict[str, set[int]] = {}
        for model, version in versions:
            ready.setdefault(model, set()).add(version)
        policies: list[ModelPolicy] = []
        for model, numbers in sorted(ready.items()):
            policy = dataclasses.replace(self._options.policy_of(model), name=model)
            if is_all:
                on_disk = self._found.get(model, ())
                blocked = self._blocked_of(model)
                followed = policy.or_before(former.get(model), numbers, on_disk, numbers, blocked, numbers)
            else:
                is_kept = model in former and not policy.moves_at_once(former[model], numbers)
                followed = former[model] if is_kept else policy
            policies.append(followed)
        return tuple(policies)

    @property
    def models_on_disk(self) -> set[str]:
        """Those that had a version at the last look."""
        return {*self._found}

    def gone(self, versions: Iterable[Version]) -> set[Version]:
        """Those that weren't on disk at the last look."""
        return {(model, version) for model, version in versions if version not in self._found.get(model, ())}

    def block(self, versions: Iterable[Version], reason: str) -> None:
        """Leaves versions alone until their folders change."""
        for model, version in versions:
            _log.error("model %s version %d isn't served: %s", model, version, reason)
            stamp = folder_stamp(self._root / model / str(version))
            self._blocked[model, version] = _Blocked(stamp, reason)

    def statuses(self, *, with_idle: bool = False) -> list[VersionStatus]:
        """Of what failed: by model, then by version.

        Args:
          with_idle: after them, of what is on disk or named by a policy and wasn't wanted at the last look.
        """
        failed = [
            VersionStatus(model, version, VersionState.UNAVAILABLE, blocked.reason)
            for (model, version), blocked in sorted(self._blocked.items())
        ]
        return failed + self._idle if with_idle else failed

    def _look(
        self, served: Collection[Version], former: Mapping[str, ModelPolicy]
    ) -> tuple[list[Version], list[str]]:
        """What is wanted, and warnings, by what was found."""
        wanted: list[Version] = []
        warnings: list[str] = []
        self._idle = []
        for model in sorted({*self._found, *(model for model, _ in served)}):
            own = {version for name, version in served if name == model}
            numbers, followed = self._of_model(model, self._found.get(model, ()), own, former.get(model))
            wanted += [(model, version) for version in numbers]
            warnings += policy_warnings(model, self._options.policy_of(model), followed, numbers)
        return wanted, warnings

    def _of_model(
        self, model: str, on_disk: Sequence[int], served: set[int], former: ModelPolicy | None
    ) -> tuple[Sequence[int], ModelPolicy]:
        """Versions, and the policy that says so."""
        asked = self._options.policy_of(model)
        blocked = self._blocked_of(model)
        followed = asked.or_before(former, {*on_disk, *served}, on_disk, served, blocked, served)
        held = set[int]() if followed is asked else asked.held_back(followed, served)
        wanted = followed.wanted(on_disk, served, blocked | held) or sorted(served)
        held_back = set() if followed is asked else {*asked.wanted(on_disk, served, blocked)}
        for version in sorted({*on_disk, *asked.named} - {*wanted, *served} - blocked):
            if version in held_back:
                status = VersionStatus(model, version, VersionState.LOADING, why_held_back(asked))
            else:
                why = why_not_served(self._root / model / str(version), version in on_disk, asked)
                status = VersionStatus(model, version, VersionState.UNAVAILABLE, why)
            self._idle.append(status)
        return wanted, followed

    def _blocked_of(self, model: str) -> set[int]:
        return {version for name, version in self._blocked if name == model}

    def _forget_changed(self) -> None:
        self._blocked = {
            (model, version): blocked
            for (model, version), blocked in self._blocked.items()
            if folder_stamp(self._root / model / str(version)) == blocked.stamp
        }
