"""What policies ask for and versions can't give, in words."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from xlarank.spec.versions import ModelPolicy

__all__ = ["policy_warnings", "removed_warning", "why_held_back", "why_not_served"]


def policy_warnings(
    model: str, asked: ModelPolicy, followed: ModelPolicy, versions: Collection[int]
) -> list[str]:
    """What of a policy isn't as it says.

    Args:
      model: its name.
      asked: the policy.
      followed: it, or the one before that stays in force, see `ModelPolicy.or_before`.
      versions: that answer, or will.
    """
    texts: list[str] = []
    if followed != asked:
        labels = sorted(label.version for label in asked.labels)
        texts.append(
            f"model {model}: a policy waits for versions of its labels, and the one before it stays in "
            f"force: labels lead to {labels}, there are {sorted(versions)}"
        )
    lost = {label.name: label.version for label in followed.labels if label.traffic}
    lost = {name: version for name, version in lost.items() if version not in versions}
    if lost:
        texts.append(
            f"model {model}: labels {lost} lead to versions that aren't served, and their share of the "
            f"requests goes to others: {sorted(versions)}"
        )
    return texts


def removed_warning(folder: Path, model: str, version: int, until: str) -> str:
    """That a version serves on though its folder isn't there.

    Args:
      folder: of the version.
      model: its name.
      version: its number.
      until: what ends it.
    """
    return f"{folder}: was removed; model {model} version {version} goes on serving until {until}"


def why_held_back(asked: ModelPolicy) -> str:
    """Why a version that a policy wants doesn't answer while the one before stays in force."""
    labels = sorted(label.version for label in asked.labels)
    return f"waits for all versions that the policy's labels lead to: {labels}"


def why_not_served(folder: Path, is_on_disk: bool, asked: ModelPolicy) -> str:
    """Why a version that hasn't failed isn't served.

    Args:
      folder: of the version.
      is_on_disk: whether it is there.
      asked: the model's policy.
    """
    if not is_on_disk:
        return f"{folder}: expected a version, found none"
    return f"not served under policy {asked.policy.value}"
