"""Which folders are versions, and what a path means."""

import os
import re
import shutil

import pytest

from xlarank.bundle import latest_version, list_versions, open_bundle, resolve_bundle
from xlarank.errors import BundleError, ModelNotFoundError


def test_only_plain_integers_from_one_on_are_versions(tmp_path):
    for name in ("1", "2", "10", "0", "007", "-1", "+3", "1.0", "٣", "latest", ".tmp-4", "9" * 40):
        (tmp_path / "m" / name).mkdir(parents=True)
    (tmp_path / "m" / "11").touch()
    for folder in ("empty", ".hidden/1", "other/3"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "readme.txt").touch()
    assert list_versions(tmp_path) == {"m": [1, 2, 10], "other": [3]}
    assert latest_version(tmp_path, "m") == 10


def test_a_model_without_versions_is_not_found(tmp_path):
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFoundError, match=r"has no model 'empty'; it has \['m'\]"):
        latest_version(tmp_path, "empty")


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_a_repository_that_is_no_folder_is_refused(tmp_path, kind):
    if kind == "file":
        (tmp_path / "r").touch()
    with pytest.raises(BundleError, match=r"r: no repository: (No such file|Not a directory)"):
        list_versions(tmp_path / "r")


def test_a_model_folder_means_its_highest_version(publish, tmp_path):
    for version in (2, 10, 9):
        publish(version)
    assert resolve_bundle(tmp_path / "tiny") == tmp_path / "tiny" / "10"
    assert resolve_bundle(str(tmp_path / "tiny" / "2")) == tmp_path / "tiny" / "2"


def test_a_bundle_may_be_opened_wherever_it_was_copied_to(bundle_path, tmp_path):
    os.rename(bundle_path, tmp_path / "copy")
    assert resolve_bundle(tmp_path / "copy") == tmp_path / "copy"
    assert open_bundle(tmp_path / "copy").manifest.version == 1


def test_a_version_copied_to_a_new_number_is_that_number(bundle_path, tmp_path, monkeypatch):
    shutil.copytree(bundle_path, tmp_path / "tiny" / "8")
    assert open_bundle(resolve_bundle(tmp_path / "tiny")).manifest.version == 8
    (tmp_path / "tiny" / "9").symlink_to(bundle_path, target_is_directory=True)
    assert list_versions(tmp_path) == {"tiny": [1, 8, 9]}
    assert open_bundle(tmp_path / "tiny" / "9").manifest.version == 9
    monkeypatch.chdir(tmp_path / "tiny" / "8")
    assert open_bundle(".").manifest.version == 8


def test_a_path_that_is_neither_says_what_it_is(bundle_path, tmp_path):
    def refused(path, message):
        with pytest.raises(BundleError, match=re.escape(str(path)) + ": " + message):
            resolve_bundle(path)

    refused(tmp_path / "nowhere", "expected the folder of a bundle or of a model, found nothing")
    refused(bundle_path / "manifest.json", "expected the folder .* found a file")
    refused(tmp_path, f"expected a bundle or a model, found a repository; .*: {tmp_path / 'tiny'}$")
    refused(
        bundle_path / "tables", r"expected a bundle or a model, found neither manifest\.json nor versions"
    )
    (bundle_path / "manifest.json").unlink()
    refused(bundle_path, r"manifest\.json is missing")
