"""A device that stays logged in: comes back, resends, catches up, keeps order, acknowledges. Sections 4, 5 and 7 to 10 of
`proto/wire.md`.

One thread does everything: whoever waits calls `Session.poll`, which also does what is due (Ping, resending, Pull, PushAck).
Trap: a program that calls it less often than the heartbeat is disconnected.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from .connection import LOGIN_S_MAX, Connection
from .store import Lane, Outgoing, Store, say
from .wire import COMMANDS, ENUMS, FRAME_BYTES_MAX, Fields, WireError, decode, encode, name_of, sorted_chat

BACKOFF_S = (0.1, 10.0)      # section 4: up to the first, doubling up to the second
RESEND_S = 5.0               # an unanswered frame is sent again on a live connection
REWIND_S = 0.05              # one resend answers all OUT_OF_ORDERs of a burst
RETRY_S = 0.5                # for transient errors that name no time
HOLE_S = 0.1                 # section 8
PUSH_ACK_S = 0.05            # section 8
HELD_MAX, INBOX_MAX, PULLS_MAX = 256, 1_000, 8
STALE_MAX = 3

# Errors with `closing` after which coming back would only bring the same answer.
FINAL_CLOSING = {"FRAME_TOO_LARGE", "UNKNOWN_COMMAND", "BAD_BODY", "NOT_LOGGED_IN", "ALREADY_LOGGED_IN", "BAD_REQUEST",
                 "UNSUPPORTED_VERSION", "BAD_NAME", "LOGIN_REFUSED", "TOO_MANY_DEVICES"}
TRANSIENT = {"UNAVAILABLE", "RATE_LIMITED"}


class Ended(Exception):
    """Kicked, or refused for good: do not come back by yourself."""


class Message(NamedTuple):
    chat: str
    history: int
    seq: int
    sender: str
    time_us: int
    body: bytes
    is_own: bool = False  # the SendAck of one's own: takes its place in the order, is not shown
    kind: int = 0  # KIND_TEXT; what else there is stands in wire.md, section 7


@dataclass
class Chat:
    """Receiving in one chat. What is up to `position` went to the inbox; the Store knows what the application confirmed."""
    history: int
    position: int
    head: int = 0
    held: dict[int, Message] = field(default_factory=dict)  # above position + 1
    pull_at: float | None = None
    is_pulling: bool = False
    is_hinted: bool = False   # somebody named another history; only the answer to a later Pull decides
    older: int = 0            # answers in a row whose head was below our cursor


@dataclass
class Request:
    """A Sync or Pull without an answer."""
    command: str
    fields: Fields
    due: float


class Session:
    """A device that stays logged in. `receive=False`: it only sends, so it neither catches up nor acknowledges."""

    def __init__(self, user: str, device: str, find: Callable[[], tuple[list[str], float]], store: Store,
                 receive: bool = True) -> None:
        self.user, self.device, self.find, self.store, self.receives = user, device, find, store, receive
        self.link: Connection | None = None
        self.limits: Fields = {}
        self.addresses: list[str] = []
        self.avoid, self.failures, self.stale, self.connect_at = "", 0, 0, 0.0
        self.leave_at: float | None = None
        self.chats = {chat: Chat(history, seq) for chat, (history, seq) in store.cursors.items()}
        self.inbox: deque[Message] = deque()
        self.requests: dict[int, Request] = {}
        self.last_request = 0
        self.sync_parts: list[tuple[str, str]] = []
        self.has_synced = self.sync_again = False
        self.to_ack: set[str] = set()
        self.ack_at = 0.0

    # What the application calls

    def enqueue(self, chat: str, body: bytes) -> Outgoing:
        """Takes a message for sending; `poll` until it is answered."""
        if len(body) > self.limits.get("message_bytes_max", 32_768):
            raise ValueError("the message is too long")  # its frame might be too, which would close the connection
        lane = self.store.lanes.setdefault(sorted_chat(chat), Lane())
        outgoing = Outgoing(0, body, time.time())
        lane.add(outgoing)
        self.store.is_dirty = True
        return outgoing

    def next_message(self, deadline: float) -> Message | None:
        """The next message in the order of its chat; None: none until `deadline`. Comes again unless it is confirmed."""
        while True:
            while self.inbox:
                message = self.inbox.popleft()
                if not message.is_own:
                    return message
                self.confirm(message)
            if time.monotonic() >= deadline:
                return None
            self.poll(deadline - time.monotonic())

    def confirm(self, message: Message) -> None:
        """The application has it for good: the cursor moves, and the server will hear of it."""
        if self.chats[message.chat].history == message.history:
            self.store.cursors[message.chat] = (message.history, message.seq)
            self.store.is_dirty = True
            self.to_ack.add(message.chat)

    def close(self) -> None:
        self.store.save()
        if self.link:
            try:
                self._acknowledge()
            except OSError:
                pass
            self.link.close()

    def poll(self, wait_s: float) -> None:
        """Does what is due, then waits for a frame, for at most `wait_s`, and handles all that came."""
        try:
            if self.link is None:
                return self._connect(wait_s)
            self._timers(time.monotonic())
            self.store.save()
            if self.link is None:
                return
            is_busy = self.requests or self.to_ack or any(lane.waiting for lane in self.store.lanes.values()) \
                or any(chat.pull_at is not None for chat in self.chats.values())
            found = self.link.receive(max(0.0, min(wait_s, 0.02 if is_busy else 0.5)))
            while found:
                self._handle(*found)
                found = self.link.receive(0) if self.link else None
        except (OSError, WireError) as error:
            self._lost(str(error))

    # Coming and going: sections 4 and 5

    def _connect(self, wait_s: float) -> None:
        wait = self.connect_at - time.monotonic()
        if wait > 0:
            return time.sleep(min(wait, wait_s))
        if not self.addresses:
            self.addresses, wait = self.find()
            self.addresses.sort(key=lambda address: address == self.avoid)
            if not self.addresses:
                return self._lost("there is no gateway yet", wait)
        link = self.link = Connection(self.addresses.pop(0))
        link.send("Login", wire_min=1, wire_max=1, user=self.user, device=self.device, attempt=self.store.next_attempt(),
                  agent="rookery-python/0.1.0")
        deadline = time.monotonic() + LOGIN_S_MAX
        while (found := link.receive(deadline - time.monotonic())) and found[0] not in ("LoginAck", "Error", "Kick"):
            pass
        if not found:
            raise ConnectionError("the login was not answered")
        if found[0] != "LoginAck":
            self._handle(*found)
            if self.link:
                raise ConnectionError("the login was refused, without an end")
            return
        self.limits, self.failures, self.stale, self.avoid, self.leave_at = found[1], 0, 0, "", None
        self.addresses = []  # asked anew at the next reconnect
        say(f"logged in at {link.address}, durability {ENUMS['Durability'].get(self.limits['durability'])}")
        for lane in self.store.lanes.values():
            lane.sent, lane.resend_at, lane.is_held, lane.is_doubted = 0, 0.0, False, False
            lane.first_n = lane.waiting[0].n if lane.waiting else lane.next_n
        self.requests.clear()
        for chat in self.chats.values():
            chat.is_pulling, chat.is_hinted, chat.older = False, False, 0
        if self.receives:
            self._sync()

    def _lost(self, why: str, wait_s: float = 0.0) -> None:
        """Without a connection: after a random time that grows, and not before `wait_s`, the next attempt."""
        if self.link:
            self.link.socket.close()
            self.link = None
        up_to = min(BACKOFF_S[1], BACKOFF_S[0] * 2 ** min(self.failures, 10))
        wait_s = max(wait_s, random.uniform(0, up_to))
        self.failures += 1
        self.connect_at = time.monotonic() + wait_s
        say(f"not connected: {why}; again in {wait_s:.2f} s")

    def _timers(self, now: float) -> None:
        link = self.link
        assert link is not None
        beat = (self.limits["heartbeat_ms"] or 30_000) / 1000
        if now - link.heard_at > 2 * beat:
            raise ConnectionError("nothing was heard for two heartbeats")
        if self.leave_at is not None and now >= self.leave_at:
            self.avoid = link.address
            link.close()
            self.link = None
            return
        if now - link.sent_at > 0.8 * beat or (now - link.heard_at > beat and now - link.sent_at > 1.0):
            link.send("Ping", nonce=1)
        for chat, lane in self.store.lanes.items():
            self._send_what_may_go(chat, lane, now)
        for request in self.requests.values():
            if now >= request.due:
                request.due = now + RESEND_S
                link.send(request.command, **request.fields)
        pulling = sum(chat.is_pulling for chat in self.chats.values())
        for name, chat in self.chats.items():
            is_due = chat.pull_at is not None and now >= chat.pull_at
            if is_due and not chat.is_pulling and pulling < PULLS_MAX and len(self.inbox) < INBOX_MAX:
                pulling += 1
                chat.pull_at, chat.is_pulling, chat.is_hinted = None, True, False
                self._ask("Pull", chat=name, history=chat.history, cursor=chat.position)
        if self.to_ack and now >= self.ack_at:
            self._acknowledge()
            self.ack_at = now + PUSH_ACK_S

    def _handle(self, command: str, fields: Fields) -> None:
        now = time.monotonic()
        if command == "SendAck":
            self._sent(fields)
        elif command == "Push":
            self._receive(fields["chat"], fields["history"], fields["message"] or decode("Message", b""))
        elif command == "SyncAck" and self._answers(fields):
            self._synced(fields, self.requests.pop(fields["request"]))
        elif command == "PullAck" and self._answers(fields):
            self._pulled(fields, self.requests.pop(fields["request"]))
        elif command == "Resync" and self.receives:
            self._sync()
        elif command == "Kick":
            raise Ended(f"kicked: {name_of(fields['code'])}, {fields['text']}")
        elif command == "GoAway":
            self.leave_at = now + random.uniform(0, fields["within_ms"] / 1000)
        elif command == "Error":
            self._error(fields, now)

    def _error(self, error: Fields, now: float) -> None:
        code, command = name_of(error["code"]), COMMANDS.get(error["command"], "")
        retry_s = error["retry_after_ms"] / 1000
        if error["closing"]:
            if code == "STALE_ATTEMPT":
                self.stale += 1
                self.store.attempt = max(self.store.attempt, error["expected"])
            if code in FINAL_CLOSING or self.stale >= STALE_MAX:
                raise Ended(f"{code}: {error['text']}")
            self._lost(f"{code}: {error['text']}", retry_s)
        elif command == "Send":
            self._not_sent(error, code, now)
        elif command in ("Sync", "Pull") and error["request"] in self.requests:
            request = self.requests[error["request"]]
            if code in TRANSIENT or command == "Sync":
                request.due = now + (retry_s or RETRY_S)
            else:  # asking again does not help; the next Push of the chat will try
                del self.requests[error["request"]]
                self.chats[request.fields["chat"]].is_pulling = False
                say(f"cannot read {request.fields['chat']}: {code}: {error['text']}")

    # Sending: section 7

    def _send_what_may_go(self, chat: str, lane: Lane, now: float) -> None:
        assert self.link is not None
        if lane.waiting and now >= lane.resend_at and (lane.sent or lane.is_held):
            if lane.is_doubted:
                raise ConnectionError(f"the server seems to have forgotten the stream of {chat}")
            lane.sent, lane.is_held = 0, False
        if lane.is_held or lane.sent >= len(lane.waiting):
            return
        self.store.save()
        n_end = lane.waiting[0].n + (self.limits["unanswered_max"] or 32)
        for outgoing in lane.waiting[lane.sent:]:
            if outgoing.n >= n_end:
                break
            self.link.send("Send", stream=lane.stream, n=outgoing.n, chat=chat, body=outgoing.body)
            lane.sent += 1
            lane.resend_at = now + RESEND_S

    def _sent(self, ack: Fields) -> None:
        outgoing = self._take(ack)
        if outgoing:
            outgoing.ack = ack
            if self.receives:
                own = {"seq": ack["seq"], "sender": self.user, "time_us": ack["time_us"], "body": outgoing.body}
                self._receive(ack["chat"], ack["history"], own, is_own=True)

    def _take(self, answer: Fields) -> Outgoing | None:
        """Takes what is answered for good out of its lane. None: a second answer, or one without its keys."""
        lane = self.store.lanes.get(lane_name(answer["chat"]))
        if lane is None or lane.stream != answer["stream"]:
            return None
        for at, outgoing in enumerate(lane.waiting):
            if outgoing.n == answer["n"]:
                del lane.waiting[at]
                lane.sent -= at < lane.sent
                lane.is_doubted = False
                if not lane.is_held:
                    lane.resend_at = time.monotonic() + RESEND_S
                lane.renew_if_inherited()
                self.store.is_dirty = True
                return outgoing
        return None

    def _not_sent(self, error: Fields, code: str, now: float) -> None:
        lane = self.store.lanes.get(lane_name(error["chat"]))
        if lane is None or lane.stream != error["stream"] or not lane.waiting:
            return
        if code in TRANSIENT:
            lane.is_held = True
            lane.resend_at = now + (error["retry_after_ms"] / 1000 or RETRY_S)
        elif code == "OUT_OF_ORDER":
            expected, lowest = error["expected"], lane.waiting[0].n
            if expected >= lowest:
                # It says the same for all that stand behind the missing one: one resend for them all.
                if not lane.is_held:
                    lane.is_held, lane.resend_at = True, now + REWIND_S
            elif expected >= lane.first_n:
                lane.is_doubted = True  # late, or forgotten: a new connection, with no late answers, decides
            else:
                # All that this connection sent came after the answers below first_n, so they are forgotten.
                say(f"the server has forgotten a stream; {len(lane.waiting)} messages get new ids")
                lane.stream = Lane().stream
                for n, outgoing in enumerate(lane.waiting, 1):
                    outgoing.n = n
                lane.next_n, lane.first_n = len(lane.waiting) + 1, 1
                lane.sent, lane.is_held, self.store.is_dirty = 0, False, True
        elif code != "INTERNAL":  # that one decides nothing: the resend timer does
            outgoing = self._take(error)
            if outgoing:
                outgoing.refused = f"{code}: {error['text']}"

    # Receiving and catching up: sections 8, 9 and 10

    def _ask(self, command: str, **fields: Any) -> None:
        assert self.link is not None
        self.last_request = self.last_request % 0xFFFF_FFFF + 1
        fields["request"] = self.last_request
        self.requests[self.last_request] = Request(command, fields, time.monotonic() + RESEND_S)
        self.link.send(command, **fields)

    def _answers(self, fields: Fields) -> bool:
        return fields["request"] in self.requests

    def _sync(self) -> None:
        """Cuts the cursors into parts that fit into a frame, and asks about the first."""
        self.requests = {key: request for key, request in self.requests.items() if request.command != "Sync"}
        self.sync_again, self.sync_parts = False, []
        after, size, room = "", 0, (self.limits["frame_bytes_max"] or FRAME_BYTES_MAX) - 512
        last = ""
        for name in sorted(self.chats, key=str.encode):
            cost = len(encode("Cursor", self._cursor(name))) + 4
            if size + cost > room:
                self.sync_parts.append((after, last))
                after, size = last, 0
            last, size = name, size + cost
        self.sync_parts.append((after, ""))
        self._ask_sync(*self.sync_parts.pop(0))

    def _cursor(self, name: str) -> Fields:
        return {"chat": name, "history": self.chats[name].history, "seq": self.chats[name].position}

    def _ask_sync(self, after: str, until: str) -> None:
        names = [name for name in sorted(self.chats, key=str.encode)
                 if name.encode() > after.encode() and (not until or name.encode() <= until.encode())]
        self._ask("Sync", after=after, until=until, cursors=[self._cursor(name) for name in names])

    def _synced(self, ack: Fields, request: Request) -> None:
        for found in ack["chats"]:
            chat = self.chats.get(found["chat"])
            if chat is None:  # a device that has no cursor begins with what the user has seen on none
                chat = self.chats[found["chat"]] = Chat(found["history"], found["delivered"])
                self.store.cursors[found["chat"]] = (found["history"], found["delivered"])
                self.store.is_dirty = True
            if found["history"] not in (0, chat.history):
                self._hint(chat)
                continue
            chat.head = max(chat.head, found["head"])
            self._begin(chat, found["joined"])
            self._skip(found["chat"], chat, min(found["first"] - 1, found["head"]))
            if found["head"] != chat.position:  # below it: a store that came back older, or a Push was quicker
                chat.pull_at = time.monotonic()
        if ack["has_more"]:
            self._ask_sync(ack["next"], request.fields["until"])
        elif self.sync_parts:
            self._ask_sync(*self.sync_parts.pop(0))
        elif self.sync_again:
            self._sync()
        else:
            self.has_synced = True

    def _receive(self, name: str, history: int, fields: Fields, is_own: bool = False) -> None:
        if not self.receives:
            return
        chat = self.chats.get(name)
        if chat is None:
            if not self.has_synced:  # where this device begins there is what the next Sync says
                self.sync_again = True
                return
            chat = self.chats[name] = Chat(history, 0)  # no Sync named it, so it had no messages then
        if chat.history == 0:
            chat.history = history
        if chat.history != history:
            return self._hint(chat)
        if chat.older:  # of a history that ends; it comes again under the next one
            return
        message = Message(name, history, is_own=is_own, **fields)
        chat.head = max(chat.head, message.seq)
        if message.seq > chat.position and len(self.inbox) < INBOX_MAX and len(chat.held) < HELD_MAX:
            chat.held[message.seq] = message
        self._hand_over(chat, time.monotonic() + HOLE_S)

    def _hand_over(self, chat: Chat, pull_at: float) -> None:
        """What follows the position goes to the inbox; a hole above it is pulled at `pull_at`."""
        while (message := chat.held.pop(chat.position + 1, None)) is not None:
            chat.position += 1
            self.inbox.append(message)
        if chat.position >= chat.head:
            chat.pull_at = chat.pull_at if chat.is_hinted or chat.older else None
        elif chat.pull_at is None:
            chat.pull_at = pull_at

    def _pulled(self, ack: Fields, request: Request) -> None:
        name, now = ack["chat"], time.monotonic()
        chat = self.chats[name]
        chat.is_pulling = False
        if ack["history"] != chat.history and ack["history"] and chat.history:
            self._history_lost(name, chat, ack["history"])  # what came follows a cursor of another history
            chat.head = ack["head"]
            return
        if ack["head"] < request.fields["cursor"]:  # older: the server will draw another history
            chat.pull_at = now + min(60.0, 0.5 * 2 ** chat.older)
            chat.older += 1
            return
        chat.older, chat.head, chat.history = 0, max(chat.head, ack["head"]), ack["history"] or chat.history
        self._begin(chat, ack["joined"])
        for fields in ack["messages"]:
            if fields["seq"] > chat.position:
                self._skip(name, chat, fields["seq"] - 1)
                chat.held[fields["seq"]] = Message(name, ack["history"], **fields)
                self._hand_over(chat, now)
        # `head` is of the same moment as the messages
        self._skip(name, chat, min(ack["first"] - 1, ack["head"]) if ack["has_more"] else ack["head"])
        self._hand_over(chat, now if ack["messages"] else now + 1.0)
        if chat.is_hinted:
            chat.pull_at = now

    def _hint(self, chat: Chat) -> None:
        chat.is_hinted, chat.pull_at = True, time.monotonic()

    def _begin(self, chat: Chat, joined: int) -> None:
        """What lies below `joined` is not for this user, and nothing is missing there."""
        if joined > chat.position + 1 and all(key >= joined for key in chat.held):
            chat.position = joined - 1

    def _skip(self, name: str, chat: Chat, seq: int) -> None:
        """Nothing up to `seq` is to be had any more, beside what is held."""
        for held in sorted(key for key in chat.held if key <= seq) + [seq + 1]:
            if held > chat.position + 1:
                say(f"{name}: messages {chat.position + 1} to {held - 1} are not to be had any more")
                chat.position = held - 1
            if held in chat.held:
                self._hand_over(chat, time.monotonic())

    def _history_lost(self, name: str, chat: Chat, history: int) -> None:
        say(f"{name}: its history was lost after message {chat.position}; it starts anew from 1")
        chat.history, chat.position, chat.head, chat.held, chat.pull_at = history, 0, 0, {}, time.monotonic()
        self.store.cursors[name] = (history, 0)
        self.store.is_dirty = True

    def _acknowledge(self) -> None:
        assert self.link is not None
        self.store.save()
        for name in self.to_ack:
            history, seq = self.store.cursors[name]
            self.link.send("PushAck", chat=name, history=history, seq=seq)
        self.to_ack.clear()


def lane_name(chat: str) -> str:
    try:
        return sorted_chat(chat)
    except ValueError:
        return ""
