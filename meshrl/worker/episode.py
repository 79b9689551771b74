"""The bookkeeping of a session's episodes: what its state tells."""

from __future__ import annotations

from typing import Any

from meshrl.wire.messages import SessionState


class Episode:
    """Counts a session's episodes and steps; whatever an env or a client says of them, it never raises.

    Attributes:
        phase: ``new`` before the first reset, ``running`` or ``ended``.
        seed: the last that was given to a reset.
    """

    __slots__ = ("_number", "_return", "_steps", "_total", "phase", "seed")

    def __init__(self) -> None:
        self.phase = "new"
        self.seed: int | None = None
        self._number = 0
        self._steps = 0
        self._total = 0
        self._return: float | None = 0.0

    def __repr__(self) -> str:
        return f"<Episode {self._number}, {self.phase}: {self._steps} steps, return {self._return}>"

    def began(self) -> None:
        """A reset began the next one."""
        self.phase = "running"
        self._number += 1
        self._steps = 0
        self._return = 0.0

    def stepped(self) -> None:
        """One more step."""
        self._steps += 1
        self._total += 1

    def rewarded(self, reward: Any) -> None:
        """Add to the return; something that is no number leaves none for the rest of the episode."""
        if self._return is None:
            return
        try:
            # An array of one element is a number to float(), with a warning of NumPy's; here it is none.
            self._return = None if getattr(reward, "ndim", 0) else self._return + float(reward)
        except Exception:  # noqa: BLE001  # a reward may be anything, with any __float__
            self._return = None

    def ended(self) -> None:
        """It terminated or was truncated."""
        self.phase = "ended"

    def state(self, *, session: str, worker: str, name: str) -> dict[str, Any]:
        """A :class:`~meshrl.wire.messages.SessionState`, as a map."""
        return SessionState.model_validate(
            {
                "session": session,
                "worker": worker,
                "name": name,
                "phase": self.phase,
                "episode": self._number,
                "steps": self._steps,
                "total_steps": self._total,
                "seed": self.seed,
                "episode_return": self._return,
            }
        ).model_dump()
