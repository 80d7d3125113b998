"""The disk format of a compiled model: writer and reader in one room. No pickle, no JAX."""

from xlarank.bundle.requests import read_requests, write_requests

__all__ = ["read_requests", "write_requests"]
