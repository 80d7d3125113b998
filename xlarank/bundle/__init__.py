"""The disk format of a compiled model: writer and reader in one room. No pickle, no JAX."""

from xlarank.bundle.document import FORMAT_VERSION
from xlarank.bundle.manifest import FileDigest, Manifest, ProgramEntry
from xlarank.bundle.reader import Bundle, Verify, open_bundle
from xlarank.bundle.repository import latest_version, list_versions, resolve_bundle, versions_in
from xlarank.bundle.requests import read_requests, write_requests
from xlarank.bundle.tables import TableFile
from xlarank.bundle.writer import BundleWriter

__all__ = [
    "FORMAT_VERSION",
    "Bundle",
    "BundleWriter",
    "FileDigest",
    "Manifest",
    "ProgramEntry",
    "TableFile",
    "Verify",
    "latest_version",
    "list_versions",
    "open_bundle",
    "read_requests",
    "resolve_bundle",
    "versions_in",
    "write_requests",
]
