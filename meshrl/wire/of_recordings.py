"""What is asked of env workers about recordings: to show what goes on, to read, and to keep positions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from meshrl.wire.messages import Message


class Watch(Message):
    """Somebody watches sessions that are recorded, for some seconds from now on; said again as long as that lasts.

    Attributes:
        env: the served name; None for any.
        session: its id; None for any.
        seconds: for how long.
    """

    env: str | None = None
    session: str | None = None
    seconds: Annotated[float, Field(gt=0, le=60, allow_inf_nan=False)]


# What stands in a subject, or in a header, that a worker sends for somebody else.
_STREAM = r"^[A-Za-z0-9_%:@+=~-]+$"
_MESSAGE_ID = r"^[A-Za-z0-9_.:-]+$"


class Read(Message):
    """Has an env worker read a stream, for a login that may not ask JetStream itself.

    Attributes:
        stream: its name.
        which: ``from`` a number or a time on; the ``last`` on the subject; ``at`` a number.
        subject: may hold wildcards; None for ``at``.
        seq: a number in the stream.
        since_us: microseconds of the server's clock since 1970, in place of the number; None for that.
        count: of messages, at most.
    """

    stream: Annotated[str, Field(pattern=_STREAM, max_length=255)]
    which: Literal["from", "last", "at"] = "from"
    subject: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    seq: Annotated[int, Field(ge=1, lt=2**63)] = 1
    since_us: Annotated[int, Field(ge=0, lt=2**53)] | None = None
    count: Annotated[int, Field(ge=1, le=256)] = 256


class Keep(Message):
    """Has an env worker store how far a consumer of the user has come.

    Attributes:
        env: the served name whose experience it takes.
        consumer: its name.
        position: what is stored.
        message_id: known again within two minutes.
        after: the number of the last message of that consumer in the stream; 0 for none.
    """

    env: Annotated[str, Field(min_length=1, max_length=128)]
    consumer: Annotated[str, Field(min_length=1, max_length=128)]
    position: Annotated[str, Field(min_length=1, max_length=256)]
    message_id: Annotated[str, Field(pattern=_MESSAGE_ID, max_length=128)]
    after: Annotated[int, Field(ge=0, lt=2**63)]


class Kept(Message):
    """It is stored.

    Attributes:
        seq: its number in the stream.
    """

    seq: Annotated[int, Field(ge=1)]
