"""What must outlive the program: the login attempt, streams and counters, unanswered messages, cursors (section 15 of
`proto/wire.md`, point 1).

Trap: what the server may hear of must be on disk first. `Session` calls `save` before each Login, Send and PushAck.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from .wire import Fields

UNANSWERED_DAYS_MAX = 5  # streams are remembered for 7 days: what is older is unknown, not resent


def say(text: str) -> None:
    """What the person at the terminal should know; standard output is for results."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class Outgoing:
    """A Send and what became of it."""
    n: int
    body: bytes
    made_at: float
    ack: Fields | None = None
    refused: str = ""

    @property
    def is_answered(self) -> bool:
        return self.ack is not None or self.refused != ""


@dataclass
class Lane:
    """The Sends of one chat. Each chat has a stream of its own: one that is given up then touches no other chat."""
    stream: int = field(default_factory=lambda: random.SystemRandom().getrandbits(64))
    next_n: int = 1
    waiting: list[Outgoing] = field(default_factory=list)  # unanswered, in the order of n
    # Of an earlier run: its file may be an older copy, and lack numbers that were given. So what comes now waits until nothing is unanswered,
    # and is of a stream of its own.
    is_inherited: bool = False
    later: list[Outgoing] = field(default_factory=list)
    # From here on: of the connection that is open.
    sent: int = 0            # how many of `waiting` are on their way
    first_n: int = 1         # the lowest unanswered n when it was opened
    resend_at: float = 0.0   # when all of them are sent again
    is_held: bool = False    # nothing is sent until then
    is_doubted: bool = False

    def add(self, outgoing: Outgoing) -> None:
        if self.is_inherited:
            self.later.append(outgoing)
            self.renew_if_inherited()
        else:
            outgoing.n = self.next_n
            self.next_n += 1
            self.waiting.append(outgoing)

    def renew_if_inherited(self) -> None:
        """Begins the stream of this run as soon as nothing of the one before is unanswered."""
        if not self.is_inherited or self.waiting:
            return
        later, self.later = self.later, []
        self.stream, self.next_n, self.is_inherited = Lane().stream, 1, False
        self.sent, self.first_n, self.is_held, self.is_doubted = 0, 1, False, False
        for outgoing in later:
            self.add(outgoing)


class Store:
    """What must outlive the program, in a JSON file that is replaced as a whole; without a path it lives in memory only."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.is_dirty = path, False
        self.attempt = 0
        self.lanes: dict[str, Lane] = {}
        self.cursors: dict[str, tuple[int, int]] = {}  # chat -> history, seq: shown to the application up to here
        if path is None:
            return
        self.lock = open(path.with_name(path.name + ".lock"), "w")
        fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # two programs with one file would use ids twice
        if not path.exists():
            return
        kept = json.loads(path.read_text())
        self.attempt = kept["attempt"]
        self.cursors = {chat: (history, seq) for chat, history, seq in kept["cursors"]}
        for chat, stream, next_n, waiting, *more in kept["lanes"]:
            outgoing = [Outgoing(n, bytes.fromhex(body), made_at) for n, body, made_at in waiting]
            later = [Outgoing(0, bytes.fromhex(body), made_at) for body, made_at in (more or [[]])[0]]
            if outgoing and time.time() - outgoing[0].made_at > UNANSWERED_DAYS_MAX * 86_400:
                say(f"{len(outgoing)} old messages in {chat}: it is unknown whether they were sent")
                outgoing = []
            self.lanes[chat] = Lane(stream, next_n, outgoing, is_inherited=True, later=later)
            self.lanes[chat].renew_if_inherited()

    def save(self) -> None:
        """Before anything is sent that the file does not know yet."""
        if not self.is_dirty:
            return
        self.is_dirty = False
        if self.path is None:
            return
        lanes = [(chat, lane.stream, lane.next_n, [(o.n, o.body.hex(), o.made_at) for o in lane.waiting],
                  [(o.body.hex(), o.made_at) for o in lane.later])
                 for chat, lane in self.lanes.items()]
        cursors = [(chat, history, seq) for chat, (history, seq) in self.cursors.items()]
        part = self.path.with_name(self.path.name + ".part")
        with open(part, "w") as file:
            json.dump({"attempt": self.attempt, "lanes": lanes, "cursors": cursors}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path)

    def next_attempt(self) -> int:
        self.attempt = max(int(time.time() * 1000), self.attempt + 1)
        self.is_dirty = True
        self.save()
        return self.attempt
