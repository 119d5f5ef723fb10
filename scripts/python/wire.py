"""The messages of the client protocol as field tables, and their codec: bytes in, fields out, no I/O.

Written from `proto/wire.md` alone; numbers in comments are its sections. A message is a dict of its fields. Trap: `encode`
takes what is not named for a default, and `decode` gives every field.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Fields = dict[str, Any]  # a message: field name -> value; what is not named has its default

# Section 3.
COMMANDS = {1: "Login", 2: "LoginAck", 3: "Ping", 4: "Pong", 5: "Send", 6: "SendAck", 7: "Sync", 8: "SyncAck", 9: "Pull",
            10: "PullAck", 11: "PushAck", 12: "Push", 13: "Read", 14: "Resync", 15: "Settings", 16: "Kick",
            17: "Watch", 18: "GoAway", 19: "Typing", 20: "Error",
            21: "Members", 22: "MembersAck", 24: "Receipt", 26: "Presence", 28: "TypingNote", 30: "SettingsAck"}
COMMAND_BYTES = {name: byte for byte, name in COMMANDS.items()}
FROM_CLIENT = {"Login", "Ping", "Send", "Sync", "Pull", "PushAck", "Read", "Members",
               "Watch", "Typing", "Settings"}

# Sections 11 and 12.
ENUMS = {
    "Durability": {0: "DURABILITY_UNKNOWN", 1: "DURABILITY_STRICT", 2: "DURABILITY_WEAK"},
    "Code": {0: "CODE_UNSPECIFIED", 1: "FRAME_TOO_LARGE", 2: "UNKNOWN_COMMAND", 3: "BAD_BODY", 4: "NOT_LOGGED_IN",
             5: "ALREADY_LOGGED_IN", 10: "UNSUPPORTED_VERSION", 11: "BAD_NAME", 12: "LOGIN_REFUSED", 13: "LOGIN_TIMEOUT",
             14: "STALE_ATTEMPT", 15: "TOO_MANY_DEVICES", 16: "TOKEN_EXPIRED", 17: "TOKEN_REVOKED",
             20: "BAD_CHAT", 21: "NOT_A_MEMBER", 22: "MESSAGE_TOO_LARGE",
             26: "GROUP_EXISTS", 27: "GROUP_FULL", 28: "NOT_ALLOWED", 29: "BAD_CHANGE",
             23: "OUT_OF_ORDER", 24: "TOO_OLD", 25: "BAD_REQUEST", 30: "UNAVAILABLE", 31: "RATE_LIMITED",
             32: "TOO_MANY_CONNECTIONS", 40: "REPLACED", 41: "IDLE", 42: "SLOW_READER", 43: "SHUTTING_DOWN",
             44: "ENDED", 50: "INTERNAL"},
    "Kind": {0: "KIND_TEXT", 1: "KIND_GROUP", 2: "KIND_EDIT", 3: "KIND_RECALL", 4: "KIND_PAYLOAD",
             5: "KIND_HIDE"},
    "GroupAction": {0: "GROUP_UNSPECIFIED", 1: "GROUP_CREATE", 2: "GROUP_RENAME", 3: "GROUP_ADD", 4: "GROUP_REMOVE",
                    5: "GROUP_LEAVE", 6: "GROUP_ROLE", 7: "GROUP_DELETE"},
    "Role": {0: "ROLE_MEMBER", 1: "ROLE_ADMIN", 2: "ROLE_OWNER"},
}


class Field(NamedTuple):
    number: int
    name: str
    kind: str
    repeated: bool


def table(text: str) -> list[Field]:
    """`"1 stream fixed64, 4 cursors repeated Cursor"`, the rows of section 11 on one line."""
    rows = [row.split() for row in text.split(",") if row.strip()]
    return [Field(int(row[0]), row[1], row[-1], row[2] == "repeated") for row in rows]


MESSAGES = {name: table(text) for name, text in {
    "Login": "1 wire_min uint32, 2 wire_max uint32, 3 user string, 4 device string, 5 attempt uint64, 6 token string,"
             "7 agent string",
    "LoginAck": "1 wire uint32, 2 user_id uint64, 3 device_id uint32, 4 server_time_us uint64, 5 heartbeat_ms uint32,"
                "6 durability Durability, 7 message_bytes_max uint32, 8 frame_bytes_max uint32, 9 unanswered_max uint32",
    "Ping": "1 nonce uint64",
    "Pong": "1 nonce uint64",
    "Send": "1 stream fixed64, 2 n uint64, 3 chat string, 4 body bytes, 5 kind Kind",
    "SendAck": "1 stream fixed64, 2 n uint64, 3 chat string, 4 seq uint64, 5 time_us uint64, 6 history fixed64",
    "Message": "1 seq uint64, 2 sender string, 3 time_us uint64, 4 body bytes, 5 kind Kind",
    "GroupChange": "1 action GroupAction, 2 title string, 3 members repeated Member",
    "Member": "1 user string, 2 role Role, 3 joined uint64, 4 delivered uint64, 5 read uint64",
    "Edit": "1 seq uint64, 2 body bytes",
    "Payload": "1 content_type string, 2 data bytes, 3 mentions repeated Mention, 4 reply_to uint64",
    "Mention": "1 user string",
    "Hide": "1 chat string, 2 history fixed64, 3 seq uint64",
    "Members": "1 request uint32, 2 chat string, 3 after string",
    "MembersAck": "1 request uint32, 2 chat string, 3 version uint64, 4 title string, 5 count uint32,"
                  "6 members repeated Member, 7 has_more bool, 8 next string, 9 history fixed64",
    "Push": "1 chat string, 2 history fixed64, 3 message Message, 4 ack_within_ms uint32",
    "PushAck": "1 chat string, 2 history fixed64, 3 seq uint64",
    "Read": "1 chat string, 2 history fixed64, 3 seq uint64",
    "Receipt": "1 chat string, 2 history fixed64, 3 user string, 4 delivered uint64, 5 read uint64",
    "Cursor": "1 chat string, 2 history fixed64, 3 seq uint64, 4 read_seq uint64, 5 peer_delivered uint64,"
              "6 peer_read uint64",
    "Sync": "1 request uint32, 2 after string, 3 until string, 4 cursors repeated Cursor, 5 receipts bool",
    "ChatHead": "1 chat string, 2 history fixed64, 3 head uint64, 4 delivered uint64, 5 first uint64, 6 joined uint64,"
                "7 read_seq uint64, 8 unread uint64, 9 peer_delivered uint64, 10 peer_read uint64",
    "SyncAck": "1 request uint32, 2 chats repeated ChatHead, 3 has_more bool, 4 next string, 5 receipts bool,"
               "6 presence bool",
    "Pull": "1 request uint32, 2 chat string, 3 history fixed64, 4 cursor uint64, 5 limit uint32, 6 reverse bool",
    "PullAck": "1 request uint32, 2 chat string, 3 history fixed64, 4 messages repeated Message, 5 has_more bool,"
               "6 head uint64, 7 first uint64, 8 joined uint64",
    "Watch": "1 request uint32, 2 users repeated Watched, 3 renew bool",
    "Watched": "1 user string",
    "Presence": "1 request uint32, 2 users repeated Seen, 3 renew_ms uint32, 4 unknown bool",
    "Seen": "1 user string, 2 online bool, 3 last_seen_s uint64",
    "Typing": "1 chat string, 2 stopped bool",
    "TypingNote": "1 chat string, 2 user string, 3 stopped bool",
    "Settings": "1 request uint32, 2 change bool, 3 hide_presence bool, 4 hide_typing bool",
    "SettingsAck": "1 request uint32, 2 hide_presence bool, 3 hide_typing bool",
    "Resync": "",
    "Kick": "1 code Code, 2 text string",
    "GoAway": "1 within_ms uint32, 2 text string",
    "Error": "1 code Code, 2 text string, 3 command uint32, 4 request uint32, 5 stream fixed64, 6 n uint64, 7 chat string,"
             "8 retry_after_ms uint32, 9 expected uint64, 10 closing bool,"
             "11 ipconf string",
}.items()}

# Sections 1 and 2.
FRAME_BYTES_MAX = 65_536


class WireError(Exception):
    """These bytes break the rules; the message is the code that a server answers."""


def put_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def get_varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, and where it ends."""
    value = 0
    for i in range(10):
        if at + i >= len(data):
            break
        value |= (data[at + i] & 0x7F) << 7 * i
        if data[at + i] < 0x80:
            if value >= 2**64:
                break
            return value, at + i + 1
    raise WireError("BAD_BODY")


def wire_type(kind: str) -> int:
    return 1 if kind == "fixed64" else 2 if kind in ("string", "bytes") or kind in MESSAGES else 0


def encode(message: str, fields: Fields) -> bytes:
    """The body of a message."""
    if unknown := fields.keys() - {row.name for row in MESSAGES[message]}:
        raise KeyError(f"{message} has no {unknown}")
    out = bytearray()
    for number, name, kind, repeated in MESSAGES[message]:
        values = fields.get(name, []) if repeated else [fields.get(name)]
        for value in values:
            if not repeated and value in (None, 0, "", b""):
                continue  # a default is left out; an empty message that is there is {}, and is written
            out += put_varint(number << 3 | wire_type(kind))
            if wire_type(kind) == 0:
                out += put_varint(int(value))
            elif kind == "fixed64":
                out += value.to_bytes(8, "little")
            else:
                data = value.encode() if kind == "string" else value if kind == "bytes" else encode(kind, value)
                out += put_varint(len(data)) + data
    return bytes(out)


def decode(message: str, body: bytes) -> Fields:
    """All fields of a message, those that are missing with their defaults."""
    rows = {row.number: row for row in MESSAGES[message]}
    fields: Fields = {row.name: [] if row.repeated else default(row.kind) for row in rows.values()}
    at = 0
    while at < len(body):
        key, at = get_varint(body, at)
        number, got = key >> 3, key & 7
        if got == 0:
            raw, at = get_varint(body, at)
        else:
            if got == 2:
                size, at = get_varint(body, at)
            elif got in (1, 5):
                size = 8 if got == 1 else 4
            else:
                raise WireError("BAD_BODY")
            if size > len(body) - at:
                raise WireError("BAD_BODY")
            raw, at = body[at:at + size], at + size
        if number == 0 or key >= 2**32 or (number in rows and wire_type(rows[number].kind) != got):
            raise WireError("BAD_BODY")
        if number in rows:
            row = rows[number]
            value = read(row.kind, raw)
            fields[row.name] = fields[row.name] + [value] if row.repeated else value
    return fields


def default(kind: str) -> Any:
    return {"string": "", "bytes": b"", "bool": False}.get(kind, None if kind in MESSAGES else 0)


def read(kind: str, raw: Any) -> Any:
    if kind in MESSAGES:
        return decode(kind, raw)
    if kind == "string":
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise WireError("BAD_BODY") from None
    if kind == "fixed64":
        return int.from_bytes(raw, "little")
    return raw != 0 if kind == "bool" else raw if kind in ("bytes", "uint64") else raw & 0xFFFF_FFFF


def name_of(code: int) -> str:
    """The name of an error code, also of one that came later than this file."""
    return ENUMS["Code"].get(code, f"code {code}")


def frame(command: str, fields: Fields) -> bytes:
    body = encode(command, fields)
    return len(body).to_bytes(3, "big") + bytes([COMMAND_BYTES[command]]) + body


def cut(data: bytes | bytearray, bytes_max: int = FRAME_BYTES_MAX) -> tuple[int, bytes] | None:
    """Command byte and body of the first frame in `data`; None: more bytes are needed."""
    if len(data) < 4:
        return None
    size = int.from_bytes(data[:3], "big")
    if size + 4 > bytes_max:
        raise WireError("FRAME_TOO_LARGE")
    return (data[3], bytes(data[4:4 + size])) if len(data) >= size + 4 else None


# Section 6.


def is_name(text: str) -> bool:
    """1 to 64 bytes of UTF-8; a lone surrogate is what Python makes of an argument that is none."""
    bad = any(c <= "\x1f" or "\x7f" <= c <= "\x9f" or "\ud800" <= c <= "\udfff" or c == ":" for c in text)
    return not bad and not text.startswith("#") and 1 <= len(text.encode()) <= 64


def sorted_chat(text: str) -> str:
    """The chat as answers write it. ValueError: it is none."""
    if text.startswith("#"):
        digits = text[1:]
        if digits.isascii() and digits.isdigit() and str(int(digits)) == digits and int(digits) < 2**64:
            return text
    elif all(is_name(name) for name in text.split(":")) and text.count(":") == 1:
        return ":".join(sorted(text.split(":"), key=str.encode))
    raise ValueError(f"{text!r} is not a chat")
