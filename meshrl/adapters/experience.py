"""``ExperienceReader``: a feed of experience for code that does not await.

::

    with ExperienceReader("CartPole-v1", name="my-dqn") as reader:
        while True:
            reader.fill(model.replay_buffer, timeout=0.0)      # what has come meanwhile
            model.train(gradient_steps=100, batch_size=64)

The feed is on the portal that the synchronous envs with the same mesh share. A batch that nobody waited long enough for
is fetched on meanwhile, and the next call has it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from datetime import datetime
from types import TracebackType
from typing import Any, Self

from meshrl.adapters.arguments import mesh_arguments
from meshrl.adapters.buffers import check_rows, put
from meshrl.adapters.call import Call
from meshrl.adapters.portal import leased
from meshrl.client.experience import ExperienceFeed
from meshrl.client.gathering import Experience
from meshrl.client.mesh import Mesh
from meshrl.errors import SessionClosed, UsageError


class ExperienceReader:
    """Reads the transitions of an env's recorded episodes; used by one thread at a time.

    What was given with a batch counts as taken once the next one is asked for, or :meth:`commit` is called; what
    :meth:`fill` has put into a buffer, at once.

    Args:
        env: as of :meth:`meshrl.Mesh.experience`, and so are all others but one.
        mesh: arguments of :class:`meshrl.Mesh`, or its url alone.
        name: makes the feed durable.
        from_: where it begins.
        batch_size: transitions a batch.
        multiple_of: of which batches have a multiple.
        follow: wait for more, for ever.
        labels: those of sessions with all of these.
        policy: those with actions of that policy.
        min_return: those whose rewards add up to as much.
        min_version: transitions of policies of at least this version.
        max_age_s: transitions that happened no longer ago.
        wait: seconds to wait for a worker and a slot, where an episode is run again.

    Raises:
        UsageError: as of :meth:`meshrl.Mesh.experience`.
        MeshUnreachable: no NATS server answers.
    """

    def __init__(
        self,
        env: str,
        *,
        mesh: Mapping[str, Any] | str | None = None,
        name: str | None = None,
        from_: datetime | str | None = None,
        batch_size: int = 1024,
        multiple_of: int = 1,
        follow: bool = True,
        labels: Mapping[str, str] | None = None,
        policy: str | None = None,
        min_return: float | None = None,
        min_version: int | None = None,
        max_age_s: float | None = None,
        wait: float = 30.0,
    ) -> None:
        async def opened(m: Mesh) -> _Fed:
            return _Fed(
                m.experience(
                    env,
                    name=name,
                    from_=from_,
                    batch_size=batch_size,
                    multiple_of=multiple_of,
                    follow=follow,
                    labels=labels,
                    policy=policy,
                    min_return=min_return,
                    min_version=min_version,
                    max_age_s=max_age_s,
                    wait=wait,
                )
            )

        self.closed = True  # until it is open
        self._asked: Call[tuple[Experience | None, str]] | None = None
        self._portal, self._fed = leased(mesh_arguments(mesh), "experience", opened)
        self._position: str = self._fed.feed.position
        self.closed = False

    def __repr__(self) -> str:
        return f"<ExperienceReader {'closed' if self.closed else self._fed.feed!r}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self, _warn: Any = warnings.warn) -> None:
        if getattr(self, "closed", True) or self._portal.over:
            return
        self.closed = True
        self._portal.drop(self._fed)
        if not self._portal.inherited:
            _warn("unclosed ExperienceReader: reader.close() gives its mesh back", ResourceWarning, source=self)

    # ---------------------------------------------------------------- facts

    @property
    def position(self) -> str:
        """Behind the last batch that it gave: ``from_`` of another one, which goes on there."""
        return self._position

    @property
    def skipped(self) -> int:
        """Episodes that could not be read."""
        return self._fed.feed.skipped

    @property
    def stale(self) -> int:
        """Transitions that were left out by their policy's version or their age."""
        return self._fed.feed.stale

    @property
    def min_version(self) -> int | None:
        """Transitions of older policies are left out; may be set, and holds for what is read from then on."""
        return self._fed.feed.min_version

    @min_version.setter
    def min_version(self, version: int | None) -> None:
        self._fed.feed.min_version = version

    # ---------------------------------------------------------------- reading

    def read(self, timeout: float | None = None) -> Experience | None:
        """The next batch; None where there is nothing more, of a feed that does not follow.

        Args:
            timeout: seconds to wait for it; None for as long as it takes.

        Raises:
            TimeoutError: nothing came in time; a later call gets it.
            SessionClosed: it was closed.
            MeshError: as the feed does.
        """
        self._check()
        if self._asked is None:
            self._asked = Call("read", self._fed.read)
            self._portal.send(self._asked)
        if not self._asked.wait(timeout):
            raise TimeoutError(f"no experience of {self._fed.feed!r} within {timeout:g} s")
        asked, self._asked = self._asked, None
        batch, self._position = self._portal.wait(asked)
        return batch

    def __iter__(self) -> Iterator[Experience]:
        """All batches, one after another."""
        while (batch := self.read()) is not None:
            yield batch

    def fill(self, buffer: Any, least: int = 1, timeout: float | None = None) -> int:
        """Put batches into a buffer until so many transitions more are there; gives how many those were.

        Args:
            buffer: as of :func:`meshrl.adapters.buffers.fill`.
            least: transitions; there are fewer where time is up, or a feed that does not follow has no more.
            timeout: seconds to wait for them; 0 takes what is there already.

        Raises:
            UsageError: as of :func:`meshrl.adapters.buffers.fill`.
            SessionClosed: it was closed.
            MeshError: as the feed does.
        """
        check_rows(buffer, self._fed.feed.multiple_of)
        until = None if timeout is None else time.monotonic() + timeout
        count = 0
        while count < least:
            try:
                batch = self.read(None if until is None else max(0.0, until - time.monotonic()))
            except TimeoutError:
                break
            if batch is None:
                break
            try:
                count += put(buffer, batch)
            except BaseException:
                self._fed.feed.rewind()
                raise
            self.commit()
        return count

    def commit(self) -> None:
        """What was given so far is taken: whoever asks for it by its name again goes on behind it.

        Raises:
            UsageError: another one has committed under its name since.
            SessionClosed: it was closed.
            MeshError: it cannot be stored.
        """
        self._check()
        if self._asked is None:  # who asked for more has taken what was before
            self._portal.run(Call("commit", self._fed.feed.commit))

    def close(self) -> None:
        """Give its part of the mesh back. Safe to call twice."""
        if self.closed:
            return
        self.closed = True
        if self._portal.inherited or self._portal.over:
            return
        if self._asked is not None:
            self._portal.abandon(self._asked)
        self._portal.release()

    def _check(self) -> None:
        if self.closed:
            raise SessionClosed(f"{self!r}: it was closed by this client; make a new one")
        if self._portal.inherited:
            raise UsageError(f"{self!r} is the parent process's; a forked one makes its own, with a name of its own")


class _Fed:
    """A feed on the portal's loop."""

    def __init__(self, feed: ExperienceFeed) -> None:
        self.feed = feed

    async def read(self) -> tuple[Experience | None, str]:
        """The next batch, and the position behind it."""
        batch = await anext(self.feed, None)
        return batch, self.feed.position

    async def close(self) -> None:
        """Nothing is open between two batches."""
