"""What can be found out about a bus: which rule leads to it, what its server is, who answers on it.

For people who want to know why something does not work (``meshrl doctor``, ``meshrl ls``). Nothing here starts or
changes anything, and a question that the login may not ask counts as unanswered.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from meshrl.bus.connection import Connection
from meshrl.bus.embedded import URL_VARIABLE as EMBEDDED_VARIABLE
from meshrl.bus.locate import LOCAL_URL, URL_VARIABLE, locate
from meshrl.bus.login import Credentials
from meshrl.bus.record import read_record
from meshrl.errors import MeshError, RequestTimeout, SubjectNotPermitted
from meshrl.wire.messages import Probe
from meshrl.wire.subjects import Subjects, is_id

# Micro services answer a ping of everybody each in its own time; after this much silence, all have.
QUIET_S = 0.2
ANSWER_S = 1.0
# A frozen worker holds nobody up for longer.
PROBE_S = 0.5


@dataclass(frozen=True)
class Found:
    """A mesh, and the rule by which it was found.

    Attributes:
        url: where to connect, password included.
        rule: in words, for people.
    """

    url: str
    rule: str


@dataclass(frozen=True)
class WorkerFacts:
    """A worker, as the micro service that it is.

    Attributes:
        worker: its id.
        kind: ``env`` or ``agent``.
    """

    worker: str
    kind: str


async def found(
    url: str | None, *, credentials: str | Path | Credentials | None = None, namespace: str = "default"
) -> Found:
    """Which mesh is meant, and why; like :func:`~meshrl.bus.locate.locate`, but never starts one.

    Raises:
        MeshUnreachable: there is none.
        LoginRefused: a server on localhost:4222 refuses the login.
    """
    address = await locate(url, credentials=credentials, namespace=namespace, start=False)
    if url and url != os.environ.get(URL_VARIABLE):
        return Found(address, "the url given")
    if os.environ.get(URL_VARIABLE):
        return Found(address, f"${URL_VARIABLE}")
    if os.environ.get(EMBEDDED_VARIABLE):
        return Found(address, "the embedded mesh of the process above")
    record = await asyncio.to_thread(read_record)
    if record is not None and record.url == address:
        return Found(address, f"meshrl up (process {record.pid})")
    return Found(address, f"a registry answers at {LOCAL_URL}")


async def round_trip_s(connection: Connection, times: int = 5) -> float:
    """Seconds from here to the server and back: the shortest of ``times`` pings.

    Raises:
        RequestTimeout: the server does not answer.
    """
    shortest = float("inf")
    for _ in range(times):
        began = time.monotonic()
        await connection.flush()
        shortest = min(shortest, time.monotonic() - began)
    return shortest


async def jetstream_problem(connection: Connection) -> str | None:
    """None when JetStream answers this login; else what is wrong, in words."""
    try:
        answer = await connection.ask("$JS.API.INFO", b"", ANSWER_S)
    except RequestTimeout:
        return "no answer; the login may not be permitted to publish to $JS.API.>"
    except SubjectNotPermitted:
        return "the login is not permitted to publish to $JS.API.>"
    if answer is None:
        return "off: the server runs without JetStream"
    error = _json(answer).get("error")
    if isinstance(error, dict):
        return str(error.get("description", error))
    return None


async def workers(connection: Connection, subjects: Subjects) -> list[WorkerFacts]:
    """The workers of a namespace, idle ones that serve on demand included, sorted by kind and id.

    Micro services know no namespaces, so each is asked over a subject that it listens to in its own alone.
    """
    answers = await asyncio.gather(*(_services(connection, kind) for kind in ("env", "agent")))
    known = {fact.worker: fact for some in answers for fact in some}
    here = await asyncio.gather(*(_listens(connection, subjects, worker) for worker in known))
    facts = [fact for fact, listens in zip(known.values(), here, strict=True) if listens]
    return sorted(facts, key=lambda fact: (fact.kind, fact.worker))


async def _services(connection: Connection, kind: str) -> list[WorkerFacts]:
    arrived: asyncio.Queue[bytes | None] = asyncio.Queue()
    facts = []
    rid = connection.request(
        f"$SRV.PING.meshrl-{kind}", b"", arrived.put_nowait, on_fail=lambda _exc: arrived.put_nowait(None)
    )
    try:
        wait_s = ANSWER_S
        while True:
            async with asyncio.timeout(wait_s):
                answer = await arrived.get()
            if answer is None:
                break  # nobody is there, or may be asked
            wait_s = QUIET_S
            metadata = _json(answer).get("metadata")
            worker = metadata.get("worker") if isinstance(metadata, dict) else None
            if is_id(worker):
                facts.append(WorkerFacts(str(worker), kind))
    except TimeoutError:
        pass
    finally:
        connection.forget(rid)
    return facts


async def _listens(connection: Connection, subjects: Subjects, worker: str) -> bool:
    subject = subjects.worker(worker, "probe", connection.user)
    try:
        return await connection.ask(subject, Probe(awaited=[]).to_wire(), PROBE_S) is not None
    except MeshError:
        return False


def program_version(program: Path | str, *arguments: str, timeout_s: float = 5.0) -> str | None:
    """The first version number that ``program`` prints; None when it fails, hangs or prints none."""
    try:
        done = subprocess.run(  # noqa: S603  # the programs that doctor looks for, by names of its own
            [str(program), *(arguments or ("--version",))],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"\d+\.\d+[\w.+-]*", done.stdout)
    return match[0] if match and done.returncode == 0 else None


def _json(data: bytes) -> dict[str, object]:
    try:
        body = json.loads(data)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}
