"""Roles: what a login may publish and hear on the server, and nothing beside it (design, section 4).

    role          asks                  answers   advertises  hears
    env-worker                          yes       envs        requests of its kind, its own inbox
    agent-worker                        yes       agents      the same
    learner       under its own user                          the registry, its own inbox
    observer      who is there                                the registry, live views, its own inbox
    operator      under its own user                          the same, the audit

A client's subjects carry its user, so that each rule for it names that user: it asks as itself, and has no way to
another's replies. The worker's id in a subject is new at each start, and so any (``*``): workers of a team trust one
another. They answer by a plain right to publish to inboxes; NATS's ``allow_responses`` would refuse answers in parts,
and those after a reconnect.

Nobody may purge, change or delete a stream, or a message of one. An operator may make streams (one that is there is
not changed by that) and read them. Where a subject is heard by a queue group, it may be heard by no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from meshrl.wire.subjects import READERS, ROOT, VERSION

Role = Literal["env-worker", "agent-worker", "learner", "observer", "operator"]
ROLES: tuple[Role, ...] = get_args(Role)

# A team has an account of its own, and all namespaces in it.
_PREFIX = f"{ROOT}.v{VERSION}.*."
_OPS = ("open", "probe", "renew", "act")
# What the micro services of workers are asked, by everyone who wants to know who is there.
_WHO_IS_THERE = ("$SRV.*", "$SRV.*.>", f"{ROOT}.describe.*")
_STREAMS = (
    "$JS.API.INFO",
    "$JS.API.STREAM.NAMES",
    "$JS.API.STREAM.LIST",
    "$JS.API.STREAM.CREATE.*",
    "$JS.API.STREAM.INFO.*",
    "$JS.API.STREAM.MSG.GET.*",
)


# Reading by number, of streams that allow it: those of recordings, and not the audit. JetStream answers on whatever
# reply subject a request names, and looks at nobody's permissions for that: who may ask for what others have stored can
# have it published anywhere, in anybody's name. So only those may who are trusted with everything of their team.
_RECORDINGS = ("$JS.API.DIRECT.GET.*",)


@dataclass(frozen=True)
class Permissions:
    """Subjects, with NATS's wildcards; everything else is refused.

    Attributes:
        publish: where a login may publish.
        subscribe: what it may hear; with a queue group behind it, in that group alone.
    """

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


def permissions(role: Role, user: str) -> Permissions:
    """What a login of that role may do.

    Args:
        role: of the login.
        user: the token of its subjects.
    """
    if role == "env-worker":
        return _worker("env", f"{_PREFIX}env.*.open.* open", user)
    if role == "agent-worker":
        return _worker("agent", f"{_PREFIX}agent.*.act.* act", user)
    hears = (f"{_PREFIX}registry.*.*.*", f"_INBOX.{user}.>")
    looks = (f"{_PREFIX}registry.ask", f"{_PREFIX}recordings.read.{user}")
    if role == "observer":
        # A probe of nothing says in which namespace a worker is.
        watches = (*looks, f"{_PREFIX}worker.*.probe.{user}", f"{_PREFIX}tapping.{user}", *_WHO_IS_THERE)
        return Permissions(watches, (*hears, f"{_PREFIX}tap.>"))
    asks: tuple[str, ...] = (
        *looks,
        *(f"{_PREFIX}worker.*.{op}.{user}" for op in _OPS),
        f"{_PREFIX}session.*.{user}.*.*",
        f"{_PREFIX}env.*.open.{user}",
        f"{_PREFIX}agent.*.act.{user}",
    )
    if role == "learner":
        return Permissions((*asks, f"{_PREFIX}recordings.keep.{user}"), hears)
    return Permissions(
        (
            *asks,
            f"{_PREFIX}worker.*.*.{user}",
            f"{_PREFIX}tapping.{user}",
            *_WHO_IS_THERE,
            *_STREAMS,
            *_RECORDINGS,
            f"{_PREFIX}position.{user}.*.*",
        ),
        (*hears, f"{_PREFIX}tap.>", f"{_PREFIX}audit.*"),
    )


def _worker(kind: str, shared: str, user: str) -> Permissions:
    service = f"{ROOT}-{kind}"
    return Permissions(
        (
            f"{_PREFIX}registry.{kind}.*.*",
            "_INBOX.>",
            f"{_PREFIX}audit.*",
            *(
                (f"{_PREFIX}rec.>", f"{_PREFIX}episodes.>", f"{_PREFIX}tap.>", f"{_PREFIX}position.>", *_RECORDINGS)
                if kind == "env"
                else ()
            ),
        ),
        (
            f"{_PREFIX}registry.ask",
            f"{_PREFIX}worker.*.*.*",
            f"{_PREFIX}session.*.*.*.*",
            *((f"{_PREFIX}tapping.*", f"{_PREFIX}recordings.*.* {READERS}") if kind == "env" else ()),
            shared,
            "$SRV.*",
            f"$SRV.*.{service}",
            f"$SRV.*.{service}.*",
            f"{ROOT}.describe.* q",
            f"_INBOX.{user}.>",
        ),
    )
