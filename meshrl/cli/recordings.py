"""``meshrl episodes``, ``replay``, ``verify``: what was recorded, read and run again; ``recordings`` makes streams."""

import asyncio
import json
import sys
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from meshrl.bus.connect import connect
from meshrl.bus.locate import locate
from meshrl.cli.options import (
    RECORD_BYTES,
    CredentialsFile,
    Json,
    Namespace,
    RecordAge,
    RecordBytes,
    Url,
    retention_of,
    time_in,
)
from meshrl.cli.plain import plain
from meshrl.client.episode import Transition
from meshrl.client.mesh import Mesh
from meshrl.client.rerunning import NEVER_AGAIN
from meshrl.client.verifying import Verdict
from meshrl.errors import EpisodeTorn, UnknownName, UsageError, WorkerError
from meshrl.recording.episodes import EpisodeSummary
from meshrl.recording.streams import make_streams, stream_of
from meshrl.wire.subjects import Subjects
from meshrl.worker.running import run

EpisodeArgument = Annotated[str, typer.Argument(help="Its id, as meshrl episodes shows it.", metavar="EPISODE")]
Env = Annotated[
    str | None, typer.Argument(help="Of one env alone, by its served name.", metavar="ENV", show_default=False)
]
Label = Annotated[list[str] | None, typer.Option(help="KEY=VALUE of their sessions; repeatable.", metavar="KEY=VALUE")]
Last = Annotated[int, typer.Option(help="The newest N; 0 for all.", min=0, metavar="N")]
WaitForWorker = Annotated[float, typer.Option(help="Seconds to wait for a worker, to run it again.", metavar="S")]
# Episodes that are run again at once: most of the time of a short one is spent on waiting for its session.
AT_ONCE = 16
STYLES = {
    "exact": "green",
    "close": "yellow",
    "unverifiable": "yellow",
    "diverged": "red",
    "torn": "red",
    "failed": "red",
}


@asynccontextmanager
async def mesh_at(url: str | None, namespace: str, credentials: Path | None) -> AsyncIterator[Mesh]:
    """The mesh that the options of a command say; none is started for it."""
    address = await locate(url, credentials=credentials, namespace=namespace, start=False)
    async with Mesh(address, namespace=namespace, credentials=credentials) as mesh:
        yield mesh


def episodes(
    env: Env = None,
    last: Last = 50,
    since: Annotated[
        str | None, typer.Option(help="Those that ended since 2026-01-31, 2026-01-31T12:00 or 90m, 12h, 7d ago.")
    ] = None,
    min_return: Annotated[float | None, typer.Option(help="Those with at least that return.", metavar="R")] = None,
    label: Label = None,
    policy: Annotated[str | None, typer.Option(help="Those of that policy.", metavar="NAME")] = None,
    manifest: Annotated[
        str | None, typer.Option(help="Those of an experiment, by the beginning of its hash.", metavar="HASH")
    ] = None,
    as_json: Json = False,
    url: Url = None,
    namespace: Namespace = "default",
    credentials: CredentialsFile = None,
) -> None:
    """List recorded episodes, the newest last."""

    async def look() -> list[EpisodeSummary]:
        async with mesh_at(url, namespace, credentials) as mesh:
            found = [
                one
                async for one in mesh.episodes(
                    env,
                    since=time_of(since, "--since"),
                    min_return=min_return,
                    labels=labels_in(label),
                    policy=policy,
                    manifest=manifest,
                )
            ]
            return found[-last:] if last else found

    found = run(look())
    if as_json:
        for one in found:
            print(json.dumps(_plain(one)))
        return
    console = Console(highlight=False)
    if not found:
        console.print("no episodes; they are listed once they have ended, and a second later")
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("episode", "env", "steps", "return", "end", "when", "user", "labels"):
        table.add_column(column, justify="right" if column in {"steps", "return"} else "left")
    for one in found:
        labels = " ".join(f"{key}={value}" for key, value in one.labels.items())
        labels = f"{labels} policy={one.policy}".strip() if one.policy else labels
        when = f"{one.ended_at.astimezone():%Y-%m-%d %H:%M:%S}"
        table.add_row(
            one.episode_id, one.env, str(one.steps), f"{one.episode_return:g}", one.reason, when, one.user, labels
        )
    console.print(table)


def replay(
    episode: EpisodeArgument,
    start: Annotated[int, typer.Option(help="The first step.", min=0, metavar="N")] = 0,
    speed: Annotated[
        float | None, typer.Option(help="How many times as fast as it went; at once when left out.", metavar="X")
    ] = None,
    wait: WaitForWorker = 30.0,
    as_json: Json = False,
    url: Url = None,
    namespace: Namespace = "default",
    credentials: CredentialsFile = None,
) -> None:
    """Show a recorded episode step by step."""

    async def show() -> None:
        async with mesh_at(url, namespace, credentials) as mesh:
            async for one in mesh.replay(episode, start, speed, wait=wait):
                if one.remade and one.step == start and not as_json:
                    print("observations were made by running it again; all that was recorded came out equal")
                print(json.dumps(step_of(one)) if as_json else line_of(one), flush=speed is not None)

    run(show())


def verify(
    episode: Annotated[
        str | None, typer.Argument(help="Its id, as meshrl episodes shows it.", metavar="EPISODE", show_default=False)
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="All episodes that there are.")] = False,
    env: Annotated[
        str | None, typer.Option(help="With --all, those of one env.", metavar="ENV", show_default=False)
    ] = None,
    wait: WaitForWorker = 30.0,
    as_json: Json = False,
    url: Url = None,
    namespace: Namespace = "default",
    credentials: CredentialsFile = None,
) -> None:
    """Run recorded episodes again, and say whether they go as they did. Exit code 1 where one diverged or could not."""
    if (episode is None) == (not all_):
        raise UsageError("name an episode, or give --all; meshrl episodes lists them")
    console = Console(highlight=False, soft_wrap=True)

    async def judge() -> Counter[str]:
        counts: Counter[str] = Counter()
        async with mesh_at(url, namespace, credentials) as mesh:
            if episode is not None:
                told = _verdict(await mesh.verify(episode, wait=wait))
                counts[told["status"]] += 1
                show(told)
                return counts
            wanted = [(one.episode_id, one.env) async for one in mesh.episodes(env)]
            async with aclosing(_verdicts(mesh, wanted, wait)) as verdicts:
                async for told in verdicts:
                    counts[told["status"]] += 1
                    show(told)
                    if not as_json and sys.stderr.isatty():
                        print(f"\r{counts.total()} of {len(wanted)}", end="", file=sys.stderr, flush=True)
        return counts

    def show(told: dict[str, Any]) -> None:
        if as_json:
            print(json.dumps(told), flush=True)
        elif told["status"] != "exact" or episode is not None:
            console.print(_told(told))

    counts = run(judge())
    if all_ and not as_json:
        console.print(", ".join(f"{count} {status}" for status, count in sorted(counts.items())) or "no episodes")
    if counts["diverged"] or counts["torn"] or counts["failed"]:
        raise typer.Exit(1)


async def _verdicts(mesh: Mesh, wanted: list[tuple[str, str]], wait: float) -> AsyncGenerator[dict[str, Any], None]:
    """What comes of each episode, in order; some are under way at once, where workers have room for them."""
    free: Counter[str] = Counter()
    for one in await mesh.envs():
        free[one.name] += one.free
    room = {name: asyncio.Semaphore(min(AT_ONCE, max(1, free[name]))) for _, name in wanted}
    unserved: set[str] = set()  # what was waited for in vain

    async def verdict(id_: str, name: str) -> dict[str, Any]:
        async with room[name]:
            try:
                return _verdict(await mesh.verify(id_, wait=0.0 if name in unserved else wait))
            except (*NEVER_AGAIN, WorkerError) as exc:
                if isinstance(exc, UnknownName):
                    unserved.add(name)
                status = "torn" if isinstance(exc, EpisodeTorn) else "failed"
                return {"episode_id": id_, "status": status, "code": exc.code, "why": exc.message}

    under_way: deque[asyncio.Task[dict[str, Any]]] = deque()
    try:
        for id_, name in wanted:
            under_way.append(asyncio.create_task(verdict(id_, name)))
            if len(under_way) == AT_ONCE:
                yield await under_way.popleft()
        while under_way:
            yield await under_way.popleft()
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


def recordings(
    env: Annotated[list[str], typer.Argument(help="Served names.", metavar="ENV...")],
    record_bytes: RecordBytes = RECORD_BYTES,
    record_age: RecordAge = None,
    url: Url = None,
    namespace: Namespace = "default",
    credentials: CredentialsFile = None,
) -> None:
    """Make the streams in which recordings of envs are kept, for workers that may not. What is there stays as it is."""
    retention = retention_of(record_bytes, record_age)

    async def make() -> None:
        address = await locate(url, credentials=credentials, namespace=namespace, start=False)
        async with connect(address, name="meshrl recordings", credentials=credentials) as connection:
            subjects = Subjects(namespace)
            for name in env:
                new = await make_streams(connection, subjects, name, retention)
                where = stream_of(subjects, name)
                print(f"recordings of {name} are kept in {where}{'' if new else ', which is there already'}")

    run(make())


# --------------------------------------------------------------------------- texts


def line_of(one: Transition) -> str:
    """A step, in a line."""
    end = " terminated" if one.terminated else " truncated" if one.truncated else ""
    return f"{one.step:5d}  {short(one.observation)}  action {short(one.action)}  reward {one.reward:g}{end}"


def short(value: Any) -> str:
    """A value, as far as it fits into a line."""
    text = np.array2string(value, precision=3, threshold=8) if isinstance(value, np.ndarray) else str(value)
    return " ".join(text.split())[:100]


def step_of(one: Transition) -> dict[str, Any]:
    """A step, as JSON has it."""
    return {
        "step": one.step,
        "observation": plain(one.observation),
        "action": plain(one.action),
        "reward": one.reward,
        "terminated": one.terminated,
        "truncated": one.truncated,
        "next_observation": plain(one.next_observation),
        "info": plain(one.info),
        "policy_version": one.policy_version,
        "remade": one.remade,
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    told: dict[str, Any] = {"episode_id": verdict.episode_id, "status": verdict.status}
    for name in ("step", "field", "largest"):
        if getattr(verdict, name) is not None:
            told[name] = getattr(verdict, name)
    if verdict.reasons:
        told |= {"reasons": list(verdict.reasons), "details": plain(dict(verdict.details or {}))}
    return told


def _told(told: Mapping[str, Any]) -> str:
    text = f"{told['episode_id']}  [{STYLES[told['status']]}]{told['status']}[/]"
    if "step" in told:
        text += f" at step {told['step']}: {told['field']}"
    if "largest" in told:
        text += f", by {told['largest']:.2g} at most"
    if "reasons" in told:
        text += f" ({', '.join(told['reasons'])})"
    return text + (f": {told['why']}" if "why" in told else "")


def _plain(one: EpisodeSummary) -> dict[str, Any]:
    return {
        "episode_id": one.episode_id,
        "env": one.env,
        "env_id": one.env_id,
        "steps": one.steps,
        "episode_return": plain(one.episode_return),
        "reason": one.reason,
        "ended_at": one.ended_at.isoformat(),
        "user": one.user,
        "labels": dict(one.labels),
        "policy": one.policy,
        "manifest": one.manifest,
    }


def labels_in(pairs: list[str] | None) -> dict[str, str]:
    """What --label says.

    Raises:
        UsageError: it says nothing that is one.
    """
    labels = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise UsageError(f"--label is KEY=VALUE, not {pair!r}")
        labels[key] = value
    return labels


def time_of(text: str | None, option: str) -> datetime | None:
    """A time, or how long ago it was, of an option.

    Raises:
        UsageError: it is neither.
    """
    if text is None:
        return None
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError:
        return datetime.now().astimezone() - time_in(text, option)
