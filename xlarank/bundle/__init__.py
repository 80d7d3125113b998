"""The disk format of a compiled model: writer and reader in one room. No pickle, no JAX."""

from xlarank.bundle.document import FORMAT_VERSION
from xlarank.bundle.manifest import FileDigest, Manifest, ProgramEntry, TableError
from xlarank.bundle.reader import Bundle, Verify, open_bundle
from xlarank.bundle.repository import latest_version, list_versions, resolve_bundle, versions_in
from xlarank.bundle.requests import read_requests, write_requests
from xlarank.bundle.tables import ReadPace, TableFile, stored_form
from xlarank.bundle.writer import BundleWriter

__all__ = [
    "FORMAT_VERSION",
    "Bundle",
    "BundleWriter",
    "FileDigest",
    "Manifest",
    "ProgramEntry",
    "ReadPace",
    "TableError",
    "TableFile",
    "Verify",
    "latest_version",
    "list_versions",
    "open_bundle",
    "read_requests",
    "resolve_bundle",
    "stored_form",
    "versions_in",
    "write_requests",
]
