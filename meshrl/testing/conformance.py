"""The conformance suite: what any served env must keep to, as a table of checks.

The rule of this file: *the right check fails*. A check whose question makes no sense after the failure of another is
skipped, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from meshrl.client.mesh import Mesh
from meshrl.errors import EnvError, MeshError, MeshFull, TransportError, UnknownName, UsageError
from meshrl.testing import episodes as of_episodes
from meshrl.testing import sessions as of_sessions
from meshrl.testing.report import Outcome, Report, Result
from meshrl.testing.trial import Broken, Check, Doubtful, Found, NotApplicable, Trial

CHECKS: tuple[Check, ...] = (
    Check("open", "a session opens, and its env is the one described", of_episodes.opens),
    Check("spaces", "spaces and their samples survive the wire", of_episodes.round_trip, ("open",)),
    Check("step before reset", "a step before reset raises ResetNeeded", of_sessions.step_before_reset, ("open",)),
    Check("reset", "reset gives an observation of the space, and an info", of_episodes.resets, ("open",)),
    Check("step", "episodes of random actions run without an exception", of_episodes.steps, ("open",)),
    Check("observations", "every observation is in the space", of_episodes.observations, ("step",)),
    Check("rewards", "rewards are finite numbers", of_episodes.rewards, ("step",)),
    Check("end flags", "terminated and truncated are booleans", of_episodes.flags, ("step",)),
    Check("infos", "infos are dicts with text for keys", of_episodes.infos, ("step",)),
    Check("arrays", "arrays that arrive are owned and writable", of_episodes.owned, ("step",)),
    Check("end", "after an end, reset begins an episode like any other", of_sessions.after_end, ("step",)),
    Check("seeding", "the same seed gives the same episode in two sessions", of_sessions.seeding, ("step",)),
    Check("seeding again", "the same seed gives the same episode again", of_sessions.reseeding, ("seeding",)),
    Check("other seeds", "another seed gives another episode", of_sessions.seeds_differ, ("seeding",)),
    Check("unseeded resets", "a reset without a seed goes on from the last", of_sessions.unseeded, ("seeding",)),
    Check("independence", "sessions don't touch each other", of_sessions.independent, ("seeding",)),
    Check("wrong action", "an action outside the space is refused unsent", of_sessions.wrong_action, ("step",)),
    Check("private names", "private attributes cannot be read", of_sessions.private_names, ("step",)),
    Check("exceptions", "an exception ends its own session alone", of_sessions.exceptions, ("reset",)),
    Check("render", "declared render modes give frames", of_episodes.renders, ("step",)),
    Check("close", "close frees the slot", of_sessions.closing, ("reset",)),
)
"""All checks in the order in which they run; those that others need come before them."""


async def conformance(
    mesh: Mesh,
    name: str,
    *,
    kwargs: Mapping[str, Any] | None = None,
    episodes: int = 3,
    seed: int = 0,
    max_steps: int = 200,
    wait: float = 30.0,
    on_result: Callable[[Result], None] | None = None,
) -> Report:
    """Check a served env against the contract of Gymnasium and of meshrl.

    It leases one slot, and a second one for a moment where there is one.

    Args:
        mesh: where it is served.
        name: as served.
        kwargs: for the env's constructor, as far as the worker's operator allows.
        episodes: how many are played where one would not do.
        seed: of the first; the run with the same seed does the same.
        max_steps: an episode is left after that many.
        wait: seconds to wait for a worker and a slot.
        on_result: is told of each result as it is found.

    Raises:
        UnknownName: nobody serves the name.
        MeshFull: no slot became free within ``wait``.
        TransportError: the mesh went away meanwhile.
    """
    if episodes < 1 or max_steps < 1:
        raise UsageError("the suite plays at least one episode of one step")
    description = await mesh.describe(name, wait=wait)
    trial = Trial(mesh, name, kwargs, episodes, seed, max_steps, wait, description)
    results: list[Result] = []
    for check in CHECKS:
        result = await _result(check, trial, results)
        results.append(result)
        if on_result is not None:
            on_result(result)
    return Report(name=description.name, seed=seed, results=results)


_OUTCOMES: tuple[tuple[type[Found], Outcome], ...] = (
    (Broken, "failed"),
    (Doubtful, "warning"),
    (NotApplicable, "skipped"),
)


async def _result(check: Check, trial: Trial, before: list[Result]) -> Result:
    def result(outcome: Outcome, found: str, remedy: str = "", traceback: str | None = None) -> Result:
        return Result(
            check=check.name,
            about=check.about,
            outcome=outcome,
            found=found,
            remedy=remedy,
            remote_traceback=traceback,
        )

    missing = _missing(check, before)
    if missing is not None:
        return result("skipped", f"it needs the check '{missing}', which failed")
    try:
        return result("passed", await check.run(trial))
    except Found as exc:
        outcome = next(outcome for kind, outcome in _OUTCOMES if isinstance(exc, kind))
        return result(outcome, exc.found, exc.remedy)
    except (TransportError, UnknownName):
        raise
    except MeshFull as exc:
        if not before:  # nothing could be checked at all
            raise
        return result("skipped", exc.message, "run the suite when the worker has a free slot")
    except EnvError as exc:
        return result("failed", exc.message, "see the traceback", exc.remote_traceback)
    except MeshError as exc:
        return result("failed", exc.message, "", exc.remote_traceback)
    except Exception as exc:  # noqa: BLE001  # an env may give anything, and the other checks are still of use
        return result("failed", f"what the env gave cannot be dealt with: {type(exc).__name__}: {exc}")


def _missing(check: Check, before: list[Result]) -> str | None:
    """The first failed check that this one needs, directly or by another."""
    outcomes = {result.check: result for result in before}
    needs = {each.name: each.needs for each in CHECKS}
    wanted = list(check.needs)
    while wanted:
        name = wanted.pop()
        if outcomes[name].outcome == "failed":
            return name
        wanted += needs[name]
    return None
