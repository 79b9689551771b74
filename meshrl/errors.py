"""Every error meshrl raises, by whose fault it is.

    MeshError
    ├── UsageError            you: the call breaks a rule that could be checked before anything was sent
    │   ├── ConcurrentStep, StepUnsettled, NothingUnsettled, NothingUnderWay, SessionClosed
    │   ├── InvalidAction (ValueError), ResetNeeded (gymnasium.error.ResetNeeded)
    │   ├── UnencodableValue (TypeError), UnsupportedSpace (TypeError)
    │   ├── NotAllowed (PermissionError), KwargsNotAllowed (NotAllowed)
    │   ├── SpacesDiffer (ValueError), InvalidName (ValueError), InvalidSeed (ValueError)
    │   ├── FormatCannotHold (TypeError)
    ├── ProtocolError         the peer: what arrived is not a message of this protocol, or not its turn
    │   ├── MalformedMessage (ValueError), UnsupportedVersion, MessageTooLarge (ValueError)
    │   ├── SequenceGap, StaleRequest, LaneBusy, WrongEpoch
    ├── TransportError        the network: NATS, or the way to it
    │   ├── MeshUnreachable (ConnectionError), LoginRefused (PermissionError), RequestTimeout (TimeoutError)
    │   ├── SubjectNotPermitted (PermissionError), BusClosed (ConnectionError)
    │   ├── StreamMissing (LookupError), StorageRefused, WrongSequence, ViewerCut
    ├── RecordingError        what was recorded: it is not there, or not whole
    │   ├── EpisodeUnknown (LookupError), EpisodeTorn, EpisodeDiverged, EpisodeNotRendered
    └── WorkerError           the worker: it answered, with an error
        ├── UnknownName (LookupError), MeshFull (TimeoutError), WorkerDraining, WorkerCondemned
        ├── SessionUnknown (LookupError), SessionExpired, SessionLost, ReplayDiverged, NotRecorded
        ├── EnvError, AgentError          an exception in remote code, with its traceback
        └── EnvProcessDied, LimitExceeded, DeadlineExceeded (TimeoutError)
                                          an EnvError each: its process ended, or went over what the operator set

Each class that can travel has a ``code``, the text by which it is known on the wire (``schemas/v1``);
:func:`from_wire` finds the class again. Facts are attributes, collected in ``details``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium.error

_BY_CODE: dict[str, type[MeshError]] = {}


class MeshError(Exception):
    """The root of every error that meshrl raises on purpose.

    Attributes:
        message: one sentence: what happened, to which env, session or worker, and what to do.
        details: the facts of it, by name; numbers carry their unit in the name.
        remote_traceback: the traceback text of the process where it happened, if that was another one.
    """

    code: ClassVar[str] = "error"

    def __init__(self, message: str = "", *, remote_traceback: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details
        self.remote_traceback = remote_traceback

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "code" in cls.__dict__:
            _BY_CODE[cls.code] = cls

    def __str__(self) -> str:
        if self.remote_traceback:
            return f"{self.message}\n\n--- remote traceback ---\n{self.remote_traceback.rstrip()}"
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.remote_traceback, self.details)

    def to_wire(self) -> dict[str, Any]:
        """The error as a map of the wire: ``code``, ``message``, ``details``, ``traceback``."""
        wire: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.details:
            wire["details"] = self.details
        if self.remote_traceback:
            wire["traceback"] = self.remote_traceback
        return wire


def _rebuild(cls: type[MeshError], message: str, traceback: str | None, details: dict[str, Any]) -> MeshError:
    return cls(message, remote_traceback=traceback, **details)


def from_wire(wire: object) -> MeshError:
    """The error that a peer sent; a code of a later version becomes the nearest class known here.

    Args:
        wire: what stood under ``error`` in a reply. It comes from a peer, so nothing about it is trusted.

    Returns:
        the error, to be raised; a :class:`MalformedMessage` when it is not a map with a text ``message``.
    """
    if not isinstance(wire, dict):
        return MalformedMessage(f"a peer sent an error that is not a map but {type(wire).__name__}")
    code, message = wire.get("code"), wire.get("message")
    details, traceback = wire.get("details"), wire.get("traceback")
    if not isinstance(code, str) or not isinstance(message, str):
        return MalformedMessage("a peer sent an error without a code and a message")
    facts = {k: v for k, v in details.items() if isinstance(k, str)} if isinstance(details, dict) else {}
    for taken in ("message", "remote_traceback", "self"):
        facts.pop(taken, None)
    text = traceback if isinstance(traceback, str) else None
    return _BY_CODE.get(code, WorkerError)(message, remote_traceback=text, **facts)


# --------------------------------------------------------------------------- you


class UsageError(MeshError):
    """The caller broke a rule of the API; nothing was sent."""

    code = "usage"


class ConcurrentStep(UsageError):
    """A second request was made on a lane while one is under way; the first goes on undisturbed."""

    code = "concurrent_step"


class StepUnsettled(UsageError):
    """A step was cancelled and may have run; ``await env.settle()`` gives its tuple, ``reset`` discards it."""

    code = "step_unsettled"


class NothingUnsettled(UsageError):
    """``settle`` was called, but no step was cancelled."""

    code = "nothing_unsettled"


class NothingUnderWay(UsageError):
    """A pool was asked to wait for more results than can come; send actions first."""

    code = "nothing_under_way"


class SessionClosed(UsageError):
    """The env, agent or mesh was closed by this client before."""

    code = "session_closed"


class InvalidAction(UsageError, ValueError):
    """The action does not fit the action space in shape, structure, dtype or range; nothing was sent."""

    code = "invalid_action"


class ResetNeeded(UsageError, gymnasium.error.ResetNeeded):
    """``step`` or ``render`` before the first ``reset``."""

    code = "reset_needed"


class UnencodableValue(UsageError, TypeError):
    """A value has no exact form on the wire (an object array, say); ``details["path"]`` tells where it stood."""

    code = "unencodable_value"


class UnsupportedSpace(UsageError, TypeError):
    """A space has no converter; the message has the line that registers one."""

    code = "unsupported_space"


class NotAllowed(UsageError, PermissionError):
    """The worker's operator does not allow clients to read, set or call that name."""

    code = "not_allowed"


class KwargsNotAllowed(NotAllowed):
    """The worker's operator does not allow clients to pass those kwargs to the env's constructor."""

    code = "kwargs_not_allowed"


class SpacesDiffer(UsageError, ValueError):
    """An agent's declared spaces are not those of the env it should act in; or episodes of one dataset have several."""

    code = "spaces_differ"


class InvalidSeed(UsageError, ValueError):
    """A seed is a whole number from 0."""

    code = "invalid_seed"


class InvalidName(UsageError, ValueError):
    """A name or a factory text that cannot be served or asked for."""

    code = "invalid_name"


class FormatCannotHold(UsageError, TypeError):
    """A file format has no form for something that was recorded; ``details`` say which and what, and what has one."""

    code = "format_cannot_hold"


# --------------------------------------------------------------------------- the peer


class ProtocolError(MeshError):
    """A peer broke the protocol."""

    code = "protocol"


class MalformedMessage(ProtocolError, ValueError):
    """Bytes that are not a message of this protocol: cut off, of a wrong type, or of a size that does not fit."""

    code = "malformed_message"


class UnsupportedVersion(ProtocolError):
    """The peer speaks another major version of the protocol."""

    code = "unsupported_version"


class MessageTooLarge(ProtocolError, ValueError):
    """A message is over the payload limit and its subject cannot carry split messages, or over every limit."""

    code = "message_too_large"


class SequenceGap(ProtocolError):
    """A lane's request skipped a sequence number (R1)."""

    code = "sequence_gap"


class StaleRequest(ProtocolError):
    """A lane's request has a sequence number that was answered and passed (R1)."""

    code = "stale_request"


class LaneBusy(ProtocolError):
    """The next request of a lane arrived while the last one was running (R2)."""

    code = "lane_busy"


class WrongEpoch(ProtocolError):
    """A request of another epoch than the session's current one (R1)."""

    code = "wrong_epoch"


# --------------------------------------------------------------------------- the network


class TransportError(MeshError):
    """NATS, or the way to it, failed."""

    code = "transport"


class MeshUnreachable(TransportError, ConnectionError):
    """No NATS server answers at the address."""

    code = "mesh_unreachable"


class LoginRefused(TransportError, PermissionError):
    """The NATS server answered and refused the login."""

    code = "login_refused"


class SubjectNotPermitted(TransportError, PermissionError):
    """The login may not publish or subscribe there."""

    code = "subject_not_permitted"


class RequestTimeout(TransportError, TimeoutError):
    """Nothing was heard for the whole of ``timeout`` (a bound on silence, not on work: R9)."""

    code = "request_timeout"


class BusClosed(TransportError, ConnectionError):
    """The connection was closed while the request was under way, or before it."""

    code = "bus_closed"


class StreamMissing(TransportError, LookupError):
    """There is no such stream of JetStream, or the server has none: nothing is kept there."""

    code = "stream_missing"


class StorageRefused(TransportError):
    """JetStream does not store a message: its disk is full, or a limit is reached; ``details`` have its own words."""

    code = "storage_refused"


class WrongSequence(StorageRefused):
    """Somebody else has stored something on a subject since it was looked at."""

    code = "wrong_sequence"


# --------------------------------------------------------------------------- what was recorded


class ViewerCut(TransportError):
    """Whoever watched episodes under way did not keep up, and is shown no more; ``details["behind_bytes"]`` waited."""

    code = "viewer_cut"


class RecordingError(MeshError):
    """A recording cannot be read."""

    code = "recording"


class EpisodeUnknown(RecordingError, LookupError):
    """There is no such episode: it has not ended, was not recorded, or is kept no more."""

    code = "episode_unknown"


class EpisodeTorn(RecordingError):
    """A part of the episode is kept no more, or cannot be read; ``details["episode_id"]`` says of which."""

    code = "episode_torn"


class EpisodeDiverged(RecordingError):
    """The episode was run again, and did not go as it was recorded; ``details`` say from which step on, and in what."""

    code = "episode_diverged"


class EpisodeNotRendered(RecordingError):
    """There are no pictures of the episode: its env gives none, or the worker that ran it again sent none."""

    code = "episode_not_rendered"


# --------------------------------------------------------------------------- the worker


class WorkerError(MeshError):
    """A worker answered with an error."""

    code = "worker"


class UnknownName(WorkerError, LookupError):
    """No worker of the mesh serves that name; ``details["near"]`` lists names like it."""

    code = "unknown_name"


class MeshFull(WorkerError, TimeoutError):
    """Every slot for that name was taken for all of ``wait``; ``details`` tell how full each worker is."""

    code = "mesh_full"


class WorkerDraining(WorkerError):
    """The worker is going away and takes no new sessions (R11)."""

    code = "worker_draining"


class WorkerCondemned(WorkerError):
    """The worker ends itself, to be replaced: it holds env code that it cannot end, or has used its CPU time.

    ``details["worker"]`` is its id. What its clients are told is another error, of their own session.
    """

    code = "worker_condemned"


class SessionUnknown(WorkerError, LookupError):
    """The worker has no such session (it was restarted, or the session belongs to another user)."""

    code = "session_unknown"


class SessionExpired(WorkerError):
    """The session's lease ran out before it was renewed, and its slot was freed."""

    code = "session_expired"


class SessionLost(WorkerError):
    """The session is gone with its worker, or its state cannot be known any more; open a new one.

    ``details["reason"]`` is one of ``worker_lost``, ``worker_frozen``, ``session_unknown``, ``session_expired``,
    ``step_deadline``, ``ended``. Where it was to be resumed, ``details["not_resumed"]`` says why it was not.
    """

    code = "session_lost"


class ReplayDiverged(WorkerError):
    """A worker did again what a lost session had been asked, and was told something else than that had told."""

    code = "replay_diverged"


class NotRecorded(WorkerError):
    """A session that is recorded strictly has done what could not be stored; it is over, and nobody was told of that.

    ``details["why"]`` says why not.
    """

    code = "not_recorded"


class EnvError(WorkerError):
    """The env's code raised; ``remote_traceback`` has its traceback, ``details["type"]`` the exception's class."""

    code = "env_error"


class EnvProcessDied(EnvError):
    """The process that ran the env has ended: a crash in native code, ``os._exit``, or somebody killed it.

    ``details`` have ``signal`` (its name) or ``exit_code``, and in ``stderr`` the last lines that it wrote.
    """

    code = "env_process_died"


class LimitExceeded(EnvError):
    """The env took more memory or CPU time than its operator gives to a process.

    ``details["limit"]`` is ``memory`` or ``cpu``; ``max_memory_bytes`` or ``max_cpu_s`` is the limit.
    """

    code = "limit_exceeded"


class DeadlineExceeded(EnvError, TimeoutError):
    """A step, a reset or a constructor of the env took longer than its operator allows.

    ``details["deadline"]`` is ``step`` or ``reset``, ``deadline_s`` its length.
    """

    code = "deadline_exceeded"


class AgentError(WorkerError):
    """The agent's code raised; ``remote_traceback`` has its traceback, ``details["type"]`` the exception's class."""

    code = "agent_error"
