"""Messages over a TCP socket: their length first, a checksum, a line of JSON, then bytes. Nothing is run.

4 bytes NNCF, 4 bytes length, 4 bytes CRC-32 of the rest (little-endian), JSON, a newline, the body.
"""

from __future__ import annotations

import json
import socket
import struct
import zlib
from typing import Any

MAGIC, HEAD = b"NNCF", struct.Struct("<4sII")
LONGEST = 2**30  # bytes of a message
STALLED = 60.0  # seconds without a byte in the middle of a message


class Damaged(ValueError):
    """A message that is not as it was sent: it is refused, and the next one can be read."""


def frame(header: dict[str, Any], body: bytes = b"") -> bytes:
    """A message as it goes over the wire."""
    rest = json.dumps(header, separators=(",", ":")).encode() + b"\n" + body
    return HEAD.pack(MAGIC, len(rest), zlib.crc32(rest)) + rest


class Connection:
    """One end of a socket. `sent` and `received` count its bytes, without those of TCP and IP.

    Its methods raise a ConnectionError where the other end has gone, begins no message for `patience` seconds
    (None: for ever), stalls within one, or speaks another protocol. With `patience` of None it also sends for
    as long as it takes: a server that reads the updates one by one may come to this one late.
    """

    def __init__(self, end: socket.socket, *, patience: float | None = STALLED) -> None:
        self.socket, self.patience, self.sent, self.received = end, patience, 0, 0

    def send(self, body: bytes = b"", **header: Any) -> None:
        """Send a message."""
        self.send_frame(frame(header, body))

    def send_frame(self, data: bytes) -> None:
        """Send what `frame` has made."""
        self.socket.settimeout(None if self.patience is None else STALLED)
        self.socket.sendall(data)
        self.sent += len(data)

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """Wait for a message: its header and body. `Damaged` where it is not whole, or has no header."""
        self.socket.settimeout(self.patience)
        magic, length, checksum = HEAD.unpack(self._exactly(HEAD.size))
        if magic != MAGIC or length > LONGEST:
            raise ConnectionError(f"{magic!r} and a length of {length:,} begin no message")
        self.socket.settimeout(STALLED)
        rest = self._exactly(length)
        text, _, body = rest.partition(b"\n")
        if zlib.crc32(rest) != checksum:
            raise Damaged(f"the checksum of a message of {length:,} bytes differs")
        try:
            header = json.loads(text)
        except (ValueError, RecursionError):
            header = None
        if not isinstance(header, dict):
            raise Damaged(f"{text[:40]!r} is no header of a message")
        return header, body

    def _exactly(self, count: int) -> bytes:
        """The next so many bytes."""
        data = bytearray()
        while len(data) < count:
            try:
                part = self.socket.recv(min(count - len(data), 2**20))
            except TimeoutError:
                raise ConnectionError(f"silent for {self.socket.gettimeout():g} s") from None
            if not part:
                raise ConnectionError(f"closed, {count - len(data):,} bytes before the end of a message")
            data += part
            self.received += len(part)
        return bytes(data)

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()
