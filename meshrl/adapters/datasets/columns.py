"""Columns: the values of a space over an episode, as arrays and lists of texts that file formats have forms for.

    Box, Discrete, MultiDiscrete, MultiBinary    one array of shape (n, *space.shape), of the values' dtype
    Text                                         a list of n texts
    Dict, Tuple                                  {key: column}, (column, ...)

Others have no column; of the formats here only Parquet holds them, by forms of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from meshrl.errors import FormatCannotHold
from meshrl.wire.batches import form_of

ARRAYS = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
_INSTEAD = "; --format parquet (export_parquet) holds it"


def cannot_hold(format_: str, what: str, why: str) -> FormatCannotHold:
    """The error of a format that has no form for something.

    Args:
        format_: of the file, as people call it.
        what: which part, as in ``observations['a']``.
        why: a sentence about it.
    """
    return FormatCannotHold(f"{format_} cannot hold {what}: {why}{_INSTEAD}", format=format_, field=what)


def column_of(space: spaces.Space[Any], values: Any, what: str, format_: str) -> Any:
    """The values of an episode as a column.

    Args:
        space: of one value.
        values: a batch of the space, or a list of single values, as :class:`~meshrl.client.episode.Episode` has them.
        what: where they stand, for errors.
        format_: of the file, for errors.

    Raises:
        FormatCannotHold: the space has no column, or values are not of it.
    """
    if form_of(space) == "registered":
        raise cannot_hold(format_, what, f"there is no form for {type(space).__name__} spaces")
    single = type(values) is list
    if isinstance(space, spaces.Dict):
        return {
            key: column_of(part, _part(values, key, single, what, format_), f"{what}[{key!r}]", format_)
            for key, part in space.spaces.items()
        }
    if isinstance(space, spaces.Tuple):
        return tuple(
            column_of(part, _part(values, i, single, what, format_), f"{what}[{i}]", format_)
            for i, part in enumerate(space.spaces)
        )
    if isinstance(space, spaces.Text):
        if not all(type(text) is str for text in values):
            raise cannot_hold(format_, what, "some values are no texts, which its space has")
        return list(values)
    if not isinstance(space, ARRAYS):
        raise cannot_hold(format_, what, f"there is no form for {type(space).__name__} spaces")
    array = _stacked(values) if single else values
    if not isinstance(array, np.ndarray) or array.shape[1:] != space.shape:
        raise cannot_hold(format_, what, f"some values are no arrays of shape {space.shape}, which its space has")
    return array


def _part(values: Any, key: Any, single: bool, what: str, format_: str) -> Any:
    try:
        return [value[key] for value in values] if single else values[key]
    except (TypeError, KeyError, IndexError) as exc:
        raise cannot_hold(format_, what, f"some values have no part {key!r}, which its space has") from exc


def _stacked(values: list[Any]) -> NDArray[Any] | None:
    """Single values as one array, if they are arrays or numbers of one type; without values, None."""
    kinds = {type(value) for value in values}
    dtypes = {np.asarray(value).dtype for value in values} if kinds <= _NUMBERS or _are_numpys(kinds) else set()
    if not dtypes or len({np.shape(value) for value in values}) > 1:
        return None
    dtype = common_dtype(dtypes)
    return None if dtype is None else np.stack([np.asarray(value) for value in values]).astype(dtype, copy=False)


_NUMBERS = {bool, int, float}


def _are_numpys(kinds: set[type]) -> bool:
    return all(kind is np.ndarray or issubclass(kind, np.generic) for kind in kinds)


def common_dtype(dtypes: set[np.dtype[Any]]) -> np.dtype[Any] | None:
    """One that holds every value of these exactly; None where there is none."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    kinds = {dtype.kind for dtype in dtypes}
    if kinds != {"f"} and not kinds <= {"i", "u"}:
        return None
    found: np.dtype[Any] = np.result_type(*dtypes)
    return None if found.kind not in kinds else found


def leaves_of(column: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Its arrays and lists of texts, each with the keys under which it stands."""
    parts = column.items() if isinstance(column, dict) else enumerate(column) if isinstance(column, tuple) else None
    if parts is None:
        yield path, column
    else:
        for key, part in parts:
            yield from leaves_of(part, (*path, key))
