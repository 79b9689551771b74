"""Agents whose worker leaves in tests."""

import asyncio
from typing import Any


async def slow(obs: Any) -> Any:
    """Gives back what it sees, after a moment."""
    await asyncio.sleep(0.2)
    return obs
