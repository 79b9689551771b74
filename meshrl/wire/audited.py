"""Entries of the audit: a control message of its own, which workers publish and nobody answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from meshrl.wire.messages import MAX_NUM_ENVS, Form, Id, Kind, Message, Name, Seconds
from meshrl.wire.subjects import MAX_NAME_CHARS


class Audited(Message):
    """What a worker says of a session, for who keeps the audit: it was opened, has ended, or was refused.

    Each that was opened ends once, unless its worker is killed. Who keeps entries knows when they came.

    Attributes:
        n: number of the entry among those of its worker, from 1; one that is missing was lost.
        ago_s: seconds from what it tells until it was sent.
        user: the token of the login.
        kwargs: asked for by an open; of large ones, each value's size in words.
        reason: of an end: ``closed``, ``session_expired``, ``ended`` (the env raised), ``not_constructed``,
            ``wrong_epoch`` (opened anew) or ``worker_stopped``.
        code: of the error that a refused open was answered with, or that ended the session.
        type: the class of the exception, where code of the env's or agent's raised it.
        lasted_s: seconds from the opening to the end.
    """

    n: Annotated[int, Field(ge=1)]
    event: Literal["opened", "ended", "refused"]
    worker: Id
    user: Annotated[str, StringConstraints(max_length=3 * MAX_NAME_CHARS)]
    session: Id
    epoch: Annotated[int, Field(ge=1, lt=2**31)]
    kind: Kind
    name: Name
    ago_s: Seconds = 0.0
    form: Form = "single"
    num_envs: Annotated[int, Field(ge=1, le=MAX_NUM_ENVS)] = 1
    render_mode: Annotated[str, StringConstraints(max_length=64)] | None = None
    kwargs: dict[str, Any] = Field(default_factory=dict)
    reason: Annotated[str, StringConstraints(max_length=64)] | None = None
    code: Annotated[str, StringConstraints(max_length=64)] | None = None
    type: Annotated[str, StringConstraints(max_length=128)] | None = None
    lasted_s: Seconds | None = None
