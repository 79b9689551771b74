"""Subjects: where each message of the mesh is published (design, section 4).

Everything lies under ``meshrl.v1.<namespace>.``. Clients publish under their own user token, so that permissions
rest on the subject and never on a body. A token is text in which everything but letters, digits and ``_-/:@+=`` is
written as ``%XX`` of its UTF-8 bytes, because NATS gives ``.``, ``*``, ``>`` and blanks a meaning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from urllib.parse import quote, unquote

from meshrl.errors import InvalidName

ROOT = "meshrl"
VERSION = 1

# The queue group of env workers that read and keep for others.
READERS = "recordings"
# Long enough for "namespace/package.module:Environment-v12"; keeps a subject far below the server's 4 KB control line.
MAX_NAME_CHARS = 128

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")


@lru_cache(maxsize=1024)
def token(text: str) -> str:
    """``text`` as one token of a subject.

    Raises:
        InvalidName: when it is empty, longer than 128 characters, or has half of a surrogate pair.
    """
    if not text or len(text) > MAX_NAME_CHARS:
        raise InvalidName(f"a name has 1 to {MAX_NAME_CHARS} characters, not {len(text)}: {text[:40]!r}")
    try:
        quoted = quote(text, safe="/:@+=")
    except UnicodeEncodeError:
        raise InvalidName(f"a name that has no UTF-8: {text[:40]!r}") from None
    return quoted.replace(".", "%2E").replace("~", "%7E")


def untoken(part: str) -> str:
    """The text that :func:`token` wrote."""
    return unquote(part)


def is_id(text: object) -> bool:
    """Whether ``text`` can stand as a session or worker id: 1 to 64 letters, digits, ``_`` and ``-``."""
    return isinstance(text, str) and _ID.match(text) is not None


@dataclass(frozen=True)
class Subjects:
    """The subjects of one namespace.

    Attributes:
        namespace: one mesh of several on the same NATS account.
    """

    namespace: str = "default"

    @cached_property
    def prefix(self) -> str:
        """What all of them begin with, its last dot included."""
        return f"{ROOT}.v{VERSION}.{token(self.namespace)}."

    # registry

    def advertisement(self, kind: str, name: str, worker: str) -> str:
        """Where a worker says, again and again, that it serves ``name``."""
        return f"{self.prefix}registry.{kind}.{token(name)}.{worker}"

    @property
    def advertisements(self) -> str:
        """Every advertisement of every worker."""
        return f"{self.prefix}registry.*.*.*"

    @property
    def ask(self) -> str:
        """Asks every worker for its descriptions, and those that serve on demand for a name."""
        return f"{self.prefix}registry.ask"

    def audit(self, worker: str) -> str:
        """Where a worker says who opened what, and how it ended."""
        return f"{self.prefix}audit.{worker}"

    # workers

    def worker(self, worker: str, op: str, user: str) -> str:
        """``open``, ``probe``, ``renew``, ``act`` or ``drain`` at one worker."""
        return f"{self.prefix}worker.{worker}.{op}.{user}"

    def at_worker(self, worker: str, op: str) -> str:
        """What a worker subscribes to for ``op``, from every user."""
        return f"{self.prefix}worker.{worker}.{op}.*"

    def any_open(self, name: str, user: str) -> str:
        """An open at whichever worker NATS picks, for clients that keep no directory."""
        return f"{self.prefix}env.{token(name)}.open.{user}"

    def any_act(self, name: str, user: str) -> str:
        """A stateless ``act`` at whichever worker NATS picks."""
        return f"{self.prefix}agent.{token(name)}.act.{user}"

    # sessions

    def session(self, worker: str, user: str, session: str, op: str) -> str:
        """One request of a session."""
        return f"{self.prefix}session.{worker}.{user}.{session}.{op}"

    def session_prefix(self, worker: str) -> str:
        """What every session subject of a worker begins with; ``<user>.<session>.<op>`` follows."""
        return f"{self.prefix}session.{worker}."

    def sessions(self, worker: str) -> str:
        """Every request of every session of a worker: one subscription, so that wire order is arrival order."""
        return f"{self.prefix}session.{worker}.*.*.*"

    # recordings

    def recording(self, name: str, session: str) -> str:
        """Where a session of an env is recorded; ``*`` for all of that env."""
        return f"{self.prefix}rec.{token(name)}.{session}"

    def tapped(self, name: str, session: str, what: str) -> str:
        """Where a session of an env is shown while somebody watches: its ``about``, and its ``rows`` as they come.

        ``*`` for all sessions, or for both.
        """
        return f"{self.prefix}tap.{'*' if name == '*' else token(name)}.{session}.{what}"

    def tapping(self, user: str) -> str:
        """Where a user says that somebody watches; ``*`` for what workers hear."""
        return f"{self.prefix}tapping.{user}"

    def recordings(self, what: str, user: str) -> str:
        """Where a user asks env workers to ``read`` or ``keep`` something for it; ``*`` for what they hear."""
        return f"{self.prefix}recordings.{what}.{user}"

    def position(self, user: str, name: str, consumer: str) -> str:
        """Where a user's consumer of the experience of an env says how far it has come."""
        return f"{self.prefix}position.{user}.{token(name)}.{token(consumer)}"

    def episodes(self, name: str, session: str) -> str:
        """Where it is said which episodes a recording has; ``*`` for all of that env."""
        return f"{self.prefix}episodes.{'*' if name == '*' else token(name)}.{session}"
