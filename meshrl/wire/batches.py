"""Batches of values of one space: many sub-environments' observations, or actions, as one.

Rule: a batch is bit for bit what ``gymnasium.vector.utils`` makes of the same values, and a batch from a peer is
checked whole before any of it is used. What a batch looks like depends on the space's form:

    array       Box, Discrete, MultiDiscrete, MultiBinary    one array of shape (n, *space.shape) and space.dtype
    dict        Dict                                         {key: batch}
    tuple       Tuple                                        (batch, ...), one a part
    items       Graph, Text, Sequence, OneOf, any other      a tuple of n values
    registered  a class (or a Tuple with one inside) for which somebody registered functions of their own with
                Gymnasium's: whatever those give, by calling them

Arrays of actions have the dtype that the client's trainer gave them (float64 for a float32 Box, say): Gymnasium
passes those on too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from operator import itemgetter
from typing import Any, Literal

import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate
from numpy.typing import NDArray

from meshrl.errors import MalformedMessage
from meshrl.wire.large import large_rows

# mypy calls decorated functions by their first overload; what matters here is how they dispatch
_batch_space: Any = batch_space
_concatenate: Any = concatenate
_create_empty_array: Any = create_empty_array
_iterate: Any = iterate

_ARRAYS = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
# Scalars of which np.array makes the very dtype that np.asarray makes of one alone. Not int: of ints beyond 64 bit
# signed it does not.
_SCALARS = frozenset({float, bool, *(np.dtype(code).type for code in "?bhilqBHILQefd")})

Form = Literal["array", "dict", "tuple", "items", "registered"]


def form_of(space: spaces.Space[Any]) -> Form:
    """How a batch of ``space`` looks; see the top of this module."""
    cls = type(space)
    if not all(_is_gymnasiums(function, cls) for function in (_batch_space, _concatenate, _create_empty_array)):
        return "registered"
    if isinstance(space, _ARRAYS):
        batched = spaces.MultiDiscrete if isinstance(space, spaces.Discrete) else spaces.Box
        return "array" if _is_gymnasiums(_iterate, batched) else "registered"
    if isinstance(space, spaces.Dict):
        return "dict" if _is_gymnasiums(_iterate, spaces.Dict) else "registered"
    if isinstance(space, spaces.Tuple):
        # Gymnasium takes such a Tuple apart in one of two ways, by the exact types of what its parts become
        plain = _is_gymnasiums(_iterate, spaces.Tuple) and all(form_of(part) != "registered" for part in space.spaces)
        return "tuple" if plain else "registered"
    return "registered" if cls in _iterate.registry else "items"


def _is_gymnasiums(function: Any, cls: type) -> bool:
    return bool(function.dispatch(cls).__module__ == function.__module__)


class Batching(ABC):
    """What can be done with batches of one space; made once by :func:`batching`, safe to share between threads.

    Attributes:
        space: of the single values.
        at: where it stands in the outermost space, as in ``['a'][0]``; empty at the top.
    """

    def __init__(self, space: spaces.Space[Any], at: str) -> None:
        self.space = space
        self.at = at

    @abstractmethod
    def stack(self, items: list[Any]) -> Any:
        """Single values as a batch: what ``concatenate(space, items, create_empty_array(space, len(items)))`` gives.

        Args:
            items: one or more; each array is copied once. Values of the form ``items`` are not copied.

        Returns:
            the batch; its arrays are new, writable, own their memory and have the space's dtype.

        Raises:
            ValueError, TypeError, KeyError, IndexError: as Gymnasium's functions do, for a value of another shape or
                structure, or of a dtype that numpy casts to the space's only unsafely.
        """

    def rows_or_stack(self, items: list[Any]) -> Any:
        """As :meth:`stack`, for who packs it and does nothing else: large arrays as they are, one after another."""
        return self.stack(items)

    @abstractmethod
    def check(self, batched: object, n: int, field: str, *, exact: bool) -> None:
        """Raise unless ``batched`` is a batch of ``n``.

        Args:
            batched: what arrived.
            n: how many values it should hold.
            field: of the message, for the error.
            exact: whether arrays must have the space's dtype.

        Raises:
            MalformedMessage: it is not.
        """

    @abstractmethod
    def joined(self, parts: Sequence[Any], sizes: Sequence[int]) -> Any:
        """Batches that were checked as one, in order; a single one's arrays are passed on without a copy."""

    @abstractmethod
    def cut(self, batched: Any, start: int, stop: int) -> Any:
        """The values from ``start`` to before ``stop`` of a batch; its arrays are views."""

    @abstractmethod
    def pick(self, batched: Any, indices: NDArray[np.integer[Any]]) -> Any:
        """The values at ``indices`` (one axis, one or more of them), in that order; its arrays are copies."""

    @abstractmethod
    def rows(self, batched: Any, n: int) -> Iterator[Any]:
        """The single values of a batch, as ``iterate(batch_space(space, n), batched)`` gives them.

        Arrays are views of the batch's rows; values of a space without axes are numpy scalars. A Dict or Tuple without
        parts, at which Gymnasium fails or ends at once, gives n empty ones.

        Args:
            batched: a batch; one from a peer goes through :meth:`check` first.
            n: how many values it holds.
        """

    @abstractmethod
    def leaves(self, batched: Any, n: int) -> Iterator[Any]:
        """What a batch is made of, in the space's order: arrays (or Rows) with n rows, or sequences of n values."""

    def join(self, parts: Sequence[Any], sizes: Sequence[int], field: str = "observations") -> Any:
        """The batches of several shards as one, in order, after a check of each.

        Args:
            parts: one batch a shard, as they arrived; one or more.
            sizes: how many values each must hold.
            field: of the message they came in, for errors.

        Returns:
            the batch: new arrays, or those of the only part. Dicts are in the space's order.

        Raises:
            MalformedMessage: a part is not a batch of that size; ``details["field"]`` says where, as in
                ``observations['a'][0]``.
            ValueError: there are not as many sizes as parts.
        """
        for part, size in zip(parts, sizes, strict=True):
            self.check(part, size, field, exact=True)
        return self.joined(parts, sizes)

    def _malformed(self, field: str, problem: str) -> MalformedMessage:
        where = f"{field}{self.at}"
        return MalformedMessage(f"{where} {problem}", field=where)


class _Arrays(Batching):
    def __init__(self, space: Any, at: str) -> None:
        super().__init__(space, at)
        self._shape: tuple[int, ...] = space.shape
        self._dtype: np.dtype[Any] = np.dtype(space.dtype)

    def stack(self, items: list[Any]) -> NDArray[Any]:
        # np.stack asks every array for its shape and makes a view of it: three times the time of all this.
        try:
            out = self._from_arrays(items) if self._shape else self._from_scalars(items)
        except (TypeError, ValueError):
            out = None  # Gymnasium's function raises its own, or knows better
        return _gymnasiums_stack(self.space, items) if out is None else out

    def rows_or_stack(self, items: list[Any]) -> Any:
        rows = large_rows(items, self._shape, self._dtype)
        return self.stack(items) if rows is None else rows

    def _from_arrays(self, items: list[Any]) -> NDArray[Any] | None:
        n, shape = len(items), self._shape
        if not n or list(map(type, items)).count(np.ndarray) != n or list(map(len, items)).count(shape[0]) != n:
            return None
        out = np.empty((n, *shape), self._dtype)
        # The lengths of the first axes were checked just now; numpy checks the number of axes and all others
        # against out, and each item's dtype as np.stack does.
        np.concatenate(items, out=out.reshape(n * shape[0], *shape[1:]))
        return out

    def _from_scalars(self, items: list[Any]) -> NDArray[Any] | None:
        types = set(map(type, items))
        if len(types) != 1:
            return None
        (scalar,) = types
        if scalar not in _SCALARS and scalar is not int:
            return None
        made = np.array(items)
        if scalar is int and made.dtype.kind != "i":
            return None
        if made.dtype is self._dtype:
            return made
        out = np.empty(made.shape, self._dtype)
        np.copyto(out, made, casting="same_kind")
        return out

    def check(self, batched: object, n: int, field: str, *, exact: bool) -> None:
        if type(batched) is not np.ndarray:
            raise self._malformed(field, f"is {type(batched).__name__}, not an array")
        if batched.shape != (n, *self._shape):
            raise self._malformed(field, f"has shape {batched.shape}, not {(n, *self._shape)}")
        if exact and batched.dtype != self._dtype:
            raise self._malformed(field, f"has dtype {batched.dtype}, not {self._dtype}")

    def joined(self, parts: Sequence[Any], sizes: Sequence[int]) -> Any:
        if len(parts) == 1:
            return parts[0]
        # out, because numpy would change the byte order of big-endian arrays
        return np.concatenate(parts, out=np.empty((sum(sizes), *self._shape), self._dtype))

    def cut(self, batched: Any, start: int, stop: int) -> Any:
        return batched[start:stop]

    def pick(self, batched: Any, indices: NDArray[np.integer[Any]]) -> Any:
        return batched[indices]

    def rows(self, batched: Any, n: int) -> Iterator[Any]:  # noqa: ARG002  # an array knows its length
        return iter(batched)

    def leaves(self, batched: Any, n: int) -> Iterator[Any]:  # noqa: ARG002  # as above
        yield batched


class _Items(Batching):
    def stack(self, items: list[Any]) -> tuple[Any, ...]:
        return tuple(items)

    def check(self, batched: object, n: int, field: str, *, exact: bool) -> None:  # noqa: ARG002  # no arrays here
        if type(batched) is not tuple:
            raise self._malformed(field, f"is {type(batched).__name__}, not a tuple of {n}")
        if len(batched) != n:
            raise self._malformed(field, f"has {len(batched)} values, not {n}")

    def joined(self, parts: Sequence[Any], sizes: Sequence[int]) -> Any:  # noqa: ARG002  # were checked
        return parts[0] if len(parts) == 1 else tuple(value for part in parts for value in part)

    def cut(self, batched: Any, start: int, stop: int) -> Any:
        return batched[start:stop]

    def pick(self, batched: Any, indices: NDArray[np.integer[Any]]) -> Any:
        return tuple(batched[i] for i in indices.tolist())

    def rows(self, batched: Any, n: int) -> Iterator[Any]:  # noqa: ARG002  # a tuple knows its length
        return iter(batched)

    def leaves(self, batched: Any, n: int) -> Iterator[Any]:  # noqa: ARG002  # as above
        yield batched


class _Parts(Batching):
    """A Dict or a Tuple: each part is batched by itself."""

    def __init__(self, space: spaces.Space[Any], at: str, parts: list[tuple[Any, spaces.Space[Any]]]) -> None:
        super().__init__(space, at)
        self._parts = [(key, itemgetter(key), batching(part, f"{at}[{key!r}]")) for key, part in parts]
        self._keys = [key for key, _ in parts]
        self._set = set(self._keys)

    @abstractmethod
    def _whole(self, values: Iterator[Any]) -> Any:
        """One value of its parts' values, in the space's order."""

    def stack(self, items: list[Any]) -> Any:
        return self._whole(part.stack(list(map(of, items))) for _, of, part in self._parts)

    def joined(self, parts: Sequence[Any], sizes: Sequence[int]) -> Any:
        return self._whole(part.joined(list(map(of, parts)), sizes) for _, of, part in self._parts)

    def cut(self, batched: Any, start: int, stop: int) -> Any:
        return self._whole(part.cut(of(batched), start, stop) for _, of, part in self._parts)

    def pick(self, batched: Any, indices: NDArray[np.integer[Any]]) -> Any:
        return self._whole(part.pick(of(batched), indices) for _, of, part in self._parts)

    def leaves(self, batched: Any, n: int) -> Iterator[Any]:
        for _, of, part in self._parts:
            yield from part.leaves(of(batched), n)

    def _check_parts(self, batched: Any, n: int, field: str, *, exact: bool) -> None:
        for _, of, part in self._parts:
            part.check(of(batched), n, field, exact=exact)


class _Dicts(_Parts):
    def __init__(self, space: spaces.Dict, at: str) -> None:
        super().__init__(space, at, list(space.spaces.items()))
        # A Dict made of pairs keeps their order, but its batch_space is made of a dict, whose keys Gymnasium sorts
        # (from 1.3 on unless told not to). Rows follow the batch.
        sort: dict[str, Any] = {"sort_keys": space.sort_keys} if hasattr(space, "sort_keys") else {}
        self._row_keys = list(spaces.Dict(dict(space.spaces), **sort).spaces)
        parts = {key: part for key, _, part in self._parts}
        self._row_parts = [(key, parts[key]) for key in self._row_keys]

    def check(self, batched: object, n: int, field: str, *, exact: bool) -> None:
        if type(batched) is not dict:
            raise self._malformed(field, f"is {type(batched).__name__}, not a dict")
        if batched.keys() != self._set:
            # its own are not told: a peer's may be endless, or ints too long to be printed
            raise self._malformed(field, f"has {len(batched)} keys that are not {sorted(map(str, self._keys))}")
        self._check_parts(batched, n, field, exact=exact)

    def _whole(self, values: Iterator[Any]) -> dict[Any, Any]:
        return dict(zip(self._keys, values, strict=True))

    def rows(self, batched: Any, n: int) -> Iterator[Any]:
        keys = self._row_keys
        if not keys:  # zip of nothing ends at once
            return ({} for _ in range(n))
        columns = [part.rows(batched[key], n) for key, part in self._row_parts]
        return (dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True))


class _Tuples(_Parts):
    def __init__(self, space: spaces.Tuple[Any], at: str) -> None:
        super().__init__(space, at, list(enumerate(space.spaces)))

    def check(self, batched: object, n: int, field: str, *, exact: bool) -> None:
        if type(batched) is not tuple:
            raise self._malformed(field, f"is {type(batched).__name__}, not a tuple")
        if len(batched) != len(self._parts):
            raise self._malformed(field, f"has {len(batched)} parts, not {len(self._parts)}")
        self._check_parts(batched, n, field, exact=exact)

    def _whole(self, values: Iterator[Any]) -> tuple[Any, ...]:
        return tuple(values)

    def rows(self, batched: Any, n: int) -> Iterator[Any]:
        if not self._parts:  # zip of nothing ends at once
            return (() for _ in range(n))
        return zip(*[part.rows(of(batched), n) for _, of, part in self._parts], strict=True)


class _Registered(Batching):
    """By Gymnasium's functions alone, through single values: nothing is known of what a batch looks like."""

    def stack(self, items: list[Any]) -> Any:
        return _gymnasiums_stack(self.space, items)

    def check(self, batched: object, n: int, field: str, *, exact: bool) -> None:  # noqa: ARG002  # no dtype is known
        try:
            got = sum(1 for _ in islice(self.rows(batched, n), n + 1))
        except Exception as exc:  # whatever the registered function makes of what a peer sent
            raise self._malformed(
                field, f"is no batch of {self.space}: {type(exc).__name__}: {str(exc)[:200]}"
            ) from exc
        if got != n:
            raise self._malformed(field, f"has {got if got < n else f'more than {n}'} values, not {n}")

    def joined(self, parts: Sequence[Any], sizes: Sequence[int]) -> Any:
        if len(parts) == 1:
            return parts[0]
        batches = zip(parts, sizes, strict=True)
        return self.stack([value for part, size in batches for value in self.rows(part, size)])

    def cut(self, batched: Any, start: int, stop: int) -> Any:
        return self.stack(list(islice(self.rows(batched, stop), start, stop)))

    def pick(self, batched: Any, indices: NDArray[np.integer[Any]]) -> Any:
        n = int(indices.max()) + 1
        values = list(islice(self.rows(batched, n), n))
        return self.stack([values[i] for i in indices.tolist()])

    def rows(self, batched: Any, n: int) -> Iterator[Any]:
        rows: Iterator[Any] = _iterate(_batch_space(self.space, n), batched)
        return rows

    def leaves(self, batched: Any, n: int) -> Iterator[Any]:
        yield list(islice(self.rows(batched, n), n))


def batching(space: spaces.Space[Any], at: str = "") -> Batching:
    """What can be done with batches of ``space``, prepared: the functions below make it again at each call."""
    form = form_of(space)
    if form == "array":
        return _Arrays(space, at)
    if form == "dict":
        assert isinstance(space, spaces.Dict)
        return _Dicts(space, at)
    if form == "tuple":
        assert isinstance(space, spaces.Tuple)
        return _Tuples(space, at)
    return _Items(space, at) if form == "items" else _Registered(space, at)


def _gymnasiums_stack(space: spaces.Space[Any], items: list[Any]) -> Any:
    return _concatenate(space, items, _create_empty_array(space, len(items)))
