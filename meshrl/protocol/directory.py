"""The directory: a client's view of the workers, from what they advertise.

The rules:

- Who has not been heard for 3.5 of its own intervals has left. Only silence that the client could have heard
  counts: after a time in which the client itself slept, everyone gets the whole period again.
- A worker that said goodbye, or that the client found dead, is gone at once. Its advertisements that were
  under way are not listened to for one interval; a later one brings it back, because detection may be wrong.
- What a worker can do is its description, known by a hash; until it is known, no ``where`` matches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from meshrl.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from meshrl.wire.messages import Advertisement, Description

# Three advertisements may be lost or late; the half keeps the fourth from arriving at the very deadline.
EXPIRY_INTERVALS = 3.5

# How often an owner that is awake calls expire() at the least. A gap of twice that says the client slept: a
# trainer that blocks its loop for four seconds would otherwise find every worker gone when it wakes.
SWEEP_S = 1.0

Key = tuple[str, str, str]  # (kind, name, worker)


@dataclass(frozen=True)
class Entry:
    """One served name of one worker, as last heard.

    Attributes:
        advertisement: the newest one.
        heard_at: when it arrived, in the client's monotonic seconds.
        description: what its hash stands for, None until that is known.
    """

    advertisement: Advertisement
    heard_at: float
    description: Description | None = None

    @property
    def key(self) -> Key:
        """(kind, name, worker)."""
        return (self.advertisement.kind, self.advertisement.name, self.advertisement.worker)

    @property
    def name(self) -> str:
        """The served name."""
        return self.advertisement.name

    @property
    def worker(self) -> str:
        """The worker's id."""
        return self.advertisement.worker


@dataclass(frozen=True)
class Event:
    """A change of the directory.

    Attributes:
        kind: ``joined``, ``updated`` (it says something else than before) or ``left``.
        key: (kind, name, worker).
        advertisement: the newest; of one that left, the last.
    """

    kind: Literal["joined", "updated", "left"]
    key: Key
    advertisement: Advertisement


class Directory:
    """A client's view of the workers; see the module for its rules.

    Args:
        sweep_s: seconds; the longest time between two calls of :meth:`expire` while the client is awake.
    """

    def __init__(self, *, sweep_s: float = SWEEP_S) -> None:
        self._sweep_s = sweep_s
        self._entries: dict[Key, Entry] = {}
        self._deadlines: dict[Key, float] = {}
        self._ignored_until: dict[Key, float] = {}
        # By (kind, name, hash), or with the worker before the hash where that worker hashes in its own way.
        self._descriptions: dict[tuple[str, ...], Description] = {}
        self._swept_at: float | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        workers = {worker for _, _, worker in self._entries}
        return f"<Directory {len(self._entries)} entries of {len(workers)} workers>"

    def heard(self, ad: Advertisement, now: float) -> list[Event]:
        """Take in an advertisement.

        Args:
            ad: as it arrived.
            now: monotonic seconds.

        Returns:
            at most one event; none for a repetition that says nothing new.
        """
        key: Key = (ad.kind, ad.name, ad.worker)
        before = self._entries.get(key)
        if ad.left:
            # Also of a worker not known: its goodbye may overtake its advertisements, which use another
            # connection.
            self._ignored_until[key] = now + ad.interval_s
            return [self._left(key)] if before else []
        if now < self._ignored_until.get(key, now):
            return []
        if not self._entries:
            # With nothing to expire nobody had to call expire(), so that gap says nothing; this moment does.
            self._swept_at = now
        self._entries[key] = Entry(ad, now, self._description_of(ad))
        self._deadlines[key] = now + EXPIRY_INTERVALS * ad.interval_s
        if before is None:
            return [Event("joined", key, ad)]
        return [] if before.advertisement == ad else [Event("updated", key, ad)]

    def expire(self, now: float) -> list[Event]:
        """Take out who has been silent too long; to be called at :meth:`next_expiry` or more often.

        Called more than twice ``sweep_s`` after the last time, it takes the client to have slept: it takes
        nobody out and gives each entry the whole period again, from ``now``.

        Args:
            now: monotonic seconds.

        Returns:
            an event ``left`` for each that was taken out.
        """
        slept = self._swept_at is not None and now - self._swept_at > 2 * self._sweep_s
        self._swept_at = now
        if slept:
            for key, entry in self._entries.items():
                self._deadlines[key] = now + EXPIRY_INTERVALS * entry.advertisement.interval_s
        self._ignored_until = {key: until for key, until in self._ignored_until.items() if until > now}
        events = [self._left(key) for key, deadline in sorted(self._deadlines.items()) if deadline <= now]
        self._prune_descriptions()
        return events

    def next_expiry(self) -> float | None:
        """When :meth:`expire` is to be called next, in monotonic seconds; None while there is nobody.

        It is never more than ``sweep_s`` after the last call, since regular calls are how a sleep is told
        from silence.
        """
        if not self._deadlines:
            return None
        earliest = min(self._deadlines.values())
        return earliest if self._swept_at is None else min(earliest, self._swept_at + self._sweep_s)

    def lost(self, worker: str, now: float) -> list[Event]:
        """The client itself found the worker dead: take out all its names.

        Args:
            worker: its id; one that is not known changes nothing.
            now: monotonic seconds.

        Returns:
            an event ``left`` for each of its names.
        """
        gone = sorted(key for key in self._entries if key[2] == worker)
        for key in gone:
            self._ignored_until[key] = now + self._entries[key].advertisement.interval_s
        return [self._left(key) for key in gone]

    def described(self, description: Description, digest: str | None = None) -> None:
        """Attach a description to the entries that advertise its hash.

        Args:
            description: as a worker sent it.
            digest: the hash that this worker advertises for it, where it may be computed otherwise than by
                ``description.digest()`` (a worker in another language); it is then taken for this worker
                alone, because nobody checked that the hash is the description's.
        """
        kind, name = description.kind, description.name
        if digest is None or digest == description.digest():
            self._descriptions[kind, name, description.digest()] = description
        else:
            self._descriptions[kind, name, description.worker, digest] = description
        for key, entry in self._entries.items():
            if key[:2] == (kind, name):
                self._entries[key] = replace(entry, description=self._description_of(entry.advertisement))

    def missing(self) -> set[tuple[str, str, str]]:
        """(worker, name, hash) of each entry whose description is not known."""
        return {
            (entry.worker, entry.name, entry.advertisement.description)
            for entry in self._entries.values()
            if entry.description is None
        }

    def entries(self, kind: str | None = None) -> list[Entry]:
        """All entries, or those of a kind, by (kind, name, worker)."""
        return [entry for key, entry in sorted(self._entries.items()) if kind in (None, key[0])]

    def names(self, kind: str) -> list[str]:
        """The names that are served, draining workers' included; sorted."""
        return sorted({key[1] for key in self._entries if key[0] == kind})

    def candidates(self, kind: str, name: str, where: Mapping[str, object] | None = None) -> list[Entry]:
        """The entries at which a session of ``name`` may be opened, full ones included, by worker.

        Args:
            kind: ``env`` or ``agent``.
            name: a served name, exactly.
            where: what the worker must be capable of: each key is there, and its value is equal or, where the
                capability is a list, in that list.

        Raises:
            UsageError: a value of ``where`` is callable.
        """
        wanted = dict(where or {})
        for capability, value in wanted.items():
            if callable(value):
                raise UsageError(
                    f"where[{capability!r}] is callable; it is compared as a value, so nothing could match"
                )
        return [
            entry
            for entry in self.entries(kind)
            if entry.name == name and not entry.advertisement.draining and _capable(entry, wanted)
        ]

    def _left(self, key: Key) -> Event:
        del self._deadlines[key]
        return Event("left", key, self._entries.pop(key).advertisement)

    def _description_of(self, ad: Advertisement) -> Description | None:
        own = self._descriptions.get((ad.kind, ad.name, ad.worker, ad.description))
        return own or self._descriptions.get((ad.kind, ad.name, ad.description))

    def _prune_descriptions(self) -> None:
        """Forget those that no entry advertises any more; workers come and go while a client lives."""
        used: set[tuple[str, ...]] = set()
        for entry in self._entries.values():
            ad = entry.advertisement
            used |= {(ad.kind, ad.name, ad.description), (ad.kind, ad.name, ad.worker, ad.description)}
        self._descriptions = {key: known for key, known in self._descriptions.items() if key in used}


def _capable(entry: Entry, wanted: Mapping[str, object]) -> bool:
    if not wanted:
        return True
    if entry.description is None:
        return False
    has = entry.description.capabilities
    return all(capability in has and _fits(has[capability], value) for capability, value in wanted.items())


def _fits(capability: object, value: object) -> bool:
    if isinstance(capability, (list, tuple)):
        # Lists become tuples, or the other way round, on the wire.
        return value in capability or (isinstance(value, (list, tuple)) and list(value) == list(capability))
    return bool(capability == value)
