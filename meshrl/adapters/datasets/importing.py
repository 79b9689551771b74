"""Import of a Minari dataset: its episodes as recordings, by the writer that records sessions.

Its session has an id made of the dataset's id and content and the env's name. So an import of the same once more finds
that all is there, and one that was cut off goes on where it stopped: each message of a recording has its place.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gymnasium.envs.registration import EnvSpec

from meshrl.adapters.datasets.minari_reading import MinariFile, Read
from meshrl.adapters.datasets.source import OnProgress, Progress, Skipped
from meshrl.bus.connection import Connection
from meshrl.client.context import context_of
from meshrl.client.mesh import Mesh
from meshrl.client.recordings import record_of
from meshrl.errors import EpisodeTorn, MalformedMessage, StorageRefused, UsageError
from meshrl.protocol.noted import ROW_BYTES
from meshrl.protocol.transcript import MAX_NOTED_BYTES, Transcript
from meshrl.recording.chain import Storing
from meshrl.recording.library import Library
from meshrl.recording.streams import Retention, make_streams
from meshrl.recording.writing import SessionWriter
from meshrl.wire import spaces
from meshrl.wire.batches import batching
from meshrl.wire.codec import pack
from meshrl.wire.messages import Description
from meshrl.wire.recorded import Recorded
from meshrl.wire.subjects import Subjects
from meshrl.worker.proof import bytes_of

IMPORTED = "imported"
"""The label that says from which dataset an episode is."""

MAX_LABELS = 32
# Steps between looks whether what was noted is a chunk.
_LOOK_STEPS = 64


@dataclass(frozen=True, slots=True)
class Imported:
    """A dataset that is there as recordings.

    Attributes:
        dataset: its id.
        env: the name under which its episodes are listed.
        session: whose they are.
        episodes: how many there are.
        steps: of those.
        already: whether they were there before.
        skipped: episodes that are none, and were left out.
    """

    dataset: str
    env: str
    session: str
    episodes: int
    steps: int
    already: bool
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True, slots=True)
class Destination:
    """Where an import is stored.

    Attributes:
        connection: over which.
        library: that reads what is there.
        subjects: of the mesh.
    """

    connection: Connection
    library: Library
    subjects: Subjects


async def import_minari(
    m: Mesh,
    dataset: str | Path,
    env: str | None = None,
    *,
    labels: Mapping[str, str] | None = None,
    again: bool = False,
    retention: Retention | None = None,
    skip_unreadable: bool = False,
    on_progress: OnProgress | None = None,
) -> Imported:
    """Make a Minari dataset's episodes recordings of a mesh, observations and infos included.

    They have the label ``imported`` with the dataset's id. Where the dataset was exported from recordings, seeds,
    options, labels that all have, and versions of policies come back too.

    Args:
        m: the mesh; its login must be one that records, as workers' do.
        dataset: its id, or a path to where it is.
        env: the name under which they are listed; None for that of the dataset's env.
        labels: of them.
        again: import it once more, even if it is there.
        retention: of the streams, where they are not there yet.
        skip_unreadable: leave out episodes that are none (without steps, or with more behind their end).
        on_progress: called after each episode: ``reading`` when it was looked at, ``writing`` when it was noted.

    Raises:
        UsageError: Minari is not installed, there is no such dataset, it says of no env what it is called, or streams
            keep less than it has.
        MalformedMessage: an episode is none.
        UnsupportedSpace: a space of it has no converter.
        StorageRefused: somebody else imports it now, or the server does not store it.
        MeshError: the server is away, or the login may not.

    Cancelled or killed, it leaves what was stored; the next import goes on behind that.
    """
    context = context_of(m)
    to = Destination(context.connection, await context.library(), context.subjects)
    return await import_to(
        to,
        dataset,
        env,
        labels=labels,
        again=again,
        retention=retention,
        skip_unreadable=skip_unreadable,
        on_progress=on_progress,
    )


async def import_to(
    to: Destination,
    dataset: str | Path,
    env: str | None,
    *,
    labels: Mapping[str, str] | None,
    again: bool,
    retention: Retention | None,
    skip_unreadable: bool,
    on_progress: OnProgress | None,
) -> Imported:
    """As :func:`import_minari`, for a login that may record and need not see who is on the mesh: a worker's."""
    file = MinariFile(dataset)
    name = env or _name_of(file)
    record_of(None, labels=labels)
    skipped: list[Skipped] = []
    session, count, steps = _looked_at(file, name, skipped if skip_unreadable else None, on_progress)
    if again:
        session = f"{session}-{secrets.token_hex(4)}"
    there = await _there(to, name, session)
    if there < count:
        recorded = _recorded_of(file, name, session, to.connection.user, labels or {})
        await _store(to, file, recorded, retention or Retention(), {one.episode_id for one in skipped}, on_progress)
        await _check(to, name, session, count)
    return Imported(file.id, name, session, count, steps, there >= count, tuple(skipped))


def _name_of(file: MinariFile) -> str:
    names = {one.name for one in file.recordings}
    if len(names) == 1:
        return names.pop()
    spec_id = None if file.spec is None else _spec_id(file.spec)
    if spec_id is None:
        raise UsageError(f"{file.id} does not say what its env is called; say under which name to list it (--env)")
    return spec_id


def _spec_id(spec: str) -> str:
    return EnvSpec.from_json(spec).id


def _looked_at(
    file: MinariFile, name: str, skipped: list[Skipped] | None, on_progress: OnProgress | None
) -> tuple[str, int, int]:
    """Each episode, before anything is stored; gives the session's id, and how many episodes and steps there are."""
    digest = hashlib.blake2b(pack([file.id, name]), digest_size=12)
    count = steps = 0
    for index in range(len(file)):
        try:
            read = file.episode(index)
        except MalformedMessage as exc:
            if skipped is None:
                raise
            skipped.append(Skipped(str(index), exc.code, exc.message))
            continue
        told = [read.seed, read.options, read.observations, read.actions, read.rewards, read.infos]
        digest.update(pack([*told, read.terminations[-1:], read.truncations[-1:]]))
        count, steps = count + 1, steps + len(read.rewards)
        if on_progress is not None:
            on_progress(Progress("reading", count, steps, len(skipped or ())))
    if not count:
        raise UsageError(f"{file.id} has no episode to import")
    return f"minari-{digest.hexdigest()}", count, steps


def _recorded_of(file: MinariFile, name: str, session: str, user: str, labels: Mapping[str, str]) -> Recorded:
    """Of what the recording is."""
    first = file.recordings[0] if file.recordings else None
    # What it takes to make the env, where all of it was recorded of one.
    whole = first if len({pack([one.description.packed(), one.kwargs]) for one in file.recordings}) == 1 else None
    common = set.intersection(*(set(one.labels.items()) for one in file.recordings)) if file.recordings else ()
    all_ = {**dict(common), **labels, IMPORTED: file.id[:256]}
    policies = {one.policy for one in file.recordings} or {file.algorithm and file.algorithm[:256]}
    return Recorded(
        session=session,
        worker="import",
        user=user,
        name=name,
        level="full",
        labels=dict(list(all_.items())[-MAX_LABELS:]),
        policy=policies.pop() if len(policies) == 1 else None,
        imported=file.id[:256],
        kwargs={} if whole is None else whole.kwargs,
        render_mode=None if whole is None else whole.render_mode,
        platform="" if whole is None else whole.platform,
        description=Description(
            kind="env",
            name=name,
            worker="import",
            observation_space=spaces.describe(file.observation_space),
            action_space=spaces.describe(file.action_space),
            spec=file.spec,
            metadata={} if whole is None else whole.description.metadata,
            versions={} if whole is None else whole.description.versions,
            fingerprint="" if whole is None else whole.description.fingerprint,
        ),
    )


async def _there(to: Destination, name: str, session: str) -> int:
    return sum([1 async for _ in to.library.located(name, session=session)])


async def _store(
    to: Destination,
    file: MinariFile,
    recorded: Recorded,
    retention: Retention,
    skipped: set[str],
    on_progress: OnProgress | None,
) -> None:
    async def make(name: str) -> None:
        await make_streams(to.connection, to.subjects, name, retention)

    storing = Storing(to.connection, to.library.reader, to.subjects, make)
    observations, actions = batching(file.observation_space), batching(file.action_space)
    row_bytes = ROW_BYTES + bytes_of(file.observation_space) + bytes_of(file.action_space)
    # As a worker that goes on with a session: what is stored of it already is found, and left as it is.
    transcript = Transcript(1, observations, actions, "full", False, row_bytes, redone=True)
    writer = SessionWriter(transcript, recorded, max(2, time.time_ns() // 1_000_000), storing)
    base = 0.0
    count = steps = 0
    for index in range(len(file)):
        if str(index) in skipped:
            continue
        read = file.episode(index)
        for at_s in _noted(transcript, read, base):  # noqa: B007  # of the last, too
            if writer.due(time.monotonic()):
                await writer.write()
                _check_stored(writer, storing, recorded)
        base += at_s
        count, steps = count + 1, steps + len(read.rewards)
        if on_progress is not None:
            on_progress(Progress("writing", count, steps, len(skipped)))
    writer.end = "closed"
    await writer.write()
    _check_stored(writer, storing, recorded, ended=True)


def _noted(transcript: Transcript, read: Read, base: float) -> Iterator[float]:
    """Note an episode; stops now and then, and at its end, with the seconds since its reset."""
    transcript.began(0, read.seed, None, read.options)
    transcript.note_one(base, None, read.observations[0], 0.0, False, False, read.infos[0], reset=True)
    at_s = 0.0
    for t, action in enumerate(read.actions):
        if read.at_s is not None:
            at_s = max(at_s, float(read.at_s[t]))
        if read.policy_versions is not None:
            transcript.policy = int(read.policy_versions[t])
        transcript.note_one(
            base + at_s,
            action,
            read.observations[t + 1],
            float(read.rewards[t]),
            bool(read.terminations[t]),
            bool(read.truncations[t]),
            read.infos[t + 1],
            reset=False,
        )
        if t % _LOOK_STEPS == 0 or transcript.nbytes > MAX_NOTED_BYTES // 4:
            yield at_s
    yield at_s


def _check_stored(writer: SessionWriter, storing: Storing, recorded: Recorded, *, ended: bool = False) -> None:
    counts, what = storing.counts, f"the import of {recorded.imported} as {recorded.name}"
    if counts.lost or writer.transcript.missed:
        raise StorageRefused(f"{what} is not stored: {counts.why}; import it again to go on behind what is")
    if writer.over and not ended:
        raise StorageRefused(f"{what} was ended: somebody else imports the same now")


async def _check(to: Destination, name: str, session: str, count: int) -> None:
    """Whether all of it is there: a stream that keeps less has dropped its beginning."""
    located = [one async for one in to.library.located(name, session=session)]
    if len(located) < count:
        raise StorageRefused(f"{len(located)} of {count} episodes are stored; import it again to go on behind them")
    try:
        await to.library.read(located[0])
    except EpisodeTorn as exc:
        raise UsageError(
            f"the stream of recordings of {name} keeps less than the dataset has, and has dropped its beginning; an "
            "operator has it keep more (--record-bytes, where it is not made yet), or import under another name (--env)"
        ) from exc
