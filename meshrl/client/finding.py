"""Finding: who serves a name and could take a session, and the errors where nobody does (R5)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from meshrl.errors import MeshError, MeshUnreachable, RequestTimeout, UnknownName, UsageError
from meshrl.protocol.names import near
from meshrl.protocol.offers import lacking, remedy
from meshrl.wire.messages import Ask, Description, Kind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from meshrl.client.context import Context
    from meshrl.protocol.directory import Entry

# A name that nobody serves is an error after this long when other workers are there, counted from when one last said
# that it is making it; a mesh without any worker is waited for (it may be starting).
UNKNOWN_S = 3.0
ASK_AGAIN_S = 1.0
# A description is asked for by the first advertisement; its answer may have been lost.
DESCRIBE_AGAIN_S = 0.5


class Finding:
    """Looks for those who serve a name, for as long as its caller wants to wait.

    Args:
        context: of the mesh.
        kind: ``env`` or ``agent``.
        asked: the name as the user wrote it.
        wait: seconds to wait for a worker.
        where: capabilities that the worker must have.
        request: the fields of the open that it is for.
    """

    def __init__(
        self,
        context: Context,
        kind: Kind,
        asked: str,
        *,
        wait: float,
        where: Mapping[str, Any] | None,
        request: dict[str, Any],
    ) -> None:
        self._context = context
        self._registry = context.registry
        self._kind: Kind = kind
        self._asked = asked
        self._wait = wait
        self._where = dict(where or {})
        self._request = request
        self._deadline = time.monotonic() + wait
        self._is_known = False  # it was served before, and is waited for as long as its user said

    async def served(self) -> list[Entry]:
        """Who serves the name and could take the session; waits until somebody does.

        Raises:
            UnknownName: nobody serves it, or nobody with those capabilities.
            UsageError: nobody who serves it offers such vectors (R6).
            MeshUnreachable: the server is away.
        """
        registry, began, asked_at = self._registry, time.monotonic(), -ASK_AGAIN_S
        while True:
            now = time.monotonic()
            name = registry.resolve(self._kind, self._asked)
            if name is not None:
                entries = self._able(registry.directory.candidates(self._kind, name, self._where))
                if entries:
                    return entries
            refusal = registry.refusal(self._kind, self._asked)
            if name is None and refusal is not None:
                raise refusal
            known = registry.directory.names(self._kind)
            heard_of = max(began, registry.making(self._asked))
            unheard_of = name is None and known and now - heard_of > UNKNOWN_S and not self._is_known
            if now >= self._deadline or unheard_of:
                raise self._unknown(name, known)
            if now - asked_at >= ASK_AGAIN_S:
                asked_at = now
                registry.ask_for(self._kind, self._asked if name is None else name)
            await self.changed(min(ASK_AGAIN_S, self._deadline - now))

    def _able(self, entries: list[Entry]) -> list[Entry]:
        """Those that offer vectors as asked for; of who is not described yet, nothing is known.

        Raises:
            UsageError: all are known, and none does.
        """
        form, mode = self._request.get("form", "single"), self._request.get("autoreset_mode", "NextStep")
        seeding = self._request.get("seeding", "gymnasium")
        if form == "single":
            return entries
        known = [(entry, entry.description) for entry in entries if entry.description is not None]
        lacks = {entry.worker: lacking(said.vectors, form, mode, seeding) for entry, said in known}
        if lacks and len(lacks) == len(entries) and all(lacks.values()):
            shown = "; ".join(f"worker {worker} does not offer {text}" for worker, text in lacks.items())
            helps = next(filter(None, (remedy(said.vectors, form, mode, seeding) for _, said in known)), "")
            raise UsageError(
                f"nobody offers {entries[0].name} as asked for, a {form} with autoreset_mode {mode} and seeding "
                f"{seeding}: {shown}; {f'pass {helps}, or ' if helps else ''}start a worker that offers it",
                name=entries[0].name,
                form=form,
                autoreset_mode=mode,
                seeding=seeding,
                lacks=lacks,
            )
        return [entry for entry, _ in known if not lacks[entry.worker]]

    async def described(self) -> Description:
        """What one of those who serve the name says of it.

        Raises:
            UnknownName: nobody serves it.
            RequestTimeout: nobody described it.
            MeshUnreachable: the server is away.
        """
        while True:
            entries = await self.served()
            for entry in entries:
                if entry.description is not None:
                    return entry.description
            name = entries[0].name
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise self._away() or RequestTimeout(
                    f"{name}: its worker did not describe it within {self._wait:g} s", name=name, timeout_s=self._wait
                )
            if not await self.changed(min(DESCRIBE_AGAIN_S, left)):
                self._registry.ask(Ask(kind=self._kind, name=name))

    def _away(self) -> MeshUnreachable | None:
        """The error of this moment if the server is away: then nobody can be heard, whoever is there."""
        connection = self._context.connection
        if connection.connected or connection.closed:
            return None
        return MeshUnreachable(
            f"the server at {connection.url} is away, and {self._asked!r} cannot be asked for; this client reconnects "
            "by itself: try again when it is back",
            url=connection.url,
            name=self._asked,
        )

    def _unknown(self, name: str | None, known: list[str]) -> MeshError:
        away = self._away()
        if away is not None:
            return away
        if name is not None:
            able = [
                f"{e.worker}: {dict(e.description.capabilities) if e.description else 'not yet described'}"
                for e in self._registry.directory.entries(self._kind)
                if e.name == name
            ]
            return UnknownName(
                f"no worker that serves {name} can take the session where={self._where} ({'; '.join(able)}); change "
                "where, or start a worker with those capabilities",
                name=name,
                where=self._where,
            )
        close = near(self._asked, known)
        if time.monotonic() - self._registry.making(self._asked) <= UNKNOWN_S:
            text = "a worker is making it, which takes longer than wait; ask again, or give more seconds as wait="
        elif not known:
            text = "no worker is on the mesh; start one (meshrl serve, meshrl up)"
        elif close:
            text = f"did you mean {', '.join(close)}?"
        else:
            text = f"served are: {', '.join(known[:20])}; list them with `meshrl ls`"
        return UnknownName(
            f"no {self._kind} {self._asked!r} is served at {self._context.connection.url}: {text}",
            name=self._asked,
            near=close,
        )

    async def changed(self, timeout: float) -> bool:
        """Wait until the directory changes, or for ``timeout`` seconds; whether it changed."""
        self._context.check_open()
        return await self._registry.change(timeout)
