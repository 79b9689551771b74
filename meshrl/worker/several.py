"""Several envs of one session: whether they are coroutine envs, what such do at once, and their end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any

from meshrl.worker.calls import Calls, is_coroutine
from meshrl.worker.drawing import alone, draws

# What sub-environments may take to be cancelled when one of them has crashed.
CANCEL_S = 5.0


def has_coroutines(env: Any) -> bool:
    """Whether an env's ``reset`` or ``step`` is a coroutine function."""
    bare = getattr(env, "unwrapped", env)
    return any(is_coroutine(getattr(of, op, None)) for of in (env, bare) for op in ("reset", "step"))


async def together(coroutines: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Run coroutines of several sub-environments at once; when one of them fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=CANCEL_S)
        raise


async def close_all(calls: Calls, envs: Sequence[Any], seconds: float) -> None:
    """Close envs, in their order; an error of one is raised when all were tried."""
    failed: BaseException | None = None
    end = time.monotonic() + seconds
    if not is_coroutine(envs[0].close):

        def close() -> None:
            nonlocal failed
            for env in envs:
                try:
                    (alone(env.close) if draws(env) else env.close)()
                except Exception as exc:  # noqa: BLE001  # the others are closed all the same
                    failed = failed or exc

        await calls.close(close, seconds)
    else:
        for env in envs:
            try:
                await calls.close(env.close, max(0.0, end - time.monotonic()))
            except Exception as exc:  # noqa: BLE001  # as above
                failed = failed or exc
    if failed is not None:
        raise failed
