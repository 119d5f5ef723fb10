"""A blocking socket that sends and receives frames, and where to connect it to: sections 1 and 14 of `proto/wire.md`.

Trap: closing a socket over bytes that were not read resets the connection, and what was sent last may be lost with it.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import time
import urllib.request
from typing import Any

from .wire import COMMANDS, FRAME_BYTES_MAX, Fields, cut, decode, frame

LOGIN_S_MAX = 15.0  # connecting, and waiting for the LoginAck
WRITE_S_MAX = 10.0


class Connection:
    """A socket that speaks frames. Every trouble with it is an OSError, after which it is of no use."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.address = address
        self.socket = socket.create_connection((host.strip("[]"), int(port)), LOGIN_S_MAX)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = bytearray()
        self.sent_at = self.heard_at = time.monotonic()

    def send(self, command: str, **fields: Any) -> None:
        self.socket.settimeout(WRITE_S_MAX)
        self.socket.sendall(frame(command, fields))
        self.sent_at = time.monotonic()

    def receive(self, wait_s: float) -> tuple[str, Fields] | None:
        """The next frame; None: there was none in time. Commands that are not known are skipped."""
        deadline = time.monotonic() + wait_s
        while True:
            found = cut(self.buffer)
            if found:
                command, body = found
                del self.buffer[:4 + len(body)]
                if command in COMMANDS:
                    return COMMANDS[command], decode(COMMANDS[command], body)
                continue
            self.socket.settimeout(max(0.0, deadline - time.monotonic()))
            try:
                data = self.socket.recv(FRAME_BYTES_MAX)
            except (TimeoutError, BlockingIOError):
                return None
            if not data:
                raise ConnectionError("the server closed the connection")
            self.buffer += data
            self.heard_at = time.monotonic()

    def close(self) -> None:
        """Says that nothing more comes, and reads to the end."""
        try:
            self.socket.shutdown(socket.SHUT_WR)
            self.socket.settimeout(1.0)
            while self.socket.recv(FRAME_BYTES_MAX):
                pass
        except OSError:
            pass
        self.socket.close()


class Directory:
    """Where gateways are: a list that is known, or ipconf, which is asked each time."""

    def __init__(self, gateways: list[str], ipconf: str) -> None:
        self.gateways, self.ipconf = gateways, ipconf

    def ask(self) -> tuple[list[str], float]:
        """Addresses to try in this order, and how long to wait when there are none."""
        if self.gateways:
            return random.sample(self.gateways, len(self.gateways)), 0.0
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(self.ipconf.rstrip("/") + "/ip/list", timeout=5) as answer:
                found = json.load(answer)
            return [gateway["addr"] for gateway in found["gateways"]], found["wait_ms"] / 1000
        except (http.client.HTTPException, ValueError, KeyError) as error:
            raise ConnectionError(f"ipconf answered something else: {error!r}") from None
