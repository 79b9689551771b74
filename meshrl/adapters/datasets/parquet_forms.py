"""Forms: how values of each space stand in the columns of a Parquet file.

    Box, MultiDiscrete, MultiBinary    a list of fixed size, in C order; one number where the shape is ()
    Discrete                           one number
    Text                               a string
    Dict, Tuple                        a struct of parts, those of a Tuple under 0, 1, ...
    Sequence                           a list
    Graph                              a struct of lists: nodes, edges, edge_links
    OneOf                              a struct: choice, and under 0, 1, ... the value of the one that was chosen
    anything else                      packed: a string, base64 of the codec's msgpack

Lists that may be null, or are empty, are of no fixed size: Parquet's writer has no form for those. The shape and dtype
of arrays are in the metadata of their field.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from gymnasium import spaces
from numpy.typing import NDArray

from meshrl.adapters.datasets.columns import ARRAYS
from meshrl.adapters.datasets.infos import InfoColumn
from meshrl.errors import UnencodableValue
from meshrl.wire.batches import batching, form_of

Rows = Sequence[Any] | NDArray[Any] | Mapping[Any, Any]


class Misfit(Exception):
    """Values that are not of the form's space, or not of its dtype."""


class Form(ABC):
    """How values of one space stand in a column.

    Attributes:
        type: of the column.
        metadata: of its field.
    """

    type: pa.DataType
    metadata: Mapping[str, str] | None = None

    @abstractmethod
    def encode(self, values: Any, n: int) -> pa.Array:
        """A batch of ``n``, or a list of single values, as a column.

        Raises:
            Misfit: they have no such form.
        """

    @abstractmethod
    def decode(self, array: pa.Array) -> Any:
        """The batch that a column holds."""

    def field(self, name: str) -> pa.Field:
        """The column, in a schema or a struct."""
        return pa.field(name, self.type, metadata=self.metadata)


class _Arrays(Form):
    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], *, fixed: bool) -> None:
        self._shape = shape
        self._dtype = dtype
        self._size = int(np.prod(shape, dtype=np.int64))
        value = pa.from_numpy_dtype(dtype.newbyteorder("="))
        self._fixed = fixed and self._size > 0
        if not shape:
            self.type = value
        else:
            self.type = pa.list_(value, self._size) if self._fixed else pa.list_(value)
        self.metadata = {"shape": json.dumps(list(shape)), "dtype": dtype.str}

    def encode(self, values: Any, n: int) -> pa.Array:
        array = values if isinstance(values, np.ndarray) else self._stacked(values)
        if array.dtype != self._dtype or array.shape != (n, *self._shape):
            raise Misfit
        flat = pa.array(np.ascontiguousarray(array).reshape(-1).astype(self._dtype.newbyteorder("="), copy=False))
        if not self._shape:
            return flat
        if self._fixed:
            return pa.FixedSizeListArray.from_arrays(flat, type=self.type)
        return pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int32) * self._size), flat, type=self.type)

    def _stacked(self, values: Sequence[Any]) -> NDArray[Any]:
        rows = [np.asarray(value) for value in values]
        if any(row.shape != self._shape for row in rows):
            raise Misfit
        if not self._shape and all(type(value) is int for value in values):  # Python's, of a Discrete
            made = np.array(values, self._dtype)
            return made if made.tolist() == list(values) else np.array(values)
        if any(row.dtype != self._dtype for row in rows):
            raise Misfit
        return np.stack(rows) if rows else np.empty((0, *self._shape), self._dtype)

    def decode(self, array: pa.Array) -> NDArray[Any]:
        n = len(array)
        flat = array.flatten() if self._shape else array
        values = np.array(flat.to_numpy(zero_copy_only=False), self._dtype)
        return values.reshape(n, *self._shape)


class _Texts(Form):
    type = pa.string()

    def encode(self, values: Any, n: int) -> pa.Array:  # noqa: ARG002  # they know how many they are
        if not all(type(value) is str for value in values):
            raise Misfit
        try:
            return pa.array(values, pa.string())
        except (UnicodeError, pa.ArrowException) as exc:  # half of a surrogate pair
            raise Misfit from exc

    def decode(self, array: pa.Array) -> tuple[str, ...]:
        return tuple(array.to_pylist())


class Packed(Form):
    """Whatever the codec has a form for; what is decoded is a list of single values."""

    type = pa.string()

    def __init__(self) -> None:
        self._column = InfoColumn("packed")

    def encode(self, values: Any, n: int) -> pa.Array:  # noqa: ARG002  # as above
        """Single values as a column.

        Raises:
            UnencodableValue: the codec has no form for one.
        """
        return pa.array(self._column.column(list(values)), self.type)

    def decode(self, array: pa.Array) -> list[Any]:
        """The single values."""
        return self._column.values(array.to_pylist(), len(array))


class _Parts(Form):
    """A Dict or a Tuple."""

    def __init__(self, parts: Mapping[Any, Form], *, is_dict: bool) -> None:
        self._parts = parts
        self._is_dict = is_dict
        self._fields = [form.field(str(key)) for key, form in parts.items()]
        self.type = pa.struct(self._fields) if parts else pa.null()

    def encode(self, values: Any, n: int) -> pa.Array:
        if not self._parts:
            return pa.nulls(n)
        columns = [form.encode(self._part(values, key), n) for key, form in self._parts.items()]
        return pa.StructArray.from_arrays(columns, fields=self._fields)

    def _part(self, values: Any, key: Any) -> Any:
        if type(values) is not list:
            return values[key]
        expected = dict if self._is_dict else tuple
        if not all(type(value) is expected and len(value) == len(self._parts) for value in values):
            raise Misfit
        try:
            return [value[key] for value in values]
        except KeyError as exc:
            raise Misfit from exc

    def decode(self, array: pa.Array) -> Any:
        columns = [form.decode(child(array, i)) for i, form in enumerate(self._parts.values())]
        return dict(zip(self._parts, columns, strict=True)) if self._is_dict else tuple(columns)


class _Sequences(Form):
    def __init__(self, space: spaces.Sequence, feature: Form) -> None:
        self._batches = batching(space.feature_space)
        self._stack = space.stack
        self._feature = feature
        self.type = pa.list_(feature.field("element"))

    def encode(self, values: Any, n: int) -> pa.Array:  # noqa: ARG002  # as above
        rows: list[Any] = []
        lengths = []
        for value in values:
            if self._stack:
                own = list(self._batches.rows(value, _length(self._batches.leaves(value, 0))))
            elif type(value) is tuple:
                own = list(value)
            else:
                raise Misfit
            rows += own
            lengths.append(len(own))
        return listed(self._feature.encode(rows, len(rows)), lengths, self.type)

    def decode(self, array: pa.Array) -> tuple[Any, ...]:
        flat = array.flatten()
        batch, lengths = self._feature.decode(flat), _lengths(array)
        stops = np.cumsum(lengths).tolist()
        if self._stack:
            return tuple(self._batches.cut(batch, stop - size, stop) for stop, size in zip(stops, lengths, strict=True))
        rows = list(self._batches.rows(batch, len(flat)))
        return tuple(tuple(rows[stop - size : stop]) for stop, size in zip(stops, lengths, strict=True))


class _Graphs(Form):
    def __init__(self, node: Form, edge: Form | None) -> None:
        links = _Arrays((2,), np.dtype(np.int32), fixed=True)
        self._parts = [node, edge or links, links]
        self._lists = [pa.list_(form.field("element")) for form in self._parts]
        self._fields = [
            pa.field(name, type_) for name, type_ in zip(("nodes", "edges", "edge_links"), self._lists, strict=True)
        ]
        self.type = pa.struct(self._fields)

    def encode(self, values: Any, n: int) -> pa.Array:  # noqa: ARG002  # as above
        if not all(type(value) is spaces.GraphInstance and value.nodes is not None for value in values):
            raise Misfit
        columns = []
        for at, (form, type_) in enumerate(zip(self._parts, self._lists, strict=True)):
            parts = [value[at] for value in values]
            given = [part for part in parts if part is not None]
            if not all(isinstance(part, np.ndarray) for part in given):
                raise Misfit
            rows = [row for part in given for row in part]
            lengths = [0 if part is None else len(part) for part in parts]
            columns.append(listed(form.encode(rows, len(rows)), lengths, type_, [part is None for part in parts]))
        return pa.StructArray.from_arrays(columns, fields=self._fields)

    def decode(self, array: pa.Array) -> tuple[Any, ...]:
        columns = []
        for i, form in enumerate(self._parts):
            part = child(array, i)
            flat, lengths = form.decode(part.flatten()), _lengths(part)
            stops = np.cumsum(lengths).tolist()
            there = part.is_valid().to_pylist()
            columns.append(
                [
                    flat[stop - size : stop].copy() if valid else None
                    for stop, size, valid in zip(stops, lengths, there, strict=True)
                ]
            )
        return tuple(spaces.GraphInstance(*parts) for parts in zip(*columns, strict=True))


class _Choices(Form):
    """A OneOf."""

    def __init__(self, space: spaces.OneOf[Any], parts: Sequence[Form]) -> None:
        self._batches = [batching(part) for part in space.spaces]
        self._parts = parts
        self._fields = [
            pa.field("choice", pa.int64()),
            *(form.field(str(i)) for i, form in enumerate(parts)),
        ]
        self.type = pa.struct(self._fields)

    def encode(self, values: Any, n: int) -> pa.Array:
        if not all(type(value) is tuple and len(value) == 2 for value in values):
            raise Misfit
        chosen = [int(value[0]) for value in values]
        columns = [pa.array(chosen, pa.int64())]
        for i, form in enumerate(self._parts):
            own = [value[1] for value, choice in zip(values, chosen, strict=True) if choice == i]
            where = np.cumsum([choice == i for choice in chosen]) - 1
            rows = [int(at) if choice == i else None for at, choice in zip(where, chosen, strict=True)]
            columns.append(form.encode(own, len(own)).take(pa.array(rows, pa.int64())) if n else form.encode([], 0))
        return pa.StructArray.from_arrays(columns, fields=self._fields)

    def decode(self, array: pa.Array) -> tuple[Any, ...]:
        chosen = child(array, 0).to_pylist()
        rows = []
        for i, (form, batches) in enumerate(zip(self._parts, self._batches, strict=True)):
            own = child(array, i + 1).filter(pa.array([choice == i for choice in chosen], pa.bool_()))
            values = form.decode(own)
            rows.append(iter(values if type(values) is list else list(batches.rows(values, len(own)))))
        return tuple((np.int64(choice), next(rows[choice])) for choice in chosen)


def form_for(space: spaces.Space[Any], dtypes: Sequence[np.dtype[Any]] | None = None, *, fixed: bool = True) -> Form:
    """How values of a space stand in a column.

    Args:
        space: of one value.
        dtypes: of its arrays, in order, where they are others than the space's.
        fixed: whether the column is never null.
    """
    left = None if dtypes is None else list(dtypes)

    def make(space: spaces.Space[Any], *, fixed: bool) -> Form:
        if isinstance(space, ARRAYS) and form_of(space) == "array":
            dtype = np.dtype(space.dtype) if left is None else left.pop(0)
            return _Arrays(tuple(space.shape or ()), dtype, fixed=fixed)
        if type(space) is spaces.Text:
            return _Texts()
        if type(space) is spaces.Dict and len({str(key) for key in space.spaces}) == len(space.spaces):
            return _Parts({key: make(part, fixed=fixed) for key, part in space.spaces.items()}, is_dict=True)
        if type(space) is spaces.Tuple and form_of(space) == "tuple":
            return _Parts({i: make(part, fixed=fixed) for i, part in enumerate(space.spaces)}, is_dict=False)
        if type(space) is spaces.Sequence:
            return _Sequences(space, form_for(space.feature_space))
        if type(space) is spaces.Graph:
            edge = None if space.edge_space is None else form_for(space.edge_space)
            return _Graphs(form_for(space.node_space), edge)
        if type(space) is spaces.OneOf:
            return _Choices(space, [form_for(part, fixed=False) for part in space.spaces])
        return Packed()

    return make(space, fixed=fixed)


# --------------------------------------------------------------------------- arrays of Arrow


def child(array: pa.Array, at: int) -> pa.Array:
    """Of a struct, with the struct's own nulls and its part of what it is a slice of."""
    return array.flatten()[at]


def _lengths(array: pa.Array) -> list[int]:
    return [size or 0 for size in pc.list_value_length(array).to_pylist()]


def listed(flat: pa.Array, lengths: Sequence[int], type_: pa.DataType, missing: Sequence[bool] | None = None) -> Any:
    """A column of lists, of all their values and their lengths."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    mask = pa.array(missing, pa.bool_()) if missing is not None and any(missing) else None
    return pa.ListArray.from_arrays(pa.array(offsets), flat, type=type_, mask=mask)


def _length(leaves: Any) -> int:
    return len(next(iter(leaves), ()))


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal: arrays in dtype, shape and bits, numbers whichever of Python's and NumPy's.

    A NumPy scalar is an array of shape ().
    """
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        both = isinstance(one, np.ndarray | np.generic) and isinstance(other, np.ndarray | np.generic)
        return both and one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        alike = isinstance(one, list) == isinstance(other, list) and len(one) == len(other)
        return alike and all(map(same, one, other))
    if isinstance(one, float | np.floating) and isinstance(other, float | np.floating):
        return np.float64(one).tobytes() == np.float64(other).tobytes()
    if isinstance(one, int | np.integer) and isinstance(other, int | np.integer):
        return int(one) == int(other)
    return type(one) is type(other) and bool(one == other)


def fits(form: Form, values: Any, n: int) -> bool:
    """Whether values come out of a form as they went in."""
    try:
        return same(form.decode(form.encode(values, n)), tuple(values) if type(values) is list else values)
    except (Misfit, UnencodableValue, pa.ArrowException, KeyError, IndexError, TypeError, ValueError, OverflowError):
        return False
