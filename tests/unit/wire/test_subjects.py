from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshrl.errors import InvalidName
from meshrl.wire.subjects import MAX_NAME_CHARS, Subjects, is_id, token, untoken

# Surrogates have no UTF-8, so no name that arrived has one.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=MAX_NAME_CHARS)
# What NATS gives a meaning in a subject, or ends one.
MEANT = re.compile(r"[.*>\s\x00]")
# The server's limit for a line of its protocol, which has the subject, a reply subject and sizes in it.
CONTROL_LINE_BYTES = 4096


@given(TEXTS)
def test_any_text_is_one_token_and_comes_back(text: str) -> None:
    part = token(text)
    assert re.fullmatch(r"[A-Za-z0-9_\-/:@+=%]+", part)
    assert untoken(part) == text


@given(TEXTS, TEXTS)
def test_two_texts_never_share_a_token(one: str, other: str) -> None:
    assert (token(one) == token(other)) is (one == other)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("CartPole-v1", "CartPole-v1"),
        ("ALE/Pong-v5", "ALE/Pong-v5"),
        ("package.module:Env-v0", "package%2Emodule:Env-v0"),
        ("a b", "a%20b"),
        ("*", "%2A"),
        (">", "%3E"),
        ("%2E", "%252E"),
        ("~", "%7E"),
        ("ä", "%C3%A4"),
        ("a\r\nPUB x", "a%0D%0APUB%20x"),
    ],
)
def test_a_token_is_written_the_same_way_in_every_language(text: str, part: str) -> None:
    assert token(text) == part


@pytest.mark.parametrize("text", ["", "x" * (MAX_NAME_CHARS + 1), "\ud800"])
def test_what_cannot_be_a_name_is_invalid(text: str) -> None:
    with pytest.raises(InvalidName):
        token(text)


@pytest.mark.parametrize("part", ["%FF", "%", "%zz", "%C3", "a.b", ""])
def test_what_a_stranger_wrote_is_read_without_an_exception(part: str) -> None:
    assert isinstance(untoken(part), str)


@pytest.mark.parametrize("text", ["a", "s1", "A-b_9", "x" * 64, "-", "_"])
def test_letters_digits_dashes_and_underscores_make_an_id(text: str) -> None:
    assert is_id(text)


@pytest.mark.parametrize(
    "text", ["", "x" * 65, "a.b", "a b", "a\n", "\n", "ä", "*", ">", "a/b", None, 7, b"s1", ["s"], "\u0661"]
)
def test_nothing_else_is_an_id(text: object) -> None:
    assert not is_id(text)


def every_subject(of: Subjects, name: str, worker: str, user: str, session: str) -> list[str]:
    return [
        of.advertisement("env", name, worker),
        of.ask,
        of.worker(worker, "open", user),
        of.any_open(name, user),
        of.any_act(name, user),
        of.session(worker, user, session, "step"),
    ]


def test_the_subjects_are_those_of_the_design() -> None:
    assert every_subject(Subjects(), "CartPole-v1", "w1", "anon", "s1") == [
        "meshrl.v1.default.registry.env.CartPole-v1.w1",
        "meshrl.v1.default.registry.ask",
        "meshrl.v1.default.worker.w1.open.anon",
        "meshrl.v1.default.env.CartPole-v1.open.anon",
        "meshrl.v1.default.agent.CartPole-v1.act.anon",
        "meshrl.v1.default.session.w1.anon.s1.step",
    ]


def matches(pattern: str, subject: str) -> bool:
    """As NATS compares: token by token, ``*`` for any one."""
    wanted, has = pattern.split("."), subject.split(".")
    return len(wanted) == len(has) and all(w in {"*", h} for w, h in zip(wanted, has, strict=True))


@given(TEXTS, TEXTS)
def test_what_is_published_reaches_the_subscription_meant_for_it_and_no_other(namespace: str, name: str) -> None:
    of = Subjects(namespace)
    ad = of.advertisement("env", name, "w1")
    assert matches(of.advertisements, ad)
    assert not matches(of.advertisements, of.ask)
    assert matches(of.at_worker("w1", "open"), of.worker("w1", "open", "ann"))
    assert not matches(of.at_worker("w1", "open"), of.worker("w2", "open", "ann"))
    assert not matches(of.at_worker("w1", "open"), of.worker("w1", "probe", "ann"))
    request = of.session("w1", "ann", "s1", "step")
    assert matches(of.sessions("w1"), request)
    assert not matches(of.sessions("w2"), request)
    assert not matches(of.sessions("w1"), of.worker("w1", "open", "ann"))


@given(TEXTS)
def test_a_session_subject_gives_back_user_session_and_op(namespace: str) -> None:
    of = Subjects(namespace)
    subject = of.session("w1", "ann", "s1", "step")
    assert subject.startswith(of.session_prefix("w1"))
    assert subject[len(of.session_prefix("w1")) :].split(".") == ["ann", "s1", "step"]


@given(TEXTS, TEXTS)
def test_namespaces_are_apart(one: str, other: str) -> None:
    if one != other:
        for subject in every_subject(Subjects(other), "x", "w", "u", "s"):
            assert not subject.startswith(Subjects(one).prefix)


@given(TEXTS, TEXTS)
def test_no_name_smuggles_anything_into_a_subject(namespace: str, name: str) -> None:
    plain = every_subject(Subjects("n"), "x", "w1", "anon", "s1")
    for subject, like in zip(every_subject(Subjects(namespace), name, "w1", "anon", "s1"), plain, strict=True):
        assert subject.count(".") == like.count(".")
        assert not any(MEANT.search(part) for part in subject.split("."))


def test_the_longest_subject_fits_the_servers_control_line() -> None:
    longest = "\U0001f916" * MAX_NAME_CHARS
    for subject in every_subject(Subjects(longest), longest, "w" * 64, "u" * 64, "s" * 64):
        assert len(subject) < CONTROL_LINE_BYTES - 256
