"""A batch of actions is refused before anything is sent when one of them is wrong, by the index of its env (D4).

The rules for each are those of :mod:`meshrl.client.actions`. When all is well numpy says so of the whole batch at
once; only in doubt are the actions looked at one by one, which finds the first wrong one and words the error, or
finds that each is right after all (a list of Python bools for Discrete spaces, say).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from meshrl.client.actions import Check, checker
from meshrl.errors import InvalidAction
from meshrl.wire.batches import Batching, batching, form_of


class BatchedCheck(Protocol):
    """What :func:`batched_checker` gives."""

    def __call__(self, actions: Any, env_ids: Sequence[int] | NDArray[np.integer[Any]] | None = None) -> Any:
        """Check a batch.

        Args:
            actions: one action for each sub-environment, batched as Gymnasium's ``action_space`` has them.
            env_ids: global indices of the sub-environments they are for, in order; None for all.

        Returns:
            the value that travels: arrays as they are, neither copied nor cast; lists of numbers as arrays.

        Raises:
            InvalidAction: ``details["env_id"]`` is the index of the first sub-environment whose action is wrong,
                ``details["action"]`` a short text of it; a batch of the wrong length or structure has no index.
        """
        ...


def batched_checker(space: spaces.Space[Any], num_envs: int, name: str, *, strict: bool = False) -> BatchedCheck:
    """A function that checks batches of actions before they are sent.

    What Gymnasium's SyncVectorEnv takes is taken, as far as the rules for a single action go. A list of numbers is
    what ``np.asarray`` makes of it, so that bools among numbers count as numbers.

    Args:
        space: of one sub-environment's actions.
        num_envs: how many sub-environments there are.
        name: the env's, for messages.
        strict: check a Box's bounds too.
    """
    batch = _batch(space, name, "", strict)
    single = checker(space, name, strict=strict)

    def check(actions: Any, env_ids: Sequence[int] | NDArray[np.integer[Any]] | None = None) -> Any:
        n = num_envs if env_ids is None else len(env_ids)
        read = batch.read(actions, n)
        try:
            return batch.fitting(read, n)
        except _Doubt:
            rows = batch.rows(read, n)
        for k, action in enumerate(rows):
            if not _all_fit(single, (action,)):
                env_id = k if env_ids is None else int(env_ids[k])
                raise _refusal(space, name, action, env_id, strict=strict)
        return batch.settled(read, n)

    return check


def _refusal(space: spaces.Space[Any], name: str, action: Any, env_id: int, *, strict: bool) -> InvalidAction:
    who = f"{name}, sub-environment {env_id}"
    try:
        checker(space, who, strict=strict)(action)
    except InvalidAction as exc:
        return InvalidAction(exc.message, env_id=env_id, **exc.details)
    except Exception as exc:  # noqa: BLE001  # see _all_fit
        problem = f"cannot be checked: {type(exc).__name__}: {exc}"
        return InvalidAction(f"{who}: the action {problem}", env_id=env_id, action=repr(action)[:200])
    raise AssertionError("an action that was refused is taken")


def _all_fit(single: Check, actions: Iterable[Any]) -> bool:
    try:
        for action in actions:
            single(action)
    except Exception:  # noqa: BLE001  # spaces' own contains() raise what they like: TypeError for a stacked Sequence
        return False
    return True


class _Doubt(Exception):
    """The batch as a whole does not fit; its actions have to be looked at one by one."""


class _Batch(ABC):
    """Checks batches of one space, in two steps and, in doubt, two more."""

    def __init__(self, space: spaces.Space[Any], name: str, at: str) -> None:
        self._space = space
        self._name = name
        self._where = f"at {at} " if at else ""

    @abstractmethod
    def read(self, actions: Any, n: int) -> Any:
        """First: the batch in a form that can be read twice.

        Raises:
            InvalidAction: its structure or length is wrong, so that there are no ``n`` actions to look at.
        """

    @abstractmethod
    def fitting(self, read: Any, n: int) -> Any:
        """Second: the value that travels.

        Raises:
            _Doubt: something about it is not as usual, or wrong.
        """

    @abstractmethod
    def rows(self, read: Any, n: int) -> list[Any]:
        """In doubt: the single actions, as they were given."""

    def settled(self, read: Any, n: int) -> Any:
        """In doubt: the value that travels, when each of the single actions was found right."""
        return self.fitting(read, n)

    def _wrong(self, problem: str) -> InvalidAction:
        return InvalidAction(
            f"{self._name}: the actions {self._where}{problem} "
            f"(action space of each sub-environment: {str(self._space)[:200]})"
        )

    def _counted(self, got: int, n: int) -> None:
        if got != n:
            raise self._wrong(f"are {got}, not {n}, one for each sub-environment")


class _Arrays(_Batch):
    """Box, Discrete, MultiDiscrete, MultiBinary and their subclasses."""

    def __init__(self, space: Any, name: str, at: str, fits: Callable[[NDArray[Any]], bool]) -> None:
        super().__init__(space, name, at)
        self._shape: tuple[int, ...] = space.shape
        self._fits = fits

    def read(self, actions: Any, n: int) -> NDArray[Any] | list[Any] | tuple[Any, ...]:
        read: NDArray[Any] | list[Any] | tuple[Any, ...]
        if isinstance(actions, (list, tuple, np.ndarray)):
            read = actions
        elif isinstance(actions, Iterator):
            read = list(actions)
        else:
            read = np.asarray(actions)  # other libraries' arrays
        if isinstance(read, np.ndarray) and not read.ndim:
            raise self._wrong(f"are {type(actions).__name__}, not an array of {n}, one for each sub-environment")
        self._counted(len(read), n)
        return read

    def fitting(self, read: Any, n: int) -> NDArray[Any]:
        if type(read) is np.ndarray:
            values = read
        else:
            try:
                values = np.asarray(read)
            except (ValueError, TypeError, OverflowError):
                raise _Doubt from None
        if values.shape != (n, *self._shape) or not self._fits(values):
            raise _Doubt
        return values

    def rows(self, read: Any, n: int) -> list[Any]:  # noqa: ARG002  # counted already
        return list(read)

    def settled(self, read: Any, n: int) -> NDArray[Any]:
        try:
            return self.fitting(read, n)
        except _Doubt:
            pass
        # Each alone is right, all in one array are not: Python's bools for a Discrete, uint64 and int64 (together
        # float64), an array of objects. Python's numbers have one dtype that holds them, as a rule.
        values = np.array([np.asarray(row).tolist() for row in read])
        if values.dtype.kind == "b" and not isinstance(self._space, spaces.Box):
            values = values.astype(np.int64)
        if values.shape != (n, *self._shape) or not self._fits(values):
            raise self._wrong("have no dtype in common")
        return values


class _Items(_Batch):
    """Spaces whose batch is a tuple of the single actions."""

    def __init__(self, space: spaces.Space[Any], name: str, at: str, *, strict: bool) -> None:
        super().__init__(space, name, at)
        self._single = checker(space, name, strict=strict)

    def read(self, actions: Any, n: int) -> tuple[Any, ...]:
        if isinstance(actions, np.ndarray) and actions.ndim:
            actions = list(actions)
        if not isinstance(actions, (list, tuple, Iterator)):
            raise self._wrong(f"are {type(actions).__name__}, not a tuple of {n}, one for each sub-environment")
        read = tuple(actions)
        self._counted(len(read), n)
        return read

    def fitting(self, read: Any, n: int) -> tuple[Any, ...]:  # noqa: ARG002  # counted already
        if not _all_fit(self._single, read):
            raise _Doubt
        return tuple(read)

    def rows(self, read: Any, n: int) -> list[Any]:  # noqa: ARG002  # counted already
        return list(read)


class _Dicts(_Batch):
    def __init__(self, space: spaces.Dict, name: str, at: str, parts: dict[Any, _Batch]) -> None:
        super().__init__(space, name, at)
        self._parts = parts
        self._keys = set(parts)

    def read(self, actions: Any, n: int) -> dict[Any, Any]:
        if not isinstance(actions, Mapping):
            keys = sorted(map(str, self._keys))
            raise self._wrong(f"are {type(actions).__name__}, not a dict of batches with the keys {keys}")
        if set(actions) != self._keys:
            raise self._wrong(f"have the keys {sorted(map(str, actions))}, not {sorted(map(str, self._keys))}")
        return {key: part.read(actions[key], n) for key, part in self._parts.items()}

    def fitting(self, read: Any, n: int) -> dict[Any, Any]:
        return {key: part.fitting(read[key], n) for key, part in self._parts.items()}

    def rows(self, read: Any, n: int) -> list[Any]:
        columns = {key: part.rows(read[key], n) for key, part in self._parts.items()}
        return [{key: column[k] for key, column in columns.items()} for k in range(n)]

    def settled(self, read: Any, n: int) -> dict[Any, Any]:
        return {key: part.settled(read[key], n) for key, part in self._parts.items()}


class _Tuples(_Batch):
    def __init__(self, space: spaces.Tuple[Any], name: str, at: str, parts: list[_Batch]) -> None:
        super().__init__(space, name, at)
        self._parts = parts

    def read(self, actions: Any, n: int) -> tuple[Any, ...]:
        if not isinstance(actions, (tuple, list)) and not (isinstance(actions, np.ndarray) and actions.ndim):
            raise self._wrong(f"are {type(actions).__name__}, not a tuple of {len(self._parts)} batches")
        if len(actions) != len(self._parts):
            raise self._wrong(f"have {len(actions)} parts, not {len(self._parts)} batches")
        return tuple(part.read(batch, n) for part, batch in zip(self._parts, actions, strict=True))

    def fitting(self, read: Any, n: int) -> tuple[Any, ...]:
        return tuple(part.fitting(batch, n) for part, batch in zip(self._parts, read, strict=True))

    def rows(self, read: Any, n: int) -> list[Any]:
        columns = [part.rows(batch, n) for part, batch in zip(self._parts, read, strict=True)]
        return [tuple(column[k] for column in columns) for k in range(n)]

    def settled(self, read: Any, n: int) -> tuple[Any, ...]:
        return tuple(part.settled(batch, n) for part, batch in zip(self._parts, read, strict=True))


class _Registered(_Batch):
    """Spaces whose batch somebody's own functions make and take apart: see :mod:`meshrl.wire.batches`."""

    def __init__(self, space: spaces.Space[Any], name: str, at: str, *, strict: bool) -> None:
        super().__init__(space, name, at)
        self._batching: Batching = batching(space)
        self._single = checker(space, name, strict=strict)

    def read(self, actions: Any, n: int) -> Any:
        try:
            got = len(list(self._batching.rows(actions, n)))
        except Exception as exc:  # whatever the registered function makes of it
            raise self._wrong(f"cannot be taken apart: {type(exc).__name__}: {exc}") from exc
        self._counted(got, n)
        return actions

    def fitting(self, read: Any, n: int) -> Any:
        if not _all_fit(self._single, self._batching.rows(read, n)):
            raise _Doubt
        return read

    def rows(self, read: Any, n: int) -> list[Any]:
        return list(self._batching.rows(read, n))


def _batch(space: spaces.Space[Any], name: str, at: str, strict: bool) -> _Batch:
    form = form_of(space)
    if form == "array":
        return _Arrays(space, name, at, _fits(space, name, strict))
    if form == "dict":
        assert isinstance(space, spaces.Dict)
        parts = {key: _batch(part, name, f"{at}[{key!r}]", strict) for key, part in space.spaces.items()}
        return _Dicts(space, name, at, parts)
    if form == "tuple":
        assert isinstance(space, spaces.Tuple)
        return _Tuples(space, name, at, [_batch(p, name, f"{at}[{i}]", strict) for i, p in enumerate(space.spaces)])
    return (_Items if form == "items" else _Registered)(space, name, at, strict=strict)


def _fits(space: Any, name: str, strict: bool) -> Callable[[NDArray[Any]], bool]:
    """Whether an array of the right shape fits; the same rules as in :mod:`meshrl.client.actions`, at once."""
    if type(space) is spaces.Discrete:
        return _discrete(space)
    if type(space) is spaces.Box:
        return _box(space, strict)
    if type(space) in (spaces.MultiDiscrete, spaces.MultiBinary):
        return _multi(space)
    single = checker(space, name, strict=strict)
    return partial(_all_fit, single)  # a subclass has rules of its own


def _discrete(space: Any) -> Callable[[NDArray[Any]], bool]:
    start = int(space.start)
    stop = start + int(space.n)

    def fits(values: NDArray[Any]) -> bool:
        if values.dtype.kind not in "iu":
            return False
        return not values.size or (start <= int(values.min()) and int(values.max()) < stop)

    return fits


def _box(space: spaces.Box, strict: bool) -> Callable[[NDArray[Any]], bool]:
    kinds = {"f": "fiu", "i": "iu", "u": "iu"}.get(space.dtype.kind, space.dtype.kind)
    low, high = space.low, space.high

    def fits(values: NDArray[Any]) -> bool:
        if values.dtype.kind not in kinds:
            return False
        return not strict or bool(np.all((values >= low) & (values <= high)))

    return fits


def _multi(space: Any) -> Callable[[NDArray[Any]], bool]:
    if isinstance(space, spaces.MultiBinary):
        low, high = np.zeros(space.shape, np.int64), np.full(space.shape, 2, np.int64)
    else:
        low = np.asarray(space.start, np.int64)
        high = low + np.asarray(space.nvec, np.int64)

    def fits(values: NDArray[Any]) -> bool:
        return values.dtype.kind in "iub" and bool(np.all((values >= low) & (values < high)))

    return fits
