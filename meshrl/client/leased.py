"""``Leased``: what every remote env is, one or many: the facts of its description, and the end of its sessions."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Self

from gymnasium.envs.registration import EnvSpec

from meshrl.client.session import RemoteSession, close_all
from meshrl.wire.frames import Frame
from meshrl.wire.messages import Description


class Leased:
    """Envs of one name, and the sessions that hold them.

    Args:
        description: of the env, as served.
        sessions: of all that is leased.

    Attributes:
        policy_version: of whoever chooses the actions from now on; it goes with each step, to be recorded. None where
            nobody says.
    """

    # What frees the slots of one that nobody closed.
    _freed_by: ClassVar[str]

    def __init__(self, description: Description, sessions: Sequence[RemoteSession]) -> None:
        self._description = description
        self._sessions = sessions
        self.policy_version: int | None = None

    def __del__(self, _warn: Any = warnings.warn) -> None:
        left = [session for session in getattr(self, "_sessions", ()) if session.abandoned]
        for session in left:
            session.let_go()
        if left:
            _warn(f"unclosed {self!r}: {self._freed_by}", ResourceWarning, source=self)

    @property
    def name(self) -> str:
        """As served."""
        return self._description.name

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The remote env's, without what cannot travel."""
        return dict(self._description.metadata)

    @cached_property
    def remote_spec(self) -> EnvSpec | None:
        """The remote env's ``EnvSpec``, or that of one of many; None where it has none that can be written down."""
        return None if self._description.spec is None else EnvSpec.from_json(self._description.spec)

    @property
    def versions(self) -> dict[str, str]:
        """Versions of what it runs on."""
        return dict(self._description.versions)

    def _said(self, fields: Frame) -> Frame:
        """The fields of a step, with the version of the policy where there is one."""
        if self.policy_version is not None:
            fields["policy"] = operator.index(self.policy_version)
        return fields

    async def close(self) -> None:
        """Close all that is leased and free its slots. Safe to call twice; cancelled, it does so all the same."""
        await close_all(self._sessions)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()
