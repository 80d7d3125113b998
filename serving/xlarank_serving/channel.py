"""How clients connect: `ClientTls`, `open_channel`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import grpc

from xlarank.errors import ConfigError
from xlarank_serving.reloading import read_file

__all__ = ["ClientTls", "open_channel", "token_metadata"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientTls:
    """What a client trusts, and how it shows who it is. PEM files."""

    server_ca: Path | None = None
    """Authorities of the server; those of the system by default."""

    certificate: Path | None = None
    """The client's certificate chain, for a server with mutual TLS."""

    key: Path | None = None
    """The certificate's private key."""

    server_name: str | None = None
    """Name that the server's certificate must have, where it isn't that of the address."""

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("tls: expected certificate and key, or neither, got one of them")

    def credentials(self) -> grpc.ChannelCredentials:
        """In gRPC's terms; ConfigError if a file can't be read."""
        files = (("server_ca", self.server_ca), ("key", self.key), ("certificate", self.certificate))
        return grpc.ssl_channel_credentials(
            *(None if path is None else read_file(f"tls: {name}", path) for name, path in files)
        )


def open_channel(address: str, tls: ClientTls | None) -> grpc.Channel:
    """A channel without limits on messages. Nothing is sent until a method is called.

    Raises:
      ConfigError: if a file of `tls` can't be read.
    """
    options: list[tuple[str, int | str]] = [
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
    ]
    if tls is None:
        return grpc.insecure_channel(address, options=options)
    if tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return grpc.secure_channel(address, tls.credentials(), options=options)


def token_metadata(token: str | None) -> tuple[tuple[str, str], ...] | None:
    """Metadata of every call of a client with a token."""
    return None if token is None else (("authorization", f"Bearer {token}"),)
