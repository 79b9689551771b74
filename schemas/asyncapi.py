"""The AsyncAPI 3.0 document of the mesh, from one table of subjects and one of operations.

It describes a worker: it *receives* what clients ask and *sends* advertisements. A client does the opposite.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import yaml

from meshrl.wire.subjects import ROOT, VERSION
from schemas.ops import OPS, forms_of

CONTENT_TYPE = "application/vnd.msgpack"
SCHEMA_FORMAT = "application/schema+json;version=2020-12"

PREFIX = f"{ROOT}.v{VERSION}.{{namespace}}."

PARAMETERS: dict[str, dict[str, Any]] = {
    "namespace": {"description": "One mesh of several on the same NATS account.", "default": "default"},
    "kind": {"description": "What the worker serves.", "enum": ["env", "agent"]},
    "name": {
        "description": "A served name, as a token: everything but letters, digits and _ - / : @ + = is %XX of its "
        "UTF-8 bytes (a dot is %2E).",
    },
    "worker": {"description": "A worker's id, new at each start of its process."},
    "user": {"description": "The client's login as a token; anon without one. Permissions rest on it."},
    "session": {"description": "A session's id, chosen by the client: 1 to 64 letters, digits, _ and -."},
}


class Channel(NamedTuple):
    """A subject: its address below the prefix, what it is for, and the messages that travel on it."""

    address: str
    description: str
    messages: list[str]


class Operation(NamedTuple):
    """What a worker does on a channel, and what it answers with; no answers for what it sends."""

    channel: str
    action: str
    summary: str
    replies: list[str]


_AT_WORKER = "worker.{worker}.%s.{user}"
_IN_SESSION = "session.{worker}.{user}.{session}.%s"

CHANNELS: dict[str, Channel] = {
    "advertisement": Channel(
        "registry.{kind}.{name}.{worker}", "A worker says of itself, every second, what it serves.", ["advertisement"]
    ),
    "audit": Channel(
        "audit.{worker}", "A worker says which session was opened, refused or has ended; for who keeps it.", ["audited"]
    ),
    "recording": Channel(
        "rec.{name}.{session}",
        "A worker records what a session did: of what it is, then chunks. JetStream keeps it; nobody answers but that.",
        ["recorded", "chunk"],
    ),
    "episodes": Channel(
        "episodes.{name}.{session}", "A worker says which episodes a recording has; as above.", ["entry"]
    ),
    "about": Channel(
        "tap.{name}.{session}.about", "A worker says of what the rows are that it shows; to viewers.", ["recorded"]
    ),
    "rows": Channel(
        "tap.{name}.{session}.rows", "A worker shows chunks of a recording as they are made; to viewers.", ["chunk"]
    ),
    "tapping": Channel("tapping.{user}", "Tells every env worker that somebody watches; nobody answers.", ["watch"]),
    "read": Channel(
        "recordings.read.{user}",
        "Asks an env worker (queue group recordings) for what a stream of recordings has; several messages answer.",
        ["read"],
    ),
    "keep": Channel(
        "recordings.keep.{user}", "Has one of them store how far a consumer of the user has come.", ["keep"]
    ),
    "ask": Channel("registry.ask", "Asks every worker for its descriptions; several answer.", ["ask"]),
    "open": Channel(_AT_WORKER % "open", "Asks one worker for a session.", ["open"]),
    "probe": Channel(_AT_WORKER % "probe", "Asks one worker what became of requests.", ["probe"]),
    "renew": Channel(_AT_WORKER % "renew", "Renews leases at one worker.", ["renew"]),
    "drain": Channel(_AT_WORKER % "drain", "Has one worker leave, when its sessions have moved.", ["drain"]),
    "act_at_worker": Channel(
        _AT_WORKER % "act", "An act that must be split goes to one worker.", ["act_anywhere.request"]
    ),
    "open_anywhere": Channel(
        "env.{name}.open.{user}", "An open at whichever worker NATS picks (queue group open); never split.", ["open"]
    ),
    "act_anywhere": Channel(
        "agent.{name}.act.{user}",
        "An act at whichever worker NATS picks (queue group act); never split.",
        ["act_anywhere.request"],
    ),
    **{f"session_{op}": Channel(_IN_SESSION % op, OPS[op], [f"{name}.request" for name in forms_of(op)]) for op in OPS},
    "session_close": Channel(_IN_SESSION % "close", "Ends a session, or the wish for one. It has no seq.", ["close"]),
}

OPERATIONS: dict[str, Operation] = {
    "advertise": Operation("advertisement", "send", "Say what is served, and how busy the worker is.", []),
    "audit": Operation("audit", "send", "Say who opened what, with which kwargs, and how it ended.", []),
    "record": Operation("recording", "send", "Record what sessions do, each message once, by one worker.", []),
    "index": Operation("episodes", "send", "Say which episodes have ended, and where they stand.", []),
    "describe_shown": Operation("about", "send", "Say of what the rows are.", []),
    "show": Operation("rows", "send", "Show what a session does, for as long as somebody watches.", []),
    "watch": Operation("tapping", "receive", "Show what is recorded of some sessions, for some seconds.", []),
    "read": Operation("read", "receive", "Read for who may not ask JetStream itself.", ["found", "error"]),
    "keep": Operation("keep", "receive", "Store it, and say its number in the stream.", ["kept", "error"]),
    "describe": Operation("ask", "receive", "Tell the descriptions that were asked for.", ["known", "error"]),
    "open": Operation(
        "open", "receive", "Grant a session, park the open, or say how full it is.", ["grant", "full", "error"]
    ),
    "open_anywhere": Operation("open_anywhere", "receive", "The same.", ["grant", "full", "error"]),
    "probe": Operation("probe", "receive", "Say what became of each request.", ["probed", "error"]),
    "renew": Operation("renew", "receive", "Renew what is held, say what is not.", ["renewed", "error"]),
    "drain": Operation("drain", "receive", "Leave, and say how many sessions there are still.", ["drained", "error"]),
    "act_at_worker": Operation("act_at_worker", "receive", "Act for one observation.", ["act_anywhere.reply", "error"]),
    "act_anywhere": Operation("act_anywhere", "receive", "Act for one observation.", ["act_anywhere.reply", "error"]),
    **{
        f"session_{op}": Operation(
            f"session_{op}", "receive", OPS[op], [*(f"{name}.reply" for name in forms_of(op)), "error"]
        )
        for op in OPS
    },
    "session_close": Operation("session_close", "receive", "End the session and free its slot.", ["closed", "error"]),
}

INTRODUCTION = """\
RL environments and policies as services on a NATS bus. Bodies are msgpack; the schemas describe what a plain msgpack
decoder gives, with bins as base64 text. Any message over the server's payload limit may travel as several messages
"part" on the directed subjects (worker.* and session.*), and so may replies. What a session's subjects carry depends
on the form of its open: step.request and step.reply for a single env, vector_step and pool_step for the others. One
request of a pool may get several replies. Fields are only added: ignore those you do not know. A message that says
another v is refused. See ../README.md.
"""


def document() -> dict[str, Any]:
    """The document as maps and lists."""
    used = sorted({name for channel in CHANNELS.values() for name in channel.messages} | _replies())
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "meshrl",
            "version": f"{VERSION}.0.0",
            "description": INTRODUCTION,
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": CONTENT_TYPE,
        "servers": {"mesh": {"host": "localhost:4222", "protocol": "nats", "description": "Any NATS server."}},
        "channels": {
            **{name: _channel(channel) for name, channel in CHANNELS.items()},
            "replies": {
                "address": None,
                "description": "The reply subject that NATS carries with a request: an inbox below _INBOX.{user}.",
                "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in sorted(_replies())},
            },
        },
        "operations": {name: _operation(operation) for name, operation in OPERATIONS.items()},
        "components": {
            "messages": {name: _message(name) for name in [*used, "part"]},
            "parameters": PARAMETERS,
        },
    }


def _replies() -> set[str]:
    return {name for operation in OPERATIONS.values() for name in operation.replies}


def _channel(channel: Channel) -> dict[str, Any]:
    address = PREFIX + channel.address
    names = [name for name in PARAMETERS if f"{{{name}}}" in address]
    return {
        "address": address,
        "description": channel.description,
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in channel.messages},
        "parameters": {name: {"$ref": f"#/components/parameters/{name}"} for name in names},
    }


def _operation(operation: Operation) -> dict[str, Any]:
    channel = f"#/channels/{operation.channel}"
    made: dict[str, Any] = {
        "action": operation.action,
        "channel": {"$ref": channel},
        "summary": operation.summary,
        "messages": [{"$ref": f"{channel}/messages/{name}"} for name in CHANNELS[operation.channel].messages],
    }
    if operation.replies:
        made["reply"] = {
            "address": {"location": "$message.header#/reply-to", "description": "The NATS reply subject."},
            "channel": {"$ref": "#/channels/replies"},
            "messages": [{"$ref": f"#/channels/replies/messages/{name}"} for name in operation.replies],
        }
    return made


def _message(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "contentType": CONTENT_TYPE,
        "payload": {"schemaFormat": SCHEMA_FORMAT, "schema": {"$ref": f"./messages/{name}.json"}},
    }


def asyncapi() -> str:
    """The document as YAML."""
    note = "# Written by `python -m schemas.generate`; change schemas/asyncapi.py.\n"
    return note + yaml.dump(document(), sort_keys=False, width=110, allow_unicode=True, Dumper=_Dumper)


class _Dumper(yaml.SafeDumper):
    """Long texts as blocks, and nothing by anchors."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
