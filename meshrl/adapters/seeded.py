"""``Seeded``: what both of Gymnasium's faces know of their remotes' generators, and of the seeds sent to them."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from meshrl.adapters.generator import client_generator, draw_seed
from meshrl.adapters.held import HeldEnv, HeldVector
from meshrl.errors import UsageError


class Seeded:
    """A face of a remote, whose generators live on workers.

    To stand before ``gymnasium.Env`` or ``gymnasium.vector.VectorEnv``: what they keep a local env's generator in, and
    others look at, has the client's.
    """

    _name: str
    _held: HeldEnv | HeldVector
    _np_random: np.random.Generator | None = None
    _np_random_seed: int | None = None
    _num_seeds: int = 1  # how many envs a reset seeds, each with one more than the one before
    _was_reset: bool = False
    _sent_seed: Any = None  # of a reset that may not have arrived

    @property
    def np_random_seed(self) -> int:
        """The seed of the last seeded reset: sub-environment i was started from this plus i. Of a list, the first.

        Before the first reset it is drawn here, and a first reset without a seed uses it: as in a local env. What each
        sub-environment says of itself is ``get_attr("np_random_seed")``.
        """
        if self._np_random_seed is None:
            self._start_from(draw_seed(self._num_seeds))
            assert self._np_random_seed is not None
        return self._np_random_seed

    @property
    def np_random(self) -> np.random.Generator:
        """A generator at the client, for wrappers here; each seeded reset starts it anew.

        It depends on :attr:`np_random_seed` alone, and shares no number with the envs' own generators, which live on
        the workers and cannot be read or set from here.
        """
        if self._np_random is None:
            self._start_from(self.np_random_seed)
            assert self._np_random is not None
        return self._np_random

    @np_random.setter
    def np_random(self, _value: np.random.Generator) -> None:
        raise UsageError(f"{self._name}: its generators live on the workers; seed them by reset(seed=...)")

    def settle(self) -> Any:
        """The result of the call that was interrupted: for a step, its tuple.

        Raises:
            NothingUnsettled: none was, or it was before anything was sent.
        """
        op, value = self._held.settle()
        if op == "reset":
            self._reset_ran()
        return value

    def _start_from(self, seed: int) -> None:
        self._np_random_seed = seed
        self._np_random = client_generator(seed)

    def _seed_of(self, seed: Any) -> Any:
        """The seed to send with a reset."""
        if seed is None:
            seed = self._sent_seed  # of an interrupted reset: it may not have arrived, and is sent again
        if seed is None and not self._was_reset:
            seed = self.np_random_seed
        return seed

    def _reset_ran(self) -> None:
        """A reset's seed is the envs' now."""
        self._was_reset = True
        sent, self._sent_seed = self._sent_seed, None
        if sent is None:
            return
        try:
            self._start_from(operator.index(sent))
        except TypeError:  # one for each
            first = next((one for one in sent if one is not None), None)
            if first is not None:
                self._start_from(operator.index(first))

    def _begin_anew(self) -> None:
        """The remote is another one."""
        self._was_reset = False
        self._sent_seed = None
        self._np_random = self._np_random_seed = None
