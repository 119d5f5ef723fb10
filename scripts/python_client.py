#!/usr/bin/env python3
"""A Rookery client in Python 3.11, standard library only, written from `proto/wire.md` alone.

It shares no code with the servers and checks itself with the same test vectors, so it shows that the page is enough. Take it
as a model for a client in another language; in the order of reading, in `scripts/python/`:

    wire.py         messages as field tables; bytes in, fields out, no I/O
    connection.py   a blocking socket that sends and receives frames; how a gateway is found
    store.py        what must outlive the program: attempt, unanswered messages, cursors
    session.py      a login that comes back, resends, catches up, keeps order, acknowledges
    story.py        a scripted conversation, frame by frame
    vectors.py      the check of proto/vectors/wire.json
    simulation.py   seeded: sessions against a model of the server that loses, delays, repeats and forgets

    python3 scripts/python_client.py --vectors proto/vectors/wire.json
    python3 scripts/python_client.py listen --gateway 127.0.0.1:7000 --user bob --json
    python3 scripts/python_client.py send   --ipconf http://127.0.0.1:6789 --user alice --to bob hello "how are you"
    python3 scripts/python_client.py story  --gateway 127.0.0.1:7000

Exit codes: 0 done; 1 refused for good, kicked, or a check failed; 3 timeout; 64 wrong usage. Trap: with --state the program
goes on where it left off; without, unanswered messages and cursors end with it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

sys.dont_write_bytecode = True  # leave no __pycache__ in the tree

from python.connection import Directory  # noqa: E402
from python.session import Ended, Session  # noqa: E402
from python.store import Outgoing, Store, say  # noqa: E402
from python.story import Story, Surprise  # noqa: E402
from python.vectors import check  # noqa: E402
from python.wire import is_name, sorted_chat  # noqa: E402

DONE, FAILED, TIMEOUT, USAGE = 0, 1, 3, 64
IPCONF = "http://127.0.0.1:6789"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.format_usage()}{message}\n")


def parser() -> argparse.ArgumentParser:
    main = Parser(description="A Rookery client in Python.")
    main.add_argument("--vectors", type=Path, metavar="FILE", help="check the codec against proto/vectors/wire.json")
    commands = main.add_subparsers(dest="command")
    send = commands.add_parser("send", help="send each TEXT as a message; prints chat and seq of each")
    send.add_argument("--to", required=True, help="a user")
    send.add_argument("text", nargs="+", metavar="TEXT")
    listen = commands.add_parser("listen", help="print messages as they come")
    listen.add_argument("--json", action="store_true", help="one object a line")
    listen.add_argument("--count", type=int, metavar="N", help="end after N messages")
    for command in (send, listen):
        command.add_argument("--user", required=True)
        command.add_argument("--device", default=f"python-{command.prog.split()[-1]}")
        command.add_argument("--state", type=Path, metavar="FILE", help="keep unanswered messages and cursors here")
        command.add_argument("--timeout", type=float, default=math.inf, metavar="S", help="give up after S seconds")
    story = commands.add_parser("story", help="a scripted conversation that checks every answer")
    story.add_argument("--user", default="story-alice")
    story.add_argument("--to", default="story-bob")
    for command in (send, listen, story):
        command.add_argument("--gateway", action="append", default=[], metavar="HOST:PORT", help="may come several times")
        command.add_argument("--ipconf", default=IPCONF, metavar="URL", help=f"else ask here for gateways ({IPCONF})")
    return main


def main() -> int:
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    options = parser()
    args = options.parse_args()
    if args.vectors:
        return vectors(args.vectors)
    if not args.command:
        options.error("say --vectors FILE, or a command: send, listen, story")
    for name in (args.user, getattr(args, "device", "-"), getattr(args, "to", "-")):
        if not is_name(name):
            options.error(f"{name!r} is no name: 1 to 64 bytes, no ':', no control character, not starting with '#'")
    try:
        return {"send": send, "listen": listen, "story": story}[args.command](args)
    except (Ended, Surprise, ValueError) as error:
        say(str(error))
        return FAILED
    except KeyboardInterrupt:
        return 130


def vectors(path: Path) -> int:
    counts, wrong = check(path)
    for line in wrong:
        print(line)
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()) + f": {len(wrong)} wrong")
    return FAILED if wrong else DONE


def open_session(args: argparse.Namespace, receive: bool) -> Session:
    try:
        store = Store(args.state)
    except BlockingIOError:
        raise ValueError(f"another program uses {args.state}") from None
    return Session(args.user, args.device, Directory(args.gateway, args.ipconf).ask, store, receive)


def show(fields: dict[str, Any]) -> None:
    print(json.dumps(fields, ensure_ascii=False, separators=(",", ":")), flush=True)


def send(args: argparse.Namespace) -> int:
    deadline = time.monotonic() + args.timeout
    session = open_session(args, receive=False)
    # What an earlier run left unanswered goes first.
    pending: list[Outgoing] = [outgoing for lane in session.store.lanes.values() for outgoing in lane.waiting]
    chat = sorted_chat(f"{args.user}:{args.to}")
    pending += [session.enqueue(chat, os.fsencode(text)) for text in args.text]
    refused = 0
    try:
        for at, outgoing in enumerate(pending):
            while not outgoing.is_answered:
                if time.monotonic() >= deadline:
                    say(f"no answer: it is unknown whether {len(pending) - at} messages were sent")
                    return TIMEOUT
                session.poll(deadline - time.monotonic())
            if outgoing.ack:
                show({"chat": outgoing.ack["chat"], "seq": outgoing.ack["seq"]})
            else:
                refused += 1
                say(f"refused: {outgoing.refused}")
    finally:
        session.close()
    return FAILED if refused else DONE


def listen(args: argparse.Namespace) -> int:
    deadline = time.monotonic() + args.timeout
    session = open_session(args, receive=True)
    shown = 0
    try:
        while args.count is None or shown < args.count:
            message = session.next_message(deadline)
            if message is None:
                return TIMEOUT
            text = message.body.decode(errors="replace")
            if args.json:
                show({"chat": message.chat, "seq": message.seq, "sender": message.sender, "text": text,
                      "send_time_us": message.time_us})
            else:
                print(f"{message.chat} {message.seq} {message.sender}: {text}", flush=True)
            session.confirm(message)
            shown += 1
    finally:
        session.close()
    return DONE


def story(args: argparse.Namespace) -> int:
    found, _ = Directory(args.gateway, args.ipconf).ask()
    if not found:
        raise Surprise("ipconf knows no gateway")
    Story(found[0], args.user, args.to).run()
    return DONE


if __name__ == "__main__":
    sys.exit(main())
