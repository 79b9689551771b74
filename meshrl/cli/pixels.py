"""Pictures in a terminal: two pixels a character, one above the other."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.color import Color
from rich.style import Style
from rich.text import Text

COLUMNS = 64
ROWS = 48


def picture_in(value: Any) -> NDArray[np.uint8] | None:
    """The newest picture of an observation, uint8 of shape (height, width, 3); None where it is none.

    Args:
        value: an observation: (height, width), or with 1 or 3 colours, or that many frames, the last the newest.
    """
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8:
        return None
    if value.ndim == 3 and value.shape[2] == 3:
        picture = value
    elif value.ndim == 3 and value.shape[2] <= 4:
        picture = value[:, :, -1]
    elif value.ndim == 3 and value.shape[0] <= 4:
        picture = value[-1]
    else:
        picture = value
    if picture.ndim not in (2, 3) or min(picture.shape[:2]) < 8:
        return None
    return picture if picture.ndim == 3 else np.repeat(picture[:, :, None], 3, axis=2)


def drawn(picture: NDArray[np.uint8]) -> Text:
    """A picture, as large as fits into a corner of a terminal."""
    height, width = picture.shape[:2]
    scale = max(1.0, width / COLUMNS, height / ROWS)
    rows = (np.arange(int(height / scale)) * scale).astype(int)
    columns = (np.arange(int(width / scale)) * scale).astype(int)
    small = picture[rows][:, columns]
    if len(small) % 2:
        small = np.concatenate([small, small[-1:]])
    text = Text()
    for upper, lower in zip(small[::2].tolist(), small[1::2].tolist(), strict=True):
        for above, below in zip(upper, lower, strict=True):
            text.append("▀", Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below)))
        text.append("\n")
    return text
