"""What a recording says of itself: its first message, and the entries of the index of episodes.

Chunks of steps, between the two, are :mod:`meshrl.protocol.chunks`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, StringConstraints

from meshrl.errors import MalformedMessage
from meshrl.wire.codec import pack, unpack
from meshrl.wire.compressed import compress, decompress
from meshrl.wire.messages import (
    AutoresetName,
    Count,
    Description,
    Form,
    Id,
    Message,
    Name,
    Seeding,
    check,
    check_version,
)
from meshrl.wire.record import Label, Labels, ManifestHash
from meshrl.wire.subjects import VERSION

# Of a description: spaces and kwargs are no data.
MAX_RECORDED_BYTES = 16 * 1024 * 1024
# Episodes of one entry, so that it is a small message.
MAX_EPISODES = 4096


class Recorded(Message):
    """Of what a recording is; the first message of each session's, and said again from time to time.

    Attributes:
        session: whose.
        worker: that began it.
        user: who opened it.
        level: what of each step is kept: ``full`` has observations and infos too.
        every: of each lane every so many episodes are kept, from the first on.
        labels: what the client says of it.
        policy: whose actions they are, by name.
        manifest: the hash of the experiment's manifest.
        forgets: whether all that outlives a reset of its env is known, and said where a reset had no seed.
        platform: of the worker, for people.
        imported: of what was not recorded but imported, where from: nobody knows what it takes to do it again.
        description: of the env as it was constructed.
    """

    session: Id
    worker: Id
    user: Annotated[str, StringConstraints(max_length=256)]
    name: Name
    form: Form = "single"
    num_envs: Count = 1
    first_env_id: Count = 0
    autoreset_mode: AutoresetName = "NextStep"
    seeding: Seeding = "gymnasium"
    kwargs: dict[str, Any] = Field(default_factory=dict)
    render_mode: Annotated[str, StringConstraints(max_length=64)] | None = None
    level: Literal["actions", "full"] = "actions"
    every: Annotated[int, Field(ge=1)] = 1
    labels: Labels = Field(default_factory=dict)
    policy: Label | None = None
    manifest: ManifestHash | None = None
    forgets: bool = False
    platform: Annotated[str, StringConstraints(max_length=256)] = ""
    imported: Annotated[str, StringConstraints(max_length=256)] | None = None
    description: Description

    def to_stream(self) -> bytes:
        """It as a message of a stream, compressed."""
        return compress(self.to_wire())

    @classmethod
    def from_stream(cls, data: bytes) -> Recorded:
        """What such a message says.

        Raises:
            MalformedMessage: it is none.
            UnsupportedVersion: it is of another major version.
        """
        return check(cls, unpack(decompress(data, MAX_RECORDED_BYTES)))


class Entry(Message):
    """An entry of the index: the episodes of one session that ended in one chunk of it.

    Attributes:
        chunk: the number of the chunk in its session.
        described: where the recording's last :class:`Recorded` stands in its stream.
        after: the last message on its subject before the chunk; both by their number in the stream.
        user: whose session it is.
        labels: of it.
        policy: of it.
        manifest: of it.
        lanes: int32, of each episode.
        numbers: int64, counted from 0 since its env was made.
        steps: int64.
        returns: float64, the sum of the rewards.
        reasons: uint8, why it ended.
        first: int64, the number in the stream of a message before which none is of the episode.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, arbitrary_types_allowed=True)

    session: Id
    chunk: Annotated[int, Field(ge=1)]
    described: Annotated[int, Field(ge=1)]
    after: Annotated[int, Field(ge=0)]
    first_env_id: Count = 0
    user: Annotated[str, StringConstraints(max_length=256)] = ""
    labels: Labels = Field(default_factory=dict)
    policy: Label | None = None
    manifest: ManifestHash | None = None
    lanes: NDArray[np.int32]
    numbers: NDArray[np.int64]
    steps: NDArray[np.int64]
    returns: NDArray[np.float64]
    reasons: NDArray[np.uint8]
    first: NDArray[np.int64]

    def to_stream(self) -> bytes:
        """It as a message of a stream."""
        return pack({"v": VERSION, **{name: getattr(self, name) for name in type(self).model_fields if name != "v"}})

    @classmethod
    def from_stream(cls, data: bytes) -> Entry:
        """What such a message says.

        Raises:
            MalformedMessage: it is none.
            UnsupportedVersion: it is of another major version.
        """
        body = unpack(data)
        if type(body) is not dict:
            raise MalformedMessage("an entry of the index of episodes is a map")
        check_version(body, cls.__name__)
        count = len(body["lanes"]) if isinstance(body.get("lanes"), np.ndarray) and body["lanes"].ndim == 1 else -1
        for name, dtype in _COLUMNS:
            column = body.get(name)
            if not isinstance(column, np.ndarray) or column.dtype != dtype or column.shape != (count,):
                raise MalformedMessage(f"an entry of the index of episodes has no {name}", field=name)
        return check(cls, body)


_COLUMNS = (
    ("lanes", np.int32),
    ("numbers", np.int64),
    ("steps", np.int64),
    ("returns", np.float64),
    ("reasons", np.uint8),
    ("first", np.int64),
)
