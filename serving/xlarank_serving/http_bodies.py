"""The memory that HTTP requests' bodies may take: `Bodies`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.exceptions import HTTPException
from starlette.requests import Request

from xlarank.errors import OverloadError

__all__ = ["Bodies"]

_RETRY_SECONDS = 1.0


class Bodies:
    """Receives bodies, each within its bounds and all within one. For the event loop's thread."""

    def __init__(self, max_body_bytes: int, max_bodies_bytes: int, max_receive_seconds: float) -> None:
        """
        Args:
          max_body_bytes: largest of a request; 413 beyond.
          max_bodies_bytes: of all that are being received or answered; the one that grows is refused
            beyond.
          max_receive_seconds: longest that one may take to come; 408 beyond.
        """
        self._max_body_bytes = max_body_bytes
        self._max_bodies_bytes = max_bodies_bytes
        self._max_receive_seconds = max_receive_seconds
        self._num_bytes = 0  # held now; what came, not what was declared, which costs nothing

    @contextlib.asynccontextmanager
    async def received(self, request: Request) -> AsyncIterator[bytes]:
        """A request's body; it counts until the block's end.

        Raises:
          HTTPException: for what is beyond its own bounds, or compressed.
          OverloadError: for what is beyond the common one.
          ClientDisconnect: if the client left before its end.
        """
        self._check_headers(request)
        size = 0
        try:
            chunks: list[bytes] = []
            try:
                async with asyncio.timeout(self._max_receive_seconds):
                    async for chunk in request.stream():
                        size += len(chunk)
                        self._num_bytes += len(chunk)
                        self._check_size(size)
                        chunks.append(chunk)
            except TimeoutError:
                raise HTTPException(
                    408, f"expected the whole body within {self._max_receive_seconds:g} s, got {size} bytes"
                ) from None
            body = b"".join(chunks)
            chunks.clear()
            yield body
        finally:
            self._num_bytes -= size

    def _check_headers(self, request: Request) -> None:
        encoding = request.headers.get("content-encoding", "")
        if encoding.strip().lower() not in ("", "identity"):
            raise HTTPException(415, f"expected a body without Content-Encoding, got {encoding[:100]!r}")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal():
            self._check_size(int(declared[:20]))

    def _check_size(self, size: int) -> None:
        if size > self._max_body_bytes:
            raise HTTPException(413, f"expected a body of at most {self._max_body_bytes} bytes, got more")
        if self._num_bytes > self._max_bodies_bytes:
            raise OverloadError(
                f"the server holds {self._max_bodies_bytes} bytes of requests, its limit; try again",
                retry_after_seconds=_RETRY_SECONDS,
            )
