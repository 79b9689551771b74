"""``meshrl`` at a terminal."""

from __future__ import annotations

import asyncio
import os
import pty
import sys


async def at_a_terminal(*arguments: str) -> tuple[int, str]:
    """Its exit code, and all that it showed, colours and movements of the cursor among it."""
    parent, child = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "meshrl",
        *arguments,
        stdout=child,
        stderr=child,
        env={**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "100", "LINES": "60"},
    )
    os.close(child)
    shown = await asyncio.to_thread(_read_all, parent)
    return await process.wait(), shown


def _read_all(fd: int) -> str:
    parts = []
    while True:
        try:
            part = os.read(fd, 65536)
        except OSError:  # its other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(fd)
    return b"".join(parts).decode()
