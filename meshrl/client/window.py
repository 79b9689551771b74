"""A window for ``render_mode="human"``: the frames are made at the worker and shown here."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from meshrl.errors import UsageError


class Shows(Protocol):
    """Where the frames of ``render_mode="human"`` go."""

    def show(self, frame: Any) -> None:
        """Show one frame, height x width x 3 of uint8."""

    def close(self) -> None:
        """Show no more."""


class Latest:
    """Keeps the newest frame for a window of another thread: pygame's are best left to the one that opened them."""

    def __init__(self) -> None:
        self._frame: Any = None

    def show(self, frame: Any) -> None:
        """Keep ``frame`` in place of the one before it."""
        self._frame = frame

    def take(self) -> Any:
        """The newest frame, once; None when there is none that was not taken."""
        frame, self._frame = self._frame, None
        return frame

    def close(self) -> None:
        """Nothing is open."""


class Window:
    """Shows frames, height x width x 3 of uint8; opens with the first one."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._screen: Any = None

    def show(self, frame: Any) -> None:
        """Show one frame.

        Raises:
            UsageError: pygame is not installed, or the frame is not a picture.
        """
        try:
            import pygame  # noqa: PLC0415  # only windows need it
        except ImportError as exc:
            raise UsageError("render_mode='human' needs pygame here: pip install 'meshrl[demo]'") from exc
        picture = np.asarray(frame)
        if picture.ndim != 3 or picture.shape[2] < 3:
            raise UsageError(f"{self._title}: the env rendered {picture.shape}, not height x width x 3")
        size = (picture.shape[1], picture.shape[0])
        if self._screen is None or self._screen.get_size() != size:
            pygame.display.init()
            pygame.display.set_caption(self._title)
            self._screen = pygame.display.set_mode(size)
        pygame.event.pump()
        surface = pygame.surfarray.make_surface(np.swapaxes(picture[..., :3], 0, 1))
        self._screen.blit(surface, (0, 0))
        pygame.display.flip()

    def close(self) -> None:
        """Close the window, if it is open."""
        if self._screen is not None:
            import pygame  # noqa: PLC0415

            pygame.display.quit()
            self._screen = None
