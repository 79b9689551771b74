"""The directory: a client's view of the workers, from what they advertise.

The rules:

- Who has not been heard for 3.5 of its own intervals has left. Only silence that the client could have heard
  counts: after a time in which the client itself slept, or was cut off, everyone gets the whole period again.
- A worker that said goodbye, or that the client found dead, is gone at once. Its advertisements that were
  under way are not listened to for one interval; a later one brings it back, because detection may be wrong.
- What a worker can do is its description, known by a hash; until it is known, no ``where`` matches.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from meshrl.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

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
        # An advertisement comes a second and worker: what it needs is found without looking at the others.
        self._served: dict[tuple[str, str], dict[str, Entry]] = {}  # (kind, name) -> worker -> entry
        self._keys_of: defaultdict[str, set[Key]] = defaultdict(set)  # of a worker; never an empty set
        self._deadlines: dict[Key, float] = {}
        self._ignored_until: dict[Key, float] = {}
        # By (kind, name, hash), or with the worker before the hash where that worker hashes in its own way.
        self._descriptions: dict[tuple[str, ...], Description] = {}
        self._unused_descriptions = False
        self._swept_at: float | None = None

    def __len__(self) -> int:
        return len(self._deadlines)

    def __repr__(self) -> str:
        return f"<Directory {len(self)} entries of {len(self._keys_of)} workers>"

    def get(self, key: Key) -> Entry | None:
        """The entry of a (kind, name, worker), or None."""
        kind, name, worker = key
        return self._served.get((kind, name), {}).get(worker)

    def has(self, worker: str) -> bool:
        """Whether that worker serves anything."""
        return worker in self._keys_of

    def heard(self, ad: Advertisement, now: float) -> list[Event]:
        """Take in an advertisement.

        Args:
            ad: as it arrived.
            now: monotonic seconds.

        Returns:
            at most one event; none for a repetition that says nothing new.
        """
        key: Key = (ad.kind, ad.name, ad.worker)
        before = self.get(key)
        if ad.left:
            # Also of a worker not known: its goodbye may overtake its advertisements, which use another
            # connection.
            self._ignored_until[key] = now + ad.interval_s
            return [self._left(key)] if before else []
        if now < self._ignored_until.get(key, now):
            return []
        if not len(self):
            # With nothing to expire nobody had to call expire(), so that gap says nothing; this moment does.
            self._swept_at = now
        self._put(key, Entry(ad, now, self._description_of(ad)))
        self._keys_of[ad.worker].add(key)
        self._deadlines[key] = now + EXPIRY_INTERVALS * ad.interval_s
        if before is None:
            return [Event("joined", key, ad)]
        if before.advertisement.description != ad.description:
            self._unused_descriptions = True
        return [] if before.advertisement == ad else [Event("updated", key, ad)]

    def expire(self, now: float, *, connected: bool = True) -> list[Event]:
        """Take out who has been silent too long; to be called at :meth:`next_expiry` or more often.

        Called more than twice ``sweep_s`` after the last time, it takes the client to have slept: it takes
        nobody out and gives each entry the whole period again, from ``now``.

        Args:
            now: monotonic seconds.
            connected: whether anybody could be heard since the last time; if not, it is as after a sleep.

        Returns:
            an event ``left`` for each that was taken out.
        """
        slept = self._swept_at is not None and now - self._swept_at > 2 * self._sweep_s
        self._swept_at = now
        if slept or not connected:
            for entry in self._all():
                self._deadlines[entry.key] = now + EXPIRY_INTERVALS * entry.advertisement.interval_s
        self._ignored_until = {key: until for key, until in self._ignored_until.items() if until > now}
        events = [self._left(key) for key in sorted(key for key, at in self._deadlines.items() if at <= now)]
        if self._unused_descriptions:
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
        events = [self._left(key) for key in sorted(self._keys_of.get(worker, ()))]
        for event in events:
            self._ignored_until[event.key] = now + event.advertisement.interval_s
        return events

    def described(self, description: Description, digest: str | None = None) -> None:
        """Attach a description to the entries that advertise its hash.

        Args:
            description: as a worker sent it.
            digest: the hash that this worker advertises for it, where it may be computed otherwise than by
                ``description.digest()`` (a worker in another language); it is then taken for this worker
                alone, because nobody checked that the hash is the description's.
        """
        own = description.digest()
        key: tuple[str, ...] = (description.kind, description.name, own)
        if digest not in (None, own):
            key = (description.kind, description.name, description.worker, str(digest))
        new = key not in self._descriptions
        self._descriptions[key] = description
        if not new:
            return  # attached to whom it concerns, or so as soon as they advertise it
        self._unused_descriptions = True  # it may be of nobody who is there
        for entry in list(self._served.get((description.kind, description.name), {}).values()):
            known = self._description_of(entry.advertisement)
            if known is not entry.description:
                self._put(entry.key, replace(entry, description=known))

    def missing(self) -> set[tuple[str, str, str]]:
        """(worker, name, hash) of each entry whose description is not known."""
        return {
            (entry.worker, entry.name, entry.advertisement.description)
            for entry in self._all()
            if entry.description is None
        }

    def entries(self, kind: str | None = None) -> list[Entry]:
        """All entries, or those of a kind, by (kind, name, worker)."""
        return sorted((entry for entry in self._all() if kind in (None, entry.advertisement.kind)), key=_key)

    def names(self, kind: str) -> list[str]:
        """The names that are served, draining workers' included; sorted."""
        return sorted(name for of, name in self._served if of == kind)

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
        fit = (
            entry
            for entry in self._served.get((kind, name), {}).values()
            if not entry.advertisement.draining and _capable(entry, wanted)
        )
        return sorted(fit, key=_key)

    def _all(self) -> Iterator[Entry]:
        return itertools.chain.from_iterable(entries.values() for entries in self._served.values())

    def _put(self, key: Key, entry: Entry) -> None:
        self._served.setdefault(key[:2], {})[key[2]] = entry

    def _left(self, key: Key) -> Event:
        kind, name, worker = key
        entries = self._served[kind, name]
        entry = entries.pop(worker)
        if not entries:
            del self._served[kind, name]
        keys = self._keys_of[worker]
        keys.discard(key)
        if not keys:
            del self._keys_of[worker]
        del self._deadlines[key]
        self._unused_descriptions = True
        return Event("left", key, entry.advertisement)

    def _description_of(self, ad: Advertisement) -> Description | None:
        own = self._descriptions.get((ad.kind, ad.name, ad.worker, ad.description))
        return own or self._descriptions.get((ad.kind, ad.name, ad.description))

    def _prune_descriptions(self) -> None:
        """Forget those that no entry advertises any more; workers come and go while a client lives."""
        used: set[tuple[str, ...]] = set()
        for entry in self._all():
            ad = entry.advertisement
            used |= {(ad.kind, ad.name, ad.description), (ad.kind, ad.name, ad.worker, ad.description)}
        self._descriptions = {key: known for key, known in self._descriptions.items() if key in used}
        self._unused_descriptions = False


def _key(entry: Entry) -> Key:
    return entry.key


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
