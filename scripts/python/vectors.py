"""The check of `proto/vectors/wire.json`: every frame both ways, every invalid one, every name and chat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .wire import (COMMANDS, ENUMS, FRAME_BYTES_MAX, FROM_CLIENT, MESSAGES, Fields, WireError, cut, decode, default, frame,
                   is_name, sorted_chat)


def check(path: Path) -> tuple[dict[str, int], list[str]]:
    """How many were checked of each kind, and what is wrong."""
    vectors = json.loads(path.read_text(encoding="utf-8"))
    wrong: list[str] = []

    def expect(what: str, got: Any, wanted: Any) -> None:
        if got != wanted:
            wrong.append(f"{what}: {got!r} instead of {wanted!r}")

    for vector in vectors["frames"] + vectors["loose"]:
        name, command, data = vector["name"], vector["command"], bytes.fromhex(vector["hex"])
        fields = from_json(command, vector["fields"])
        try:
            found = cut(data)
            expect(f"{name}, command", found and COMMANDS.get(found[0]), command)
            got = decode(command, found[1]) if found else {}
            expect(f"{name}, decoded", got, {**decode(command, b""), **fields})
        except WireError as error:
            wrong.append(f"{name}: {error}")
        if vector in vectors["frames"]:
            expect(f"{name}, encoded", frame(command, fields).hex(), vector["hex"])
    for vector in vectors["invalid"]:
        got = judge(bytes.fromhex(vector["hex"]), vector.get("limit_bytes", FRAME_BYTES_MAX))
        expect(vector["name"], got, vector["expect"])
    for text in vectors["names"]["valid"]:
        expect(f"name {text!r}", is_name(text), True)
    for vector in vectors["names"]["invalid"]:
        expect(f"name {vector['text']!r}", is_name(vector["text"]), False)
    for vector in vectors["chats"]["valid"]:
        expect(f"chat {vector['text']!r}", sorted_or_none(vector["text"]), vector["sorted"])
    for text in vectors["chats"]["invalid"]:
        expect(f"chat {text!r}", sorted_or_none(text), None)
    counts = {kind: len(vectors[kind]) for kind in ("frames", "loose", "invalid")}
    counts |= {kind: len(vectors[kind]["valid"]) + len(vectors[kind]["invalid"]) for kind in ("names", "chats")}
    return counts, wrong


def judge(data: bytes, bytes_max: int) -> str:
    """What a receiver makes of bytes from a client."""
    try:
        found = cut(data, bytes_max)
        if found is None:
            return "MORE"
        command = COMMANDS.get(found[0])
        if command not in FROM_CLIENT:
            return "UNKNOWN_COMMAND"
        decode(command, found[1])
        return "OK"
    except WireError as error:
        return str(error)


def from_json(message: str, fields: Fields) -> Fields:
    """The vectors' way of writing fields → ours: 64-bit numbers are strings there, bytes are hex, enums names."""
    kinds = {row.name: (row.kind, row.repeated) for row in MESSAGES[message]}
    return {name: [one(kinds[name][0], each) for each in value] if kinds[name][1] else one(kinds[name][0], value)
            for name, value in fields.items()}


def one(kind: str, value: Any) -> Any:
    if kind in MESSAGES:  # here too every field is there
        return {**{row.name: default(row.kind) for row in MESSAGES[kind]}, **from_json(kind, value)}
    if kind in ENUMS:
        return next(number for number, name in ENUMS[kind].items() if name == value)
    return bytes.fromhex(value) if kind == "bytes" else int(value) if kind in ("uint64", "fixed64") else value


def sorted_or_none(text: str) -> str | None:
    try:
        return sorted_chat(text)
    except ValueError:
        return None
