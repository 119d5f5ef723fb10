"""A scripted conversation, frame by frame, that prints each step as one line and checks every answer.

It speaks through bare `Connection`s, so that what is printed is what the wire carries. Run again on the same servers it
tells the same story with higher seqs: users and devices stay, streams are new.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from .connection import Connection
from .store import Lane
from .wire import ENUMS, Fields, name_of, sorted_chat

PATIENCE_S = 10.0


class Surprise(Exception):
    """An answer that the page does not promise."""


class Story:
    """Two people, and a line per step."""

    def __init__(self, address: str, user: str, to: str) -> None:
        self.address, self.user, self.to = address, user, to
        self.chat = sorted_chat(f"{user}:{to}")
        self.stream = Lane().stream
        self.attempt = int(time.time() * 1000)
        self.request = random.randrange(1, 2**31)
        self.step = 0

    def tell(self, what: str, happened: str) -> None:
        self.step += 1
        print(f"{self.step:2} {what:<15}{happened}", flush=True)

    def login(self, user: str) -> tuple[Connection, Fields]:
        self.attempt += 1
        link = Connection(self.address)
        link.send("Login", wire_min=1, wire_max=1, user=user, device="story", attempt=self.attempt, agent="story")
        return link, expect(link, "LoginAck", wire=1)

    def send(self, link: Connection, n: int, text: str, answer: str = "SendAck", **wanted: Any) -> Fields:
        link.send("Send", stream=self.stream, n=n, chat=self.chat, body=text.encode())
        return expect(link, answer, stream=self.stream, n=n, chat=self.chat, **wanted)

    def ask(self, link: Connection, command: str, answer: str = "", **fields: Any) -> Fields:
        self.request += 1
        link.send(command, request=self.request, **fields)
        return expect(link, answer or command + "Ack", request=self.request)

    def head_of_chat(self, link: Connection, cursors: list[Fields]) -> Fields:
        """What a Sync says of the chat, over all its pages."""
        after, has_more, heads = "", True, []
        while has_more:
            ack = self.ask(link, "Sync", after=after, cursors=[c for c in cursors if c["chat"].encode() > after.encode()])
            after, has_more = ack["next"], ack["has_more"]
            heads += [head for head in ack["chats"] if head["chat"] == self.chat]
        if not heads:
            raise Surprise(f"the Sync does not name {self.chat}")
        return heads[0]

    def run(self) -> None:
        alice, ack = self.login(self.user)
        durability = ENUMS["Durability"].get(ack["durability"])
        self.tell("log in", f"{self.user}: Login attempt {self.attempt} → LoginAck wire {ack['wire']}, user_id "
                  f"{ack['user_id']}, {durability}, heartbeat_ms {ack['heartbeat_ms']}")
        bob, ack = self.login(self.to)
        self.tell("log in", f"{self.to}: Login attempt {self.attempt} → LoginAck wire {ack['wire']}, user_id {ack['user_id']}")
        bob.send("Ping", nonce=300)
        expect(bob, "Pong", nonce=300)
        self.tell("heartbeat", f"{self.to}: Ping nonce 300 → Pong nonce 300")

        first = self.send(alice, 1, "hello")
        seq, history = first["seq"], first["history"]
        self.tell("send", f"{self.user}: Send n 1 'hello' → SendAck seq {seq}: it is durable")
        push = expect(bob, "Push", lambda push: push["message"]["seq"] == seq, chat=self.chat, history=history)
        self.tell("receive", f"{self.to}: ← Push {self.chat} seq {seq}, sender {push['message']['sender']}, "
                  f"{push['message']['body'].decode()!r}")
        bob.send("PushAck", chat=self.chat, history=history, seq=seq)
        deadline = time.monotonic() + PATIENCE_S
        while (head := self.head_of_chat(bob, []))["delivered"] < seq:
            if time.monotonic() > deadline:
                raise Surprise("the PushAck changed nothing")
            bob.receive(0.05)  # delivered cursors are written some times a second
        self.tell("acknowledge", f"{self.to}: PushAck up to seq {seq} → a Sync says delivered {head['delivered']}")

        bob.close()
        for n, text in ((2, "are you there?"), (3, "call me")):
            self.send(alice, n, text, seq=seq + n - 1)
        self.tell("send", f"{self.to} is away; {self.user}: Send n 2 and 3 → SendAck seq {seq + 1} and {seq + 2}")
        bob, _ = self.login(self.to)
        cursor = {"chat": self.chat, "history": history, "seq": seq}
        head = self.head_of_chat(bob, [cursor])
        if head["head"] != seq + 2:
            raise Surprise(f"the Sync says head {head['head']}")
        self.tell("reconnect", f"{self.to}: Login attempt {self.attempt}, Sync with cursor {seq} → SyncAck {self.chat} "
                  f"head {head['head']}")
        page = self.ask(bob, "Pull", chat=self.chat, history=history, cursor=seq)
        missed = [(message["seq"], message["body"].decode()) for message in page["messages"]]
        if missed != [(seq + 1, "are you there?"), (seq + 2, "call me")] or page["has_more"]:
            raise Surprise(f"the Pull brings {missed}")
        self.tell("pull", f"{self.to}: Pull behind {seq} → PullAck " + ", ".join(f"{s} {text!r}" for s, text in missed))

        again = self.send(alice, 1, "hello")
        if again != first:
            raise Surprise(f"{again} after {first}")
        self.tell("duplicate", f"{self.user}: Send n 1 again → the same SendAck, seq {seq}, time_us {again['time_us']}")
        error = self.send(alice, 10, "too early", "Error", code=23, expected=4)
        self.tell("out of order", f"{self.user}: Send n 10 → Error {name_of(error['code'])}, expected {error['expected']}")
        error = self.ask(alice, "Pull", "Error", chat="carol:dave")
        if error["code"] != 21 or error["closing"]:
            raise Surprise(f"the Pull of a stranger's chat is answered {error}")
        self.tell("refused", f"{self.user}: Pull carol:dave → Error {name_of(error['code'])}; the connection stays")
        ack = self.send(alice, 4, "bye", seq=seq + 3)
        self.tell("send", f"{self.user}: Send n 4 'bye' → SendAck seq {ack['seq']}: the refusals used up no id")

        newer, _ = self.login(self.to)
        kick = expect(bob, "Kick", code=40)
        self.tell("replaced", f"{self.to}: the same device logs in again → Kick {name_of(kick['code'])} on the older connection")
        stale = Connection(self.address)
        stale.send("Login", wire_min=1, wire_max=1, user=self.to, device="story", attempt=self.attempt - 1)
        error = expect(stale, "Error", code=14, expected=self.attempt, closing=True)
        self.tell("stale", f"{self.to}: Login attempt {self.attempt - 1} → Error {name_of(error['code'])}, expected "
                  f"{error['expected']}, closing")
        for link in (alice, bob, newer, stale):
            link.close()


def expect(link: Connection, command: str, fits: Callable[[Fields], bool] = lambda _: True, **wanted: Any) -> Fields:
    """The next frame of this kind with these fields; others in between are pushes and late answers."""
    deadline, last = time.monotonic() + PATIENCE_S, "nothing"
    while (left := deadline - time.monotonic()) > 0 and (found := link.receive(left)):
        got, fields = found
        if got == command and all(fields[name] == value for name, value in wanted.items()) and fits(fields):
            return fields
        last = f"{got} {fields}"
    raise Surprise(f"no {command} with {wanted} came; the last frame was {last}")
