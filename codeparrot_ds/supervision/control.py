"""The connection between the command (``codeparrot-ds train``) and the guards of its ranks. No torch here.

One JSON object per line over TCP. A guard reports once per second where its rank is, and at the end how it ended; the
command sends ``stop``, ``dump`` and ``kill``, and once per second a sign of life. Whoever receives nothing for
`SILENCE_SECONDS` takes the other host, or the network to it, for lost.
"""

from __future__ import annotations

import dataclasses
import hmac
import json
import os
import secrets
import selectors
import socket
import time
from typing import Any

from codeparrot_ds.supervision.heartbeat import Place

ADDRESS = "CODEPARROT_DS_CONTROL"
"""Environment variable: ``host:port`` of the command."""
TOKEN = "CODEPARROT_DS_CONTROL_TOKEN"
"""Environment variable: the secret by which a guard shows that it belongs to this start."""
BEAT_SECONDS = 1.0
SILENCE_SECONDS = 15.0
MAX_LINE = 1 << 16  # bytes: messages are far shorter, so a longer line is not one of ours


class Line:
    """One end of a connection; nothing in it blocks."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self.heard = time.monotonic()
        self._input = b""
        self._output = b""

    def send(self, message: dict[str, Any]) -> bool:
        """Sends a message, or as much of it as the socket takes now; False when the other end is gone."""
        self._output += json.dumps(message).encode() + b"\n"
        try:
            while self._output:
                self._output = self._output[self.socket.send(self._output) :]
        except BlockingIOError:
            return len(self._output) < MAX_LINE  # the rest goes with the next message
        except OSError:
            return False
        return True

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come; None when the other end is gone."""
        try:
            part = self.socket.recv(MAX_LINE)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not part:
            return None
        self.heard = time.monotonic()
        *lines, self._input = (self._input + part).split(b"\n")
        if len(self._input) > MAX_LINE:
            return None
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def close(self) -> None:
        self.socket.close()


@dataclasses.dataclass(kw_only=True)
class RankView:
    """What the command knows of a rank from its guard's reports; times are of ``time.monotonic``."""

    host: str
    pid: int
    """Of the process that trains, not of its guard."""
    place: Place | None = None
    state: str = "?"
    """As ``/proc`` has it: ``R``, ``S``, ``D``, ``T`` (stopped) …"""
    stopped: float | None = None
    """Since when the reports say ``T``; None while the process runs or waits."""
    heard: float = 0.0
    """When the last report came."""
    gone: float | None = None
    """When the connection ended although no exit code had been reported."""
    exit_code: int | None = None
    """Negative for a signal; None while the rank lives."""


class ControlServer:
    """The command's end: call :meth:`turn` again and again."""

    def __init__(self) -> None:
        self.token = secrets.token_hex(16)
        self.ranks: dict[int, RankView] = {}
        self._listener = socket.socket()
        self._listener.bind(("0.0.0.0", 0))
        self._listener.listen(1024)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._lines: dict[int, Line] = {}
        self._unknown: set[Line] = set()
        self._standing: list[dict[str, Any]] = []
        self._last_beat = 0.0

    def watch(self, descriptor: int) -> None:
        """Wakes :meth:`turn` when this descriptor can be read."""
        self._selector.register(descriptor, selectors.EVENT_READ, descriptor)

    def forget(self, descriptor: int) -> None:
        self._selector.unregister(descriptor)

    def tell(self, message: dict[str, Any]) -> None:
        """Sends a message to every guard, and to those that come later."""
        self._standing.append(message)
        for line in list(self._lines.values()):
            line.send(message)

    def listening(self) -> bool:
        """Whether any guard is still connected."""
        return bool(self._lines)

    def turn(self, seconds: float) -> None:
        """Receives what the guards report; returns after ``seconds`` if nothing comes."""
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._listener:
                self._accept()
            elif isinstance(key.data, Line):
                self._hear(key.data)
        now = time.monotonic()
        if now - self._last_beat >= BEAT_SECONDS:
            self._last_beat = now
            for line in list(self._lines.values()):
                line.send({"do": "nothing"})

    def close(self) -> None:
        for line in (*self._lines.values(), *self._unknown):
            line.close()
        self._listener.close()
        self._selector.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        line = Line(connection)
        self._unknown.add(line)
        self._selector.register(connection, selectors.EVENT_READ, line)

    def _hear(self, line: Line) -> None:
        messages = line.receive()
        for message in messages or ():
            # Any host of the network can connect: until the token came, nothing else counts.
            if line in self._unknown and not self._greet(line, message):
                messages = None
                break
            rank = next(rank for rank, other in self._lines.items() if other is line)
            view = self.ranks[rank]
            view.heard = time.monotonic()
            if "place" in message:
                view.place, view.state = Place(**message["place"]), message["state"]
                view.stopped = (view.stopped or view.heard) if view.state == "T" else None
            if "ended" in message:
                view.exit_code = message["ended"]
        if messages is None:
            self._drop(line)

    def _greet(self, line: Line, message: dict[str, Any]) -> bool:
        if not hmac.compare_digest(str(message.get("token")), self.token):
            return False
        self._unknown.discard(line)
        rank = int(message["rank"])
        self.ranks[rank] = RankView(host=str(message["host"]), pid=int(message["pid"]), heard=time.monotonic())
        self._lines[rank] = line
        for standing in self._standing:
            line.send(standing)
        return True

    def _drop(self, line: Line) -> None:
        self._selector.unregister(line.socket)
        line.close()
        self._unknown.discard(line)
        for rank, other in list(self._lines.items()):
            if other is line:
                del self._lines[rank]
                self.ranks[rank].gone = time.monotonic()


def connect(environment: os._Environ[str] | dict[str, str], seconds: float = 10.0) -> Line | None:
    """A guard's end; None where the command cannot be reached within so many seconds.

    Raises:
        ConnectionRefusedError: its host answers but nobody listens there: the command has ended already.
    """
    host, _, port = environment[ADDRESS].rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            return Line(socket.create_connection((host, int(port)), timeout=max(0.1, deadline - time.monotonic())))
        except ConnectionRefusedError:
            raise
        except OSError:
            if time.monotonic() > deadline - 0.5:
                return None
            time.sleep(0.5)
