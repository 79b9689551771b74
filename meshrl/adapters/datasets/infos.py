"""Infos as columns: one set of keys over a whole dataset, whatever each step's info had.

What a key holds is found out from all of its values first, and is one of these *kinds*::

    bool, int, float      Python's, in a column of bool, int64, float64
    scalar                NumPy's, of one dtype
    number                of several of those types, as the dtype that holds each of them exactly
    array                 arrays of one dtype and shape, in a column of shape (n, *shape)
    list, tuple           of as many bools, ints or floats each, likewise
    text                  str
    json                  anything else that JSON gives back as it was, as a text
    packed                what else the codec has a form for, as base64 of its msgpack
    dict                  maps with text keys: each key is a column of its own

Where a key is missing at a step, its column has a filler (0, or an empty text) and there is a mask: a column of bool
under ``_`` and its key, as in the infos of Gymnasium's vectors.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshrl.adapters.datasets.columns import common_dtype
from meshrl.errors import FormatCannotHold, MalformedMessage
from meshrl.wire.codec import pack, unpack

Info = Mapping[str, Any]
_PLAIN = {bool: "bool", int: "int", float: "float"}
_DTYPES = {"bool": np.dtype(np.bool_), "int": np.dtype(np.int64), "float": np.dtype(np.float64)}
# Beyond it, float64 does not hold every whole number.
_EXACT = 1 << 53


@dataclass(frozen=True, slots=True)
class InfoColumn:
    """What a key of infos holds over a dataset.

    Attributes:
        kind: see the top of this module.
        dtype: of its column, where that is an array.
        shape: of one value in it.
        mask: whether it is missing at some step.
        parts: of a dict, its keys.
    """

    kind: str
    dtype: np.dtype[Any] | None = None
    shape: tuple[int, ...] = ()
    mask: bool = False
    parts: Mapping[str, InfoColumn] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As a map that JSON has a form for."""
        told: dict[str, Any] = {"kind": self.kind}
        if self.dtype is not None:
            told |= {"dtype": self.dtype.str, "shape": list(self.shape)}
        if self.mask:
            told["mask"] = True
        if self.kind == "dict":
            told["parts"] = {key: part.to_json() for key, part in self.parts.items()}
        return told

    @classmethod
    def from_json(cls, told: Any) -> InfoColumn:
        """What such a map says.

        Raises:
            MalformedMessage: it is none.
        """
        try:
            parts = {str(key): cls.from_json(part) for key, part in told.get("parts", {}).items()}
            dtype = np.dtype(str(told["dtype"])) if "dtype" in told else None
            shape = tuple(int(size) for size in told.get("shape", ()))
            return cls(str(told["kind"]), dtype, shape, bool(told.get("mask", False)), parts)
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise MalformedMessage("what is said of a dataset's infos cannot be read") from exc

    # ---------------------------------------------------------------- one way

    def column(self, values: Sequence[Any]) -> Any:
        """Its values, :data:`MISSING` where there is none, as an array, a list of texts, or for a dict as columns."""
        if self.kind == "dict":
            return columns_of(self.parts, [{} if value is MISSING else value for value in values])
        if self.kind in _TEXTS:
            make = _TEXTS[self.kind][0]
            return ["" if value is MISSING else make(value) for value in values]
        assert self.dtype is not None, "all others are arrays"
        column = np.zeros((len(values), *self.shape), self.dtype)
        for row, value in enumerate(values):
            if value is not MISSING:
                column[row] = value
        return column

    # ---------------------------------------------------------------- and back

    def values(self, column: Any, n: int) -> list[Any]:
        """The values of such a column."""
        if self.kind == "dict":
            return infos_of(self.parts, column, n)
        if self.kind in _TEXTS:
            read = _TEXTS[self.kind][1]
            texts = [text.decode() if isinstance(text, bytes) else str(text) for text in column]
            return [read(text) if text or self.kind == "text" else None for text in texts]
        array = np.asarray(column, self.dtype).reshape(n, *self.shape)
        if self.kind == "array":
            return [row.copy() if isinstance(row, np.ndarray) else np.asarray(row) for row in array]
        if self.kind in ("list", "tuple"):
            make = list if self.kind == "list" else tuple
            return [make(row) for row in array.tolist()]
        return list(array) if self.kind in ("scalar", "number") else list(array.tolist())


MISSING = object()


def columns_of(parts: Mapping[str, InfoColumn], infos: Sequence[Info]) -> dict[str, Any]:
    """Infos as columns, with the masks.

    Args:
        parts: of all infos of the dataset.
        infos: of one episode, one a row.
    """
    columns: dict[str, Any] = {}
    for key, part in parts.items():
        columns[key] = part.column([info.get(key, MISSING) for info in infos])
        if part.mask:
            columns[f"_{key}"] = np.array([key in info for info in infos], np.bool_)
    return columns


def infos_of(parts: Mapping[str, InfoColumn], columns: Mapping[str, Any], n: int) -> list[dict[str, Any]]:
    """The ``n`` infos of such columns.

    Raises:
        MalformedMessage: there is not what there should be.
    """
    infos: list[dict[str, Any]] = [{} for _ in range(n)]
    for key, part in parts.items():
        try:
            present = np.asarray(columns[f"_{key}"]) if part.mask else np.ones(n, np.bool_)
            values = part.values(columns.get(key, {}) if part.kind == "dict" else columns[key], n)
        except (KeyError, TypeError, ValueError) as exc:
            raise MalformedMessage(f"the infos of a dataset have no {key!r} as is said of them") from exc
        for info, there, value in zip(infos, present.tolist(), values, strict=True):
            if there:
                info[key] = value
    return infos


# --------------------------------------------------------------------------- what there is


@dataclass(slots=True)
class InfoKeys:
    """What the infos of a dataset hold, as they are looked at one after another.

    Attributes:
        count: of infos so far.
    """

    count: int = 0
    _seen: dict[str, _Seen] = field(default_factory=dict)

    def look(self, infos: Sequence[Info], where: str = "infos") -> None:
        """At some more.

        Raises:
            FormatCannotHold: a key is no text.
        """
        self.count += len(infos)
        for info in infos:
            for key, value in info.items():
                if type(key) is not str:
                    raise FormatCannotHold(f"{where} have the key {key!r}; in a dataset keys are texts", field=where)
                if key not in self._seen:
                    self._seen[key] = _Seen()
                self._seen[key].look(value, f"{where}[{key!r}]")

    def parts(self, where: str = "infos") -> dict[str, InfoColumn]:
        """What each key holds.

        Raises:
            FormatCannotHold: a mask would be under the key of something else.
        """
        parts = {key: seen.column(self.count, f"{where}[{key!r}]") for key, seen in self._seen.items()}
        for key, part in parts.items():
            if part.mask and f"_{key}" in parts:
                raise FormatCannotHold(
                    f"{where} have {key!r}, missing at some steps, and {'_' + key!r}, where its mask would be; "
                    "leave infos out",
                    field=where,
                )
        return parts


@dataclass(slots=True)
class _Seen:
    """What one key has held so far."""

    count: int = 0
    kinds: set[tuple[Any, ...]] = field(default_factory=set)
    is_json: bool = True
    dicts: InfoKeys = field(default_factory=InfoKeys)

    def look(self, value: Any, where: str) -> None:
        self.count += 1
        kind = _kind_of(value)
        self.kinds.add(kind)
        if kind == ("dict",):
            self.dicts.look([value], where)
        self.is_json = self.is_json and _is_json(value)

    def column(self, count: int, where: str) -> InfoColumn:
        mask = self.count < count
        if len(self.kinds) == 1:
            name, *rest = next(iter(self.kinds))
            if name == "dict":
                return InfoColumn("dict", mask=mask, parts=self.dicts.parts(where))
            if name == "text":
                return InfoColumn("text", mask=mask)
            if name != "other":
                return InfoColumn(name, rest[0], rest[1] if len(rest) > 1 else (), mask)
        dtype = self._number()
        if dtype is not None:
            return InfoColumn("number", dtype, (), mask)
        return InfoColumn("json" if self.is_json else "packed", mask=mask)

    def _number(self) -> np.dtype[Any] | None:
        if not all(name in ("int", "float", "scalar") and rest[0].kind in "iuf" for name, *rest in self.kinds):
            return None
        dtypes = {rest[0] for _, *rest in self.kinds}
        if all(
            name != "scalar" for name, *_ in self.kinds
        ):  # Python's ints and floats; those that are large are "other"
            return np.dtype(np.float64)
        return common_dtype(dtypes)


def _kind_of(value: Any) -> tuple[Any, ...]:
    """Of one value, with what there is to say of it."""
    cls = type(value)
    if cls in _PLAIN:
        return ("other",) if cls is int and abs(value) > _EXACT else (_PLAIN[cls], _DTYPES[_PLAIN[cls]])
    if cls is str:
        return ("text",) if _is_plain(value) else ("other",)
    if isinstance(value, np.generic) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
        return "scalar", value.dtype
    if cls is np.ndarray and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8 and value.size:
        return ("array", value.dtype, value.shape) if value.dtype.isnative else ("other",)
    if cls in (list, tuple) and value:
        kinds = {_kind_of(one) for one in value}
        if len(kinds) == 1 and next(iter(kinds))[0] in _DTYPES:
            return cls.__name__, next(iter(kinds))[1], (len(value),)
    return ("dict",) if cls is dict and all(type(key) is str for key in value) else ("other",)


def _is_plain(text: str) -> bool:
    """Whether every file format has a form for it."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _is_json(value: Any) -> bool:
    if type(value) is dict:
        return all(type(key) is str and _is_plain(key) for key in value) and all(map(_is_json, value.values()))
    if type(value) is list:
        return all(map(_is_json, value))
    return value is None or type(value) in (bool, int, float) or (type(value) is str and _is_plain(value))


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _to_packed(value: Any) -> str:
    return base64.b64encode(pack(value)).decode()


def _from_packed(text: str) -> Any:
    return unpack(base64.b64decode(text, validate=True))


# The kinds that stand in a file as texts: how a value becomes one, and comes of it.
_TEXTS: dict[str, tuple[Callable[[Any], str], Callable[[str], Any]]] = {
    "text": (str, str),
    "json": (_to_json, json.loads),
    "packed": (_to_packed, _from_packed),
}


def text_of(value: Any) -> str:
    """Any value that the codec has a form for, as a text that is JSON where that gives it back as it was."""
    return _to_json(value) if _is_json(value) else f"msgpack:{_to_packed(value)}"


def value_of(text: str) -> Any:
    """The value of such a text.

    Raises:
        MalformedMessage: it is none.
    """
    try:
        packed = text.removeprefix("msgpack:")
        return json.loads(text) if packed == text else _from_packed(packed)
    except ValueError as exc:
        raise MalformedMessage("a text of a dataset is not the value that it should be") from exc


def length_of(columns: Any) -> int | None:
    """How many rows columns of infos have; None where there are none, or not as many in each."""
    if isinstance(columns, Mapping):
        lengths = {length for part in columns.values() if (length := length_of(part)) is not None}
        return lengths.pop() if len(lengths) == 1 else None
    return len(columns) if isinstance(columns, (np.ndarray, list, tuple)) else None


def rows_of(columns: Mapping[str, Any], n: int) -> list[dict[str, Any]]:
    """Infos of columns of which nothing is said: of a dataset that somebody else made."""
    infos: list[dict[str, Any]] = [{} for _ in range(n)]
    for key, column in columns.items():
        values = rows_of(column, n) if isinstance(column, Mapping) else _plainly(column)
        for info, value in zip(infos, values, strict=True):
            info[str(key)] = value
    return infos


def _plainly(column: NDArray[Any] | Sequence[Any]) -> list[Any]:
    values = list(column)
    values = [value.decode(errors="replace") if isinstance(value, bytes) else value for value in values]
    return [str(value) if isinstance(value, str) else value for value in values]
