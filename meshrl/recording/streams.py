"""The streams of recordings: one for each env, which can be kept as long as is wanted of it, and an index of episodes.

    MESHRL_REC_<namespace>~<env>   meshrl.v1.<namespace>.rec.<env>.<session>     a description, then chunks of steps
    MESHRL_EPISODES                meshrl.v1.*.episodes.<env>.<session>          which episodes there are, and where
    MESHRL_POSITIONS               meshrl.v1.*.position.<user>.<env>.<consumer>  how far consumers have come

Nobody may purge or delete in them; what is too old, or too much, goes by itself, the oldest first.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from meshrl.bus.connection import Connection
from meshrl.bus.streams import make_stream
from meshrl.errors import TransportError
from meshrl.wire.subjects import ROOT, VERSION, Subjects, token

log = logging.getLogger("meshrl.recording")

EPISODES = "MESHRL_EPISODES"
POSITIONS = "MESHRL_POSITIONS"
# A hundred million steps of CartPole. A server sets them aside, so that there cannot be too many of them.
MAX_BYTES = 1 << 30
MAX_INDEX_BYTES = 1 << 30
MAX_POSITIONS_BYTES = 64 << 20
# Where a server cannot set as much aside, a worker does with a quarter of it, and so on, down to this.
MIN_BYTES = 1 << 20
# What JetStream says then: its storage, or the account's, is all set aside.
_NO_ROOM = frozenset({10023, 10047, 10002})
_NANOSECONDS = 1_000_000_000


@dataclass(frozen=True)
class Retention:
    """How much of the recordings of an env is kept.

    Attributes:
        max_bytes: at most; None for all.
        max_age_s: in seconds, no older than that; None for all.
    """

    max_bytes: int | None = MAX_BYTES
    max_age_s: float | None = None


@lru_cache(maxsize=256)
def stream_of(subjects: Subjects, name: str) -> str:
    """The name of the stream with the recordings of an env."""
    # A token has no "~" in it, so that no two names are the same.
    return f"MESHRL_REC_{token(subjects.namespace)}~{token(name)}".replace("/", "%2F")


def is_recording(subjects: Subjects, stream: str) -> bool:
    """Whether a stream is one of those with recordings of an env."""
    return stream.startswith(stream_of(subjects, "x")[:-1])


async def make_streams(
    connection: Connection, subjects: Subjects, name: str, retention: Retention, *, less: bool = False
) -> bool:
    """Make the streams in which recordings of an env are kept; gives whether its own is new.

    Args:
        connection: to the server.
        subjects: of the namespace.
        name: of the env.
        retention: how much of its recordings is kept.
        less: where the server cannot set so much aside, do with less.

    Raises:
        UsageError: the server has no JetStream, or refuses them.
        SubjectNotPermitted: the login may not.
    """
    index = {"subjects": [f"{ROOT}.v{VERSION}.*.episodes.*.*"], **_CONFIG, "max_bytes": MAX_INDEX_BYTES}
    await _made(connection, EPISODES, index, less=less)
    positions = {
        "subjects": [f"{ROOT}.v{VERSION}.*.position.*.*.*"],
        **_CONFIG,
        "max_msgs_per_subject": 1,
        "max_bytes": MAX_POSITIONS_BYTES,
    }
    await _made(connection, POSITIONS, positions, less=less)
    own = {"subjects": [subjects.recording(name, "*")], **_CONFIG, **_kept(retention)}
    return await _made(connection, stream_of(subjects, name), own, less=less)


async def _made(connection: Connection, name: str, config: dict[str, Any], *, less: bool) -> bool:
    while True:
        try:
            return await make_stream(connection, name, config)
        except TransportError as exc:
            size = config["max_bytes"] // 4
            if not less or exc.details.get("err_code") not in _NO_ROOM or size < MIN_BYTES:
                raise
            log.info("%s cannot be of %d bytes: %s", name, config["max_bytes"], exc.message)
            config = {**config, "max_bytes": size}


def _kept(retention: Retention) -> dict[str, Any]:
    kept: dict[str, Any] = {"max_bytes": -1 if retention.max_bytes is None else retention.max_bytes}
    if retention.max_age_s is not None:
        kept["max_age"] = int(retention.max_age_s * _NANOSECONDS)
    return kept


_CONFIG: dict[str, Any] = {
    "retention": "limits",
    "storage": "file",
    "discard": "old",
    "allow_direct": True,
    "deny_delete": True,
    "deny_purge": True,
}
