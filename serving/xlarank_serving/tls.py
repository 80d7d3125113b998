"""Certificates of a server, and what proves them right before a client finds out: `ServerTls`."""

from __future__ import annotations

import dataclasses
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from xlarank.errors import ConfigError
from xlarank_serving.config import SecurityConfig
from xlarank_serving.reloading import Reloaded, read_file

__all__ = ["Certificates", "ServerTls"]


@dataclasses.dataclass(frozen=True)
class Certificates:
    """The content of a server's PEM files, known to fit each other."""

    chain: bytes
    """The server's certificate, then those that lead to its authority."""

    key: bytes = dataclasses.field(repr=False)
    """The certificate's private key."""

    client_ca: bytes | None
    """Authorities of clients; None where clients need no certificate."""

    context: ssl.SSLContext
    """The same for a server over plain sockets."""

    @classmethod
    def load(cls, security: SecurityConfig) -> Certificates:
        """Reads the files and goes through a TLS handshake with them in memory.

        Raises:
          ConfigError: for a file that can't be read or is no PEM, a key that isn't the certificate's, or a
            certificate that isn't valid now.
        """
        certificate, key = security.tls_certificate, security.tls_key
        assert certificate is not None
        assert key is not None
        chain_pem = read_file("security: tls_certificate", certificate)
        key_pem = read_file("security: tls_key", key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # An encrypted key would have OpenSSL ask the terminal.
            context.load_cert_chain(certificate, key, password=lambda: b"")
        except (OSError, ValueError) as error:  # ssl's, or a file has just gone
            raise ConfigError(
                f"security: tls_certificate {certificate} and tls_key {key}: expected a PEM certificate and "
                f"its unencrypted key, got: {error}"
            ) from error
        _check_handshake(context, certificate)
        client_ca = None
        if security.client_ca is not None:
            client_ca = read_file("security: client_ca", security.client_ca)
            try:
                context.load_verify_locations(security.client_ca)
            except OSError as error:
                raise ConfigError(
                    f"security: client_ca {security.client_ca}: expected PEM certificates, got: {error}"
                ) from error
            context.verify_mode = ssl.CERT_REQUIRED
            context.num_tickets = 0  # each is good for the next, and a client's certificate may end meanwhile
        return cls(chain_pem, key_pem, client_ca, context)

    def for_grpc(self) -> grpc.ServerCertificateConfiguration:
        """In gRPC's terms."""
        return grpc.ssl_server_certificate_configuration([(self.key, self.chain)], self.client_ca)


class ServerTls:
    """The certificates of a running server, read again when their files change. Any thread."""

    def __init__(self, security: SecurityConfig) -> None:
        """ConfigError as `Certificates.load`; `security` has TLS."""
        paths = (security.tls_certificate, security.tls_key, security.client_ca)
        self._security = security
        self._files = Reloaded(
            [path for path in paths if path is not None], lambda: Certificates.load(security)
        )

    def certificates(self) -> Certificates:
        """The newest good ones."""
        return self._files.get()

    def http_context(self) -> ssl.SSLContext:
        """For a server over plain sockets; every connection gets the newest certificates."""
        return _NewestContext(self.certificates)

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Credentials of a gRPC port; every handshake gets the newest certificates."""
        known = self.certificates()

        def newest() -> grpc.ServerCertificateConfiguration | None:
            nonlocal known
            certificates = self.certificates()
            if certificates is known:
                return None  # gRPC keeps what it has
            known = certificates
            return certificates.for_grpc()

        return grpc.dynamic_ssl_server_credentials(
            known.for_grpc(),
            newest,  # type: ignore[arg-type]  # None is documented
            require_client_authentication=self._security.client_ca is not None,
        )


class _NewestContext(ssl.SSLContext):
    """Wraps connections in the newest certificates' own context.

    A `sni_callback` that changes the context within a handshake leaves the first one's sessions valid: who
    isn't of `client_ca` any more would resume one.
    """

    def __new__(cls, _certificates: Callable[[], Certificates]) -> _NewestContext:
        return super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)

    def __init__(self, certificates: Callable[[], Certificates]) -> None:
        self._certificates = certificates

    def wrap_socket(self, *args: Any, **options: Any) -> ssl.SSLSocket:
        return self._certificates().context.wrap_socket(*args, **options)

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        return self._certificates().context.wrap_bio(*args, **options)


def _check_handshake(server: ssl.SSLContext, certificate: Path) -> None:
    """A client that trusts this very certificate connects: it isn't expired, nor made for something else."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)]
    try:
        client.load_verify_locations(certificate)
        while ends:
            ends = [end for end in ends if not _is_done(end)]
    except OSError as error:
        reason = getattr(error, "verify_message", "") or str(error)
        raise ConfigError(
            f"security: tls_certificate {certificate}: expected one that clients accept now, got: {reason}"
        ) from error


def _is_done(end: ssl.SSLObject) -> bool:
    """Takes a handshake as far as it goes; whether that is to its end."""
    try:
        end.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True
