from __future__ import annotations

import pytest

from meshrl.protocol.roles import ROLES, Role, permissions
from meshrl.wire.subjects import Subjects


def matches(pattern: str, subject: str) -> bool:
    """As NATS does: ``*`` is one token, ``>`` one or more at the end."""
    wanted, parts = pattern.partition(" ")[0].split("."), subject.split(".")
    if wanted[-1] == ">":
        return len(parts) >= len(wanted) and _each(wanted[:-1], parts)
    return len(parts) == len(wanted) and _each(wanted, parts)


def _each(wanted: list[str], parts: list[str]) -> bool:
    return all(want in {"*", part} for want, part in zip(wanted, parts, strict=False))


def may(patterns: tuple[str, ...], subject: str) -> bool:
    return any(matches(pattern, subject) for pattern in patterns)


@pytest.mark.parametrize("namespace", ["default", "a.b"])
def test_a_learner_publishes_all_that_a_client_does_and_under_its_own_user_alone(namespace: str) -> None:
    at = Subjects(namespace)

    def asked(user: str) -> list[str]:
        ops = ("open", "renew", "probe", "act")
        return [
            *(at.worker("e1", op, user) for op in ops),
            at.any_open("module:Name-v1.5", user),
            at.any_act("random", user),
            *(at.session("e1", user, "s", op) for op in ("step", "close", "reset")),
        ]

    mine = permissions("learner", "UANN")
    assert all(may(mine.publish, subject) for subject in [at.ask, *asked("UANN")])
    assert not any(may(mine.publish, subject) for subject in asked("UBOB") + asked("UANNE"))
    assert not may(mine.publish, at.worker("e1", "drain", "UANN"))
    assert may(permissions("operator", "UOP").publish, at.worker("e1", "drain", "UOP"))


@pytest.mark.parametrize("role", ROLES)
def test_nobody_may_change_a_stream_or_hear_anothers_inbox(role: Role) -> None:
    allowed = permissions(role, "UME")
    for verb in ("PURGE.X", "DELETE.X", "UPDATE.X", "MSG.DELETE.X", "RESTORE.X", "SNAPSHOT.X", "PEER.REMOVE.X"):
        assert not may(allowed.publish, f"$JS.API.STREAM.{verb}")
    assert [pattern for pattern in allowed.subscribe if pattern.startswith(("_INBOX", ">", "*"))] == ["_INBOX.UME.>"]
    assert not any(pattern.startswith((">", "*", "$SYS")) for pattern in allowed.publish)


@pytest.mark.parametrize("role", ["learner", "observer", "operator"])
def test_who_asks_answers_nobody_and_advertises_nothing(role: Role) -> None:
    allowed, at = permissions(role, "UME"), Subjects()
    for subject in ("_INBOX.UME.1.2", "_INBOX.UANN.1.2", at.advertisement("env", "x", "e1"), f"{at.prefix}audit.e1"):
        assert not may(allowed.publish, subject)


@pytest.mark.parametrize(("role", "kind", "other"), [("env-worker", "env", "agent"), ("agent-worker", "agent", "env")])
def test_a_worker_hears_and_advertises_what_is_of_its_kind(role: Role, kind: str, other: str) -> None:
    allowed, at = permissions(role, "UW"), Subjects()
    for op in ("open", "probe", "renew"):
        assert may(allowed.subscribe, at.at_worker("w1", op))
    assert may(allowed.subscribe, at.sessions("w1"))
    assert may(allowed.subscribe, at.ask)
    assert may(allowed.publish, at.advertisement(kind, "name", "w1"))
    assert not may(allowed.publish, at.advertisement(other, "name", "w1"))
    shared = {"env": at.any_open("n", "*"), "agent": at.any_act("n", "*")}
    assert may(allowed.subscribe, shared[kind])
    assert not may(allowed.subscribe, shared[other])
    assert not may(allowed.publish, at.worker("w2", "open", "UW"))
