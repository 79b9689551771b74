"""Drawing: envs with a render mode run one at a time in a process, whatever session they belong to (R10).

pygame, with which most envs draw, draws into others' frames from two threads at once; and an env may draw in its step
(pixels as observations), in its reset or in any method, not in ``render`` alone. So whatever runs code of an env that
draws holds one lock, which is the process's. It may be held for as long as another env's step takes, hence such envs
never run on the event loop, and never on many threads of one message.

Coroutine functions are not guarded: they run on the event loop, one at a time between two awaits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

from meshrl.worker.calls import is_coroutine

# Reentrant: a render is guarded whatever its env says of itself.
DRAWING = threading.RLock()


def draws(env: Any) -> bool:
    """Whether an env (or a vector env) says that it draws: it has a ``render_mode``."""
    return getattr(env, "render_mode", None) is not None


def alone(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` under the lock; a coroutine function as it is."""
    if is_coroutine(call):
        return call

    @wraps(call)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        with DRAWING:
            return call(*args, **kwargs)

    return guarded
