"""Seeded: two Sessions against a server that is a few dicts, on a clock that only moves when somebody waits.

The server answers late, in any order, twice or not at all, loses and repeats pushes, cuts connections, and forgets streams
as section 7 of `proto/wire.md` says. Whatever it does, each message is acknowledged once and shown once, in order.

    cd scripts && python3 -m python.simulation [ROUNDS [SEED]]
"""

from __future__ import annotations

import random
import sys
import time as real_time
from typing import Any

from . import session, store
from .session import Session
from .store import Store
from .wire import COMMANDS, Fields, cut, decode, frame

CHAT, HISTORY = "alice:bob", 7
Answer = tuple[str, Fields]


class Clock:
    """Stands in for the module `time`."""
    now = 1_000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, wait_s: float) -> None:
        self.now += wait_s

    time = staticmethod(real_time.time)


class Server:
    def __init__(self, rng: random.Random, clock: Clock) -> None:
        self.rng, self.clock, self.links = rng, clock, set[Link]()
        self.messages: list[Fields] = []
        self.answers: dict[int, list[int]] = {}  # stream -> seq of n 1, 2, 3 ...
        self.delivered = 0
        self.forgets, self.cuts = rng.random() < 0.3, rng.random() < 0.5

    def handle(self, link: Link, command: str, asked: Fields) -> Answer | None:
        request = {"request": asked.get("request", 0)}
        if command == "Login":
            link.user = asked["user"]
            return "LoginAck", {"wire": 1, "heartbeat_ms": 30_000, "unanswered_max": 32, "message_bytes_max": 32_768,
                                "frame_bytes_max": 65_536}
        if command == "Ping":
            return "Pong", asked
        if command == "PushAck":
            self.delivered = max(self.delivered, asked["seq"])
            return None
        if self.rng.random() < 0.05:
            key = {"stream": asked["stream"], "n": asked["n"]} if command == "Send" else request
            return "Error", {"code": 30, "command": 5 if command == "Send" else 7 if command == "Sync" else 9,
                             "chat": asked.get("chat", ""), "retry_after_ms": self.rng.choice((0, 20, 400)), **key}
        if command == "Send":
            return self.append(asked)
        if command == "Sync":
            held = next((c["seq"] for c in asked["cursors"]), None)
            heads = [{"chat": CHAT, "history": HISTORY, "head": len(self.messages), "delivered": self.delivered}]
            news = self.messages and held != len(self.messages)
            return "SyncAck", {"chats": heads if news else [], **request}
        end = asked["cursor"] + self.rng.randint(1, 100)
        return "PullAck", {"chat": CHAT, "history": HISTORY, "messages": self.messages[asked["cursor"]:end],
                           "has_more": end < len(self.messages), "head": len(self.messages), **request}

    def append(self, asked: Fields) -> Answer:
        key = {"stream": asked["stream"], "n": asked["n"], "chat": CHAT}
        answers = self.answers.setdefault(asked["stream"], [])
        if asked["n"] > len(answers) + 1:
            return "Error", {"code": 23, "command": 5, "expected": len(answers) + 1, **key}
        if asked["n"] <= len(answers) - 32:
            return "Error", {"code": 24, "command": 5, **key}
        if asked["n"] == len(answers) + 1:
            seq = len(self.messages) + 1
            self.messages.append({"seq": seq, "sender": "alice", "time_us": seq, "body": asked["body"]})
            answers.append(seq)
            for _ in range(self.rng.choice((0, 1, 1, 1, 1, 2))):
                self.push_newest()
        return "SendAck", {"seq": answers[asked["n"] - 1], "time_us": 1, "history": HISTORY, **key}

    def push_newest(self) -> None:
        for link in self.links:
            if link.user == "bob" and self.messages:
                link.deliver("Push", {"chat": CHAT, "history": HISTORY, "message": self.messages[-1]})


class Link:
    """Stands in for `Connection`."""
    server: Server

    def __init__(self, address: str) -> None:
        self.address, self.user, self.socket = address, "", self
        self.rng, self.clock = self.server.rng, self.server.clock
        self.sent_at = self.heard_at = self.clock.now
        self.coming: list[tuple[float, bytes]] = []
        if self.server.cuts and self.rng.random() < 0.2:
            raise ConnectionError("refused")
        self.server.links.add(self)

    def send(self, command: str, **fields: Any) -> None:
        self.sent_at = self.clock.now
        self.fail()
        answer = self.server.handle(self, command, decode(command, frame(command, fields)[4:]))
        # No answer at all is what a resend is for.
        if answer and not (command != "Login" and self.rng.random() < 0.02):
            self.deliver(*answer)

    def deliver(self, command: str, fields: Fields) -> None:
        late = self.rng.choice((0.0, 0.001, 0.01, 0.3))
        self.coming.append((self.clock.now + self.rng.random() * late, frame(command, fields)))

    def receive(self, wait_s: float) -> Answer | None:
        self.fail()
        first = min(self.coming, default=None)
        if first is None or first[0] > self.clock.now + wait_s:
            self.clock.now += wait_s
            return None
        self.coming.remove(first)
        self.clock.now = self.heard_at = max(self.clock.now, first[0])
        command, body = cut(first[1]) or (0, b"")
        return COMMANDS[command], decode(COMMANDS[command], body)

    def fail(self) -> None:
        if self not in self.server.links:
            raise ConnectionError("it was cut")
        if self.server.cuts and self.rng.random() < 0.004:
            self.server.links.discard(self)
            raise ConnectionError("cut")

    def close(self) -> None:
        self.server.links.discard(self)


def simulate(seed: int) -> None:
    rng, clock = random.Random(seed), Clock()
    server = Link.server = Server(rng, clock)
    count = rng.choice((1, 5, 120))
    session.Connection, session.time, session.random = Link, clock, rng  # type: ignore[assignment,misc]
    session.say = store.say = lambda text: None
    alice, bob = (Session(user, "phone", lambda: (["here"], 0.0), Store(None), receive=user == "bob")
                  for user in ("alice", "bob"))
    outgoing, shown = [], []
    while len(shown) < count or not all(o.is_answered for o in outgoing):
        if len(outgoing) < count and rng.random() < 0.5:
            outgoing.append(alice.enqueue(CHAT, str(len(outgoing)).encode()))
        alice.poll(rng.random() * 0.02)
        message = bob.next_message(clock.now + rng.random() * 0.02)
        if message:
            shown.append(message)
            bob.confirm(message)
        if server.forgets and rng.random() < 0.01 and all(o.is_answered for o in outgoing):
            for link in list(server.links):  # as after a week: nothing is unanswered or on its way
                link.coming.clear()
            server.answers.clear()
        if rng.random() < 0.01:  # servers push again what may have been lost
            server.push_newest()
        if clock.now > 3_000:
            raise AssertionError(f"seed {seed}: hangs; {len(shown)} shown, {len(outgoing)} sent")
    texts = [str(n).encode() for n in range(count)]
    assert [m["body"] for m in server.messages] == texts, f"seed {seed}: stored otherwise"
    assert [o.ack and o.ack["seq"] for o in outgoing] == [*range(1, count + 1)], f"seed {seed}: acknowledged otherwise"
    assert [m.body for m in shown] == texts, f"seed {seed}: shown otherwise"


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    first = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().getrandbits(32)
    for seed in range(first, first + rounds):
        simulate(seed)
    print(f"{rounds} rounds from seed {first}: every message acknowledged once, shown once, in order")
