"""Control messages: everything but steps, as pydantic models.

They are checked when they arrive and may grow: fields are only added, unknown ones are ignored, and an unknown major
version is refused by name. ``schemas/v1`` has the same contract for other languages. Durations are in seconds;
another machine's clock never travels.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, StringConstraints, ValidationError

from meshrl.errors import MalformedMessage, UnsupportedVersion
from meshrl.wire.codec import pack, unpack
from meshrl.wire.record import Record
from meshrl.wire.subjects import MAX_NAME_CHARS, VERSION

Kind = Literal["env", "agent"]
Id = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Name = Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME_CHARS)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]

# What an open asks for: one sub-environment, many in lockstep as one lane, or many as a lane each.
Form = Literal["single", "vector", "pool"]
# The values of Gymnasium's AutoresetMode.
AutoresetName = Literal["NextStep", "SameStep", "Disabled"]
# Those of R7, and that of a vector implementation with one generator for all: reset's seed is its.
Seeding = Literal["gymnasium", "derived", "implementation"]
# Whether answers carry running digests: none, those of large observations, or all.
Digests = Literal["none", "large", "all"]
AUTORESET_MODES: tuple[AutoresetName, ...] = get_args(AutoresetName)
SEEDINGS: tuple[Seeding, ...] = get_args(Seeding)
# A session of more sub-environments is split over several.
MAX_NUM_ENVS = 65_536

# Entries of batches are plain arrays on the wire: as tuples they would travel in the codec's form for Python's, which
# other languages had to know of.
_AsArray = PlainSerializer(list, return_type=list[Any])
Lease = Annotated[tuple[Id, int], Field(strict=False), _AsArray]
Lost = Annotated[tuple[str, str], Field(strict=False), _AsArray]
Awaited = Annotated[tuple[Id, int, int, int], Field(strict=False), _AsArray]

# A renewal, and a probe, names the sessions it means: this many a message keeps one below 100 KB.
MAX_BATCH = 1000


class Message(BaseModel):
    """What every control message has: the protocol's major version."""

    # strict: "3", True and 3.0 are no whole numbers, so that both sides of the schema accept the same
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    v: int = VERSION

    def to_wire(self) -> bytes:
        """The message as msgpack, without the fields that hold their default."""
        return pack({"v": self.v, **self.model_dump(exclude_defaults=True)})


M = TypeVar("M", bound=Message)


def parse(model: type[M], data: bytes) -> M:
    """Check ``data`` and give it as ``model``.

    Raises:
        UnsupportedVersion: it says another major version than this package speaks.
        MalformedMessage: it is no msgpack map, or a field is missing or of a wrong type.
    """
    return check(model, unpack(data))


def check(model: type[M], body: object) -> M:
    """The same for a body that was unpacked already."""
    if not isinstance(body, dict):
        raise MalformedMessage(f"{model.__name__}: expected a map, got {type(body).__name__}")
    check_version(body, model.__name__)
    try:
        return model.model_validate(body)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part)[:40] for part in first["loc"]) or "message"
        raise MalformedMessage(f"{model.__name__}.{where}: {first['msg']}") from None


def check_version(body: dict[Any, Any], what: str) -> None:
    """Refuse a body of another major version by name; one that says none is taken as of this version."""
    version = body.get("v", VERSION)
    # By type first: what a peer wrote may be an array, or an int too long to be printed.
    if type(version) is not int or version != VERSION:
        said = version if type(version) is int and abs(version) < 1 << 63 else f"({type(version).__name__})"
        raise UnsupportedVersion(
            f"{what}: the peer speaks version {said} of the protocol, this package version {VERSION}; "
            "upgrade the older of the two",
            spoken=VERSION,
        )


# --------------------------------------------------------------------------- registry


class Advertisement(Message):
    """What a worker says of one served name, every ``interval_s``; at most 1 KB.

    Attributes:
        slots: sub-environments the worker can hold at once, over all its names.
        free: slots that are not taken now.
        waiting: opens parked because none is free.
        description: the hash by which the :class:`Description` is known; it changes when the description does.
        left: the worker says goodbye; it is to be forgotten at once.
        draining_s: seconds until a draining worker goes away.
    """

    kind: Kind
    name: Name
    worker: Id
    slots: Count
    free: Count
    waiting: Count = 0
    draining: bool = False
    draining_s: Seconds | None = None
    left: bool = False
    interval_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    description: Annotated[str, StringConstraints(max_length=64)]


class Vectors(BaseModel):
    """What a worker's vectors of an env can do; anything else is refused at open (R6).

    Attributes:
        implementation: ``meshrl`` (sub-environments hosted one by one), ``gymnasium`` (the env's own vector entry
            point) or ``envpool``.
        autoreset_modes: the modes there are.
        seedings: the seedings there are.
        reset_mask: whether some sub-environments can be reset alone.
        options: whether reset takes options.
        one_seed: whether a reset can follow nothing but one seed for all, sub-environment i having seed + i.
        seeds_below: what every seed must be below; None: any that there is.
        attributes: whether call, get_attr, set_attr and render reach the sub-environments.
        pool: whether the sub-environments can be lanes of their own.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    implementation: Annotated[str, StringConstraints(max_length=64)] = "meshrl"
    autoreset_modes: list[AutoresetName] = Field(default_factory=lambda: list(AUTORESET_MODES))
    seedings: list[Seeding] = Field(default_factory=lambda: list(SEEDINGS[:2]))
    reset_mask: bool = True
    options: bool = True
    one_seed: bool = False
    seeds_below: Annotated[int, Field(gt=0)] | None = None
    attributes: bool = True
    pool: bool = True


class Description(Message):
    """What a worker can tell of one served name; asked for once, then known by its hash.

    Attributes:
        observation_space: in the form of :func:`meshrl.wire.spaces.describe`; None when an agent takes any.
        action_space: the same, of actions.
        spec: what ``gymnasium.EnvSpec.to_json`` gives, if the env has a spec that can be written.
        metadata: the env's ``metadata``, without what cannot travel.
        capabilities: what the operator says of the worker's machine; ``where`` is matched against it.
        allow_kwargs: names of constructor arguments that clients may pass; ``["*"]`` for any.
        allow: public names that clients may call and set; ``["*"]`` for any.
        step_deadline_s: how long a request may run before its session is given up.
        stateful: an agent that is leased like an env, because it remembers.
        versions: of Python, meshrl and the packages that the behaviour depends on.
        vectors: what sessions of many sub-environments can do; None where there can be none (agents).
        fingerprint: of what its behaviour depends on: a session of it can be resumed where another's is equal.
    """

    kind: Kind
    name: Name
    worker: Id
    observation_space: dict[str, Any] | None = None
    action_space: dict[str, Any] | None = None
    spec: str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    capabilities: dict[str, Any] = Field(default_factory=dict)
    allow_kwargs: list[str] = Field(default_factory=list)
    allow: list[str] = Field(default_factory=list)
    step_deadline_s: Seconds = 300.0
    stateful: bool = False
    versions: dict[str, str] = Field(default_factory=dict)
    vectors: Vectors | None = None
    fingerprint: Annotated[str, StringConstraints(max_length=64)] = ""

    def packed(self) -> bytes:
        """It as a part of another message, as msgpack."""
        return pack(self.model_dump(exclude_defaults=True))

    def digest(self) -> str:
        """A hash of all but the worker: 128 bits of BLAKE2b over the sorted JSON, as hexadecimal text."""
        body = self.model_dump(exclude={"worker"})
        text = json.dumps(body, sort_keys=True, default=repr, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Ask(Message):
    """Asks for descriptions: of everything, of one name, or of one worker's.

    A worker that serves on demand takes a ``name`` it could serve as a reason to begin.
    """

    kind: Kind | None = None
    name: Name | None = None
    worker: Id | None = None


class Known(Message):
    """A worker's answer to :class:`Ask`: its advertisements with their descriptions, at most 16 a message.

    Attributes:
        making: names as they were asked for that are being made on demand; said at once and again each second, until
            they are described or refused.
    """

    advertisements: list[Advertisement]
    descriptions: list[Description]
    making: list[Name] = Field(default_factory=list)


# --------------------------------------------------------------------------- sessions


class Load(Message):
    """How busy a worker is: what :class:`Advertisement` says, at this moment."""

    slots: Count
    free: Count
    waiting: Count = 0
    draining: bool = False


class Open(Message):
    """Asks for a session; idempotent, since the client chooses its id (R4).

    Attributes:
        epoch: which incarnation of the session this is, from 1.
        kwargs: for the env's or agent's constructor; checked against what the worker allows.
        key_style: how arrays' map keys are written to this client: as text, or as msgpack-numpy's bytes.
        form: ``single`` and ``vector`` have one lane, 0; a ``pool`` has one for each sub-environment.
        num_envs: sub-environments of the session, and so the slots it takes.
        first_env_id: the global index of its first sub-environment, where it is one shard of several.
        autoreset_mode: of a vector (R6); a pool's is SameStep.
        seeding: of a vector or a pool (R7).
        believed_free: free slots that the client believes in; a worker that has fewer answers ``busier``, once.
        park_s: how long the worker may keep the open waiting for a slot; 0 answers at once.
        ticket: of an earlier answer ``full``: keeps the place in the queue.
        digests: what goes with answers so that it can be resumed (R8): nothing; or what outlives resets, and the
            running digest of what was told (of vectors and pools: before), with ``all`` answers or those of ``large``
            observations only.
        record: what is to be recorded of it; None as the worker's operator has it.
    """

    session: Id
    epoch: Annotated[int, Field(ge=1, lt=2**31)] = 1
    kind: Kind = "env"
    name: Name
    kwargs: dict[str, Any] = Field(default_factory=dict)
    render_mode: Annotated[str, StringConstraints(max_length=64)] | None = None
    key_style: Literal["str", "bytes"] = "str"
    form: Form = "single"
    num_envs: Annotated[int, Field(ge=1, le=MAX_NUM_ENVS)] = 1
    first_env_id: Count = 0
    autoreset_mode: AutoresetName = "NextStep"
    seeding: Seeding = "gymnasium"
    believed_free: Count | None = None
    park_s: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] = 0.0
    ticket: Annotated[str, StringConstraints(max_length=64)] | None = None
    digests: Digests = "none"
    record: Record | None = None


class Grant(Message):
    """The session is open; the client renews at once, or it lapses after ``grant_s`` (R4).

    Attributes:
        lease_s: the lease's length; a client renews about three times in it.
        step_deadline_s: how long a request may run until the client gives it up: a moment longer than the description
            says, since the worker ends it by then.
        description: of the env as constructed for this session, its kwargs applied.
        load: the worker's for this user, this session included.
    """

    session: Id
    epoch: int
    worker: Id
    lease_s: Seconds
    grant_s: Seconds
    step_deadline_s: Seconds
    render_mode: str | None = None
    description: Description
    load: Load

    def to_wire_with(self, described: bytes) -> bytes:
        """The same as :meth:`to_wire`, where :meth:`Description.packed` of its description is known already."""
        rest = pack({"v": self.v, **self.model_dump(exclude_defaults=True, exclude={"description"})})
        # A map of fewer than 15 entries says how many in its first byte; this is one more.
        assert 0x80 <= rest[0] < 0x8F, "a grant has few fields"
        return bytes((rest[0] + 1,)) + rest[1:] + _DESCRIPTION + described


_DESCRIPTION = pack("description")


class Full(Message):
    """No slot is free (``ticket`` keeps the place), or the worker is busier than the client believed.

    Attributes:
        load: of the worker, as far as this user is concerned: ``free`` is at most what is left of its share.
        share: how many slots the worker gives to one user, where the open is beyond that.
        held: how many of them the user has.
    """

    load: Load
    ticket: str | None = None
    bounced: bool = False
    share: Count | None = None
    held: Count | None = None


class Renew(Message):
    """Renews the leases of many sessions of one worker at once; each entry is (session, epoch)."""

    sessions: Annotated[list[Lease], Field(max_length=MAX_BATCH)]


class Renewed(Message):
    """The answer to :class:`Renew`: everything was renewed but what is listed.

    Attributes:
        lost: (session, reason) for each that this worker does not hold in that epoch.
    """

    lease_s: Seconds
    lost: list[Lost] = Field(default_factory=list)
    draining: bool = False
    draining_s: Seconds | None = None


class Probe(Message):
    """Asks what became of requests (R9); each entry is (session, epoch, lane, seq), seq 0 for the open."""

    awaited: Annotated[list[Awaited], Field(max_length=MAX_BATCH)]


class Probed(Message):
    """The answer to :class:`Probe`, in its order.

    Attributes:
        states: each ``unknown``, ``not_received``, ``running``, ``parked`` or ``answered``.
    """

    states: list[Literal["unknown", "not_received", "running", "parked", "answered"]]


class Drain(Message):
    """Has a worker leave: its sessions move to others, and it ends when none is left or the time is over.

    Attributes:
        seconds: how long they have; a year at most.
    """

    seconds: Annotated[float, Field(ge=0, le=31_536_000, allow_inf_nan=False)]


class Drained(Message):
    """The worker leaves.

    Attributes:
        sessions: how many it has still.
    """

    sessions: Count


class Close(Message):
    """Ends a session, or the wish for one, of just this epoch.

    Attributes:
        moved: it goes on elsewhere, in another epoch; so do its episodes.
    """

    epoch: int
    moved: bool = False


class Closed(Message):
    """The session is closed, or was not there."""

    existed: bool


class SessionState(Message):
    """What ``env.state()`` tells.

    Attributes:
        steps: steps in the current episode.
        episode: number of the current episode in this session, from 1; 0 before the first reset.
        total_steps: steps over all episodes of the session.
        seed: the last seed given to reset, None if none was.
        phase: ``new`` before the first reset, ``running``, or ``ended`` after termination or truncation.
        episode_return: sum of the current episode's rewards; None when one of them was no number.
    """

    session: Id
    worker: Id
    name: Name
    phase: Literal["new", "running", "ended"]
    episode: Count
    steps: Count
    total_steps: int
    seed: int | None = None
    episode_return: float | None = 0.0
