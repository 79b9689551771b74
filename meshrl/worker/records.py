"""Records: which sessions of a worker are recorded, and by whom."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from meshrl.errors import UsageError
from meshrl.protocol.session import Session
from meshrl.recording.chain import Counts
from meshrl.recording.recorder import Recorder
from meshrl.wire.messages import Description, Open
from meshrl.wire.record import RECORD_LEVELS, Record, RecordLevel
from meshrl.worker.hold import Hold
from meshrl.worker.hosted import HostedEnv
from meshrl.worker.hosted_pool import HostedPool
from meshrl.worker.hosted_vector import HostedVector
from meshrl.worker.recorded_vector import RecordedVector
from meshrl.worker.recording import Recording
from meshrl.worker.sealing import StateKey
from meshrl.worker.strict import Strict
from meshrl.worker.vector_implementations import HostedImplementation

log = logging.getLogger("meshrl.worker")


# What is recorded of a session where neither its client nor the worker's operator says.
RECORD: RecordLevel = "actions"


class Records:
    """What is recorded of a worker's sessions.

    Args:
        worker: its id.
        level: how much, where a client does not say; None as it is where nobody does.
        recorder: makes the recorder, once there is something for it to do.
        state_key: with which the worker seals what only workers may have written.

    Raises:
        UsageError: there is no such level.
    """

    def __init__(
        self, worker: str, level: RecordLevel | None, recorder: Callable[[], Recorder], state_key: StateKey | None
    ) -> None:
        if level is not None and level not in RECORD_LEVELS:
            raise UsageError(f"record is one of {', '.join(RECORD_LEVELS)}, not {level!r}")
        self._worker = worker
        self._asked = level is not None
        self._default = level or RECORD
        self._make = recorder
        self._state_key = state_key
        self._recorder: Recorder | None = None

    @property
    def counts(self) -> Counts:
        """What became of what its sessions did, as far as it was to be recorded."""
        return Counts() if self._recorder is None else self._recorder.counts

    def level(self, open_: Open) -> RecordLevel:
        """How much is recorded of a session."""
        return (open_.record or Record()).level or self._default

    def join(self, hosted: HostedEnv | HostedVector | HostedPool, envs: Sequence[Any], open_: Open) -> None:
        """Have a session recorded whose envs have just been made; on the thread that made them."""
        level = self.level(open_)
        if level != "off":
            hosted.record(Recording.of_envs(envs, "actions" if level == "actions" else "full", self._state_key))

    def join_vector(self, hosted: HostedImplementation, open_: Open) -> None:
        """The same of a vector implementation, which is recorded with observations or not at all."""
        if self.level(open_) in ("full", "strict"):
            vector = hosted.vector
            spaces = vector.single_observation_space, vector.single_action_space
            recording = Recording(spaces, [None] * open_.num_envs, "full")
            hosted.recorded = RecordedVector(recording, open_.num_envs, open_.autoreset_mode)

    def begin(self, session: Session, open_: Open, description: Description) -> None:
        """A session begins; on the event loop."""
        hold: Hold = session.held
        recording = hold.recording
        if recording is None:
            return
        transcript, recorder = recording.transcript, self.recorder()
        transcript.begun = open_.epoch
        recorded = recording.recorded(open_, session.user, self._worker, description)
        asked = self._asked or (open_.record is not None and open_.record.level is not None)
        recorder.begin(transcript, recorded, open_.epoch, asked=asked)
        if self.level(open_) == "strict":
            transcript.strict = True
            hold.withhold = Strict(transcript, recorder.nudge)

    def recorder(self) -> Recorder:
        """Who writes them, for whoever needs it from now on."""
        if self._recorder is None:
            self._recorder = self._make()
        return self._recorder

    def ends(self, session: Session, reason: str) -> None:
        """A session has ended; on the event loop."""
        hold: Hold | None = session.held
        if self._recorder is not None and hold is not None and hold.recording is not None:
            hold.recording.transcript.settle()
            self._recorder.end(hold.recording.transcript, reason)

    def stop(self) -> None:
        """Write what is left; blocks."""
        if self._recorder is not None:
            self._recorder.stop()
