"""HTTP/2 written by hand over a socket, for clients as no library is: idle, half-sent, not reading."""

from __future__ import annotations

import socket
import struct

__all__ = ["RawClient"]

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS, _PING, _GOAWAY = 0, 1, 4, 6, 7
_END_STREAM = 1
_END_HEADERS = 4
_INITIAL_WINDOW_SIZE = 4
_TIMEOUT = 10


class RawClient:
    """One connection, greeted. It answers nothing by itself, not even a ping."""

    def __init__(self, address: str, *, window: int | None = None) -> None:
        """`window`: bytes of an answer that the server may send; by default HTTP/2's 64 KiB."""
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=_TIMEOUT)
        settings = b"" if window is None else struct.pack(">HI", _INITIAL_WINDOW_SIZE, window)
        self.socket.sendall(_PREFACE + _frame(_SETTINGS, 0, 0, settings))

    def wait_for_settings(self) -> None:
        """Until the server has greeted; ConnectionError if it hangs up instead."""
        while self.next_frame()[0] != _SETTINGS:
            pass

    def next_frame(self) -> tuple[int, bytes]:
        """Type and payload of the next frame."""
        head = self._read(9)
        return head[3], self._read(int.from_bytes(head[:3], "big"))

    def call(self, path: str, message: bytes, *, num_sent: int | None = None, stream: int = 1) -> None:
        """Begins a unary gRPC call and sends so many bytes of its message, all of it by default."""
        fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x")]
        fields += [("content-type", "application/grpc"), ("te", "trailers")]
        block = b"".join(b"\0" + _string(name) + _string(value) for name, value in fields)
        self.socket.sendall(_frame(_HEADERS, _END_HEADERS, stream, block))
        body = b"\0" + struct.pack(">I", len(message)) + message
        if num_sent is not None:
            self.socket.sendall(_frame(_DATA, 0, stream, body[: 5 + num_sent]))
        else:
            self.socket.sendall(_frame(_DATA, _END_STREAM, stream, body))

    def ping(self, count: int) -> None:
        """Asks so many times whether the server is there."""
        self.socket.sendall(_frame(_PING, 0, 0, bytes(8)) * count)

    def wait_for_goodbye(self) -> bytes:
        """Until the server says goodbye (what it says then) or hangs up (b"")."""
        try:
            while True:
                kind, payload = self.next_frame()
                if kind == _GOAWAY:
                    return payload[8:]
        except ConnectionError:
            return b""

    def close(self) -> None:
        """Hangs up."""
        self.socket.close()

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.socket.recv(size - len(data))
            if not more:
                raise ConnectionError("the server hung up")
            data += more
        return data


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _string(text: str) -> bytes:
    """An HPACK string, plain; at most 126 bytes."""
    data = text.encode()
    assert len(data) < 127
    return bytes([len(data)]) + data
